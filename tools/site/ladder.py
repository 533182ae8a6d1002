"""`engaging next`: the ladder from a new account to a first comparison, which checks itself.

    engaging next            what is done, read from the disk and from SLURM, and the one next command
    engaging next --share    opt in: your ticks (no losses, no paths) go to the lab's board as well
    engaging next --lab      the ticks of everybody who opted in
    engaging next --unshare

A rung that was tried and failed carries its fix.
"""

import json
import os
import pwd
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from nanogpt.common.errors import CommandError, UserError
from nanogpt.common.manifest import read_manifest
from nanogpt.common.storage import atomic_write_text, make_folder
from tools.args import Parser, folded
from tools.launch.environment import environment_python
from tools.place import checkout
from tools.practice import shape
from tools.runs import Run, printable, read_run, runs_under
from tools.site import checks_machine, profile, slurm
from tools.site.cluster import Cluster, ask_cluster, user_name
from tools.site.estimate import gpus_of

NEWEST = 60  # runs of out/ that are looked at
QUICKSTART_LOSS, CHAR_LOSS = 2.0, 1.48  # to expect: 1.85 (tools/quickstart.py), and 1.47
CHAR_ITERS = 5000
SHELF = "ladder"  # beside the board's records
LARGEST = 10_000  # bytes of a shared file
MARKS = {"done": "[x]", "failed": "[!]", "todo": "[ ]"}


@dataclass(frozen=True)
class Rung:
    """One rung as it stands: `state` is done, failed or todo; `command` is what to type next, "" when done."""

    name: str
    state: str
    text: str
    command: str = ""


class Facts:
    """What the disk and SLURM say, each asked once and only when a rung wants it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.slurm = slurm.available()
        self.silent = ""
        self.data = Path(os.environ.get("DATA_ROOT") or root / "data")

    @cached_property
    def runs(self) -> list[Run]:
        """The newest runs of out/."""
        return [read_run(path) for path in runs_under(self.root / "out")[:NEWEST]]

    @cached_property
    def cluster(self) -> Cluster | None:
        """The cluster; None without SLURM, or when it does not answer, for the reason in `silent`."""
        try:
            return ask_cluster() if self.slurm else None
        except CommandError as error:
            self.silent = str(error)
            return None

    def queued(self, words: str) -> str:
        """`, job 12 is in the queue` when a job's name holds one of the words."""
        for job in self.cluster.my_jobs if self.cluster else []:
            if re.search(words, job.name):
                return f"job {job.base} ({job.name}) is {job.state.lower()}; engaging why {job.base}"
        return ""


def account(facts: Facts) -> Rung:
    """SLURM knows the user."""
    if not facts.slurm:
        return Rung("account", "done", "no SLURM here: runs start on this machine")
    if facts.cluster is None:
        return Rung("account", "failed", facts.silent, "engaging doctor")
    names = facts.cluster.accounts()
    if names or facts.cluster.notes:
        return Rung("account", "done", ", ".join(names) or "no accounting here")
    text = f"SLURM knows no account of {user_name()}; a new one takes about 15 minutes after the first log-in"
    return Rung("account", "failed", text, "engaging doctor")


def quota(facts: Facts) -> Rung:
    """Something can be written, and no quota is used up."""
    for finding in [*checks_machine.quota(facts.root), *checks_machine.disk(facts.root)]:
        if finding.level != "ok":
            return Rung("quota", "failed", f"{finding.text} -> {finding.fix}", "engaging doctor")
    return Rung("quota", "done", "room for data and checkpoints")


def torch(facts: Facts) -> Rung:
    """torch is there, built for CUDA where GPUs are to be used. Read from its files: nothing is imported."""
    python = environment_python()
    if python is None:
        return Rung("torch", "todo", "no Python with torch yet", "bash setup_env.sh")
    found = sorted(python.parent.parent.glob("lib/python3.*/site-packages/torch/version.py"))
    text = found[0].read_text(errors="replace") if found else ""
    version = re.search(r"__version__ = '([^']+)'", text)
    cuda = re.search(r"^cuda[^=]*= '([0-9.]+)'", text, re.MULTILINE)
    name = f"torch {version[1] if version else '(version unknown)'}"
    if cuda:
        return Rung("torch", "done", f"{name}, CUDA {cuda[1]}")
    gpus = bool(facts.cluster and facts.cluster.gpu_types()) or checks_machine.driver_version() is not None
    if not gpus:
        return Rung("torch", "done", f"{name}; no GPUs here")
    if facts.slurm and profile.cluster_name() == shape.CLUSTER:
        return Rung("torch", "done", f"{name}; the GPUs of the practice cluster are names only")
    return Rung(
        "torch", "failed", f"{name} is for CPUs only, and there are GPUs here", "bash setup_env.sh --cuda"
    )


def quickstart(facts: Facts) -> Rung:
    """The quickstart has run and learnt something."""
    runs = [run for run in facts.runs if run.name == "quickstart"]
    return _reached(
        "quickstart", runs, QUICKSTART_LOSS, "make quickstart"
    )  # a login node's goes to a job by itself


def gpu_job(facts: Facts) -> Rung:
    """A run that a GPU computed."""
    for run in facts.runs:
        if run.train and (names := gpus_of(run)):
            return Rung("GPU", "done", f"{run.name}: {len(names)}x {names[0]}")
    if waiting := facts.queued("first-gpu"):
        return Rung("GPU", "todo", waiting, "engaging watch")
    if not facts.slurm and checks_machine.driver_version() is None:
        return Rung("GPU", "todo", "neither a GPU nor SLURM on this machine", "ssh YOU@orcd-login.mit.edu")
    return Rung(
        "GPU",
        "todo",
        "nothing has run on a GPU yet",
        "engaging launch quickstart --name first-gpu --time 15m",
    )


def char_model(facts: Facts) -> Rung:
    """The character model at the loss that nanoGPT documents."""
    if waiting := facts.queued("shakespeare"):
        return Rung("char model", "todo", waiting, "engaging watch")
    runs = [run for run in facts.runs if run.settings.get("dataset") == "shakespeare_char" and _long(run)]
    command = "engaging launch nanogpt --name shakespeare"
    if not (facts.data / "shakespeare_char" / "manifest.json").is_file():
        command = "sbatch slurm/nanogpt/prepare_shakespeare.sh" if facts.slurm else (
            "python nanogpt/data/shakespeare_char/prepare.py"
        )  # fmt: skip
    return _reached("char model", runs, CHAR_LOSS, command)


def data(facts: Facts) -> Rung:
    """FineWeb's shards, whole: sizes now, hashes as the download checked them."""
    folder = facts.data / "fineweb10B"
    command = "sbatch slurm/modded/prepare_fineweb.sh" if facts.slurm else (
        "python modded_nanogpt/data/cached_fineweb10B.py 9"
    )  # fmt: skip
    if waiting := facts.queued("prepare-fineweb"):
        return Rung("data", "todo", waiting, "engaging watch")
    if not (folder / "manifest.json").is_file():
        return Rung("data", "todo", f"no fineweb10B in {facts.data}", command)
    try:
        files = read_manifest(folder).files
        made = (folder / "manifest.json").stat().st_mtime
        for entry in files:
            there = (folder / entry.name).stat()
            if there.st_size != entry.bytes or there.st_mtime > made:
                text = f"{folder / entry.name}: changed since its hash was taken"
                return Rung("data", "failed", text, command)
    except (CommandError, OSError) as error:
        return Rung("data", "failed", str(error), command)
    return Rung("data", "done", f"{sum(e.tokens for e in files) / 1e6:,.0f}M tokens, hashes taken")


def speedrun(facts: Facts) -> Rung:
    """A speedrun that went to its end."""
    if waiting := facts.queued("speedrun"):
        return Rung("speedrun", "todo", waiting, "engaging watch")
    runs = [
        run
        for run in facts.runs
        if "extension_steps" in run.settings and run.settings.get("recipe") != "tiny"
    ]
    for run in runs:
        if run.status == "finished" and run.val_loss is not None:
            return Rung("speedrun", "done", f"{run.name}: val {run.val_loss:.4f}")
    if runs:
        return Rung("speedrun", "failed", f"{runs[0].name}: {runs[0].status} at step {runs[0].step}",
                    f"engaging launch speedrun --name {runs[0].name}")  # fmt: skip
    return Rung(
        "speedrun", "todo", "none has finished yet", "engaging launch speedrun --gpus 1 --name speedrun-1"
    )


def comparison(facts: Facts) -> Rung:
    """Two experiments of at least two runs each."""
    found = {}
    for path in sorted((facts.root / "experiment_logs").glob("*/summary.json")):
        try:
            row = json.loads(path.read_bytes())
            if row["statistics"]["successful_runs"] >= 2:
                found[str(row["experiment_name"])] = path.parent
        except (OSError, ValueError, KeyError, TypeError):
            continue
    names = list(found)
    if len(names) >= 2:
        return Rung(
            "comparison", "done", printable(f"{names[0]} and {names[1]}: engaging compare says what it means")
        )
    command = "engaging experiment run --config tools/experiments/configs/stage_a_screening --study first"
    return Rung("comparison", "todo", f"{len(names)} of 2 experiments with two runs each", command)


LADDER: tuple[Callable[[Facts], Rung], ...] = (
    account, quota, torch, quickstart, gpu_job, char_model, data, speedrun, comparison,
)  # fmt: skip


def _reached(name: str, runs: list[Run], target: float, command: str) -> Rung:
    """Done when a run's best validation loss is at or under the target."""
    best = min((run for run in runs if run.best_val), key=lambda run: run.best_val.val_loss, default=None)
    if best is None or best.best_val is None:
        return Rung(name, "todo", "no such run has a validation loss yet", command)
    text = f"{best.name}: val {best.best_val.val_loss:.4f}"
    if best.best_val.val_loss <= target:
        return Rung(name, "done", text)
    if best.status != "finished":
        return Rung(name, "todo", f"{text} so far, {best.standing} at step {best.step}", command)
    return Rung(
        name, "failed", f"{text}, expected {target} or less: engaging repro out/{best.name}/log.txt", command
    )


def _long(run: Run) -> bool:
    return (run.max_steps or 0) >= CHAR_ITERS


def main(argv: list[str]) -> int:
    """The command."""
    parser = Parser("next", __doc__ or "")
    parser.add_argument("--lab", action="store_true", help="the ticks of everybody in the lab who opted in")
    parser.add_argument("--share", action="store_true", help="opt in: write your ticks to the lab's board")
    parser.add_argument("--unshare", action="store_true", help="take them away again")
    args = parser.read(argv)
    if args.lab:
        return _show_lab(board())
    if args.unshare:
        _own(board()).unlink(missing_ok=True)
        print("your ticks are no longer on the board")
        return 0
    facts = Facts(checkout())
    rungs = [rung(facts) for rung in LADDER]
    for rung in rungs:
        print(folded(f"{MARKS[rung.state]} {rung.name:11} {rung.text}", 16))
    ahead = next((rung for rung in rungs if rung.state != "done"), None)
    print(
        f"\nnext: {ahead.command}"
        if ahead
        else "\nall done: docs/leaderboard.md says how to hand a result in"
    )
    if args.share or _shared():
        _share(rungs)
    return 0


def board() -> Path:
    """The lab's board, or UserError."""
    named = os.environ.get("ENGAGING_BOARD", "")
    if not named or not Path(named).is_dir():
        raise UserError(
            f"board={named or '(not set)'}: no such folder; engaging config set board FOLDER (your lab knows it)"
        )
    return Path(named)


def _shared() -> bool:
    named = os.environ.get("ENGAGING_BOARD", "")
    return bool(named) and _own(Path(named)).is_file()


def _own(folder: Path) -> Path:
    return folder / SHELF / f"{_owner(os.getuid())}.json"


def _owner(uid: int) -> str:
    """Whose files these are: the kernel's word, not that of a variable or a file's name."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def _share(rungs: list[Rung]) -> None:
    path = _own(board())
    make_folder(path.parent)
    rows = {rung.name: rung.state for rung in rungs}
    atomic_write_text(path, json.dumps({"when": int(time.time()), "rungs": rows}) + "\n")
    print(f"shared: {path} (engaging next --unshare takes it away)")


def _show_lab(folder: Path) -> int:
    """A line a person: how far, and where it hangs."""
    lines = []
    for path in sorted((folder / SHELF).glob("*.json")):
        try:
            with path.open("rb") as file:
                row, uid = json.loads(file.read(LARGEST)), os.fstat(file.fileno()).st_uid
            if _owner(uid) != path.stem:
                continue  # written in somebody else's name
            states, when = dict(row["rungs"]), time.strftime("%Y-%m-%d", time.localtime(int(row["when"])))
        except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
            continue  # other people's files: what cannot be read is left out
        done = sum(state == "done" for state in states.values())
        ahead = next((str(name) for name, state in states.items() if state != "done"), "all done")
        failed = " (failed)" if states.get(ahead) == "failed" else ""
        lines.append(printable(f"{path.stem:16.16} {done:2} of {len(states)}  {ahead:.20}{failed}  {when}"))
    print("\n".join(lines) or "nobody has opted in yet: engaging next --share")
    return 0
