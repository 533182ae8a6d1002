"""`engaging repro`: train, rebuild the source from the log, train again, demand equal losses; refuse changed logs."""

import json
import os
import pty
import re
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import run_kit

from nanogpt.common import source
from nanogpt.common.errors import UserError
from tools import repro

FLAGS = (
    *run_kit.TINY,
    "--dataset=letters",
    "--max_iters=12",
    "--eval_interval=5",
    "--dropout=0.1",
    "--warmup_iters=0",
)


@pytest.fixture(scope="module")
def place(zygote, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a clone, a data set, and a finished run in out/first."""
    folder = tmp_path_factory.mktemp("repro")
    run_kit.make_clone(folder / "clone")
    run_kit.make_data(folder / "data")
    words = ("-m", "nanogpt.train", *FLAGS, f"--out_dir={folder}/out/first")
    done = run_kit.forked(zygote, folder / "clone", folder / "data", *words)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def log(place: Path) -> Path:
    return place / "out" / "first" / "log.txt"


def engaging(place: Path, *words: object, **options) -> subprocess.CompletedProcess:
    return run_kit.run(place / "clone", place / "data", "-m", "tools", "repro", *words, **options)


def refused(done: subprocess.CompletedProcess, told: str) -> None:
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert told in done.stderr


def rewritten(log: Path, target: Path, change: Callable[[dict[str, bytes], dict], None]) -> Path:
    """A log whose digests agree, with the source and the record as `change` leaves them: a forger's, or a friend's."""
    files, rest = source.from_log(log)
    head, *lines = rest.splitlines()
    record = json.loads(head.removeprefix("config "))
    change(files, record)
    if "source_sha256" in record:
        record["source_sha256"] = source.digest(files)
    target.mkdir(exist_ok=True)
    path = target / "log.txt"
    path.write_bytes(source.to_log(files) + "\n".join([f"config {json.dumps(record)}", *lines, ""]).encode())
    return path


def test_trained_again_from_the_log_alone_the_losses_are_equal(
    place: Path, log: Path, tmp_path: Path
) -> None:
    alone = tmp_path / "log.txt"
    alone.write_bytes(log.read_bytes())
    done = engaging(place, alone, f"--out_dir={place}/out/alone")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "source: the same as this repository's, byte for byte" in done.stdout
    assert re.search(r"EQUAL: all \d+ losses agree to the 4 decimals that the log prints\n$", done.stdout)
    again = source.collect(place / "out" / "alone" / "source", ("nanogpt",))
    assert again == source.from_log(log)[0]
    first, second = (repro.exact_losses(place / "out" / name) for name in ("first", "alone"))
    assert first == second and len(first) == 12 + 4


def test_code_of_somebody_else_is_asked_about_and_then_run(place: Path, log: Path, tmp_path: Path) -> None:
    """The other code prints a word and takes longer steps: the word appears, and the losses are named as different."""

    def change(files: dict[str, bytes], record: dict) -> None:
        files["nanogpt/schedule.py"] += b"\nprint('a stranger was here')\n"
        files["nanogpt/optim.py"] = files["nanogpt/optim.py"].replace(
            b'group["lr"] = value', b'group["lr"] = value * 50'
        )

    theirs = rewritten(log, tmp_path / "theirs", change)
    asked = engaging(place, theirs, f"--out_dir={place}/out/theirs")
    refused(asked, "say --yes")
    assert (
        "2 files differ" in asked.stdout and "nanogpt/schedule.py: 2 lines more, 0 lines less" in asked.stdout
    )
    assert "stranger was here" not in asked.stdout and not (place / "out" / "theirs").exists()

    done = engaging(place, theirs, f"--out_dir={place}/out/theirs", "--yes")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "a stranger was here" in done.stdout
    # The first update shows in the second step: everything before agrees.
    assert re.search(r"DIFFERENT: \d+ of \d+ losses; first the train loss at step 1: ", done.stdout)


def test_at_a_terminal_the_answer_no_runs_nothing(place: Path, log: Path, tmp_path: Path) -> None:
    theirs = rewritten(log, tmp_path / "t", lambda files, record: files.update({"nanogpt/new.py": b"1\n"}))
    master, slave = pty.openpty()
    try:
        os.write(master, b"n\n")
        done = engaging(place, theirs, f"--out_dir={place}/out/no", stdin=slave)
    finally:
        os.close(master)
        os.close(slave)
    refused(done, "not run, as you wished")
    assert "nanogpt/new.py: only in the log" in done.stdout and not (place / "out" / "no").exists()


def test_extracting_gives_the_source_byte_for_byte_and_runs_nothing(
    place: Path, log: Path, tmp_path: Path
) -> None:
    target = tmp_path / "deep" / "code"
    done = engaging(place, log, "--extract-only", target)
    assert done.returncode == 0, done.stderr
    written = {
        path.relative_to(target).as_posix(): path.read_bytes() for path in target.rglob("*") if path.is_file()
    }
    assert written == source.from_log(log)[0] == source.collect(place / "clone", ("nanogpt",))
    refused(engaging(place, log, "--extract-only", target), "new or empty")
    (tmp_path / "link").symlink_to(tmp_path)
    refused(engaging(place, log, "--extract-only", tmp_path / "link"), "new or empty")


def test_other_data_is_refused_before_training(place: Path, log: Path, tmp_path: Path) -> None:
    other = rewritten(log, tmp_path / "o", lambda files, record: record.update(data="0" * 64))
    refused(engaging(place, other, f"--out_dir={tmp_path}/new"), "not the data that the log was trained on")
    refused(engaging(place, log, f"--data_root={tmp_path}", f"--out_dir={tmp_path}/new"), "letters")
    assert not (tmp_path / "new").exists()


def test_the_command_line_is_the_recorded_one_with_what_the_user_overrides(log: Path) -> None:
    recorded = repro.read_log(log)
    args = repro.arguments([str(log), "--device=cuda:1", "--max_iters=7"])
    args.out_dir = Path("/o")
    words = repro.flags(recorded, args, Path("/d"))
    assert {"--device=cuda:1", "--max_iters=7", "--out_dir=/o", "--data_root=/d", "--dropout=0.1"} <= set(
        words
    )
    names = [word.split("=")[0] for word in words]
    assert len(names) == len(set(names))
    assert not {"--overwrite", "--wandb_log", "--auto_resume", "--check"} & set(names)
    on_gpu = replace(recorded, config={**recorded.config, "device": "cuda:5", "num_threads": 0}, threads=3)
    words = repro.flags(on_gpu, repro.arguments([str(log)]), Path("/d"))
    assert "--device=cuda" in words and "--num_threads=3" in words


def test_a_resumed_run_counts_the_last_line_of_a_step() -> None:
    lines = [
        "step 3/9: loss 2.5000, lr 1", "step 4: val loss 2.4000 (best so far)", "step 4/9: loss 9.0000, lr 1",
        "a step 5/9: loss 1.0000, in a sentence", "step 4/9: loss 2.3000, lr 1",
    ]  # fmt: skip
    found = {("train", 3): 2.5, ("val", 4): 2.4, ("train", 4): 2.3}
    assert dict(repro._losses(lines)) == found
    other_source = ["new source from attempt 2 on sha256 ab in place of cd", "step 5/9: loss 9.0000, lr"]
    assert dict(repro._losses([*lines, *other_source])) == found


THEN = {("val", 0): 3.0, ("train", 0): 2.9, ("train", 1): 2.8001, ("val", 2): 2.7}


@pytest.mark.parametrize(
    ("change", "digits", "limit", "equal", "told"),
    [
        ({}, None, 9, True, "EQUAL: all 4 losses agree exactly"),
        ({}, 4, 9, True, "all 4 losses agree to the 4 decimals"),
        ({("train", 1): 2.80014}, 4, 9, True, "EQUAL"),
        ({("train", 1): 2.80016}, 4, 9, False, "1 of 4 losses; first the train loss at step 1"),
        ({("train", 1): 2.8001 + 1e-15}, None, 9, False, "first the train loss at step 1"),
        ({("train", 0): 1.0, ("val", 0): 5.0}, 4, 9, False, "2 of 4 losses; first the train loss at step 0"),
        ({("val", 2): None}, 4, 9, False, "no val loss at step 2"),
        ({("val", 2): float("nan")}, 4, 9, False, "first the val loss at step 2"),
        ({("val", 2): None}, 4, 1, True, "all 2 losses"),
        ({("train", 1): 1.0}, 4, 1, True, "EQUAL"),
        ({("val", 2): 1.0}, 4, 2, False, "the val loss at step 2"),
    ],
)
def test_comparing(change: dict, digits: int | None, limit: int, equal: bool, told: str) -> None:
    now = {key: value for key, value in {**THEN, **change}.items() if value is not None}
    got, lines = repro.compare(THEN, now, digits, limit)
    assert got is equal and told in lines[0]


def test_nothing_to_compare_is_not_equal() -> None:
    assert repro.compare({}, THEN, 4, 9)[0] is False


def test_a_loss_changed_in_the_log_is_named(place: Path, log: Path, tmp_path: Path, capsys) -> None:
    text = log.read_bytes()
    changed = re.sub(rb"(step 5: val loss )\d", rb"\g<1>0", text)
    assert changed != text
    (tmp_path / "log.txt").write_bytes(changed)
    assert repro.judge(repro.read_log(tmp_path / "log.txt"), log.parent, 99) == 1
    assert "first the val loss at step 5" in capsys.readouterr().out
    assert repro.judge(repro.read_log(log), log.parent, 99) == 0


# ---- changed logs ----------------------------------------------------------------------------------------------------


def _line(number: int, old: bytes, new: bytes) -> Callable[[bytes], bytes]:
    def change(data: bytes) -> bytes:
        lines = data.split(b"\n", number)
        lines[number - 1] = re.sub(old, new, lines[number - 1], count=1)
        return b"\n".join(lines)

    return change


def _swap_two_files(data: bytes) -> bytes:
    """The headings of two files, exchanged."""
    first, second = re.findall(rb"^file \d+ [0-9a-f]{64} nanogpt/\S+$", data, re.MULTILINE)[:2]
    return data.replace(first, b"\0").replace(second, first).replace(b"\0", second)


def _flip(place: float) -> Callable[[bytes], bytes]:
    def change(data: bytes) -> bytes:
        at = int(data.index(b"end of source") * place)
        return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]

    return change


def _cut(place: float) -> Callable[[bytes], bytes]:
    return lambda data: data[: int(data.index(b"end of source") * place)]


DAMAGE = {
    "empty": lambda data: b"",
    "not a log": lambda data: b"hello\n" + data,
    "other version": lambda data: data.replace(b"log 1", b"log 2", 1),
    "utf-16": lambda data: data.decode("utf-8", "replace").encode("utf-16"),
    "windows line ends": lambda data: data.replace(b"\n", b"\r\n"),
    "cut in the heading": lambda data: data[:40],
    "cut after a tenth": _cut(0.1),
    "cut after a half": _cut(0.5),
    "cut before the end": _cut(0.999),
    "one bit at the start": _flip(0.05),
    "one bit in the middle": _flip(0.5),
    "one bit near the end": _flip(0.95),
    "one byte more": lambda data: data.replace(b"import", b"import ", 1),
    "one byte less": lambda data: data.replace(b"import ", b"import", 1),
    "digest of the whole": _line(2, rb"[0-9a-f]{8}$", b"00000000"),
    "fewer files": _line(2, rb"source \d+", b"source 3"),
    "more files": _line(2, rb"source \d+", b"source 999"),
    "ten thousand files": _line(2, rb"source \d+", b"source 10000"),
    "negative count": _line(2, rb"source \d+", b"source -1"),
    "no digest": _line(2, rb" sha256.*", b""),
    "digest of a file": _line(3, rb" [0-9a-f]{8}", b" 00000000"),
    "name of a file": _line(3, rb"nanogpt/", b"nanogpt2/"),
    "path upwards": _line(3, rb"nanogpt/", b"../nanogpt/"),
    "absolute path": _line(3, rb"nanogpt/", b"/nanogpt/"),
    "hidden path": _line(3, rb"nanogpt/", b".ssh/"),
    "size of a file": _line(3, rb"file \d+", b"file 1"),
    "huge file": _line(3, rb"file \d+", b"file 99999999"),
    "two files exchanged": _swap_two_files,
    "no end": lambda data: data.replace(b"\nend of source\n", b"\n", 1),
    "no configuration": lambda data: data[: data.index(b"config {")],
    "half a configuration": lambda data: data[: data.index(b"config {") + 100],
    "configuration of another source": lambda data: re.sub(
        rb'("source_sha256": ")\w{4}', rb"\g<1>0000", data
    ),
    "no environment": lambda data: data.replace(b"environment {", b"environs {", 1),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_log_is_refused(log: Path, tmp_path: Path, name: str) -> None:
    before = log.read_bytes()
    after = DAMAGE[name](before)
    assert after != before
    (tmp_path / "log.txt").write_bytes(after)
    with pytest.raises(UserError) as refusal:
        repro.read_log(tmp_path / "log.txt")
    assert str(refusal.value).startswith(str(tmp_path / "log.txt"))


FORGERIES = {
    "no trainer": lambda files, record: files.pop("nanogpt/train.py"),
    "a trainer elsewhere": lambda files, record: record.update(entry="nanogpt/model.py"),
    "a trainer outside": lambda files, record: record.update(entry="/bin/sh"),
    "no entry": lambda files, record: record.pop("entry"),
    "a knob with a list": lambda files, record: record["config"].update(n_layer=[1]),
    "a knob that is a flag": lambda files, record: record["config"].update({"x=1 --y": 1}),
    "no knobs": lambda files, record: record.update(config=3),
    "no plan": lambda files, record: record.pop("plan"),
    "ranks as text": lambda files, record: record["plan"].update(world_size="8"),
    "a million ranks": lambda files, record: record["plan"].update(world_size=10**6),
    "no digest in the record": lambda files, record: record.pop("source_sha256"),
    "a file that is a folder": lambda files, record: files.update({"nanogpt": b"x"}),
    "two spellings": lambda files, record: files.update({"nanogpt/TRAIN.py": b"x"}),
    "a path upwards": lambda files, record: files.update({"nanogpt/../../x.py": b"x"}),
}


@pytest.mark.parametrize("name", FORGERIES)
def test_a_forged_log_with_right_digests_is_refused(log: Path, tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError):
        repro.read_log(rewritten(log, tmp_path, FORGERIES[name]))


def test_a_missing_log_and_a_folder_without_one_are_named(place: Path, tmp_path: Path) -> None:
    refused(engaging(place, tmp_path / "nothing.txt"), "nothing.txt")
    refused(engaging(place, tmp_path), "log.txt")
