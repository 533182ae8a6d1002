"""What a run of the tests cost, printed at its end and never asserted: seconds by folder, and torch's starts.

A start of torch opens the file of its extension module; a fork of a process that has it does not. inotify counts the
openings, whoever makes them: tests, their commands, the local SLURM's jobs (and a stranger with the same environment).
"""

import ctypes
import importlib.machinery
import importlib.util
import os
import sys
import threading
from collections import Counter
from pathlib import Path

import pytest

IN_OPEN, EVENT_BYTES = 0x20, 16  # <sys/inotify.h>; an event without a name


class Openings:
    """`count`: how often `path` has been opened since; -1 where nothing can tell (not Linux)."""

    def __init__(self, path: str | None) -> None:
        libc = ctypes.CDLL(None) if sys.platform == "linux" and path else None
        handle = libc.inotify_init1(os.O_CLOEXEC) if libc else -1
        watched = handle >= 0 and libc.inotify_add_watch(handle, os.fsencode(path), IN_OPEN) >= 0
        self.count = 0 if watched else -1
        if watched:
            threading.Thread(target=self._read, args=(handle,), daemon=True).start()

    def _read(self, handle: int) -> None:
        while events := os.read(handle, 4096):
            self.count += len(events) // EVENT_BYTES


def torchs_extension() -> str | None:
    """The file that `import torch` loads, found without importing it."""
    package = importlib.util.find_spec("torch")
    found = importlib.machinery.PathFinder.find_spec("_C", package and package.submodule_search_locations)
    return found and found.origin


class SuiteCost:
    """The plugin: belongs to the process that prints the summary."""

    def __init__(self) -> None:
        self.torch, self.seconds = Openings(torchs_extension()), Counter()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.seconds[Path(report.nodeid.split("::")[0]).parent.as_posix()] += report.duration

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        parts = [f"{folder} {seconds:.0f}" for folder, seconds in self.seconds.most_common()]
        total = sum(self.seconds.values())
        started = "not counted here" if self.torch.count < 0 else f"{self.torch.count} times"
        terminalreporter.write_line(f"seconds of all processes: {total:.0f} ({', '.join(parts)})")
        terminalreporter.write_line(f"torch was started: {started}")
