"""Refuses what a trainer would refuse of its flags and presets, without torch: before a job waits in a queue for it.

    python check_flags.py nanogpt.train [WORDS...]

Silent when they will do; else the trainer's own line, and exit status 2.
"""

import importlib
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])

from nanogpt.common.errors import run_command
from nanogpt.common.flags import parse_values

FIRST_PRESET = {"modded_nanogpt.train_gpt": "record"}  # of a trainer that has one where none is named


def main(argv: list[str]) -> None:
    """The check. UserError as the trainer raises it."""
    trainer, words = argv[0], argv[1:]
    if "--help" in words or "-h" in words:
        return
    if trainer in FIRST_PRESET and all(word.startswith("-") for word in words):
        words = [FIRST_PRESET[trainer], *words]
    config = importlib.import_module(f"{trainer.rpartition('.')[0]}.config")
    values = parse_values(
        config.Config, words, prog=f"python -m {trainer}", description="", presets=config.PRESETS
    )
    if not values.get("smoke"):  # which changes most of them
        config.Config(**values)


if __name__ == "__main__":
    run_command(main)
