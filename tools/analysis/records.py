"""What an analysis knows of runs: one Run, a Group of them that differ in nothing but the seed, and their hardware."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tools.analysis import statistics, strict
from tools.analysis.curves import Metrics
from tools.runs import printable

GPU_NAME_KEYS = ("name", "gpu_name", "device_name", "gpu", "model")
GPU_LIST_KEYS = ("gpus", "names", "gpu_names", "devices")
MIXED = " + "  # between the names of different GPUs
COUNT_KEYS = ("count", "n_gpus", "gpu_count", "num_gpus", "world_size")


@dataclass(frozen=True)
class Hardware:
    """What a run was timed on. Empty fields are unknown; `gpu` is "CPU" where there was no GPU."""

    gpu: str = ""
    count: int = 0
    host: str = ""
    torch: str = ""
    driver: str = ""

    def words(self) -> str:
        """`8 x NVIDIA H100 80GB HBM3`, `CPU of node1`, `unknown hardware`."""
        if not self.gpu:
            return "unknown hardware"
        if self.gpu == "CPU":
            return f"CPU of {self.host}" if self.host else "an unknown CPU"
        return f"{self.count} x {self.gpu}" if self.count else self.gpu


@dataclass
class Run:
    """One run: its result, why it does not count (`reason`), its curves, and what it ran on.

    Losses are nats a token, `seconds` is the training clock (validation excluded where the trainer says so), `started`
    is UTC in ISO form.
    """

    name: str
    path: Path
    seed: int | None = None
    val_loss: float | None = None
    train_loss: float | None = None
    step: int | None = None
    seconds: float | None = None
    reason: str = ""
    metrics: Metrics | None = None
    hardware: Hardware = Hardware()
    started: str = ""
    data: str = ""  # digest of the data set
    variant: str = ""  # what distinguishes it from runs that differ in more than the seed; plain runs only
    target: float | None = None
    remark: str = ""  # what the trainer said against it

    @property
    def counts(self) -> bool:
        """Whether it enters the statistics: it ended well and has a finite validation loss."""
        return not self.reason and self.val_loss is not None


@dataclass
class Group:
    """Runs of one variant: an experiment, or plain runs that differ in nothing but the seed."""

    name: str
    path: Path
    runs: list[Run] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    planned: int | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def counted(self) -> list[Run]:
        """The runs that enter the statistics."""
        return [run for run in self.runs if run.counts]

    @property
    def excluded(self) -> list[Run]:
        """The others; each has its reason."""
        return [run for run in self.runs if not run.counts]

    @property
    def losses(self) -> list[float]:
        """Final validation losses, in the order of the runs."""
        return [run.val_loss for run in self.counted if run.val_loss is not None]

    @property
    def seconds(self) -> list[float]:
        """Training times of the counted runs that have one."""
        return [run.seconds for run in self.counted if run.seconds is not None]

    @property
    def steps(self) -> list[int]:
        """Last steps of the counted runs that have one."""
        return [run.step for run in self.counted if run.step is not None]

    @property
    def stage(self) -> str:
        """`A_screening` and so on, or ""."""
        stage = self.config.get("stage")
        return printable(stage) if isinstance(stage, str) else ""

    @property
    def is_baseline(self) -> bool:
        """Whether the configuration says that nothing was modified, or the name that it is the baseline."""
        kind = self.config.get("modification_type")
        return kind in ("none", "baseline") or (kind is None and "baseline" in self.name.lower())

    @property
    def target(self) -> float | None:
        """The loss that the configuration or the runs aim at."""
        value = self.config.get("target_val_loss")
        if statistics.is_number(value):
            return float(value)
        targets = {run.target for run in self.runs}
        return targets.pop() if len(targets) == 1 else None

    def hardware(self) -> list[Hardware]:
        """The different hardware of the counted runs."""
        return list(dict.fromkeys(run.hardware for run in self.counted))


@dataclass
class Study:
    """All groups of one analysis, in a fixed order, and what has to be said about the reading."""

    groups: list[Group]
    notes: list[str] = field(default_factory=list)


def hardware_of(info: dict[str, Any], where: str, cpu: bool = False) -> Hardware:
    """The hardware in an attempt of environment.json, or in summary.json's gpu_info; "CPU" where `cpu` says so.

    Takes {"gpus": ["NVIDIA H100", ...]}, lists of {"name": ...}, {"name": ..., "count": ...} and the like.
    """
    names: list[str] = []
    for key in GPU_LIST_KEYS:
        if isinstance(info.get(key), list):
            for entry in info[key]:
                named = [entry.get(k) for k in GPU_NAME_KEYS] if isinstance(entry, dict) else [entry]
                names += [value for value in named if isinstance(value, str)][:1]
    if not names:
        names = [info[key] for key in GPU_NAME_KEYS if isinstance(info.get(key), str) and info[key]][:1]
    counts = [info[key] for key in COUNT_KEYS if isinstance(info.get(key), int) and info[key] > 0]
    count = len(names) if len(names) > 1 else next(iter(counts), len(names))
    packages = strict.section(info, "packages", where)
    torch = strict.text(packages, "torch", where) or _only_text(info, ("torch", "torch_version"))
    different = sorted({printable(name) for name in names})
    gpu = MIXED.join(different)[:120]
    if not gpu and (cpu or torch.endswith("+cpu")):
        gpu, count = "CPU", 0
    return Hardware(
        gpu, count, _only_text(info, ("host", "hostname", "node", "hosts")), torch,
        _only_text(info, ("driver", "driver_version", "nvidia_driver")),
    )  # fmt: skip


def _only_text(info: dict[str, Any], keys: Sequence[str]) -> str:
    """The first of `keys` that is a text, or a list of exactly one; of several, nobody knows which was meant."""
    for key in keys:
        value = info.get(key)
        if isinstance(value, list) and len(value) == 1:
            value = value[0]
        if isinstance(value, str):
            return printable(value)[:80]
    return ""


def time_obstacle(groups: Sequence[Group]) -> str:
    """Why times of these groups may not be compared, in words, or "" when they may."""
    for group in groups:
        if not group.seconds or len(group.seconds) < len(group.counted):
            return f"{group.name}: not every run has a training time"
        kinds = {(found.gpu, found.count) for found in group.hardware()}
        if any(not gpu for gpu, _ in kinds):
            return f"{group.name}: the runs do not say what hardware they ran on"
        if len(kinds) > 1 or any(MIXED in gpu for gpu, _ in kinds):
            return f"{group.name}: its own runs used different hardware ({_list(group.hardware())})"
    every = [found for group in groups for found in group.hardware()]
    if len({(found.gpu, found.count) for found in every}) > 1:
        return "different hardware: " + "; ".join(
            f"{group.name} on {_list(group.hardware())}" for group in groups
        )
    if every[0].gpu == "CPU" and len({found.host for found in every}) > 1:
        return f"different machines: {_list(every)}"
    if len({found.torch for found in every}) > 1:
        return f"different PyTorch: {', '.join(sorted({found.torch or 'unknown' for found in every}))}"
    return ""


def _list(found: Sequence[Hardware]) -> str:
    return ", ".join(sorted({hardware.words() for hardware in found}))


def interleaved(baseline: Group, variant: Group) -> list[tuple[Run, Run]]:
    """The pairs when the runs took turns on one machine (A B A B, or A B B A ...), else [].

    Sorted by their start, each two that follow each other must be one of each; the k-th pair is the k-th of both.
    """
    runs = [(run.started, 0, run) for run in baseline.counted]
    runs += [(run.started, 1, run) for run in variant.counted]
    if len(runs) < 4 or len(runs) % 2 or any(not started for started, _, _ in runs):
        return []
    if len({run.hardware.host for _, _, run in runs}) != 1 or not runs[0][2].hardware.host:
        return []
    runs.sort(key=lambda row: row[:2])
    pairs = []
    for first, second in zip(runs[::2], runs[1::2], strict=True):
        if {first[1], second[1]} != {0, 1}:
            return []
        pairs.append((first[2], second[2]) if first[1] == 0 else (second[2], first[2]))
    return pairs
