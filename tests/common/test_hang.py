"""A rank that stops is named, with every rank's stack; nobody who goes on is."""

import os
import signal
import time
from pathlib import Path

import pytest
import torch

from nanogpt.common import hang
from nanogpt.common.ranks import Ranks
from tests.faults import tiny
from tests.faults.ranks import launch

TRAINING = '  File "/x/nanogpt/train.py", line 9, in train\n    batches.get(step)'
REDUCING = '  File "/y/torch/distributed/distributed_c10d.py", line 7, in all_reduce\n    work.wait()'
READING = '  File "/x/nanogpt/train.py", line 12, in train\n    loss.tolist()'
COMPILING = '  File "/y/torch/_inductor/codecache.py", line 7, in compile\n    work()'


def note(rank: int, stack: str = TRAINING, beats: int = 5) -> hang.Note:
    return hang.Note(rank, "elsewhere", 100 + rank, "", "launch", beats, 1, [stack])


@pytest.mark.parametrize(("notes", "named"), [
    ([note(0, REDUCING), note(1)], [1]),
    ([note(0, READING), note(1), note(2, READING)], [1]),
    ([note(0, REDUCING), note(1, REDUCING, beats=4), note(2, REDUCING)], [1]),
    ([note(0, COMPILING), note(1), note(2), note(3)], [0]),
    ([note(0), note(1)], [0, 1]),
    ([note(0)], [0]),
])  # fmt: skip
def test_whom_the_others_wait_for(notes, named):
    if any(one.stack == [COMPILING] for one in notes):
        notes = [one if one.rank == 0 else note(one.rank, READING) for one in notes]
    assert [one.rank for one in hang.suspects(notes)] == named


def test_a_report_begins_with_the_rank_at_fault_and_has_every_stack():
    heard = {0: (note(0, REDUCING), 0.0), 1: (note(1), 62.0)}
    said = hang.report(heard, [1, 2], 3, 61.0)
    assert said[0].startswith(
        "hang: rank 1 of 3 (elsewhere, process 101) has given no sign of life for 62 s: its node"
    )
    assert said[1] == "hang: rank 2 of 3 has never given a sign of life; the others wait"
    assert said[2:] == [
        "hang: rank 1 when it last answered, was in",
        TRAINING,
        "hang: rank 0 is in",
        REDUCING,
    ]
    (first, *_) = hang.report({0: (note(0), 0.0)}, [], 1, 61.0)
    assert first == "hang: rank 0 of 1 (elsewhere, process 100) has not gone on for 61 s"


@pytest.fixture
def watch(tmp_path, monkeypatch):
    """A watch of two ranks whose thread does not run: the test makes its ticks."""
    monkeypatch.setattr(hang.threading.Thread, "start", lambda self: None)
    monkeypatch.setattr(hang.threading.Thread, "join", lambda self, timeout: None)
    monkeypatch.setattr(hang, "_beats", 0)
    found = [hang.Watch(tmp_path, Ranks(rank, rank, 2, torch.device("cpu"))) for rank in (0, 1)]
    said = []
    for one in found:
        monkeypatch.setattr(one, "_say", said.extend)
    yield *found, said
    for one in found:
        one.close()
    assert list(tmp_path.iterdir()) == []


def ticks(*watches: hang.Watch, seconds: float, beats: int = 0, every: float = hang.TICK_S) -> None:
    for number in range(int(seconds / every)):
        if number < beats:
            hang.beat()
        for one in watches:
            one._tick(every)


def test_clean_running_is_no_hang_whatever_takes_long(watch, monkeypatch):
    first, second, said = watch
    ticks(
        first, second, seconds=4000, every=100
    )  # before the first step: data are read, the model is compiled
    ticks(first, second, seconds=40, beats=2)
    ticks(first, second, seconds=500, every=50)  # and again in the first steps
    ticks(first, second, seconds=20, beats=5)
    ticks(first, second, seconds=56)
    hang.beat()
    monkeypatch.setattr(hang.traceback, "format_stack", lambda *_: [COMPILING])
    ticks(first, second, seconds=590, every=59)
    hang.beat()
    monkeypatch.setattr(hang.traceback, "format_stack", lambda *_: [TRAINING])
    ticks(first, second, seconds=4 * 56, every=14)  # steps of a minute are no hang in a run of such steps
    assert said == []
    ticks(first, second, seconds=14, every=14)
    assert said[0].startswith("hang: rank 0 of 2")


def test_one_that_falls_silent_is_named_once_and_its_return_is_said(watch):
    first, second, said = watch
    ticks(first, second, seconds=40, beats=10)
    ticks(first, seconds=56)
    assert said == []
    ticks(first, seconds=12)
    assert said[0].startswith("hang: rank 1 of 2") and "no sign of life" in said[0]
    count = len(said)
    ticks(first, seconds=400, every=50)
    assert len(said) == count
    ticks(first, second, seconds=4, beats=1)
    assert said[count] == "hang: rank 0 goes on"


def test_a_full_disk_does_not_matter(watch, monkeypatch):
    first, _, said = watch
    monkeypatch.setattr(Path, "write_text", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        first._tick(4.0)
    assert said == []


@pytest.mark.parametrize(("kind", "said"), [
    ("stop", "its process was stopped (SIGSTOP); the others wait"),
    ("sleep", "has not gone on for "),
    ("lock", "code in it keeps Python's lock; the others wait"),
])  # fmt: skip
def test_a_rank_that_stops_is_named_with_its_stack(kind, said, zygote, tiny_data, tmp_path):
    variables = {"STUCK": f"{kind} step 1", "HANG_LIMIT": "3"}
    children = launch(zygote, tiny_data, tmp_path, 2, module="tests.faults.stuck", **variables)
    try:
        end = time.monotonic() + 600
        named = lambda: [line for line in children[0].stderr.splitlines() if said in line]  # noqa: E731
        while not named():
            assert time.monotonic() < end, [child.stderr for child in children]
            time.sleep(0.05)
        assert named()[0].startswith("hang: rank 1 of 2")
        while children[0].stderr.count("in train\n") < 2 or (
            kind == "lock" and "in break_off" not in children[1].stderr
        ):
            assert time.monotonic() < end, [child.stderr for child in children]
            time.sleep(0.05)
        stacks = children[0].stderr
        assert "all_reduce" in stacks and (kind != "sleep" or "in break_off" in stacks)
    finally:
        for child in children:
            os.kill(child.pid, signal.SIGKILL)
            child.wait()


def test_a_finished_run_leaves_no_notes(zygote, tiny_data, tmp_path):
    children = launch(zygote, tiny_data, tmp_path, 2, module="tests.faults.stuck", STUCK="no step 0")
    assert [child.wait() for child in children] == [0, 0]
    assert "hang" not in "".join(child.stderr for child in children)
    assert not (tmp_path / "run" / hang.FOLDER).exists() and tiny.losses(tmp_path / "run")
