"""A report as Markdown, as LaTeX, and as the folder that the speedrun accepts as a record."""

import re
import shutil
from pathlib import Path

from nanogpt.common.errors import UserError
from nanogpt.common.storage import atomic_write_text, make_folder, storage_errors
from tools.analysis import analyze, statistics, words
from tools.analysis.analyze import Analysis
from tools.analysis.records import Group
from tools.runs import printable

HEAD = ("variant", "runs", "mean loss", "sd", "95% interval", "p < target", "gain", "p", "Holm", "mean time")
LOGS = ("log.txt", "stdout.log")
LATEX = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "$": r"\$", "&": r"\&", "#": r"\#", "%": r"\%", "_": r"\_",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"$<$", ">": r"$>$", "±": r"$\pm$",
}  # fmt: skip


def rows(found: Analysis) -> list[tuple[str, ...]]:
    """The table, best mean loss first."""
    made = []
    for one in sorted(found.groups, key=lambda g: (g.loss["mean"] is None, g.loss["mean"] or 0.0)):
        limits, against = one.loss["ci_95"], found.against(one.group)
        loss = against.loss if against else None
        star = " *" if any(one.group is base for base in found.baselines) else ""
        made.append(
            (one.group.name + star, f"{len(one.group.counted)}/{len(one.group.runs)}", words.number(one.loss["mean"]),
             words.number(one.loss["std"]), f"{limits[0]:.4f} to {limits[1]:.4f}" if limits else "-",
             words.p_value(one.track1.p) if one.track1 else "-", f"{loss.difference:+.4f}" if loss else "-",
             words.p_value(loss.p) if loss else "-", words.p_value(against.holm) if against else "-",
             words.seconds(one.time["mean"]))
        )  # fmt: skip
    return made


def _paragraphs(found: Analysis) -> list[tuple[str, list[str]]]:
    """(heading, sentences): each variant's answer, each group alone, what to mind."""
    made = [
        (f"{one.variant.name} against {one.baseline.name}: {words.VERDICTS[one.verdict]}", one.sentences)
        for one in found.comparisons
    ]
    made += [(one.group.name, one.sentences) for one in found.groups]
    if said := analyze.remarks(found):
        made.append(("Mind", said))
    if failed := [(one.group, run) for one in found.groups for run in one.group.excluded]:
        made.append(
            ("Not counted", [f"{g.name}, {run.name} (seed {run.seed}): {run.reason}." for g, run in failed])
        )
    return made


def markdown(found: Analysis, title: str, command: str, made: str, notes: list[str]) -> str:
    """The report as Markdown: no text of a file becomes a heading, a link or a cell's border."""
    lines = [
        f"# {_md(title)}",
        "",
        f"{made}; `{command.replace('`', '')}`",
        "",
        *[f"{_md(note)}\n" for note in notes],
    ]
    lines += ["| " + " | ".join(HEAD) + " |", "|" + "---|" * len(HEAD)]
    lines += ["| " + " | ".join(map(_md, row)) + " |" for row in rows(found)]
    lines += [
        "",
        "gain: loss saved against the baseline (*); p: one-sided; Holm: p for all variants at once",
        "",
    ]
    for heading, sentences in _paragraphs(found):
        lines += [f"## {_md(heading)}", "", *[f"- {_md(sentence)}" for sentence in sentences], ""]
    return "\n".join(lines)


def _md(text: str) -> str:
    return re.sub(r"([\\`*_\[\]<>|#!~])", r"\\\1", printable(text))


def latex(found: Analysis, title: str, command: str, made: str, notes: list[str]) -> str:
    """The report as LaTeX for a paper's appendix: a table and paragraphs, no package needed."""
    lines = [f"% {printable(command)}", rf"\section*{{{_tex(title)}}}", *[_tex(note) for note in notes], ""]
    lines += [r"\begin{tabular}{l" + "r" * (len(HEAD) - 1) + "}", r"\hline"]
    lines += [" & ".join(map(_tex, row)) + r" \\" for row in (HEAD, *rows(found))]
    lines += [
        r"\hline",
        r"\end{tabular}",
        "",
        f"{_tex(made)}. {_tex('gain: loss saved against the baseline (*).')}",
        "",
    ]
    for heading, sentences in _paragraphs(found):
        lines += [rf"\paragraph{{{_tex(heading)}}}", *map(_tex, sentences), ""]
    return "\n".join(lines)


def _tex(text: str) -> str:
    return "".join(LATEX.get(char, char) for char in printable(text))


# ---- the folder of a record ------------------------------------------------------------------------------------------


def write_record(found: Analysis, folder: Path, title: str, notes: list[str]) -> list[Path]:
    """README.md, statistics.md with the raw lists, and each counted run's log. UserError where there is no record.

    The record is the one group that is no baseline, or the only group.
    """
    others = [one for one in found.groups if not any(one.group is base for base in found.baselines)]
    chosen = others if len(others) == 1 else found.groups if len(found.groups) == 1 else []
    if not chosen:
        names = ", ".join(one.group.name for one in (others or found.groups)[:4])
        raise UserError(f"--record: a record is one variant, with or without its baseline; here are: {names}")
    one = chosen[0]
    if folder.exists():
        raise UserError(f"--record={folder}: exists already; name a new folder")
    logs = [(run, _log(run.path)) for run in one.group.counted]
    if lost := [run.name for run, path in logs if path is None] or (not logs and ["no run counts"]):
        raise UserError(
            f"--record: {one.group.name}: {lost[0]}: no log.txt and no stdout.log; a record shows its logs"
        )
    make_folder(folder)
    written = []
    for number, (run, path) in enumerate(logs, 1):
        goal = folder / f"{number:02}-seed-{run.seed}.txt"
        with storage_errors(goal):
            shutil.copyfile(path, goal)
        written.append(goal)
    atomic_write_text(folder / "statistics.md", _statistics(found, one.group))
    change = printable(
        str(one.group.config.get("modification_details") or one.group.config.get("description") or "")
    )
    hardware = ", ".join(sorted({each.words() for each in one.group.hardware()}))
    readme = [f"# {_md(title)}", "", _md(change or "What was changed: write it here, in a sentence."), ""]
    readme += [f"{_md(note)}\n" for note in notes] + [f"Hardware: {_md(hardware)}.", ""]
    readme += [f"- {_md(sentence)}" for sentence in one.sentences]
    readme += ["", "Raw lists and tests: [statistics.md](statistics.md). Each log opens with its source:", ""]
    readme += [f"- [{path.name}]({path.name})" for path in written]
    atomic_write_text(folder / "README.md", "\n".join(readme) + "\n")
    return [folder / "README.md", folder / "statistics.md", *written]


def _log(run: Path) -> Path | None:
    return next((run / name for name in LOGS if (run / name).is_file()), None)


def _statistics(found: Analysis, group: Group) -> str:
    """n, mean, sd, p, times, raw lists, what computes them, and Welch against the baseline on loss and on time."""
    target = next(one.target for one in found.groups if one.group is group)
    lines = ["# Statistics", "", *_lists(group, "losses"), ""]
    one, times = statistics.track1(group.losses, target), statistics.describe(group.seconds)
    lines += [f"n = {one.n}, mean = {one.mean:.6f}, sd = {words.number(one.sd, 6)}, {words.p_is(one.p)} for a mean "
              f"below {target:g} (one-sided t-test)", ""]  # fmt: skip
    if group.seconds:
        lines += [f"seconds: mean {times['mean']:.3f}, median {times['median']:.3f}, from {times['min']:.3f} to "
                  f"{times['max']:.3f}", ""]  # fmt: skip
    test = f"stats.ttest_1samp(losses, {target:g}, alternative='less')"
    lines += ["```python", "from scipy import stats", f"print({test})", "```", ""]
    against = found.against(group)
    if against:
        lines += ["## Against the baseline", "", *_lists(against.baseline, "baseline"), ""]
        lines += [f"- {_md(sentence)}" for sentence in against.sentences]
    return "\n".join(lines) + "\n"


def _lists(group: Group, name: str) -> list[str]:
    made = ["```python", f"{name} = {[round(loss, 6) for loss in group.losses]}"]
    seeds = [run.seed for run in group.counted]
    made.append(f"{'' if name == 'losses' else name + '_'}seeds = {seeds}")
    if group.seconds:
        made.append(
            f"{'' if name == 'losses' else name + '_'}seconds = {[round(s, 3) for s in group.seconds]}"
        )
    return [*made, "```"]
