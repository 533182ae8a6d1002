"""`engaging plan`: what can I have, from the live cluster and never from a table alone.

    engaging plan speedrun --gpus 8            who would take it, who refuses it, what can start instead
    engaging plan gpt2 --gpus 2 --seeds 12     waves under your own limits, GPU-hours, the end

For every partition and GPU type: the limits that the cluster told us, then `sbatch --test-only` for an
expected start.
"""

import argparse
import json
import re
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from pathlib import Path

from nanogpt.common.errors import UserError
from tools.args import Parser, add_request, clock, counted, folded, spoken, whole, words
from tools.launch.presets import Target, resolve
from tools.place import checkout
from tools.site import grace, slurm
from tools.site.cluster import Cluster, ask_cluster, gpu_rank
from tools.site.estimate import past, too_short
from tools.site.limits import (
    Refusal,
    Request,
    check_account,
    check_gpu_type,
    gpu_cap,
    own_wait,
    refusals,
    room,
)
from tools.site.profile import Site, current_site, default_cpus, default_memory
from tools.site.settings import fill

SAME_START_S = 120  # starts closer than this count as equal: the estimate is no better
PROBES_AT_ONCE = 4  # --test-only calls side by side
REPORT_WAITS_S = (
    1.0,
    2.0,
    4.0,
    8.0,
)  # for nodes that have yet to report to a controller that has just started


@dataclass
class Option:
    """One partition with one GPU type: whether it would take the job, and when."""

    partition: str
    request: Request
    refusals: list[Refusal] = field(default_factory=list)
    start: datetime | None = None
    free: int = 0  # GPUs of this type that nobody holds now
    at_once: int | None = None  # runs side by side under the user's own limit; None: no known limit
    room: int | None = None  # the same on the nodes that there are, if nobody else used them; None: not known
    small: bool = False  # what is to run there needs no fast GPU
    own_wait: int = 0  # minutes until the user's own jobs leave room under the user's limit
    preemptable: bool = False
    spares_gpus: bool = True  # False: a job without GPUs would sit on GPU nodes

    @property
    def ok(self) -> bool:
        """Whether nothing known refuses it."""
        return not self.refusals

    def together(self, seeds: int, throttle: int | None = None) -> int:
        """How many of `seeds` runs can run side by side; `throttle`: so many at most, where the user says so."""
        return max(1, min(seeds, throttle or seeds, self.at_once or seeds, self.room or seeds))

    def waves(self, seeds: int, throttle: int | None = None) -> int:
        """Rounds for `seeds` runs, `throttle` of them at once at most."""
        return -(-seeds // self.together(seeds, throttle))

    def gpu_hours(self, seeds: int) -> float:
        """GPU-hours if every run takes all of its time limit."""
        return seeds * self.request.all_gpus * self.request.minutes / 60


def options(
    cluster: Cluster,
    site: Site,
    request: Request,
    target: Target | None = None,
    partitions: str | None = None,
) -> list[Option]:
    """Every partition and GPU type with what refuses the request there."""
    names = partitions.split(",") if partitions else list(cluster.partitions)
    found = []
    for name in names:
        partition = cluster.partition(name)
        kinds: list[str | None] = [request.gpu_type] if request.gpu_type else list(cluster.gpu_types(name))
        untyped = any(
            node.gpus.get("") for node in cluster.nodes_of(name)
        )  # Gres=gpu:2, as small clusters write it
        if not request.gpus or (not kinds and (partitions or untyped)):
            kinds = [None]
        for kind in kinds:
            cpus = request.cpus or default_cpus(site, cluster, name, request.gpus, kind)
            memory = request.memory_mb or default_memory(site, cluster, name, request.gpus, kind)
            asked = Request(
                request.gpus, kind, request.minutes, request.nodes, cpus, memory, request.account, request.qos
            )
            option = Option(name, asked, refusals(cluster, asked, name), preemptable=partition.preemptable)
            why = target.refuse_gpus(asked.all_gpus) if target else None
            if why:
                option.refusals.append(Refusal("wrong count", why))
            option.spares_gpus = bool(request.gpus) or not cluster.gpu_types(name)
            option.free = sum(node.free_gpus(kind or "") for node in cluster.nodes_of(name))
            cap, _ = gpu_cap(cluster, partition, asked)
            if cap is not None and asked.all_gpus:
                option.at_once = max(1, cap // asked.all_gpus)
            option.own_wait = own_wait(cluster, partition, asked) if option.ok else 0
            option.small = target is not None and target.small
            option.room = room(cluster, name, asked)
            found.append(option)
    return found


def ask_starts(found: list[Option]) -> None:
    """`sbatch --test-only` for every option that is not refused yet: its start, or SLURM's refusal."""
    todo = [option for option in found if option.ok]
    with ThreadPoolExecutor(PROBES_AT_ONCE) as pool:
        for wait in (*REPORT_WAITS_S, 0.0):
            to_report = slurm.nodes_to_report()  # asked first: until then SLURM refuses what the nodes have
            answers = list(pool.map(_probe, todo))
            if not to_report or all(answer.rc == 0 for answer in answers):
                break
            time.sleep(wait)
        for option, answer in zip(todo, answers, strict=True):
            start = re.search(r"to start at ([0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9:]{8})", answer.err + answer.out)
            if start:
                ours = datetime.now() + timedelta(minutes=option.own_wait)
                option.start = max(
                    datetime.fromisoformat(start[1]), ours if option.own_wait else datetime.min
                )
            elif answer.rc != 0:
                option.refusals.append(
                    Refusal("SLURM refuses", f"{option.partition}: {slurm.refusal(answer)}")
                )


def best(found: list[Option], seeds: int = 1, throttle: int | None = None) -> Option | None:
    """The option whose last run would end first, of `seeds` and `throttle` at once; then the one that is not
    preempted; then the faster GPU, or for what is small the more modest one, which others do not wait for."""
    taken = [option for option in found if option.ok]
    now = datetime.now()

    def order(option: Option) -> tuple:
        wait = max(0.0, (option.start - now).total_seconds()) if option.start else 0.0
        rounds = option.waves(seeds, throttle)
        end = wait / SAME_START_S // 1 * SAME_START_S / 60 + rounds * option.request.minutes
        return (
            not option.spares_gpus,
            end,
            option.preemptable,
            gpu_rank(option.request.gpu_type or "") * (-1 if option.small else 1),
            option.partition,
        )

    return min(taken, key=order, default=None)


def smaller(cluster: Cluster, site: Site, request: Request, target: Target | None) -> Option | None:
    """The same request in another partition, else the largest one below it that some partition takes: fewer
    GPUs (on one node), then less time."""
    counts = [n for n in (request.gpus, 8, 4, 2, 1) if n < request.all_gpus or n == request.gpus]
    sizes = dict.fromkeys([(request.gpus, request.nodes), *((n, 1) for n in counts)])
    limits = sorted({p.max_minutes for p in cluster.partitions.values() if p.max_minutes}, reverse=True)
    times = [request.minutes, *(limit for limit in limits if limit < request.minutes)]
    for gpus, nodes in sizes:
        for limit in times:
            less = replace(request, gpus=gpus, nodes=nodes, minutes=limit, cpus=0, memory_mb=None)
            found = [option for option in options(cluster, site, less, target) if option.ok]
            if found:
                ask_starts(found)
                chosen = best(found)
                if chosen:
                    return chosen
    return None


def launch_line(preset: str, option: Option, seeds: int) -> str:
    """The command that launches an option."""
    request = option.request
    parts = [f"engaging launch {preset} --gpus {request.gpus}"]
    parts += [f"--gpu-type {request.gpu_type}"] if request.gpu_type else []
    parts += [f"--nodes {request.nodes}"] if request.nodes > 1 else []
    parts += [f"--time {clock(request.minutes)} --partition {option.partition}"]
    parts += [f"--account {request.account}"] if request.account else []
    parts += [f"--qos {request.qos}"] if request.qos else []
    if seeds > 1:
        parts += [f"--seeds {seeds} --throttle {min(seeds, option.at_once or seeds)}"]
    return " ".join(parts)


def asked_for(args: argparse.Namespace, target: Target) -> Request:
    """The request that the options of `tools.args.add_request` make; a command may go without --mem."""
    memory = getattr(args, "mem", None)
    return Request(
        args.gpus, args.gpu_type, args.time or target.minutes, args.nodes, args.cpus or 0,
        slurm.memory_mb(memory) if memory else None, args.account, args.qos,
    )  # fmt: skip


def main(argv: list[str]) -> int:
    """The command."""
    parser = _parser()
    args = parser.read(argv)
    root = checkout()
    target = resolve(root, args.preset)
    slurm.need_slurm("engaging plan")
    site = current_site(root)
    fill(args, site.path, ("account", "qos"))
    request = asked_for(args, target)
    cluster = ask_cluster()
    check_gpu_type(cluster, request.gpu_type)
    check_account(cluster, request)
    if why := target.refuse_gpus(request.all_gpus):
        raise UserError(why)
    found = options(cluster, site, request, target, args.partition)
    ask_starts(found)
    chosen = best(found, args.seeds)
    instead = None if chosen else smaller(cluster, site, request, target)
    if args.json:
        print(json.dumps(_as_json(args.preset, found, chosen, instead, args.seeds), indent=1))
    else:
        _show(args, cluster, site, found, chosen, instead)
    return 0 if chosen else 1


def _show(
    args, cluster: Cluster, site: Site, found: list[Option], chosen: Option | None, instead: Option | None
) -> None:
    request = found[0].request if found else None
    many = f", {args.seeds} seeds" if args.seeds > 1 else ""
    nodes = f" on each of {args.nodes} nodes" if args.nodes > 1 else ""
    limit = f", {spoken(request.minutes)} at most" if request else ""
    print(f"{args.preset}: {_gpus(args.gpus, args.gpu_type)}{nodes}{limit}{many}")
    print(f"site {site.name}; asked {datetime.now():%Y-%m-%d %H:%M}\n")
    rows = [("partition", "GPU", "free", "answer")]
    for option in sorted(found, key=lambda o: (not o.ok, o.start or datetime.max, o.partition)):
        gpu = option.request.gpu_type or ("any" if option.request.gpus else "none")
        rows.append((option.partition, gpu, str(option.free), _answer(option, args.seeds)))
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    for row in rows:
        line = "  ".join(cell.ljust(width) for cell, width in zip(row, (*widths, 0), strict=True)).rstrip()
        print(folded(line, sum(widths) + 6))
    gpus = request.all_gpus if request else 1
    for note in [*cluster.notes, past(checkout(), args.preset, gpus)]:
        print(folded(f"note: {note}"))
    if request and (warning := too_short(checkout(), args.preset, request.minutes, gpus)):
        print(folded(f"warning: {warning}"))
    print()
    if chosen:
        gpus = _gpus(chosen.request.all_gpus, chosen.request.gpu_type)
        print(folded(f"Recommended: {gpus} in {chosen.partition}{_waves(chosen, args.seeds)}."))
        if chosen.preemptable:
            text = (
                "Jobs there are stopped when the owners need the nodes; the run saves, requeues and goes on."
            )
            print(folded(text))
            print(folded(_grace(cluster, chosen)))
        print(f"  {launch_line(args.preset, chosen, args.seeds)}")
        return
    print(folded(f"This cannot start here: {_first_reason(found)}"))
    if instead:
        gpus, limit = (
            _gpus(instead.request.all_gpus, instead.request.gpu_type),
            words(instead.request.minutes),
        )
        spread = f" on {instead.request.nodes} nodes" if instead.request.nodes > 1 else ""
        print(f"What can: {gpus}{spread} for {limit} in {instead.partition}.")
        print(f"  {launch_line(args.preset, instead, args.seeds)}")


def _gpus(count: int, kind: str | None) -> str:
    return counted(count, f"{kind} GPU" if kind else "GPU")


def _grace(cluster: Cluster, option: Option) -> str:
    """What a preempted job is given there, against what the runs here have taken to save."""
    given = cluster.partition(option.partition).grace_s
    enough, text = grace.judge(grace.costliest(checkout()), given, grace.kill_wait_s())
    return f"{text}." if enough else f"{text}: {grace.FIX}."


def _answer(option: Option, seeds: int) -> str:
    if option.refusals:
        return "no: " + "; ".join(refusal.short for refusal in option.refusals)
    text = "yes" + (f", start {_when(option.start)}" if option.start else "")
    text += ", when your own jobs there end" if option.own_wait else ""
    hours = option.gpu_hours(seeds)
    text += f", {hours:.3g} GPU-hour{'s' * (hours != 1)} at most" if hours else ""
    if seeds > 1:
        text += f", {counted(option.waves(seeds), 'wave')}"
    return text + (", preemptable" if option.preemptable else "")


def _waves(option: Option, seeds: int) -> str:
    if seeds == 1:
        return ""
    count = option.waves(seeds)
    side = option.together(seeds)
    whose = (
        ""
        if side == seeds
        else " (your limit)"
        if side == option.at_once
        else " (that is all the nodes hold)"
    )
    limit = words(count * option.request.minutes)
    return f", {seeds} runs, {side} at once{whose}, {counted(count, 'wave')}, {limit} after the start at most"


def _when(start: datetime) -> str:
    wait = (start - datetime.now()).total_seconds() / 60
    return "now" if wait < 2 else f"in {words(wait)} ({start:%a %H:%M})"


def _first_reason(found: list[Option]) -> str:
    limits = [r for option in found for r in option.refusals if "its limit" in r.text]
    others = sorted((r for option in found for r in option.refusals), key=lambda r: r.short.startswith("no "))
    return (limits or others)[0].text + "." if others else "no partition has GPUs."


def _as_json(
    preset: str, found: list[Option], chosen: Option | None, instead: Option | None, seeds: int
) -> dict:
    def row(option: Option | None) -> dict | None:
        if option is None:
            return None
        return {
            "partition": option.partition,
            "gpu_type": option.request.gpu_type,
            "gpus": option.request.all_gpus,
            "minutes": option.request.minutes,
            "ok": option.ok,
            "refusals": [refusal.line() for refusal in option.refusals],
            "start": option.start.isoformat() if option.start else None,
            "free_gpus": option.free,
            "runs_at_once": option.at_once,
            "waves": option.waves(seeds),
            "gpu_hours": option.gpu_hours(seeds),
            "preemptable": option.preemptable,
            "command": launch_line(preset, option, seeds),
        }

    return {"options": [row(option) for option in found], "recommended": row(chosen), "instead": row(instead)}


def _probe(option: Option) -> slurm.Answer:
    request = option.request
    words = [
        f"--partition={option.partition}",
        f"--time={clock(request.minutes)}",
        f"--nodes={request.nodes}",
        f"--cpus-per-task={request.cpus}",
        f"--mem={request.memory_mb}M",
        "--ntasks-per-node=1",
    ]
    if request.gpus:
        words.append(f"--gres=gpu:{request.gpu_type + ':' if request.gpu_type else ''}{request.gpus}")
    words += [f"--account={request.account}"] if request.account else []
    words += [f"--qos={request.qos}"] if request.qos else []
    return slurm.ask(["sbatch", "--test-only", *words], script="#!/bin/bash\n", cwd=Path("/"))


def _parser() -> Parser:
    parser = Parser("plan", "What can I have: partitions and GPU types that would take this, and when.")
    parser.add_argument(
        "preset", metavar="WHAT", help="nanogpt, gpt2, speedrun, or a preset of either trainer"
    )
    add_request(
        parser,
        without=("mem", "reservation"),
        partition="only these (commas)",
        gpu_type="h200, h100, l40s ...; default: any",
    )
    parser.add_argument("--seeds", type=whole("--seeds", 1, 10000), default=1, help="runs of the same thing")
    parser.add_argument("--json", action="store_true")
    return parser
