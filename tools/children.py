"""Commands run one after the other, and stopped politely: they get SIGTERM, on which the trainers save."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import NoReturn

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
ECHO_SECONDS = (
    1.0  # make passes on a SIGTERM that its whole group gets, as `timeout` sends it: that is one, not two
)


class Interrupted(BaseException):
    """The user, or SLURM, wants this to end: how they said so, and whether the child was given the time to save."""

    def __init__(self, how: str, saved: bool = True) -> None:
        super().__init__(how)
        self.saved = saved


class Children:
    """Runs commands. While one runs, a first SIGINT, SIGTERM or SIGHUP becomes its SIGTERM, a second its SIGKILL.

    A signal that comes within a second of the first is the same wish, told twice.
    Each command has a process group of its own: Ctrl-C would otherwise reach it too, and end it before it has saved.
    """

    def __init__(self) -> None:
        self._child: subprocess.Popen | None = None
        self._asked, self._asked_at, self._killed = "", 0.0, False
        for number in STOPPING:
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        again, child = bool(self._asked), self._child
        if again and time.monotonic() - self._asked_at < ECHO_SECONDS:
            return
        if not again:
            self._asked, self._asked_at = signal.Signals(number).name, time.monotonic()
        if child is None:
            self._leave()
        self._killed = self._killed or again
        with contextlib.suppress(ProcessLookupError):
            child.send_signal(signal.SIGKILL if again else signal.SIGTERM)
        if not again:
            print("\nstopping; once more to stop without saving", file=sys.stderr, flush=True)

    def _leave(self) -> NoReturn:
        how, self._asked, saved, self._killed = self._asked, "", not self._killed, False
        raise Interrupted("Ctrl-C" if how == "SIGINT" else how, saved)

    def run(
        self, command: Sequence[str], cwd: Path | None = None, environment: dict[str, str] | None = None
    ) -> int:
        """Run `command` with our stdout and stderr; its exit status. Interrupted when we were told to stop."""
        return self._wait(
            subprocess.Popen(
                command, stdin=subprocess.DEVNULL, preexec_fn=os.setpgrp, cwd=cwd, env=environment
            )
        )

    def run_quietly(self, command: Sequence[str], limit: float) -> tuple[int | None, str]:
        """Like `run`, with its error line kept back: (exit status, that line). The status is None when it was ended
        after `limit` seconds. Other lines of stderr (progress) are passed on."""
        child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            preexec_fn=os.setpgrp,
        )
        late = threading.Event()

        def end() -> None:
            late.set()
            child.terminate()

        timer = threading.Timer(limit, end)
        timer.daemon = True
        timer.start()
        lines: list[str] = []
        reader = threading.Thread(target=self._read, args=(child.stderr, lines), daemon=True)
        reader.start()
        try:
            status = self._wait(child)
        finally:
            timer.cancel()
        reader.join(10)
        return (None if late.is_set() and status < 0 else status), "\n".join(lines)

    @staticmethod
    def _read(stream, kept: list[str]) -> None:
        for line in stream:
            if kept or line.startswith(("error:", "Traceback")):
                kept.append(line.rstrip("\n"))
            else:
                print(line, end="", file=sys.stderr, flush=True)

    def _wait(self, child: subprocess.Popen) -> int:
        self._child = child
        try:
            if self._asked:  # between the start of the child and the line above
                child.terminate()
            status = child.wait()
        finally:
            self._child = None
        if self._asked:
            self._leave()
        return status
