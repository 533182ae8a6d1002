"""The lines of metrics.jsonl as objects: a fast way for blocks of plain lines, and a slow one that finds the fault.

The fast way hands a block to pydantic's JSON parser as one array. What looks odd in any way (counts that do not come
out, a type, a number that is not finite) goes through `strict`, line by line, which names the line.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from pydantic_core import from_json

from nanogpt.common.errors import UserError
from tools.analysis import strict

BLOCK = 4 << 20  # bytes parsed at once
# bytes: longer lines, and the long numbers that they may hold, are read one by one
LONG_LINE = strict.LONGEST_NUMBER
MAX_STEP = 1 << 31
# By kind of point: the names of its loss, tokens so far, clock so far (ms), time of this step (ms).
RUN_KEYS = {"train": ("loss", "tokens", "train_ms", "ms"), "val": ("val_loss", "tokens", "train_ms", "ms")}
EXPERIMENT_KEYS = {
    kind: (f"{kind}_loss", "tokens", "train_time_ms", "step_avg_ms") for kind in ("train", "val")
}
_END, _OPEN, _CLOSE, _COLON, _E, _MINUS = b"\n{}:e-"
_DIGITS = np.frombuffer(b"0123456789.", np.uint8)


def blocks(path: Path, start: int = 0, end: int | None = None) -> Iterator[tuple[int, bytes, bool]]:
    """(place in the file, whole lines, the last line has no end) from the line after byte `start` to that of `end`."""
    try:
        with path.open("rb") as file:
            if start:
                file.seek(start - 1)
                file.readline()
            place = file.tell()
            while end is None or place < end:
                data = file.read(BLOCK if end is None else min(BLOCK, end - place))
                if not data:
                    return
                if not data.endswith(b"\n"):
                    data += file.readline(strict.LONGEST_LINE + 2)
                if not data.endswith(b"\n") and file.read(1):
                    raise UserError(f"{path}: a line longer than {strict.LONGEST_LINE >> 10} KiB; remove it")
                yield place, data, not data.endswith(b"\n")
                place += len(data)
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read: {error.strerror or error}; is this the right folder?"
        ) from None


def parse(data: bytes) -> list[dict[str, Any]] | None:
    """The objects of whole lines, or None where a line may be anything but one plain flat object."""
    body = data.strip(b"\n")
    if not body.startswith(b"{") or not body.endswith(b"}") or b"\\" in body:
        return None
    letters = np.frombuffer(body, np.uint8)
    ends = np.flatnonzero(letters == _END)
    if len(ends) and ((letters[ends - 1] != _CLOSE) | (letters[ends + 1] != _OPEN)).any():
        return None
    if np.diff(ends, prepend=-1, append=len(body)).max() > LONG_LINE or _huge(letters):
        return None
    try:
        rows = from_json(b"[" + body.replace(b"\n", b",") + b"]", allow_inf_nan=False, cache_strings="keys")
    except ValueError:
        return None
    # as many keys as colons: no key stands there twice, nothing is nested. Texts may hold colons, too: then as many as
    # quotes before a colon, between which there must not be a blank
    count = sum(map(len, rows))
    if len(rows) != len(ends) + 1:
        return None
    if count != np.count_nonzero(letters == _COLON) and (
        count != body.count(b'":') or re.search(rb'"\s+:', body)
    ):
        return None
    return rows


def _huge(letters: np.ndarray) -> bool:
    """Whether a number has an exponent that is not negative: 1e400 would come out as infinity."""
    places = np.flatnonzero(
        (letters | 0x20) == _E
    )  # e and E; never the first or the last: those are brackets
    exponent = np.isin(letters[places - 1], _DIGITS) & (letters[places + 1] != _MINUS)
    return bool(exponent.any())


def parse_slowly(
    path: Path, place: int, data: bytes, keys: dict, cut_off_allowed: bool
) -> tuple[list[dict[str, Any]], bool]:
    """The objects of the lines of `data` and whether the last was cut off. UserError for the first bad line."""
    rows, first = [], None
    lines = data.split(b"\n")
    for index, line in enumerate(lines):
        if not line.strip():
            continue
        if first is None:
            first = line_number(path, place)
        where = f"{path}: line {first + index}"
        if index == len(lines) - 1:  # what follows the last end of line
            try:
                row = strict.line_object(line, where)
            except UserError:
                if cut_off_allowed and line.startswith(b"{"):
                    return rows, True
                raise UserError(
                    f"{where}: {strict.shown(line.decode('utf-8', 'replace'))}: cut off in the middle; "
                    "remove the line, or run it again"
                ) from None
        else:
            row = strict.line_object(line, where)
        check(row, where, keys)
        rows.append(row)
    return rows, False


def line_number(path: Path, place: int) -> int:
    """The number of the line that begins at byte `place`."""
    count, done = 1, 0
    with path.open("rb") as file:
        while done < place and (data := file.read(min(BLOCK, place - done))):
            count += data.count(b"\n")
            done += len(data)
    return count


def check(row: dict[str, Any], where: str, keys: dict) -> None:
    """UserError unless the fields that are used have their types."""
    if keys is RUN_KEYS:
        event = row.get("event")
        if not isinstance(event, str):
            raise UserError(f"{where}: event: {strict.shown(event)}: expected text such as train, val, end")
        if event not in keys:
            strict.whole(row, "step", where)
            strict.number(row, "val_loss", where)
            strict.number(row, "train_ms", where, low=0)
            strict.number(row, "seconds", where, low=0)
            return
        kinds = [event]
    else:
        strict.whole(row, "run_id", where, needed=True)
        kinds = [kind for kind in keys if keys[kind][0] in row]
        if not kinds:
            raise UserError(f"{where}: neither train_loss nor val_loss stands there")
    step = strict.whole(row, "step", where, needed=True)
    if step is not None and step >= MAX_STEP:
        raise UserError(f"{where}: step: {strict.shown(step)}: the number is too large")
    for kind in kinds:
        if keys[kind][0] not in row:
            raise UserError(f"{where}: {keys[kind][0]}: it is missing")
        strict.number(row, keys[kind][0], where)
        for key in keys[kind][1:]:
            strict.number(row, key, where, low=0)
