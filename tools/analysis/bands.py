"""The numbers behind the pictures: a group's curves as one mean with a band, the record history."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path

import numpy as np

from tools.analysis.curves import Curve
from tools.analysis.records import Group
from tools.runs import is_int, metrics

POINTS = 240  # of a band: more than a picture shows
FEW = 10  # up to so many runs the band goes from the lowest to the highest, beyond from 10% to 90% of them
HISTORY = Path(__file__).with_name("record_history.json")


@dataclass(frozen=True)
class Band:
    """Mean loss over a group's runs at each place of `x` (steps, millions of tokens, or seconds)."""

    name: str
    runs: int
    x: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray


@dataclass(frozen=True)
class Record:
    """One record of the speedrun's main track."""

    number: int
    day: date
    minutes: float
    what: str


def band(group: Group, x: str = "step") -> Band | None:
    """The group's validation losses (training losses where a run has fewer than two validations) over `x`.

    `x` is "step", "tokens" (in millions) or "seconds". Runs that logged other steps are interpolated onto common
    places, within the range that all of them cover. None when a run lacks `x`, or nothing was logged.
    """
    curves = [run.metrics.val if len(run.metrics.val) > 1 else run.metrics.train
              for run in group.counted if run.metrics]  # fmt: skip
    if x == "tokens" and curves and np.isnan(curves[0].tokens).all():
        curves = _with_tokens(curves, group.counted[0].path / "metrics.jsonl")
    lines = [_line(curve, x) for curve in curves]
    lines = [line for line in lines if line is not None]
    if not lines or len(lines) < len(group.counted):
        return None
    first = lines[0][0]
    if all(len(at) == len(first) and np.array_equal(at, first) for at, _ in lines):
        losses = np.stack([loss for _, loss in lines])
    else:
        start, end = max(at[0] for at, _ in lines), min(at[-1] for at, _ in lines)
        if end <= start:
            return None
        first = np.linspace(start, end, POINTS)
        losses = np.stack([np.interp(first, at, loss) for at, loss in lines])
    if len(first) > 2 * POINTS:
        chosen = np.unique(np.linspace(0, len(first) - 1, POINTS).round().astype(int))
        first, losses = first[chosen], losses[:, chosen]
    ends = (0, 100) if len(lines) <= FEW else (10, 90)
    low, high = np.percentile(losses, ends, axis=0)
    return Band(group.name, len(lines), first, losses.mean(axis=0), low, high)


def _with_tokens(curves: list[Curve], path: Path) -> list[Curve]:
    """The curves with the tokens that a run's own metrics (`path`) count at each step.

    An experiment's metrics.jsonl has none; its runs differ in nothing but the seed, so that one of them tells.
    """
    known = {
        record["step"] + (record["event"] == "train"): record["tokens"]
        for record in (metrics(path) if path.is_file() else ())
        if record.get("event") in ("train", "val")
        and is_int(record.get("step"))
        and is_int(record.get("tokens"))
    }
    if not known:
        return curves
    steps = sorted(known)
    tokens = [known[step] for step in steps]
    return [
        replace(curve, tokens=np.interp(curve.step, steps, tokens, left=np.nan, right=np.nan))
        for curve in curves
    ]


def _line(curve: Curve, x: str) -> tuple[np.ndarray, np.ndarray] | None:
    """(places, losses), ascending; None when the curve lacks `x`."""
    at = {"step": curve.step, "tokens": curve.tokens / 1e6, "seconds": curve.clock / 1e3}[x].astype(
        np.float64
    )
    if len(at) < 2 or np.isnan(at).any():
        return None
    if not (np.diff(at) > 0).all():
        at, places = np.unique(at, return_index=True)
        return (at, curve.loss[places].astype(np.float64)) if len(at) > 1 else None
    return at, curve.loss.astype(np.float64)


def history() -> tuple[list[Record], dict[str, str]]:
    """(the records, {"what", "hardware", "source", "note"})."""
    said = json.loads(HISTORY.read_text(encoding="utf-8"))
    rows = said.pop("records")
    return [Record(r["record"], date.fromisoformat(r["date"]), r["minutes"], r["what"]) for r in rows], said


def shortest(names: Sequence[str], most: int = 30) -> list[str]:
    """Names that fit into a picture: without what all have in common at the front, cut in the middle."""
    same = 0
    if len(names) > 1:
        first, last = min(names), max(names)
        same = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), 0)
        while same and first[same - 1] not in "_-. /":
            same -= 1
    found = [name[same:] for name in names]
    if not all(any(char.isalpha() for char in name) for name in found):  # numbers alone say too little
        found = list(names)
    half = most // 2 - 1
    return [name if len(name) <= most else f"{name[:half]}..{name[-half:]}" for name in found]
