"""Compiles shim.c, which makes chosen system calls fail or kills the process there."""

import shutil
import subprocess
from pathlib import Path

SOURCE = Path(__file__).with_name("shim.c")


def compile_shim(folder: Path) -> Path | None:
    """The shared library for LD_PRELOAD; None on a machine without a C compiler."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        return None
    target = folder / "shim.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-Wall", "-o", target, SOURCE, "-ldl"], check=True)
    return target


def fault(
    call: str, number: int, error: int, path: str = "/checkpoints", *, lasting: bool = False
) -> dict[str, str]:
    """The environment in which the `number`-th `call` on a path with `path` in it fails; `error` 0 is a SIGKILL."""
    return {"FAULT": f"{call} {number}{'+' if lasting else ''} {error}", "FAULT_PATH": path}
