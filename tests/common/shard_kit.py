"""A small sound token set, and ways to damage it."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

from nanogpt.common.shards import HEADER_BYTES, write_manifest, write_shard
from nanogpt.common.storage import atomic_write_json

TRAIN1, TRAIN2, VAL = "s_train_000001.bin", "s_train_000002.bin", "s_val_000000.bin"


def make_set(root: Path, name: str = "s", tokenizer: str = "gpt2", vocab_size: int = 50257) -> Path:
    """A sound set: two training shards of 600 tokens, one validation shard of 100."""
    folder = root / name
    folder.mkdir(parents=True)
    rng = np.random.default_rng(7)
    files = []
    for file, count in ((TRAIN1, 600), (TRAIN2, 600), (VAL, 100)):
        tokens = rng.integers(0, vocab_size, count).astype(np.uint16)
        files.append({**write_shard(folder / file, tokens), "split": "val" if "val" in file else "train"})
    if tokenizer == "char":
        atomic_write_json(folder / "meta.json", {"chars": "".join(map(chr, range(32, 32 + vocab_size)))})
    write_manifest(folder, name, tokenizer, vocab_size, 50256 if tokenizer == "gpt2" else None, files)
    return folder


def edit_bytes(name: str, change: Callable[[bytearray], object]) -> Callable[[Path], None]:
    """A mutation of a file's bytes; `change` works in place, or returns the new content."""

    def mutate(folder: Path) -> None:
        data = bytearray((folder / name).read_bytes())
        changed = change(data)
        (folder / name).write_bytes(data if changed is None else bytes(changed))

    return mutate


def flip(offset: int, name: str = TRAIN1) -> Callable[[Path], None]:
    """A flipped bit."""

    def change(data: bytearray) -> None:
        data[offset] ^= 1

    return edit_bytes(name, change)


def with_manifest_again(change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Path], None]:
    """Other tokens in the first shard, and a manifest that vouches for them: only the content is wrong."""

    def mutate(folder: Path) -> None:
        found = json.loads((folder / "manifest.json").read_text())
        tokens = change(np.fromfile(folder / TRAIN1, "<u2", offset=HEADER_BYTES))
        found["files"][0] = {**write_shard(folder / TRAIN1, tokens.astype(np.uint16)), "split": "train"}
        (folder / "manifest.json").write_text(json.dumps(found))

    return mutate
