"""Files that are not what they should be: one line that names the file and the field, status 2, nothing lost."""

import datetime
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import board_kit as kit
import pytest

from nanogpt.common.errors import EXIT_USAGE, CommandError, UserError
from tools.leaderboard import command, text
from tools.leaderboard.board import FORMAT, open_board


def refused(*words: object) -> str:
    """What the command says before it ends with status 2."""
    with pytest.raises(CommandError) as caught:
        command.main([str(word) for word in words])
    said = str(caught.value)
    assert caught.value.exit_code == EXIT_USAGE and "\n" not in said and len(said) < 700, said
    return said


@pytest.fixture
def runs(tmp_path: Path) -> tuple[list[Path], Path]:
    return kit.write_all(kit.seeds(3), tmp_path)


def edit(path: Path, change: Callable[[bytes], bytes]) -> None:
    path.write_bytes(change(path.read_bytes()))


JUNK = {
    "is empty": b"",
    "is empty; expected": b"  \n",
    "not JSON": b"{'a': 1}\n",
    "not UTF-8": b'{"a": "\xff"}\n',
    "NaN": b'{"a": NaN}\n',
    "Infinity": b'{"a": -Infinity}\n',
    "too large": b'{"a": 1e400}\n',
    "stands there twice": b'{"a": 1, "a": 2}\n',
    "nested": b'{"a": ' + b"[" * 90 + b"]" * 90 + b"}\n",
    "half of a character": b'{"a": "\\ud800"}\n',
    "expected a JSON object": b"[1, 2]\n",
}


@pytest.mark.parametrize("name", ["config.json", "environment.json", "metrics.jsonl"])
@pytest.mark.parametrize("said", JUNK)
def test_junk_in_a_run(name: str, said: str, runs: tuple[list[Path], Path]) -> None:
    paths, data = runs
    (paths[1] / name).write_bytes(JUNK[said])
    found = refused("verify", *paths, f"--data_root={data}")
    assert said.partition(";")[0] in found and name in found


@pytest.mark.parametrize("name", ["config.json", "environment.json", "metrics.jsonl", "log.txt"])
@pytest.mark.parametrize("what", ["missing", "folder", "link", "empty", "pipe"])
def test_no_file_in_its_place(name: str, what: str, runs: tuple[list[Path], Path]) -> None:
    paths, data = runs
    path = paths[1] / name
    kept = path.read_bytes()
    path.unlink()
    if what == "folder":
        path.mkdir()
    elif what == "link":
        (paths[1] / "elsewhere").write_bytes(kept)
        path.symlink_to(paths[1] / "elsewhere")
    elif what == "empty":
        path.touch()
    elif what == "pipe":
        os.mkfifo(path)
    assert name in refused("verify", *paths, f"--data_root={data}")


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda d: d[:-30], "its last line has no end"),
        (lambda d: d.replace(b'"step": 7,', b'"step": "7",'), "step: '7'"),
        (lambda d: d.replace(b'"step": 7,', b'"step": 7.5,'), "step: 7.5"),
        (lambda d: d.replace(b'"step": 7,', b'"step": -7,'), "step: -7"),
        (lambda d: d.replace(b'"step": 7,', b'"step": true,'), "step: True"),
        (lambda d: d.replace(b'"step": 7,', b'"step": null,'), "step: missing"),
        (lambda d: d.replace(b'"step": 7,', b'"step": 99999999999999999999,'), "step: 99999999999999999999"),
        (lambda d: d.replace(b'"ms": ', b'"ms": "8", "was": ', 1), "ms: '8'"),
        (lambda d: d.replace(b'"val_loss": ', b'"loss_val": ', 1), "val_loss: missing"),
        (lambda d: d.replace(b'"event": "train"', b'"event": 5', 1), "event: 5"),
        (lambda d: d.replace(b'"status": "finished"', b'"status": 0'), "status: 0: expected str"),
        (lambda d: d.replace(b'"eligible": true', b'"eligible": "yes"'), "eligible: 'yes': expected bool"),
        (lambda d: d.replace(b'"ineligible": []', b'"ineligible": "no"'), "ineligible: 'no': expected list"),
        (lambda d: d + b'{"event": "x", "y": "' + b"z" * (1 << 20) + b'"}\n', "bytes; at most"),
        (lambda d: b"\n" + d, "is empty"),
    ],
)
def test_lines_of_metrics(change: Callable, said: str, runs: tuple[list[Path], Path]) -> None:
    paths, data = runs
    edit(paths[1] / "metrics.jsonl", change)
    assert said in refused("verify", *paths, f"--data_root={data}")


@pytest.mark.parametrize(
    "name, change, said",
    [
        ("config.json", lambda d: d.replace(b'"config": {', b'"konfig": {'), "config: missing"),
        ("config.json", lambda d: d.replace(b'"entry": ', b'"entree": '), "entry: missing"),
        (
            "config.json",
            lambda d: d.replace(b'"source_sha256": "', b'"source_sha256": 5, "x": "'),
            "source_sha256",
        ),
        ("config.json", lambda d: d + b" " * (1 << 20), "larger than"),
        ("environment.json", lambda d: b'{"attempts": []}', "attempts: expected"),
        ("environment.json", lambda d: b'{"attempts": ["a"]}', "attempts: expected"),
        ("environment.json", lambda d: b'{"attempts": [{"world_size": 0}]}', "world_size: 0"),
        ("environment.json", lambda d: b'{"attempts": [{"world_size": "8"}]}', "world_size: '8'"),
    ],
)
def test_fields_of_a_run(name: str, change: Callable, said: str, runs: tuple[list[Path], Path]) -> None:
    paths, data = runs
    edit(paths[1] / name, change)
    assert said in refused("verify", *paths, f"--data_root={data}")


@pytest.mark.parametrize(
    "content, said",
    [
        (None, "manifest shows which tokens were read"),
        (b"", "is empty"),
        (b"{}", "name"),
        (b'{"name": "x", "tokenizer": "gpt2", "vocab_size": 50257, "eot": 50256, "files": 3}', "files"),
        (b'{"tokenizer": "char", "vocab_size": 5, "files": [{"name": "a"}]}', "an entry lacks a field"),
    ],
)
def test_manifest(content: bytes | None, said: str, runs: tuple[list[Path], Path], monkeypatch) -> None:
    paths, data = runs
    monkeypatch.delenv("DATA_ROOT", raising=False)
    manifest = data / "fineweb10B" / "manifest.json"
    manifest.unlink()
    if content is not None:
        manifest.write_bytes(content)
    assert said in refused("verify", *paths, f"--data_root={data}")


# Records


@pytest.fixture(scope="module")
def board(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A board with one record."""
    folder = tmp_path_factory.mktemp("board")
    (folder / "board").mkdir()
    paths, data = kit.write_all(kit.seeds(3), folder)
    words = ["submit", folder / "board", *paths, f"--data_root={data}", "--description=Smear over two tokens"]
    assert command.main([*map(str, words), "--contributors=Ada"]) == 0
    return folder / "board"


@pytest.fixture
def record(board: Path, tmp_path: Path) -> Path:
    """The one record of a board that may be damaged."""
    shutil.copytree(board, tmp_path / "board")
    return next((tmp_path / "board/records").iterdir())


@pytest.mark.parametrize("said", JUNK)
def test_junk_for_a_record(said: str, record: Path) -> None:
    record.write_bytes(JUNK[said])
    assert said.partition(";")[0] in refused("verify", record)


@pytest.mark.parametrize(
    "field, value",
    [
        ("format", "2"), ("id", "x"), ("id", "../../etc/passwd"), ("kind", "best"), ("track", "../x"), ("track", 5),
        ("description", 5), ("description", "x" * 301), ("contributors", "Ada"), ("contributors", []),
        ("contributors", ["Ada"] * 50), ("contributors", [5]), ("log_url", None), ("submitted", 5),
        ("submitted", "yesterday"), ("submitted", "2026-11-21T00:00:00"), ("seconds", "4"), ("seconds", -1.0),
        ("seconds", True), ("seconds", None), ("steps", 1.5), ("steps", 0), ("mean_loss", "3"), ("mean_loss", 0.0),
        ("p_value", 2.0), ("gpu", 5), ("world_size", 0), ("world_size", "8"), ("source_sha256", "ab"), ("runs", []),
        ("runs", {}), ("runs", [{}]), ("data", "x"), ("data", {"sha256": "0" * 64, "bytes": -1}), ("extra", 1),
    ],
)  # fmt: skip
def test_fields_of_a_record(field: str, value: object, record: Path) -> None:
    found = json.loads(record.read_text())
    record.write_text(json.dumps({**found, field: value}))
    assert field in refused("verify", record)


@pytest.mark.parametrize("field", ["format", "id", "description", "runs", "seconds", "data", "submitted"])
def test_a_field_that_is_missing(field: str, record: Path) -> None:
    found = json.loads(record.read_text())
    del found[field]
    record.write_text(json.dumps(found))
    assert field in refused("verify", record)


HOSTILE = {
    "a line break": "fast\nrun of the year",
    "a bidi mark": "fast \u202egnp.exe run", "another": "fast \u2066run\u2069 now",
    "an escape": "fast \x1b[31mrun now", "a zero": "fast\x00 run now", "a tab": "fast\trun now",
    "a zero width": "fa\u200bst run",
    "a byte order mark": "fast \ufeffrun", "a line separator": "fast\u2028run now", "a private sign": "fast \ue000 run",
    "an unassigned sign": "fast \U000e0080 run", "a tower of marks": "f" + "\u0301" * 90,
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("field", ["description", "contributors", "gpu"])
def test_hostile_text_in_a_record(field: str, name: str, record: Path) -> None:
    found = json.loads(record.read_text())
    found[field] = [HOSTILE[name]] if field == "contributors" else HOSTILE[name]
    record.write_text(json.dumps(found))
    said = refused("verify", record)
    assert field in said and said.isprintable()


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_text_at_submission(name: str, runs: tuple[list[Path], Path], tmp_path: Path) -> None:
    paths, data = runs
    (tmp_path / "board").mkdir()
    words = ["submit", tmp_path / "board", *paths, f"--data_root={data}"]
    assert "--description" in refused(*words, f"--description={HOSTILE[name]}")
    assert "--contributors" in refused(
        *words, "--description=Smear gate", f"--contributors=A,{HOSTILE[name]}"
    )
    assert not any((tmp_path / "board").iterdir())


URLS = [
    "javascript:alert(1)", "JAVASCRIPT:alert(1)", "data:text/html,x", "file:///etc/passwd", "http://example.org/log",
    "ftp://example.org/x", "//example.org/x", "https:example.org", "https://", "https:///x", "https://localhost/x",
    "https://a.localhost/", "https://127.0.0.1/x", "https://169.254.169.254/latest", "https://10.0.0.1/", "https://[::1]/x",
    "https://2130706433/", "https://0x7f.1/", "https://printer.local/x", "https://db.internal/",
    "https://user:pw@example.org/",
    "https://example.org@evil.org/",
    'https://example.org/"onclick="x', "https://example.org/<b>", "https://example.org/a b",
    "https://example.org/\n", "https://example.org/\u202e", "https://exa mple.org/", "https://example.org:999999/x",
    "https://example", "https://example.org/" + "x" * 300, "https://\u0435xample.org/", " https://example.org/",
    "https://example.org/\\x", "vbscript:x", "blob:https://example.org/x", "https://example.onion/x", "https://a.lan/",
    "https://example.org/`x`", "https://example.org\t/x",
]  # fmt: skip


@pytest.mark.parametrize("url", URLS)
def test_hostile_addresses(url: str) -> None:
    with pytest.raises(UserError, match="expected https://"):
        text.url_of(url, "--log-url")


@pytest.mark.parametrize(
    "url",
    [
        "https://example.org", "https://example.org/", "https://gist.github.com/a/0123abcd#file-log",
        "https://example.org:8443/logs/run-1.txt?raw=1&x=%20", "https://xn--bcher-kva.example.org/a_(b)",
        "https://sub.domain.example.org/~user/log.txt",
    ],
)  # fmt: skip
def test_addresses_that_are_taken(url: str) -> None:
    assert text.url_of(url, "--log-url") == url


@pytest.mark.parametrize(
    "words",
    [
        "TODO", "todo: describe", "my run", "Test", "A short description", "describe what was changed", "<description>",
        "...", "xxx", "hello world", "asdf", "n/a", "what changed", "run", "Lorem ipsum dolor", "-", "FIXME later",
        "what was changed",
    ],
)  # fmt: skip
def test_the_unedited_template_of_a_description_is_refused(
    words: str, runs: tuple[list[Path], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths, data = runs
    (tmp_path / "board").mkdir()
    argv = ["submit", tmp_path / "board", *paths, f"--data_root={data}", f"--description={words}"]
    assert command.main([str(word) for word in argv]) == command.EXIT_REFUSED
    assert "its description is the unedited template" in capsys.readouterr().out
    assert not any((tmp_path / "board").iterdir())


# The board, the command line, foreign logs


@pytest.mark.parametrize(
    "found, said",
    [
        ({}, "format"), ({"format": "x"}, "format"), ({"format": FORMAT, "owner": 1}, "owner"),
        ({"format": FORMAT, "title": ""}, "title"), ({"format": FORMAT, "title": "a\nb"}, "title"),
        ({"format": FORMAT, "title": 5}, "title"), ({"format": FORMAT, "tracks": {}}, "tracks"),
        ({"format": FORMAT, "tracks": [5]}, "tracks[0]"), ({"format": FORMAT, "tracks": [{}]}, "name: missing"),
        ({"format": FORMAT, "tracks": [{}] * 60}, "at most 50"),
    ],
)  # fmt: skip
def test_board_file(found: dict, said: str, tmp_path: Path) -> None:
    (tmp_path / "board.json").write_text(json.dumps(found))
    assert said in refused("verify", tmp_path)


TRACK = {
    "name": "tiny", "title": "Tiny", "target": 3.0, "metric": "seconds", "test": "t", "val_sha256": "0" * 64,
    "val_tokens": 5, "vocab_size": 50,
}  # fmt: skip


@pytest.mark.parametrize(
    "field, value",
    [
        ("name", "a b"), ("name", "../x"), ("name", "track1"), ("name", 5), ("title", "a\u202eb"), ("target", "3"),
        ("target", -1), ("metric", "loss"), ("test", "none"), ("val_sha256", "x"), ("val_tokens", 0),
        ("vocab_size", True), ("alpha", 0.9), ("min_runs", 0), ("entries", "a"), ("template", ["a"]), ("pinned", []),
        ("colour", "red"), ("marks", 1), ("loss_floor", None), ("flops_per_token", "many"),
    ],
)  # fmt: skip
def test_tracks_of_a_board(field: str, value: object, tmp_path: Path) -> None:
    rows = [{**TRACK, field: value}]
    (tmp_path / "board.json").write_text(json.dumps({"format": FORMAT, "tracks": rows}))
    assert field in refused("verify", tmp_path)
    (tmp_path / "board.json").write_text(json.dumps({"format": FORMAT, "tracks": [TRACK]}))
    assert "tiny" in open_board(tmp_path).tracks


@pytest.mark.parametrize(
    "content, said",
    [
        (b"", "is empty"),
        (b"hello\n", "not a log of modded-nanogpt"),
        (b"x\n" + b"=" * 99 + b"\nstep:0/1 val_loss:3 train_time:0ms\n", "not a log of modded-nanogpt"),
        (b"x\n" + b"=" * 100 + b"\nnothing\n", "holds no line 'step:S/T"),
        (b"x\n" + b"=" * 100 + b"\nstep:0/9 val_loss:10.83 train_time:0ms step_avg:nanms\nstep:1/9 tra", "not a line"),
        (b"\xff\xfe\n" + b"=" * 100 + b"\n", "not UTF-8"),
        (b"x\n" + b"=" * 100 + b"\n" + b"y" * (1 << 20) + b"y\n", "a line of more than"),
    ],
)  # fmt: skip
def test_foreign_logs(content: bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / "log.txt").write_bytes(content)
    assert said in refused("verify", tmp_path / "log.txt")


@pytest.mark.parametrize(
    "words, said",
    [
        (["sumbit"], "did you mean 'submit'"), (["verify"], "the following arguments are required"),
        (["verify", "nowhere"], "nowhere: there is none; name run directories"),
        (["verify", "a/records/b.json"], "is missing"),
        (["verify", "--tarck=a", "x"], "--track"),
        (["build", "nowhere"], "a new board: engaging leaderboard init nowhere"),
        (["fetch", "x", "../y", "z"], "ID"), (["submit", "x", "y"], "--description"),
        (["track", "x", "y", "--name=a b", "--title=t", "--target=3"], "--name"),
        (["submit", ".", "x", "--description=Smear gate", "--log-url=javascript:x"], "is no board"),
    ],
)  # fmt: skip
def test_command_line(words: list[str], said: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "somebodys").touch()
    assert said in refused(*words)


@pytest.mark.parametrize("command_of", ["fetch", "retract", "correct"])
def test_an_id_that_no_record_has(command_of: str, record: Path, tmp_path: Path) -> None:
    board, close = record.parent.parent, record.stem[:-1] + ("0" if record.stem[-1] != "0" else "1")
    more = {
        "fetch": [tmp_path / "new"], "retract": ["--reason=mistuned"],
        "correct": ["--reason=typo", "--description=Another gate for it"],
    }[command_of]  # fmt: skip
    said = refused(command_of, board, close, *more)
    assert f"{close}: " in said and "has no record of this id" in said and f"'{record.stem}'" in said


def test_the_door_prints_one_line_and_no_traceback(run_python: Callable, tmp_path: Path) -> None:
    done = run_python("-m", "tools", "leaderboard", "verify", tmp_path / "nothing")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


def test_help_is_quick_and_imports_nothing_heavy(run_python: Callable) -> None:
    code = (
        "import sys\nfrom tools.leaderboard import command\ncommand.main(['--help'])\n"
        "print([name for name in ('torch', 'scipy', 'jinja2', 'pydantic', 'matplotlib') if name in sys.modules])"
    )
    done = run_python("-c", code)
    assert done.stdout.rstrip().endswith("[]"), done.stdout


def test_a_malformed_record_among_good_ones_is_named_and_the_rest_is_checked(
    record: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = record.with_name("0000000000000000.json")
    bad.write_text("{")
    capsys.readouterr()
    assert command.main(["verify", str(record.parent.parent)]) == EXIT_USAGE
    said = capsys.readouterr().out
    assert f"{bad.name}: malformed: " in said and "accepted: " in said and "2 records checked" in said


def test_a_date_to_come(record: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(record.read_text())
    found["submitted"] = (
        datetime.datetime.now(datetime.timezone.utc) + datetime.timedelta(days=9)
    ).isoformat()
    record.write_text(json.dumps(found))
    assert command.main(["verify", str(record)]) == command.EXIT_REFUSED
    assert "which is to come" in capsys.readouterr().out
