"""The pages that the lab's Jekyll site shows: their heads parse, and their addresses are the documents' own."""

import re
from pathlib import Path

import pytest

DOCS = Path(__file__).resolve().parents[2] / "docs"


@pytest.mark.parametrize(
    ("page", "address"),
    [
        ("guide-1-cluster.md", "/nanogpt-hero/"),
        ("guide-2-speedrun.md", "/modded-nanogpt-hero/"),
        ("leaderboard.md", "/leaderboard/"),
    ],
)
def test_the_head_is_plain_yaml_with_the_pages_address(page, address):
    text = (DOCS / page).read_text()
    assert text.startswith("---\n")
    head = text.split("---\n")[1]
    rows = dict(line.split(": ", 1) for line in head.splitlines())
    assert rows["permalink"] == address and rows["layout"] in ("post", "page")
    for value in (rows["title"], rows.get("excerpt", '""')):
        assert value[0] == value[-1] == '"' and '"' not in value[1:-1]
    # Links are to files, which work on disk and on the forge; Jekyll's relative-links plugin turns them into addresses.
    assert "{{" not in text and "{%" not in text


def test_guide_2_has_its_ten_sections_and_leads_to_guide_1_and_the_board():
    text = (DOCS / "guide-2-speedrun.md").read_text()
    numbers = [line.split(".")[0] for line in text.splitlines() if line.startswith("## ")]
    assert numbers == [f"## {number}" for number in range(1, 11)]
    assert "(guide-1-cluster.md)" in text and "(leaderboard.md)" in text


def test_the_index_of_job_scripts_is_complete():
    listed = re.findall(r"^\| `(slurm/\S+\.sh)` \|", (DOCS / "launcher.md").read_text(), re.MULTILINE)
    real = [path for room in ("nanogpt", "modded") for path in (DOCS.parent / "slurm" / room).glob("*.sh")]
    assert sorted(listed) == sorted(str(path.relative_to(DOCS.parent)) for path in real)
