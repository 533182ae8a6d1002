"""What changed between two variants: configuration keys, lines of source, hardware. One change is a comparison."""

import difflib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tools.analysis import strict
from tools.analysis.records import Group
from tools.analysis.run_directories import INCIDENTAL
from tools.runs import printable

DESCRIPTIVE = {
    "experiment_name",
    "description",
    "modification_type",
    "modification_details",
    "n_runs",
    "notes",
}
DESCRIPTIVE |= {"target_val_loss", "baseline_val_loss", "baseline_std"}
MOST_KEYS, MOST_FILES, MOST_LINES = 20, 8, 6  # shown
LARGEST_SOURCE = 4 << 20  # bytes of one source file that are compared
ABSENT = "not set"


@dataclass
class Changes:
    """`config` is (key, before, after); `source` is (file, lines removed, lines added, the first of them)."""

    config: list[tuple[str, str, str]] = field(default_factory=list)
    source: list[tuple[str, int, int, list[str]]] = field(default_factory=list)
    surroundings: list[tuple[str, str, str]] = field(default_factory=list)

    @property
    def things(self) -> list[str]:
        """What changed: keys, and the source as one. Another optimizer's own knobs (`adam_lr`) come with it."""
        names = [key for key, _, _ in self.config if not self.comes_along(key)]
        return names + (["source"] if self.source else [])

    def comes_along(self, key: str) -> bool:
        """Whether `key` is a knob of one of the two optimizers, where another optimizer is the change."""
        pair = next((row[1:] for row in self.config if row[0].rpartition(".")[2] == "optimizer"), ())
        return any(key.rpartition(".")[2].startswith(f"{name}_") for name in pair)


def find(baseline: Group, variant: Group) -> Changes:
    """Compare the configurations, the sources and the machines of the first counted run of each side."""
    sides = baseline, variant
    folders = [group.counted[0].path / "source" for group in sides if group.counted]
    copied = len(folders) == 2 and all(folder.is_dir() for folder in folders)
    texts = [texts_in(folder) for folder in folders] if copied else [{}, {}]
    found = between(*(settings_of(group) for group in sides), *texts)
    for name in ("gpu", "count", "torch", "host"):
        values = [{str(getattr(one, name)) for one in group.hardware()} - {"", "0"} for group in sides]
        if all(values) and values[0] != values[1]:
            title = {"gpu": "GPU", "count": "GPUs", "torch": "PyTorch", "host": "node"}[name]
            found.surroundings.append((title, *(printable(", ".join(sorted(v)))[:80] for v in values)))
    return found


def between(
    old: dict[str, Any], new: dict[str, Any], before: dict[str, list[str]], after: dict[str, list[str]]
) -> Changes:
    """What differs between two sets of settings, and between two sources: the lines of each file by its name."""
    return Changes(_different(old, new), _source(before, after))


def settings_of(group: Group) -> dict[str, Any]:
    """What a variant was trained with: its run's own configuration, else its experiment's; flat, by dotted keys."""
    path = group.counted[0].path / "config.json" if group.counted else Path("/nowhere")
    own = strict.section(strict.read_object(path), "config", str(path)) if path.is_file() else {}
    return settings(own or _flat(group.config))


def settings(config: dict[str, Any]) -> dict[str, Any]:
    """Those of a run's knobs that say what was trained, apart from its seed."""
    return {
        key: value for key, value in config.items() if key.rpartition(".")[2] not in INCIDENTAL | DESCRIPTIVE
    }


def texts_in(folder: Path) -> dict[str, list[str]]:
    """The lines of each file of source under `folder`, by its name there."""
    return {str(path.relative_to(folder)): _lines(path) for path in folder.rglob("*.py") if path.is_file()}


def lines_of(data: bytes) -> list[str]:
    """The lines of a file of source."""
    return data[:LARGEST_SOURCE].decode("utf-8", "replace").splitlines()


def _flat(values: dict[str, Any], before: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= _flat(value, f"{before}{key}.") if isinstance(value, dict) else {before + key: value}
    return found


def _different(old: dict[str, Any], new: dict[str, Any]) -> list[tuple[str, str, str]]:
    keys = [key for key in sorted(old.keys() | new.keys()) if old.get(key, ABSENT) != new.get(key, ABSENT)]
    return [(printable(key)[:80], _said(old.get(key, ABSENT)), _said(new.get(key, ABSENT))) for key in keys]


def _said(value: object) -> str:
    return printable(str(value))[:80] or "empty"


def _source(old: dict[str, list[str]], new: dict[str, list[str]]) -> list[tuple[str, int, int, list[str]]]:
    """The source files that differ, by name."""
    texts = old, new
    found = []
    for name in sorted(texts[0].keys() | texts[1].keys()):
        before, after = (text.get(name, []) for text in texts)
        if before == after:
            continue
        lines = list(difflib.unified_diff(before, after, lineterm="", n=0))[2:]
        changed = [printable(line)[:110] for line in lines if line[:1] in "+-" and line[1:].strip()]
        minus = sum(line[0] == "-" for line in lines)
        found.append((printable(name), minus, sum(line[0] == "+" for line in lines), changed[:MOST_LINES]))
    return found


def _lines(path: Path) -> list[str]:
    with path.open("rb") as file:
        return lines_of(file.read(LARGEST_SOURCE))


def text(found: Changes) -> list[str]:
    """The changes as lines."""
    if not (found.config or found.source or found.surroundings):
        return ["Changed: nothing that the runs have recorded."]
    lines = ["Changed:"]
    config = sorted(found.config, key=lambda row: found.comes_along(row[0]))
    lines += [
        f"  {'with it, ' if found.comes_along(key) else ''}{key}: {old} -> {new}"
        for key, old, new in config[:MOST_KEYS]
    ]
    if len(found.config) > MOST_KEYS:
        lines.append(f"  ... and {len(found.config) - MOST_KEYS} more keys")
    for name, minus, plus, shown in found.source[:MOST_FILES]:
        lines.append(f"  source {name}: {minus} lines removed, {plus} added")
        lines += [f"    {line}" for line in shown]
    if len(found.source) > MOST_FILES:
        lines.append(f"  ... and {len(found.source) - MOST_FILES} more files")
    lines += [f"  {name}: {old} -> {new}" for name, old, new in found.surroundings]
    return lines


def brief(found: Changes, most: int = MOST_KEYS) -> list[str]:
    """The same in a few words each: `learning_rate: 0.1 -> 0.2`, `nanogpt/model.py: +3 -1`; no machines."""
    lines = [f"{key}: {old} -> {new}" for key, old, new in found.config]
    lines += [f"{name}: +{plus} -{minus}" for name, minus, plus, _ in found.source]
    return [*lines[:most], *([f"and {len(lines) - most} more"] if len(lines) > most else [])]


def caution(found: Changes) -> str:
    """What to mind when more than one thing changed, or ""."""
    if len(found.things) < 2:
        return ""
    names = ", ".join(found.things[:6])
    return f"{len(found.things)} things changed at once ({names}): whichever of them did it, this cannot tell"
