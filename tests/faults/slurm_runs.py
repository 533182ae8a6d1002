"""Disturbed runs on a real SLURM (`python -m tests.faults --slurm`): job script, run.sh and trainer as they are.

A group of runs is submitted to the practice cluster, trains a tiny model, is struck at a seeded step, and must end as
the run that nobody disturbed: every loss, the final weights, one record, all attempts' logs. Several groups at once.

SIGSTOP stands for what takes long and costs no CPU time here: a step that is under way when the time limit's signal
comes, and a node that hangs and wakes up after its job has gone elsewhere.
"""

import contextlib
import os
import queue
import random
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from tests.faults import tiny
from tests.slurm.conftest import TEST_TIMERS, Cluster
from tools.launch.snapshot import copy_code
from tools.practice import cluster as practice
from tools.practice.processes import alive

ROOT = Path(__file__).resolve().parents[2]
STEPS, SAVE_INTERVAL = 400, 40
FLAGS = (
    *tiny.FLAGS, "--dropout=0.1", "--compile=false", "--always_save_checkpoint=true", "--log_interval=1",
    f"--max_iters={STEPS}", f"--lr_decay_iters={STEPS}", "--eval_interval=100", f"--save_interval={SAVE_INTERVAL}",
)  # fmt: skip
SCRIPT = "slurm/nanogpt/train_shakespeare.sh"
GROUPS_AT_ONCE = 6
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "OUT_OF_MEMORY", "DEADLINE")
PATIENCE = 420.0  # seconds for any one thing to happen, on a machine that is busy with the other groups
USR1_PENDING = 1 << (signal.SIGUSR1 - 1)


@dataclass
class Job:
    """One run and its job: `run` is the folder below out/, `step` where it is struck."""

    run: str
    id: str
    step: int


@dataclass
class Outcome:
    """What became of one run: `hit` when it was really disturbed; `twice` counts steps computed twice."""

    run: str
    kind: str
    hit: bool
    attempts: int
    twice: int
    problem: str


@dataclass
class Bench:
    """The cluster, the clone that the runs are submitted from, and the places where groups do not meet."""

    cluster: Cluster
    clone: Path
    nodes: queue.Queue = field(default_factory=queue.Queue)  # free ones, each for one group
    lost: threading.Lock = field(default_factory=threading.Lock)  # the two nodes that get lost
    arrays: threading.Lock = field(default_factory=threading.Lock)  # an array's runs have fixed names

    def submit(self, run: str, *options: str) -> str:
        """Submit the script as a user does; the job's id. An array names its runs itself."""
        common = ("--cpus-per-task=1", "--mem=1G")
        out = () if any(word.startswith("--array") for word in options) else (f"--out_dir=out/{run}",)
        env = {"ENV_PATH": sys.prefix, "DATA_ROOT": str(self.clone / "data"), "CUDA_VISIBLE_DEVICES": ""}
        return self.cluster.sbatch(*common, *options, SCRIPT, *FLAGS, *out, env=env, cwd=self.clone)

    def steps(self, run: str) -> list[int]:
        """The steps that the run has noted so far, in the order of the file."""
        return [event["step"] for event in self.events(run) if event["event"] == "train"]

    def events(self, run: str) -> list[dict]:
        """The run's metrics so far; the last line may be in the making."""
        path = self.clone / "out" / run / "metrics.jsonl"
        with contextlib.suppress(OSError, ValueError):
            return tiny.events(path.parent)
        return []

    def wait(self, what: str, condition: Callable[[], object]) -> None:
        """Poll until the condition holds; AssertionError names what did not come."""
        self.cluster.wait_until(condition, PATIENCE, lambda: what)

    def wait_for_step(self, job: Job) -> None:
        """Until the run is at its step, or over it."""
        self.wait(f"{job.run} at step {job.step}", lambda: max(self.steps(job.run), default=-1) >= job.step)

    def wait_for_end(self, job: Job) -> str:
        """Until the job has ended for good; its state."""
        self.wait(f"job {job.id} ({job.run}) to end", lambda: self.cluster.state(job.id) in ENDED)
        return self.cluster.state(job.id)

    def trainers(self, run: str) -> list[int]:
        """The processes that train this run: not rank.py above them, nor srun, nor the script."""
        found = []
        for folder in Path("/proc").iterdir():
            with contextlib.suppress(OSError, ValueError):
                words = (folder / "cmdline").read_bytes().decode(errors="replace").split("\0")
                python = Path(words[0]).name.startswith("python")
                if (
                    python
                    and not any(word.endswith("rank.py") for word in words[:3])
                    and alive(int(folder.name))
                ):
                    outs = [word for word in words if word.startswith("--out_dir=")]
                    found += [int(folder.name)] if outs and outs[-1].endswith(f"out/{run}") else []
        return found

    def signal(self, run: str, number: signal.Signals) -> list[int]:
        """Send a signal to the run's trainers; the processes that got it."""
        sent = []
        for pid in self.trainers(run):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
                sent.append(pid)
        return sent


@contextlib.contextmanager
def bench() -> Iterator[Bench]:
    """A fresh practice cluster with a clone of this repository, gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="practice-", dir="/tmp") as name:
        folder = Path(name)
        folder.chmod(0o755)
        practice.up(folder / "c", TEST_TIMERS)
        try:
            copy_code(ROOT, folder / "clone")
            (folder / "clone" / "logs").mkdir(exist_ok=True)
            script = (
                folder / "clone" / SCRIPT
            )  # here it asks for no GPU: more runs at once than the nodes have
            lines = script.read_text().splitlines(keepends=True)
            script.write_text("".join(line for line in lines if "gpu" not in line or "#SBATCH" not in line))
            tiny.make_data(folder / "clone" / "data")
            found = Bench(Cluster(folder / "c"), folder / "clone")
            tier = ("PriorityTier=1", "MaxTime=1:00:00")
            at_once = ("PreemptMode=REQUEUE", "GraceTime=0")
            found.cluster.scontrol("create", "PartitionName=at_once", "Nodes=node[1-8]", *tier, *at_once)
            found.cluster.scontrol(
                "create", "PartitionName=shaky", "Nodes=node[5-6]", *tier, "PreemptMode=OFF"
            )
            for node in ("node1", "node2", "node3", "node4"):
                found.nodes.put(node)
            yield found
        finally:
            practice.down(folder / "c", delete=True)


# ---- the ways to disturb a run ---------------------------------------------------------------------------------


def each(bench: Bench, jobs: list[Job], strike: Callable[[Job], object]) -> None:
    """Strike each run when it is at its own step, all of them waited for at once."""

    def wait_and_strike(job: Job) -> None:
        bench.wait_for_step(job)
        strike(job)

    with ThreadPoolExecutor(len(jobs)) as pool:
        list(pool.map(wait_and_strike, jobs))


def preempted(bench: Bench, names: list[str], rng: random.Random, partition: str) -> list[Job]:
    """The owner of the node wants all of it."""
    node = bench.nodes.get()
    try:
        step = rng.randrange(1, STEPS * 3 // 4)
        jobs = [Job(run, bench.submit(run, "-p", partition, "-w", node), step) for run in names]
        for job in jobs:
            bench.wait_for_step(job)
        alone = ("-w", node, "--exclusive", "-o", "/dev/null", "--wrap", "sleep 0")
        owner = Job("owner", bench.cluster.sbatch("-p", "pi_lab", *alone), 0)
        bench.wait_for_end(owner)
        for job in jobs:
            bench.wait_for_end(job)
    finally:
        bench.nodes.put(node)
    return jobs


def struck_one_by_one(
    bench: Bench, names: list[str], rng: random.Random, strike: Callable[[Job], object], *options: str
) -> list[Job]:
    """On the CPU nodes, beside other groups."""
    place = ("-p", "pi_lab", "-w", rng.choice(("node7", "node8")))
    jobs = [Job(run, bench.submit(run, *place, *options), rng.randrange(1, STEPS * 3 // 4)) for run in names]
    each(bench, jobs, strike)
    for job in jobs:
        bench.wait_for_end(job)
    return jobs


def requeued(bench: Bench, names: list[str], rng: random.Random) -> list[Job]:
    """`scontrol requeue` by an administrator: SIGTERM, and SIGKILL after KillWait."""
    return struck_one_by_one(
        bench, names, rng, lambda job: bench.cluster.run("scontrol", "requeue", job.id, check=False)
    )


def killed(bench: Bench, names: list[str], rng: random.Random) -> list[Job]:
    """SIGKILL to the trainer, as the kernel does when memory ends."""
    return struck_one_by_one(bench, names, rng, lambda job: bench.signal(job.run, signal.SIGKILL))


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
            Job(run, f"{array}_{task}", rng.randrange(1, STEPS * 3 // 4)) for task, run in enumerate(runs)
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
        jobs = [Job(run, bench.submit(run, "-p", "shaky"), step) for run in names]
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
    "requeue": Kind("requeued by hand (`scontrol requeue`)", 14, 2, requeued),
    "kill": Kind("its trainer SIGKILLed", 16, 2, killed),
    "time": Kind("told by SLURM that its time limit is near", 8, 4, out_of_time),
    "off": Kind("its node switched off", 6, 3, lambda *a: lost(*a, wakes_up=False)),
    "hung": Kind(
        "its node hung, and woke up when the run was elsewhere", 6, 3, lambda *a: lost(*a, wakes_up=True)
    ),
    "array": Kind("a task of an array, told to save and requeue", 10, 10, tasks_of_an_array),
}


# ---- judging ---------------------------------------------------------------------------------------------------


def judge(out: Path, reference: Path, log: str, state: str) -> str:
    """What is wrong with a run that has ended, compared with the undisturbed one; "" when nothing is."""
    try:
        if state != "COMPLETED":
            return f"its job ended {state}: {log[-800:]}"
        if tiny.losses(out) != tiny.losses(reference) or sorted(tiny.losses(out)) != list(range(STEPS)):
            return "training losses differ"
        if tiny.val_losses(out) != tiny.val_losses(reference):
            return "validation losses differ"
        if tiny.final_weights(out, STEPS) != tiny.final_weights(reference, STEPS):
            return "final weights or optimizer state differ"
    except (AssertionError, OSError, ValueError, KeyError) as error:
        return f"{type(error).__name__}: {error}"
    ends = [event for event in tiny.events(out, "end") if event.get("status") == "finished"]
    # Lost after its end, it ends again, alike.
    if len({(event["step"], event["val_loss"]) for event in ends}) != 1:
        return f"it ended in {len(ends)} ways"
    starts = len(tiny.events(out, "start")) + len(tiny.events(out, "resume"))
    if log.count("resumed from step_") < len(tiny.events(out, "resume")):
        return f"{starts} attempts, but the log does not hold them all"
    if repeated(out) > SAVE_INTERVAL * (starts - 1):
        return f"{repeated(out)} steps were computed twice"
    return ""


def repeated(out: Path) -> int:
    """How many steps were computed more than once."""
    counted = Counter(event["step"] for event in tiny.events(out, "train"))
    return sum(times - 1 for times in counted.values())


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


def campaign(seed: int, runs: int, say: Callable[[str], None]) -> tuple[list[Outcome], str]:
    """At least `runs` disturbed runs, in the kinds' shares: what became of each that was started; SLURM's version."""
    with bench() as found:
        straight = Job("undisturbed", found.submit("undisturbed", "-p", "pi_lab"), 0)
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
                    hit = sum(o.hit for o in outcomes)
                    say(f"{hit} of {runs} disturbed, {sum(bool(o.problem) for o in outcomes)} failed")
            wave += 1
        return outcomes, found.cluster.run("sinfo", "--version").stdout.strip()


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
