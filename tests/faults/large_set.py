"""nanogpt.train for which every data set is a large one: what a forked child runs (`module=` of zygote.py)."""

import nanogpt.train
from tests.faults.zygote import command_of


def main(argv: list[str]) -> int:
    """Train; all ranks check the data together, after the run directory was made."""
    nanogpt.train.SMALL_DATA = 0
    return command_of("nanogpt.train")(argv)
