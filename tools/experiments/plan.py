"""`engaging experiment plan STUDY`: how many runs, in which waves, how many GPU-hours, what it costs, when it ends.

    engaging experiment plan tools/experiments/configs --price h100=2.99
    engaging experiment plan palm                 what is left of a study that has begun

With SLURM, limits, starts and waves are asked of the live cluster. Times of runs are those that were measured here,
else scaled from them, else the time limit (and said to be that). --minutes is your own estimate for a run.
"""

import argparse
import json
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timedelta
from pathlib import Path

from nanogpt.common.errors import UserError
from tools.args import Parser, counted, minutes, whole, words
from tools.experiments import costs, run, status, study
from tools.experiments.flags import add_execution, price
from tools.experiments.records import Experiment
from tools.place import checkout
from tools.site import slurm


@dataclass
class Row:
    """One stage's experiments with the same GPUs. Minutes and GPU-hours are of all runs that are left."""

    stage: str
    experiments: list[str]
    runs: int
    left: int
    gpus: int
    gpu_type: str | None
    partition: str
    at_once: int
    waves: int
    minutes: float
    gpu_hours: float  # without GPUs: hours of the CPU
    cost: float | None  # None: no price is known, or there is no GPU to pay for
    source: str
    start: str | None
    end: str | None
    problem: str = ""
    usual: bool = False  # `cost` is the staged workflow's, nobody has set a price


def main(argv: list[str]) -> int:
    """The command. Exit status 1 when a stage cannot start here."""
    args = _parser().read(argv)
    root = checkout()
    planned, left = _experiments(root, args)
    rows = _rows(root, args, planned, left)
    if args.json:
        print(json.dumps([asdict(row) for row in rows], indent=1))
    else:
        _show(rows, args)
    return 1 if any(row.problem for row in rows) else 0


def _experiments(root: Path, args: argparse.Namespace) -> tuple[list[Experiment], dict[str, int]]:
    """(experiments, runs left of each by name): of configurations all runs, of a study what is missing."""
    if all(study.is_config(root, word) for word in args.study):
        args.config, args.one_job = args.study, args.one_job
        loaded = argparse.Namespace(**{**vars(args), "study": None})
        planned = run.prepare(root, loaded, [])
        return planned, {experiment.name: len(experiment.runs) for experiment in planned}
    planned = study.experiments(root, args.study)
    open_states = ("missing", "queued", "running")
    left = {experiment.name: 0 for experiment in planned}
    for standing in status.standings(root, planned):
        left[standing.experiment] += standing.state in open_states
    return planned, left


def _rows(root: Path, args: argparse.Namespace, planned: list[Experiment], left: dict[str, int]) -> list[Row]:
    known, past = costs.prices(args.price), costs.history(root)
    cluster = None
    if args.executor != "local" and slurm.cluster_here():
        from tools.site.cluster import ask_cluster

        cluster = ask_cluster()
    rows, begin = [], datetime.now()
    for group in run.groups(planned):
        row = _row(root, args, group, left, past, known, cluster, begin)
        rows.append(row)
        if row.end and not row.problem:
            begin = max(begin, datetime.fromisoformat(row.end))
    return rows


def _row(root, args, group, left, past, known, cluster, begin) -> Row:
    from tools.experiments.queue import arguments

    first, todo = group[0], sum(left[e.name] for e in group)
    limit = arguments(first, 1).time
    found = [costs.estimate(e.config, e.gpus, past, limit) for e in group]
    if args.minutes:
        found = [costs.Estimate(max(first.gpus, 1) * args.minutes / 60, "your estimate")] * len(group)
    if first.executor == "local":
        guess = f"a guess of {words(limit)} a run, none was measured here: --minutes says it better"
        found = [replace(f, source=guess) if f.source == costs.LIMIT else f for f in found]
    hours = sum(f.gpu_hours * left[e.name] for f, e in zip(found, group, strict=True))
    each = hours / todo / max(first.gpus, 1) * 60 if todo else 0.0
    row = Row(
        first.config.letter, [e.config.experiment_name for e in group], sum(len(e.runs) for e in group), todo,
        first.gpus, first.options.get("gpu_type"), "this machine", 1, todo, each * todo, hours, None,
        ", ".join(sorted({f.source for f in found})), None, None,
    )  # fmt: skip
    if cluster is not None and todo:
        _ask(root, row, first, todo, each, cluster, begin)
    elif todo:
        row.start, row.end = _times(begin, row.minutes)
    if cluster is None and first.executor == "local" and first.gpus:
        from tools.launch.local import local_gpus

        here = local_gpus()
        if first.gpus > here:
            has = counted(here, "GPU")
            row.problem = f"needs {counted(first.gpus, 'GPU')}, this machine has {has} (--n-gpus 0: the CPU)"
    cost = costs.price_of(known, row.gpu_type) if first.gpus else None
    row.cost = None if cost is None else round(hours * cost, 2)
    each_run = costs.usual(row.stage, row.gpus) if known is None and first.gpus else None
    if each_run is not None:
        row.cost, row.usual = round(each_run * todo, 2), True
    return row


def _ask(root: Path, row: Row, first: Experiment, todo: int, each: float, cluster, begin: datetime) -> None:
    """Fill in what the cluster says: where, how many at once, from when."""
    from tools.experiments.queue import arguments, option_for
    from tools.launch.request import fitting_throttle
    from tools.site.plan import ask_starts

    try:
        option = option_for(first, cluster, root, todo, first.one_job)
        args = arguments(first)
        args.seeds = 1 if first.one_job else todo
        row.at_once = min(fitting_throttle(args, cluster, option), option.room or 1)
    except UserError as error:
        row.problem = str(error)
        return
    if option.start is None:
        ask_starts([option])
    row.partition, row.gpu_type = option.partition, option.request.gpu_type
    row.waves = -(-args.seeds // row.at_once)
    row.minutes = row.waves * each * (todo if first.one_job else 1)
    row.start, row.end = _times(max(begin, option.start or begin), row.minutes)


def _times(start: datetime, length: float) -> tuple[str, str]:
    end = start + timedelta(minutes=length)
    return start.isoformat(timespec="minutes"), end.isoformat(timespec="minutes")


def _show(rows: list[Row], args: argparse.Namespace) -> None:
    on_gpus = any(row.gpus for row in rows)
    unit = "GPU-hours" if on_gpus else "CPU hours"
    head = ("stage", "experiments", "runs", "left", "GPUs", "where", "at once", "waves", unit, "cost", "ends")
    table = [head]
    for row in rows:
        gpu = f"{row.gpus} {row.gpu_type or ''}".strip() if row.gpus else "CPU"
        cost = f"${row.cost:.2f}" if row.cost is not None else "-"
        end = f"{datetime.fromisoformat(row.end):%a %H:%M}" if row.end and not row.problem else "-"
        where = "cannot start" if row.problem else row.partition
        table.append(
            (row.stage or "-", str(len(row.experiments)), str(row.runs), str(row.left), gpu, where,
             str(row.at_once), str(row.waves), f"{row.gpu_hours:.3g}", cost, end)
        )  # fmt: skip
    status.table(table)
    for row in rows:
        if row.problem:
            print(f"stage {row.stage or '-'}: {row.problem}")
        elif row.left:
            cpu = "; on the CPU: its hours cost no GPU" if on_gpus and not row.gpus else ""
            print(f"stage {row.stage or '-'}: {words(row.minutes)} from its start; times: {row.source}{cpu}")
    paid = [row for row in rows if row.gpus] or rows
    hours, prices = sum(row.gpu_hours for row in paid), [row.cost for row in paid]
    total = f", ${sum(prices):.2f}" if prices and None not in prices else ""
    print(f"all of it: {sum(row.left for row in rows)} runs, {hours:.3g} {unit}{total}")
    stages = {row.stage for row in rows}
    if {"A", "C"} <= stages:
        _show_staged(rows, unit)
    if any(row.usual for row in rows):
        _show_usual(rows)
    known = costs.prices(args.price)
    unpriced = sorted({row.gpu_type or "" for row in rows if row.gpus and row.cost is None and row.left})
    if known and unpriced:
        print(f"no price for {', '.join(unpriced) or 'these GPUs'}: --price {unpriced[0] or 'h100'}=...")
    if known is None and unpriced:
        print("cost: --price 2.50 (a GPU-hour), or --price h100=2.99,l40s=0.80, or ENGAGING_GPU_PRICES")


def _show_staged(rows: list[Row], unit: str) -> None:
    """What promotion leaves of it: all at A, then the baseline and one variant."""
    spent, full, money, money_full = 0.0, 0.0, 0.0, 0.0
    for row in rows:
        part = 1.0 if row.stage == "A" else min(1.0, 2 / len(row.experiments))
        spent, money = spent + part * row.gpu_hours, money + part * (row.cost or 0)
        if row.stage == "C":
            full, money_full = full + row.gpu_hours, money_full + (row.cost or 0)
    priced = all(row.cost is not None for row in rows)
    costs_text = f", ${money:.2f} against ${money_full:.2f}" if priced else ""
    print(
        f"with promotion (A in full, then the baseline and one variant): {spent:.3g} {unit}, against {full:.3g} "
        f"for every variant in full at C{costs_text}"
    )


def _show_usual(rows: list[Row]) -> None:
    """Where the money comes from, and the budget of one variant alone at B and C."""
    said = ", ".join(f"{letter} ${cost:.2f}" for letter, (_, cost) in costs.USUAL.items())
    print(f"cost: the staged workflow's own, {said} a run; --price sets yours")
    by_stage = {row.stage: row for row in rows if row.usual}
    if set(by_stage) == {"A", "B", "C"} and all(row.left == row.runs for row in by_stage.values()):
        full = by_stage["C"].cost or 0.0
        alone = (by_stage["A"].cost or 0.0) + sum(
            (by_stage[letter].cost or 0.0) / len(by_stage[letter].experiments) for letter in "BC"
        )
        saved = 1 - (alone + costs.RESERVE) / full
        budget = f"${alone:.2f} and ${costs.RESERVE:.2f} for a pivot, {saved:.0%} less than ${full:.2f}"
        print(f"one variant alone at B and C, against typed numbers: {budget}")


def _parser() -> Parser:
    parser = Parser("experiment plan", __doc__ or "")
    add = parser.add_argument
    add(
        "study", nargs="+", metavar="STUDY", help="configurations (files, folders), or a study that has begun"
    )
    add("--n-runs", type=whole("--n-runs", 1, 1000), help="seeds of each; default: the configuration's")
    add("--n-gpus", type=whole("--n-gpus", 0, 1024), help="GPUs of a run; default: the configuration's")
    add("--minutes", type=minutes("--minutes"), help="your own estimate for one run: 7m, 2h")
    add("--price", type=price, help="a GPU-hour's price: 2.5, or by type: h100=2.99,l40s=0.80")
    add("--json", action="store_true")
    add_execution(parser)
    return parser
