"""docs/leaderboard.md: its commands work in the order of reading, its tables are the code's."""

import re
import shlex
from pathlib import Path

import board_kit as kit
import pytest

from tools.leaderboard import command, pages
from tools.leaderboard.run_checks import TITLES
from tools.leaderboard.submission import KINDS
from tools.leaderboard.tracks import BUILT_IN

PAGE = (Path(__file__).resolve().parents[3] / "docs" / "leaderboard.md").read_text()


def test_its_commands_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DATA_ROOT", str(tmp_path / "data"))
    (tmp_path / "board").mkdir()
    for seed in (1, 2, 3):
        kit.made(seed).write(tmp_path / f"out/idea-{seed}", tmp_path / "data")
    kit.made(4, change="start").write(tmp_path / "out/start")
    ran = []
    for line in re.findall(r"^    engaging leaderboard (.*)$", PAGE, re.MULTILINE):
        words = shlex.split(line, comments=True)
        if "ID" in words:
            words[words.index("ID")] = next((tmp_path / "board/records").iterdir()).stem
        assert command.main(words) == 0, f"{line}\n{capsys.readouterr().out}"
        ran.append(words[0])
    assert set(ran) == set(command.COMMANDS)
    assert (tmp_path / "board/site/index.html").is_file() and (tmp_path / "again/run-1/log.txt").is_file()


def rows(heading: str) -> list[str]:
    """The first cells of the table below a heading."""
    section = PAGE.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    cells = [line.split("|")[1].strip(" `") for line in section.splitlines() if line.startswith("|")]
    return [cell for cell in cells[1:] if set(cell) - set("- ")]


def test_its_tables_are_the_code() -> None:
    assert rows("What is checked") == list(TITLES)
    assert rows("Tracks") == list(BUILT_IN)
    assert rows("How to hand in a result") == list(KINDS)
    for track in BUILT_IN.values():
        assert f"{track.target:g} on FineWeb" in PAGE and f"{track.val_tokens:,}" in PAGE


def test_the_limits_on_the_page_are_the_documents() -> None:
    """The first words of each: both say the same, each in its own place."""
    section = PAGE.partition("## What a checker cannot know")[2].partition("\n## ")[0]
    for limit in pages.LIMITS[:4]:
        assert limit.partition(".")[0] in " ".join(section.split()), limit
