"""The board's folder: what a record claims against its evidence, writers at once, nothing lost."""

import datetime
import json
import lzma
import multiprocessing
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import board_kit as kit
import pytest

from nanogpt.common.errors import EXIT_STORAGE, CommandError, UserError
from tools.leaderboard import command
from tools.leaderboard.board import publish_once


def submit(board: Path, runs: list[kit.Made], folder: Path, *words: str) -> int:
    """The exit status of handing in these runs."""
    paths, data = kit.write_all(runs, folder)
    said = [f"--data_root={data}", "--contributors=Ada", *words]
    if not any(word.startswith("--description") for word in words):
        said.append("--description=Smear over two tokens")
    return command.main(["submit", str(board), *map(str, paths), *said])


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    (folder / "board").mkdir()
    assert submit(folder / "board", kit.seeds(3), folder / "runs") == 0
    return folder / "board"


@pytest.fixture
def board(made: Path, tmp_path: Path) -> Path:
    """A board with one record, to be damaged."""
    import shutil

    return shutil.copytree(made, tmp_path / "board")


def the_record(board: Path) -> Path:
    (path,) = (board / "records").iterdir()
    return path


CLAIMS = {
    "seconds": lambda r: r.update(seconds=r["seconds"] * 0.9),
    "steps": lambda r: r.update(steps=59),
    "mean_loss": lambda r: r.update(mean_loss=r["mean_loss"] - 1e-6),
    "p_value": lambda r: r.update(p_value=1e-9),
    "gpu": lambda r: r.update(gpu="NVIDIA A100-SXM4-80GB"),
    "world_size": lambda r: r.update(world_size=1),
    "source_sha256": lambda r: r.update(source_sha256="0" * 64),
    "recipe_sha256": lambda r: r.update(recipe_sha256="0" * 64),
    "of run 2 it claims val_loss": lambda r: r["runs"][1].update(val_loss=3.27),
    "of run 3 it claims seconds": lambda r: r["runs"][2].update(seconds=1.0),
    "of run 1 it claims seed": lambda r: r["runs"][0].update(seed=77),
}


@pytest.mark.parametrize("said", CLAIMS)
def test_a_claim_that_its_evidence_does_not_bear(
    said: str, board: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = json.loads(the_record(board).read_text())
    CLAIMS[said](record)
    the_record(board).write_text(json.dumps(record))
    assert command.main(["verify", str(board)]) == command.EXIT_REFUSED
    reasons = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  REFUSED")]
    assert len(reasons) == 1 and said in reasons[0] and "its evidence says" in reasons[0], reasons


@pytest.fixture
def second(board: Path, tmp_path: Path) -> Path:
    """A second record: another source, another learning rate."""
    runs = kit.seeds(3, change="two")
    for run in runs:
        run.config["config"]["muon_lr"] = 0.025
    first = the_record(board)
    assert submit(board, runs, tmp_path / "second") == 0
    (path,) = set((board / "records").glob("*.json")) - {first}
    return path


def test_a_record_stores_what_changed(second: Path, board: Path) -> None:
    record = json.loads(second.read_text())
    assert record["against"] in {path.stem for path in (board / "records").glob("*.json")} - {second.stem}
    assert record["changed"] == ["muon_lr: 0.023 -> 0.025", "modded_nanogpt/model.py: +1 -1"]
    assert command.main(["verify", str(board)]) == 0


@pytest.mark.parametrize(
    ("claim", "said"),
    [
        ({"changed": []}, "not what its source and settings say ('muon_lr: 0.023 -> 0.025')"),
        ({"changed": ["nothing but <b>care</b>"]}, "not what its source and settings say"),
        ({"against": None}, "not what its source and settings say"),
        ({"against": "0" * 16}, "no earlier record of its track and hardware"),
        ({"against": "itself"}, "no earlier record of its track and hardware"),
    ],
)
def test_what_changed_is_not_believed(
    claim: dict, said: str, second: Path, board: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if claim.get("against") == "itself":
        claim = {"against": second.stem}
    second.write_text(json.dumps({**json.loads(second.read_text()), **claim}))
    assert command.main(["verify", str(board)]) == command.EXIT_REFUSED
    reasons = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  REFUSED")]
    assert len(reasons) == 1 and said in reasons[0], reasons


def test_runs_left_out_of_a_record(board: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = the_record(board)
    record = json.loads(path.read_text())
    del record["runs"][1]
    path.write_text(json.dumps(record))
    assert command.main(["verify", str(board)]) == command.EXIT_REFUSED
    assert "it claims id = " in capsys.readouterr().out


def swap(blob: Path, others: list[Path]) -> None:
    blob.write_bytes(others[0].read_bytes())


DAMAGE = {
    "is not among the board's evidence": lambda blob, others: blob.unlink(),
    "its evidence is damaged": lambda blob, others: blob.write_bytes(b"not packed" * 9),
    "its evidence is not what the record's digest says": swap,
    "digest says ": lambda blob, others: blob.write_bytes(blob.read_bytes()[:-40]),
    "digest says": lambda blob, others: blob.write_bytes(lzma.compress(b"\0" * (300 << 20), preset=0)),
    "its end is missing": lambda blob, others: blob.write_bytes(blob.read_bytes()[:-4]),
    "or is not its end": lambda blob, others: blob.write_bytes(blob.read_bytes() + b"x"),
    "not among the board's evidence": lambda blob, others: (blob.unlink(), blob.symlink_to("/etc/passwd")),
}


@pytest.mark.parametrize("said", DAMAGE)
def test_damaged_evidence(said: str, board: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = json.loads(the_record(board).read_text())
    wanted = record["runs"][1]["files"]["metrics.jsonl"]["sha256"]
    blobs = sorted((board / "evidence").rglob("*.xz"))
    blob = next(path for path in blobs if path.stem == wanted)
    DAMAGE[said](blob, [path for path in blobs if path != blob])
    assert command.main(["verify", str(board)]) == command.EXIT_REFUSED
    reasons = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  REFUSED")]
    assert len(reasons) == 1 and "run 2: metrics.jsonl" in reasons[0] and said.strip() in reasons[0], reasons


def test_evidence_of_another_run(board: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One run's clock in another's place: the digests fit, the files do not fit each other."""
    path = the_record(board)
    record = json.loads(path.read_text())
    first, second = (record["runs"][number]["files"] for number in (0, 1))
    second["metrics.jsonl"] = first["metrics.jsonl"]
    path.write_text(json.dumps(record))
    assert command.main(["verify", str(board)]) == command.EXIT_REFUSED
    said = capsys.readouterr().out
    assert "the log printed" in said and "they are one run" in said


def test_handed_in_twice(board: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.read_bytes() for path in board.rglob("*") if path.is_file()}
    assert submit(board, kit.seeds(3), tmp_path / "again", "--description=Another name for it") == 1
    assert "its log is on the board already" in capsys.readouterr().out
    more = [*kit.seeds(3)[:2], kit.made(9)]
    assert submit(board, more, tmp_path / "more") == 1
    assert "its log is on the board already" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in board.rglob("*") if path.is_file()} == before


def test_other_seeds_of_a_recipe_are_a_rerun(
    board: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    again = [kit.made(seed) for seed in (11, 12, 13)]
    assert submit(board, again, tmp_path / "a") == 1
    assert "second party's re-run (--kind=rerun)" in capsys.readouterr().out
    assert submit(board, again, tmp_path / "b", "--kind=rerun") == 0
    other = [kit.made(seed, change="two") for seed in (21, 22, 23)]
    assert submit(board, other, tmp_path / "c", "--kind=rerun") == 1
    assert "a re-run of nothing" in capsys.readouterr().out
    assert submit(board, other, tmp_path / "d") == 0
    assert command.main(["verify", str(board)]) == 0


def test_the_same_losses_from_other_logs(
    board: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Somebody else's losses, with another machine and another source around them."""
    stolen = kit.seeds(3)
    for run in stolen:
        run.environment[0]["host"] = "mine"
        run.source["modded_nanogpt/model.py"] += b"MINE = True\n"
        run.scale_time(0.95)
    assert submit(board, stolen, tmp_path / "stolen") == 1
    assert "to the last digit" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["record", "rerun"])
def test_one_run_of_somebody_elses_among_ones_own(
    kind: str, board: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run of the record, under another seed and another clock, helps out a record or confirms itself."""
    change = {"change": "mine"} if kind == "record" else {}
    own = [kit.made(seed, **change) for seed in (31, 32, 33)]
    own[1].set_final(kit.seeds(3)[2].end["val_loss"])
    assert submit(board, own, tmp_path / "own", f"--kind={kind}") == 1
    reasons = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  REFUSED")]
    assert len(reasons) == 1 and "run 2 (seed 32): its final loss is that of a run of" in reasons[0], reasons


def test_of_two_that_are_one_the_earlier_stays(board: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A copy of a record, by its own right a well-formed one, is refused beside the first."""
    record = json.loads(the_record(board).read_text())
    copy = {**record, "kind": "negative", "contributors": ["Mallory"]}
    from tools.leaderboard.submission import record_id

    logs = [run["files"]["log.txt"]["sha256"] for run in record["runs"]]
    copy["id"] = record_id("track1", "negative", logs)
    later = datetime.datetime.fromisoformat(record["submitted"].replace("Z", "+00:00")) + datetime.timedelta(
        microseconds=1
    )
    copy["submitted"] = later.isoformat()
    (board / "records" / f"{copy['id']}.json").write_text(json.dumps(copy))
    assert command.main(["verify", str(board)]) == command.EXIT_REFUSED
    said = capsys.readouterr().out
    assert said.count("accepted: ") == 1 and "its log is on the board already" in said


def work(board: Path, folder: Path, number: int, results: "multiprocessing.Queue") -> None:
    """A submitter's process: its own runs, and a set that everybody hands in."""
    try:
        mine = [kit.made(100 * number + seed, change=f"idea {number}") for seed in range(3)]
        ours = [kit.made(9000 + seed, change="everybody's") for seed in range(3)]
        first = submit(board, mine, folder / "mine")
        try:
            second = submit(board, ours, folder / "ours")
        except UserError:
            second = 2
        results.put((first, second))
    except BaseException as error:
        results.put((repr(error), 0))


def test_many_hand_in_at_once(tmp_path: Path) -> None:
    board, count = tmp_path / "board", 6
    board.mkdir()
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    workers = [
        context.Process(target=work, args=(board, tmp_path / str(number), number, results))
        for number in range(1, count + 1)
    ]
    for worker in workers:
        worker.start()
    found = [results.get(timeout=600) for _ in workers]
    for worker in workers:
        worker.join()
    assert [first for first, _ in found] == [0] * count, found
    assert sum(second == 0 for _, second in found) == 1, found  # one of them was the first
    assert len(list((board / "records").iterdir())) == count + 1
    assert not [path for path in board.rglob("*") if path.name.endswith(".tmp")]
    assert command.main(["verify", str(board)]) == 0


def publish_many(folder: Path, number: int) -> None:
    for index in range(10_000):
        publish_once(folder / f"{number}-{index}.json", json.dumps({"text": "x" * 5000}).encode())


def test_killed_writers_leave_whole_records_only(tmp_path: Path) -> None:
    noise = random.Random(3)
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=publish_many, args=(tmp_path, number)) for number in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        time.sleep(noise.uniform(0.01, 0.06))
        os.kill(worker.pid, signal.SIGKILL)
        worker.join()
    records = list(tmp_path.glob("[0-9]*.json"))
    assert records and all(json.loads(path.read_text()) for path in records)


def test_a_record_is_never_written_over(tmp_path: Path) -> None:
    publish_once(tmp_path / "a.json", b"first")
    with pytest.raises(UserError, match="a record is written once"):
        publish_once(tmp_path / "a.json", b"second")
    assert (tmp_path / "a.json").read_bytes() == b"first"
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_a_disk_that_refuses(tmp_path: Path) -> None:
    board = tmp_path / "board"
    (board / "records").mkdir(parents=True)
    (board / "evidence").write_text("a file in its place")
    with pytest.raises(CommandError) as caught:
        submit(board, kit.seeds(3), tmp_path / "runs")
    assert caught.value.exit_code == EXIT_STORAGE
    assert not any((board / "records").iterdir())


def test_fetch(board: Path, tmp_path: Path) -> None:
    name = the_record(board).stem
    assert command.main(["fetch", str(board), name, str(tmp_path / "out")]) == 0
    runs = sorted((tmp_path / "out").glob("run-*"))
    assert len(runs) == 3 and all((run / "log.txt").is_file() for run in runs)
    for taken in (tmp_path / "out", tmp_path / "out/run-1/log.txt"):
        with pytest.raises(UserError, match="exists already"):
            command.main(["fetch", str(board), name, str(taken)])


@pytest.mark.parametrize(
    "prepare", [lambda f: (f / "notes.txt").touch(), lambda f: kit.made().write(f / "x")]
)
def test_a_folder_that_is_no_board_is_left_alone(prepare: Callable, tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    prepare(folder)
    before = sorted(folder.rglob("*"))
    with pytest.raises(UserError, match="is no board"):
        submit(folder, kit.seeds(3), tmp_path / "runs")
    assert sorted(folder.rglob("*")) == before


def test_a_track_of_the_boards_own_keeps_the_others(board: Path, tmp_path: Path) -> None:
    run, data = kit.write_all([kit.made(1)], tmp_path)
    words = [str(run[0]), f"--data_root={data}", "--title=Half the steps", "--target=3.4"]
    assert command.main(["track", str(board), *words, "--name=half", "--board-title=The lab"]) == 0
    assert command.main(["track", str(board), *words, "--name=third"]) == 0
    found = json.loads((board / "board.json").read_text())
    assert [row["name"] for row in found["tracks"]] == ["half", "third"] and found["title"] == "The lab"
    with pytest.raises(UserError, match="--name=half"):
        command.main(["track", str(board), *words, "--name=half"])
    with pytest.raises(UserError, match="--target=nan"):
        command.main(["track", str(board), *words[:3], "--target=nan", "--name=x"])
    assert command.main(["verify", str(board)]) == 0
