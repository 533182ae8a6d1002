"""`engaging runs`: the newest first, what each changed against the one before, the user's note."""

import json
import os
import time
from pathlib import Path

import pytest

from nanogpt.common.errors import UserError
from tools import run_list
from tools.site import watch


def write(folder: Path, age: int, source: str = "a = 1\n", entry: str = "train.py", **config: object) -> Path:
    (folder / "source").mkdir(parents=True)
    (folder / "source" / "model.py").write_text(source)
    (folder / "config.json").write_text(json.dumps({"entry": entry, "config": {"seed": age, **config}}))
    lines = [
        {"event": "start", "step": 0, "attempt": 1},
        {"event": "train", "step": 8, "loss": 2.1},
        {"event": "val", "step": 9, "val_loss": 2.0},
        {"event": "end", "step": 9, "status": "finished", "val_loss": 2.0},
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    os.utime(folder / "metrics.jsonl", (10_000 - age, 10_000 - age))
    return folder


def listed(capsys, *words: object) -> list[str]:
    assert run_list.main([*map(str, words)]) == 0
    return [line.strip() for line in capsys.readouterr().out.splitlines()]


def test_what_each_run_changed_and_the_note(tmp_path: Path, capsys) -> None:
    write(tmp_path / "first", 5, lr=0.1)
    write(tmp_path / "other-trainer", 4, entry="train_gpt.py", lr=9)
    write(tmp_path / "seed-2", 3, lr=0.1)
    last = write(tmp_path / "last", 2, "a = 2\nb = 3\n", lr=0.2)
    assert listed(capsys, last, "--note", "twice the rate, see p. 4") == [f"{last / 'note.txt'}: written"]
    assert listed(capsys, tmp_path) == [
        "last           finished, step 9, val 2.0000",
        "changed since seed-2: lr: 0.1 -> 0.2; model.py: +2 -1",
        "note: twice the rate, see p. 4",
        "seed-2         finished, step 9, val 2.0000",
        "changed since first: nothing but the seed, if that",
        "other-trainer  finished, step 9, val 2.0000",
        "the first run of its trainer here",
        "first          finished, step 9, val 2.0000",
        "the first run of its trainer here",
    ]
    assert listed(capsys, tmp_path, "-n", 1)[-1] == "... and 3 older ones (-n 4)"
    beside = listed(capsys, last, "--against", tmp_path / "first")
    assert beside[1] == "changed since first: lr: 0.1 -> 0.2; model.py: +2 -1"
    listed(capsys, last, "--note", "")
    assert not (last / "note.txt").exists()


def test_a_run_that_was_killed_does_not_pass_for_running(tmp_path: Path, capsys) -> None:
    metrics = write(tmp_path / "killed", 1) / "metrics.jsonl"
    metrics.write_text("".join(metrics.read_text().splitlines(keepends=True)[:-1]))
    assert listed(capsys, tmp_path)[0] == "killed  running, step 9, val 2.0000"
    os.utime(metrics, (time.time() - 7200,) * 2)
    assert listed(capsys, tmp_path)[0] == "killed  cut off? silent for 2 h, step 9, val 2.0000"


def test_a_run_of_out_goes_by_its_name(tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(run_list, "checkout", lambda: tmp_path)
    monkeypatch.setattr(watch, "checkout", lambda: tmp_path)
    write(tmp_path / "out" / "first", 2, lr=0.1)
    write(tmp_path / "out" / "second", 1, lr=0.2)
    assert listed(capsys, "second", "--against", "first") == [
        "second  finished, step 9, val 2.0000",
        "changed since first: lr: 0.1 -> 0.2",
    ]
    assert listed(capsys, "first", "--note", "kept") == [f"{tmp_path / 'out/first/note.txt'}: written"]
    view = watch.View()
    watch.find_target(view, "second")
    assert view.run_path == tmp_path / "out" / "second"


def test_damaged_and_hostile_runs_are_listed_all_the_same(tmp_path: Path, capsys) -> None:
    bad = write(tmp_path / "bad\x1b[2J", 1, **{"lr\u202e": "\x1b[31m"})
    write(tmp_path / "good", 2, lr=1)
    (bad / "note.txt").write_bytes(b"line\nbreak \x1b]0;x\x07 \xff \xe2\x80\xae" + b"x" * 5000)
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "config.json").write_text("[" * 100_000)
    for line in listed(capsys, tmp_path):
        assert line.isprintable() and len(line) < 700
    assert listed(capsys, empty)[0].endswith("no step yet")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nowhere"], "nowhere: is not a folder"),
        (["--against", "nowhere"], "nowhere: is no run"),
        (["--note", "x"], "--note: name the one run"),
        (["RUN", "--note", "a\nb"], "invisible character"),
        (["RUN", "--note", "x" * 301], "at most 300"),
        (["RUN", "-n", "0"], "-n"),
    ],
)
def test_mistakes(tmp_path: Path, words: list[str], said: str) -> None:
    run = write(tmp_path / "run", 1)
    words = [str(run) if word == "RUN" else word for word in words]
    with pytest.raises(UserError, match=said):
        run_list.main(words)
