"""`engaging experiment status|resume STUDY`: what is finished, what is on its way and why not yet, what is missing.

`resume` starts exactly the (variant, seed) pairs that have neither ended nor are in the queue or running. A run that
failed by its own doing is a result and stays one; --retry-failed says otherwise, and the retry is written down.
"""

import argparse
import contextlib
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from nanogpt.common import lease
from nanogpt.common.errors import UserError
from tools.args import Parser, whole
from tools.experiments import collect, gate, records, run, study
from tools.experiments.collect import Verdict
from tools.experiments.records import Experiment
from tools.place import checkout
from tools.site import slurm
from tools.site.slurm import SlurmUnreachable

MOST_LINES = 40
ENDED = ("finished", "failed", "skipped")


@dataclass(frozen=True)
class Standing:
    """One run: its verdict, and what is on its way.

    `state`: finished, failed, skipped, running, queued, missing; unknown where SLURM does not answer.
    """

    experiment: str
    run_id: int
    seed: int
    state: str
    note: str
    step: int | None
    val_loss: float | None
    job: str = ""


def standings(root: Path, experiments: list[Experiment], only_looking: bool = False) -> list[Standing]:
    """Every run of every experiment. What has ended meanwhile is collected first.

    Raises SlurmUnreachable when runs were submitted and the queue cannot be seen: nobody may start anything then.
    `only_looking`: their state is "unknown" instead.
    """
    from tools.experiments import queue

    submitted = [e for e in experiments if (e.folder / "launches.jsonl").is_file()]
    places, blind = {}, set()
    if submitted and slurm.available():
        try:
            places = queue.places(root, submitted)
        except SlurmUnreachable:
            if not only_looking:
                raise
            blind = {experiment.name for experiment in submitted}
    # The runs are looked at last: one that ends meanwhile is finished, not gone from the queue and missing.
    found = []
    for experiment in experiments:
        with records.lock(experiment.folder, ".running", wait=False) as free:
            busy = not free
        writers = {run_id: _writer(experiment.run_folder(run_id)) for run_id, _ in experiment.runs}
        for verdict in collect.collect(experiment):
            place = places.get((experiment.name, verdict.run_id))
            standing = _standing(experiment, verdict, place, writers[verdict.run_id], busy)
            if standing.state == "missing" and experiment.name in blind:
                standing = replace(
                    standing, state="unknown", note="SLURM does not answer; try again in a minute"
                )
            found.append(standing)
    return found


def _standing(experiment: Experiment, verdict: Verdict, place, writer: int, busy: bool) -> Standing:
    state, note, job = verdict.state, verdict.note, place.job if place else ""
    if state in ("new", "unfinished"):
        step = "" if verdict.step is None else f"at step {verdict.step}"
        if place is not None and place.active:
            waits = verdict.state == "new" and experiment.one_job and not place.why
            state = "queued" if waits or place.state in ("PENDING", "UNKNOWN") else "running"
            why = place.why or ("its turn comes" if waits else "")
            note = f"job {place.job}" + (f": {why}" if why else "") + (f", {step}" if step else "")
        elif writer:
            state, note = "running", f"process {writer} of this machine" + (f", {step}" if step else "")
        elif busy:
            state, note = ("running", step) if verdict.state == "unfinished" else ("queued", "its turn comes")
        else:
            ended = f"job {place.job}: {place.why}" if place is not None else ""
            state, note = "missing", "; ".join(text for text in (note, ended) if text) or "not started"
    return Standing(
        experiment.name, verdict.run_id, verdict.seed, state, note, verdict.step, verdict.val_loss, job
    )


def _writer(folder: Path) -> int:
    """The process of this machine that writes a run, 0 for none: a trainer may outlive the runner that started it."""
    try:
        lease.refuse_live(folder)
    except UserError:
        holder = lease.read(folder)
        return holder.pid if holder else 0
    return 0


def status(argv: list[str]) -> int:
    """`engaging experiment status STUDY`."""
    parser = Parser("experiment status", "What is finished, failed, running, queued (and why), missing.")
    parser.add_argument("study", nargs="+", metavar="STUDY", help="a study, an experiment, configurations")
    parser.add_argument("--json", action="store_true")
    args = parser.read(argv)
    root = checkout()
    experiments = study.experiments(root, args.study)
    found = standings(root, experiments, only_looking=True)
    if args.json:
        print(json.dumps([asdict(standing) for standing in found], indent=1))
        return 0
    show(experiments, found)
    missing = sum(standing.state == "missing" for standing in found)
    if missing:
        print(f"\n{missing} missing: engaging experiment resume {' '.join(args.study)}")
    elif all(standing.state in ENDED for standing in found):
        print(f"\nnext: {run.what_next(experiments, ' '.join(args.study))}")
    return 0


def show(experiments: list[Experiment], found: list[Standing]) -> None:
    """The table, then a line for each run that is not finished."""
    states = ("finished", "failed", "running", "queued", "missing", "skipped")
    rows = [("experiment", "stage", "runs", *states, "mean val loss")]
    for experiment in experiments:
        mine = [standing for standing in found if standing.experiment == experiment.name]
        counts = [str(sum(s.state == state for s in mine) or ".") for state in states]
        losses = [s.val_loss for s in mine if s.state == "finished" and s.val_loss is not None]
        mean = f"{sum(losses) / len(losses):.4f} (n={len(losses)})" if losses else ""
        rows.append((experiment.name, experiment.config.letter or "-", str(len(mine)), *counts, mean))
    table(rows)
    others = [standing for standing in found if standing.state != "finished"]
    for standing in others[:MOST_LINES]:
        where = f"{standing.experiment} run {standing.run_id} seed {standing.seed}"
        print(f"  {where}: {standing.state}" + (f": {standing.note}" if standing.note else ""))
    if len(others) > MOST_LINES:
        print(f"  ... and {len(others) - MOST_LINES} more")


def table(rows: list[tuple[str, ...]]) -> None:
    """Rows in columns."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def resume(argv: list[str]) -> int:
    """`engaging experiment resume STUDY`."""
    parser = Parser("experiment resume", __doc__ or "")
    add = parser.add_argument
    add("study", nargs="+", metavar="STUDY", help="a study, an experiment, configurations")
    add("--executor", choices=("same", "local", "slurm"), default="same", help="default: as it was started")
    add("--n-runs", type=whole("--n-runs", 1, 1000), help="more seeds than were planned")
    add("--retry-failed", action="store_true", help="run failed ones again; summary.json names them")
    add("--skipped", action="store_true", help="also runs whose variant was not promoted")
    add("--dry-run", action="store_true", help="say what would be started")
    args = parser.read(argv)
    root = checkout()
    with contextlib.ExitStack() as held:
        experiments = study.experiments(root, args.study)
        for experiment in experiments:  # two that look at once would both start what is missing
            if not held.enter_context(records.lock(experiment.folder, ".resume", wait=False)):
                raise UserError(
                    f"{experiment.name}: another resume is at work on it; engaging experiment status "
                    f"{experiment.name} shows what it does"
                )
        return _resume(root, experiments, args)


def _resume(root: Path, experiments: list[Experiment], args: argparse.Namespace) -> int:
    experiments = [_as_asked(experiment, args) for experiment in experiments]
    found = standings(root, experiments)
    wanted = (
        {"missing"} | ({"failed"} if args.retry_failed else set()) | ({"skipped"} if args.skipped else set())
    )
    only = {(s.experiment, s.run_id) for s in found if s.state in wanted}
    if not only:
        show(experiments, found)
        print("\nnothing is missing: nothing was started")
        return 0
    for standing in found:
        if (standing.experiment, standing.run_id) in only:
            print(
                f"to start: {standing.experiment} run {standing.run_id} seed {standing.seed} ({standing.note})"
            )
    if args.dry_run:
        print("nothing was started; the same line without --dry-run does it")
        return 0
    experiments = [_make_ready(experiment, found, only) for experiment in experiments]
    chosen = [e for e in experiments if any(name == e.name for name, _ in only)]
    statuses = [
        run.start(root, [e for e in chosen if e.executor == executor], only=only)
        for executor in ("slurm", "local")
        if any(e.executor == executor for e in chosen)
    ]
    return max(statuses)


def _as_asked(experiment: Experiment, args: argparse.Namespace) -> Experiment:
    """The experiment with more runs, or another executor, when the flags say so."""
    if args.executor == "slurm":
        slurm.need_slurm("--executor=slurm")
    executor = experiment.executor if args.executor == "same" else args.executor
    config = experiment.config
    if args.n_runs is not None:
        if args.n_runs < len(experiment.runs):
            raise UserError(
                f"--n-runs={args.n_runs}: {experiment.name} has {len(experiment.runs)} runs already; runs are "
                "added, never taken away"
            )
        config = config.model_copy(update={"n_runs": args.n_runs})
    options = experiment.options
    if len(config.seeds()) > len(experiment.runs):  # whoever reads the result later should know
        options = {"planned_first": len(experiment.runs), **options}
    changed = replace(experiment, config=config, executor=executor, options=options)
    if changed != experiment and not args.dry_run:
        changed.save()
        changed.log(f"{len(changed.runs)} runs, executor {executor} from here on")
    return changed


def _make_ready(experiment: Experiment, found: list[Standing], only: set) -> Experiment:
    """Put aside what stands in the way of a run that is started again on purpose."""
    for standing in found:
        if standing.experiment != experiment.name or (standing.experiment, standing.run_id) not in only:
            continue
        if standing.state == "failed":
            collect.forget_failure(experiment, standing.run_id)
        elif standing.state == "skipped" and experiment.gate:
            experiment = gate.open_again(experiment)
        stop = experiment.run_folder(standing.run_id) / "stop"
        if stop.exists():
            stop.unlink()
    experiment.log(f"resume: {sum(name == experiment.name for name, _ in only)} runs to start")
    return experiment
