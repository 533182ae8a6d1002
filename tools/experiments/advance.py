"""`engaging experiment promote STUDY`: which variants go on, by the written rules, and what that saved.

engaging experiment promote palm              the decision with its reasons
engaging experiment promote palm --rules      the rules themselves
engaging experiment promote palm --run        ... and start the next stage, the baseline in turn with the variant
"""

import argparse
import contextlib
import json
import shlex
from dataclasses import dataclass, field, replace
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
    with contextlib.ExitStack() as held:
        if args.run and (root / records.SHELF).is_dir():
            held.enter_context(
                records.lock(root / records.SHELF, ".promote")
            )  # two would both start what comes
        members = _with_later(root, study.experiments(root, args.study))
        decision, coming, problem = _look(root, args, members)
        if not (args.run and (decision.advance or decision.with_baseline)):
            if not args.json:
                _say_next(args, argv, decision, coming, problem)
            return 0 if decision.advance and decision.complete else 1
        if problem:
            raise problem
        made = _create(root, args, decision, coming)
    return run.start(root, made) if made else 0


def _look(
    root: Path, args: argparse.Namespace, members: list[Experiment]
) -> tuple[Decision, "Coming", UserError | None]:
    """Decide, and print the decision with its reasons and sums."""
    results = study.stage_results(members)
    decision = promote.decide(results, args.stage or "", args.advance, args.typed_baseline)
    full = [config for _, config in _configurations(root, members) if config.letter == "C"]
    lines = evidence(results, full, args.price)
    coming, problem = _next_stage(root, args, members, decision)
    sums = costs.coming(root, decision.to, coming.planned, args.price, coming.late)
    if args.json:
        print(json.dumps(_as_json(decision, results, lines, coming, sums), indent=1))
    else:
        show(decision)
        print("\n".join([*lines, *sums]))
    return decision, coming, problem


def _with_later(root: Path, members: list[Experiment]) -> list[Experiment]:
    """Of experiments that were run by their own names, not as a study: also what was started from them since."""
    if any(member.study for member in members):
        return members
    folders = [folder.resolve() for folder in records.all_in(root / records.SHELF)]
    known = {member.folder: folders.index(member.folder) for member in members if member.folder in folders}
    later = []
    for folder in folders[max(known.values(), default=len(folders)) + 1 :]:
        with contextlib.suppress(UserError):  # a damaged folder of another's is no reason to stop
            later.append(records.read(folder))
    variants, letters = {m.config.variant for m in members}, {m.config.letter for m in members}
    return members + [
        one
        for one in later
        if not one.study and one.config.letter > max(letters)
        and (one.config.variant in variants or one.config.is_baseline)
    ]  # fmt: skip


@dataclass
class Coming:
    """What a decision starts: new experiments, and skipped ones that are opened again."""

    planned: list[Experiment] = field(default_factory=list)
    skipped: list[Experiment] = field(default_factory=list)
    late: bool = False  # they come after other runs of their stage, not in turn with them


def _say_next(
    args: argparse.Namespace, argv: list[str], decision: Decision, coming: Coming, problem: UserError | None
) -> None:
    """The command that follows, or what is in its way."""
    typed = shlex.join(["engaging", "experiment", "promote", *argv])
    if problem:
        print(f"\n{problem}")
    elif coming.planned or coming.skipped:
        print(f"\nstart it: {typed} --run")
        if stated := decision.could_be_typed:
            numbers = ",".join(f"{value:g}" for value in stated if value is not None)
            print(f"or judge by what was typed: {typed} --typed-baseline {numbers}")
    elif decision.advance:
        print(f"\nstage {decision.to} has begun: engaging experiment status {' '.join(args.study)}")


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
            else "undecided"
            if not decision.complete
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


def _next_stage(
    root: Path, args: argparse.Namespace, members: list[Experiment], decision: Decision
) -> tuple[Coming, UserError | None]:
    """The chosen variants' experiments of stage `decision.to` (those that exist stay as they are), nothing written
    yet; and what is in the way, if anything is."""
    if not decision.advance and not decision.with_baseline:
        return Coming(), None
    there = {e.config.variant: e for e in members if e.config.letter == decision.to}
    coming = Coming(skipped=[there[v] for v in decision.advance if v in there and _all_skipped(there[v])])
    files = _configurations(root, members)
    here = [e for e in members if e.config.letter == decision.stage]
    like = {e.config.variant: e for e in here[::-1]}
    if args.n_gpus is None and not any(e.gpus for e in here):  # a study on the CPU stays there
        args = argparse.Namespace(**{**vars(args), "n_gpus": 0})
    try:
        wanted = [variant for variant in decision.advance if variant not in there]
        chosen = [
            _configuration(files, variant, decision.to, like.get(variant, here[0])) for variant in wanted
        ]
        if decision.with_baseline and not any(e.config.is_baseline for e in there.values()):
            chosen.append(_its_baseline(files, decision.to, here[0]))
        for path, config in chosen:
            model = like.get(config.variant, here[0])
            made = run.make(
                root, path, _alike(config, model) if decision.to == decision.stage else config,
                executor=_executor(args, model), study=model.study, args=args,
                overrides=list(model.overrides),
            )  # fmt: skip
            coming.planned.append(replace(made, options={**model.options, **made.options}))
    except UserError as error:
        return coming, error
    coming.late = decision.to == decision.stage
    return coming, None


def _configuration(files: list, variant: str, letter: str, source: Experiment) -> tuple:
    """(path, configuration) of a variant at a stage. UserError when there is none."""
    for path, config in files:
        if (config.variant, config.letter) == (variant, letter):
            return path, config
    raise UserError(
        f"{source.config.label}: no configuration of stage {letter} has its script and "
        f"hyperparameters; copy {source.config_file}, change stage, n_gpus and stage_config"
    )


def _alike(config: ExperimentConfig, model: Experiment) -> ExperimentConfig:
    """The configuration with the length, the GPUs and the seeds that its stage has had so far."""
    same = {"stage_config": model.config.stage_config, "base_seed": model.config.base_seed}
    return config.model_copy(update={**same, "n_gpus": model.gpus, "n_runs": len(model.runs)})


def _its_baseline(files: list, letter: str, source: Experiment) -> tuple:
    """The same for the baseline that nobody has run yet: the nearest one with the script of `source`."""
    script = Path(source.config.script).name
    for path, config in files:
        if config.letter == letter and config.is_baseline and Path(config.script).name == script:
            return path, config
    raise UserError(
        f"stage {letter}: no configuration is its baseline: copy {source.config_file}, change stage, n_gpus and "
        'stage_config, undo what the variant changes, and write "modification_type": "none"'
    )


def _create(root: Path, args: argparse.Namespace, decision: Decision, coming: Coming) -> list[Experiment]:
    """Create what is new, open what was skipped: what `run.start` then starts in turn."""
    if not coming.planned and not coming.skipped:
        print(f"\nstage {decision.to} was started already: engaging experiment status {' '.join(args.study)}")
        return []
    if coming.planned:
        run.need_fit(root, coming.planned, args.no_check)
    print()
    code = records.keep_code(root) if coming.planned else {}
    made = [records.create(root, experiment, code) for experiment in coming.planned]
    return [*made, *(gate.open_again(experiment) for experiment in coming.skipped)]


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


def _as_json(
    decision: Decision, results: list[Result], lines: list[str], coming: Coming, sums: list[str]
) -> dict:
    labels = {result.variant: result.label for result in results}
    return {
        "stage": decision.stage,
        "to": decision.to,
        "advance": [labels.get(variant, "baseline") for variant in decision.advance],
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
        "starts": [experiment.config.experiment_name for experiment in coming.planned + coming.skipped],
        "costs": sums,
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
    add(
        "--typed-baseline",
        type=promote.typed_numbers,
        metavar="MEAN[,STD]",
        help="the cheaper plan: run no baseline, hold the variants against these numbers; the verdict says so",
    )
    add("--price", type=price, help="a GPU-hour's price: 2.5, or by type: h100=2.99,l40s=0.80")
    add("--n-runs", type=whole("--n-runs", 1, 1000), help="seeds at the next stage")
    add("--n-gpus", type=whole("--n-gpus", 0, 1024), help="GPUs of a run at the next stage")
    add("--rules", action="store_true", help="print the rules")
    add("--run", action="store_true", help="start the next stage")
    add("--json", action="store_true")
    add_execution(parser)
    return parser
