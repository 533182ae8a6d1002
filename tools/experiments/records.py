"""An experiment's folder: written so that a crash anywhere, and any number of runs ending at once, lose nothing.

experiment_logs/<name>_<timestamp>/
    experiment.log        for people          config.json     the configuration used
    results.jsonl         a line a run        metrics.jsonl   a line a step
    summary.json          statistics          git_diff.patch  when the clone had changes
    experiment.json       what is to be run: seeds, script, flags, executor     launches.jsonl   jobs submitted
    runs/run_0_seed_42/   the run directory (docs/run-directory.md) and stdout.log
experiment_logs/.code/<digest>/   the code of all its runs, as it was at the start; equal code is kept once

The run directories are the truth. `collect` reads those that have ended and appends them, under a lock that the
kernel lets go of when its holder dies; a run that stands in results.jsonl is never read again.
"""

import contextlib
import errno
import fcntl
import json
import os
import re
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from nanogpt.common.errors import StorageError, UserError
from nanogpt.common.rundir import drop_half_line
from nanogpt.common.storage import (
    atomic_write_json,
    atomic_write_text,
    fsync_folder,
    make_folder,
    storage_errors,
)
from tools.experiments.config import ExperimentConfig, parse
from tools.experiments.trainer import Trainer
from tools.launch import snapshot

SHELF = "experiment_logs"
CODE = ".code"
LARGEST_PATCH = 20 << 20  # bytes of git_diff.patch


@dataclass(frozen=True)
class Experiment:
    """What one folder holds, as it was written at its start."""

    folder: Path
    config: ExperimentConfig
    trainer: Trainer
    gpus: int
    study: str = ""
    overrides: tuple[str, ...] = ()
    executor: str = "local"
    one_job: bool = False
    config_file: str = ""
    digest: str = ""  # of its code
    gate: tuple[str, ...] = ()  # experiments of earlier stages whose results must promote this variant first
    options: dict = field(default_factory=dict)  # SLURM's: time, partition, account ...

    @property
    def name(self) -> str:
        """The folder's name: `nanogpt_palm_screening_20261121_060000`."""
        return self.folder.name

    @property
    def code(self) -> Path:
        """The copy of the code that every run of this experiment executes."""
        return self.folder.parent / CODE / (self.digest or "DIGEST")

    @property
    def runs(self) -> list[tuple[int, int]]:
        """(run_id, seed) of every run."""
        return list(enumerate(self.config.seeds()))

    def run_folder(self, run_id: int) -> Path:
        """The run directory of a run."""
        return self.folder / "runs" / f"run_{run_id}_seed_{self.config.base_seed + run_id}"

    def log(self, text: str) -> None:
        """A line in experiment.log."""
        line = f"{datetime.now():%Y-%m-%d %H:%M:%S}  {text}\n"
        _append(self.folder / "experiment.log", line.encode())

    def save(self) -> None:
        """Write experiment.json and config.json."""
        atomic_write_json(self.folder / "config.json", self.config.as_json())
        values = {
            "format": 1,
            "study": self.study,
            "config_file": self.config_file,
            "trainer": vars(self.trainer),
            "gpus": self.gpus,
            "overrides": list(self.overrides),
            "executor": self.executor,
            "one_job": self.one_job,
            "digest": self.digest,
            "gate": list(self.gate),
            "options": self.options,
        }
        atomic_write_json(self.folder / "experiment.json", values)


def keep_code(root: Path) -> dict:
    """Copy the checkout's code to the shelf, once for equal code: what `snapshot.copy_code` says, and git's state."""
    shelf = root / SHELF / CODE
    make_folder(shelf)
    with tempfile.TemporaryDirectory(prefix=".new-", dir=shelf) as folder, storage_errors(shelf):
        code = snapshot.copy_code(root, Path(folder) / "code")
        target = shelf / code["digest"][:16]
        try:
            (Path(folder) / "code").rename(target)
        except OSError as error:  # the same code is there already
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        fsync_folder(shelf)
    return {**code, **git_info(root)}


def name_of(folder: Path) -> str:
    """The experiment's name: the folder's without the time that `create` gave it."""
    return re.sub(r"_\d{8}_\d{6}(_\d+)?$", "", folder.name)


def create(root: Path, experiment: Experiment, code: dict) -> Experiment:
    """Make the folder (its name gets the time) and write down what is to be run. `code`: of `keep_code`."""
    shelf = root / SHELF
    make_folder(shelf)
    name, number = f"{experiment.config.experiment_name}_{time.strftime('%Y%m%d_%H%M%S')}", 1
    folder = shelf / name
    with storage_errors(shelf):
        while True:  # two experiments of one name in one second get two folders: mkdir decides
            try:
                folder.mkdir()
                break
            except FileExistsError:
                number += 1
                folder = shelf / f"{name}_{number}"
    made = Experiment(**{**vars(experiment), "folder": folder, "digest": code["digest"][:16]})
    try:
        (folder / "runs").mkdir()
        if not (made.code / made.trainer.script).is_file():
            raise UserError(
                f"{made.trainer.script}: git ignores it, so it is not part of the code; git add -f it"
            )
        atomic_write_json(folder / ".code.json", code)
        _write_patch(root, folder)
        made.save()
    except BaseException:
        snapshot.remove(folder)
        raise
    made.log(f"experiment {made.name}: {made.config.description or made.config.label}")
    made.log(
        f"script {made.trainer.script}, code {code['digest'][:12]}, commit {code['commit'] or 'unknown'}"
    )
    made.log(f"{len(made.runs)} runs, seeds {made.runs[0][1]} to {made.runs[-1][1]}, {made.gpus} GPUs each")
    return made


def read(folder: Path) -> Experiment:
    """The experiment in `folder`; UserError when it holds none, or a file of it is damaged."""
    state = _object(folder / "experiment.json")
    try:
        config = parse((folder / "config.json").read_bytes(), folder / "config.json")
        trainer = Trainer(**state["trainer"])
        right = isinstance(state["gpus"], int) and isinstance(trainer.script, str)
        right = right and re.fullmatch(r"[0-9a-f]{16}", state["digest"])
        if not right or state.get("format") != 1:
            raise TypeError
        return Experiment(
            folder, config, trainer, state["gpus"], str(state.get("study", "")),
            tuple(map(str, state.get("overrides", ()))), str(state.get("executor", "local")),
            bool(state.get("one_job")), str(state.get("config_file", "")), state["digest"],
            tuple(map(str, state.get("gate", ()))), dict(state.get("options", {})),
        )  # fmt: skip
    except OSError as error:
        raise UserError(f"{folder / 'config.json'}: cannot be read: {error.strerror}") from None
    except (KeyError, TypeError, ValueError):
        raise UserError(
            f"{folder / 'experiment.json'}: is not what the runner wrote there; restore it, or run the "
            "configuration again"
        ) from None


def is_experiment(folder: Path) -> bool:
    """Whether `folder` is an experiment's."""
    return (folder / "experiment.json").is_file()


def all_in(shelf: Path) -> list[Path]:
    """The experiments' folders in `shelf`, the oldest first."""
    found = []
    with contextlib.suppress(OSError):
        found = [path for path in shelf.iterdir() if path.name[:1] != "." and is_experiment(path)]
    return sorted(found, key=lambda path: (re.sub(r".*_(\d{8}_\d{6}.*)", r"\1", path.name), path.name))


# ---- files that grow -----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def lock(folder: Path, name: str = ".lock", wait: bool = True) -> Iterator[bool]:
    """Hold `folder`'s lock (of the kernel: it ends with its holder). Yields False when it is taken and `wait` is not.

    On a file system without locks everybody gets in: lines are then appended whole all the same, and readers take a
    run's last line.
    """
    path = folder / name
    with storage_errors(path):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            held = True
        except (BlockingIOError, PermissionError):
            held = False
        except OSError:
            held = True
        yield held
    finally:
        os.close(descriptor)


def append_lines(path: Path, rows: list[dict]) -> None:
    """Append JSON lines in one write, flushed to the disk. A half line that a crash left goes first. Call locked."""
    if not rows:
        return
    drop_half_line(path)
    _append(path, "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows).encode())


def read_lines(path: Path, containing: bytes = b"") -> list[dict]:
    """The JSON objects of a file's lines (with `containing` in them); half lines and strangers are left out."""
    found = []
    try:
        data = path.read_bytes()
    except OSError:
        return found
    for line in data.split(b"\n"):
        with contextlib.suppress(ValueError, RecursionError):
            value = json.loads(line) if line.strip() and containing in line else None
            if isinstance(value, dict):
                found.append(value)
    return found


def results(experiment: Experiment) -> dict[int, dict]:
    """The line of each run in results.jsonl that counts, by run_id: the last, unless the run is being retried."""
    known = dict(experiment.runs)
    found: dict[int, list[dict]] = {}
    for row in read_lines(experiment.folder / "results.jsonl"):
        if _is_run(row, known) and "success" in row:
            found.setdefault(row["run_id"], []).append(row)
    retries: dict[int, int] = {}
    for row in read_lines(experiment.folder / "retries.jsonl"):
        if _is_run(row, known):
            retries[row["run_id"]] = retries.get(row["run_id"], 0) + 1
    return {run: rows[-1] for run, rows in found.items() if len(rows) > retries.get(run, 0)}


def _is_run(row: dict, known: dict[int, int]) -> bool:
    return isinstance(row.get("run_id"), int) and row["run_id"] in known


def _append(path: Path, data: bytes) -> None:
    with storage_errors(path):
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            if os.write(descriptor, data) != len(data):
                raise StorageError(f"{path}: cannot be written: the disk is full")
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _object(path: Path) -> dict:
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise UserError(f"{path.parent}: not an experiment (no experiment.json)") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            f"{path}: cannot be read: {error}; restore it, or run the configuration again"
        ) from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected an object; restore it, or run the configuration again")
    return value


# ---- where the code came from --------------------------------------------------------------------------------------


def git_info(root: Path) -> dict[str, object]:
    """{"commit", "branch", "dirty", "changed_files"} of the clone; None where git does not say."""
    status = _git(root, "status", "--porcelain")
    return {
        "commit": (_git(root, "rev-parse", "HEAD") or "").strip() or None,
        "branch": (_git(root, "rev-parse", "--abbrev-ref", "HEAD") or "").strip() or None,
        "dirty": None if status is None else bool(status.strip()),
        "changed_files": len((status or "").splitlines()),
    }


def code_info(experiment: Experiment) -> dict[str, object]:
    """`git_info` and the code's digest as they were at the start."""
    try:
        value = json.loads((experiment.folder / ".code.json").read_bytes())
    except (OSError, ValueError):
        return {}
    keys = ("commit", "branch", "dirty", "changed_files", "digest")
    return {key: value.get(key) for key in keys} if isinstance(value, dict) else {}


def _write_patch(root: Path, folder: Path) -> None:
    patch = _git(root, "diff", "HEAD")
    if patch and patch.strip():
        data = patch.encode("utf-8", "surrogateescape")[:LARGEST_PATCH]
        atomic_write_text(folder / "git_diff.patch", data.decode("utf-8", "replace"))


def _git(root: Path, *words: str) -> str | None:
    if not (root / ".git").exists():
        return None
    try:
        done = subprocess.run(["git", "-C", str(root), *words], stdin=subprocess.DEVNULL, capture_output=True)
    except OSError:
        return None
    return done.stdout.decode("utf-8", "surrogateescape") if done.returncode == 0 else None
