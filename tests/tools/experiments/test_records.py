"""The files that grow: torn lines, crashes between two writes, many processes at once, damaged folders."""

import json
import subprocess
import sys
from pathlib import Path

import kit
import pytest

from nanogpt.common.errors import UserError
from tools.experiments import collect, queue, records, status

PROGRAM = """
import sys
from pathlib import Path
from tools.experiments import collect, records
experiment = records.read(Path(sys.argv[1]))
print(*(verdict.state for verdict in collect.collect(experiment)))
"""


def metrics_of(folder: Path, seed: int, steps: int = 6, status: str = "finished") -> None:
    """A run directory that ended as `status`."""
    folder.mkdir(parents=True)
    rows = [{"event": "start", "step": 0}]
    rows += [{"event": "train", "step": s, "loss": 4 - s / 10, "ms": 10.0} for s in range(steps)]
    rows += [{"event": "val", "step": s, "val_loss": 4 - s / 10 + seed / 1000} for s in (0, 3, steps)]
    rows += [{"event": "end", "step": steps, "status": status, "val_loss": 4 - steps / 10 + seed / 1000}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "config.json").write_text("{}")


@pytest.fixture
def experiment(clone, tmp_path):
    """An experiment of 6 runs, all of which have ended and none of which was collected."""
    (clone / "experiment_logs").mkdir(exist_ok=True)
    name = f"files_{abs(hash(str(tmp_path))) % 10**9}"
    path = kit.configuration(tmp_path, experiment_name=name, n_runs=6)
    from tools.experiments import trainer
    from tools.experiments.config import load

    config = load(path)
    made = records.create(
        clone,
        records.Experiment(Path("x"), config, trainer.find(clone, config, "x"), 0),
        records.keep_code(clone),
    )
    for run_id, seed in made.runs:
        metrics_of(made.run_folder(run_id), seed)
    return made


def assert_whole(folder: Path) -> None:
    rows = kit.lines(folder / "results.jsonl")
    assert sorted(row["run_id"] for row in rows) == list(range(6))
    metrics = kit.lines(folder / "metrics.jsonl")
    keys = [(row["run_id"], row["step"], "val_loss" in row) for row in metrics]
    assert len(keys) == len(set(keys)) == 6 * 9
    assert json.loads((folder / "summary.json").read_text())["statistics"]["successful_runs"] == 6


def test_many_collect_at_once(experiment):
    command = [sys.executable, "-c", PROGRAM, str(experiment.folder)]
    running = [
        subprocess.Popen(command, cwd=kit.ROOT, stdout=subprocess.PIPE, text=True, env=kit.environment())
        for _ in range(6)
    ]
    said = [process.communicate(timeout=600)[0].split() for process in running]
    assert said == [["finished"] * 6] * 6
    assert_whole(experiment.folder)


def test_killed_at_any_write_the_next_collect_completes_it(experiment):
    """Every prefix of what a collect writes, at a spread of lengths, is what a kill can leave."""
    collect.collect(experiment)
    whole = {name: (experiment.folder / name).read_bytes() for name in ("results.jsonl", "metrics.jsonl")}
    metrics = whole["metrics.jsonl"]
    for cut in range(0, len(metrics), 397):
        done = metrics[:cut].count(b"\n") // 9
        lines = whole["results.jsonl"].splitlines(keepends=True)
        (experiment.folder / "metrics.jsonl").write_bytes(metrics[:cut])
        (experiment.folder / "results.jsonl").write_bytes(b"".join(lines[:done]))
        (experiment.folder / "summary.json").unlink(missing_ok=True)
        collect.collect(experiment)
        assert_whole(experiment.folder)
    for cut in range(1, len(whole["results.jsonl"]), 61):
        (experiment.folder / "results.jsonl").write_bytes(whole["results.jsonl"][:cut])
        collect.collect(experiment)
        assert_whole(experiment.folder)
        assert (experiment.folder / "metrics.jsonl").stat().st_size == len(metrics)


def test_what_is_not_the_runs_own_doing_is_no_result(experiment):
    for run_id, values in enumerate(
        ({"exit": 75}, {"exit": 137}, {"exit": -9}, {"exit": 74}, {"exit": 2}, {})
    ):
        folder = experiment.run_folder(run_id)
        text = (folder / "metrics.jsonl").read_text().splitlines()
        (folder / "metrics.jsonl").write_text("\n".join(text[:-1]) + '\n{"event": "tr')
        if values:
            collect.write_outcome(folder, **values)
    assert {verdict.state for verdict in collect.collect(experiment)} == {"unfinished"}
    assert not (experiment.folder / "results.jsonl").exists()


@pytest.mark.parametrize("value", ["null", "NaN", "1e999", '"3.2"', "true"])
def test_a_loss_that_is_no_number_is_a_failure_with_its_reason(experiment, value):
    path = experiment.run_folder(2) / "metrics.jsonl"
    path.write_text(f'{{"event": "end", "step": 6, "status": "finished", "val_loss": {value}}}\n')
    collect.collect(experiment)
    row = next(row for row in kit.lines(experiment.folder / "results.jsonl") if row["run_id"] == 2)
    assert row["success"] is False and "finite" in row["reason"]


@pytest.mark.parametrize("name", ["experiment.json", "config.json"])
@pytest.mark.parametrize(
    "data", [b"", b"{", b"[]", b"{}", b'{"format": 1, "trainer": 3, "gpus": 0}', b"\xff"]
)
def test_a_damaged_folder_is_one_line(experiment, name, data):
    (experiment.folder / name).write_bytes(data)
    with pytest.raises(UserError) as caught:
        records.read(experiment.folder)
    assert str(experiment.folder) in str(caught.value) and "\n" not in str(caught.value)


def test_strange_lines_in_results_are_left_alone(experiment):
    (experiment.folder / "results.jsonl").write_text(
        'null\n{"run_id": "0", "success": true}\n{"run_id": 99, "success": true}\n{"run_id": 3}\nnoise\n'
    )
    assert {verdict.state for verdict in collect.collect(experiment)} == {"finished"}
    assert set(records.results(experiment)) == set(range(6))
    assert "noise" in (experiment.folder / "results.jsonl").read_text()


def test_a_run_that_ends_while_slurm_is_asked_is_finished_and_has_its_line(experiment, monkeypatch):
    """The queue still shows it, or no longer does: either way it is neither lost nor missing."""
    last = experiment.run_folder(5) / "metrics.jsonl"
    whole = last.read_text()
    last.write_text("".join(whole.splitlines(keepends=True)[:-1]))
    records.append_lines(experiment.folder / "launches.jsonl", [{"launch": "x", "number": 1, "runs": {}}])

    def answer(root: Path, submitted: list) -> dict:
        last.write_text(whole)
        return {}

    monkeypatch.setattr(status.slurm, "available", lambda: True)
    monkeypatch.setattr(queue, "places", answer)
    found = status.standings(experiment.folder.parents[1], [experiment])
    assert [standing.state for standing in found] == ["finished"] * 6
    assert_whole(experiment.folder)


def test_a_dirty_clone_leaves_its_diff(tmp_path):
    root = kit.make_clone(tmp_path / "git")
    for words in (
        ["init", "-q"],
        ["add", "-A"],
        ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "x"],
    ):
        subprocess.run(["git", *words], cwd=root, check=True)
    path = kit.configuration(tmp_path / "configs", experiment_name="dirty")
    clean = kit.engaging(root, "run", "--config", path, "--executor", "local", "--n-runs", 1)
    with (root / "modded_nanogpt" / "train_gpt_simple.py").open("a") as file:
        file.write("# changed here\n")
    dirty = kit.engaging(root, "run", "--config", path, "--executor", "local", "--n-runs", 1)
    assert "no commit holds" not in clean.stdout
    assert "note: no commit holds 1 changed file of this clone" in dirty.stdout
    first, second = sorted(kit.experiments(root, "dirty"), key=lambda p: p.stat().st_ctime)
    assert not (first / "git_diff.patch").exists()
    assert "+# changed here" in (second / "git_diff.patch").read_text()
    found = [json.loads((folder / "summary.json").read_text())["git_info"] for folder in (first, second)]
    assert [info["dirty"] for info in found] == [False, True] and found[0]["digest"] != found[1]["digest"]


@pytest.mark.parametrize("time", ["20261129_060000", "20261129_235959", "20261129_200000_2"])
def test_an_experiments_name_at_any_hour(time):
    assert records.name_of(Path(f"experiment_logs/my_try_2_{time}")) == "my_try_2"


def test_a_run_of_one_process_that_never_began_is_not_started(experiment):
    # the runner notes the GPUs of all runs of the process, also of those that it did not reach
    folder = experiment.run_folder(5)
    (folder / "metrics.jsonl").unlink()
    (folder / "config.json").unlink()
    collect.write_outcome(folder, gpus=[])
    last = status.standings(experiment.folder.parents[1], [experiment])[-1]
    assert (last.run_id, last.state, last.note) == (5, "missing", "not started")
    collect.write_outcome(folder, exit=2)
    assert "refused to start" in collect.verdicts(experiment)[5].note
