"""The cluster on which runs are disturbed, and the clone that they are submitted from (slurm_runs.py)."""

import contextlib
import os
import queue
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tests.faults import tiny
from tests.faults.slurm_judge import SAVE_INTERVAL, STEPS
from tests.slurm.conftest import TEST_TIMERS, Cluster
from tools.launch.snapshot import copy_code
from tools.practice import cluster as practice
from tools.practice.processes import alive

ROOT = Path(__file__).resolve().parents[2]
FLAGS = (
    *tiny.FLAGS, "--dropout=0.1", "--compile=false", "--always_save_checkpoint=true", "--log_interval=1",
    f"--max_iters={STEPS}", f"--lr_decay_iters={STEPS}", "--eval_interval=100", f"--save_interval={SAVE_INTERVAL}",
)  # fmt: skip
SCRIPT = "slurm/nanogpt/train_shakespeare.sh"
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "OUT_OF_MEMORY", "DEADLINE")
PATIENCE = 420.0  # seconds for any one thing to happen, on a machine that is busy with the other groups


@dataclass
class Job:
    """One run and its job: `run` is the folder below out/, `steps` where it is struck."""

    run: str
    id: str
    steps: tuple[int, ...] = ()


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

    def wait_for_step(self, job: Job, number: int = 0) -> None:
        """Until the run is at the step of its next strike, `number` attempts being over; or has ended."""

        def there() -> bool:
            resumed = sum(event["event"] == "resume" for event in self.events(job.run))
            arrived = max(self.steps(job.run), default=-1) >= job.steps[number] and resumed >= number
            return arrived or (number > 0 and self.cluster.state(job.id) in ENDED)

        self.wait(f"{job.run} at step {job.steps[number]}", there)

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
