"""`engaging plot RUN...`: the loss curves of runs, as a PNG and drawn in the terminal.

    engaging plot out/quickstart
    engaging plot out/first out/second --out compare.png --x tokens

The terminal drawing is our own few lines rather than a library: it uses nothing but ASCII, so it survives a log
file, an ssh session and LANG=C, and it is one pin less.
"""

import io
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nanogpt.common.errors import UserError
from nanogpt.common.flags import nearest
from nanogpt.common.storage import atomic_write_bytes
from tools.args import Parser, whole
from tools.place import print_fetch_line
from tools.runs import Run, is_run, read_run, runs_under

PNG_NAME = "loss.png"
MOST_RUNS = 26  # the terminal marks runs with letters
WIDTH, HEIGHT = 64, 14  # of the terminal's plotting area, in characters; with the axis it fits 80 columns
# Okabe and Ito's palette, which people with any colour vision can tell apart; dashes when it is used up.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
STYLES = ("solid", "dashed", "dotted", "dashdot", (0, (5, 1, 1, 1, 1, 1)))

Point = tuple[float, float]


@dataclass(frozen=True)
class Curves:
    """One run's losses over steps or tokens."""

    name: str
    train: list[Point]
    val: list[Point]


def curves(run: Run, name: str, x: str = "step", skip: int = 0) -> Curves:
    """The points of `run` from step `skip` on. `x` is "step" or "tokens" (in millions)."""

    def place(point) -> float | None:
        return point.step if x == "step" else None if point.tokens is None else point.tokens / 1e6

    def points(rows: Sequence, value: str) -> list[Point]:
        found = ((place(row), getattr(row, value)) for row in rows if row.step >= skip)
        return [(at, loss) for at, loss in found if at is not None]

    return Curves(name, points(run.train, "loss"), points(run.val, "val_loss"))


def draw(shown: Sequence[Curves], x: str = "step", width: int = WIDTH, height: int = HEIGHT) -> list[str]:
    """The curves as lines of ASCII. One run: `.` training, `o` validation. Several: a letter each, validation only
    where it was measured."""
    series = _marked(shown)
    every = [point for _, points in series for point in points]
    if not every:
        return ["no loss has been written yet"]
    (left, right), (low, high) = (_range([point[axis] for point in every]) for axis in (0, 1))
    rows = [[" "] * width for _ in range(height)]
    for mark, points in series:
        for at, loss in points:
            column = round((at - left) / (right - left) * (width - 1))
            row = round((high - loss) / (high - low) * (height - 1))
            rows[row][column] = mark
    ticks = {row: f"{high - (high - low) * row / (height - 1):.2f}" for row in {0, height // 2, height - 1}}
    margin = max(len(text) for text in ticks.values())
    lines = [f"{ticks.get(row, ''):>{margin}} |{''.join(marks).rstrip()}" for row, marks in enumerate(rows)]
    lines.append(f"{'':>{margin}} +{'-' * width}")
    first, last = f"{left:g}", f"{right:g} {_unit(x)}"
    lines.append(f"{'':>{margin}}  {first}{last:>{width - len(first)}}")
    return [*lines, f"{'':>{margin}}  {_legend(shown)}"]


def _marked(shown: Sequence[Curves]) -> list[tuple[str, list[Point]]]:
    """(mark, points), what is to lie on top last."""
    if len(shown) == 1:
        return [(".", shown[0].train), ("o", shown[0].val)]
    return [(chr(ord("a") + number), one.val or one.train) for number, one in enumerate(shown)]


def _legend(shown: Sequence[Curves]) -> str:
    if len(shown) == 1:
        return "loss:  . training   o validation"
    names = (f"{chr(ord('a') + number)} {one.name}" for number, one in enumerate(shown))
    return ("validation" if all(one.val for one in shown) else "loss") + ":  " + "   ".join(names)


def _range(values: list[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _unit(x: str) -> str:
    return "steps" if x == "step" else "M tokens"


def png(shown: Sequence[Curves], x: str = "step") -> bytes:
    """The picture. Training is the thin line, validation the one with the points."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError(
            "matplotlib is missing here; bash setup_env.sh, then source activate_env.sh"
        ) from None
    figure = Figure(figsize=(7.2, 4.4), dpi=150, facecolor="white", layout="constrained")
    axes = figure.add_subplot(facecolor="white")
    for number, one in enumerate(shown):
        colour = COLOURS[number % len(COLOURS)]
        dashes = STYLES[number // len(COLOURS) % len(STYLES)]
        suffix = "" if len(shown) == 1 else f" {one.name}"
        if one.train:
            label = f"training{suffix}" if len(shown) == 1 or not one.val else None
            axes.plot(*zip(*one.train, strict=True), color=colour, alpha=0.35, linewidth=0.9, label=label)
        if one.val:
            last = f"{one.name}: {one.val[-1][1]:.4f}" if suffix else f"validation, last {one.val[-1][1]:.4f}"
            axes.plot(
                *zip(*one.val, strict=True), color=colour, linestyle=dashes, linewidth=1.6, marker="o",
                markersize=3.5, label=last,
            )  # fmt: skip
    axes.set_xlabel("step" if x == "step" else "tokens trained on, in millions")
    axes.set_ylabel("loss (nats a token)")
    axes.set_title(shown[0].name if len(shown) == 1 else "validation loss (thin: training)", fontsize=11)
    axes.grid(True, color="#e6e6e6", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=9)
    picture = io.BytesIO()
    FigureCanvasAgg(figure).print_png(picture)
    return picture.getvalue()


def read(path: Path) -> Run:
    """The run in `path`, which must hold at least one loss. UserError names the runs beside it."""
    if not is_run(path):
        near = [
            str(found) for found in [*runs_under(path), *runs_under(path.parent), *runs_under(Path("out"))]
        ]
        hint = nearest(str(path), near) or (f"; there is {near[0]}" if near else "")
        raise UserError(f"{path}: not the directory of a run (no metrics.jsonl there){hint}")
    run = read_run(path)
    if not run.train and not run.val:
        raise UserError(f"{path}: the run has written no loss yet; wait for its first step")
    if run.skipped_lines:
        number = run.skipped_lines
        what = "1 line cannot be read and is" if number == 1 else f"{number} lines cannot be read and are"
        print(f"note: {path / 'metrics.jsonl'}: {what} passed over", file=sys.stderr)
    return run


def write(shown: Sequence[Curves], path: Path, x: str = "step") -> None:
    """Write the picture to `path`, whole or not at all."""
    if not path.parent.is_dir():
        raise UserError(f"--out={path}: the folder {path.parent} does not exist; make it, or name another")
    atomic_write_bytes(path, png(shown, x))


def names(paths: Sequence[Path]) -> list[str]:
    """What to call the runs: the folder's name, with its parent where two are the same."""
    short = [path.absolute().name for path in paths]
    if len(set(short)) == len(short):
        return short
    return ["/".join(path.absolute().parts[-2:]) for path in paths]


def main(argv: list[str]) -> int:
    """The command."""
    parser = Parser("plot", __doc__ or "")
    parser.add_argument("run", nargs="+", type=Path, help="run directories")
    parser.add_argument("--out", type=Path, help=f"the PNG (default: {PNG_NAME}, in the run when it is one)")
    parser.add_argument("--x", choices=("step", "tokens"), default="step", help="the horizontal axis")
    parser.add_argument(
        "--skip",
        type=whole("--skip", 0, 10**9 - 1),
        default=0,
        metavar="N",
        help="leave out the steps before N",
    )
    args = parser.read(argv)
    if len(args.run) > MOST_RUNS:
        raise UserError(f"engaging plot: {len(args.run)} runs; at most {MOST_RUNS} fit into one picture")
    out = args.out or (args.run[0] / PNG_NAME if len(args.run) == 1 else Path(PNG_NAME))
    if out.suffix.lower() != ".png":
        raise UserError(f"--out={out}: the picture is a PNG; give the name the ending .png")
    found = [read(path) for path in args.run]
    shown = [curves(run, name, args.x, args.skip) for run, name in zip(found, names(args.run), strict=True)]
    if not any(one.train or one.val for one in shown):
        last = max(run.step or 0 for run in found)
        raise UserError(f"--skip={args.skip}: no loss from there on; the last step is {last}")
    write(shown, out, args.x)
    print("\n".join(draw(shown, args.x)))
    for run, one in zip(found, shown, strict=True):
        print(summary(run, one.name))
    print(f"written: {out}")
    print_fetch_line(out)
    return 0


def summary(run: Run, name: str) -> str:
    """One line: where the run is and how low it came."""
    best = run.best_val
    lowest = f", lowest validation loss {best.val_loss:.4f} at step {best.step}" if best else ""
    loss = f", training loss {run.loss:.4f}" if run.loss is not None and math.isfinite(run.loss) else ""
    return f"{name}: {run.status} at step {run.step}{loss}{lowest}"
