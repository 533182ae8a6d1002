"""The time that a preempted run has to save, against the time that saves have taken."""

import json
from pathlib import Path

import pytest

from tools.runs import read_run
from tools.site import grace
from tools.site.grace import Cost


def a_run(folder: Path, saves: list[object], ms: float = 500.0, steps: int = 200) -> Path:
    folder.mkdir(parents=True)
    slow = {0: 90_000.0}  # the first one compiles
    lines = [{"event": "train", "step": s, "loss": 3.0, "ms": slow.get(s, ms)} for s in range(steps)]
    lines += [{"event": "save", "step": steps, "seconds": seconds} for seconds in saves]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_the_cost_is_the_longest_save_and_a_slow_step(tmp_path):
    assert grace.cost_of(read_run(a_run(tmp_path / "a", [1.5, 4.25, 2.0]))) == Cost("a", 4.25, 0.5)
    assert grace.cost_of(read_run(a_run(tmp_path / "never", []))) is None
    assert grace.cost_of(read_run(a_run(tmp_path / "odd", ["x", None, -3, 1]))) == Cost("odd", 1.0, 0.5)
    assert grace.cost_of(read_run(tmp_path / "absent")) is None


def test_the_costliest_of_the_newest_runs_counts(tmp_path):
    assert grace.costliest(tmp_path) is None
    for name, seconds in (("quick", 1.0), ("slow", 30.0), ("middling", 9.0)):
        a_run(tmp_path / "out" / name, [seconds])
    assert grace.costliest(tmp_path) == Cost("slow", 30.0, 0.5)


@pytest.mark.parametrize(
    ("save_s", "given", "kill_wait", "enough"),
    [
        (3.0, 60, 30, True),
        (89.0, 60, 30, True),
        (89.6, 60, 30, False),
        (3.0, 0, 2, False),
        (3.0, 0, None, False),
    ],
)
def test_grace_and_kill_wait_together_must_suffice(save_s, given, kill_wait, enough):
    found, text = grace.judge(Cost("r", save_s, 0.5), given, kill_wait)
    assert found is enough and ("NOT enough" in text) is not enough
    assert f"{save_s:.1f} s for a save" in text and f"{given} s grace" in text


def test_without_a_save_nothing_is_claimed():
    enough, text = grace.judge(None, 5, 30)
    assert enough and "not known" in text and "enough:" not in text


def test_a_save_longer_than_the_lead_before_the_time_limit_names_the_flag():
    assert grace.too_long_for_the_time_limit(None) == ""
    assert grace.too_long_for_the_time_limit(Cost("r", 100.0, 1.0)) == ""
    assert grace.too_long_for_the_time_limit(Cost("r", 200.0, 10.0)) == "--signal=B:USR1@420"
