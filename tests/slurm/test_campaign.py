"""The judge of the disturbed runs on SLURM (section slurm of `make faults`) finds what it is there to find."""

import json
import shutil
from collections import Counter
from pathlib import Path

import pytest

from tests.faults import slurm_runs
from tests.faults.slurm_judge import SAVE_INTERVAL, STEPS, judge
from tests.faults.slurm_runs import KINDS, Outcome, plan, tally, wanted


def write_run(out: Path, first: int = 150, again: int = 140, loss_at: int = -1, ends: int = 1) -> Path:
    """A run of two attempts: steps 0 to `first`, then from `again` on; `loss_at` has another loss."""
    folder = out / "checkpoints" / f"step_{STEPS:08d}"
    folder.mkdir(parents=True)
    for part in ("model", "optimizer"):
        (folder / f"{part}.safetensors").write_bytes(part.encode())
    lines = [{"event": "start", "step": 0}]
    for attempt, steps in enumerate((range(first), range(again, STEPS))):
        lines += [{"event": "resume", "step": again}] if attempt else []
        lines += [{"event": "train", "step": s, "loss": 4 - s / 1000 + (s == loss_at) * 1e-9} for s in steps]
    lines.append({"event": "val", "step": STEPS, "val_loss": 3.0})
    lines += [{"event": "end", "step": STEPS, "status": "finished", "val_loss": 3.0}] * ends
    (out / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return out


@pytest.mark.parametrize(
    ("changes", "log", "state", "said"),
    [
        ({}, "resumed from step_1", "COMPLETED", ""),
        ({}, "resumed from step_1", "TIMEOUT", "its job ended TIMEOUT"),
        ({"loss_at": 399}, "resumed from step_1", "COMPLETED", "training losses differ"),
        ({"again": 151}, "resumed from step_1", "COMPLETED", "training losses differ"),
        ({"ends": 0}, "resumed from step_1", "COMPLETED", "it ended in 0 ways"),
        ({"ends": 2}, "resumed from step_1", "COMPLETED", ""),
        ({}, "the first attempt's log is gone", "COMPLETED", "does not hold them all"),
        (
            {"again": 150 - SAVE_INTERVAL - 1},
            "resumed from step_1",
            "COMPLETED",
            "41 steps were computed twice",
        ),
    ],
)
def test_the_judge(tmp_path, changes, log, state, said):
    reference = write_run(tmp_path / "straight", 200, 200)
    found = judge(write_run(tmp_path / "run", **changes), reference, log, state)
    assert said in found and bool(said) == bool(found), found


def test_other_weights_and_a_missing_record_are_found(tmp_path):
    reference, run = write_run(tmp_path / "straight"), write_run(tmp_path / "run")
    (run / "checkpoints" / f"step_{STEPS:08d}" / "model.safetensors").write_bytes(b"other")
    assert "final weights" in judge(run, reference, "resumed from step_1", "COMPLETED")
    shutil.rmtree(run)
    assert "FileNotFoundError" in judge(run, reference, "", "COMPLETED")


def test_a_plan_is_seeded_and_holds_every_kind():
    missing = {name: wanted(kind, 100) for name, kind in KINDS.items()}
    assert sum(missing.values()) >= 100 and all(missing.values())
    names = [(kind, names) for kind, names, _ in plan(7, 0, missing)]
    assert names == [(kind, names) for kind, names, _ in plan(7, 0, missing)]
    assert Counter(kind for kind, group in names for _ in group) == missing
    assert names != [(kind, names) for kind, names, _ in plan(8, 0, missing)]


def test_the_tally_counts_disturbances_failures_and_runs_that_were_spared():
    outcomes = [
        Outcome("a", "kill", True, 3, 12, ""),
        Outcome("b", "kill", True, 2, 3, "training losses differ"),
        Outcome("c", "kill", False, 1, 0, ""),
    ]
    made = tally(outcomes, 2)
    assert (made.injected, made.failures) == (3, ["kill b: training losses differ"])
    assert made.where == {"runs": 2, "steps computed twice": 15, KINDS["kill"].what: 2}
    assert "2 runs could be disturbed, of 3" in tally(outcomes, 3).failures


def test_a_group_that_breaks_off_is_a_failure():
    def broken(*_):
        raise AssertionError("no such step")

    kind = slurm_runs.Kind("x", 1, 1, broken)
    slurm_runs.KINDS["broken"] = kind
    try:
        (found,) = slurm_runs._group(None, "broken", ["broken-0-0"], None)
    finally:
        del slurm_runs.KINDS["broken"]
    assert "no such step" in found.problem and not found.hit
