"""One run as evidence: what its directory says, read strictly, in the form that the checks work on.

A file that cannot be read as what it should be is bad input (UserError). A file that can be read and is not true to
itself, such as a log whose source does not have the log's digest, is `Refused`: that is a verdict, not a mistake.
"""

import datetime
import hashlib
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nanogpt.common import source
from nanogpt.common.errors import UserError
from tools.leaderboard.strict import LARGEST, is_number, is_whole, parse_object, read_bytes

FILES = ("log.txt", "metrics.jsonl", "config.json", "environment.json")  # what a run's evidence is
LARGEST_LOG = 64 << 20
MOST_LINES = 1_000_000
# Knobs that do not say what was trained: where files go, how the run is watched, which seed.
NOT_RECIPE = {
    "out_dir", "data_root", "seed", "init_from", "auto_resume", "overwrite", "accept_changed", "new_source",
    "check",
    "save_interval", "save_minutes", "keep_checkpoints", "always_save_checkpoint", "log_interval", "num_threads",
    "device", "backend", "eval_only", "plan",
}  # fmt: skip


class Refused(Exception):
    """The evidence contradicts itself so early that nothing else can be checked."""

    def __init__(self, check: str, reason: str) -> None:
        super().__init__(reason)
        self.check = check


@dataclass(frozen=True)
class Train:
    """One step: `loss` in nats, `ms` its time, `tokens` and `train_ms` so far; None where the run wrote none."""

    step: int
    loss: float | None
    ms: float | None
    tokens: int | None
    train_ms: float | None
    tokens_per_s: float | None = None


@dataclass(frozen=True)
class Val:
    """One validation: `step` optimizer steps before it, `loss` in nats a token, `train_ms` the stopped clock."""

    step: int
    loss: float
    tokens: int | None = None
    train_ms: float | None = None


@dataclass
class Run:
    """One run, ours or modded-nanogpt's. Times in milliseconds."""

    label: str  # "run 2 (seed 43)"
    kind: str  # "engaging" or "modded"
    files: dict[str, bytes]  # the evidence, by name
    source_sha256: str
    source_files: dict[str, bytes]
    recipe: dict[str, Any]
    seed: int | None
    steps: int
    train: list[Train]
    val: list[Val]
    train_ms: float
    world_size: int
    gpu: str  # the GPU's name, "CPU", or "" where nothing says it
    started: datetime.datetime | None
    software: dict[str, str]
    host: str = ""
    entry: str = ""
    run_id: str = ""
    record: dict[str, Any] = field(default_factory=dict)  # config.json
    attempts: list[dict] = field(default_factory=list)  # environment.json
    events: list[dict] = field(default_factory=list)  # every line of metrics.jsonl, in order
    log_lines: list[str] = field(default_factory=list)  # what was printed, after the source
    copy_sha256: str = ""  # digest of the source/ folder, where there is one
    notes: list[str] = field(default_factory=list)
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def val_loss(self) -> float:
        """The last validation loss."""
        return self.val[-1].loss

    @property
    def log_sha256(self) -> str:
        """Digest of the log, hex."""
        return hashlib.sha256(self.files["log.txt"]).hexdigest()

    @property
    def config(self) -> dict[str, Any]:
        """The knobs."""
        return self.record.get("config", {})

    @property
    def plan(self) -> dict[str, Any]:
        """What the trainer derived from them."""
        plan = self.record.get("plan")
        return plan if isinstance(plan, dict) else {}

    @property
    def end(self) -> dict[str, Any]:
        """The last `end` line; {} where there is none."""
        return next((event for event in reversed(self.events) if event["event"] == "end"), {})

    @property
    def tokens(self) -> int | None:
        """Tokens trained on."""
        return self.train[-1].tokens if self.train else None

    @property
    def val_tokens(self) -> int | None:
        """Tokens that each validation reads: the trainer's own figure."""
        if is_whole(self.end.get("val_tokens"), 1):
            return self.end["val_tokens"]
        found = (re.search(r"\bvalidation: ([\d,]{1,20}) tokens", line) for line in self.log_lines)
        return next((int(match[1].replace(",", "")) for match in found if match), None)


def read_run_directory(folder: Path, label: str) -> Run:
    """The run in `folder`. UserError: a file is missing or malformed; Refused: the log is not true to itself."""
    if not folder.is_dir():
        raise UserError(f"{folder}: is not a folder; expected the directory of a run (its --out_dir)")
    largest = {"log.txt": LARGEST_LOG, "metrics.jsonl": LARGEST_LOG}
    files = {name: read_bytes(folder / name, largest.get(name, LARGEST)) for name in FILES}
    record = parse_object(files["config.json"], f"{folder / 'config.json'}")
    for name, kind in {"config": dict, "source_sha256": str, "entry": str}.items():
        if not isinstance(record.get(name), kind):
            raise UserError(f"{folder / 'config.json'}: {name}: missing or of the wrong type")
    if not is_whole(record["config"].get("seed", 0)):
        shown = ascii(record["config"]["seed"])[:40]
        raise UserError(f"{folder / 'config.json'}: seed: {shown}: expected a whole number")
    attempts = _attempts(parse_object(files["environment.json"], f"{folder / 'environment.json'}"), folder)
    events = parse_metrics(files["metrics.jsonl"], folder / "metrics.jsonl")
    try:
        source_files, rest = source.from_log(folder / "log.txt")
    except UserError as error:
        raise Refused("source", f"{label}: {str(error).partition(': ')[2]}") from None
    train, val = _points(events)
    run = Run(
        label=label, kind="engaging", files=files, source_sha256=source.digest(source_files),
        source_files=source_files, recipe=_recipe(record), seed=record["config"].get("seed"), steps=0,
        train=train, val=val, train_ms=0.0, world_size=0, gpu="", started=_time(attempts[0].get("time")),
        software=_software(attempts[0]), host=str(attempts[0].get("host", ""))[:100], entry=record["entry"],
        run_id=str(record.get("run_id", "")), record=record, attempts=attempts, events=events,
        log_lines=rest.splitlines(),
    )  # fmt: skip
    if not val:
        raise Refused("losses", f"{label}: metrics.jsonl holds no validation loss")
    end = run.end
    run.steps = end.get("step", val[-1].step)
    clock = end.get("train_ms")
    run.train_ms = float(1000.0 * (end.get("seconds") or 0.0) if clock is None else clock)
    run.world_size = attempts[0]["world_size"]
    run.gpu = _gpu(attempts[0], run.log_lines)
    if (folder / "source").is_dir() and not (folder / "source").is_symlink():
        run.copy_sha256 = _copy_digest(folder / "source")
    return run


def _copy_digest(folder: Path) -> str:
    """The digest of the source copy; something that is none where it holds links, pipes or far too much."""
    for number, path in enumerate(folder.rglob("*")):
        strange = path.is_symlink() or not (path.is_file() or path.is_dir())
        if strange or number > 10 * source.MOST_FILES or path.stat().st_size > 16 * source.LARGEST_FILE:
            return "no plain files"
    return source.digest(source.collect(folder, (".",)))


def parse_metrics(data: bytes, path: Path) -> list[dict]:
    """The lines of metrics.jsonl, each with what its kind of line must have. UserError names the line and field."""
    if not data.endswith(b"\n"):
        raise UserError(f"{path}: its last line has no end; the file was cut")
    lines = data.split(b"\n")[:-1]
    if len(lines) > MOST_LINES:
        raise UserError(f"{path}: {len(lines):,} lines; at most {MOST_LINES:,} are read")
    events = []
    for number, line in enumerate(lines, 1):
        where = f"{path}:{number}"
        event = parse_object(line, where)
        _check_event(event, where)
        events.append(event)
    return events


# field -> (low, high, must be whole); what a line of each kind must have, and what it may have.
_NUMBERS = {
    "step": (0, 10**9, True), "attempt": (1, 10**6, True), "loss": (-1e9, 1e9, False),
    "val_loss": (-1e9, 1e9, False), "ms": (-1e12, 1e12, False), "tokens": (0, 10**15, True),
    "tokens_per_s": (0, 1e15, False), "train_ms": (-1e12, 1e12, False), "seconds": (-1e9, 1e9, False),
    "world_size": (1, 10**5, True), "val_tokens": (0, 10**12, True), "target": (-1e9, 1e9, False),
    "time": (0, 1e11, False), "mfu": (-1e9, 1e9, False),
}  # fmt: skip
_NEEDED = {
    "train": ("step", "loss"), "val": ("step", "val_loss"), "end": ("step", "status"), "start": ("step",),
    "resume": ("step",), "save": ("step",),
}  # fmt: skip


def _check_event(event: dict, where: str) -> None:
    kind = event.get("event")
    if not isinstance(kind, str) or not kind.isidentifier() or len(kind) > 40:
        raise UserError(f"{where}: event: {ascii(kind)[:40]}: expected the kind of line")
    for name in _NEEDED.get(kind, ()):
        if name not in event or (event[name] is None and name in ("step", "status")):
            raise UserError(f"{where}: {name}: missing in a line of the kind {kind!r}")
    for name, value in event.items():
        if name not in _NUMBERS or value is None:
            continue
        low, high, whole = _NUMBERS[name]
        good = is_whole(value, low, high) if whole else is_number(value, low, high)
        if not good:
            expected = f"a {'whole ' if whole else ''}number from {low:g} to {high:g}"
            raise UserError(f"{where}: {name}: {ascii(value)[:40]}: expected {expected}")
    for name, kinds in {"status": str, "eligible": bool, "target_met": bool, "ineligible": list}.items():
        if event.get(name) is not None and not isinstance(event[name], kinds):
            raise UserError(f"{where}: {name}: {ascii(event[name])[:40]}: expected {kinds.__name__}")


def _points(events: list[dict]) -> tuple[list[Train], list[Val]]:
    """Training steps and validations in the order of the file, repeats included: the checks look for those."""
    train = [
        Train(e["step"], *(e.get(name) for name in ("loss", "ms", "tokens", "train_ms", "tokens_per_s")))
        for e in events
        if e["event"] == "train"
    ]
    val = [
        Val(e["step"], float("nan") if e["val_loss"] is None else e["val_loss"], e.get("tokens"), e.get("train_ms"))
        for e in events
        if e["event"] == "val"
    ]  # fmt: skip
    return train, val


def _attempts(environment: dict, folder: Path) -> list[dict]:
    attempts = environment.get("attempts")
    if not isinstance(attempts, list) or not attempts or not all(isinstance(one, dict) for one in attempts):
        raise UserError(f"{folder / 'environment.json'}: attempts: expected a list with an object an attempt")
    for one in attempts:
        if not is_whole(one.get("world_size"), 1, 4096):
            shown = ascii(one.get("world_size"))[:40]
            raise UserError(f"{folder / 'environment.json'}: world_size: {shown}: expected 1 to 4096")
    return attempts


def _recipe(record: dict) -> dict[str, Any]:
    """What was trained, apart from its seed: equal recipes and equal sources are runs of one thing."""
    knobs = {
        name: value
        for name, value in record["config"].items()
        if name not in NOT_RECIPE and not name.startswith("wandb")
    }
    return {"entry": record["entry"], **knobs}


def _software(attempt: dict) -> dict[str, str]:
    packages = attempt.get("packages")
    found = {"python": attempt.get("python"), **(packages if isinstance(packages, dict) else {})}
    return {str(name)[:40]: str(value)[:60] for name, value in list(found.items())[:20] if value}


def _time(text: object) -> datetime.datetime | None:
    try:
        when = datetime.datetime.fromisoformat(str(text))
    except ValueError:
        return None
    return when if when.tzinfo else None


def _gpu(attempt: dict, log_lines: list[str]) -> str:
    """What computed: as the trainer says in its log, which it has from the device; else as the driver listed it."""
    listed = attempt.get("gpus")
    first = listed[0] if isinstance(listed, list) and listed else ""
    name = first.get("name") if isinstance(first, dict) else first
    return gpu_in_log(log_lines) or (name[:100] if isinstance(name, str) else "")


def gpu_in_log(log_lines: list[str]) -> str:
    """The device of the trainer's own line: a GPU's name, "CPU", or "" where there is no such line."""
    for line in log_lines[:200]:
        if " M parameters, " not in line:
            continue
        if match := re.search(r"[,;] ((?:NVIDIA|AMD|Tesla|GRID)[^,;]{1,80}), \d+ GiB", line):
            return match[1]
        if re.search(r"[,;] CPU \(", line):
            return "CPU"
    return ""
