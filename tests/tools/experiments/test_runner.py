"""`engaging experiment` on this machine: what it writes, and that nothing is repeated or hidden."""

import json
import statistics
from concurrent.futures import ThreadPoolExecutor

import kit
import pytest
from kit import run, seeds, two_variants


def test_what_an_experiment_leaves(clone, tmp_path):
    path = kit.configuration(
        tmp_path, experiment_name="leaves", description="what is left", target_val_loss=3.28
    )
    said = run(clone, path, "--n_runs", 3).stdout
    (folder,) = kit.experiments(clone, "leaves")
    assert {"experiment.log", "config.json", "results.jsonl", "metrics.jsonl", "summary.json", "runs"} <= {
        entry.name for entry in folder.iterdir()
    }
    assert sorted(entry.name for entry in (folder / "runs").iterdir()) == [
        "run_0_seed_42", "run_1_seed_43", "run_2_seed_44",
    ]  # fmt: skip
    rows = kit.lines(folder / "results.jsonl")
    keys = ["run_id", "seed", "final_val_loss", "final_train_loss", "time_seconds", "final_step", "success"]
    assert [list(row) for row in rows] == [keys] * 3
    assert [(row["run_id"], row["seed"], row["final_step"]) for row in rows] == [
        (0, 42, 8),
        (1, 43, 8),
        (2, 44, 8),
    ]
    assert rows[0]["time_seconds"] == 0.08
    metrics = [row for row in kit.lines(folder / "metrics.jsonl") if row["run_id"] == 1]
    assert metrics[0] == {
        "run_id": 1, "step": 0, "val_loss": metrics[0]["val_loss"], "train_time_ms": 0.0, "step_avg_ms": 0.0,
    }  # fmt: skip
    assert list(metrics[1]) == ["run_id", "step", "train_loss", "train_time_ms", "step_avg_ms"]
    assert metrics[-1]["val_loss"] == rows[1]["final_val_loss"] and metrics[-1]["step_avg_ms"] == 10.0
    assert "finished with" in (folder / "runs" / "run_1_seed_43" / "stdout.log").read_text()
    summary = json.loads((folder / "summary.json").read_text())
    losses = [row["final_val_loss"] for row in rows]
    found = summary["statistics"]
    assert found["n_runs"] == found["successful_runs"] == 3
    assert found["val_loss"]["mean"] == pytest.approx(statistics.mean(losses))
    assert set(found["val_loss"]) == {"mean", "std", "min", "max", "median", "ci_95"}
    assert set(found["time"]) == {"mean", "std", "total"} and {"git_info", "gpu_info", "end_time"} <= set(
        summary
    )
    assert summary["gpu_info"]["gpus"] == ["Toy GPU"]
    assert "Runs: 3/3" in said and "95% CI: [" in said and "Best Validation Loss" in said
    assert json.loads((folder / "config.json").read_text())["description"] == "what is left"


def test_variants_take_turns(clone, tmp_path):
    for name, flags in (("turn_a", {}), ("turn_b", {"variant": "palm_parallel"})):
        kind = "architecture" if flags else "none"
        kit.configuration(tmp_path, experiment_name=name, hyperparameters=flags, modification_type=kind)
    said = run(clone, tmp_path, "--n-runs", 2).stdout
    order = [line.split("] ")[1] for line in said.splitlines() if line.startswith("[")]
    assert order == [f"turn_{v} run {r} seed {42 + r}" for r in (0, 1) for v in "ab"]


def test_a_dry_run_writes_nothing(clone, tmp_path):
    before = kit.experiments(clone)
    done = run(clone, kit.STAGE_A + "/palm_screening.json", "--n-runs", 2, "--dry-run")
    commands = [line for line in done.stdout.splitlines() if line.startswith("STAGE_")]
    assert len(commands) == 2 and all("STAGE_NUM_ITERATIONS=1000" in line for line in commands)
    assert (
        "--variant=palm_parallel" in commands[0] and "--seed=42" in commands[0] and "--seed=43" in commands[1]
    )
    assert "--gpus=1" in commands[0] and kit.experiments(clone) == before


def test_a_dry_run_of_one_job_prints_its_one_command_and_the_plan(clone, tmp_path):
    two_variants(tmp_path, "dry_once")
    said = run(clone, tmp_path, "--n-runs", 2, "--one-job", "--dry-run").stdout.splitlines()
    (command,) = [line for line in said if "run.sh" in line]
    assert command.endswith("_TIMESTAMP/runs/plan-TIMESTAMP.json") and "--seed" not in command
    plan = [json.loads(line.removeprefix("#")) for line in said if line.startswith("#   {")]
    assert [(entry["seed"], entry.get("variant")) for entry in plan] == [
        (seed, variant) for seed in (42, 43) for variant in (None, "palm_parallel")
    ]


@pytest.mark.parametrize(
    ("flag", "why", "status"),
    [("break_seed", "it broke", 1), ("nan_seed", "was not finite at step", 70)],
)
def test_a_failed_run_is_counted_shown_and_left_out(clone, tmp_path, flag, why, status):
    name = f"fails_{flag}"
    path = kit.configuration(tmp_path, experiment_name=name, hyperparameters={flag: 43})
    done = run(clone, path, "--n-runs", 3, check=False)
    (folder,) = kit.experiments(clone, name)
    assert (
        done.returncode == status
        and f"Failed, left out: run 1 seed 43: {'' if flag[0] == 'b' else 'the loss'}" in done.stdout
    )
    rows = kit.lines(folder / "results.jsonl")
    assert seeds(folder) == [(0, 42, True), (1, 43, False), (2, 44, True)]
    assert rows[1]["final_val_loss"] is None and why in rows[1]["reason"]
    found = json.loads((folder / "summary.json").read_text())["statistics"]
    assert (found["n_runs"], found["successful_runs"], found["excluded"][0]["seed"]) == (3, 2, 43)
    assert "nothing is missing" in kit.engaging(clone, "resume", name).stdout
    if flag == "break_seed":
        kit.engaging(clone, "resume", name, "--retry-failed", check=False)
        assert [row["run_id"] for row in kit.lines(folder / "results.jsonl")] == [0, 1, 2, 1]
        assert json.loads((folder / "summary.json").read_text())["retried_runs"] == [1]


def test_all_runs_in_one_process_and_one_compile(clone, tmp_path):
    two_variants(tmp_path, "once", hyperparameters={"break_seed": 43})
    done = run(clone, tmp_path, "--n-runs", 3, "--one-job", check=False)
    folders = kit.experiments(clone, "once")
    assert [seeds(folder) for folder in folders] == [[(0, 42, True), (1, 43, False), (2, 44, True)]] * 2
    logs = [path.read_text() for folder in folders for path in folder.glob("runs/plan-*.log")]
    assert logs[0].count("compiled once") == 3, (
        done.stdout
    )  # once, and once more after each of the two that broke
    plan = json.loads(next(folders[0].glob("runs/plan-*.json")).read_text())
    assert [entry["seed"] for entry in plan] == [44, 44] and plan[1]["variant"] == "palm_parallel"
    assert plan[0]["flags"]["num_iterations"] == 8


def test_more_seeds_are_added_and_none_is_repeated(clone, tmp_path):
    path = kit.configuration(tmp_path, experiment_name="more")
    run(clone, path, "--n-runs", 1)
    (folder,) = kit.experiments(clone, "more")
    kit.engaging(clone, "resume", "more", "--n-runs", 3)
    assert seeds(folder) == [(0, 42, True), (1, 43, True), (2, 44, True)]
    assert "2 runs were added to the 1 that were planned first" in " ".join(
        kit.tools(clone, "analyze", "more", "--no-plots").split()
    )
    fewer = kit.engaging(clone, "resume", "more", "--n-runs", 2, check=False)
    assert fewer.returncode == 2 and "never taken away" in fewer.stderr


def test_four_at_once_get_folders_of_their_own(clone, tmp_path):
    path = kit.configuration(tmp_path, experiment_name="same")
    with ThreadPoolExecutor(4) as pool:
        assert all(d.returncode == 0 for d in pool.map(lambda _: run(clone, path, "--n-runs", 1), range(4)))
    folders = kit.experiments(clone, "same")
    assert len(folders) == 4 and all(seeds(folder) == [(0, 42, True)] for folder in folders)
