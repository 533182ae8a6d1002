"""The cluster's processes: which are alive, which are ours, and how they end. By id, never by name."""

import contextlib
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

from nanogpt.common.errors import CommandError


def state(pid: int) -> str:
    """The process's state letter, or "" when there is none. `kill -0` would call a zombie alive."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return ""


def alive(pid: int) -> bool:
    """True for a process that runs or can run again."""
    return state(pid) not in ("", "Z", "X")


def command_name(pid: int) -> str:
    """The program's short name, or "" when the process is gone."""
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return ""


def read_pid(file: Path) -> int | None:
    """The live process that a PID file names."""
    try:
        pid = int(file.read_text().strip())
    except (OSError, ValueError):
        return None
    return pid if alive(pid) else None


def children(pid: int) -> list[int]:
    """The direct children of a process."""
    try:
        return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def descendants(pid: int) -> list[int]:
    """All processes below one, children before their own children."""
    found = []
    for child in children(pid):
        found += [child, *descendants(child)]
    return found


def has_environment(pid: int, line: str) -> bool:
    """True for a live process whose environment holds exactly `NAME=value`."""
    try:
        return line.encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0") and alive(pid)
    except OSError:
        return False


def with_environment(line: str) -> list[int]:
    """Every live process whose environment holds exactly `NAME=value`."""
    numbers = (int(folder.name) for folder in Path("/proc").iterdir() if folder.name.isdigit())
    return [pid for pid in numbers if has_environment(pid, line)]


def end(pids: list[int], seconds: float, first: signal.Signals = signal.SIGTERM) -> None:
    """Ask the processes to end, wait up to `seconds`, then kill the rest. Returns when all are gone."""
    _send(pids, first)
    if not poll(lambda: not any(map(alive, pids)), seconds):
        _send([pid for pid in pids if alive(pid)], signal.SIGKILL)
        poll(lambda: not any(map(alive, pids)), 10)


def poll(condition: Callable[[], bool], seconds: float) -> bool:
    """True as soon as `condition()` holds, False when it did not within `seconds`."""
    limit = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > limit:
            return False
        time.sleep(0.04)
    return True


def wait_until(what: str, condition: Callable[[], bool], seconds: float, logs: Path) -> None:
    """`poll`, or an error that names what did not come and where its log is."""
    if not poll(condition, seconds):
        raise CommandError(f"{what}: not there after {seconds:.0f} s; the logs are in {logs}")


def _send(pids: list[int], number: signal.Signals) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
