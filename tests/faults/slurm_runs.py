"""Disturbed runs on a real SLURM (section slurm of `make faults`): job script, run.sh and trainer as they are.

A group of runs is submitted to the practice cluster, trains a tiny model, is struck at a seeded step, and must end as
the run that nobody disturbed: every loss, the final weights, one record, all attempts' logs. Several groups at once.

SIGSTOP stands for what takes long and costs no CPU time here: a step that is under way when the time limit's signal
comes, and a node that hangs and wakes up after its job has gone elsewhere.
"""

import contextlib
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tests.faults.outcomes import Tally
from tests.faults.slurm_bench import ENDED, Bench, Job, bench
from tests.faults.slurm_judge import STEPS, judge, repeated
from tools.practice.processes import alive

GROUPS_AT_ONCE = 6
USR1_PENDING = 1 << (signal.SIGUSR1 - 1)


@dataclass
class Outcome:
    """What became of one run: `hit` when it was really disturbed; `twice` counts steps computed twice."""

    run: str
    kind: str
    hit: bool
    attempts: int
    twice: int
    problem: str


# ---- the ways to disturb a run ---------------------------------------------------------------------------------


def each(bench: Bench, jobs: list[Job], strike: Callable[[Job], object]) -> None:
    """Strike each run at each of its own steps, all of them waited for at once."""

    def wait_and_strike(job: Job) -> None:
        for number in range(len(job.steps)):
            bench.wait_for_step(job, number)
            strike(job)

    with ThreadPoolExecutor(len(jobs)) as pool:
        list(pool.map(wait_and_strike, jobs))


def preempted(bench: Bench, names: list[str], rng: random.Random, partition: str) -> list[Job]:
    """The owner of the node wants all of it."""
    node = bench.nodes.get()
    try:
        step = rng.randrange(1, STEPS * 3 // 4)
        jobs = [Job(run, bench.submit(run, "-p", partition, "-w", node), (step,)) for run in names]
        for job in jobs:
            bench.wait_for_step(job)
        alone = ("-w", node, "--exclusive", "-o", "/dev/null", "--wrap", "sleep 0")
        owner = Job("owner", bench.cluster.sbatch("-p", "pi_lab", *alone))
        bench.wait_for_end(owner)
        for job in jobs:
            bench.wait_for_end(job)
    finally:
        bench.nodes.put(node)
    return jobs


def struck_one_by_one(
    bench: Bench, names: list[str], rng: random.Random, strike: Callable[[Job], object], *options: str,
    strikes: int = 1,
) -> list[Job]:  # fmt: skip
    """On the CPU nodes, beside other groups; each run as often as said."""
    place = ("-p", "pi_lab", "-w", rng.choice(("node7", "node8")))
    jobs = []
    for run in names:
        steps = tuple(sorted(rng.sample(range(1, STEPS * 3 // 4), strikes)))
        jobs.append(Job(run, bench.submit(run, *place, *options), steps))
    each(bench, jobs, strike)
    for job in jobs:
        bench.wait_for_end(job)
    return jobs


def requeued(bench: Bench, names: list[str], rng: random.Random) -> list[Job]:
    """`scontrol requeue` by an administrator, twice: SIGTERM, and SIGKILL after KillWait."""
    strike = lambda job: bench.cluster.run("scontrol", "requeue", job.id, check=False)  # noqa: E731
    return struck_one_by_one(bench, names, rng, strike, strikes=2)


def killed(bench: Bench, names: list[str], rng: random.Random) -> list[Job]:
    """SIGKILL to the trainer, twice, as the kernel does when memory ends."""
    strike = lambda job: bench.signal(job.run, signal.SIGKILL)  # noqa: E731
    return struck_one_by_one(bench, names, rng, strike, strikes=2)


def out_of_time(bench: Bench, names: list[str], rng: random.Random) -> list[Job]:
    """SLURM's own signal before the time limit, while a step is under way that takes until then."""

    def strike(job: Job) -> None:
        stopped = bench.signal(job.run, signal.SIGSTOP)
        limit = time.monotonic() + 600  # it may have come before the step began
        while not any(map(told, stopped)) and time.monotonic() < limit:
            time.sleep(0.1)
        for pid in stopped:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)

    return struck_one_by_one(bench, names, rng, strike, "--time=2", "--signal=B:USR1@100")


def told(pid: int) -> bool:
    """Whether SIGUSR1 waits for a stopped process (or it is gone)."""
    with contextlib.suppress(OSError):
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        return any(
            int(line.split()[1], 16) & USR1_PENDING for line in lines if line[:6] in ("ShdPnd", "SigPnd")
        )
    return True


def tasks_of_an_array(bench: Bench, names: list[str], rng: random.Random) -> list[Job]:
    """Each task of an array is told to save and requeue, at a step of its own; the others go on."""
    with bench.arrays:
        for path in (bench.clone / "out").glob("nanogpt-shakespeare-*"):
            path.rename(path.with_name(f"earlier-{time.monotonic_ns()}-{path.name}"))
        options = ("-p", "pi_lab", f"--array=0-{len(names) - 1}%4")
        array = bench.submit("", *options)
        runs = [f"nanogpt-shakespeare-{task}" for task in range(len(names))]
        jobs = [
            Job(run, f"{array}_{task}", (rng.randrange(1, STEPS * 3 // 4),)) for task, run in enumerate(runs)
        ]
        tell = ("scancel", "--batch", "--signal=USR1")
        each(bench, jobs, lambda job: bench.cluster.run(*tell, job.id, check=False))
        for job, name in zip(jobs, names, strict=True):
            bench.wait_for_end(job)
            (bench.clone / "out" / job.run).rename(bench.clone / "out" / name)
            job.run = name
    return jobs


def lost(bench: Bench, names: list[str], rng: random.Random, wakes_up: bool) -> list[Job]:
    """The node is off at once; or it hangs, and its processes wake up after the job has gone on elsewhere."""
    with bench.lost:
        step = rng.randrange(1, STEPS * 3 // 4)
        jobs = [Job(run, bench.submit(run, "-p", "shaky"), (step,)) for run in names]
        for job in jobs:
            bench.wait_for_step(job)
        (node, *_), hung = bench.cluster.nodes_of(jobs[0].id) or [""], []
        if not node:
            return jobs  # it was over before the strike
        try:
            if wakes_up:
                bench.cluster.kill_slurmd(node)
                hung = [pid for job in jobs for pid in bench.signal(job.run, signal.SIGSTOP)]
                for job in jobs:
                    again = lambda job=job: any(e["event"] == "resume" for e in bench.events(job.run))  # noqa: E731
                    bench.wait(
                        f"{job.run} elsewhere", lambda job=job, again=again: again() or over(bench, job)
                    )
                for pid in hung:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGCONT)
            else:
                bench.cluster.stop_node(node)
            for job in jobs:
                bench.wait_for_end(job)
            bench.wait("the ghosts to leave", lambda: not any(map(alive, hung)))
        finally:
            bench.cluster.stop_node(node)
            bench.cluster.start_node(node)
    return jobs


def over(bench: Bench, job: Job) -> bool:
    return bench.cluster.state(job.id) in ENDED


@dataclass(frozen=True)
class Kind:
    """One row of the table: `share` of all runs in percent, `size` runs struck together."""

    what: str
    share: int
    size: int
    carry_out: Callable[[Bench, list[str], random.Random], list[Job]]


KINDS = {
    "grace": Kind("preempted, 10 s of grace", 22, 2, lambda *a: preempted(*a, "mit_preemptable")),
    "no-grace": Kind("preempted, no grace", 18, 2, lambda *a: preempted(*a, "at_once")),
    "requeue": Kind("requeued by hand (`scontrol requeue`), twice", 14, 2, requeued),
    "kill": Kind("its trainer SIGKILLed, twice", 16, 2, killed),
    "time": Kind("told by SLURM that its time limit is near", 8, 4, out_of_time),
    "off": Kind("its node switched off", 6, 3, lambda *a: lost(*a, wakes_up=False)),
    "hung": Kind(
        "its node hung, and woke up when the run was elsewhere", 6, 3, lambda *a: lost(*a, wakes_up=True)
    ),
    "array": Kind("a task of an array, told to save and requeue", 10, 10, tasks_of_an_array),
}


# ---- the campaign -------------------------------------------------------------------------------------------


def outcome(bench: Bench, kind: str, job: Job) -> Outcome:
    """Judge one run whose job has ended."""
    out = bench.clone / "out" / job.run
    log, state = bench.cluster.log(job.id), bench.cluster.state(job.id)
    problem = judge(out, bench.clone / "out" / "undisturbed", log, state)
    events = bench.events(job.run)
    attempts = sum(event["event"] in ("start", "resume") for event in events)
    restarts = int(bench.cluster.job(job.id).get("Restarts", "0"))
    hit = attempts > 1 or restarts > 0 or "the trainer broke" in log
    return Outcome(job.run, kind, hit, attempts, repeated(out) if events else 0, problem)


def campaign(seed: int, runs: int) -> list[Outcome]:
    """At least `runs` disturbed runs, in the kinds' shares: what became of each that was started."""
    with bench() as found:
        straight = Job("undisturbed", found.submit("undisturbed", "-p", "pi_lab"))
        state = found.wait_for_end(straight)
        assert state == "COMPLETED", found.cluster.log(straight.id)
        outcomes: list[Outcome] = []
        wave = 0
        while sum(o.hit for o in outcomes) < runs and wave < 4:
            hits = Counter(o.kind for o in outcomes if o.hit)
            groups = plan(seed, wave, {k: wanted(kind, runs) - hits[k] for k, kind in KINDS.items()})
            with ThreadPoolExecutor(GROUPS_AT_ONCE) as pool:
                for done in pool.map(lambda group: _group(found, *group), groups):
                    outcomes += done
            wave += 1
        return outcomes


def slurm(_: object, rng: random.Random, runs: int) -> Tally:
    """A section of the campaign (__main__.py): a cluster of its own, and at least `runs` disturbed runs."""
    return tally(campaign(rng.randrange(2**31), runs), runs)


def tally(outcomes: list[Outcome], wanted: int) -> Tally:
    """Disturbances counted, which are more than runs; runs that had ended before they could be struck are not."""
    hit = [outcome for outcome in outcomes if outcome.hit]
    made = Tally(
        "runs on a real SLURM disturbed", "job COMPLETED, one record, all logs, all losses and weights equal",
        sum(max(1, outcome.attempts - 1) for outcome in hit),
        [f"{outcome.kind} {outcome.run}: {outcome.problem}" for outcome in outcomes if outcome.problem],
        Counter({"runs": len(hit), "steps computed twice": sum(outcome.twice for outcome in hit)}),
    )  # fmt: skip
    made.where.update(KINDS[outcome.kind].what for outcome in hit)
    if len(hit) < wanted:
        made.failures.append(f"{len(hit)} runs could be disturbed, of {wanted}")
    return made


def wanted(kind: Kind, runs: int) -> int:
    """How many runs of a kind, for `runs` in all."""
    return -(-kind.share * runs // 100)


def plan(seed: int, wave: int, missing: dict[str, int]) -> list[tuple[str, list[str], random.Random]]:
    """The groups of a wave in seeded order, the array first: it takes longest."""
    groups = []
    for kind, count in missing.items():
        names = [f"{kind}-{wave}-{number}" for number in range(max(count, 0))]
        size = KINDS[kind].size
        groups += [(kind, names[at : at + size]) for at in range(0, len(names), size)]
    random.Random(f"{seed} {wave}").shuffle(groups)
    groups.sort(key=lambda group: group[0] != "array")
    return [(kind, names, random.Random(f"{seed} {names[0]}")) for kind, names in groups]


def _group(bench: Bench, kind: str, names: list[str], rng: random.Random) -> list[Outcome]:
    """One group from its submission to its judgement. What goes wrong on the way is its runs' problem."""
    try:
        return [outcome(bench, kind, job) for job in KINDS[kind].carry_out(bench, names, rng)]
    except (AssertionError, OSError, KeyError) as error:
        return [Outcome(name, kind, False, 0, 0, f"{type(error).__name__}: {error}") for name in names]
