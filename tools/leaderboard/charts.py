"""Plots as SVG inside the page: they follow the page's light and dark colours, scale to a phone, and print.

Every number comes from verified evidence; every text goes through `escape`.
"""

import datetime
import itertools
import math
from collections.abc import Sequence

from markupsafe import Markup, escape

Point = tuple[float, float]
WIDTH, HEIGHT = 720, 300
LEFT, RIGHT, TOP, BOTTOM = 62, 16, 16, 46
MOST_CURVES = 24
WIDE = 3.0


def record_curve(points: Sequence[tuple[datetime.datetime, float, str, bool]], unit: str) -> Markup:
    """Results over time as dots, the best so far as a stair. `points`: (date, value, name, is a record).

    Values that span more than a factor of WIDE stand on a logarithmic scale.
    """
    if len(points) < 2:
        return Markup("")
    points = sorted(points)
    days = [when.timestamp() / 86400 for when, *_ in points]
    left, right = _roomy(*_widen(min(days), max(days), 0.5), 0.02)
    least, most = min(value for _, value, *_ in points), max(value for _, value, *_ in points)
    log = least > 0 and most > WIDE * least
    low, high = (
        (least / 1.15, most * 1.15) if log else _roomy(*_widen(least, most, 0.02 * least or 1.0), 0.08)
    )
    frame = _Frame((left, right), (low, high), log)
    parts = frame.axes(_dates(left, right), _round_log(low, high) if log else _ticks(low, high), unit)
    stairs: list[Point] = []
    for day, (_, value, _, best) in zip(days, points, strict=True):
        if best:
            stairs += [(day, stairs[-1][1])] if stairs else []
            stairs.append((day, value))
    if stairs:
        stairs.append((right, stairs[-1][1]))
        parts.append(frame.line(stairs, "best"))
    for day, (_, value, name, best) in zip(days, points, strict=True):
        x, y = frame.place(day, value)
        text = escape(f"{name}: {value:.4g} {unit}")
        parts.append(
            Markup('<circle class="{}" cx="{:.1f}" cy="{:.1f}" r="{}"><title>{}</title></circle>').format(
                "dot best" if best else "dot", x, y, 5 if best else 4, text
            )
        )
    return _svg(parts, f"Results over time, {unit}")


def loss_curves(vals: Sequence[Sequence[Point]], train: Sequence[Point], target: float) -> Markup:
    """Validation losses of every run over steps, the mean training loss behind them, the target as a line.

    The first steps fall from ln(vocabulary): what is above the losses at a tenth of the run is cut off.
    """
    vals = [list(curve) for curve in vals[:MOST_CURVES] if curve]
    if not vals:
        return Markup("")
    last = max(step for curve in vals for step, _ in curve)
    late = [loss for curve in vals for step, loss in curve if step >= last / 10] or [target]
    low, high = min([*late, target]), max([*late, target])
    low, high = low - 0.06 * (high - low or 1.0), high + 0.04 * (high - low or 1.0)
    frame = _Frame((0, last), (low, high))
    parts = frame.axes([(tick, f"{tick:,.0f}") for tick in _ticks(0, last)], _ticks(low, high), "steps")
    if len(train) > 1:
        parts.append(frame.inside(frame.line(train, "train")))
    for curve in vals:
        inside = [(step, loss) for step, loss in curve if loss <= high]
        parts.append(frame.line(inside, "val"))
        for step, loss in inside:
            x, y = frame.place(step, loss)
            parts.append(Markup('<circle class="dot" cx="{:.1f}" cy="{:.1f}" r="2.4"/>').format(x, y))
    parts.append(frame.line([(0, target), (last, target)], "target"))
    _, y = frame.place(0, target)
    parts.append(
        Markup('<text class="note" x="{}" y="{:.1f}">target {:g}</text>').format(LEFT + 6, y - 5, target)
    )
    return _svg(parts, "Loss by step: validation of each run, and the training loss behind it")


def spread(losses: Sequence[float], target: float) -> Markup:
    """The final losses as dots on a line, their mean, and the target: whether one lucky seed carries the claim."""
    height, middle = 108, 42
    low, high = _widen(min([*losses, target]), max([*losses, target]), 0.0005)
    low, high = low - 0.1 * (high - low), high + 0.1 * (high - low)

    def at(loss: float) -> float:
        return LEFT + (loss - low) / (high - low) * (WIDTH - LEFT - RIGHT)

    mean = sum(losses) / len(losses)
    parts = [
        Markup('<line class="axis" x1="{}" y1="{}" x2="{}" y2="{}"/>').format(
            LEFT, middle, WIDTH - RIGHT, middle
        )
    ]
    ticks = _ticks(low, high)
    for tick, label in zip(ticks, _labels(ticks), strict=True):
        parts.append(
            Markup('<line class="axis" x1="{0:.1f}" y1="39" x2="{0:.1f}" y2="45"/>').format(at(tick))
        )
        parts.append(Markup('<text x="{:.1f}" y="64" text-anchor="middle">{}</text>').format(at(tick), label))
    for name, value, kind in (("target", target, "target"), ("mean", mean, "best")):
        parts.append(
            Markup('<line class="{1}" x1="{0:.1f}" y1="22" x2="{0:.1f}" y2="46"/>').format(at(value), kind)
        )
        up = 16 if name == "target" else 92
        parts.append(
            Markup('<text class="note" x="{:.1f}" y="{}" text-anchor="middle">{} {:.5g}</text>').format(
                min(max(at(value), LEFT + 36), WIDTH - 50), up, name, value
            )
        )
    for loss in losses:
        parts.append(
            Markup('<circle class="dot" cx="{:.1f}" cy="{}" r="4.5"><title>{:.5f}</title></circle>').format(
                at(loss), middle, loss
            )
        )
    return _svg(parts, "Final validation loss of each run, their mean, and the target", height)


class _Frame:
    """Where data points stand in the picture."""

    def __init__(self, x: Point, y: Point, log: bool = False) -> None:
        self.x, self.y, self.log = _widen(*x, 0.5), _widen(*y, 1e-6), log

    def place(self, x: float, y: float) -> Point:
        """Data to picture."""
        across = (x - self.x[0]) / (self.x[1] - self.x[0])
        low, high, y = (math.log(value) if self.log else value for value in (*self.y, y))
        up = (y - low) / (high - low)
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)

    def line(self, points: Sequence[Point], kind: str) -> Markup:
        """A polyline of data points."""
        text = " ".join(f"{x:.1f},{y:.1f}" for x, y in (self.place(*point) for point in points))
        return Markup('<polyline class="{}" points="{}"/>').format(kind, text)

    def inside(self, drawing: Markup) -> Markup:
        """The part of a drawing that lies between the axes: what leaves the frame is cut off, not bridged."""
        width, height = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM
        box = Markup('<svg x="{0}" y="{1}" width="{2}" height="{3}" viewBox="{0} {1} {2} {3}">')
        return box.format(LEFT, TOP, width, height) + drawing + Markup("</svg>")

    def axes(self, across: Sequence[tuple[float, str]], up: Sequence[float], unit: str) -> list[Markup]:
        """Grid lines with their labels."""
        parts = []
        for value, label in zip(up, _labels(up), strict=True):
            y = self.place(self.x[0], value)[1]
            parts.append(
                Markup('<line class="grid" x1="{0}" y1="{2:.1f}" x2="{1}" y2="{2:.1f}"/>').format(
                    LEFT, WIDTH - RIGHT, y
                )
            )
            parts.append(
                Markup('<text x="{}" y="{:.1f}" text-anchor="end">{}</text>').format(LEFT - 8, y + 4, label)
            )
        for value, label in across:
            x = self.place(value, self.y[0])[0]
            parts.append(
                Markup('<text x="{:.1f}" y="{}" text-anchor="middle">{}</text>').format(
                    x, HEIGHT - BOTTOM + 20, label
                )
            )
        parts.append(
            Markup('<text class="unit" x="{}" y="{}" text-anchor="end">{}</text>').format(
                WIDTH - RIGHT, HEIGHT - 4, unit
            )
        )
        return parts


def _svg(parts: Sequence[Markup], said: str, height: int = HEIGHT) -> Markup:
    head = Markup('<svg class="chart" viewBox="0 0 {} {}" role="img" aria-label="{}">').format(
        WIDTH, height, said
    )
    return head + Markup("").join(parts) + Markup("</svg>")


def _widen(low: float, high: float, least: float) -> Point:
    return (low - least, high + least) if high - low < least else (low, high)


def _roomy(low: float, high: float, share: float) -> Point:
    """With room on both sides, so that no dot stands on the frame."""
    return low - share * (high - low), high + share * (high - low)


def _ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers between `low` and `high`, about `count` of them."""
    if not high > low:
        return [low]
    rough = (high - low) / count
    size = 10.0 ** math.floor(math.log10(rough))
    step = min((size * factor for factor in (1, 2, 2.5, 5, 10)), key=lambda one: abs(one - rough))
    first = math.ceil(low / step - 1e-9)
    return [number * step for number in range(first, math.floor(high / step + 1e-9) + 1)]


def _labels(ticks: Sequence[float]) -> list[str]:
    """The ticks as text, all with the decimals that they need; powers of ten and their like as they are."""
    found = [f"{round(tick, 6):g}" for tick in ticks]
    steps = [b - a for a, b in itertools.pairwise(ticks)]
    if not steps or max(steps) > 1.001 * min(steps) or any("e" in text for text in found):
        return found
    digits = max(len(text.partition(".")[2]) for text in found)
    return [f"{round(tick, 6):.{digits}f}" for tick in ticks]


def _round_log(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten between `low` and `high`."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    return [
        digit * 10.0**power for power in powers for digit in (1, 2, 5) if low <= digit * 10.0**power <= high
    ]


def _dates(left: float, right: float) -> list[tuple[float, str]]:
    """About five dates between two days (days since 1970)."""
    step = max(1, math.ceil((right - left) / 5))
    days = range(math.ceil(left), math.floor(right) + 1, step)
    shown = [(day, datetime.datetime.fromtimestamp(day * 86400, datetime.timezone.utc)) for day in days]
    return [
        (float(day), f"{when.day} {when:%b %Y}" if right - left < 400 else f"{when:%b %Y}")
        for day, when in shown
    ]
