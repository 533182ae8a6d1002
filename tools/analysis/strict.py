"""JSON that people and programs left behind, read strictly: a fault is one line that names file, line and remedy.

Python's json takes NaN, reads 1e400 as infinity and keeps the last of two equal keys. A result that rests on such
a file rests on nothing, so all of that is refused here, like what is missing, empty, cut off or too long.
"""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from nanogpt.common.errors import UserError
from tools.runs import printable

LONGEST_LINE = 1 << 18  # bytes of one line of a .jsonl file
LARGEST_FILE = 1 << 24  # bytes of a .json file
LONGEST_NUMBER = 1000  # digits of a whole number
SHOWN = 60  # characters of a wrong value that an error shows


class Fault(ValueError):
    """What is wrong with a piece of JSON, in words."""


def shown(value: object) -> str:
    """A value as an error may show it: one printable line, not too long."""
    text = printable(value if isinstance(value, str) else json.dumps(value, default=str))
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


def loads(data: bytes) -> Any:
    """The JSON value of `data`. Fault for what JSON has not, or has twice, and for numbers beyond float64."""
    try:
        text = data.decode("utf-8")
        return json.loads(
            text, object_pairs_hook=_object, parse_constant=_constant, parse_float=_float, parse_int=_int
        )
    except UnicodeDecodeError:
        raise Fault("not UTF-8 text") from None
    except RecursionError:
        raise Fault("nested too deeply") from None
    except json.JSONDecodeError as error:
        where = f"line {error.lineno} " if error.lineno > 1 else ""
        raise Fault(f"not JSON: {error.msg} at {where}column {error.colno}") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in found if keys.count(key) > 1)
        raise Fault(f"the key {shown(twice)!r} stands there twice")
    return found


def _constant(word: str) -> NoReturn:
    raise Fault(f"{word} is not a number that JSON has")


def _float(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise Fault(f"the number {shown(text)} is too large")
    return value


def _int(text: str) -> int:
    if len(text) > LONGEST_NUMBER:
        raise Fault(f"the number {shown(text)} is too large")
    return int(text)


def read_object(path: Path) -> dict[str, Any]:
    """The object in a .json file. UserError, naming the file, for every way in which it is none."""
    try:
        with path.open("rb") as file:
            data = file.read(LARGEST_FILE + 1)
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read: {error.strerror or error}; is this the right folder?"
        ) from None
    if len(data) > LARGEST_FILE:
        raise UserError(f"{path}: larger than {LARGEST_FILE >> 20} MiB; this is no file of an experiment")
    if not data.strip():
        raise UserError(f"{path}: empty; the program that wrote it was cut off: run it again")
    try:
        value = loads(data)
    except Fault as fault:
        raise UserError(f"{path}: {fault}; repair the file, or run the experiment again") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: {shown(value)}: expected a JSON object, {{...}}")
    return value


def line_object(line: bytes, where: str) -> dict[str, Any]:
    """The object of one line of a .jsonl file; UserError names it as `where`."""
    if len(line) > LONGEST_LINE:
        raise UserError(
            f"{where}: longer than {LONGEST_LINE >> 10} KiB; no line of an experiment is: remove it"
        )
    try:
        value = loads(line)
    except Fault as fault:
        raise UserError(
            f"{where}: {shown(line.decode('utf-8', 'replace'))}: {fault}; repair the line, or remove it"
        ) from None
    if not isinstance(value, dict):
        raise UserError(f"{where}: {shown(value)}: expected a JSON object, {{...}}")
    return value


def lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """("file: line 3", object) for each line of a small .jsonl file; UserError for the first that is none."""
    try:
        with path.open("rb") as file:
            number = 0
            while line := file.readline(LONGEST_LINE + 2):
                number += 1
                where = f"{path}: line {number}"
                if line.strip():
                    if not line.endswith(b"\n") and len(line) <= LONGEST_LINE:
                        where += " (the last, without an end: cut off?)"
                    yield where, line_object(line.rstrip(b"\r\n"), where)
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read: {error.strerror or error}; is this the right folder?"
        ) from None


def number(
    row: dict[str, Any], key: str, where: str, *, low: float | None = None, needed: bool = False
) -> float | None:
    """`row[key]` as a float; None where it is null or absent (UserError then, if `needed`), UserError for the rest."""
    value = row.get(key)
    if value is None and not needed:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UserError(f"{where}: {key}: {shown(value)}: expected a number")
    try:
        found = float(value)
    except OverflowError:
        raise UserError(f"{where}: {key}: {shown(value)}: the number is too large") from None
    if low is not None and found < low:
        raise UserError(f"{where}: {key}: {shown(value)}: must be at least {low:g}")
    return found


def whole(
    row: dict[str, Any], key: str, where: str, *, needed: bool = False, low: int | None = 0
) -> int | None:
    """`row[key]` as a whole number below 2**63; None where it is null or absent, unless `needed`."""
    value = row.get(key)
    if value is None and not needed:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or abs(value) >= 1 << 63:
        raise UserError(f"{where}: {key}: {shown(value)}: expected a whole number")
    if low is not None and value < low:
        raise UserError(f"{where}: {key}: {shown(value)}: must be at least {low}")
    return value


def text(row: dict[str, Any], key: str, where: str, default: str = "") -> str:
    """`row[key]` as one printable line; `default` where it is null or absent, UserError for what is no text."""
    value = row.get(key)
    if value is None:
        return default
    if not isinstance(value, str):
        raise UserError(f"{where}: {key}: {shown(value)}: expected text")
    return printable(value)[:200]


def section(row: dict[str, Any], key: str, where: str) -> dict[str, Any]:
    """`row[key]` as an object; {} where it is null or absent, UserError for what is no object."""
    value = row.get(key)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise UserError(f"{where}: {key}: {shown(value)}: expected an object, {{...}}")
    return value
