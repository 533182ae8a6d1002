"""`engaging analyze DIR...`: what the runs in these folders show: a table, p-values, plots.

    engaging analyze palm                                      # the study of that name
    engaging analyze experiment_logs/nanogpt_*_screening_*/
    engaging analyze experiment_logs out/palm-1 --target=3.28
    engaging analyze experiment_logs --out=pictures --baseline=nanogpt_baseline

DIR is an experiment (experiment_logs/<name>_<timestamp>, or the name alone: the newest), a study's name, a run
directory (out/<run>), or a folder of them. Plain runs that differ in nothing but the seed make one row. Every variant
is held against the baseline of its stage: the experiment whose modification_type is "none", or the one that --baseline
names. Runs that failed are listed with the reason and enter no mean. The plots go to --out as PNG, SVG and PDF
(default: `analysis` in the first DIR).
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from nanogpt.common.errors import UserError
from nanogpt.common.flags import nearest
from tools.analysis import compare, findings, load, words
from tools.analysis.findings import Comparison, GroupFinding
from tools.analysis.records import Group, Study, time_obstacle
from tools.args import Parser
from tools.place import print_fetch_line

MOST_ROWS = 60  # of the table; --json has them all
MOST_LISTED = 20  # runs that do not count
PLOTS = "analysis"


@dataclass
class Analysis:
    """Everything that the table, the JSON and the page show."""

    study: Study
    groups: list[GroupFinding]
    comparisons: list[Comparison]
    baselines: list[Group] = field(default_factory=list)

    def against(self, group: Group) -> Comparison | None:
        """The comparison in which this group is the variant."""
        return next((one for one in self.comparisons if one.variant is group), None)


def analyze(study: Study, target: float | None = None, baseline: str = "") -> Analysis:
    """Examine each group and compare it with its baseline. UserError when `baseline` names none of them."""
    groups = study.groups
    if baseline:
        chosen = [group for group in groups if baseline in (group.name, group.path.name)]
        if len(chosen) != 1:
            names = [group.name for group in groups]
            raise UserError(
                f"--baseline={baseline}: {'several' if chosen else 'none'} of the {len(groups)} variants has this name"
                f"{nearest(baseline, names)}; give the folder's name"
            )
        baselines = dict.fromkeys((group.stage for group in groups), chosen[0])
    else:
        baselines = _baselines(groups)
    found = Analysis(study, [findings.examine(group, target) for group in groups], [])
    found.baselines = list({id(group): group for group in baselines.values()}.values())
    for group in groups:
        base = baselines.get(group.stage)
        if (
            base is not None
            and not any(group is one for one in found.baselines)
            and base.losses
            and group.losses
        ):
            found.comparisons.append(findings.compare(base, group))
    findings.adjust(found.comparisons)
    return found


def _baselines(groups: Sequence[Group]) -> dict[str, Group]:
    """The baseline of each stage, where there is exactly one."""
    stages: dict[str, list[Group]] = {}
    for group in groups:
        if group.is_baseline:
            stages.setdefault(group.stage, []).append(group)
    return {stage: found[0] for stage, found in stages.items() if len(found) == 1}


def table(found: Analysis) -> list[str]:
    """One line a group, best mean loss first, baselines marked with *."""
    head = [
        "variant",
        "runs",
        "loss",
        "sd",
        "95% interval",
        "p < target",
        "gain",
        "p",
        "Holm",
        "answer",
        "time",
    ]
    rows = []
    known = [one for one in found.groups if one.loss["mean"] is not None]
    ordered = sorted(known, key=lambda one: one.loss["mean"]) + [
        one for one in found.groups if one not in known
    ]
    for one in ordered[:MOST_ROWS]:
        group, limits, against = one.group, one.loss["ci_95"], found.against(one.group)
        loss = against.loss if against else None
        rows.append(
            [
                group.name[:44] + (" *" if any(group is base for base in found.baselines) else ""),
                f"{len(group.counted)}/{len(group.runs)}",
                words.number(one.loss["mean"]),
                words.number(one.loss["std"]),
                f"{limits[0]:.4f} {limits[1]:.4f}" if limits else "-",
                words.p_value(one.track1.p) if one.track1 else "-",
                f"{loss.difference:+.4f}" if loss else "-",
                words.p_value(loss.p) if loss else "-",
                words.p_value(against.holm) if against else "-",
                against.verdict if against else "-",
                words.seconds(one.time["mean"]),
            ]
        )
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]
    lines = []
    for row in [head, *rows]:
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join(cells).rstrip())
    if len(ordered) > MOST_ROWS:
        lines.append(f"... and {len(ordered) - MOST_ROWS} more (--json prints all)")
    return lines


def text(found: Analysis) -> list[str]:
    """Table, answers, and what has to be minded."""
    targets = sorted({one.target for one in found.groups})
    lines = [*table(found), ""]
    aims = ", ".join(f"{aim:g}" for aim in targets[:4])
    lines.append(
        f"target {aims}; gain: loss saved against the baseline (*); p: one-sided; Holm: p for all variants at once; "
        "sd: over seeds"
    )
    many = len(found.groups) > 12
    for one in found.groups if not many else []:
        lines += ["", f"{one.group.name}:"] + [compare.wrapped(sentence) for sentence in one.sentences]
        against = found.against(one.group)
        if against:
            lines.append(compare.wrapped(f"{words.VERDICTS[against.verdict]} {' '.join(against.sentences)}"))
    said = remarks(found)
    if said:
        lines += ["", "Mind:", *[compare.wrapped(remark, "  - ") for remark in said]]
    excluded = [(one.group, run) for one in found.groups for run in one.group.excluded]
    if excluded:
        lines += ["", f"{len(excluded)} runs do not count:"]
        lines += [
            f"  {group.name}, {run.name} (seed {run.seed}): {run.reason}"
            for group, run in excluded[:MOST_LISTED]
        ]
        if len(excluded) > MOST_LISTED:
            lines.append(f"  ... and {len(excluded) - MOST_LISTED} more (--json prints all)")
    return lines


def remarks(found: Analysis) -> list[str]:
    """What has to be minded, each thing once."""
    said = [*found.study.notes]
    for one in found.groups:
        said += [f"{one.group.name}: {note}" for note in one.group.notes] + findings.same_seeds(one.group)
    counted = [group for group in found.study.groups if group.counted]
    if len(counted) > 1 and (reason := time_obstacle(counted)):
        said.append(f"times are not compared: {reason}")
    if len(found.study.groups) > 1 and not found.baselines:
        said.append("no single baseline among these; name it with --baseline to compare the others with it")
    for one in found.comparisons:
        said += one.cautions
    tests = sum(one.verdict in ("helped", "hurt", "unclear") for one in found.comparisons)
    if tests > 1:
        luck = round(1 / (tests * words.ALPHA))
        said.append(
            f"{tests} variants are tested at once: by luck alone one in {luck} such studies claims that something "
            "helped; repeat a claim with new seeds"
        )
    return list(dict.fromkeys(said))


def as_json(found: Analysis) -> dict:
    """Everything for programs, unrounded."""
    return {
        "groups": [
            {
                "name": one.group.name, "path": str(one.group.path), "stage": one.group.stage, "target": one.target,
                "n_runs": len(one.group.runs), "successful_runs": len(one.group.counted), "val_loss": one.loss,
                "time": one.time, "losses": one.group.losses, "seeds": [run.seed for run in one.group.counted],
                "track1": vars(one.track1) if one.track1 else None,
                "track3": vars(one.track3) if one.track3 else None,
                "track3_step": one.track3_step,
                "reached_target": [vars(hit) for hit in one.reached], "sentences": one.sentences,
                "excluded": [
                    {"run": run.name, "seed": run.seed, "reason": run.reason} for run in one.group.excluded
                ],
            }
            for one in found.groups
        ],
        "comparisons": [compare.as_json(one) for one in found.comparisons],
        "remarks": remarks(found),
    }  # fmt: skip


def add_arguments(parser: Parser) -> None:
    """What `analyze` and `report` take alike."""
    parser.add_argument("dir", nargs="+", type=Path, help="experiments, run directories, folders of them")
    parser.add_argument(
        "--target", type=compare.positive("--target"), metavar="LOSS",
        help="the loss to reach (default: the configuration's, or 3.28)",
    )  # fmt: skip
    parser.add_argument(
        "--baseline", default="", metavar="NAME", help="the variant to hold the others against"
    )


def main(argv: list[str]) -> int:
    """The command."""
    parser = Parser("analyze", __doc__ or "")
    add_arguments(parser)
    parser.add_argument(
        "--out", type=Path, metavar="FOLDER", help="where the plots go (default: DIR/analysis)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    parser.add_argument("--no-plots", action="store_true", help="the table only")
    args = parser.read(argv)
    study = load.load(args.dir, with_curves=True)
    found = analyze(study, args.target, args.baseline)
    print(json.dumps(as_json(found), indent=1) if args.json else "\n".join(text(found)))
    if not args.no_plots:
        from tools.analysis import pictures  # here, because --help and --no-plots need no matplotlib

        folder = args.out or load.home(args.dir[0]) / PLOTS
        written = pictures.write(found, folder)
        if not args.json:
            print(f"\nwritten: {len(written)} pictures in {folder}")
            print_fetch_line(folder)
    return 0
