"""A model and a data set so small that a whole run takes a fifth of a second."""

import json
import random
from pathlib import Path

import numpy as np

from nanogpt.common.shards import write_manifest, write_shard
from nanogpt.common.storage import atomic_write_json

WORDS = ("the ", "cat ", "sat ", "on ", "a ", "mat. ", "dog ", "ran ")
FLAGS = (
    "--dataset=tiny", "--device=cpu", "--num_threads=1", "--n_layer=1", "--n_head=2", "--n_embd=16",
    "--block_size=16", "--batch_size=4", "--eval_interval=10", "--eval_tokens=512", "--warmup_iters=2",
    "--max_iters=20", "--lr_decay_iters=20", "--learning_rate=1e-2", "--min_lr=1e-3",
)  # fmt: skip


def make_data(root: Path, name: str = "tiny", seed: int = 1) -> Path:
    """A character set of random words: 20,000 training and 2,200 validation tokens; its folder."""
    folder = root / name
    folder.mkdir(parents=True)
    rng = random.Random(seed)
    text = "".join(rng.choice(WORDS) for _ in range(6000))
    chars = "".join(sorted(set("".join(WORDS))))
    ids = np.array([chars.index(char) for char in text], np.uint16)
    cut = len(ids) * 9 // 10
    files = [
        {**write_shard(folder / f"{name}_train_000001.bin", ids[:cut]), "split": "train"},
        {**write_shard(folder / f"{name}_val_000000.bin", ids[cut:]), "split": "val"},
    ]
    atomic_write_json(folder / "meta.json", {"chars": chars})
    write_manifest(folder, name, "char", len(chars), None, files)
    return folder


def events(folder: Path, kind: str | None = None) -> list[dict]:
    """The lines of a run's metrics.jsonl, of one kind if asked. Every line must be JSON."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    found = [json.loads(line) for line in lines]
    return [event for event in found if kind in (None, event["event"])]


def losses(folder: Path) -> dict[int, float]:
    """Training loss by step; a step that was computed twice must have given the same number."""
    found: dict[int, float] = {}
    for event in events(folder, "train"):
        if found.setdefault(event["step"], event["loss"]) != event["loss"]:
            raise AssertionError(f"step {event['step']}: {found[event['step']]!r}, again: {event['loss']!r}")
    return found


def val_losses(folder: Path) -> dict[int, float]:
    """Validation loss by step, likewise."""
    found: dict[int, float] = {}
    for event in events(folder, "val"):
        if found.setdefault(event["step"], event["val_loss"]) != event["val_loss"]:
            raise AssertionError(f"validation at {event['step']} differs from attempt to attempt")
    return found


def final_weights(folder: Path, step: int = 20) -> bytes:
    """model.safetensors and optimizer.safetensors of a step."""
    checkpoint = folder / "checkpoints" / f"step_{step:08d}"
    return b"".join((checkpoint / f"{part}.safetensors").read_bytes() for part in ("model", "optimizer"))
