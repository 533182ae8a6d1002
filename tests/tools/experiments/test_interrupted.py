"""`engaging experiment` killed, stopped, started twice: nothing is lost, and every run is started once."""

import json
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import kit
from kit import LOCAL, run, seeds, two_variants


def killed_half_way(clone, path, *words):
    """A study of 4 runs, its runner and trainer killed without warning while the second run trains."""
    process = kit.start(clone, "run", "--config", path, *LOCAL, "--n-runs", 2, *words)
    end = time.monotonic() + 600
    name = f"{json.loads(next(path.glob('*.json')).read_text())['experiment_name'][:4]}"
    while time.monotonic() < end:
        folders = kit.experiments(clone, name)
        done = sum(len(kit.lines(folder / "results.jsonl")) for folder in folders)
        started = sum(b'"train"' in read(folder / "runs/run_0_seed_42/metrics.jsonl") for folder in folders)
        if len(folders) == 2 and done == 1 and started == 2:
            break
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)  # all at once: the trainer left alone might end meanwhile
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
    assert process.wait(600) == 75
    (folder,) = kit.experiments(clone, "stops")
    assert "interrupted at step" in kit.engaging(clone, "status", "stops").stdout
    kit.engaging(clone, "resume", "stops")
    events = [row["event"] for row in kit.lines(metrics)]
    assert events.count("start") == 1 and events.count("resume") == 1 and seeds(folder) == [(0, 42, True)]


def test_an_experiment_is_not_run_twice_at_once(clone, tmp_path):
    path = kit.configuration(tmp_path, experiment_name="held", hyperparameters={"pause": 0.1})
    process = kit.start(clone, "run", "--config", path, *LOCAL, "--n-runs", 2)
    while not list((clone / "experiment_logs").glob("held_*/runs/*/metrics.jsonl")):
        time.sleep(0.02)
    said = kit.engaging(clone, "status", "held").stdout
    assert "running" in said and "queued: its turn comes" in said
    assert "nothing was started" in kit.engaging(clone, "resume", "held").stdout
    assert process.wait(600) == 0


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
