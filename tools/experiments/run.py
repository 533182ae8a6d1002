"""`engaging experiment run`: configurations become experiments, and their runs are started.

    engaging experiment run --config palm_screening.json --n-runs 2 --dry-run
    engaging experiment run --config tools/experiments/configs/stage_a_screening --study palm
    engaging experiment run --config MINE.json --n-gpus 0 -- --device=cpu

--config may be given several times and may be a folder. Variants take turns (run 0 of each, then run 1), so that a
slow hour of the machine meets all of them. Stages follow each other; at each the rules of `promote` decide which
variants go on (--all: every one does). What stands after a lone -- goes to the trainer of every run.
"""

import argparse
import contextlib
import json
import os
import shlex
import sys
import time
from dataclasses import replace
from pathlib import Path

from nanogpt.common.errors import UserError
from tools.args import Parser, counted, name_of, whole
from tools.experiments import collect, gate, records, study, trainer
from tools.experiments.config import ExperimentConfig
from tools.experiments.execute import Executor, Pair, need_room, run_command, seed_of, together
from tools.experiments.flags import add_execution, options
from tools.experiments.records import SHELF, Experiment
from tools.launch import environment
from tools.launch.presets import Target, ask_trainer, check_overrides
from tools.place import checkout
from tools.site import slurm

OWN = {
    "seed": "base_seed of the configuration + run",
    "out_dir": "each run has its folder in experiment_logs",
    "auto_resume": "engaging experiment resume goes on with what is missing",
    "check": "before anything starts it asks the trainer to check; --dry-run shows the commands",
}  # flags of the trainers that nobody else says


def main(argv: list[str], sweep: bool = False) -> int:
    """The command; `sweep`: with the configurations of a sweep, whose final comparison may be made again."""
    cut = argv.index("--") if "--" in argv else len(argv)
    args = _parser().read(argv[:cut])
    for word in argv[cut + 1 :]:
        name = word[2:].partition("=")[0].replace("-", "_")
        if name in OWN:
            raise UserError(f"--{name}: the runner sets it: {OWN[name]}")
    overrides = check_overrides(argv[cut + 1 :])
    root = checkout()
    planned = prepare(root, args, overrides)
    if not sweep:
        study.refuse_twice(root, args.study or "", [experiment.config for experiment in planned])
    if not args.all:
        _refuse_no_baseline([experiment.config for experiment in planned])
    if args.dry_run:
        check_flags(environment.environment_python(), root, planned)
        return _dry_run(root, args, planned)
    need_fit(root, planned, args.no_check)
    made: list[Experiment] = []
    code = records.keep_code(root)
    if code["dirty"]:
        print(
            f"note: no commit holds {counted(code['changed_files'], 'changed file')} of this clone; the runs' copy of "
            "the code has them: commit before runs that you want to repeat"
        )
    for experiment in planned:
        letter = experiment.config.letter
        before = [e.name for e in made if "" < e.config.letter < letter] if not args.all else []
        made.append(records.create(root, replace(experiment, gate=tuple(before)), code))
        print(f"{made[-1].name}: {counted(len(experiment.runs), 'run')} in {SHELF}/{made[-1].name}")
    return start(root, made)


def prepare(root: Path, args: argparse.Namespace, overrides: list[str]) -> list[Experiment]:
    """The experiments that the flags and configurations ask for; nothing is written yet."""
    loaded = study.load_all(root, args.config)
    _refuse_two_baselines(loaded)
    executor = args.executor
    if executor == "auto":
        executor = "slurm" if slurm.cluster_here() else "local"
        if executor == "local" and slurm.available():
            said = "SLURM's commands are here, but no cluster is configured for them: this machine runs it"
            print(f"note: {said}", file=sys.stderr)
    if executor == "slurm":
        slurm.need_slurm("--executor=slurm")
    name = args.study or (f"study_{time.strftime('%Y%m%d_%H%M%S')}" if len(loaded) > 1 else "")
    return [
        make(root, path, config, executor=executor, study=name, args=args, overrides=overrides)
        for path, config in loaded
    ]


def _refuse_two_baselines(loaded: list[tuple[Path, ExperimentConfig]]) -> None:
    """UserError when nobody could say which of a stage's experiments the variants are held against."""
    found: dict[str, ExperimentConfig] = {}
    for path, config in loaded:
        if not config.letter or not config.is_baseline:
            continue
        other = found.setdefault(config.letter, config)
        if other.variant != config.variant:
            raise UserError(
                f"{path}: modification_type: {config.modification_type}: {other.experiment_name} is stage "
                f"{config.letter}'s baseline already; say what this one changes, such as hyperparameter"
            )


def _refuse_no_baseline(configs: list[ExperimentConfig]) -> None:
    """UserError when a stage that another one waits for has nothing that its variants are held against."""
    letters = sorted({config.letter for config in configs if config.letter})
    for letter in letters[:-1]:
        here = [config for config in configs if config.letter == letter]
        if not any(config.is_baseline or config.baseline_val_loss is not None for config in here):
            raise UserError(
                f"{here[0].experiment_name}: stage {letter} has no baseline, so nothing could go on to stage "
                f"{letters[letters.index(letter) + 1]}: give the baseline's configuration too, or --all"
            )


def make(
    root: Path,
    path: Path,
    config: ExperimentConfig,
    *,
    executor: str,
    study: str,
    args: argparse.Namespace,
    overrides: list[str],
) -> Experiment:
    """One experiment as it would be created."""
    found = trainer.find(root, config, str(path))
    if args.one_job and not found.takes_plan:
        raise UserError(f"--one-job: {found.script} has no --plan; leave it out, or use {trainer.SMALL}")
    config = trainer.as_of_old(config, found)
    trainer.flags(config, found)  # refuses what cannot be a flag
    config, overrides = trainer.staged(config, overrides)
    gpus = config.n_gpus if args.n_gpus is None else args.n_gpus
    config = config.model_copy(update={"n_runs": config.runs(args.n_runs), "n_gpus": gpus})
    folder = root / SHELF / f"{config.experiment_name}_TIMESTAMP"
    return Experiment(
        folder, config, found, gpus, study, tuple(overrides), executor, args.one_job,
        os.path.relpath(path, root), options=options(args),
    )  # fmt: skip


def need_fit(root: Path, planned: list[Experiment], no_check: bool) -> None:
    """UserError for what can be known before anything starts: the machine, the flags, the trainer's own check."""
    python = environment.need_environment()
    local = [experiment for experiment in planned if experiment.executor == "local"]
    if local:
        from tools.launch.local import local_gpus

        here, most = local_gpus(), max(experiment.gpus for experiment in local)
        if most > here:
            remedy = f"--n-gpus {here} uses what is here" if here else "--n-gpus 0 runs on the CPU"
            raise UserError(
                f"n_gpus={most}: this machine has {counted(here, 'GPU')}; {remedy}, --executor slurm queues it"
            )
    for group in groups(planned):
        together = [e for e in group if e.one_job]
        if len({(e.trainer.script, str(e.config.hyperparameters.get("preset"))) for e in together}) > 1:
            raise UserError("--one-job: all configurations of a stage must have one script and one preset")
    if planned[0].executor == "slurm":
        from tools.experiments import queue

        cluster = queue.ask_cluster()
        for group in groups(planned):
            queue.option_for(group[0], cluster, root, sum(len(e.runs) for e in group), group[0].one_job)
    if no_check:
        return
    check_flags(python, root, planned)
    for experiment in groups(planned)[0]:
        if not experiment.trainer.run_directory:
            continue
        module = experiment.trainer.script.removesuffix(".py").replace("/", ".")
        words = [*trainer.flags(experiment.config, experiment.trainer), *experiment.overrides]
        variables = trainer.variables(experiment.config, experiment.trainer, experiment.config.base_seed)
        surroundings = {**environment.job_environment(), **variables}
        if "check" in (root / experiment.trainer.script).read_text(encoding="utf-8", errors="replace"):
            try:
                ask_trainer(python, root, Target(module, module, ()), words, surroundings)
            except UserError as error:
                raise UserError(f"{experiment.config_file}: its trainer says: {error}") from None


def check_flags(python: Path | None, root: Path, planned: list[Experiment]) -> None:
    """UserError for a key that the trainer has no flag for; nothing without an environment to ask it in."""
    known: dict[str, list[str]] = {}
    for experiment in planned if python else []:
        found = experiment.trainer
        if found.run_directory and found.script not in known:
            known[found.script] = trainer.flags_of(python, root, found.script)
        trainer.check_flags(known.get(found.script, []), experiment.config, found, experiment.config_file)


def groups(experiments: list[Experiment]) -> list[list[Experiment]]:
    """By stage and GPUs, in the order of the stages."""
    found: dict[tuple, list[Experiment]] = {}
    for experiment in experiments:
        found.setdefault((experiment.config.letter, experiment.gpus), []).append(experiment)
    return [found[key] for key in sorted(found)]


def in_turn(experiments: list[Experiment]) -> list[Pair]:
    """Every run of every experiment: run 0 of each, then run 1 of each."""
    most = max(len(experiment.runs) for experiment in experiments)
    return [(e, run) for run in range(most) for e in experiments if run < len(e.runs)]


def start(root: Path, made: list[Experiment], only: set | None = None) -> int:
    """Start the runs, stage after stage. `only`: (experiment's name, run_id) to start, the others are left alone."""
    stages = groups(made)
    if made[0].executor == "slurm":
        return _start_slurm(root, stages, only)
    return _start_here(root, stages, only)


def _chosen(group: list[Experiment], only: set | None) -> list[Pair]:
    return [(e, run) for e, run in in_turn(group) if only is None or (e.name, run) in only]


def _start_slurm(root: Path, stages: list[list[Experiment]], only: set | None) -> int:
    from tools.experiments import queue

    after: list[str] = []
    letter, ids = stages[0][0].config.letter, []
    for group in stages:
        if group[0].config.letter != letter:
            letter, after, ids = group[0].config.letter, ids, []
        pairs = _chosen(group, only)
        if pairs:
            ids += queue.submit_runs(root, launch_name(group), pairs, together=group[0].one_job, after=after)
    what = made_name(stages)
    print(f"next: engaging experiment status {what}")
    return 0


def launch_name(group: list[Experiment]) -> str:
    """The name of a group's job: the experiment's, or the study's with its stage."""
    first = group[0]
    if len(group) == 1 or not first.study:
        return first.name[:64]
    suffix = f"-{first.config.letter}" if first.config.letter else ""
    hardware = f"{first.gpus}gpu" if first.gpus else "cpu"
    return f"{first.study}{suffix}-{hardware}"[:64]


def made_name(stages: list[list[Experiment]]) -> str:
    """What to call the study on a command line."""
    first = stages[0][0]
    return first.study or first.name


def _start_here(root: Path, stages: list[list[Experiment]], only: set | None) -> int:
    """One run after the other on this machine. Locks say to others that these experiments are being run."""
    python = environment.need_environment()
    extra = environment.for_run(root, python, 0)
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        extra["CUDA_VISIBLE_DEVICES"] = os.environ["CUDA_VISIBLE_DEVICES"]
    executor = Executor(root, environment.job_environment(extra), say=lambda text: print(text, flush=True))
    status, earlier = 0, list[Experiment]()
    with contextlib.ExitStack() as held:
        for experiment in [e for group in stages for e in group]:
            need_room(experiment.folder)
            if not held.enter_context(records.lock(experiment.folder, ".running", wait=False)):
                raise UserError(
                    f"{experiment.name}: another process is running it; engaging experiment status {experiment.name}"
                )
        executor.listen()
        for group in stages:
            status = _run_group(executor, gate.through(group), only) or status
            if not executor.stopped and (again := gate.pivot(earlier, group)):
                status = _run_group(executor, again, only) or status
            if executor.stopped:
                break
            earlier += group
    everything = [e for group in stages for e in group]
    for experiment in everything:
        collect.collect(experiment)
        text = collect.summary_text(experiment)
        if text:
            print(f"\n{experiment.name}\n{text}", flush=True)
    if executor.stopped:
        print(f"\nstopped ({executor.stopped}); go on with: engaging experiment resume {made_name(stages)}")
    elif not status:
        print(f"\nnext: {what_next(everything, made_name(stages))}")
    return status


def what_next(experiments: list[Experiment], name: str) -> str:
    """The command that follows when all of these have ended: the newest stage's rules, the choice, or the answer."""
    from tools.experiments.sweep import trial_of

    if trials := {trial_of(experiment.folder) for experiment in experiments} - {""}:
        return f"engaging experiment sweep {trials.pop()}"
    staged = max(experiment.config.letter for experiment in experiments) in ("A", "B")
    return f"engaging experiment promote {name}" if staged else f"engaging analyze {name}"


def _run_group(executor: Executor, group: list[Experiment], only: set | None) -> int:
    pairs = _chosen(group, only) if group else []
    if pairs and group[0].one_job:
        plan = pairs[0][0].folder / "runs" / f"plan-{time.strftime('%Y%m%d_%H%M%S')}.json"
        return executor.run_together(pairs, plan)
    return executor.run_each(pairs) if pairs else 0


def _dry_commands(root: Path, group: list[Experiment]) -> list[str]:
    """The command of every run; with --one-job the one command, and what its plan would hold."""
    in_job, pairs = group[0].executor == "slurm", in_turn(group)
    if group[0].one_job:
        words, entries = together(pairs, group[0].folder / "runs" / "plan-TIMESTAMP.json")
        plan = [f"#   {json.dumps(entry)}" for entry in entries]
        return [
            f"# {counted(len(pairs), 'run')} in one process:",
            _typed(root, *run_command(group[0], words, in_job)),
            "# and its plan:",
            *plan,
        ]
    lines = []
    for experiment, run_id in pairs:
        config, found, seed = experiment.config, experiment.trainer, seed_of(experiment, run_id)
        words = trainer.words(config, found, list(experiment.overrides), seed, experiment.run_folder(run_id))
        command, more = run_command(experiment, words, in_job)
        lines.append(_typed(root, command, {**trainer.variables(config, found, seed), **more}))
    return lines


def _typed(root: Path, command: list[str], variables: dict[str, str]) -> str:
    """A command with its variables as one would type it in the root of the clone."""
    named = [f"{name}={value}" for name, value in variables.items()]
    return " ".join([*named, shlex.join([word.replace(f"{root}/", "") for word in command])])


def _dry_run(root: Path, args: argparse.Namespace, planned: list[Experiment]) -> int:
    """Print what would be run, word for word; nothing is written."""
    for group in groups(planned):
        for experiment in group:
            config = experiment.config
            stage = f", stage {config.stage}" if config.stage else ""
            print(f"# {config.experiment_name}: {config.label}{stage}, {counted(len(experiment.runs), 'run')}, "
                  f"{counted(experiment.gpus, 'GPU')}, {experiment.executor}")  # fmt: skip
            print(f"# output: {SHELF}/{experiment.name}/")
        for line in _dry_commands(root, group):
            print(line)
        if group[0].executor == "slurm":
            from tools.experiments import queue

            print(queue.dry_script(root, launch_name(group), in_turn(group), group[0].one_job, []), end="")
    print("nothing was started; the same line without --dry-run does it")
    return 0


def _parser() -> Parser:
    parser = Parser(
        "experiment run",
        __doc__ or "",
        usage="engaging experiment run --config FILE [options] [-- TRAINER FLAGS]",
    )
    add = parser.add_argument
    add(
        "--config",
        action="append",
        required=True,
        metavar="FILE",
        help="a configuration, or a folder of them",
    )
    add("--n-runs", type=whole("--n-runs", 1, 1000), help="seeds of each; default: the configuration's")
    add(
        "--n-gpus",
        type=whole("--n-gpus", 0, 1024),
        help="GPUs of a run; 0: the CPU; default: the configuration's",
    )
    add("--study", type=name_of("--study"), help="a name for all of it; default: the time")
    add("--all", action="store_true", help="no promotion: every variant runs at every stage")
    add("--dry-run", action="store_true", help="print every command (and the batch scripts) and stop")
    add_execution(parser)
    return parser
