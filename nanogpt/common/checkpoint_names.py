"""Names of checkpoint folders, and of what is left of them: what can be known and done without torch."""

import re
import shutil
from pathlib import Path

_NAME = re.compile(r"step_(\d{8,})")


def name_of(step: int) -> str:
    """The folder's name."""
    return f"step_{step:08d}"


def steps(folder: Path) -> list[int]:
    """The steps that have a checkpoint folder, oldest first; whether they are sound is another question."""
    if not folder.is_dir():
        return []
    names = (_NAME.fullmatch(path.name) for path in folder.iterdir() if path.is_dir())
    return sorted(int(match[1]) for match in names if match)


def remove_leftovers(folder: Path) -> None:
    """Delete what attempts that died in a save or a prune have left."""
    if folder.is_dir():
        for path in [*folder.glob(".step_*.tmp"), *folder.glob(".trash_*")]:
            shutil.rmtree(path, ignore_errors=True)
