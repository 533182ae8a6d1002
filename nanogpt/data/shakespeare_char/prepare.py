"""Tiny Shakespeare, one token a character: 1,003,854 training tokens, 111,540 for validation, vocabulary 65.

    python nanogpt/data/shakespeare_char/prepare.py

The text is downloaded once (1.1 MB, checksum pinned). DATA_MIRROR names a folder or a base URL that has it.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

if __package__ in (None, ""):
    sys.path[0] = str(
        Path(__file__).resolve().parents[3]
    )  # the repository root, so that `import nanogpt` works

from nanogpt.common.errors import GOES_ON, run_command
from nanogpt.common.flags import knob, parse

NAME = "shakespeare_char"


@dataclass(frozen=True)
class Config:
    """The command line."""

    data_root: str = knob("", "folder that holds the token sets (default $DATA_ROOT, else data/)")


def main(argv: list[str]) -> None:
    """Make the set, or say that it is there."""
    config = parse(Config, argv, prog=f"nanogpt/data/{NAME}/prepare.py", description=__doc__)
    from nanogpt.common.shards import TokenSet, data_root
    from nanogpt.data import small_sets

    root = data_root(config.data_root)

    def make() -> TokenSet:
        play = small_sets.shakespeare_text(root)
        chars = "".join(sorted(set(play)))
        splits = {
            split: small_sets.char_ids(part, chars) for split, part in small_sets.split_90_10(play).items()
        }
        source = {"url": small_sets.SHAKESPEARE_URL, "sha256": small_sets.SHAKESPEARE_SHA256}
        return small_sets.publish(NAME, root, splits, "char", len(chars), chars, source=source)

    small_sets.prepare_small(NAME, root, make)


if __name__ == "__main__":
    run_command(main, again=GOES_ON)
