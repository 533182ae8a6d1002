"""The small trainer itself, its preset tiny on the CPU: many runs in one process, killed, resumed, the losses equal."""

import shutil
import sys
import time
from pathlib import Path

import kit
import pytest

sys.path.append(str(Path(__file__).resolve().parents[1]))

import run_kit

TINY = {
    "preset": "tiny", "dataset": "letters", "num_layers": 1, "model_dim": 16, "num_heads": 2, "num_threads": 1,
    "val_tokens": 256, "batch_size": 2, "device_batch_size": 2, "sequence_length": 16,
}  # fmt: skip


@pytest.fixture(scope="module")
def clone(tmp_path_factory) -> Path:
    """A checkout with the real trainer, and a data set of letters."""
    root = kit.make_clone(tmp_path_factory.mktemp("real") / "clone")
    shutil.rmtree(root / "modded_nanogpt")
    shutil.copytree(
        kit.ROOT / "modded_nanogpt", root / "modded_nanogpt", ignore=shutil.ignore_patterns("__pycache__")
    )
    run_kit.make_data(root / "data", "letters")
    return root


@pytest.fixture(autouse=True)
def data(clone, monkeypatch):
    monkeypatch.setenv("DATA_ROOT", str(clone / "data"))


def write(folder: Path, prefix: str, steps: int) -> Path:
    for name, flags in {"base": {}, "palm": {"variant": "palm_parallel"}}.items():
        kit.configuration(
            folder, experiment_name=f"{prefix}_{name}", n_runs=2, hyperparameters={**TINY, **flags},
            modification_type="architecture" if flags else "none",
            stage_config={"num_iterations": steps, "val_loss_every": 10},
        )  # fmt: skip
    return folder


def losses(clone: Path, prefix: str) -> list[list[float]]:
    rows = [kit.lines(folder / "results.jsonl") for folder in kit.experiments(clone, prefix)]
    return [[row["final_val_loss"] for row in sorted(some, key=lambda r: r["run_id"])] for some in rows]


def test_many_in_one_process_killed_and_resumed_have_the_losses_of_an_undisturbed_study(clone, tmp_path):
    words = ("--executor", "local", "--one-job")
    kit.engaging(clone, "run", "--config", write(tmp_path / "a", "whole", 150), *words)
    process = kit.start(clone, "run", "--config", write(tmp_path / "b", "cut", 150), "--study", "cut", *words)
    end = time.monotonic() + 600
    while time.monotonic() < end:
        paths = list(clone.glob("experiment_logs/cut_palm*/runs/run_0_seed_42/metrics.jsonl"))
        if paths and paths[0].read_text().count('"train"') > 20:
            break
        time.sleep(0.01)
    process.kill()
    process.wait()
    # told to stop by its runner's death, the trainer saves; until it has, nothing else may start that run
    while "running: process" in kit.engaging(clone, "status", "cut").stdout:
        assert time.monotonic() < end
    assert "a checkpoint was saved" in kit.engaging(clone, "status", "cut").stdout
    said = kit.engaging(clone, "resume", "cut").stdout
    assert 2 <= said.count("to start:") <= 3
    whole, cut = losses(clone, "whole"), losses(clone, "cut")
    assert [len(row) for row in whole] == [2, 2] and cut == whole
    assert len({loss for row in whole for loss in row}) == 4
