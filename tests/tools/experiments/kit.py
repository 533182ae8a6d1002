"""A clone with the stand-in trainer, and `engaging experiment` run in it as a user types it."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
STANDIN = Path(__file__).with_name("standin_trainer.py")
STAGE_A = "tools/experiments/configs/stage_a_screening"


def make_clone(folder: Path) -> Path:
    """The code that the runner needs; modded_nanogpt holds the stand-in alone."""
    for name in ("nanogpt", "tools", "slurm"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "practice"))
    for name in ("pyproject.toml", "activate_env.sh", ".gitignore"):
        shutil.copy(ROOT / name, folder)
    (folder / "modded_nanogpt").mkdir()
    shutil.copy(STANDIN, folder / "modded_nanogpt" / "train_gpt_simple.py")
    return folder


def environment(**more: str) -> dict[str, str]:
    """No SLURM on PATH, this Python's environment, one thread."""
    drop = ("PYTHONPATH", "ENGAGING_GPU_PRICES")
    clean = {k: v for k, v in os.environ.items() if k not in drop and not k.startswith(("SLURM_", "STAGE_"))}
    return {**clean, "ENV_PATH": sys.prefix, "OMP_NUM_THREADS": "1", **more}


def engaging(clone: Path, *words: object, check: bool = True, **env: str) -> subprocess.CompletedProcess:
    """`engaging experiment WORDS...`; with `check`, a failure fails the test and shows what it said."""
    command = [sys.executable, "-m", "tools", "experiment", *map(str, words)]
    done = subprocess.run(
        command, cwd=clone, env=environment(**env), stdin=subprocess.DEVNULL, capture_output=True, text=True,
        timeout=600,
    )  # fmt: skip
    assert not check or done.returncode == 0, f"{words}\n{done.stdout}{done.stderr}"
    return done


def tools(clone: Path, *words: object) -> str:
    """What `engaging WORDS...` prints; a failure fails the test."""
    command = [sys.executable, "-m", "tools", *map(str, words)]
    done = subprocess.run(command, cwd=clone, env=environment(), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, f"{words}\n{done.stdout}{done.stderr}"
    return done.stdout


def start(clone: Path, *words: object) -> subprocess.Popen:
    """The same in the background, a session of its own."""
    command = [sys.executable, "-m", "tools", "experiment", *map(str, words)]
    return subprocess.Popen(
        command, cwd=clone, env=environment(), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip


def experiments(clone: Path, name: str = "") -> list[Path]:
    """The experiments' folders whose name begins with `name`, in the order of their names."""
    return sorted(
        p for p in (clone / "experiment_logs").glob(f"{name}*") if (p / "experiment.json").is_file()
    )


def lines(path: Path) -> list[dict]:
    """The objects of a file of JSON lines; a line that is none fails."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def configuration(folder: Path, **values: object) -> Path:
    """A small configuration of the stand-in: CPU, 8 steps."""
    config = {
        "experiment_name": "toy",
        "script": "modded_nanogpt/train_gpt_simple.py",
        "n_gpus": 0,
        "stage_config": {"num_iterations": 8, "val_loss_every": 2},
        **values,
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{config['experiment_name']}.json"
    path.write_text(json.dumps(config))
    return path
