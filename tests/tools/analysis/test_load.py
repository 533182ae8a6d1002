"""Experiments, run directories and folders of them: what is read, how it is grouped, what is left out and why."""

import json
from pathlib import Path

import numpy as np
import pytest
import study_kit

from nanogpt.common.errors import UserError
from tools.analysis import jobs, load, records, run_directories
from tools.analysis.load import load as read


def test_an_experiment(tmp_path: Path) -> None:
    folder = study_kit.write_experiment(tmp_path, "baseline", [3.28, 3.29, 3.27], failed=(1,))
    (group,) = read([folder]).groups
    assert (group.name, group.is_baseline, group.planned, group.target) == ("baseline", True, 3, 3.28)
    assert group.losses == [3.28, 3.27] and [run.seed for run in group.counted] == [42, 44]
    (out,) = group.excluded
    assert (out.name, out.seed) == ("run 1", 43) and "exit status 70" in out.reason
    assert group.hardware()[0].words() == "8 x NVIDIA H100 80GB HBM3"
    assert len(group.counted[0].metrics.val) == 17 and len(group.counted[0].metrics.train) > 50


def test_a_shelf_and_several_folders(shelf: Path, tmp_path: Path) -> None:
    assert [group.name for group in read([shelf]).groups] == [
        f"nanogpt_{name}_full" for name in ("baseline", "curriculum", "depth_warm", "palm_parallel")
    ]
    folders = sorted(shelf.iterdir())
    assert len(read(folders[:2]).groups) == 2
    assert len(read([shelf, *folders]).groups) == 4  # the same folder twice is read once
    assert len(read([shelf.parent]).groups) == 4


def test_runs_without_a_result_are_listed(tmp_path: Path) -> None:
    folder = study_kit.write_experiment(tmp_path, "palm", [3.28, 3.29, 3.27], config={"n_runs": 5})
    rows = (folder / "results.jsonl").read_text().splitlines()
    (folder / "results.jsonl").write_text("\n".join(rows[:2]) + "\n")
    (folder / "summary.json").unlink()
    (group,) = read([folder]).groups
    assert len(group.losses) == 2
    assert [(run.name, run.reason[:13]) for run in group.excluded] == [("run 2", "no result yet")]
    assert group.notes == ["2 of 5 planned runs have no result yet"]


def test_a_runs_last_line_counts(tmp_path: Path) -> None:
    folder = study_kit.write_experiment(tmp_path, "palm", [3.28, 3.29], failed=(1,))
    row = {
        "run_id": 1,
        "seed": 43,
        "final_val_loss": 3.295,
        "time_seconds": 1.0,
        "final_step": 400,
        "success": True,
    }
    with (folder / "results.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n" + json.dumps(row) + "\n")  # the same twice is no contradiction
    assert read([folder]).groups[0].losses == [3.28, 3.295]
    with (folder / "results.jsonl").open("a") as file:
        file.write(json.dumps({**row, "final_val_loss": 3.1}) + "\n")
    with pytest.raises(UserError, match="line 5: run_id: 1: this run has a result already"):
        read([folder])


def test_what_contradicts_itself_is_noted(tmp_path: Path) -> None:
    folder = study_kit.write_experiment(tmp_path, "palm", [3.28, 3.29])
    summary = {"statistics": {"n_runs": 5, "val_loss": {"mean": 3.1}}, "gpu_info": {}}
    (folder / "summary.json").write_text(json.dumps(summary))
    rows = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    study_kit.lines(folder / "results.jsonl", [{**rows[0], "final_val_loss": 3.2}, rows[1]])
    notes = " | ".join(read([folder]).groups[0].notes)
    assert "mean loss of 3.1000, results.jsonl 3.2450" in notes
    assert "counts 5 runs, results.jsonl 2" in notes
    assert "run 0: results.jsonl says 3.2000, its last validation in metrics.jsonl 3.2800" in notes


def test_run_directories_are_grouped_by_what_they_were_told(tmp_path: Path) -> None:
    for seed in (1, 2, 3):
        study_kit.write_run(tmp_path / f"base-seed{seed}", 3.3 + seed / 1000, seed=seed, learning_rate=0.1)
        study_kit.write_run(tmp_path / f"fast_{seed}", 3.2 + seed / 1000, seed=seed, learning_rate=0.2)
    study_kit.write_run(tmp_path / "other", 3.1, learning_rate=0.3)
    groups = read([tmp_path]).groups
    assert [(group.name, len(group.runs)) for group in groups] == [("base", 3), ("fast", 3), ("other", 1)]
    assert groups[0].losses == pytest.approx([3.301, 3.302, 3.303]) and groups[0].seconds == [1.0, 1.0, 1.0]
    assert groups[0].hardware()[0].words() == "CPU of node1"
    (one,) = read([tmp_path / "other"]).groups
    assert one.path == tmp_path / "other" and one.counted[0].train_loss is not None


@pytest.mark.parametrize(
    "status, reason",
    [("", "it has not ended"), ("interrupted", "ended as 'interrupted'"), ("stopped", "'stopped'")],
)
def test_a_run_that_has_not_finished_does_not_count(tmp_path: Path, status: str, reason: str) -> None:
    run = run_directories.read_run(study_kit.write_run(tmp_path / "run", 3.3, status=status))
    assert not run.counts and reason in run.reason and run.val_loss == pytest.approx(3.3)


def test_what_the_speedruns_trainer_says_at_the_end(tmp_path: Path) -> None:
    for seed in (1, 2):
        run = study_kit.write_run(tmp_path / f"run-{seed}", 2.9 + seed / 1000, seed=seed, status="")
        end = {"event": "end", "step": 100, "status": "finished", "val_loss": 2.9 + seed / 1000, "train_ms": 73_800.5,
               "target": 2.92, "target_met": True, "eligible": False, "ineligible": ["4 GPUs, not 8"]}  # fmt: skip
        with (run / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(end) + "\n")
        config = json.loads((run / "config.json").read_text())
        (run / "config.json").write_text(json.dumps({**config, "data": {"train": "ab", "val": "cd"}}))
    (group,) = read([tmp_path]).groups
    assert (group.target, group.seconds) == (2.92, [73.8005, 73.8005])
    assert group.notes[0] == "run-1 is not eligible for a record: 4 GPUs, not 8"


def test_an_experiment_that_still_runs_may_have_a_summary(tmp_path: Path) -> None:
    folder = study_kit.write_experiment(tmp_path, "palm", [3.28, 3.29])
    (folder / "summary.json").write_text(json.dumps({"complete": False, "gpu_info": {}}))
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"run_id": 2, "st')
    assert read([folder]).groups[0].losses == [3.28, 3.29]


def test_a_run_that_was_resumed_elsewhere_has_no_comparable_time(tmp_path: Path) -> None:
    folder = study_kit.write_run(tmp_path / "run", 3.3)
    attempts = [
        {"time": "2026-11-21T06:00:00+00:00", "host": "n1", "gpus": [name]} for name in ("A100", "H100")
    ]
    (folder / "environment.json").write_text(json.dumps({"attempts": attempts}))
    run = run_directories.read_run(folder)
    assert run.hardware.gpu == "1 x A100 and 1 x H100"


@pytest.mark.parametrize(
    "info, words",
    [
        ({"gpus": ["NVIDIA H100"] * 8}, "8 x NVIDIA H100"),
        ({"gpus": [{"name": "L40S", "memory": 46}] * 2}, "2 x L40S"),
        ({"n_gpus": 4, "gpus": ["A100"], "hosts": ["n1"], "torch": ["2.13.0"]}, "4 x A100"),
        ({"name": "A100", "count": 4}, "4 x A100"),
        ({"gpu_names": ["A100", "H100"]}, "2 x A100 + H100"),
        ({"gpu": "H100", "world_size": 1}, "1 x H100"),
        ({"packages": {"torch": "2.13.0+cpu"}, "host": "n3"}, "CPU of n3"),
        ({"n_gpus": 8, "gpus": []}, "unknown hardware"),
        ({}, "unknown hardware"),
    ],
)
def test_hardware_as_different_programs_write_it(info: dict, words: str) -> None:
    assert records.hardware_of(info, "x").words() == words


def test_what_the_runner_noted_beside_a_run(tmp_path: Path) -> None:
    folder = study_kit.write_experiment(
        tmp_path, "palm", [3.28, 3.29], gpu={"n_gpus": 1, "gpus": ["A100", "H100"]}
    )
    (group,) = read([folder]).groups
    assert "its own runs used different hardware (2 x A100 + H100)" in records.time_obstacle([group])
    for run_id in (0, 1):  # the trainer wrote down the machine, the runner its GPUs
        run = folder / "runs" / f"run_{run_id}_seed_{42 + run_id}"
        run.mkdir()
        attempt = {"time": "2026-11-21T06:00:00+00:00", "host": "n1", "packages": {"torch": "2.13.0"}}
        (run / "environment.json").write_text(json.dumps({"attempts": [attempt]}))
        (run / ".outcome.json").write_text(json.dumps({"exit": 0, "gpus": ["H100"]}))
    (group,) = read([folder]).groups
    assert group.hardware() == [records.Hardware("H100", 1, "n1", "2.13.0")]
    assert records.time_obstacle([group]) == ""
    (run / ".outcome.json").write_text(json.dumps({"exit": 0, "gpus": ["A100"]}))
    assert "its own runs used different hardware (1 x A100, 1 x H100)" in records.time_obstacle(
        read([folder]).groups
    )


def test_pairs_only_where_runs_took_turns(tmp_path: Path) -> None:
    def groups(name: str, first: list[int], second: list[int]) -> list:
        folder = tmp_path / name
        study_kit.write_experiment(folder, "baseline", [3.28, 3.29, 3.27], starts=first)
        study_kit.write_experiment(folder, "palm", [3.27, 3.28, 3.26], starts=second)
        return read([folder]).groups

    turns = records.interleaved(*groups("abab", [0, 2, 4], [1, 3, 5]))
    assert [(a.seed, b.seed) for a, b in turns] == [(42, 42), (43, 43), (44, 44)]
    assert len(records.interleaved(*groups("abba", [0, 3, 4], [1, 2, 5]))) == 3
    assert records.interleaved(*groups("aaabbb", [0, 1, 2], [3, 4, 5])) == []
    baseline, palm = groups("hosts", [0, 2, 4], [1, 3, 5])
    palm.runs[1].hardware = records.Hardware("NVIDIA H100 80GB HBM3", 8, "node2")
    assert records.interleaved(baseline, palm) == []


@pytest.mark.parametrize("word", ["nowhere", "nanogpt_palm_paralel_full_20261121_060000"])
def test_what_is_not_there_is_one_line(shelf: Path, word: str) -> None:
    with pytest.raises(UserError, match="does not exist") as error:
        read([shelf / word])
    assert ("did you mean" in str(error.value)) == (word != "nowhere")


def test_several_processes_read_the_same(
    shelf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for seed in (1, 2, 3):
        study_kit.write_run(tmp_path / "runs" / f"run-{seed}", 3.3, seed=seed)
    alone = read([shelf, tmp_path])
    monkeypatch.setattr(jobs, "PARALLEL_FROM", 0)
    monkeypatch.setattr(load, "RUNS_AT_A_TIME", 2)
    monkeypatch.setattr(load, "PART", 20_000)
    together = read([shelf, tmp_path])
    for one, other in zip(alone.groups, together.groups, strict=True):
        assert (one.name, one.losses, one.seconds) == (other.name, other.losses, other.seconds)
        for first, second in zip(one.runs, other.runs, strict=True):
            for kind in ("train", "val"):
                pair = [getattr(run.metrics, kind) for run in (first, second)]
                assert np.array_equal(pair[0].loss, pair[1].loss) and np.array_equal(
                    pair[0].step, pair[1].step
                )
    (tmp_path / "runs" / "run-3" / "metrics.jsonl").write_text("broken\n")
    with pytest.raises(UserError, match="line 1: broken"):
        read([shelf, tmp_path])
