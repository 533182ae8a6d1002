"""A clone with the stand-in trainer, and `engaging experiment` run in it as a user types it."""

import contextlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

from nanogpt.common import errors
from tools import cli

ROOT = Path(__file__).resolve().parents[3]
STANDIN = Path(__file__).with_name("standin_trainer.py")
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
LOCAL = ("--executor", "local")
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
    """`engaging experiment WORDS...`; with `check`, a failure fails the test and shows what it said.

    In this process, which has imported everything; in one of its own where several tests' commands run at once.
    """
    command = ["experiment", *map(str, words)]
    if threading.current_thread() is threading.main_thread():
        done = in_process(clone, command, environment(**env))
    else:
        done = subprocess.run(
            [sys.executable, "-m", "tools", *command], cwd=clone, env=environment(**env),
            stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=600,
        )  # fmt: skip
    assert not check or done.returncode == 0, f"{words}\n{done.stdout}{done.stderr}"
    return done


def in_process(folder: Path, command: list[str], env: dict[str, str]) -> subprocess.CompletedProcess:
    """`engaging COMMAND...` as typed in `folder` with this environment: what it printed, and its exit status."""
    out, err = io.StringIO(), io.StringIO()
    before, handlers = dict(os.environ), {number: signal.getsignal(number) for number in SIGNALS}
    here = Path.cwd()
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(env)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                errors.run_command(lambda _: cli.main(command))
            except SystemExit as end:
                status = end.code
    finally:
        os.chdir(here)
        os.environ.clear()
        os.environ.update(before)
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return subprocess.CompletedProcess(command, status, out.getvalue(), err.getvalue())


def tools(clone: Path, *words: object) -> str:
    """What `engaging WORDS...` prints; a failure fails the test."""
    done = in_process(clone, [*map(str, words)], environment())
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


def run(clone: Path, path: object, *words: object, check: bool = True) -> subprocess.CompletedProcess:
    """`engaging experiment run --config PATH WORDS...` on this machine."""
    return engaging(clone, "run", "--config", path, *LOCAL, *words, check=check)


def seeds(folder: Path) -> list[tuple[int, int, bool]]:
    """(run, seed, success) of each line of an experiment's results."""
    return [(row["run_id"], row["seed"], row["success"]) for row in lines(folder / "results.jsonl")]


def two_variants(folder: Path, prefix: str, **values: object) -> None:
    """The configurations PREFIX_base and PREFIX_palm."""
    hyperparameters = values.pop("hyperparameters", {})
    configuration(folder, experiment_name=f"{prefix}_base", hyperparameters=hyperparameters, **values)
    configuration(
        folder, experiment_name=f"{prefix}_palm", modification_type="architecture",
        hyperparameters={"variant": "palm_parallel", **hyperparameters}, **values,
    )  # fmt: skip
