"""JSON of strangers, read strictly: limits first, then no duplicate keys, no NaN, no overflow, no bad UTF-8."""

import json
from pathlib import Path
from typing import Any

from nanogpt.common.errors import UserError
from tools.analysis.strict import Fault, loads

LARGEST = 1 << 20  # bytes of a JSON text, and of a line of metrics
DEEPEST = 32


def parse(data: bytes, where: str, largest: int = LARGEST) -> Any:
    """The value of a JSON text. UserError, beginning with `where`, for anything that is not plain, finite JSON."""
    if len(data) > largest:
        raise UserError(f"{where}: {len(data):,} bytes; at most {largest:,} are read")
    if not data.strip():
        raise UserError(f"{where}: is empty; expected JSON")
    _refuse_deep(data, where)
    try:
        value = loads(data)
        json.dumps(value, ensure_ascii=False).encode("utf-8")  # half of a surrogate pair is no text
    except UnicodeError:
        raise UserError(f"{where}: not text (half of a character); write the file again") from None
    except Fault as fault:
        raise UserError(f"{where}: {fault}; it was cut or edited") from None
    return value


def _refuse_deep(data: bytes, where: str) -> None:
    """A cheap bound on nesting: brackets inside strings count too, which no honest record comes near."""
    if data.count(b"[") + data.count(b"{") <= DEEPEST:
        return
    depth = deepest = 0
    for char in data:
        if char in b"[{":
            depth += 1
            deepest = max(deepest, depth)
        elif char in b"]}":
            depth -= 1
    if deepest > DEEPEST:
        raise UserError(f"{where}: nested {deepest} levels deep; at most {DEEPEST} are read")


def parse_object(data: bytes, where: str, largest: int = LARGEST) -> dict[str, Any]:
    """`parse` of a text that must be an object."""
    value = parse(data, where, largest)
    if not isinstance(value, dict):
        raise UserError(f"{where}: expected a JSON object, found {type(value).__name__}")
    return value


def read_bytes(path: Path, largest: int) -> bytes:
    """A regular file's content. UserError when it is missing, empty, no file, or larger than `largest` bytes."""
    try:
        if path.is_symlink() or not path.is_file():
            what = "is a link" if path.is_symlink() else "is not a file" if path.exists() else "is missing"
            raise UserError(f"{path}: {what}; expected the file that the run wrote")
        with path.open("rb") as file:
            data = file.read(largest + 1)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    if not data:
        raise UserError(f"{path}: is empty; expected the file that the run wrote")
    if len(data) > largest:
        raise UserError(f"{path}: larger than {largest:,} bytes; that is no run's file")
    return data


def is_whole(value: object, low: int = 0, high: int = 10**15) -> bool:
    """Whether `value` is an int (no bool) in the range."""
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def is_number(value: object, low: float = -1e15, high: float = 1e15) -> bool:
    """Whether `value` is a finite number (no bool) in the range."""
    return isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high
