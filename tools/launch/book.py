"""What was launched: one folder a launch, so that a run is found by its name from any shell, days later.

out/.launch/<name>/001/     the first launch of <name>; 002 the next one (a launch that goes on with the run)
    job.json                what was asked for, the token, the job id: written before and after sbatch
    code/                   the code as it was at submission; later edits do not reach a queued job
    args/<task>             the trainer's arguments of each array task, NUL-separated, mode 0600
    submit.sh               the exact batch script
"""

import contextlib
import dataclasses
import fcntl
import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from nanogpt.common.errors import UserError
from nanogpt.common.flags import nearest
from nanogpt.common.storage import atomic_write_json, storage_errors
from tools.args import NAME

SHELF = Path("out") / ".launch"
COMMENT = "engaging:"  # what stands before the token in a job's comment


@dataclass
class Launch:
    """One launch. `state`: `prepared`, `submitted`, `unknown` (SLURM did not answer) or `local`."""

    name: str
    number: int
    token: str
    preset: str
    trainer: str
    runs: list[str]  # one run directory a task, relative to the checkout
    args: list[str]  # the trainer's arguments, without the ones that differ between tasks
    state: str = "prepared"
    job_id: str = ""
    pid: int = 0
    pid_start: int = 0  # the kernel's start time of `pid`: a reused process id is not ours
    host: str = ""
    log: str = ""  # with SLURM's %x %j %A %a
    code: dict = field(default_factory=dict)
    request: dict = field(default_factory=dict)
    made: float = field(default_factory=time.time)

    def folder(self, root: Path) -> Path:
        """Where this launch is kept."""
        return root / SHELF / self.name / f"{self.number:03}"

    def save(self, root: Path) -> None:
        """Write job.json."""
        atomic_write_json(self.folder(root) / "job.json", dataclasses.asdict(self))

    def log_files(self, root: Path) -> list[Path]:
        """The log files that exist, tasks in order."""
        pattern = self.log.replace("%x", self.name).replace("%A", self.job_id).replace("%j", self.job_id)
        path = root / pattern
        if "%a" not in pattern:
            return [path] if path.is_file() else []
        before, _, after = path.name.partition("%a")
        found = []
        with contextlib.suppress(OSError):
            for entry in path.parent.iterdir():
                middle = entry.name.removeprefix(before).removesuffix(after)
                if entry.name == before + middle + after and middle.isdigit():
                    found.append((int(middle), entry))
        return [entry for _, entry in sorted(found)]


def new_launch(root: Path, name: str, **values: object) -> Launch:
    """Reserve the next number of `name`. Two launches at once get two numbers: mkdir decides."""
    shelf = root / SHELF / name
    with storage_errors(shelf):
        shelf.mkdir(parents=True, exist_ok=True)
        number = max(_numbers(shelf), default=0) + 1
        while True:
            try:
                (shelf / f"{number:03}").mkdir(mode=0o700)
                break
            except FileExistsError:
                number += 1
    launch = Launch(name=name, number=number, **values)  # type: ignore[arg-type]
    launch.save(root)
    return launch


@contextlib.contextmanager
def held(root: Path, name: str) -> Iterator[bool]:
    """Hold a name while it is launched; False when another process holds it at this moment.

    A lock of the kernel's, gone with the process that held it. Where the file system has none, nobody is refused:
    the lease of the run directory keeps two runs apart then.
    """
    path = root / SHELF / f".lock-{name}"
    with storage_errors(path):
        file = _open_lock(path)
    if file is None:
        yield False
        return
    try:
        yield True
    finally:
        with contextlib.suppress(OSError):
            path.unlink()
            path.parent.rmdir()  # leaves what is not empty
        os.close(file)


def _open_lock(path: Path) -> int | None:
    """The locked file's descriptor; None when another process has it."""
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            file = os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except FileNotFoundError:
            continue  # its last holder has just removed the folder
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(file)
            return None
        except OSError:
            return file  # no locks on this file system
        with contextlib.suppress(FileNotFoundError):
            if path.stat().st_ino == os.fstat(file).st_ino:
                return file
        os.close(file)  # its last holder removed it between the two calls


def latest(root: Path, name: str) -> Launch | None:
    """The newest launch of `name`, or None."""
    shelf = root / SHELF / name
    for number in sorted(_numbers(shelf), reverse=True):
        launch = read(shelf / f"{number:03}" / "job.json")
        if launch is not None:
            return launch
    return None


def find(root: Path, name: str) -> Launch:
    """The newest launch of `name`, or the one with that job id, or UserError with the nearest name."""
    launch = latest(root, name) if NAME.fullmatch(name) else None
    number = name.isascii() and name.isdigit()
    if launch is None and number:
        launch = by_job(root, name)
    if launch is None and (number or name == "JOBID"):  # as the guides write it
        what = "no launch here has this job id" if number else "stands for a job's number"
        raise UserError(
            f"{name}: {what}; squeue --me lists your jobs, scancel NUMBER ends one, engaging watch NUMBER shows it"
        )
    if launch is None:
        known = names(root)
        there = ", ".join(known[:8]) or "none yet: engaging launch nanogpt --name first"
        raise UserError(
            f"{name!r}: nothing was launched under this name here{nearest(name, known)} ({there})"
        )
    return launch


def names(root: Path) -> list[str]:
    """All names, the newest first."""
    found = []
    with contextlib.suppress(OSError):
        for path in (root / SHELF).iterdir():
            if NAME.fullmatch(path.name) and path.is_dir():
                found.append((path.stat().st_mtime, path.name))
    return [name for _, name in sorted(found, reverse=True)]


def by_job(root: Path, base: str) -> Launch | None:
    """The launch with this job id."""
    for name in names(root):
        for number in sorted(_numbers(root / SHELF / name), reverse=True):
            launch = read(root / SHELF / name / f"{number:03}" / "job.json")
            if launch is not None and launch.job_id == base:
                return launch
    return None


def _numbers(shelf: Path) -> list[int]:
    with contextlib.suppress(OSError):
        return [int(path.name) for path in shelf.iterdir() if path.name.isdigit() and path.name.isascii()]
    return []


def read(path: Path) -> Launch | None:
    """A launch from its file; None for a file that is absent, broken or not the user's own."""
    try:
        if path.stat().st_uid != os.getuid():
            return None
        values = json.loads(path.read_bytes())
        known = {field.name: field for field in dataclasses.fields(Launch)}
        launch = Launch(**{key: value for key, value in values.items() if key in known})
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        return None
    kinds = {"name": str, "number": int, "token": str, "job_id": str, "log": str, "pid": int, "runs": list}
    right = all(isinstance(getattr(launch, key), kind) for key, kind in kinds.items())
    if not right or not NAME.fullmatch(launch.name) or any(not isinstance(run, str) for run in launch.runs):
        return None
    return launch
