"""`engaging compare BASELINE VARIANT`: did it help? In words, with the numbers behind them.

    engaging compare nanogpt_baseline_validation nanogpt_palm_validation       # the newest of these names
    engaging compare experiment_logs/nanogpt_baseline_20261121_060000 experiment_logs/nanogpt_palm_20261121_070000
    engaging compare 'out/adam-*' 'out/muon-*'                 # run directories, one a seed: mind the quotes
    engaging compare out/baseline out/palm --want=0.002        # how many seeds would show a difference of 0.002
    engaging compare out/baseline out/palm --looks=4,8,12      # a plan that was made before the first run

What differs between the two comes first: configuration, source, hardware. Each side is an experiment, a run directory,
or a folder or a pattern of run directories of one variant. Losses are compared by Welch's t-test, or by the paired test
where the runs took turns on one machine; times only on equal hardware. With --looks the p-value must be below the level
of this look, which allows to stop early without fooling oneself:
"""

import dataclasses
import json
import re
import textwrap
from collections.abc import Callable
from pathlib import Path

from nanogpt.common.errors import UserError
from tools.analysis import changes, findings, load, planning, words
from tools.analysis.records import Group
from tools.args import Parser


def main(argv: list[str]) -> int:
    """The command. Exit status 0 whatever the answer: the answer is in the words."""
    rule = (planning.__doc__ or "").partition("\n\n")[2]
    parser = Parser("compare", (__doc__ or "") + "\n" + rule)
    parser.add_argument("baseline", type=Path, help="what it is compared with")
    parser.add_argument("variant", type=Path, help="what was changed")
    parser.add_argument(
        "--looks", type=looks, default=(), metavar="N,N,...", help="planned looks, runs a side"
    )
    parser.add_argument(
        "--want", type=positive("--want"), metavar="LOSS", help="plan seeds for this difference"
    )
    parser.add_argument(
        "--pairing", choices=("auto", "seed", "none"), default="auto",
        help="auto: pairs runs that took turns; seed: pairs equal seeds; none",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of words")
    args = parser.read(argv)
    baseline, variant = (one_group(path) for path in (args.baseline, args.variant))
    _refuse_trials(baseline, variant)
    if baseline.path.resolve() == variant.path.resolve() and baseline.name == variant.name:
        raise UserError(f"{args.variant}: is the baseline itself; name two different ones")
    found = findings.compare(baseline, variant, looks=args.looks, wanted=args.want, pairing=args.pairing)
    changed = changes.find(baseline, variant)
    if said := changes.caution(changed):
        found.cautions.append(said)
    if args.json:
        print(json.dumps({**as_json(found), "changed": dataclasses.asdict(changed)}, indent=1))
    else:
        print("\n".join([*changes.text(changed), "", *text(found)]))
    return 0


def _refuse_trials(*groups: Group) -> None:
    """UserError for a sweep's trial: the seeds that have chosen it cannot prove it."""
    from tools.experiments.sweep import trial_of

    for group in groups:
        if name := trial_of(group.path):
            raise UserError(
                f"{group.name}: a trial of the sweep {name}: its seeds have chosen it, so they prove nothing; "
                f"engaging experiment sweep {name} --final trains the best of each arm on others"
            )


def one_group(path: Path) -> Group:
    """The one group at `path`; UserError when there are several, or none of its runs counts."""
    groups = load.load([path]).groups
    if len(groups) > 1:
        names = ", ".join(str(group.path) for group in groups[:4])
        raise UserError(
            f"{path}: holds {len(groups)} variants; name one of them: {names}{' ...' * (len(groups) > 4)}"
        )
    group = groups[0]
    if not group.counted:
        why = f"{group.runs[0].name}: {group.runs[0].reason}" if group.runs else "no run has ended yet"
        raise UserError(
            f"{path}: none of its {len(group.runs)} runs counts ({why}); wait for them, or resume them"
        )
    return group


def text(found: findings.Comparison) -> list[str]:
    """The answer as lines."""
    lines = [f"{found.variant.name} against {found.baseline.name}: {words.VERDICTS[found.verdict]}", ""]
    lines += [wrapped(sentence) for sentence in found.sentences]
    if found.wanted and found.needed and found.verdict != "unclear":
        lines.append(
            f"  A difference of {found.wanted:.4f} takes {found.needed} {words.sides(found)} (9 of 10 studies see it)."
        )
    if found.cautions:
        lines += ["", "Mind:"] + [wrapped(caution, "  - ") for caution in found.cautions]
    lines.append("")
    for group in (found.baseline, found.variant):
        runs = ", ".join(f"{loss:.4f}" for loss in group.losses[:20]) + (
            " ..." if len(group.losses) > 20 else ""
        )
        hardware = ", ".join(sorted({one.words() for one in group.hardware()})[:3])
        lines.append(f"{group.name}: {runs}  [{hardware}]")
        lines += [f"  not counted: {run.name} (seed {run.seed}): {run.reason}" for run in group.excluded[:20]]
    return lines


def wrapped(sentence: str, mark: str = "  ") -> str:
    """A sentence, indented, in lines of at most 100 characters."""
    return textwrap.fill(
        sentence, 100, initial_indent=mark, subsequent_indent=" " * len(mark), break_on_hyphens=False
    )


def as_json(found: findings.Comparison) -> dict:
    """The answer for programs: every number, unrounded."""

    def plain(value: object) -> object:
        return dataclasses.asdict(value) if dataclasses.is_dataclass(value) else value

    names = (
        "verdict",
        "level",
        "loss",
        "time",
        "loss_refused",
        "time_refused",
        "track3",
        "pairs",
        "holm",
        "needed",
        "wanted",
    )
    sides = {
        side: {"name": group.name, "path": str(group.path), "losses": group.losses, "seconds": group.seconds}
        for side, group in (("baseline", found.baseline), ("variant", found.variant))
    }
    rest = {"sentences": found.sentences, "cautions": found.cautions}
    return {**sides, **{name: plain(getattr(found, name)) for name in names}, **rest}


def looks(text: str) -> tuple[int, ...]:
    """A type for planned looks: ascending numbers of runs, 4,8,12."""
    if not re.fullmatch(r"[0-9]{1,4}(,[0-9]{1,4}){0,19}", text):
        raise UserError(f"--looks={text[:60]!r}: expected ascending numbers of runs, such as 4,8,12")
    found = tuple(int(part) for part in text.split(","))
    if list(found) != sorted(set(found)) or found[0] < 2:
        raise UserError(f"--looks={text}: expected ascending numbers of runs from 2 on, such as 4,8,12")
    return found


def positive(flag: str) -> Callable[[str], float]:
    """A type for positive numbers."""

    def check(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = 0.0
        if not 0 < value < 1e6:
            raise UserError(f"{flag}={text[:60]!r}: expected a positive number")
        return value

    return check
