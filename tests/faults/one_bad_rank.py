"""nanogpt.train in which rank 1's own gradient is NaN at step 12: what a forked child runs (`module=` of zygote.py)."""

import os

import nanogpt.setup
from tests.faults.zygote import command_of

BAD_STEP = 12


def main(argv: list[str]) -> int:
    """Train; the losses of all ranks are finite, and so are the others' gradients."""
    average, calls = nanogpt.setup.average_gradients, []

    def spoil(model, ranks):
        calls.append(model)
        if os.environ.get("RANK") == "1" and len(calls) == BAD_STEP + 1:
            next(model.parameters()).grad[0, 0] = float("nan")
        return average(model, ranks)

    nanogpt.setup.average_gradients = spoil
    return command_of("nanogpt.train")(argv)
