"""The pictures of docs/ can be drawn again from the code they show."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_the_pictures_are_drawn(tmp_path):
    done = subprocess.run(
        [sys.executable, str(ROOT / "docs" / "figures" / "draw.py"), str(tmp_path)],
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    drawn = {path.name for path in tmp_path.iterdir()}
    assert drawn == {path.name for path in (ROOT / "docs" / "figures").glob("*.png")}
