"""Trainers that are not the small one: a script that only prints, the baseline, one that refuses its data."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))

import kit
import run_kit
from kit import run


def test_an_old_script_that_only_prints(clone, tmp_path):
    script = clone / "modded_nanogpt" / "train_gpt_modified.py"
    script.write_text(
        "import os\nfor step in range(0, int(os.environ['STAGE_NUM_ITERATIONS']) + 1):\n"
        '    print(f\'step:{step}/4 val_loss:{5 - step / 10 + int(os.environ["SEED"]) / 1000:.4f} '
        'train_time:{step * 120}ms step_avg:{120 if step else float("nan"):.2f}ms\')\n'
        "    print(f'step:{step + 1}/4 train_loss:4.5000 train_time:{step * 120 + 120}ms step_avg:120.00ms')\n"
    )
    path = kit.configuration(
        tmp_path, experiment_name="old", script="train_gpt_modified.py", stage_config={"num_iterations": 4}
    )
    run(clone, path, "--n-runs", 2)
    (folder,) = kit.experiments(clone, "old")
    rows = kit.lines(folder / "results.jsonl")
    assert [row["final_val_loss"] for row in rows] == [4.642, 4.643] and rows[0]["time_seconds"] == 0.6
    assert kit.lines(folder / "metrics.jsonl")[0]["val_loss"] == 5.042


def test_the_baselines_trainer_is_run_as_well(clone, tmp_path, monkeypatch):
    """nanogpt/train.py on the CPU: another trainer, its own flags, a real run directory."""
    flags = {name: literal(value) for name, _, value in (word[2:].partition("=") for word in run_kit.TINY)}
    flags |= {"dataset": "letters", "max_iters": 6, "eval_interval": 3, "compile": False}
    run_kit.make_data(clone / "data", "letters")
    monkeypatch.setenv("DATA_ROOT", str(clone / "data"))
    path = kit.configuration(
        tmp_path, experiment_name="real", script="nanogpt/train.py", stage_config={}, hyperparameters=flags
    )
    run(clone, path, "--n-runs", 1)
    (folder,) = kit.experiments(clone, "real")
    (row,) = kit.lines(folder / "results.jsonl")
    assert row["success"] and row["final_step"] == 6 and 2 < row["final_val_loss"] < 5
    assert [row["step"] for row in kit.lines(folder / "metrics.jsonl")] == [0, 1, 2, 3, 3, 4, 5, 6, 6]


def literal(text: str) -> object:
    return int(text) if text.isdigit() else text


def test_refused_data_is_one_line_and_stops_that_experiment(clone, tmp_path):
    path = kit.configuration(
        tmp_path, experiment_name="refused", script="nanogpt/train.py", stage_config={},
        hyperparameters={"dataset": "not_there", "device": "cpu"},
    )  # fmt: skip
    done = run(clone, path, "--n-runs", 2, check=False)
    assert (
        done.returncode == 2
        and done.stderr.count("\n") == 1
        and "its trainer says: --dataset=not_there" in done.stderr
    )
    assert kit.experiments(clone, "refused") == []
    done = run(clone, path, "--n-runs", 2, "--no-check", check=False)
    assert done.returncode == 2 and done.stdout.count("] refused run") == 1
    assert "2 missing" in kit.engaging(clone, "status", "refused").stdout
