"""metrics.jsonl of a run or of an experiment as curves: fast enough for 15 million lines, strict about each of them.

`lines` reads the lines; here they become columns, and columns become curves. Validation points are kept one by one.
Training points are means over buckets of steps, about BUCKETS a run, because no picture shows more.
"""

import itertools
import os
from dataclasses import dataclass, field
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np

from tools.analysis import strict
from tools.analysis.lines import MAX_STEP, RUN_KEYS, blocks, check, parse, parse_slowly

BUCKETS = 200
# the fields of a point, in order: step, loss (nats a token), tokens so far, clock so far (ms), time of this step (ms)
FIELDS = ("step", "loss", "tokens", "clock", "ms")


@dataclass
class Curve:
    """Points of one run, steps ascending; what was not logged is NaN. `tokens` and `clock` (ms) are totals so far."""

    step: np.ndarray
    loss: np.ndarray
    tokens: np.ndarray
    clock: np.ndarray

    def __len__(self) -> int:
        return len(self.step)


@dataclass
class Metrics:
    """What one run logged."""

    train: Curve
    val: Curve
    events: list[dict[str, Any]] = field(default_factory=list)  # start, resume, save and end, in order
    lines: int = 0
    missing_losses: int = 0  # lines whose loss is null: it was not finite
    cut_off: bool = False  # the last line is half-written


@dataclass
class Table:
    """Points of many runs: one row a point, or a bucket of points; the columns of `values` are FIELDS."""

    run: np.ndarray  # int64
    values: np.ndarray  # (rows, len(FIELDS)) float64
    weight: np.ndarray  # int64: how many points a row stands for


EMPTY = Curve(*(np.empty(0) for _ in range(4)))


class _Odd(Exception):
    """A value that the fast path does not vouch for."""


def _column(rows: list[dict[str, Any]], key: str, needed: bool = False) -> list[Any]:
    try:
        return list(map(itemgetter(key), rows))
    except KeyError:
        if needed:
            raise _Odd from None
        return [row.get(key) for row in rows]


def _numbers(
    rows: list[dict[str, Any]], key: str, low: float | None = 0.0, needed: bool = False
) -> np.ndarray:
    """The column `key` as float64, null and absent as NaN. _Odd for other types and numbers out of range."""
    values = _column(rows, key, needed)
    kinds = set(map(type, values))
    if kinds == {type(None)}:
        return np.full(len(values), np.nan)
    if not kinds <= {int, float, type(None)}:
        raise _Odd
    try:
        found = np.array(values, dtype=np.float64)
    except OverflowError:
        raise _Odd from None
    there = found[~np.isnan(found)] if type(None) in kinds else found
    if len(there) != len(values) - (values.count(None) if type(None) in kinds else 0):
        raise _Odd
    if not np.isfinite(there).all() or (low is not None and there.min(initial=low) < low):
        raise _Odd
    return found


def _wholes(rows: list[dict[str, Any]], key: str, high: int) -> np.ndarray:
    values = _column(rows, key)
    if set(map(type, values)) - {int}:
        raise _Odd
    try:
        found = np.array(values, dtype=np.int64)
    except OverflowError:
        raise _Odd from None
    if len(found) and (found.min() < 0 or found.max() >= high):
        raise _Odd
    return found


def _tables(rows: list[dict[str, Any]], keys: dict) -> tuple[Table, Table, list[dict[str, Any]]]:
    """(training points, validation points, other events); _Odd where a value is none that the fast path vouches for."""
    if keys is RUN_KEYS:
        names = _column(rows, "event")
        if set(map(type, names)) - {str}:
            raise _Odd
        sorts = {kind: list(itertools.compress(rows, map(kind.__eq__, names))) for kind in keys}
        others = [row for row, name in zip(rows, names, strict=True) if name not in keys]
        if any(not isinstance(event.get("step", 0), int) for event in others):
            raise _Odd
    else:
        sorts = {kind: [row for row in rows if keys[kind][0] in row] for kind in keys}
        others = []
        # a row may have both losses; it must have one, which a count alone does not show when some have both
        if sum(map(len, sorts.values())) != len(rows) and any(
            not any(keys[kind][0] in row for kind in keys) for row in rows
        ):
            raise _Odd
    return _table(sorts["train"], keys["train"], keys), _table(sorts["val"], keys["val"], keys), others


def _table(rows: list[dict[str, Any]], fields: tuple[str, ...], keys: dict) -> Table:
    many = len(rows)
    run = np.zeros(many, np.int64) if keys is RUN_KEYS else _wholes(rows, "run_id", 1 << 63)
    values = np.empty((many, len(FIELDS)))
    values[:, 0] = _wholes(rows, "step", MAX_STEP)
    values[:, 1] = _numbers(rows, fields[0], None, needed=True)
    for place, key in enumerate(fields[1:], 2):
        values[:, place] = _numbers(rows, key)
    return Table(run, values, np.ones(many, np.int64))


@dataclass
class Part:
    """What a block, a file or a part of a file holds."""

    train: Table
    val: Table
    events: list[dict[str, Any]]
    lines: int
    missing_losses: int
    cut_off: bool


def read_part(
    path: Path, keys: dict, width: int, cut_off_allowed: bool, start: int = 0, end: int | None = None
) -> Part:
    """The lines of `path` between two places, training points put into buckets of `width` steps."""
    trains, vals, events = [], [], []
    lines = missing = 0
    cut_off = False
    for place, data, unfinished in blocks(path, start, end):
        rows = None if unfinished else parse(data)
        try:
            if rows is None:
                raise _Odd
            train, val, others = _tables(rows, keys)
        except _Odd:
            rows, cut_off = parse_slowly(path, place, data, keys, cut_off_allowed)
            train, val, others = _tables(rows, keys)
        for event in others:
            check(event, f"{path}: event {event['event']!r}", keys)
        lines += len(rows)
        events += others
        kept = [_with_loss(one) for one in (train, val)]
        missing += len(train.run) + len(val.run) - sum(len(one.run) for one in kept)
        trains.append(bucketed([kept[0]], width))
        vals.append(kept[1])
    return Part(bucketed(trains, width), _joined(vals), events, lines, missing, cut_off)


def _with_loss(found: Table) -> Table:
    there = ~np.isnan(found.values[:, 1])
    if there.all():
        return found
    return Table(found.run[there], found.values[there], found.weight[there])


def _joined(tables: list[Table]) -> Table:
    if not tables:
        return Table(np.empty(0, np.int64), np.empty((0, len(FIELDS))), np.empty(0, np.int64))
    return Table(
        *(np.concatenate([getattr(one, name) for one in tables]) for name in ("run", "values", "weight"))
    )


def bucketed(tables: list[Table], width: int) -> Table:
    """One row for each run and bucket of `width` steps: mean loss and step time, last step, tokens and clock."""
    found = _joined(tables)
    if not len(found.run):
        return found
    step = found.values[:, 0]
    order = np.lexsort((step, found.run))
    run, step = found.run[order], step[order]
    bucket = (step // width).astype(np.int64)
    starts = np.flatnonzero(np.r_[True, (run[1:] != run[:-1]) | (bucket[1:] != bucket[:-1])])
    ends = np.r_[starts[1:], len(run)] - 1
    values, weight = found.values[order], found.weight[order]
    total = np.add.reduceat(weight, starts)
    merged = values[ends]
    for column in (1, 4):
        merged[:, column] = np.add.reduceat(values[:, column] * weight, starts) / total
    return Table(run[starts], merged, total)


def width_for(last_step: int) -> int:
    """The width of a bucket, in steps, for a run of that length."""
    return max(1, -(-last_step // BUCKETS))


def curve(found: Table, low: int, high: int) -> Curve:
    """Rows low to high of a table sorted by step, as a curve; of equal steps the last stays."""
    values = found.values[low:high]
    if len(values) > 1:
        values = values[np.r_[values[1:, 0] != values[:-1, 0], True]]
    columns = [values[:, index].astype(np.float32 if len(values) > 64 else np.float64) for index in (1, 2, 3)]
    return Curve(values[:, 0].astype(np.int32), *columns)


def by_run(part: Part) -> dict[int, Metrics]:
    """The curves of each run of an experiment's file."""
    found: dict[int, dict[str, Curve]] = {}
    for kind, rows in (("train", part.train), ("val", part.val)):
        order = np.lexsort((rows.values[:, 0], rows.run))  # stable: equal steps stay in the order of the file
        rows = Table(rows.run[order], rows.values[order], rows.weight[order])
        if not len(rows.run):
            continue
        starts = np.flatnonzero(np.r_[True, rows.run[1:] != rows.run[:-1]])
        for low, high in itertools.pairwise([*starts, len(rows.run)]):
            found.setdefault(int(rows.run[low]), {})[kind] = curve(rows, low, high)
    return {run: Metrics(kinds.get("train", EMPTY), kinds.get("val", EMPTY)) for run, kinds in found.items()}


def merged(parts: list[Part], width: int) -> Part:
    """Parts of one file, in order, as one."""
    return Part(
        bucketed([part.train for part in parts], width), _joined([part.val for part in parts]),
        [event for part in parts for event in part.events], sum(part.lines for part in parts),
        sum(part.missing_losses for part in parts), any(part.cut_off for part in parts),
    )  # fmt: skip


def read_run(path: Path, cut_off_allowed: bool = True) -> Metrics:
    """A run's metrics.jsonl. UserError names the first line that is none."""
    width = width_for(last_step(path))
    part = read_part(path, RUN_KEYS, width, cut_off_allowed)
    _fill_clock(part)
    found = by_run(part).get(0, Metrics(EMPTY, EMPTY))
    found.events, found.lines, found.cut_off = part.events, part.lines, part.cut_off
    found.missing_losses = part.missing_losses
    return found


def last_step(path: Path) -> int:
    """The step on the last line that has one; 0 when there is none. Reads the file's end only."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - 4096))
            tail = file.read().split(b"\n")
    except OSError:
        return 0
    for line in reversed(tail):
        try:
            step = strict.loads(line).get("step")
        except (strict.Fault, AttributeError, ValueError):
            continue
        if isinstance(step, int) and not isinstance(step, bool) and 0 <= step < MAX_STEP:
            return step
    return 0


def _fill_clock(part: Part) -> None:
    """Where no clock was logged: the step times, added up over the steps that each training point stands for."""
    train, val = part.train.values, part.val.values
    if not len(train) or not np.isnan(train[:, 3]).all() or np.isnan(train[:, 4]).any():
        return
    order = np.argsort(train[:, 0], kind="stable")
    steps, ms = train[order, 0], train[order, 4]
    clock = np.cumsum(ms * np.diff(steps, prepend=-1))
    train[order, 3] = clock
    val[:, 3] = np.interp(val[:, 0], np.r_[0, steps + 1], np.r_[0, clock])
