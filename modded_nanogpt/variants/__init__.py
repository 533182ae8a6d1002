"""Variants of the small trainer, one file each, chosen by name: --variant=palm_parallel, --variant=my/idea.py.

To try an idea, copy `baseline.py` (or another one), change it, and name the copy. It needs a class `Variant` and may
import what the trainer can; whatever else it needs must stand in the same file, because the run keeps a copy of that
one file. It is your own code and runs with your own rights; a variant is never taken from a data file.

Standard library only: a name is looked up, and its file is parsed, before torch is imported.
"""

import ast
import re
from pathlib import Path

from nanogpt.common.errors import UserError
from nanogpt.common.flags import nearest

FOLDER = Path(__file__).resolve().parent
LARGEST_FILE = 1 << 20  # bytes
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,47}")


def name_of(spec: str) -> str:
    """The name that `--variant=spec` has in the run's copy of the source: a path's last part without `.py`."""
    return Path(spec).stem if spec.endswith(".py") else spec


def find(spec: str) -> Path:
    """The file that `--variant=spec` means: one of this folder by name, or the path of a .py file.

    UserError when there is none, it is no Python, or it has no class Variant. Nothing is run.
    """
    name = name_of(spec)
    if not _NAME.fullmatch(name):
        raise UserError(f"--variant={spec[:80]!r}: expected a name, or the path of a file like my_idea.py")
    own, given = FOLDER / f"{name}.py", Path(spec).expanduser()
    path = given if spec.endswith(".py") and given.is_file() else own
    if not path.is_file() or name == "__init__":
        known = sorted(file.stem for file in FOLDER.glob("*.py") if file.stem != "__init__")
        raise UserError(
            f"--variant={spec}: there is no such variant{nearest(name, known)} (there are: {', '.join(known)}; "
            "or name a file of yours, copied from one of them)"
        )
    text = _read(spec, path)
    if path != own and own.is_file() and own.read_bytes() != text:
        raise UserError(
            f"--variant={spec}: {own.name} is another variant's name already; give your copy a new one"
        )
    try:
        tree = ast.parse(text, filename=path.name)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        line = f":{error.lineno}" if isinstance(error, SyntaxError) else ""
        raise UserError(f"{path}{line}: not Python: {getattr(error, 'msg', error)}") from None
    if not any(isinstance(node, ast.ClassDef) and node.name == "Variant" for node in tree.body):
        raise UserError(f"{path}: has no class Variant; copy {FOLDER.name}/baseline.py and change that")
    return path


def _read(spec: str, path: Path) -> bytes:
    try:
        if path.stat().st_size > LARGEST_FILE:
            raise UserError(
                f"--variant={spec}: larger than {LARGEST_FILE:,} bytes; a variant is a page of Python"
            )
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"--variant={spec}: cannot be read: {error.strerror}") from None
