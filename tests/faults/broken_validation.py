"""nanogpt.train whose last validation breaks: what a forked child runs (`module=` of zygote.py)."""

import nanogpt.setup
from tests.faults.zygote import command_of


def main(argv: list[str]) -> int:
    """Train; the second validation raises, as when memory is out."""
    whole, calls = nanogpt.setup.evaluate, []

    def evaluate(*args: object) -> float:
        calls.append(args)
        if len(calls) == 2:
            raise MemoryError("no memory for the validation")
        return whole(*args)

    nanogpt.setup.evaluate = evaluate
    return command_of("nanogpt.train")(argv)
