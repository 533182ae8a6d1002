"""What the suite costs, printed at its end and never asserted: time by area beside its budget, and starts of torch.

`import torch` costs seconds, so how often it happens is what a suite's time depends on. Every process that imports
torch opens one file of it once; the kernel tells of each opening (inotify(7)), whoever the process is. Forks of a
process that has torch already are not counted, and cost nothing; other work with the same environment meanwhile is.
"""

import ctypes
import importlib.util
import os
import struct
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

# Area: (seconds of tests of the 8 minutes, the folders or files it is made of).
AREAS = {
    "nanogpt and common": (
        170,
        ("tests/common", "tests/data", "tests/docs", "tests/environment", "tests/faults"),
    ),
    "slurm": (120, ("tests/slurm",)),
    "speedrun": (60, ("tests/modded",)),
    "study and evidence": (
        60,
        ("tests/tools/experiments", "tests/tools/analysis", "tests/tools/leaderboard"),
    ),
    "tools": (70, ("tests/tools",)),
}
MOST_STARTS = 200
OPENED_ONCE = "lib/libtorch_global_deps.so"  # by every import of torch, and by nothing else
IN_OPEN, IN_NONBLOCK = 0x20, 0o4000
EVENT = struct.Struct("iIII")  # watch, mask, cookie, bytes of the name that follows


class TorchStarts:
    """Counts the processes that import torch from now on; None where the kernel or torch cannot be asked."""

    def __init__(self) -> None:
        self._descriptor, self._count = -1, 0
        found = importlib.util.find_spec("torch")
        if found is None or found.origin is None or not sys.platform.startswith("linux"):
            return
        library = ctypes.CDLL(None, use_errno=True)
        self._descriptor = library.inotify_init1(IN_NONBLOCK)
        path = Path(found.origin).parent / OPENED_ONCE
        if (
            self._descriptor >= 0
            and library.inotify_add_watch(self._descriptor, os.fsencode(path), IN_OPEN) < 0
        ):
            os.close(self._descriptor)
            self._descriptor = -1

    def count(self) -> int | None:
        """How many there have been."""
        if self._descriptor < 0:
            return None
        while True:
            try:
                data = os.read(self._descriptor, 1 << 16)
            except BlockingIOError:
                return self._count
            place = 0
            while place < len(data):
                self._count += 1
                place += EVENT.size + EVENT.unpack_from(data, place)[3]


def area_of(nodeid: str) -> str:
    """The area that a test's time belongs to; files directly in tests/ are the baseline's."""
    places = ((name, place) for name, (_, folders) in AREAS.items() for place in folders)
    return next((name for name, place in places if nodeid.startswith(f"{place}/")), "nanogpt and common")


def cpu_seconds() -> float:
    """Processor time of this process and of its children that have ended."""
    return sum(os.times()[:4])


class Budget:
    """The plugin: workers measure the processor time of each test, the process that prints adds it up."""

    def __init__(self) -> None:
        self.starts = TorchStarts()
        self.wall: Counter[str] = Counter()
        self.cpu: Counter[str] = Counter()
        self._before = cpu_seconds()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self) -> Iterator[None]:
        report = yield
        now = cpu_seconds()
        report.cpu, self._before = now - self._before, now
        return report

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        area = area_of(report.nodeid)
        self.wall[area] += report.duration
        self.cpu[area] += getattr(report, "cpu", 0.0)

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if not self.wall:
            return
        terminalreporter.section("time by area (nothing here is asserted)")
        row = "{:<22} {:>8} {:>10} {:>10}".format
        terminalreporter.write_line(row("", "seconds", "budget", "processor"))
        for area, (seconds, _) in AREAS.items():
            if self.wall[area]:
                terminalreporter.write_line(
                    row(area, f"{self.wall[area]:.0f}", seconds, f"{self.cpu[area]:.0f}")
                )
        count = self.starts.count()
        shown = "unknown on this system" if count is None else f"{count}, at most {MOST_STARTS} wanted"
        terminalreporter.write_line(f"starts of torch: {shown}")
