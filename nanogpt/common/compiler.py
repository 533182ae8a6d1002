"""Where torch.compile and Triton keep what they compiled, and what its keys must not leave out.

A compiled graph holds the backward pass of a custom operator as it was traced, but is looked up by the operator's NAME:
with the formula changed, torch takes the graph with the old one (tried with torch 2.13: wrong gradients, silently).
`use_local_folders` therefore makes the operators' code part of every key. Standard library only: torch reads all of
this when it is imported.
"""

import contextlib
import hashlib
import os
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

from nanogpt.common.machine import local_ranks, usable_cores

FOLDERS = {"inductor": "TORCHINDUCTOR_CACHE_DIR", "triton": "TRITON_CACHE_DIR"}
TAG_VARIABLE = "TORCH_COMPILE_CACHE_KEY_TAG"  # torch makes it part of the key of every compiled graph
THREADS_VARIABLE = "TORCHINDUCTOR_COMPILE_THREADS"
MOST_THREADS = 32  # torch's own limit
DIGITS = 12  # of a digest, in hexadecimal


def use_local_folders(operators: Iterable[Path]) -> None:
    """Let torch and Triton keep what they compile on this node's disk; `operators`: the files of custom operators.

    Folders that the environment names already stay (the batch scripts choose the same ones). The ranks of a machine
    share its cores for compiling. Call it before torch is imported.
    """
    tag = code_digest(operators)
    if tag not in os.environ.get(TAG_VARIABLE, ""):
        os.environ[TAG_VARIABLE] = os.environ.get(TAG_VARIABLE, "") + tag
    if THREADS_VARIABLE not in os.environ:  # torch gives every rank a compiler for each core of the job
        os.environ[THREADS_VARIABLE] = str(compiler_threads(local_ranks()))
    missing = [name for name, variable in FOLDERS.items() if not os.environ.get(variable)]
    if missing:
        base = _node_folder()
        for name in missing:
            os.environ[FOLDERS[name]] = str(base / name)


def missing(device: str) -> str:
    """What torch.compile lacks on this machine for a "cpu" or "cuda" device, in words; "" when all is there.

    torch takes CXX, else g++ (macOS: clang++), for the CPU's kernels; Triton takes CC, gcc or clang for its launchers.
    """
    if device == "cpu":
        variable, names = "CXX", ("clang++" if sys.platform == "darwin" else "g++",)
    else:
        variable, names = "CC", ("gcc", "clang")
    given = os.environ.get(variable, "").split()
    if any(shutil.which(name) for name in given[:1] or names):
        return ""
    kind = "C++" if device == "cpu" else "C"
    return f"no {kind} compiler ({' or '.join(given[:1] or names)}; {variable} names another)"


def compiler_threads(processes: int) -> int:
    """How many compilers of Triton kernels each of `processes` on this machine may run at once."""
    return max(1, min(MOST_THREADS, usable_cores() // processes))


def code_digest(files: Iterable[Path]) -> str:
    """Hex digits for the names and contents of `files`, wherever their folder is."""
    paths = sorted(files)
    top = os.path.commonpath([path.parent for path in paths])
    total = hashlib.sha256()
    for path in paths:
        total.update(f"{path.relative_to(top).as_posix()}\0".encode() + path.read_bytes() + b"\0")
    return total.hexdigest()[:DIGITS]


def _node_folder() -> Path:
    """A folder of this user on the node's own disk. Homes are shared by all nodes, whatever TMPDIR says."""
    home = Path(os.path.expanduser("~")).resolve()  # noqa: PTH111 (Path.home raises where there is none)
    given = [os.environ[name] for name in ("SLURM_TMPDIR", "TMPDIR") if os.environ.get(name)]
    bases = [base for base in map(Path, given) if base.is_dir() and not base.resolve().is_relative_to(home)]
    folder = (bases[0] if bases else Path("/tmp")).absolute() / f"nanogpt-cache-{os.getuid()}"
    with contextlib.suppress(OSError):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        state = folder.lstat()
        if stat.S_ISDIR(state.st_mode) and state.st_uid == os.getuid() and not state.st_mode & 0o022:
            return folder
    return Path(tempfile.mkdtemp(prefix="nanogpt-cache-"))  # somebody else has taken the name
