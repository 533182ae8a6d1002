"""Imports go one way, importing does nothing, files can be read in one sitting: read from the syntax trees."""

import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("nanogpt", "modded_nanogpt", "tools")
FILES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
MOST_LINES = 500
# What came with Python 3.11 and later, and ruff does not see: its syntax is ruff's, by target-version.
NEWER = re.compile(
    r"\bdatetime\.UTC\b|import UTC\b|file_digest\(|process_group=|contextlib\.chdir|\bExceptionGroup\b|\bStrEnum\b|"
    r"\.add_note\(|from typing import .*\b(Self|Never|LiteralString|assert_never|override)\b|\"-P\"|\bpython\"? -P\b"
)


def modules(path: Path, top_level_only: bool = False) -> set[str]:
    """Dotted names of what a file imports: `a.b` for `import a.b`, `a.b` and `a.b.c` for `from a.b import c`."""
    tree = ast.parse(path.read_text())
    nodes = tree.body if top_level_only else ast.walk(tree)
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def inside(path: Path, folder: str) -> bool:
    return path.is_relative_to(ROOT / folder)


def uses(path: Path, package: str) -> set[str]:
    return {name for name in modules(path) if name == package or name.startswith(f"{package}.")}


def test_nothing_asks_for_a_later_python_than_3_10():
    scripts = [ROOT / "tools/bin/engaging", ROOT / "setup_env.sh", *(ROOT / "slurm").rglob("*.sh")]
    found = {
        str(path): line
        for path in [*FILES, *scripts]
        for line in path.read_text().splitlines()
        if NEWER.search(line)
    }
    assert found == {}
    assert [path.name for path in FILES if "tomllib" in modules(path)] == ["toml.py"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_one_way(path):
    """modded_nanogpt -> nanogpt.common (its data folder: nanogpt.data too), tools -> nanogpt.common, never back."""
    allowed = {"nanogpt", "nanogpt.common"}
    if inside(path, "nanogpt"):
        assert not uses(path, "modded_nanogpt") and not uses(path, "tools")
        return
    for name in uses(path, "nanogpt"):
        data = inside(path, "modded_nanogpt/data") and name.startswith("nanogpt.data")
        assert data or name in allowed or name.startswith("nanogpt.common."), name
    if inside(path, "modded_nanogpt"):
        assert not uses(path, "tools")
    else:
        assert not uses(path, "modded_nanogpt")


@pytest.mark.parametrize("name", ["config", "schedule", "stage_table", "layer_plan", "sizes"])
def test_decisions_need_the_standard_library_only(name):
    """What refuses a mistake before torch is imported, and what a reader opens first."""
    path = ROOT / "modded_nanogpt" / f"{name}.py"
    for module in modules(path):
        top = module.split(".")[0]
        ours = tuple(
            f"modded_nanogpt.{name}" for name in ("config", "schedule", "stage_table", "layer_plan", "sizes")
        )
        fine = module in ("modded_nanogpt", "nanogpt.common") or module.startswith((*ours, "nanogpt.common."))
        assert fine or top in sys.stdlib_module_names, module


@pytest.mark.parametrize(
    "path",
    [path for room in ("kernels", "fast") for path in sorted((ROOT / "modded_nanogpt" / room).rglob("*.py"))],
    ids=lambda path: path.stem,
)
def test_kernels_know_tensors_only(path):
    for module in uses(path, "modded_nanogpt"):
        ours = ("modded_nanogpt.kernels", "modded_nanogpt.fast")
        assert module == "modded_nanogpt" or module.startswith(ours), module


def test_nobody_imports_an_entry_point():
    entries = {"nanogpt.train", "nanogpt.sample", "nanogpt.bench", "modded_nanogpt.train_gpt"}
    for path in FILES:
        if path.name != "train_gpt_medium.py":
            assert not entries & modules(path), path


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_is_read_in_one_sitting(path):
    assert len(path.read_text().splitlines()) <= MOST_LINES


def test_help_needs_no_torch():
    """The entry points import torch inside of functions, so that --help and every refusal come at once."""
    for name in ("nanogpt/train.py", "nanogpt/sample.py", "modded_nanogpt/train_gpt.py", "tools/cli.py"):
        tops = {module.split(".")[0] for module in modules(ROOT / name, top_level_only=True)}
        assert not tops & {"torch", "triton", "datasets", "matplotlib", "scipy"}, name
