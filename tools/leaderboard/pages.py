"""The static page: one index, one page a record, one table for spreadsheets. No script, no network.

Only accepted records are shown. Every text of a submitter passes through the templates, which escape all of it; a
content policy in the page forbids scripts besides.
"""

import bisect
import datetime
import json
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from nanogpt.common.errors import CommandError, UserError
from nanogpt.common.progress import Progress
from nanogpt.common.storage import atomic_write_text, make_folder, storage_errors
from tools.analysis import statistics
from tools.leaderboard import charts, corrections, text
from tools.leaderboard.board import Board
from tools.leaderboard.evidence import Run
from tools.leaderboard.submission import Record, changed_since
from tools.leaderboard.tracks import Track
from tools.leaderboard.verify import Verdict

MARK = ".engaging-board-site"  # in a folder that `build` has made, and may write to again
HISTORY = Path(__file__).parents[1] / "analysis" / "record_history.json"
MOST_POINTS = 400
LIMITS = (
    "Whether the runs shown are all that were made. Somebody who trains forty seeds and hands in the best ten passes "
    "every test here. State the seeds before you train; a gap between them is noted.",
    "Whether the clock was honest. Times come from the submitter's machine. They are checked against each other, the "
    "calendar and the hardware's peak, which catches carelessness and greed, not care.",
    "Whether losses were computed on the tokens that the log names. Who controls the machine can write any number; "
    "only a second party's re-run settles it. Records that have one say so.",
    "Whether two machines of one name are equally fast. Differences below a few percent between runs on different "
    "nodes mean nothing: interleave the baseline and the candidate on one node.",
    "What a log of modded-nanogpt was trained on: that format does not carry the data's digest.",
)


@dataclass
class Row:
    """An accepted record as the pages show it: figures as text, texts not yet escaped."""

    record: Record
    track: Track
    value: str
    loss: str
    p: str
    foreign: bool
    met: bool  # the track's test
    best: bool = False
    confirmed: int = 0  # re-runs of others that met the target
    doubted: int = 0  # and that did not
    more: dict[str, Any] = field(default_factory=dict)

    id = property(lambda self: self.record.id)
    kind = property(lambda self: self.record.kind)
    runs = property(lambda self: len(self.record.runs))
    description = property(lambda self: self.record.description)
    contributors = property(lambda self: ", ".join(self.record.contributors))
    hardware = property(lambda self: self.record.hardware)
    log_url = property(lambda self: self.record.log_url)
    date = property(lambda self: f"{self.record.submitted:%Y-%m-%d}")
    figure = property(lambda self: self.record.steps if self.track.metric == "steps" else self.record.seconds)


@dataclass
class Withdrawn:
    """A record that was withdrawn, as the index lists it."""

    description: str
    contributors: str
    reason: str
    by: str
    date: str


def build_site(board: Board, out: Path, layout: str = "") -> tuple[int, list[tuple[str, str]]]:
    """Verify the board and write its pages to `out`: (records shown, (file, reason) of those left out).

    `layout`: for a Jekyll site, in its layout of that name; nothing that a submitter wrote is Liquid there.
    """
    _refuse_foreign(out)
    rows, left_out, withdrawn = _rows(board)
    _rank(rows)
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    now = datetime.datetime.now(datetime.timezone.utc)
    common = {
        "limits": LIMITS, "built": f"{now:%Y-%m-%d %H:%M} UTC", "board": board.title,
        "layout": layout, "heading": board.title,
    }  # fmt: skip
    make_folder(out / "records")
    atomic_write_text(
        out / MARK, "written by engaging leaderboard build; it replaces and deletes pages here\n"
    )
    page = environment.get_template("record.html.j2")
    for row in rows:
        details = {
            **common,
            "heading": f"{board.title}: {row.id}",
            "title": f"{row.description} - {board.title}",
            "row": row,
            "track": row.track,
            **row.more,
        }
        atomic_write_text(out / "records" / f"{row.id}.html", _dull(page.render(details), layout))
    shown = [row for row in rows if row.kind != "rerun"]
    index = environment.get_template("index.html.j2")
    listed = {
        "title": board.title,
        "count": len(shown),
        "tracks": list(_tracks(shown, 0)),
        "terms": list(_terms(shown, board)),
        "withdrawn": withdrawn,
        "history": _history(),
    }
    atomic_write_text(out / "index.html", _dull(index.render({**common, **listed}), layout))
    atomic_write_text(out / "records.csv", _csv(rows))
    known = {f"{row.id}.html" for row in rows}
    for path in (out / "records").glob("*.html"):
        if path.name not in known:
            with storage_errors(path):
                path.unlink()
    return len(rows), left_out


def _dull(page: str, layout: str) -> str:
    """The page, where Jekyll will read it with braces that Liquid does not take for its own."""
    return re.sub(r"\{(?=[{%])", "&#123;", page) if layout else page


def _terms(rows: Sequence[Row], board: Board) -> Iterator[dict[str, Any]]:
    """A tab for each term, the newest first, and one for all of it; just that one on a board without terms."""
    days = [term.first for term in board.terms]
    by_term: dict[int, list[Row]] = defaultdict(list)
    for row in rows:
        by_term[
            bisect.bisect_right(days, row.record.submitted.astimezone(datetime.timezone.utc).date())
        ].append(row)
    number = 1000
    for place in range(len(days), 0 if 0 not in by_term else -1, -1) if days else ():
        name = board.terms[place - 1].name if place else f"Before {board.terms[0].name}"
        found = list(_tracks(by_term[place], number))
        yield {"name": name, "count": len(by_term[place]), "tracks": found}
        number += 1000
    yield {"name": "All terms", "count": len(rows), "tracks": list(_tracks(rows, number))}


def _refuse_foreign(out: Path) -> None:
    """UserError unless `out` is new, empty, or a site that `build` made: nothing of anybody's is written over."""
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise UserError(f"--out={out}: is no folder; name a new one")
    if out.is_dir() and not (out / MARK).exists() and any(os.scandir(out)):
        raise UserError(f"--out={out}: holds files that are not a board's page; name a new folder")


def _rows(board: Board) -> tuple[list[Row], list[tuple[str, str]], list[Withdrawn]]:
    """The accepted records by date, what was left out and why, and what was withdrawn."""
    rows, left_out, withdrawn, said = [], [], [], corrections.read(board)
    best: dict[tuple[str, str], tuple[Row, Run]] = {}  # the record that each new one builds on
    total = len(list(board.records.glob("*.json"))) if board.records.is_dir() else 0
    with Progress("checking records") as bar:
        for number, (path, verdict) in enumerate(board.verdicts(), 1):
            if isinstance(verdict, CommandError):
                left_out.append((path.name, f"malformed: {str(verdict).partition(': ')[2]}"))
            elif not verdict.accepted:
                left_out.append((path.name, f"refused: {verdict.problems[0][1]}"))
            elif (mended := said.get(verdict.record.id)) and mended.withdraws:
                who = ", ".join(verdict.record.contributors)
                withdrawn.append(
                    Withdrawn(
                        verdict.record.description, who, mended.reason, mended.by, f"{mended.at:%Y-%m-%d}"
                    )
                )
            else:
                if mended:
                    verdict.record = verdict.record.model_copy(update={"description": mended.description})
                row = _row(verdict)
                key = (row.track.name, row.hardware)
                before = best.get(key)
                row.more |= _details(verdict, row, before)
                if row.kind == "record" and (before is None or row.figure < before[0].figure):
                    row.best = True
                    best[key] = (row, verdict.runs[0])
                rows.append(row)
            bar.update(number, total, f"{number} of {total}")
    return rows, left_out, withdrawn


def _row(verdict: Verdict) -> Row:
    record, track, result = verdict.record, verdict.track, verdict.result
    value = f"{result.steps:,}" if track.metric == "steps" else _time(result.mean_seconds)
    spread = f" \u00b1 {result.sd_loss:.4f}" if result.sd_loss is not None else ""
    p = "" if result.p_value is None else f"{result.p_value:.2g}" if result.p_value >= 1e-12 else "<1e-12"
    return Row(
        record,
        track,
        value,
        f"{result.mean_loss:.4f}{spread}",
        p,
        verdict.runs[0].kind == "modded",
        result.met,
    )


def _time(seconds: float) -> str:
    if seconds < 600:
        return f"{seconds:.2f} s"
    return f"{seconds / 60:.2f} min" if seconds < 7200 else f"{seconds / 3600:.2f} h"


def _details(verdict: Verdict, row: Row, before: tuple[Row, Run] | None) -> dict[str, Any]:
    """What the record's own page needs besides its row."""
    result, runs, record = verdict.result, verdict.runs, verdict.record
    train = _mean_train(runs)
    tiles = [
        (row.value, "steps" if row.track.metric == "steps" else f"time, mean of {result.runs}"),
        (f"{result.mean_loss:.4f}", f"loss, target {row.track.target:g}"),
        (row.p or "none", "p-value"), (f"{result.steps:,}", "steps"), (row.hardware, "hardware"),
    ]  # fmt: skip
    if row.track.metric == "steps":
        tiles[3] = (_time(result.mean_seconds), "time, not compared")
    if result.tokens:
        many = result.tokens >= 1e6
        tiles.append((f"{result.tokens / 1e6:,.1f} M" if many else f"{result.tokens:,}", "tokens"))
    first = runs[0]
    reproduce = f"engaging leaderboard fetch BOARD {row.id} again\n" + (
        "less again/run-1/log.txt    # begins with the trainer's source"
        if row.foreign
        else "engaging repro again/run-1/log.txt --data_root=DATA"
    )
    return {
        "tiles": tiles, "said": result.said, "has_train": bool(train), "reproduce": reproduce,
        "curves": charts.loss_curves([[(p.step, p.loss) for p in run.val] for run in runs], train, row.track.target),
        "spread": charts.spread(result.losses, row.track.target),
        "runs": [
            {
                "label": run.label, "loss": f"{run.val_loss:.5f}", "seconds": _time(run.train_ms / 1000),
                "step": f"{run.train_ms / run.steps:.2f} ms", "log": run.log_sha256[:16],
                "started": f"{run.started:%Y-%m-%d %H:%M}" if run.started else "not said",
            }
            for run in runs
        ],
        "checks": verdict.passed, "notes": verdict.notes,
        "source": record.source_sha256, "recipe": record.recipe_sha256,
        "files": len(first.source_files), "software": ", ".join(f"{k} {v}" for k, v in sorted(first.software.items())),
        "before": before[0] if before else None,
        "against": _against(before[0].record, record, row.track, first.host) if before else [],
        "changes": changed_since(before[1], first) if before and before[1].kind == first.kind else None,
        "confirmed": [],
    }  # fmt: skip


def _against(before: Record, now: Record, track: Track, host: str) -> list[str]:
    """What changed from the record before, in words: Welch's test on time and loss, or track 3's pairwise rule."""
    old_loss, new_loss = ([run.val_loss for run in one.runs] for one in (before, now))
    if track.metric == "steps":
        pair = statistics.track3_pairwise(
            old_loss, [before.steps] * len(old_loss), new_loss, [now.steps] * len(new_loss)
        )
        met = "enough" if pair.passed else "not enough"
        said = f"{before.steps:,} steps before, {now.steps:,} now; with the losses, track 3's pairwise rule gives"
        return [f"{said} {pair.value:.4f}, needed {statistics.TRACK3_MARGIN}: {met}"]
    lines = []
    old_time, new_time = ([run.seconds for run in one.runs] for one in (before, now))
    for name, unit, old, new in (("Time", " s", old_time, new_time), ("Loss", "", old_loss, new_loss)):
        found = statistics.welch(old, new)
        digits = 2 if unit else 4
        line = f"{name}: {statistics.mean(old):.{digits}f}{unit} before, {statistics.mean(new):.{digits}f}{unit} now"
        if found.p is not None and found.interval is not None:
            low, high = (-bound for bound in reversed(found.interval))
            between = f"95 % interval {low:+.{digits}f} to {high:+.{digits}f}"
            line += f"; change {-found.difference:+.{digits}f}{unit}, {between}"
            line += f", p = {found.p:.2g} that it is lower (Welch)"
        lines.append(line)
    if host:
        lines.append("Unless both were trained in turn on one node, a few percent of time are the node's.")
    return lines


def _mean_train(runs: Sequence) -> list[tuple[float, float]]:
    """The mean training loss over the runs, at most MOST_POINTS points, each a mean over the steps between."""
    sums: dict[int, list[float]] = defaultdict(list)
    for run in runs:
        width = max(1, run.steps // MOST_POINTS)
        for point in run.train:
            if point.loss is not None:
                sums[point.step // width * width].append(point.loss)
    return [(step, sum(found) / len(found)) for step, found in sorted(sums.items())]


def _rank(rows: Sequence[Row]) -> None:
    """Give each record the re-runs of others: same source, recipe, track and hardware."""

    def what(row: Row) -> tuple[str, ...]:
        return row.record.source_sha256, row.record.recipe_sha256, row.track.name, row.hardware

    for again in (row for row in rows if row.kind == "rerun"):
        for row in rows:
            others = not set(row.record.contributors) & set(again.record.contributors)
            if row.kind == "record" and what(row) == what(again) and others:
                row.confirmed += again.met
                row.doubted += not again.met
                row.more["confirmed"].append(again)


def _tracks(rows: Sequence[Row], before: int) -> Iterable[dict[str, Any]]:
    """The index's sections: a track each, in it a tab for each hardware. Their numbers begin after `before`."""
    by_track: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        by_track[row.track.name].append(row)
    for number, found in enumerate(by_track.values(), before + 1):
        track, tabs = found[0].track, defaultdict(list)
        unit = "steps" if track.metric == "steps" else "seconds"
        for row in found:
            if row.kind == "record":
                tabs[row.hardware].append(row)
        yield {
            "number": number, "title": track.title, "target": track.target, "val_tokens": track.val_tokens,
            "metric": track.metric, "unit": unit.capitalize() if track.metric == "steps" else "Time",
            "rule": _rule(track),
            "negative": [row for row in found if row.kind == "negative"],
            "tabs": [
                {
                    "hardware": hardware, "rows": sorted(tab, key=lambda row: (row.figure, row.record.submitted)),
                    "chart": _chart(tab, unit), "best": _best(tab),
                }
                for hardware, tab in sorted(tabs.items(), key=lambda pair: (-len(pair[1]), pair[0]))
            ],
        }  # fmt: skip


def _history() -> dict[str, Any]:
    """The speedrun's public record as the example of a curve: two years of it, with its source."""
    found = json.loads(HISTORY.read_text(encoding="utf-8"))
    points = [
        (
            datetime.datetime.fromisoformat(row["date"]).replace(tzinfo=datetime.timezone.utc), float(row["minutes"]),
            f"record {row['record']}, {row['what']}", True,
        )
        for row in found["records"]
    ]  # fmt: skip
    return {
        **{key: found[key] for key in ("what", "source", "note")},
        "chart": charts.record_curve(points, "minutes"),
    }


def _rule(track: Track) -> str:
    if track.test == "mean":
        return "a practice track: the mean counts, no test is made"
    if track.test == "z":
        return "(target - mean) times the root of the number of runs must reach 0.004"
    return f"p < {track.alpha:g} over all submitted runs"


def _best(rows: Sequence[Row]) -> set[str]:
    """The ids of those that were the best among `rows` on their day."""
    found: dict[str, float] = {}
    for row in sorted(rows, key=lambda row: row.record.submitted):
        if not found or row.figure < min(found.values()):
            found[row.id] = row.figure
    return set(found)


def _chart(rows: Sequence[Row], unit: str) -> Markup:
    best = _best(rows)
    points = [(row.record.submitted, float(row.figure), row.description, row.id in best) for row in rows]
    return charts.record_curve(points, unit)


def _csv(rows: Sequence[Row]) -> str:
    """The table for spreadsheets; no cell is a formula."""
    head = (
        "track", "hardware", "kind", "seconds", "steps", "mean_loss", "p_value", "runs", "description", "contributors",
        "submitted", "id",
    )  # fmt: skip
    lines = [",".join(head)]
    for row in rows:
        one = row.record
        cells = (
            one.track, one.hardware, one.kind, f"{one.seconds:.3f}", one.steps, f"{one.mean_loss:.6f}",
            "" if one.p_value is None else f"{one.p_value:.6g}", len(one.runs), one.description, row.contributors,
            one.submitted.isoformat(), one.id,
        )  # fmt: skip
        lines.append(",".join(text.csv_cell(cell) for cell in cells))
    return "\r\n".join([*lines, ""])
