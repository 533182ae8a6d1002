"""Track 2: the speedrun's trainer on the 350M class, to a validation loss of 2.92 (the preset `medium`).

torchrun --standalone --nproc_per_node=8 modded_nanogpt/train_gpt_medium.py
"""

import sys
from pathlib import Path

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from modded_nanogpt import train_gpt
from nanogpt.common.errors import run_command


def main(argv: list[str]) -> int:
    """As `train_gpt.main`, from the preset `medium`."""
    return train_gpt.main(argv, default_preset="medium")


if __name__ == "__main__":
    run_command(main)
