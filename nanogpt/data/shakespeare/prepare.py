"""Tiny Shakespeare in GPT-2's byte-pair tokens: 301,966 training tokens, 36,059 for validation.

    python nanogpt/data/shakespeare/prepare.py

The text and the GPT-2 vocabulary are downloaded once (2.6 MB, checksums pinned). DATA_MIRROR names a folder
or a base URL that has them too.
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

NAME = "shakespeare"


@dataclass(frozen=True)
class Config:
    """The command line."""

    data_root: str = knob("", "folder that holds the token sets (default $DATA_ROOT, else data/)")


def main(argv: list[str]) -> None:
    """Make the set, or say that it is there."""
    config = parse(Config, argv, prog=f"nanogpt/data/{NAME}/prepare.py", description=__doc__)
    import numpy as np

    from nanogpt.common.gpt2_encoding import gpt2_encoding
    from nanogpt.common.shards import GPT2_VOCAB, TokenSet, data_root
    from nanogpt.data import small_sets

    root = data_root(config.data_root)

    def make() -> TokenSet:
        play = small_sets.shakespeare_text(root)
        encoding = gpt2_encoding(root)
        splits = {
            # One document without an end-of-text token, as in nanoGPT: the counts stay comparable.
            split: np.array(encoding.encode_ordinary(part), dtype=np.uint16)
            for split, part in small_sets.split_90_10(play).items()
        }
        source = {"url": small_sets.SHAKESPEARE_URL, "sha256": small_sets.SHAKESPEARE_SHA256}
        return small_sets.publish(NAME, root, splits, "gpt2", GPT2_VOCAB, source=source)

    small_sets.prepare_small(NAME, root, make)


if __name__ == "__main__":
    run_command(main, again=GOES_ON)
