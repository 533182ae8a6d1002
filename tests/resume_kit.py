"""What tests of resumed runs look at."""

from pathlib import Path


def refused(done, *words: str) -> None:
    """One line, status 2, with these words."""
    assert done.status == 2, (done.status, done.stderr)
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    for word in words:
        assert word in done.stderr


def snapshot(folder: Path) -> dict[str, bytes]:
    """Every file of a folder."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
