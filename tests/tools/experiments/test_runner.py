"""`engaging experiment` on this machine: what it writes, and that nothing is lost, repeated or hidden."""

import json
import os
import signal
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))

import kit
import pytest
import run_kit

LOCAL = ("--executor", "local")


def run(clone, path, *words, check=True):
    return kit.engaging(clone, "run", "--config", path, *LOCAL, *words, check=check)


def seeds(folder):
    return [(row["run_id"], row["seed"], row["success"]) for row in kit.lines(folder / "results.jsonl")]


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


def killed_half_way(clone, path, *words):
    """A study of 4 runs, its runner and trainer killed without warning while the second run trains."""
    process = kit.start(clone, "run", "--config", path, *LOCAL, "--n-runs", 2, *words)
    end = time.monotonic() + 600
    name = f"{json.loads(next(path.glob('*.json')).read_text())['experiment_name'][:4]}"
    while time.monotonic() < end:
        folders = kit.experiments(clone, name)
        done = sum(len(kit.lines(folder / "results.jsonl")) for folder in folders)
        started = sum((folder / "runs" / "run_0_seed_42" / "metrics.jsonl").is_file() for folder in folders)
        if len(folders) == 2 and done == 1 and started == 2:
            break
        time.sleep(0.02)
    process.kill()
    process.wait()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and str(clone).encode() in read(entry / "cmdline"):
            os.kill(int(entry.name), signal.SIGKILL)
    return kit.experiments(clone, name)


def read(path):
    try:
        return path.read_bytes()
    except OSError:
        return b""


def two_variants(folder, prefix, **values):
    hyperparameters = values.pop("hyperparameters", {})
    kit.configuration(folder, experiment_name=f"{prefix}_base", hyperparameters=hyperparameters, **values)
    kit.configuration(
        folder, experiment_name=f"{prefix}_palm", modification_type="architecture",
        hyperparameters={"variant": "palm_parallel", **hyperparameters}, **values,
    )  # fmt: skip


def test_killed_and_resumed_it_finishes_exactly_the_missing_pairs(clone, tmp_path):
    two_variants(tmp_path, "kill", hyperparameters={"pause": 0.05})
    folders = killed_half_way(clone, tmp_path, "--study", "killed")
    assert sum(len(kit.lines(folder / "results.jsonl")) for folder in folders) == 1
    status = kit.engaging(clone, "status", "killed").stdout
    assert "3 missing" in status and "running or cut off at step" in status
    before = kit.lines(folders[0] / "results.jsonl")
    said = kit.engaging(clone, "resume", "killed").stdout
    assert said.count("to start:") == 3
    assert kit.lines(folders[0] / "results.jsonl")[: len(before)] == before
    for folder in folders:
        assert seeds(folder) == [(0, 42, True), (1, 43, True)]
        rows = kit.lines(folder / "metrics.jsonl")
        assert len({(row["run_id"], row["step"], "val_loss" in row) for row in rows}) == len(rows)
    again = kit.engaging(clone, "resume", "killed").stdout
    assert "nothing is missing" in again and len(kit.lines(folders[0] / "results.jsonl")) == 2


def test_asked_to_stop_the_trainer_saves_and_resume_goes_on(clone, tmp_path):
    path = kit.configuration(tmp_path, experiment_name="stops", hyperparameters={"pause": 0.1})
    process = kit.start(clone, "run", "--config", path, *LOCAL, "--n-runs", 1)
    metrics = None
    end = time.monotonic() + 600
    while time.monotonic() < end:
        metrics = next(iter((clone / "experiment_logs").glob("stops_*/runs/*/metrics.jsonl")), None)
        if metrics is not None and '"train"' in metrics.read_text():
            break
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 75
    (folder,) = kit.experiments(clone, "stops")
    assert "interrupted at step" in kit.engaging(clone, "status", "stops").stdout
    kit.engaging(clone, "resume", "stops")
    events = [row["event"] for row in kit.lines(metrics)]
    assert events.count("start") == 1 and events.count("resume") == 1 and seeds(folder) == [(0, 42, True)]


@pytest.mark.parametrize(
    ("flag", "why"), [("break_seed", "it broke"), ("nan_seed", "was not finite at step")]
)
def test_a_failed_run_is_counted_shown_and_left_out(clone, tmp_path, flag, why):
    name = f"fails_{flag}"
    path = kit.configuration(tmp_path, experiment_name=name, hyperparameters={flag: 43})
    done = run(clone, path, "--n-runs", 3, check=False)
    (folder,) = kit.experiments(clone, name)
    assert (
        done.returncode != 0
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
    fewer = kit.engaging(clone, "resume", "more", "--n-runs", 2, check=False)
    assert fewer.returncode == 2 and "never taken away" in fewer.stderr


def test_four_at_once_get_folders_of_their_own(clone, tmp_path):
    path = kit.configuration(tmp_path, experiment_name="same")
    with ThreadPoolExecutor(4) as pool:
        assert all(d.returncode == 0 for d in pool.map(lambda _: run(clone, path, "--n-runs", 1), range(4)))
    folders = kit.experiments(clone, "same")
    assert len(folders) == 4 and all(seeds(folder) == [(0, 42, True)] for folder in folders)


def test_an_experiment_is_not_run_twice_at_once(clone, tmp_path):
    path = kit.configuration(tmp_path, experiment_name="held", hyperparameters={"pause": 0.1})
    process = kit.start(clone, "run", "--config", path, *LOCAL, "--n-runs", 2)
    while not list((clone / "experiment_logs").glob("held_*/runs/*/metrics.jsonl")):
        time.sleep(0.02)
    said = kit.engaging(clone, "status", "held").stdout
    assert "running" in said and "queued: its turn comes" in said
    assert "nothing was started" in kit.engaging(clone, "resume", "held").stdout
    assert process.wait(60) == 0


def test_three_that_resume_at_once_start_every_run_once(clone, tmp_path):
    path = kit.configuration(tmp_path, experiment_name="crowd", hyperparameters={"pause": 0.05})
    run(clone, path, "--n-runs", 1)
    (folder,) = kit.experiments(clone, "crowd")
    state = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**state, "n_runs": 3}))
    with ThreadPoolExecutor(3) as pool:
        done = list(pool.map(lambda _: kit.engaging(clone, "resume", "crowd", check=False), range(3)))
    assert seeds(folder) == [(0, 42, True), (1, 43, True), (2, 44, True)]
    started = sum(one.stdout.count("to start:") for one in done)
    assert started == 2 and {one.returncode for one in done} <= {0, 2}
    events = kit.lines(folder / "runs" / "run_1_seed_43" / "metrics.jsonl")
    assert [row["event"] for row in events].count("start") == 1


def test_a_whole_study_in_three_stages(clone):
    words = (
        "--n-runs",
        2,
        "--n-gpus",
        0,
        "--study",
        "whole",
        "--",
        "--num_iterations=12",
        "--val_loss_every=2",
    )
    said = run(clone, "tools/experiments/configs", *words).stdout
    assert "palm_parallel goes on to stage B" in said and "palm_parallel goes on to stage C" in said
    finished = {
        folder.name.rsplit("_", 2)[0] for folder in kit.experiments(clone, "nanogpt") if seeds(folder)
    }
    assert finished == {
        *(f"nanogpt_{name}_screening" for name in ("baseline", "palm", "curriculum", "depth_warm")),
        "nanogpt_baseline_validation", "nanogpt_palm_validation", "nanogpt_baseline", "nanogpt_palm_parallel",
    }  # fmt: skip
    promoted = kit.engaging(clone, "promote", "whole", "--price", "2.5").stdout
    assert (
        "palm_parallel goes on to stage C" in promoted
        and "stage C has begun" in promoted
        and "saved:" in promoted
    )
    assert "not promoted from stage A" in kit.engaging(clone, "status", "whole").stdout
    rows = json.loads(kit.engaging(clone, "plan", "whole", *LOCAL, "--json").stdout)
    assert [(row["stage"], row["runs"], row["left"]) for row in rows] == [
        ("A", 8, 0),
        ("B", 8, 0),
        ("C", 8, 0),
    ]


def test_the_one_pivot_after_a_stage_b_that_does_not_confirm(clone, tmp_path):
    for stage, steps in (("A", 8), ("B", 12), ("C", 12)):
        for name, flags in {
            "base": {},
            "palm": {"variant": "palm_parallel"},
            "fades": {"variant": "fades"},
        }.items():
            kit.configuration(
                tmp_path, experiment_name=f"pivot_{stage.lower()}_{name}", stage=stage, hyperparameters=flags,
                modification_type="architecture" if flags else "none", stage_config={"num_iterations": steps},
            )  # fmt: skip
    said = run(clone, tmp_path, "--n-runs", 2, "--study", "pivot").stdout
    assert "fades goes on to stage B" in said and "palm_parallel goes on to stage C" in said
    states = {}
    for row in json.loads(kit.engaging(clone, "status", "pivot", "--json").stdout):
        states.setdefault(row["experiment"].rsplit("_", 2)[0].removeprefix("pivot_"), set()).add(row["state"])
    done, skipped = {"finished"}, {"skipped"}
    assert states == {
        "a_base": done, "a_palm": done, "a_fades": done, "b_base": done, "b_palm": done, "b_fades": done,
        "c_base": done, "c_palm": done, "c_fades": skipped,
    }  # fmt: skip


def test_what_breaks_before_its_first_loss_is_missing_not_failed(clone, tmp_path):
    script = clone / "modded_nanogpt" / "train_gpt_breaks.py"
    script.write_text(
        "import sys\nif '--help' in sys.argv: sys.exit()\nraise ImportError('out_dir: no torch here')\n"
    )
    path = kit.configuration(tmp_path, experiment_name="breaks", script="train_gpt_breaks.py")
    done = run(clone, path, "--n-runs", 1, check=False)
    (folder,) = kit.experiments(clone, "breaks")
    assert done.returncode == 1 and not (folder / "results.jsonl").exists()
    said = kit.engaging(clone, "status", "breaks").stdout
    assert "missing: broke before its first loss (status 1): ImportError: out_dir: no torch here" in said


def test_stage_by_stage_with_promote_run(clone, tmp_path):
    for stage, folder in (("A", "stage_a"), ("B", "stage_b")):
        two_variants(tmp_path / folder, f"step_{stage.lower()}", stage=stage)
    run(clone, tmp_path / "stage_a", "--n-runs", 2, "--study", "steps")
    decision = json.loads(kit.engaging(clone, "promote", "steps", "--json").stdout)
    assert decision["advance"] == ["palm_parallel", "baseline"] and decision["to"] == "B"
    assert "next: engaging experiment promote steps" in kit.engaging(clone, "status", "steps").stdout
    kit.engaging(clone, "promote", "steps", "--run", "--n-runs", 2)
    assert [seeds(folder) for folder in kit.experiments(clone, "step_b")] == [
        [(0, 42, True), (1, 43, True)]
    ] * 2
    assert "goes on to stage C" in kit.engaging(clone, "promote", "steps").stdout


def test_a_study_is_found_by_its_name_though_a_folder_has_the_same(clone, tmp_path):
    (clone / "twin").mkdir()
    kit.configuration(clone / "twin", experiment_name="twin_base", n_runs=2)
    said = kit.engaging(clone, "run", "--config", "twin", "--study", "twin", *LOCAL).stdout
    assert "next: engaging analyze twin" in said
    assert "next: engaging analyze twin" in kit.engaging(clone, "status", "twin").stdout
    (row,) = json.loads(kit.engaging(clone, "plan", "twin", *LOCAL, "--json").stdout)
    assert (row["runs"], row["left"]) == (2, 0)  # of the study: nothing is left; of the configurations: two
    said = kit.tools(clone, "analyze", "twin", "--no-plots")
    assert "twin_base *   2/2" in said and said == kit.tools(clone, "analyze", "twin_base", "--no-plots")
    kit.tools(clone, "report", "twin")
    (folder,) = kit.experiments(clone, "twin_base")
    assert (folder / "report.html").is_file() and not (clone / "twin" / "report.html").exists()


def test_plan_of_configurations_with_prices(clone):
    words = ("tools/experiments/configs", *LOCAL, "--n-gpus", 0, "--minutes", "6m", "--json")
    rows = json.loads(kit.engaging(clone, "plan", *words).stdout)
    assert [(row["stage"], row["runs"], round(row["minutes"])) for row in rows] == [
        ("A", 8, 48),
        ("B", 12, 72),
        ("C", 20, 120),
    ]
    assert rows[0]["end"] <= rows[1]["start"]
    gpus = kit.engaging(clone, "plan", kit.STAGE_A, *LOCAL, "--minutes", "30m", "--price", "h100=9,l40s=1", check=False,
                        ENGAGING_GPU_PRICES="7")  # fmt: skip
    assert gpus.returncode == 1 and "needs 1 GPU, this machine has" in gpus.stdout
    dear = kit.engaging(clone, "plan", kit.STAGE_A, *LOCAL, "--price", "b200=9", check=False)
    assert "no price for these GPUs: --price h100=..." in dear.stdout
    priced = kit.engaging(
        clone, "plan", kit.STAGE_A, *LOCAL, "--minutes", "30m", "--price", "2", "--json", check=False
    )
    assert json.loads(priced.stdout)[0]["cost"] == 8 * 0.5 * 2


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
    """nanogpt/train.py on the CPU: another trainer, its own flags, a real run directory; a loss that is not finite."""
    flags = {name: literal(value) for name, _, value in (word[2:].partition("=") for word in run_kit.TINY)}
    flags |= {"dataset": "letters", "max_iters": 6, "eval_interval": 3, "compile": False}
    run_kit.make_data(clone / "data", "letters")
    monkeypatch.setenv("DATA_ROOT", str(clone / "data"))
    common = {"script": "nanogpt/train.py", "stage_config": {}, "n_runs": 1}
    kit.configuration(tmp_path, experiment_name="real_good", hyperparameters=flags, **common)
    wild = {**flags, "learning_rate": 1000, "grad_clip": 0, "warmup_iters": 0}
    kit.configuration(
        tmp_path,
        experiment_name="real_wild",
        hyperparameters=wild,
        modification_type="hyperparameter",
        **common,
    )
    done = run(clone, tmp_path, check=False)
    good, wild = (kit.lines(folder / "results.jsonl")[0] for folder in kit.experiments(clone, "real"))
    assert (
        done.returncode == 70
        and good["success"]
        and good["final_step"] == 6
        and 2 < good["final_val_loss"] < 5
    )
    assert wild["success"] is False and "not finite" in wild["reason"]
    steps = [row["step"] for row in kit.lines(kit.experiments(clone, "real_good")[0] / "metrics.jsonl")]
    assert steps == [0, 1, 2, 3, 3, 4, 5, 6, 6]


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


def test_without_an_answer_of_slurm_status_shows_what_is_known_and_resume_starts_nothing(clone, tmp_path):
    path = kit.configuration(tmp_path, experiment_name="blind")
    run(clone, path, "--n-runs", 1)
    kit.engaging(clone, "resume", "blind", "--n-runs", 2, "--dry-run")
    (folder,) = kit.experiments(clone, "blind")
    state = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**state, "n_runs": 2}))
    row = {"launch": "blind", "number": 1, "array": False, "runs": {"1": 0}}
    (folder / "launches.jsonl").write_text(json.dumps(row) + "\n")
    shelf = clone / "out" / ".launch" / "blind" / "001"
    shelf.mkdir(parents=True)
    job = {"name": "blind", "number": 1, "token": "t", "preset": "x", "trainer": "x", "runs": [], "args": []}
    (shelf / "job.json").write_text(json.dumps({**job, "job_id": "12", "state": "submitted"}))
    broken = tmp_path / "bin"
    broken.mkdir()
    for name in ("sbatch", "squeue", "sacct", "scontrol"):
        (broken / name).write_text(
            "#!/bin/sh\necho 'slurm_load: Unable to contact slurm controller' >&2\nexit 1\n"
        )
        (broken / name).chmod(0o755)
    away = {"PATH": f"{broken}:{os.environ['PATH']}"}
    said = kit.engaging(clone, "status", "blind", **away).stdout
    assert "unknown: SLURM does not answer" in said and "0 missing" not in said
    refused = kit.engaging(clone, "resume", "blind", check=False, **away)
    assert refused.returncode == 75 and refused.stderr.count("\n") == 1 and len(seeds(folder)) == 1
