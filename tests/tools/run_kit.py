"""A clone of the code to run from, so that nobody's editing meets a test, and a data set of a few thousand tokens."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np

from nanogpt.data import small_sets

ROOT = Path(__file__).resolve().parents[2]
CHARS = "\n" + "".join(map(chr, range(32, 127)))
# A model and a data set so small that a step takes a millisecond.
TINY = (
    "--n_layer=1", "--n_head=1", "--n_embd=16", "--block_size=16", "--batch_size=2", "--eval_tokens=512",
    "--log_interval=1", "--device=cpu", "--num_threads=1",
)  # fmt: skip


def make_clone(folder: Path) -> Path:
    """Copy what the commands need of the repository to `folder`."""
    for name in ("nanogpt", "tools"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "slurm" / "lib", folder / "slurm" / "lib")  # what a checkout is known by
    shutil.copy(ROOT / "pyproject.toml", folder)
    return folder


def make_data(root: Path, name: str = "letters") -> None:
    """A set of characters under `root`: the alphabet over and over with noise, the same every time."""
    generator = np.random.default_rng(5)
    splits = {}
    for split, size in (("train", 6000), ("val", 1200)):
        ids = (np.arange(size) + generator.integers(0, 3, size)) % len(CHARS)
        splits[split] = ids.astype(np.uint16)
    small_sets.publish(name, root, splits, "char", len(CHARS), CHARS)


def environment(data_root: Path, **more: str) -> dict[str, str]:
    """The environment to run a command in: one thread, no network mirror, this data root."""
    clean = {key: value for key, value in os.environ.items() if key not in ("DATA_MIRROR", "PYTHONPATH")}
    return {**clean, "ENV_PATH": sys.prefix, "OMP_NUM_THREADS": "1", "DATA_ROOT": str(data_root), **more}


def run(clone: Path, data_root: Path, *words: object, **options) -> subprocess.CompletedProcess:
    """`python WORDS...` in the clone."""
    command = [sys.executable, *map(str, words)]
    options = {"stdin": subprocess.DEVNULL, "timeout": 300, "env": environment(data_root), **options}
    return subprocess.run(command, cwd=clone, capture_output=True, text=True, **options)


def forked(zygote, clone: Path, data_root: Path, *words: object) -> subprocess.CompletedProcess:
    """`run` in a process that has torch already, for a command of which there is a real start elsewhere."""
    env = {**environment(data_root), "DATA_MIRROR": None, "PYTHONPATH": None}
    child = zygote.run(list(words), module="tests.faults.forked_python", cwd=clone, env=env)
    return subprocess.CompletedProcess(list(words), child.status, child.stdout, child.stderr)
