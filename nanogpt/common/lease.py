"""Who may write a run directory: the attempt with the highest number, and nobody else.

A node that SLURM has given up can go on writing while the requeued attempt runs elsewhere. Each attempt therefore
takes the lease when it starts, and looks at it before it publishes anything: a higher number there means that this
process is the ghost, and it stops without touching the run (exit status 76).
"""

import json
import os
import socket
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from nanogpt.common.errors import FencedError, UserError
from nanogpt.common.storage import atomic_write_json

NAME = "lease.json"


@dataclass(frozen=True)
class Lease:
    """One attempt's claim. `launch` is the same on all ranks of one torchrun and on no other."""

    attempt: int
    host: str
    pid: int
    pid_started: str  # from /proc: a recycled pid is another process
    job: str  # SLURM_JOB_ID, or ""
    launch: str
    taken: float  # Unix time in seconds, for people
    ready: bool = False  # the run directory is complete: the other ranks of the launch may use it


def launch_token() -> str:
    """What distinguishes this launch: torchrun's run id, port and restart, or this process where there is none."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        names = ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT", "MASTER_ADDR", "MASTER_PORT",
                 "SLURM_JOB_ID", "SLURM_RESTART_COUNT")  # fmt: skip
        return ":".join(os.environ.get(name, "") for name in names)
    return f"{socket.gethostname()}:{os.getpid()}:{process_start(os.getpid())}"


def process_start(pid: int) -> str:
    """When a process of this machine started, in clock ticks; "" when it does not run (or cannot be known)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""


def read(folder: Path) -> Lease | None:
    """The lease of a run directory; None when there is none, or none that can be read."""
    try:
        value = json.loads((folder / NAME).read_text(encoding="utf-8"))
        return Lease(**value)
    except (OSError, ValueError, TypeError):
        return None


def stamp(folder: Path) -> tuple[int, int] | None:
    """What changes whenever the lease is replaced: inode and time in ns, without reading it. None: it is not there."""
    try:
        status = (folder / NAME).stat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns


def refuse_live(folder: Path) -> None:
    """UserError when another process of this machine is writing this run right now."""
    old = read(folder)
    if old is not None and old.pid != os.getpid() and _lives_here(old):
        raise UserError(
            f"{folder}: process {old.pid} of this machine is writing this run; wait for it, "
            f"or stop it with: touch {folder}/stop"
        )


def _lives_here(holder: Lease) -> bool:
    started = holder.pid_started
    return holder.host == socket.gethostname() and bool(started) and process_start(holder.pid) == started


def _died_here(holder: Lease) -> bool:
    return holder.host == socket.gethostname() and bool(holder.pid_started) and not _lives_here(holder)


def take(folder: Path) -> Lease:
    """Become the next attempt. UserError when another process of this machine is writing there right now."""
    refuse_live(folder)
    old = read(folder)
    lease = Lease(
        attempt=(old.attempt if old else 0) + 1,
        host=socket.gethostname(),
        pid=os.getpid(),
        pid_started=process_start(os.getpid()),
        job=os.environ.get("SLURM_JOB_ID", ""),
        launch=launch_token(),
        taken=time.time(),
    )
    atomic_write_json(folder / NAME, asdict(lease))
    return lease


def ready(folder: Path, mine: Lease) -> None:
    """Tell the other ranks of this launch that the run is open; the last step of opening it."""
    atomic_write_json(folder / NAME, asdict(replace(mine, ready=True)))


def check(folder: Path, mine: Lease) -> None:
    """FencedError when a later attempt has taken the lease. A lease that cannot be read at all proves nothing."""
    current = read(folder)
    if current and (current.attempt, current.launch) != (mine.attempt, mine.launch):
        raise FencedError(
            f"{folder}: attempt {current.attempt} on {current.host} has taken over this run; "
            f"attempt {mine.attempt} stops here without writing"
        )


def wait_for(folder: Path, seconds: float = 120.0) -> Lease:
    """The lease of rank 0 of this launch, once it has opened the run; for the other ranks to wait for."""
    token, end = launch_token(), time.monotonic() + seconds
    while time.monotonic() < end:
        lease = read(folder)
        # Launches may share a token (torchrun's default port): a dead holder is the one before.
        if lease and lease.ready and lease.launch == token and not _died_here(lease):
            return lease
        time.sleep(0.05)
    raise UserError(f"{folder}: rank 0 did not open the run within {seconds:.0f} s; its error is above")
