"""The `cluster` fixture: a real SLURM of eight nodes with Engaging's limits, started once a session."""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from tools.practice import cluster as practice
from tools.practice import packages
from tools.practice.commands import environment

ROOT = Path(__file__).resolve().parents[2]
MIRROR = ROOT.parent / "shared" / "data"  # texts for the preparation scripts, where somebody put them
DONE = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "BOOT_FAIL")
ASK = ("scontrol", "squeue", "sinfo", "sacct")
# Short timers keep the suite short; the order of events is that of a production cluster.
TEST_TIMERS = practice.Options(kill_wait=5, requeue_delay=5, node_timeout=10, grace=10)


@pytest.hookimpl(trylast=True)  # what -m and -k leave out is gone by then
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Every test of this folder carries the `slurm` marker; those marked `last` come last.

    The first that needs the cluster begins what others only look at: SLURM's minutes pass beside all tests between.
    """
    here = f"{Path(__file__).parent}{os.sep}"
    for item in items:
        if str(item.path).startswith(here):
            item.add_marker(pytest.mark.slurm)
    items.sort(key=lambda item: item.get_closest_marker("last") is not None)  # what other tests run beside
    asked = {name for item in items for name in getattr(item, "fixturenames", ())}
    first = next((item for item in items if "cluster" in getattr(item, "fixturenames", ())), None)
    if first is not None:
        first.fixturenames += [name for name in ("slow_jobs", "beside") if name in asked]


class Cluster:
    """The running cluster: its environment, its commands, and its faults."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        foreign = ("SLURM_", "SBATCH_", "OMP_NUM_THREADS")
        clean = {key: value for key, value in os.environ.items() if not key.startswith(foreign)}
        self.env = {**clean, **environment(folder)}
        self.background: list[subprocess.Popen] = []  # what needs the controller and runs beside the tests
        self.waiting = threading.local()  # `.seen`: what a thread that waits has seen, by what it asked

    def run(
        self,
        *command: object,
        env: dict[str, str] | None = None,
        cwd: Path = ROOT,
        check: bool = True,
        timeout: float = 600,
    ) -> subprocess.CompletedProcess:
        """Run a command against the cluster; with `check`, a failure fails the test and shows the output.

        Who waits (`wait_until`) and asks SLURM the same again is told what it was at most half a second ago, as long as
        the controller has logged nothing since: several tests wait at a time, and each question is two processes.
        """
        words = tuple(str(word) for word in command)
        seen = getattr(self.waiting, "seen", {}) if words[0] in ASK else {}
        log = (self.folder / "log" / "slurmctld.log").stat().st_size
        if words not in seen or seen[words][:2] != (log, int(time.monotonic() * 2)):
            done = subprocess.run(
                words,
                env={**self.env, **(env or {})},
                cwd=cwd,
                capture_output=True,
                text=True,
                timeout=timeout,
            )
            seen[words] = log, int(time.monotonic() * 2), done
        done = seen[words][2]
        if check and done.returncode:
            raise AssertionError(f"{words}: status {done.returncode}\n{done.stdout}\n{done.stderr}")
        return done

    def sbatch(self, *args: object, env: dict[str, str] | None = None, cwd: Path = ROOT) -> str:
        """Submit a job; returns its id."""
        return self.run("sbatch", "--parsable", *args, env=env, cwd=cwd).stdout.strip().split(";")[0]

    def squeue(self, *args: object) -> str:
        """`squeue --noheader ARGS`."""
        return self.run("squeue", "--noheader", *args).stdout

    def scontrol(self, *args: object) -> str:
        """`scontrol ARGS`."""
        return self.run("scontrol", *args).stdout

    def sacct(self, job: str, fields: str = "State", *args: object) -> list[list[str]]:
        """`sacct`: one list of fields for each row of the job (not its steps), every attempt with `-D`."""
        out = self.run("sacct", "-X", "-n", "-P", "-j", job, "-o", fields, *args).stdout
        return [line.split("|") for line in out.splitlines()]

    def job(self, job: str) -> dict[str, str]:
        """The job as `scontrol show job` has it: {"JobState": ..., "Reason": ..., "Restarts": ...}."""
        text = self.scontrol("show", "job", "-o", job)  # names and paths may hold spaces and line breaks
        return dict(word.split("=", 1) for word in re.split(r"\s+(?=[A-Z][\w/:]*=)", text) if "=" in word)

    def state(self, job: str) -> str:
        """The job's state in one word."""
        return self.job(job)["JobState"]

    def wait_for(self, job: str, states: str | tuple[str, ...] = DONE, timeout: float = 600) -> str:
        """Wait until the job is in one of the states; returns it, or fails with what the job was doing."""
        wanted = (states,) if isinstance(states, str) else states
        return self.wait_until(
            lambda: state if (state := self.state(job)) in wanted else "",
            timeout,
            lambda: f"job {job}, wanted {wanted}: {self.job(job)}\n{self.log(job)}",
        )

    def wait_until(self, condition, timeout: float = 600, describe=lambda: "") -> object:
        """Poll `condition` until it returns something true; returns that."""
        limit = time.monotonic() + timeout
        self.waiting.seen = {}
        try:
            while not (value := condition()):
                if time.monotonic() > limit:
                    raise AssertionError(f"not within {timeout} s: {describe()}")
                time.sleep(0.1)
        finally:
            del self.waiting.seen
        return value

    def log(self, job: str) -> str:
        """What the job has printed so far."""
        path = Path(self.job(job).get("StdOut", "/nonexistent"))
        return path.read_text(errors="replace") if path.is_file() else f"(no log at {path})"

    def cancel(self, *jobs: str) -> None:
        """scancel; a job that ended meanwhile is no fault."""
        self.run("scancel", *jobs, check=False)

    def nodes_of(self, job: str) -> list[str]:
        """The nodes a running job is on."""
        return self.scontrol("show", "hostnames", self.job(job)["NodeList"]).split()

    def kill_slurmd(self, node: str) -> None:
        """The controller loses the node, while the node's processes go on."""
        practice.kill_slurmd(self.folder, node)

    def start_slurmd(self, node: str) -> None:
        """The lost node reports again."""
        practice.start_slurmd(self.folder, node)

    def stop_node(self, node: str) -> None:
        """Pull the node's plug."""
        practice.stop_node(self.folder, node)

    def start_node(self, node: str) -> None:
        """Switch the node on again and wait until it can take jobs."""
        practice.start_node(self.folder, node)
        self.wait_until(lambda: self.node_state(node) in ("idle", "mixed", "allocated"))

    def node_state(self, node: str) -> str:
        """The node's state as `sinfo` words it."""
        return self.run("sinfo", "-h", "-N", "-n", node, "-o", "%T").stdout.split()[0].rstrip("*")

    def kill_slurmctld(self) -> None:
        """The controller crashes, once nothing runs that a test waits for elsewhere."""
        for process in self.background:
            process.wait(300)
        practice.kill_controller(self.folder)

    def start_slurmctld(self) -> None:
        """The controller comes back, and the nodes report to it."""
        practice.start_controller(self.folder)
        practice.wait_for_registration(self.folder)


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """A running practice cluster, gone at the end whatever happened; skips where none can run, saying why."""
    reason = packages.obstacle()
    if reason:
        pytest.skip(f"SLURM tests cannot run here: {reason}")
    end_orphans()
    folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir="/tmp"))  # short: unix sockets live below it
    folder.chmod(0o755)
    owner(folder).write_text(identity(os.getpid()))
    try:
        practice.up(folder, TEST_TIMERS)
        yield Cluster(folder)
    finally:
        practice.down(folder, delete=True)
        shutil.rmtree(folder, ignore_errors=True)
        owner(folder).unlink(missing_ok=True)


PREFIX = "practice-tests-"


def owner(folder: Path) -> Path:
    """The file that says which process a test cluster belongs to."""
    return folder.with_name(f"{folder.name}.owner")


def identity(pid: int) -> str:
    """A process's number and the moment it started: numbers are used again."""
    try:
        return f"{pid} " + Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return f"{pid} gone"


def end_orphans() -> None:
    """Clusters of test runs that were killed: their daemons run on. Never one whose owner lives."""
    for file in Path("/tmp").glob(f"{PREFIX}*.owner"):
        text = file.read_text()
        if text and identity(int(text.split()[0])) != text:
            practice.down(file.with_suffix(""), delete=True)
            shutil.rmtree(file.with_suffix(""), ignore_errors=True)
            file.unlink(missing_ok=True)


class Project:
    """A copy of the repository in a folder with a hostile name, a tiny data set, and commands run from there."""

    def __init__(self, root: Path, cluster: Cluster) -> None:
        self.root = root
        self.cluster = cluster
        self.data = root / "the data"
        self.standin = str(Path(__file__).with_name("standin.py"))
        self.env = {
            "ENV_PATH": sys.prefix,
            "SPEEDRUN_TRAINER": "nanogpt.train",  # until there is the speedrun's own
            "DATA_ROOT": str(self.data),
            "HF_HUB_OFFLINE": "1",
            "DATA_MIRROR": str(MIRROR) if MIRROR.is_dir() else str(root),
        }

    def bash(self, script: str, *args: object, check: bool = True, **env: str) -> subprocess.CompletedProcess:
        """`bash SCRIPT ARGS...` as a user types it in the repository's root."""
        words = ["bash", script, *args]
        return self.cluster.run(*words, env={**self.env, **env}, cwd=self.root, check=check)

    def submit(self, script: str, *args: object, **env: str) -> str:
        """`bash SCRIPT ARGS...` outside a job: it submits itself; the job's id."""
        out = self.bash(script, *args, **env).stdout
        return re.findall(r"^submitted job (\d+)", out, re.MULTILINE)[-1]

    def sbatch(self, *args: object, **env: str) -> str:
        """`sbatch ARGS...`; the job's id."""
        return self.cluster.sbatch(*args, env={**self.env, **env}, cwd=self.root)

    def training(self, job: str, run: str) -> dict[int, float]:
        """Loss by step so far, every attempt's lines; a step that was computed twice must be the same twice."""
        losses: dict[int, float] = {}
        path = self.root / "out" / run / "metrics.jsonl"
        for line in path.read_text().splitlines() if path.is_file() else []:
            record = json.loads(line)
            if record["event"] == "train":
                assert losses.setdefault(record["step"], record["loss"]) == record["loss"], (job, record)
        return losses

    def wait_for_step(self, job: str, run: str, step: int, timeout: float = 600) -> dict[int, float]:
        """Wait until the run has computed that step."""
        return self.cluster.wait_until(
            lambda: losses if max(losses := self.training(job, run), default=-1) >= step else None,
            timeout,
            lambda: f"{run} at step {step}: {self.cluster.job(job)}\n{self.cluster.log(job)}",
        )


@pytest.fixture(scope="session")
def project(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Project:
    """The repository as a user's clone, with a token set of 20,000 characters called `tiny`."""
    root = tmp_path_factory.mktemp("clones") / "it's my $(touch pwned) clone; #1"
    ignore = shutil.ignore_patterns("__pycache__", ".git", "out", "logs", "data", ".venv", ".*_cache")
    root.mkdir()
    for name in ("slurm", "nanogpt", "modded_nanogpt"):
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    for path in ROOT.iterdir():
        if path.is_file() and path.name not in (".git",) and not ignore(str(ROOT), [path.name]):
            shutil.copy(path, root)
    (root / "logs").mkdir()
    made = Project(root, cluster)
    write_tiny_set(made.data / "tiny")
    return made


@pytest.fixture(scope="session")
def slow_jobs(project: Project) -> dict[str, str]:
    """Jobs that mostly wait, begun by the tests of the scripts: their minutes pass beside other tests.

    On node5, which no test takes away meanwhile: a lost node's job is requeued by SLURM, and that counts too.
    """
    data = project.root / "slow data"
    (data / "fineweb10B").mkdir(parents=True)
    (data / "fineweb10B" / "fineweb_train_000001.bin").touch()
    standin = {"SPEEDRUN_TRAINER": project.standin, "DATA_ROOT": str(data)}
    common = ["-p", "pi_lab", "-w", "node5", "--gres=gpu:1", "--cpus-per-gpu=1", "--mem-per-gpu=1G"]
    speedrun = "slurm/modded/train_speedrun.sh"
    return {
        # told 40 s before its only minute ends, and SLURM looks every 30 s: it needs two or three jobs' time
        "time": project.sbatch(
            *common, "--time=1", "--signal=B:USR1@40", speedrun,
            "--out_dir=out/time", "--steps=45", "--pause=1", **standin,
        ),
        "chain": project.sbatch(
            *common, "--time=1", "--signal=B:USR1@55", speedrun,
            "--out_dir=out/chain", "--steps=500", "--pause=1", MAX_RESTARTS="1", **standin,
        ),
        "breaks": project.sbatch(
            *common, speedrun, "--out_dir=out/breaks", "--steps=9", "--break_at=4", **standin
        ),
    }  # fmt: skip


@pytest.fixture(scope="session")
def beside(cluster: Cluster, project: Project) -> Iterator[dict[str, Future]]:
    """What the scenes of beside.py come to, by their names: `beside["preempted"].result(600)`."""
    from beside import SCENES

    pool = ThreadPoolExecutor(len(SCENES))
    yield {scene.__name__: pool.submit(scene, cluster, project) for scene in SCENES}
    pool.shutdown(wait=False, cancel_futures=True)


# The speedrun's trainer in seconds on a CPU.
SMALL = (
    "tiny", "--dataset=docs", "--vocab_size=512", "--prefix=false", "--steps=3", "--extension_steps=1",
    "--eval_interval=100", "--eval_tokens=2048", "--eval_slice=1024", "--warmup=false", "--num_threads=1",
)  # fmt: skip


@pytest.fixture(scope="session")
def speedrun(project: Project) -> Iterator[tuple[str, Future]]:
    """(job, done) of the speedrun's script and trainer: told to save, as before a time limit, while other tests run."""
    write_documents(project.data / "docs")
    settings = {"SPEEDRUN_TRAINER": "", "NUM_GPUS": "2", "PARTITION": "pi_lab", "GPU_TYPE": "h200"}
    job = project.submit("slurm/modded/train_speedrun.sh", *SMALL, **settings)

    def tell() -> None:
        project.cluster.wait_until(  # from this line on all ranks listen, and no step has begun
            lambda: "training tokens, checked" in project.cluster.log(job),
            90,
            lambda: project.cluster.log(job),
        )
        project.cluster.run("scancel", "--batch", "--signal=USR1", job)

    with ThreadPoolExecutor(1) as pool:
        yield job, pool.submit(tell)


def write_documents(folder: Path) -> None:
    """GPT-2's format with ids below 512: documents of 1 to 300 tokens, each counting upwards."""
    import numpy as np

    from nanogpt.common.manifest import write_manifest
    from nanogpt.common.shards import write_shard

    rng, entries = np.random.default_rng(5), []
    folder.mkdir()
    for split, number, tokens in (("train", 1, 160_000), ("val", 0, 3000)):
        pieces = []
        while sum(map(len, pieces)) < tokens:
            length, first = rng.integers(1, 300), rng.integers(0, 500)
            pieces += [np.array([511]), (first + np.arange(length)) % 500]
        text = np.concatenate(pieces)[:tokens].astype(np.uint16)
        entries.append({**write_shard(folder / f"docs_{split}_{number:06}.bin", text), "split": split})
    write_manifest(folder, "docs", "gpt2", 512, 511, entries)


def write_tiny_set(folder: Path) -> None:
    """A character set of two shards, the same on every machine."""
    import numpy as np

    from nanogpt.common.manifest import write_manifest
    from nanogpt.common.shards import write_shard

    folder.mkdir(parents=True)
    (folder / "meta.json").write_text(json.dumps({"chars": "abcdefghijklmnop"}))
    steps = np.random.default_rng(5).integers(0, 3, 20_000)
    tokens = (np.cumsum(steps) % 16).astype(np.uint16)
    entries = []
    for split, part in (("train", tokens[:18_000]), ("val", tokens[18_000:])):
        number = 1 if split == "train" else 0
        entries.append({**write_shard(folder / f"tiny_{split}_{number:06}.bin", part), "split": split})
    write_manifest(folder, "tiny", "char", 16, None, entries)


# Real training in milliseconds a step: what all tests of the scripts pass on to the trainer.
TINY = [
    *("--device=cpu", "--dataset=tiny", "--n_layer=1", "--n_head=1", "--n_embd=16", "--block_size=16"),
    *(
        "--batch_size=1",
        "--gradient_accumulation_steps=4",
        "--eval_tokens=256",
        "--dropout=0.1",
        "--compile=false",
    ),
    *("--num_threads=1", "--eval_interval=100000", "--log_interval=1", "--learning_rate=1e-3"),
]
