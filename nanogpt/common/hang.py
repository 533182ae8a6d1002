"""Names the rank that has stopped, with the stack of every rank, instead of minutes of silence before a time-out.

    watch = hang.Watch(run.folder, ranks)
    ... hang.beat() ...                   # in the loop: this rank goes on
    watch.close()

One stopped rank makes all others wait in their next collective, where NCCL and gloo say after ten minutes that *they*
timed out. Here a thread of each rank notes every few seconds where its main thread is, in `beats/rank-N.json` of the
run directory, and reads the others' notes when its own main thread has not beaten for LIMIT_S. Whoever is the first of
those that still answer writes to stderr: who is silent (a stopped process, a lost node, code that keeps Python's
lock), or else who is not waiting for the others; and each rank's stack. Nothing is ended: what only looked like a hang
goes on, and what is one ends by the group's time-out.

Compiling and saving take their time: stacks in their code have SLOW_S. Time in which the whole job stood still, as when
SLURM suspends it, does not count.
"""

import contextlib
import faulthandler
import json
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path

from nanogpt.common import lease
from nanogpt.common.ranks import Ranks

FOLDER = "beats"
LIMIT_S, SLOW_S, TICK_S = 60.0, 600.0, 4.0
SILENT_TICKS = 4  # without a new note
FIRST_BEATS = 3  # the gaps before are of compiling, and say nothing about the next ones
LATE = 4  # times the longest gap so far
FRAMES = 12  # of a stack, the innermost
SLOW_CODE = ("/torch/_inductor/", "/torch/_dynamo/", "/triton/", "/nanogpt/common/checkpoints.py")
WAITING_CODE = ("/torch/distributed/", "/nanogpt/common/ranks.py")
WAITING_CALLS = (".tolist()", ".item()", "synchronize(")  # for the GPU, which waits in NCCL

_beats = 0


def beat() -> None:
    """This rank goes on. Costs nothing; call it wherever the main thread passes every few seconds."""
    global _beats
    _beats += 1


@dataclass
class Note:
    """What a rank last said of itself: `stack` of its main thread, outermost frame first; `tick` counts notes."""

    rank: int
    host: str
    pid: int
    pid_started: str
    launch: str
    beats: int = 0
    tick: int = 0
    stack: list[str] = field(default_factory=list)

    def is_in(self, places: tuple[str, ...]) -> bool:
        """Whether the main thread was in this code."""
        return any(place in frame for frame in self.stack for place in places)

    @property
    def waits(self) -> bool:
        """Whether the main thread was in a collective, or waited for what the GPU does."""
        return self.is_in(WAITING_CODE) or any(call in self.stack[-1] for call in WAITING_CALLS)


class Watch:
    """A thread that looks after this rank's main thread from now on; with one rank it writes no notes."""

    def __init__(self, folder: Path, ranks: Ranks) -> None:
        self.folder, self.ranks, self.main = folder / FOLDER, ranks, threading.main_thread().ident
        pid = os.getpid()
        self.mine = Note(
            ranks.rank, socket.gethostname(), pid, lease.process_start(pid), lease.launch_token()
        )
        self.heard: dict[
            int, tuple[Note, float]
        ] = {}  # of each rank: its note, and for how long it is the same
        self.late, self.longest, self.slow, self.reported = 0.0, 0.0, False, False
        self.closed = threading.Event()
        if hasattr(signal, "SIGUSR2"):  # answers from C, also when Python's lock is held
            with contextlib.suppress(OSError, ValueError):
                faulthandler.register(signal.SIGUSR2, file=2, all_threads=True)
        self.thread = threading.Thread(target=self._run, name="hang watch", daemon=True)
        self.thread.start()

    def close(self) -> None:
        """Stop looking, and remove this rank's note."""
        self.closed.set()
        self.thread.join(2 * TICK_S)
        with contextlib.suppress(OSError):
            (self.folder / f"rank-{self.mine.rank}.json").unlink(missing_ok=True)
            self.folder.rmdir()  # by the last rank

    def _run(self) -> None:
        last = time.monotonic()
        while not self.closed.wait(TICK_S):
            now = time.monotonic()
            # A tick that took long is one in which this process did not run: it proves nothing about the others.
            passed, last = min(now - last, 2 * TICK_S), now
            with contextlib.suppress(OSError):  # a full disk is the trainer's to report
                self._tick(passed)

    def _tick(self, passed: float) -> None:
        frame = sys._current_frames().get(self.main)
        self.mine.stack = [line.rstrip() for line in traceback.format_stack(frame, FRAMES)]
        self.mine.tick += 1
        if self.mine.beats != _beats:
            if self.mine.beats >= FIRST_BEATS and not self.slow:
                self.longest = max(self.longest, self.late)
            if self.reported:
                self._say([f"hang: rank {self.mine.rank} goes on"])
            self.mine.beats, self.late, self.slow, self.reported = _beats, 0.0, False, False
        elif self.mine.beats:
            self.late += passed
        if self.ranks.world_size > 1:
            self._exchange(passed)
        else:
            self.heard = {0: (self.mine, 0.0)}
        slow_now = self.mine.beats < FIRST_BEATS or any(
            note.is_in(SLOW_CODE) for note, _ in self.heard.values()
        )
        self.slow |= slow_now
        if not self.reported and self.late >= max(SLOW_S if slow_now else LIMIT_S, LATE * self.longest):
            self.reported = True
            silent = [rank for rank in range(self.ranks.world_size) if self._is_silent(rank)]
            answering = [rank for rank in range(self.ranks.world_size) if rank not in silent]
            if answering[:1] == [self.mine.rank]:
                self._say(report(self.heard, silent, self.ranks.world_size, self.late))
                self._ask_for_stacks(silent)

    def _is_silent(self, rank: int) -> bool:
        return rank not in self.heard or self.heard[rank][1] > SILENT_TICKS * TICK_S

    def _exchange(self, passed: float) -> None:
        """Write this rank's note in its place (a reader on NFS sees it when it opens the file); read the others'."""
        self.folder.mkdir(exist_ok=True)
        (self.folder / f"rank-{self.mine.rank}.json").write_text(
            json.dumps(asdict(self.mine)), encoding="utf-8"
        )
        self.heard[self.mine.rank] = (self.mine, 0.0)
        for rank in range(self.ranks.world_size):
            old, age = self.heard.get(rank, (None, 0.0))
            if rank == self.mine.rank:
                continue
            note = None
            with contextlib.suppress(OSError, ValueError, TypeError):  # being written, or not there yet
                note = Note(**json.loads((self.folder / f"rank-{rank}.json").read_text(encoding="utf-8")))
            if note and note.launch == self.mine.launch and (old is None or note.tick != old.tick):
                self.heard[rank] = (note, 0.0)
            elif old is not None:
                self.heard[rank] = (old, age + passed)

    def _ask_for_stacks(self, silent: list[int]) -> None:
        """Have the silent ranks of this machine dump their stacks, as far as they run at all."""
        for note in (self.heard[rank][0] for rank in silent if rank in self.heard):
            here = note.host == self.mine.host and lease.process_start(note.pid) == note.pid_started
            if here and note.pid_started and state_of(note) == "":
                with contextlib.suppress(OSError):
                    os.kill(note.pid, signal.SIGUSR2)

    @staticmethod
    def _say(lines: list[str]) -> None:
        print("\n".join(lines), file=sys.stderr, flush=True)


def state_of(note: Note) -> str:
    """Why a rank of this machine cannot answer, in words; "" when that cannot be seen."""
    if note.host != socket.gethostname() or not note.pid_started:
        return ""
    if lease.process_start(note.pid) != note.pid_started:
        return "its process is gone"
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{note.pid}/status").read_text().splitlines():
            if line.startswith("State:"):
                state = line.split()[1]
                return {
                    "T": "its process was stopped (SIGSTOP)",
                    "D": "it waits for a disk",
                    "Z": "it has died",
                }.get(state, "")
    return ""


def suspects(notes: list[Note]) -> list[Note]:
    """Of ranks that all answer, those that the others wait for: in no collective, or behind, or elsewhere than most."""
    elsewhere = [note for note in notes if not note.waits]
    if len(elsewhere) < len(notes) and elsewhere:
        return elsewhere
    behind = [note for note in notes if note.beats == min(other.beats for other in notes)]
    if len(behind) < len(notes):
        return behind
    places = Counter(note.stack[-1] for note in notes)
    common, count = places.most_common(1)[0]
    return [note for note in notes if note.stack[-1] != common] if 2 * count > len(notes) > count else notes


def report(heard: dict[int, tuple[Note, float]], silent: list[int], world: int, late: float) -> list[str]:
    """What is said of a hang: the ranks at fault by name first, then every rank's stack."""
    answering = [note for rank, (note, _) in sorted(heard.items()) if rank not in silent]
    named = suspects(answering) if not silent else []
    lines = []
    for rank in silent:
        if rank not in heard:
            lines.append(f"hang: rank {rank} of {world} has never given a sign of life")
            continue
        note, age = heard[rank]
        why = state_of(note) or "its node is gone, or code in it keeps Python's lock"
        lines.append(
            f"hang: rank {rank} of {world} ({note.host}, process {note.pid}) has given no sign of life for "
            f"{age:.0f} s: {why}"
        )
    for note in named:
        lines.append(
            f"hang: rank {note.rank} of {world} ({note.host}, process {note.pid}) has not gone on for {late:.0f} s"
        )
    lines[-1] += "; the others wait" if len(answering) > len(named) else ""
    first = [*(heard[rank][0] for rank in silent if rank in heard), *named]
    for note in [*first, *(other for other in answering if other not in named)]:
        when = "when it last answered, was in" if note.rank in silent else "is in"
        lines += [f"hang: rank {note.rank} {when}", *note.stack]
    return lines
