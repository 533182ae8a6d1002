"""A tiny token set, and the small trainer as a user starts it."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from nanogpt.common.manifest import write_manifest
from nanogpt.common.shards import write_shard

ROOT = Path(__file__).resolve().parents[2]
VOCAB, STEPS = 200, 6
FLAGS = (
    "tiny", "--dataset=tiny", f"--num_iterations={STEPS}", "--batch_size=4", "--device_batch_size=2", "--num_layers=4",
    "--sequence_length=32", "--model_dim=32", "--val_tokens=256", "--val_loss_every=3", "--num_threads=1",
)  # fmt: skip


def make_data(root: Path) -> Path:
    """A data root whose set `tiny` has texts that count upwards, in two train shards."""
    (root / "tiny").mkdir(parents=True)
    rng = np.random.default_rng(5)
    entries = []
    for split, number, tokens in (("train", 1, 1500), ("train", 2, 1500), ("val", 0, 400)):
        text = np.concatenate([(rng.integers(0, VOCAB) + np.arange(50)) % VOCAB for _ in range(tokens // 50)])
        entry = write_shard(root / "tiny" / f"tiny_{split}_{number:06}.bin", text.astype(np.uint16))
        entries.append({**entry, "split": split})
    write_manifest(root / "tiny", "tiny", "gpt2", VOCAB, None, entries)
    return root


def environment(data: Path, **more: str) -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", "STAGE_"))}
    return {**kept, "DATA_ROOT": str(data), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **more}


def run(data: Path, *flags: object, timeout: float = 600, **more: str) -> str:
    """What the command has printed."""
    command = [sys.executable, "-m", "modded_nanogpt.train_gpt_simple", *FLAGS, *map(str, flags)]
    done = subprocess.run(
        command, env=environment(data, **more), cwd=ROOT, text=True, capture_output=True, timeout=timeout
    )
    assert done.returncode == 0, (done.stdout, done.stderr)
    return done.stdout


def records(out: Path, event: str) -> list[dict]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == event]


def losses(out: Path) -> dict[tuple[str, int], float]:
    train = {("train", line["step"]): line["loss"] for line in records(out, "train")}
    return train | {("val", line["step"]): line["val_loss"] for line in records(out, "val")}


def wait_for(condition, seconds: float = 600.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)
