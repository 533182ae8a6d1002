"""The pictures: loss curves with bands over seeds, variants against the baseline, time to the target, the records.

Each function returns a matplotlib Figure, or None when there is nothing to draw. `png` and `svg` make files of it,
`inline_svg` a fragment for a page whose colours follow the reader's light or dark theme.
"""

import hashlib
import io
import math
import re
import warnings
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib import dates
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

from tools.analysis.bands import Band, Record, shortest
from tools.analysis.findings import Comparison, GroupFinding

# Okabe and Ito's palette, which people with any colour vision can tell apart; the baseline is grey.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#b8699a", "#c98a00", "#3a9bd1")
STYLES = ("solid", (0, (5, 1.5)), (0, (1.5, 1.2)))
BASELINE, INK, GRID = "#6b7280", "#24292f", "#e3e6ea"
MOST_BANDS = 4  # more of them on top of each other show nothing
SHORT_NAME = 22  # characters of a name that fits twice into a line
MOST = 12  # lines in one picture
WIDTH = 4.6  # inches: two pictures side by side on a screen, one on a phone, and words large enough on both
SETTINGS = {
    "font.family": "DejaVu Sans", "font.size": 9.5, "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": INK,
    "xtick.color": INK, "ytick.color": INK, "axes.linewidth": 0.7, "axes.grid": True, "grid.color": GRID,
    "grid.linewidth": 0.7, "axes.axisbelow": True, "axes.spines.top": False, "axes.spines.right": False,
    "svg.fonttype": "path", "text.parse_math": False, "axes.unicode_minus": False,
}  # fmt: skip
BEGINNING = 0.2  # of a run: losses fall so far there that the rest would be a flat line
AXES = {"step": "step", "tokens": "tokens trained on, in millions", "seconds": "training time, s"}


def _figure(height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(WIDTH, height), facecolor="none", layout="constrained")
    figure.get_layout_engine().set(w_pad=0.08, h_pad=0.06)
    return figure, figure.add_subplot(facecolor="none")


def _safe(text: str) -> str:
    """Text as matplotlib shows it: printable, and no leading underscore, which would hide it from the legend."""
    shown = "".join(char if char.isprintable() else " " for char in text)
    return f" {shown}" if shown.startswith("_") else shown


def looks(names: Sequence[str], baselines: Sequence[str]) -> dict[str, tuple[str, Any]]:
    """(colour, line style) by name, the same in every picture of a page."""
    found, number = {}, 0
    for name in dict.fromkeys(names):
        if name in baselines:
            found[name] = (BASELINE, STYLES[len([n for n in found if n in baselines]) % len(STYLES)])
        else:
            found[name] = (COLOURS[number % len(COLOURS)], STYLES[number // len(COLOURS) % len(STYLES)])
            number += 1
    return found


def losses(
    bands: Sequence[Band], x: str, style: dict[str, tuple[str, Any]], target: float | None
) -> Figure | None:
    """Mean validation loss over `x` with bands; the steep beginning lies above the frame."""
    bands = list(bands)[:MOST]
    if not bands:
        return None
    with matplotlib.rc_context(SETTINGS):
        names = shortest([band.name for band in bands])
        labels = [_safe(f"{name} ({band.runs})") for name, band in zip(names, bands, strict=True)]
        figure, axes = _figure(_height(labels))
        for band, label in zip(bands, labels, strict=True):
            colour, line = style[band.name]
            axes.plot(band.x, band.mean, color=colour, linestyle=line, linewidth=1.5, label=label)
            if band.runs > 1:
                axes.fill_between(band.x, band.low, band.high, color=colour, alpha=0.18, linewidth=0)
        low, high = _frame(bands)
        if target is not None and low - 0.5 * (high - low) < target < high:
            axes.axhline(target, color=INK, linewidth=0.9, linestyle=(0, (4, 3)))
            axes.annotate(f"{target:g}", (1, target), xycoords=("axes fraction", "data"), xytext=(3, 0),
                          textcoords="offset points", va="center", fontsize=8.5)  # fmt: skip
            low = min(low, target - 0.04 * (high - low))
        axes.set_ylim(low, high)
        axes.set_xlabel(AXES[x])
        axes.set_ylabel("validation loss, nats a token")
        axes.xaxis.set_major_locator(MaxNLocator(6))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))
        _legend(figure, labels)
    return figure


def _columns(labels: Sequence[str]) -> int:
    """Columns of the legend: two where the names are short enough."""
    return 2 if max(map(len, labels)) <= SHORT_NAME else 1


def _height(labels: Sequence[str]) -> float:
    """Inches of a picture with these names below it."""
    return 3.1 + 0.2 * -(-len(labels) // _columns(labels))


def _legend(figure: Figure, labels: Sequence[str]) -> None:
    figure.legend(
        loc="outside lower left", ncols=_columns(labels), frameon=False, fontsize=8.5, handlelength=2.2
    )


def _frame(bands: Sequence[Band]) -> tuple[float, float]:
    """The range of losses to show: from the lowest to what the curves have fallen to after the beginning."""
    low = min(float(band.low.min()) for band in bands)
    fallen = []
    for band in bands:
        at = band.x >= band.x[0] + BEGINNING * (band.x[-1] - band.x[0])
        fallen.append(float(band.high[at].max()) if at.any() else float(band.high.max()))
    high = max(fallen)
    room = 0.05 * (high - low) or 0.05
    return low - room, high + room


def differences(
    bands: Sequence[Band], baselines: dict[str, Band], style: dict[str, tuple[str, Any]]
) -> Figure | None:
    """How far each variant's loss lies below its baseline's mean at the same step; `baselines`: by variant's name."""
    lines = []
    for band in bands:
        base = baselines.get(band.name)
        if base is None:
            continue
        start, end = max(band.x[0], base.x[0]), min(band.x[-1], base.x[-1])
        at = (band.x >= start + BEGINNING * (end - start)) & (band.x <= end)
        if at.sum() > 1:
            mean = np.interp(band.x[at], base.x, base.mean)
            lines.append((band, band.x[at], *(mean - side[at] for side in (band.mean, band.high, band.low))))
    lines = lines[:MOST]
    if not lines:
        return None
    with matplotlib.rc_context(SETTINGS):
        beside = [base.name for base in baselines.values()]
        names = shortest([*(row[0].name for row in lines), *beside])[: len(lines)]
        labels = [_safe(name) for name in names]
        figure, axes = _figure(_height(labels))
        axes.axhline(0, color=BASELINE, linewidth=1.2)
        for (band, x, gain, low, high), label in zip(lines, labels, strict=True):
            colour, line = style[band.name]
            axes.plot(x, gain, color=colour, linestyle=line, linewidth=1.5, label=label)
            if band.runs > 1 and len(lines) <= MOST_BANDS:
                axes.fill_between(x, low, high, color=colour, alpha=0.18, linewidth=0)
        axes.set_xlabel("step")
        axes.set_ylabel("loss below the baseline's")
        axes.xaxis.set_major_locator(MaxNLocator(6))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))
        _legend(figure, labels)
    return figure


def gains(found: Sequence[Comparison]) -> Figure | None:
    """Each variant's gain in loss over its baseline, with 95% intervals."""
    rows = [one for one in found if one.loss][:MOST]
    if not rows:
        return None
    words = {"helped": COLOURS[2], "hurt": COLOURS[1]}
    with matplotlib.rc_context(SETTINGS):
        figure, axes = _figure(1.3 + 0.42 * len(rows))
        axes.axvline(0, color=INK, linewidth=0.9)
        for place, one in enumerate(rows):
            colour = words.get(one.verdict, BASELINE)
            if one.loss.interval:
                axes.plot(
                    one.loss.interval, (place, place), color=colour, linewidth=2.2, solid_capstyle="butt"
                )
            hollow = {} if one.loss.interval else {"markerfacecolor": "none"}
            axes.plot([one.loss.difference], [place], "o", color=colour, markersize=6, **hollow)
        axes.margins(x=0.1)
        beside = [one.baseline.name for one in rows]
        names = shortest([*(one.variant.name for one in rows), *beside], 26)[: len(rows)]
        labels = [f"{name}\n{one.verdict}" for name, one in zip(names, rows, strict=True)]
        _named_rows(axes, labels)
        axes.set_xlabel("loss saved (right: better)")
        axes.xaxis.set_major_locator(MaxNLocator(5))
    return figure


def times(found: Sequence[GroupFinding], style: dict[str, tuple[str, Any]], by: str) -> Figure | None:
    """When each seed first validated at or below the target; `by` is "seconds", "step" or "tokens" (millions)."""
    rows = []
    for one in found:
        scale = 1e6 if by == "tokens" else 1
        places = [value / scale for hit in one.reached if (value := getattr(hit, by)) is not None]
        if len(places) == len(one.reached):
            rows.append((one, places))
    rows = rows[:MOST]
    if not any(places for _, places in rows):
        return None
    with matplotlib.rc_context(SETTINGS):
        figure, axes = _figure(1.3 + 0.42 * len(rows))
        for place, (one, places) in enumerate(rows):
            colour = style[one.group.name][0]
            axes.plot(
                places, [place] * len(places), "o", color=colour, alpha=0.55, markersize=5, markeredgewidth=0
            )
            middle = sum(places) / len(places) if places else math.nan
            axes.plot([middle] * 2, [place - 0.28, place + 0.28], color=colour, linewidth=2.2)
        labels = shortest([one.group.name for one, _ in rows], 26)
        counts = [f"{len(places)} of {len(one.group.counted)}" for one, places in rows]
        _named_rows(axes, [f"{label}\n{count} runs" for label, count in zip(labels, counts, strict=True)])
        axes.set_xlabel(
            {"seconds": "seconds", "step": "steps", "tokens": "millions of tokens"}[by] + " to the target"
        )
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))
    return figure


def _named_rows(axes: Axes, names: Sequence[str]) -> None:
    """Name the rows of a picture; a name may have two lines."""
    lines = ["\n".join(_safe(part) for part in name.split("\n")) for name in names]
    axes.set_yticks(range(len(names)), lines, fontsize=9)
    axes.set_ylim(len(names) - 0.4, -0.65)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.grid(False, axis="y")


def records(rows: Sequence[Record], ours: Sequence[tuple[str, float]] = ()) -> Figure:
    """The record history in minutes over the date; `ours`: (name, minutes) as lines across."""
    with matplotlib.rc_context(SETTINGS):
        figure, axes = _figure(3.1)
        days = [dates.date2num(row.day) for row in rows]
        minutes = [row.minutes for row in rows]
        axes.step(days, minutes, where="post", color=COLOURS[0], linewidth=1.3)
        axes.plot(days, minutes, "o", color=COLOURS[0], markersize=2.6)
        shown = {
            3: ("Muon", 6, 0),
            12: ("FlexAttention", 7, 3),
            20: ("under 3 minutes", 5, 6),
            62: ("bigram hash", -2, 10),
        }
        for row, day in zip(rows, days, strict=True):
            if row.number in shown:
                text, right, up = shown[row.number]
                axes.annotate(
                    text, (day, row.minutes), xytext=(right, up), textcoords="offset points", fontsize=8.5
                )
        first, last = rows[0], rows[-1]
        axes.annotate(f"{first.minutes:g} min", (days[0], first.minutes), xytext=(6, -3), textcoords="offset points",
                      fontsize=8.5)  # fmt: skip
        said = f"{last.minutes:g} min" if last.minutes >= 1 else f"{last.minutes * 60:.0f} s"
        axes.annotate(said, (days[-1], last.minutes), xytext=(4, -11), textcoords="offset points",
                      fontsize=8.5, ha="right")  # fmt: skip
        for index, (name, value) in enumerate(ours):
            colour = COLOURS[(index + 1) % len(COLOURS)]
            axes.axhline(value, color=colour, linewidth=1.1, linestyle=STYLES[1])
            axes.annotate(_safe(f"{name}: {value:.3g} min"), (1, value), xycoords=("axes fraction", "data"),
                          xytext=(-2, 3), textcoords="offset points", ha="right", fontsize=8.5)  # fmt: skip
        axes.set_yscale("log")
        axes.set_ylim(
            min([last.minutes * 0.65, *(value * 0.8 for _, value in ours)]),
            max([60, *(v * 1.3 for _, v in ours)]),
        )
        axes.set_yticks([0.5, 1, 2, 5, 10, 20, 50], ["0.5", "1", "2", "5", "10", "20", "50"])
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_ylabel("minutes to 3.28 on 8 x H100")
        axes.xaxis.set_major_locator(dates.MonthLocator(bymonth=(1, 7)))
        axes.xaxis.set_major_formatter(dates.DateFormatter("%b %Y"))
    return figure


def png(figure: Figure) -> bytes:
    """The picture on white, about 1,000 pixels wide."""
    out = io.BytesIO()
    with matplotlib.rc_context(SETTINGS), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # about characters that the font lacks
        FigureCanvasAgg(figure).print_figure(out, format="png", dpi=220, facecolor="white")
    return out.getvalue()


def svg(figure: Figure, name: str = "", background: str = "white") -> str:
    """The picture as SVG text, the same every time; `name` keeps the ids of two pictures on one page apart."""
    out = io.StringIO()
    salt = {"svg.hashsalt": f"engaging {name}"}
    with matplotlib.rc_context({**SETTINGS, **salt}), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        metadata = {"Date": None, "Creator": None, "Format": None, "Type": None}
        figure.savefig(out, format="svg", facecolor=background, metadata=metadata)
    return out.getvalue()


def pdf(figure: Figure) -> bytes:
    """The picture as PDF for a paper, the same every time."""
    out = io.BytesIO()
    with matplotlib.rc_context({**SETTINGS, "pdf.fonttype": 42}), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        figure.savefig(out, format="pdf", facecolor="white", metadata={"CreationDate": None, "Creator": None})
    return out.getvalue()


def inline_svg(figure: Figure, name: str, label: str) -> str:
    """The picture as an `<svg>` element for a page: no size of its own, colours from the page's theme.

    The page defines the variables --grid, --base and --c0 ... ; everything else takes the text's colour. `label` is
    what a screen reader says: text that is escaped here.
    """
    text = svg(figure, name, "none")
    text = text[text.index("<svg") :]
    text = re.sub(r"\s*<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    head, rest = text.split(">", 1)
    box = re.search(r'viewBox="[^"]*"', head)
    # the ids of glyphs repeat from picture to picture; prefixed, each picture finds its own
    mark = "s" + hashlib.sha256(name.encode()).hexdigest()[:6]
    rest = re.sub(r'\bid="', f'id="{mark}-', rest)
    rest = re.sub(r"(href=\"|url\()#", rf"\1#{mark}-", rest)
    rest = rest.replace(INK, "currentColor").replace(GRID, "var(--grid)").replace(BASELINE, "var(--base)")
    for index, colour in enumerate(COLOURS):
        rest = rest.replace(colour, f"var(--c{index})")
    quoted = label.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace('"', "&quot;")
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" {box.group(0)} '
        f'role="img" aria-label="{quoted}">{rest}'
    )
