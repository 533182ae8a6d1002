"""The pages on faults name tests and sections that exist, and say of what has none that it was not run."""

import re
from pathlib import Path

import pytest

from tests.faults.__main__ import SECTIONS

ROOT = Path(__file__).resolve().parents[2]


def rows(page: str, head: str) -> list[list[str]]:
    """The cells of every table of a page whose first column is called `head`."""
    found, inside = [], False
    for line in (ROOT / "docs" / page).read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if not line.startswith("|"):
            inside = False
        elif cells[0] == head:
            inside = True
        elif inside and not set(line) <= set("|-: "):
            found.append(cells)
    return found


@pytest.mark.parametrize(
    ("page", "head", "count"), [("cases.md", "reported", 49), ("reliability.md", "fault kind", 72)]
)
def test_every_fault_has_a_test_that_exists_or_a_reason(page, head, count):
    found = rows(page, head)
    assert len(found) == count and len({row[0] + row[1] for row in found}) == count
    for row in found:
        tests = re.findall(r"`(tests/\S+\.py): (\w+)`", row[-1])
        sections = re.findall(r"section `(\w+)`", row[-1])
        assert tests or sections or row[-1].startswith(("not run: ", "no test: ")), row
        for file, name in tests:
            assert re.search(rf"^def test_{name}\(", (ROOT / file).read_text(), re.MULTILINE), (file, name)
        assert set(sections) <= set(SECTIONS), row
