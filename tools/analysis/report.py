"""`engaging report DIR`: one HTML page about experiments or runs, in one file that opens from the disk.

    engaging report experiment_logs --out=report.html
    engaging report palm --format=md                  # or latex; the figures as PDF: engaging analyze palm
    engaging report nanogpt_baseline nanogpt_palm_parallel --record=records/palm
    engaging report experiment_logs/nanogpt_*_full_* --title="Parallel blocks, stage C"

The page has the answers in words, the table, the pictures and every run; it follows the reader's light or dark theme,
fits a phone, prints, needs no network and runs no script. DIR is what `engaging analyze` takes. Every text that comes
from a file is escaped.
"""

import datetime
import json
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from nanogpt.common.errors import UserError
from nanogpt.common.storage import atomic_write_text
from tools.analysis import analyze, formats, load, words
from tools.analysis.analyze import Analysis
from tools.analysis.findings import Comparison, GroupFinding
from tools.analysis.records import Group
from tools.args import Parser
from tools.place import print_fetch_line
from tools.runs import printable

if TYPE_CHECKING:
    import jinja2

TEMPLATE = "report.html.j2"
NAME = "report.html"
ENDINGS = {"html": (".html", ".htm"), "md": (".md",), "latex": (".tex",)}
MOST_ANSWERS, MOST_ROWS, MOST_RUNS = 40, 200, 200  # shown; the page says how many are left out
FEW_RUNS = 24  # up to so many, the tables of runs are open


def page(found: Analysis, title: str, command: str, made: str, notes: Sequence[str] = ()) -> str:
    """The page as text. `made`: when, for people; `notes`: what the reader should know first."""
    try:
        from markupsafe import Markup

        from tools.analysis import bands, pictures, plots  # here, because --help needs no matplotlib
    except ImportError:
        raise UserError(
            "jinja2 or matplotlib is missing here; bash setup_env.sh, then source activate_env.sh"
        ) from None
    environment = _environment()
    groups = found.groups
    runs = sum(len(one.group.runs) for one in groups)
    excluded = [(one.group, run) for one in groups for run in one.group.excluded]
    ordered = sorted(groups, key=lambda one: (one.loss["mean"] is None, one.loss["mean"] or 0.0))
    compared = {id(one.variant) for one in found.comparisons}
    alone = [one for one in ordered if id(one.group) not in compared]
    drawn = [
        # inline_svg escapes its label itself, and the rest of it is matplotlib's own
        {
            "name": one.name,
            "title": one.title,
            "caption": one.caption,
            "svg": Markup(plots.inline_svg(one.figure, one.name, one.title)),
        }
        for one in pictures.draw(found)
    ]
    rank = list(words.VERDICTS)  # what helped first, then by the gain
    best_first = sorted(
        found.comparisons,
        key=lambda one: (rank.index(one.verdict), -one.loss.difference if one.loss else 0.0),
    )
    left_out = max(0, len(best_first) - MOST_ANSWERS) + max(0, len(alone) - MOST_ANSWERS)
    return environment.get_template(TEMPLATE).render(
        title=title,
        counts=f"{_count(len(groups), 'variant')}, {_count(runs, 'run')}, {len(excluded)} not counted",
        hardware=_hardware([one.group for one in groups]),
        made=made,
        notes=list(notes),
        comparisons=[_answer(one) for one in best_first[:MOST_ANSWERS]],
        alone=[_alone(found, one) for one in alone[:MOST_ANSWERS]],
        more_answers=f"{left_out} more answers: engaging analyze --json has all." if left_out else "",
        rows=[_row(found, one) for one in ordered[:MOST_ROWS]],
        more_rows=f"{len(ordered) - MOST_ROWS} more variants are not shown."
        if len(ordered) > MOST_ROWS
        else "",
        holm=any(one.holm is not None for one in found.comparisons),
        targets=", ".join(f"{aim:g}" for aim in sorted({one.target for one in groups})),
        remarks=analyze.remarks(found),
        excluded=[
            f"{group.name}, {run.name} (seed {run.seed}): {run.reason}" for group, run in excluded[:MOST_RUNS]
        ],
        excluded_count=len(excluded),
        pictures=drawn,
        groups=[_details(one.group) for one in ordered[:MOST_ROWS]],
        open_details=runs <= FEW_RUNS,
        command=command,
        history=bands.history()[1] if any(one["name"] == "record_history" for one in drawn) else {},
    )


def _environment() -> "jinja2.Environment":
    """jinja2's, which escapes everything that is not marked as a piece of the page."""
    import jinja2
    from markupsafe import Markup, escape

    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    # names are long and without spaces: they may break after what joins their parts
    environment.filters["breakable"] = lambda text: Markup(re.sub("([-_/.]+)", r"\1<wbr>", str(escape(text))))
    return environment


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _hardware(groups: Sequence[Group]) -> str:
    found = sorted({one.words() for group in groups for one in group.hardware()})
    return ", ".join(found[:3]) + (f" and {len(found) - 3} more" if len(found) > 3 else "")


def _answer(one: Comparison) -> dict:
    css = one.verdict if one.verdict in ("helped", "hurt") else ""
    return {
        "variant": one.variant.name,
        "baseline": one.baseline.name,
        "verdict": words.VERDICTS[one.verdict].rstrip("."),
        "css": css,
        "change": _change(one.variant),
        "sentences": one.sentences,
    }


def _alone(found: Analysis, one: GroupFinding) -> dict:
    baseline = any(one.group is base for base in found.baselines)
    return {
        "name": one.group.name,
        "baseline": baseline,
        "change": _change(one.group),
        "sentences": one.sentences,
    }


def _change(group: Group) -> str:
    """What its configuration says that it is."""
    said = group.config.get("modification_details") or group.config.get("description") or ""
    return printable(said)[:400] if isinstance(said, str) else ""


def _row(found: Analysis, one: GroupFinding) -> dict:
    group, limits, against = one.group, one.loss["ci_95"], found.against(one.group)
    loss = against.loss if against else None
    return {
        "name": group.name,
        "baseline": any(group is base for base in found.baselines),
        "runs": f"{len(group.counted)} of {len(group.runs)}",
        "loss": words.number(one.loss["mean"]),
        "sd": words.number(one.loss["std"]),
        "interval": f"{limits[0]:.4f} to {limits[1]:.4f}" if limits else "-",
        "p_target": words.p_value(one.track1.p) if one.track1 else "-",
        "gain": f"{loss.difference:+.4f}" if loss else "-",
        "p": words.p_value(loss.p) if loss else "-",
        "holm": words.p_value(against.holm) if against else "-",
        "time": words.seconds(one.time["mean"]),
        "reached": f"{len(one.reached)} of {len(group.counted)}",
    }


def _details(group: Group) -> dict:
    rows = [
        {
            "name": run.name, "seed": "-" if run.seed is None else run.seed, "loss": words.number(run.val_loss),
            "step": "-" if run.step is None else run.step, "time": words.seconds(run.seconds),
            "started": run.started[:16].replace("T", " ") or "-",
            "machine": f"not counted: {run.reason}" if run.reason else run.hardware.words(),
        }
        for run in group.runs[:MOST_RUNS]
    ]  # fmt: skip
    more = f"{len(group.runs) - MOST_RUNS} more runs are not shown." if len(group.runs) > MOST_RUNS else ""
    config = printable(json.dumps(group.config, ensure_ascii=False, indent=None)) if group.config else ""
    note = f"{_count(len(group.runs), 'run')}, {len(group.excluded)} not counted"
    started = any(run.started for run in group.runs)
    return {
        "name": group.name,
        "note": note,
        "runs": rows,
        "more": more,
        "config": config[:4000],
        "started": started,
    }


def _is_note(argv: list[str], at: int) -> bool:
    return argv[at].startswith("--note") or (at > 0 and argv[at - 1] == "--note")


def _portable(word: str) -> str:
    """An argument without the folders of this machine: the page is made to be sent around."""
    flag, equals, path = word.partition("=") if word.startswith("--") else ("", "", word)
    if not Path(path).is_absolute():
        return word
    here = Path.cwd()
    inside = Path(path).is_relative_to(here)
    return f"{flag}{equals}{Path(path).relative_to(here) if inside else Path(path).name or path}"


def main(argv: list[str]) -> int:
    """The command."""
    parser = Parser("report", __doc__ or "")
    analyze.add_arguments(parser)
    parser.add_argument(
        "--out", type=Path, metavar="FILE.html", help=f"the page (default: {NAME} in the first DIR)"
    )
    parser.add_argument("--title", help="what stands on top of the page (default: the folder's name)")
    parser.add_argument(
        "--note", action="append", default=[], help="a sentence under the title: what the reader should know"
    )
    parser.add_argument("--format", choices=tuple(ENDINGS), default="html", help="default: html")
    parser.add_argument(
        "--record", type=Path, metavar="FOLDER",
        help="instead of a page: the folder that the speedrun takes as a record (README, statistics, logs)",
    )  # fmt: skip
    args = parser.read(argv)
    out = args.out or load.home(args.dir[0]) / Path(NAME).with_suffix(ENDINGS[args.format][0])
    if out.suffix.lower() not in ENDINGS[args.format]:
        ending = ENDINGS[args.format][0]
        raise UserError(f"--out={out}: the report is {args.format}; give the name the ending {ending}")
    if args.out and not out.parent.is_dir():
        raise UserError(f"--out={out}: the folder {out.parent} does not exist; make it, or name another")
    found = analyze.analyze(load.load(args.dir), args.target, args.baseline)
    title = printable(args.title or args.dir[0].resolve().name)[:120] or "Report"
    made = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    told = [word for at, word in enumerate(argv) if not _is_note(argv, at)]  # notes stand on the page already
    command = printable("engaging report " + " ".join(shlex.quote(_portable(word)) for word in told))
    notes = [printable(note)[:1000] for note in args.note if note.strip()]
    if args.record:
        written = formats.write_record(found, args.record, title, notes)
        print(f"written: {args.record}: README.md, statistics.md, {len(written) - 2} logs")
        return 0
    writers = {"html": page, "md": formats.markdown, "latex": formats.latex}
    atomic_write_text(out, writers[args.format](found, title, command, made, notes))
    print(f"written: {out}")
    print_fetch_line(out)
    return 0
