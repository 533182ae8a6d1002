"""The run directory, `--out_dir`: everything one run leaves, and the only place a run is known by.

    source/           the trainer's code, copied at the start; the run executes from this copy
    config.json       every knob, and what followed from them
    environment.json  machine, versions, git state, command line; one object per attempt
    log.txt           opens with the source and one digest over it: the log alone is evidence
    metrics.jsonl     one JSON object a line, append only
    checkpoints/      see checkpoints.py
    lease.json        which attempt may write; see lease.py
    stop              touch it: the run saves and stops at its next step

Only rank 0 writes. Standard library only: a run is opened, or refused, before torch is imported.
"""

import contextlib
import datetime
import fcntl
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import IO

from nanogpt.common import lease, source
from nanogpt.common.errors import UserError
from nanogpt.common.machine import share_cores
from nanogpt.common.storage import atomic_write_json, make_folder, storage_errors

STAGE_VARIABLE = "ENGAGING_RUN_DIR"  # set for the process that runs from the copy
FENCE_SECONDS = 1.0  # how often an append reads the lease whatever its stamp says, which NFS may remember
# What a launcher, or the user, may have put into a run directory before the run began.
LAUNCHER_ENTRIES = {
    "code",
    "jobs",
    "job.json",
    "slurm",
    "logs",
    "args.json",
    "submit.json",
    "lease.json",
    "stop",
    "stdout.log",
    "note.txt",
}
# What a start that was killed before it wrote config.json, its last file, can have left.
BEGINNINGS = {"source", "environment.json", "log.txt", "metrics.jsonl", "checkpoints"}
OPEN_SECONDS = 60.0  # how long a start waits for another that is opening a run beside it
PACKAGES = ("torch", "triton", "numpy", "safetensors", "tiktoken")


class RunDir:
    """An open run: appends to its log and metrics, on rank 0 of the attempt that holds the lease."""

    def __init__(self, folder: Path, writes: bool) -> None:
        self.folder, self.writes = folder, writes
        self.config: dict = read_json(folder / "config.json")
        self.lease = lease.read(folder)
        self._checked, self._stamp = 0.0, None
        self._log: IO[str] | None = None
        self._metrics: IO[str] | None = None
        if writes:
            with storage_errors(folder):
                drop_half_line(folder / "metrics.jsonl")
                self._log = (folder / "log.txt").open("a", encoding="utf-8")
                self._metrics = (folder / "metrics.jsonl").open("a", encoding="utf-8")

    @property
    def attempt(self) -> int:
        """1 for the first start, one more for each resume."""
        return self.lease.attempt if self.lease else 1

    @property
    def checkpoints(self) -> Path:
        """The folder of the checkpoints."""
        return self.folder / "checkpoints"

    def check_fence(self) -> None:
        """FencedError when a later attempt owns the run."""
        if self.writes and self.lease:
            stamp = lease.stamp(self.folder)  # before reading: a replacement in between shows next time
            lease.check(self.folder, self.lease)
            self._checked, self._stamp = time.monotonic(), stamp

    def say(self, line: str) -> None:
        """Print a line and append it to log.txt (rank 0; silent elsewhere)."""
        if self.writes:
            _print(line)
            self._append(self._log, line)

    def record(self, event: str, **values: object) -> None:
        """Append one object to metrics.jsonl. A value that is not finite is written as null: JSON has no NaN.

        All but training steps get the time of day: a clock can be compared with it.
        """
        if self.writes:
            if event != "train":
                values["time"] = round(time.time(), 3)
            clean = {key: None if value != value or value in (float("inf"), float("-inf")) else value
                     for key, value in values.items()}  # fmt: skip
            line = json.dumps({"event": event, **clean, "attempt": self.attempt}, allow_nan=False)
            self._append(self._metrics, line)

    def _append(self, file: IO[str] | None, line: str) -> None:
        if time.monotonic() - self._checked > FENCE_SECONDS or lease.stamp(self.folder) != self._stamp:
            self.check_fence()
        with storage_errors(self.folder):
            file.write(line + "\n")
            file.flush()

    def asked_to_stop(self) -> bool:
        """Whether somebody has touched `stop`."""
        return (self.folder / "stop").exists()

    def close(self) -> None:
        """Flush the files to the disk."""
        for file in (self._log, self._metrics):
            if file is not None and not file.closed:
                with storage_errors(self.folder), file:
                    file.flush()
                    os.fsync(file.fileno())


def _print(line: str) -> None:
    """Print, and go on without a terminal when it has gone: the log has every line, and a run outlives `| head`."""
    try:
        print(line, flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextlib.contextmanager
def one_at_a_time(folder: Path) -> Iterator[None]:
    """Opening `folder` is for one process of this machine at a time; the next one sees what this one made.

    The lock is on the folder above, so no file is left. Where file systems know no such lock, the lease must do.
    """
    descriptor = None
    with contextlib.suppress(OSError):
        above = next(path for path in folder.parents if path.is_dir())
        descriptor = os.open(above, os.O_RDONLY)
        end = time.monotonic() + OPEN_SECONDS
        while time.monotonic() < end:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(0.02)
    try:
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)


def holds_run(folder: Path) -> bool:
    """Whether `folder` is the directory of a run."""
    return os.path.isfile(folder / "config.json")  # noqa: PTH113 (Path.is_file raises for names that are too long)


def refuse_taken(folder: Path, overwrite: bool) -> None:
    """UserError when no new run can begin in `folder`: it is a file, or holds a run (without `overwrite`) or files."""
    with storage_errors(folder):
        if folder.exists() and not folder.is_dir():
            raise UserError(f"--out_dir={folder}: is a file; choose a folder")
        strange = [name for name in _strangers(folder) if name not in BEGINNINGS]
    if holds_run(folder):
        lease.refuse_live(folder)
        if not overwrite:
            raise UserError(
                f"--out_dir={folder}: holds a run already; go on with it (--init_from=resume), choose another "
                "--out_dir, or move it aside with --overwrite=true"
            )
    elif strange:
        raise UserError(
            f"--out_dir={folder}: is not a run and not empty (it holds {strange[0]!r}); choose a new folder"
        )


def _strangers(folder: Path) -> list[str]:
    """What is in `folder` and is neither hidden nor put there by a launcher."""
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    return sorted(name for name in names - LAUNCHER_ENTRIES if name[0] != ".")


def create(folder: Path, files: dict[str, bytes], config: dict, argv: Sequence[str], overwrite: bool) -> None:
    """Make `folder` the directory of a new run: source copy, config, environment, the head of the log.

    UserError when it holds another run (unless `overwrite`, which moves that one aside) or other files.
    """
    refuse_taken(folder, overwrite)
    if holds_run(folder):
        move_aside(folder)
    elif beginnings := _strangers(folder):
        lease.refuse_live(folder)
        rest = _free_name(folder)
        make_folder(rest)
        for name in beginnings:  # what a launcher has put there stays
            with storage_errors(folder):
                (folder / name).rename(rest / name)
    make_folder(folder / "checkpoints")
    mine = lease.take(folder)
    source.write_folder(files, folder / "source")
    with storage_errors(folder), (folder / "log.txt").open("wb") as log:
        log.write(source.to_log(files))
        log.write(b"config " + json.dumps(config).encode() + b"\n")
    write_environment(folder, argv)
    atomic_write_json(folder / "config.json", config)  # the last file: with it, the folder is a run
    lease.ready(folder, mine)


def reopen(
    folder: Path, config: dict, argv: Sequence[str], new_source: dict[str, bytes] | None = None
) -> None:
    """Become the next attempt of the run in `folder`; `new_source` takes the place of its source copy."""
    mine = lease.take(folder)
    end_line(folder / "log.txt")
    if new_source:
        change = source.change_to_log(source.collect(folder / "source", (".",)), new_source, mine.attempt)
        with storage_errors(folder), (folder / "log.txt").open("ab") as log:
            log.write(change)
        source.replace_folder(new_source, folder / "source")
    write_environment(folder, argv)
    atomic_write_json(folder / "config.json", config)
    lease.ready(folder, mine)


def move_aside(folder: Path) -> Path:
    """Rename `folder` to the first free `<folder>.N`; its new path."""
    target = _free_name(folder)
    with storage_errors(folder):
        folder.rename(target)
    _print(f"moved the run that was in {folder} to {target}")
    return target


def remove(folder: Path) -> None:
    """Delete the run in `folder`, config.json last; what a launcher has put there stays."""
    staying = LAUNCHER_ENTRIES - {"lease.json", "stop"}
    with storage_errors(folder):
        mine = [path for path in folder.iterdir() if path.name not in staying]
        for path in sorted(mine, key=lambda path: path.name == "config.json"):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def _free_name(folder: Path) -> Path:
    number = 1
    while (target := folder.with_name(f"{folder.name}.{number}")).exists():
        number += 1
    return target


def last_end(folder: Path) -> dict | None:
    """The `end` line of a run's newest attempt; None when that has not come to its end, or there is none."""
    try:
        lines = (folder / "metrics.jsonl").read_bytes().splitlines()
    except OSError:
        return None
    for line in reversed(lines):
        with contextlib.suppress(ValueError):
            event = json.loads(line)
            if isinstance(event, dict) and event.get("event") in ("start", "resume", "end"):
                return event if event["event"] == "end" else None
    return None


def is_finished(folder: Path) -> bool:
    """Whether the run in `folder` came to its end."""
    return (last_end(folder) or {}).get("status") == "finished"


def end_line(path: Path) -> None:
    """End a line that a killed attempt left half-written, so that the next one starts on its own."""
    if path.exists() and path.stat().st_size:
        with storage_errors(path), path.open("rb+") as file:
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")


def drop_half_line(path: Path) -> None:
    """Cut off the line that a killed attempt, or a full disk, left half-written in a file of JSON lines."""
    if path.exists():
        with storage_errors(path), path.open("rb+") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - (1 << 16)))
            tail = file.read()
            if tail and not tail.endswith(b"\n"):
                file.truncate(size - len(tail) + tail.rfind(b"\n") + 1)


def read_json(path: Path) -> dict:
    """A JSON object from a run directory. UserError when it is not there or not an object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}); is this the directory of a run?") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object; is this the directory of a run?")
    return value


def write_environment(folder: Path, argv: Sequence[str]) -> None:
    """Add this attempt to environment.json, and to the log."""
    path = folder / "environment.json"
    attempts = read_json(path)["attempts"] if path.exists() else []
    now = environment(argv)
    atomic_write_json(path, {"attempts": [*attempts, now]})
    with storage_errors(folder), (folder / "log.txt").open("a", encoding="utf-8") as log:
        log.write("environment " + json.dumps(now) + "\n")


def environment(argv: Sequence[str]) -> dict:
    """What a run depends on besides its source: machine, versions, git state. No environment variable's value but
    SLURM's numbers: those hold secrets."""
    return {
        "time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "host": platform.node(),
        "system": platform.platform(),
        "python": platform.python_version(),
        **gpus(argv),
        "packages": {name: version for name in PACKAGES if (version := _version(name))},
        "git": git_state(),
        "argv": list(argv),
        "world_size": int(os.environ.get("WORLD_SIZE", "1")),
        "slurm": {
            name: os.environ[name]
            for name in ("SLURM_JOB_ID", "SLURM_JOB_PARTITION", "SLURM_RESTART_COUNT", "SLURM_JOB_NODELIST",
                         "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID")
            if name in os.environ
        },
    }  # fmt: skip


def gpus(argv: Sequence[str]) -> dict:
    """{"gpus": names of the GPUs that the ranks use, one each, "driver": version}; no names on a CPU."""
    tool, chosen = shutil.which("nvidia-smi"), os.environ.get("CUDA_VISIBLE_DEVICES")
    if tool is None or chosen in ("", "-1") or "--device=cpu" in argv:
        return {"gpus": []}
    command = [tool, "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(
            [*command, f"--id={chosen}"] if chosen else command, capture_output=True, text=True, timeout=20
        )
    except (OSError, subprocess.TimeoutExpired):
        return {"gpus": []}
    lines = [line.rsplit(", ", 1) for line in done.stdout.splitlines() if ", " in line]
    if done.returncode or not lines:
        return {"gpus": []}
    ranks, here = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return {"gpus": [name for name, _ in lines[:here]] * max(1, ranks // here), "driver": lines[0][1]}


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def git_state() -> dict:
    """{"commit", "changed": number of changed tracked files} of the repository this code is in; {} outside of one."""
    folder = Path(__file__).resolve().parent

    def git(*words: str) -> str:
        done = subprocess.run(["git", "-C", str(folder), *words], capture_output=True, text=True, timeout=20)
        return done.stdout if done.returncode == 0 else ""

    try:
        commit = git("rev-parse", "HEAD").strip()
        changed = len(git("status", "--porcelain", "--untracked-files=no").splitlines()) if commit else 0
    except (OSError, subprocess.TimeoutExpired):
        return {}
    return {"commit": commit, "changed": changed} if commit else {}


def enter_copy(folder: Path, entry: str, *words: str) -> None:
    """Replace this process by one that runs `entry` from the run's source copy, with `words`. Does not return."""
    script = folder / "source" / entry
    os.environ[STAGE_VARIABLE] = str(folder)
    share_cores(os.environ)
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(sys.executable, [sys.executable, str(script), f"--out_dir={folder}", *words])


def running_from_copy(script: Path) -> Path | None:
    """The run directory whose source copy `script` belongs to, when `enter_copy` started this process."""
    folder = os.environ.pop(STAGE_VARIABLE, "")
    if folder and script.resolve().is_relative_to(Path(folder).resolve() / "source"):
        return Path(folder)
    return None
