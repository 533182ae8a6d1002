"""A board of a course: its terms as tabs; and its pages inside the lab's Jekyll site, built by the real Jekyll."""

import html
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import board_kit as kit
import pytest
from test_pages import submit

from nanogpt.common.errors import UserError
from tools.leaderboard import command

LIQUID = "{{ 7 | times: 7 }} {% endraw %}{% include x %} {{{% gate"


@pytest.fixture(scope="module")
def board(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three records: one in each of two terms, one before them."""
    folder = tmp_path_factory.mktemp("terms")
    assert command.main(["init", str(folder / "board"), "--title", "It's R&D"]) == 0
    days = ("2026-11-20", "2026-11-22", "2026-11-24")
    for number, (day, ms) in enumerate(zip(days, (90.0, 80.0, 84.0), strict=True), 1):
        runs = kit.seeds(4, ms=ms, change=str(number))
        submit(folder / "board", folder / str(number), f"Idea {number} {LIQUID}", runs)
        path = next(p for p in (folder / "board/records").iterdir() if f"Idea {number} " in p.read_text())
        record = json.loads(path.read_text())
        path.write_text(json.dumps({**record, "submitted": f"{day}T12:00:00+00:00"}))
    for name, first in (("Late", "2026-11-23"), ("Early <b>", "2026-11-21")):
        assert command.main(["term", str(folder / "board"), name, "--from", first]) == 0
    return folder / "board"


def test_each_term_is_a_tab_with_its_own_record(board: Path) -> None:
    assert command.main(["build", str(board)]) == 0
    page = (board / "site" / "index.html").read_text()
    names = re.findall(r'<label for="term\d">(.*?)</label>', page)
    assert names == ["Late (1)", "Early &lt;b&gt; (1)", "Before Early &lt;b&gt; (1)", "All terms (3)"]
    panels = re.split(r'<label for="term\d">', page)[1:]
    counted = [
        [panel.count(f">Idea {n} ") for n in (1, 2, 3)] + [panel.count(">record</span>")] for panel in panels
    ]
    assert counted == [[0, 0, 1, 1], [0, 1, 0, 1], [1, 0, 0, 1], [2, 2, 2, 2]]  # and once in the curve
    ids = re.findall(r' id="([^"]*)"', page)
    assert len(ids) == len(set(ids))


def test_a_term_can_be_moved_and_stays_when_a_track_is_added(board: Path, tmp_path: Path) -> None:
    copy = tmp_path / "board"
    shutil.copytree(board, copy)
    assert command.main(["term", str(copy), "Late", "--from", "2026-11-25"]) == 0
    start = kit.made(9, change="start").write(tmp_path / "start", tmp_path / "data")
    words = ("--name=ours", "--title=Ours", "--target=3.5", f"--data_root={tmp_path / 'data'}")
    assert command.main(["track", str(copy), str(start), *words]) == 0
    said = json.loads((copy / "board.json").read_text())
    assert said["terms"] == [
        {"name": "Early <b>", "from": "2026-11-21"},
        {"name": "Late", "from": "2026-11-25"},
    ]
    assert [track["name"] for track in said["tracks"]] == ["ours"]


@pytest.mark.parametrize(
    ("name", "day", "said"),
    [
        ("Late", "2026-13-01", "expected a day such as 2026-09-01"),
        ("Late", "tomorrow", "expected a day"),
        ("Other", "2026-11-21", "begin on one day"),
        ("a\nb", "2026-12-01", "invisible character"),
        ("", "2026-12-01", "is empty"),
    ],
)
def test_terms_that_are_none(board: Path, name: str, day: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        command.main(["term", str(board), name, "--from", day])


@pytest.mark.parametrize(
    "terms", [5, [5], [{"name": "a"}], [{"name": "a", "from": 5}], [{"name": "a", "from": "2026-01-01"}] * 2]
)
def test_a_board_file_with_damaged_terms(tmp_path: Path, terms: object) -> None:
    (tmp_path / "board.json").write_text(json.dumps({"format": "engaging-nanogpt board 1", "terms": terms}))
    with pytest.raises(UserError, match=r"board\.json: terms"):
        command.main(["build", str(tmp_path)])


@pytest.mark.skipif(os.getuid() != 0, reason="needs a second account to own the board")
def test_only_the_manager_changes_a_groups_board(board: Path, tmp_path: Path) -> None:
    copy = tmp_path / "board"
    shutil.copytree(board, copy)
    os.chown(copy / "board.json", 12345, 12345)
    with pytest.raises(UserError, match="belongs to the board's manager"):
        command.main(["term", str(copy), "Other", "--from", "2026-12-01"])


def test_for_jekyll_no_text_of_a_submitter_is_liquid(board: Path, tmp_path: Path) -> None:
    out = tmp_path / "site" / "leaderboard"
    assert command.main(["build", str(board), f"--out={out}", "--jekyll=page"]) == 0
    for page in (out / "index.html", *(out / "records").glob("*.html")):
        text = page.read_text()
        assert text.startswith("---\nlayout: page\ntitle: 'It&#39;s R&amp;D") and "<body" not in text
        assert not re.search(r"\{[{%]", text)


@pytest.mark.skipif(not shutil.which("jekyll"), reason="needs jekyll (Debian: apt-get install jekyll)")
@pytest.mark.parametrize("links", ["date", "pretty"])
def test_the_real_jekyll_builds_them_into_the_labs_site(board: Path, tmp_path: Path, links: str) -> None:
    lab = tmp_path / "lab"
    (lab / "_layouts").mkdir(parents=True)
    (lab / "_layouts" / "page.html").write_text(
        "<html><title>{{ page.title }}</title>LAB{{ content }}</html>"
    )
    (lab / "_config.yml").write_text(f"title: The lab\npermalink: {links}\n")
    assert command.main(["build", str(board), f"--out={lab / 'leaderboard'}", "--jekyll=page"]) == 0
    done = subprocess.run(
        ["jekyll", "build", "--disable-disk-cache", "--quiet"], cwd=lab, capture_output=True, text=True,
        timeout=120, env={**os.environ, "JEKYLL_ENV": "production", "LC_ALL": "C.UTF-8"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    index = (lab / "_site" / "leaderboard" / "index.html").read_text()
    assert index.startswith("<html><title>It&#39;s R&amp;D</title>LAB") and "Early &lt;b&gt;" in index
    assert f"Idea 1 {LIQUID}" in html.unescape(index) and "49" not in re.findall(r"Idea 1 (\d+)", index)
    hrefs = set(re.findall(r'href="(records/[0-9a-f]+\.html)"', index))
    assert len(hrefs) == 3 and all((lab / "_site" / "leaderboard" / href).is_file() for href in hrefs)
    assert (lab / "_site" / "leaderboard" / "records.csv").is_file()
