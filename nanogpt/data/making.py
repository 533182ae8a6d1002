"""What the commands that cut documents into a token set share: knobs, the name's check, the work and its progress.

Standard library only until the work begins: `--help` and bad flags wait for nothing.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanogpt.common.errors import UserError
from nanogpt.common.flags import knob

if TYPE_CHECKING:
    from nanogpt.common.shards import TokenSet
    from nanogpt.data.sources import Source
    from nanogpt.data.token_stream import ShardWriter


@dataclass(frozen=True)
class SetFlags:
    """The knobs of all of them."""

    data_root: str = knob("", "folder that holds the token sets (default $DATA_ROOT, else data/)")
    name: str = knob("mine", "name of the token set and its folder")
    shard_tokens: int = knob(100_000_000, "tokens in one shard", low=1024, high=1_000_000_000)
    num_workers: int = knob(0, "threads that encode, 0: one a core", low=0, high=512)

    def __post_init__(self) -> None:
        """UserError for a name that is no folder's."""
        if not self.name or not self.name.replace("_", "").replace("-", "").isalnum():
            raise UserError(f"--name={self.name!r}: expected letters, digits, _ and -")


def format_knob() -> Any:
    """`--format` of those whose sets nanoGPT itself can read, too."""
    return knob(
        "shards", "bin: also nanoGPT's train.bin and val.bin, beside the shards", choices=("shards", "bin")
    )


def tokenize_all(
    flags: SetFlags, source: "Source", encode: Callable, writer: "ShardWriter", validates: Callable[[int], bool],
    total_bytes: int | None, max_documents: int = 0,
) -> None:  # fmt: skip
    """Encode the documents on all cores and write the shards, with a progress line."""
    from nanogpt.common.progress import Progress
    from nanogpt.data.token_stream import AlreadyDone, tokenize

    with Progress(f"tokenizing {flags.name}") as bar:
        try:
            tokenize(
                source, encode, writer, workers=flags.num_workers or len(os.sched_getaffinity(0)),
                validates=validates, max_documents=max_documents,
                report=lambda chars, documents, tokens: bar.update(
                    chars, total_bytes, f"{documents:,} documents, {tokens:,} tokens"
                ),
            )  # fmt: skip
        except AlreadyDone:
            print(f"{flags.name}: another process has finished it meanwhile", flush=True)


def print_raw(found: "TokenSet") -> list[Path]:
    """Write nanoGPT's train.bin and val.bin beside the shards, and say so; the paths."""
    from nanogpt.data.raw import write_raw

    paths = write_raw(found)
    for path in paths:
        print(f"{path}: {path.stat().st_size / 1e9:,.2f} GB, uint16")
    return paths
