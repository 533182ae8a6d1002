"""Progress of long work: a live bar at a terminal, a plain line every half minute in a log."""

import sys
import time
from types import TracebackType
from typing import TextIO

LOG_SECONDS = 30.0


def duration(seconds: float) -> str:
    """Seconds as people read them: 45 s, 3 min 20 s, 2 h 05 min."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


class Progress:
    """Shows how far bytes have come: `with Progress("reading") as bar: bar.update(done, total, "12 files")`.

    A log gets its first line after `log_seconds`, so short work is silent. `update` is cheap to call often.
    """

    def __init__(self, what: str, *, stream: TextIO | None = None, log_seconds: float = LOG_SECONDS) -> None:
        self.what = what
        self.stream = stream or sys.stderr
        self.log_seconds = log_seconds
        self.started = self.shown = time.monotonic()
        self.first: int | None = None  # what was there before we began, in bytes: a resumed download
        self._live = None
        self._task = None

    def __enter__(self) -> "Progress":
        if self.stream.isatty():
            self._start_bar()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def update(self, done: int, total: int | None = None, note: str = "") -> None:
        """`done` of `total` bytes (None: nobody knows); `note` is shown after them."""
        now = time.monotonic()
        if self.first is None:
            self.first = done
        finished = total is not None and done >= total
        if self._live is not None:
            if now - self.shown >= 0.1 or finished:
                self.shown = now
                line = self._line(done, total, note, now)
                self._live.update(self._task, completed=done, total=total, description=line)
        elif now - self.shown >= self.log_seconds:
            self.shown = now
            print(self._line(done, total, note, now), file=self.stream, flush=True)

    def _line(self, done: int, total: int | None, note: str, now: float) -> str:
        seconds = max(1e-3, now - self.started)
        speed = (done - (self.first or 0)) / seconds
        parts = [
            f"{done / 1e6:,.1f} MB" + (f" of {total / 1e6:,.1f} MB ({done / total:.0%})" if total else "")
        ]
        parts += [note] if note else []
        parts.append(f"{speed / 1e6:.1f} MB/s")
        if total and speed > 0:
            parts.append(f"{duration((total - done) / speed)} left")
        return f"{self.what}: " + ", ".join(parts)

    def _start_bar(self) -> None:
        try:
            from rich.console import Console
            from rich.progress import BarColumn, TextColumn
            from rich.progress import Progress as RichProgress
        except ImportError:  # the plain lines do
            return
        columns = (BarColumn(bar_width=24), TextColumn("{task.description}", markup=False))
        self._live = RichProgress(*columns, console=Console(file=self.stream), transient=True)
        self._task = self._live.add_task(self.what, total=None)
        self._live.start()
