"""`engaging experiment promote STUDY`: which variants go on, by the written rules, and what that saved.

engaging experiment promote palm              the decision with its reasons
engaging experiment promote palm --rules      the rules themselves
engaging experiment promote palm --run        ... and start the next stage
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path

from nanogpt.common.errors import UserError
from tools.args import Parser, whole
from tools.experiments import costs, gate, promote, records, run, study
from tools.experiments.config import ExperimentConfig
from tools.experiments.flags import add_execution, price
from tools.experiments.promote import Decision
from tools.experiments.records import Experiment
from tools.experiments.study import CONFIGS, Result
from tools.place import checkout


def main(argv: list[str]) -> int:
    """The command. Exit status 0 when something goes on, 1 when nothing does (yet)."""
    args = _parser().read(argv)
    if args.rules:
        print(promote.__doc__)
        return 0
    if not args.study:
        raise UserError(
            "engaging experiment promote: name a STUDY; engaging experiment promote --rules needs none"
        )
    root = checkout()
    members = study.experiments(root, args.study)
    results = study.stage_results(members)
    decision = promote.decide(results, args.stage or "", args.advance)
    full = [config for _, config in _configurations(root, members) if config.letter == "C"]
    lines = evidence(results, full, args.price)
    if args.json:
        print(json.dumps(_as_json(decision, results, lines), indent=1))
    else:
        show(decision)
        print("\n".join(lines))
    if args.run and decision.advance:
        return _start_next(root, args, members, decision)
    begun = {e.config.variant for e in members if e.config.letter == decision.to and not _all_skipped(e)}
    if set(decision.advance) <= begun and not args.json:
        if decision.advance:
            print(f"\nstage {decision.to} has begun: engaging experiment status {' '.join(args.study)}")
    elif decision.advance and not args.json:
        print(f"\nstart it: engaging experiment promote {' '.join(args.study)} --run")
    return 0 if decision.advance else 1


def show(decision: Decision) -> None:
    """The findings in order of rank, with their reasons, and the verdict."""
    if decision.baseline is not None and decision.baseline.losses:
        losses = list(decision.baseline.losses.values())
        print(f"stage {decision.stage}: baseline {sum(losses) / len(losses):.4f} over {len(losses)} runs")
    for rank, finding in enumerate(decision.findings, 1):
        goes = finding.result.variant in decision.advance
        mark = (
            "goes on"
            if goes
            else "out"
            if not finding.passed
            else "set back"
            if finding.set_back
            else "passed"
        )
        mean = "" if finding.mean is None else f", mean {finding.mean:.4f}"
        print(f"  {rank}. {finding.result.label}{mean}: {mark}")
        for rule, text, ok in finding.reasons:
            print(f"       {'yes' if ok else 'no ':3} {rule}: {text}")
    print(f"\n{decision.verdict}")


def evidence(
    results: list[Result], full: list[ExperimentConfig], prices: dict[str, float] | None
) -> list[str]:
    """What the stages cost and saved against `full` (stage C of every variant), and whether their orders agree."""
    lines = costs.saved(results, full, prices)
    for first, second in (("A", "B"), ("B", "C"), ("A", "C")):
        found = promote.rank_correlation(results, first, second)
        if found is None:
            continue
        count, rho = found
        if rho is None:
            lines.append(
                f"ranks of stages {first} and {second}: only {count} variants in both, too few to correlate"
            )
        else:
            lines.append(f"ranks of stages {first} and {second}: Spearman {rho:+.2f} over {count} variants")
    return lines


def _start_next(root: Path, args: argparse.Namespace, members: list[Experiment], decision: Decision) -> int:
    """Create and start the chosen variants' experiments of stage `decision.to`; those that exist stay as they are."""
    there = {e.config.variant: e for e in members if e.config.letter == decision.to}
    wanted = [variant for variant in decision.advance if variant not in there]
    skipped = [there[v] for v in decision.advance if v in there and _all_skipped(there[v])]
    files = _configurations(root, members)
    planned = []
    for variant in wanted:
        match = [
            (path, config)
            for path, config in files
            if (config.variant, config.letter) == (variant, decision.to)
        ]
        if not match:
            source = next(e for e in members if e.config.variant == variant)
            raise UserError(
                f"{source.config.label}: no configuration of stage {decision.to} has its script and "
                f"hyperparameters; copy {source.config_file}, change stage, n_gpus and stage_config"
            )
        like = next(e for e in members if e.config.variant == variant)
        made = run.make(
            root, match[0][0], match[0][1], executor=_executor(args, like), study=like.study, args=args,
            overrides=list(like.overrides),
        )  # fmt: skip
        planned.append(replace(made, options={**like.options, **made.options}))
    if not planned and not skipped:
        print(f"\nstage {decision.to} was started already: engaging experiment status {' '.join(args.study)}")
        return 0
    if planned:
        run.need_fit(root, planned, args.no_check)
    print()
    code = records.keep_code(root) if planned else {}
    made = [records.create(root, experiment, code) for experiment in planned]
    return run.start(root, [*made, *(gate.open_again(experiment) for experiment in skipped)])


def _all_skipped(experiment: Experiment) -> bool:
    from tools.experiments import collect

    return all(verdict.state == "skipped" for verdict in collect.verdicts(experiment))


def _executor(args: argparse.Namespace, like: Experiment) -> str:
    return like.executor if args.executor == "auto" else args.executor


def _configurations(root: Path, members: list[Experiment]) -> list:
    """Configurations of all stages: beside those that were run (the folder above theirs), then the ones that ship."""
    folders = [(root / e.config_file).parent.parent for e in members if e.config_file]
    found = []
    for folder in dict.fromkeys([*folders, root / CONFIGS]):
        paths = (
            [p for p in sorted(folder.glob("*/*.json")) if not p.name.startswith(".")]
            if folder.is_dir()
            else []
        )
        for path in paths:
            try:
                found.append((path, study.load(path)))
            except UserError:
                continue  # another kind of JSON file beside them
    return found


def _as_json(decision: Decision, results: list[Result], lines: list[str]) -> dict:
    labels = {result.variant: result.label for result in results}
    return {
        "stage": decision.stage,
        "to": decision.to,
        "advance": [labels[variant] for variant in decision.advance],
        "verdict": decision.verdict,
        "findings": [
            {
                "variant": finding.result.label,
                "experiment": finding.result.name,
                "mean": finding.mean,
                "std": finding.std,
                "passed": finding.passed,
                "set_back": finding.set_back,
                "rules": [{"rule": rule, "text": text, "passed": ok} for rule, text, ok in finding.reasons],
            }
            for finding in decision.findings
        ],
        "evidence": lines,
    }


def _parser() -> Parser:
    parser = Parser("experiment promote", __doc__ or "")
    add = parser.add_argument
    add("study", nargs="*", metavar="STUDY", help="a study, experiments, configurations")
    add("--stage", choices=("A", "B"), help="the stage to judge; default: the newest")
    add(
        "--advance",
        type=whole("--advance", 1, 2),
        default=1,
        help="at most this many from stage A (default 1)",
    )
    add("--price", type=price, help="a GPU-hour's price: 2.5, or by type: h100=2.99,l40s=0.80")
    add("--n-runs", type=whole("--n-runs", 1, 1000), help="seeds at the next stage")
    add("--n-gpus", type=whole("--n-gpus", 0, 1024), help="GPUs of a run at the next stage")
    add("--rules", action="store_true", help="print the rules")
    add("--run", action="store_true", help="start the next stage")
    add("--json", action="store_true")
    add_execution(parser)
    return parser
