"""The only reader of a run directory: what `watch`, `status`, the reports and the statistics know of a run.

    run = read_run(Path("out/nanogpt-shakespeare"))
    run.step, run.loss, run.val, run.status, run.eta_s()

Read as other people's text: a half-written last line, a line that is no JSON, a number where text should
be, a file that vanishes while it is read, are skipped and never raise. A resumed run writes some steps
twice; the last line of a step wins.
"""

import contextlib
import json
import math
import os
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from nanogpt.common.source import LAST_LINE
from tools.args import words

MAX_LINE = 1 << 20  # a longer line of metrics.jsonl is no metric
TAIL_BYTES = 64 << 10
SILENT_S = 15 * 60  # compiling, or validating on a slow machine, takes less
NOTE = "note.txt"  # what the user wrote down about a run
NOTE_LENGTH = 300  # characters of it that are shown


@dataclass(frozen=True)
class TrainPoint:
    """One `train` line: `loss` in nats, `ms` a step, `tokens` seen in all. What the line lacked is None."""

    step: int
    loss: float
    ms: float | None = None
    tokens_per_s: float | None = None
    mfu: float | None = None
    lr: float | None = None
    grad_norm: float | None = None
    tokens: int | None = None
    attempt: int | None = None


@dataclass(frozen=True)
class ValPoint:
    """One `val` line: `val_loss` in nats a token."""

    step: int
    val_loss: float
    tokens: int | None = None
    attempt: int | None = None


@dataclass(frozen=True)
class Checkpoint:
    """One folder under checkpoints/: its step, bytes, and whether it carries its manifest."""

    step: int
    path: Path
    size: int
    complete: bool


@dataclass
class Run:
    """A run directory as it is on the disk now. Missing files leave empty fields."""

    path: Path
    config: dict = field(default_factory=dict)
    environment: dict = field(default_factory=dict)
    train: list[TrainPoint] = field(default_factory=list)
    val: list[ValPoint] = field(default_factory=list)
    events: list[dict] = field(default_factory=list)  # every other line, in order: start, resume, save, end
    skipped_lines: int = 0
    written: float = 0.0  # when its metrics last grew, seconds since the epoch; 0: not known

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.path.name

    @property
    def step(self) -> int | None:
        """The last step that was written down."""
        steps = [points[-1].step for points in (self.train, self.val) if points]
        steps += [event["step"] for event in self.events if is_int(event.get("step"))]
        return max(steps) if steps else None

    @property
    def settings(self) -> dict:
        """The knobs of its trainer: config.json holds more than these."""
        found = self.config.get("config")
        return found if isinstance(found, dict) else {}

    @property
    def max_steps(self) -> int | None:
        """How many steps the run asked for."""
        plan = self.config.get("plan")
        values = {**self.settings, **(plan if isinstance(plan, dict) else {})}
        for key in ("total_steps", "max_iters", "num_iterations"):
            if is_int(values.get(key)):
                return values[key]
        return next((e["max_iters"] for e in reversed(self.events) if is_int(e.get("max_iters"))), None)

    @property
    def loss(self) -> float | None:
        """The last training loss."""
        return self.train[-1].loss if self.train else None

    @property
    def val_loss(self) -> float | None:
        """The last validation loss."""
        return self.val[-1].val_loss if self.val else None

    @property
    def best_val(self) -> ValPoint | None:
        """The validation with the lowest loss."""
        return min(self.val, key=lambda point: point.val_loss, default=None)

    @property
    def attempts(self) -> int:
        """How many times the run was started or resumed."""
        starts = sum(event.get("event") in ("start", "resume") for event in self.events)
        marked = [p.attempt for p in self.train if p.attempt is not None]
        return max(starts, len(set(marked)), 1 if self.train or self.events else 0)

    @property
    def status(self) -> str:
        """`finished`, `interrupted`, `stopped` (the last `end` says so), `running` (or cut off), `empty`."""
        for event in reversed(self.events):
            if event.get("event") == "end":
                return str(event.get("status", "finished"))
            if event.get("event") in ("start", "resume"):
                return "running"
        return "running" if self.train else "empty"

    @property
    def standing(self) -> str:
        """`status`; of a run that is said to run and has been silent for long, since when: it may have been killed."""
        silent = time.time() - self.written if self.written else 0.0
        if self.status != "running" or silent < SILENT_S:
            return self.status
        return f"cut off? silent for {words(silent / 60)}"

    def step_ms(self, last: int = 20) -> float | None:
        """The median of the last step times in milliseconds."""
        times = [p.ms for p in self.train[-last:] if p.ms]
        return statistics.median(times) if times else None

    def eta_s(self) -> float | None:
        """Seconds to the last step at the present speed; None when that is unknown. 0 for a finished run."""
        if self.status == "finished":
            return 0.0
        ms, step, total = self.step_ms(), self.step, self.max_steps
        if ms is None or step is None or total is None:
            return None
        return max(0, total - step) * ms / 1000

    def checkpoints(self) -> list[Checkpoint]:
        """The checkpoints on the disk, oldest first. Reads names and sizes, not contents."""
        found = []
        with contextlib.suppress(OSError):
            for folder in (self.path / "checkpoints").iterdir():
                digits = folder.name.rpartition("-")[2].rpartition("_")[2]
                if folder.name.startswith(".") or not digits.isascii() or not digits.isdigit():
                    continue
                with contextlib.suppress(OSError):
                    files = [entry.stat() for entry in os.scandir(folder) if entry.is_file()]
                    complete = (folder / "manifest.json").is_file()
                    found.append(Checkpoint(int(digits), folder, sum(f.st_size for f in files), complete))
        return sorted(found, key=lambda checkpoint: checkpoint.step)

    def log_tail(self, lines: int = 20) -> list[str]:
        """The last lines of log.txt, and none of the source that it opens with."""
        found = tail(self.path / "log.txt", lines)
        return found[found.index(LAST_LINE) + 1 :] if LAST_LINE in found else found


def is_run(path: Path) -> bool:
    """Whether `path` looks like a run directory."""
    with contextlib.suppress(OSError):
        return (path / "metrics.jsonl").is_file() or (path / "config.json").is_file()
    return False


def named_run(root: Path, name: str | Path) -> Path | None:
    """The run that somebody names, or None: a folder from here or from the checkout `root`, or a name in its out/."""
    places = (Path(name).expanduser(), root / name, root / "out" / name)
    return next((path for path in places if is_run(path)), None)


def read_run(path: Path) -> Run:
    """The run in `path`. Never raises for what it finds there; an absent folder reads as an empty run."""
    run = Run(
        path, config=_read_json(path / "config.json"), environment=_read_json(path / "environment.json")
    )
    run.written = _mtime(path / "metrics.jsonl") or 0.0
    train: dict[int, TrainPoint] = {}
    val: dict[int, ValPoint] = {}
    for record in metrics(path / "metrics.jsonl", run):
        point = _point(record)
        if isinstance(point, TrainPoint):
            train[point.step] = point
        elif isinstance(point, ValPoint):
            val[point.step] = point
        elif isinstance(record.get("event"), str) and record["event"] not in ("train", "val"):
            run.events.append(record)
        else:
            run.skipped_lines += 1
    run.train = [train[step] for step in sorted(train)]
    run.val = [val[step] for step in sorted(val)]
    return run


def runs_under(folder: Path) -> list[Path]:
    """The run directories in `folder`, the most recently written first."""
    found = []
    with contextlib.suppress(OSError):
        for path in folder.iterdir():
            if path.name.startswith(".") or not is_run(path):
                continue
            found.append((_mtime(path / "metrics.jsonl") or _mtime(path), path))
    return [path for _, path in sorted(found, reverse=True)]


def metrics(path: Path, run: Run | None = None) -> Iterator[dict]:
    """The JSON objects of a metrics file, one a line.

    Lines that are none are counted in `run.skipped_lines`.
    """
    try:
        with path.open("rb") as file:
            while line := file.readline(MAX_LINE):
                if not line.strip():
                    continue
                record = _object(line)
                if record is not None:
                    yield record
                elif run is not None and line.endswith(
                    b"\n"
                ):  # a half-written last line is normal, not a fault
                    run.skipped_lines += 1
    except OSError:
        return


def tail(path: Path, lines: int) -> list[str]:
    """The last `lines` of a text file that may be growing, without what would drive the terminal."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - TAIL_BYTES))
            data = file.read(TAIL_BYTES)
    except OSError:
        return []
    text = data.decode("utf-8", "replace").replace("\r", "\n").splitlines()
    return [printable(line) for line in text if line.strip()][-lines:] if lines > 0 else []


def printable(text: str) -> str:
    """`text` without characters that a terminal would obey; tabs become spaces."""
    return "".join(char if char.isprintable() else " " if char == "\t" else "" for char in text)


def note_of(folder: Path) -> str:
    """The user's note on the run in `folder`, in one line; "" without one."""
    try:
        with (folder / NOTE).open("rb") as file:
            text = file.read(8 * NOTE_LENGTH).decode("utf-8", "replace")
    except OSError:
        return ""
    return printable(" ".join(text.split()))[:NOTE_LENGTH]


def _point(record: dict) -> TrainPoint | ValPoint | None:
    step = record.get("step")
    if not is_int(step) or step < 0:
        return None
    tokens = record["tokens"] if is_int(record.get("tokens")) else None
    attempt = record["attempt"] if is_int(record.get("attempt")) else None
    if record.get("event") == "train" and (loss := _number(record.get("loss"))) is not None:
        rest = {key: _number(record.get(key)) for key in ("ms", "tokens_per_s", "mfu", "lr", "grad_norm")}
        return TrainPoint(step, loss, tokens=tokens, attempt=attempt, **rest)
    if record.get("event") == "val" and (loss := _number(record.get("val_loss"))) is not None:
        return ValPoint(step, loss, tokens=tokens, attempt=attempt)
    return None


def _object(data: bytes) -> dict | None:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _read_json(path: Path) -> dict:
    try:
        return _object(path.read_bytes()) or {}
    except OSError:
        return {}


def is_int(value: object) -> bool:
    """Whether a value read from JSON is a whole number; true and false are none."""
    return isinstance(value, int) and not isinstance(value, bool)


def _number(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def _mtime(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0
