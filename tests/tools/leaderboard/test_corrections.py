"""`leaderboard init`, `retract`, `correct`: a group's board, and what was said of a record afterwards."""

import json
import os
import shutil
import stat
import subprocess
import tempfile
from pathlib import Path

import board_kit as kit
import pytest

from nanogpt.common.errors import UserError
from tools.leaderboard import command, corrections
from tools.leaderboard.board import open_board


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A board of a group with one record, all of it written under the strictest umask."""
    folder = tmp_path_factory.mktemp("made")
    before = os.umask(0o077)
    try:
        assert command.main(["init", str(folder / "board"), "--title=Our lab"]) == 0
        paths, data = kit.write_all(kit.seeds(3), folder / "runs")
        words = [f"--data_root={data}", "--contributors=Ada", "--description=Smear over two tokens"]
        assert command.main(["submit", str(folder / "board"), *map(str, paths), *words]) == 0
    finally:
        os.umask(before)
    return folder / "board"


@pytest.fixture
def record(made: Path):
    yield next((made / "records").iterdir()).stem
    for path in (made / "retracted").iterdir():
        path.unlink()


def page(board: Path) -> str:
    assert command.main(["build", str(board)]) == 0
    return (board / "site" / "index.html").read_text()


def test_the_group_can_read_and_write_it_whatever_the_umask(made: Path) -> None:
    for path in [made, *(p for p in made.rglob("*") if "site" not in p.parts)]:
        mode = stat.S_IMODE(path.stat().st_mode)
        assert mode == (0o3775 if path.is_dir() else 0o644), (path, oct(mode))
    with pytest.raises(UserError, match="not empty"):
        command.main(["init", str(made)])


@pytest.mark.skipif(os.getuid() != 0, reason="needs a second account")
@pytest.mark.parametrize(
    ("line", "allowed"),
    [
        ("echo x > records/another.json", True),
        ("mkdir evidence/zz && echo x > evidence/zz/another.xz", True),
        ("echo x >> records/$0.json", False),
        ("rm -f records/$0.json", False),
        ("mv records/$0.json records/other.json", False),
        ("echo x >> board.json", False),
        ("mv records gone", False),
    ],
)
def test_others_of_the_group_add_and_change_nothing(
    made: Path, record: str, line: str, allowed: bool
) -> None:
    with tempfile.TemporaryDirectory() as place:  # which all may enter
        Path(place).chmod(0o755)
        board = shutil.copytree(made, Path(place) / "board")
        done = subprocess.run(
            ["sh", "-c", f"umask 077; {line}", record], cwd=board, user=12345, group=board.stat().st_gid,
            extra_groups=[], capture_output=True, timeout=600,
        )  # fmt: skip
        assert (done.returncode == 0) is allowed, done.stderr


def test_a_withdrawn_record_leaves_the_table_and_is_listed_with_its_reason(made: Path, record: str) -> None:
    assert "Withdrawn" not in page(made)
    evil = "mistuned <script>alert(1)</script> {{ 7 * 7 }}"
    assert command.main(["retract", str(made), record, f"--reason={evil}"]) == 0
    text = page(made)
    assert "<h2>Withdrawn</h2>" in text and "mistuned &lt;script&gt;" in text and "0 results" in text
    assert "{{ 7 * 7 }}" in text and not (made / "site" / "records" / f"{record}.html").exists()
    assert command.main(["verify", str(made)]) == 0  # the record itself is untouched


def test_a_corrected_one_stays_under_its_new_description(made: Path, record: str) -> None:
    words = ["--reason=it was the other gate", "--description=Skip gate over two tokens"]
    assert command.main(["correct", str(made), record, *words]) == 0
    text = page(made)
    assert "Skip gate over two tokens" in text and "Smear over two" not in text and "1 result," in text


def test_who_may(made: Path, record: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as other:
        other.setattr(os, "getuid", lambda: 12345)
        with pytest.raises(UserError, match="only who handed it in"):
            command.main(["retract", str(made), record, "--reason=because"])
    path = corrections.write(open_board(made), record, "a stranger's")
    if os.geteuid() == 0:
        os.chown(path, 12345, 12345)
        assert corrections.read(open_board(made)) == {} and "1 result," in page(made)


@pytest.mark.parametrize(
    "change", [{"id": "0" * 16}, {"format": "x"}, {"more": 1}, {"at": "now"}, {"reason": "a\nb"}]
)
def test_a_damaged_one_is_one_line(made: Path, record: str, change: dict) -> None:
    path = corrections.write(open_board(made), record, "because")
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(UserError) as caught:
        command.main(["build", str(made)])
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_bad_words(made: Path) -> None:
    for words in (["retract", str(made), "0" * 16, "--reason=x"], ["retract", str(made), "..", "--reason=x"],
                  ["retract", str(made), "0" * 16], ["correct", str(made), "0" * 16, "--reason=x"]):  # fmt: skip
        with pytest.raises(UserError):
            command.main(words)
