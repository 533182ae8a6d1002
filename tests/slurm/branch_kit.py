"""Stand-ins for what a healthy cluster has: commands that run outside of every job, programs made for a test."""

import os
import stat
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def bash(
    *words: object, env: dict[str, str] | None = None, cwd: Path = ROOT, timeout: float = 600, path: str = ""
):
    """`bash WORDS...` outside of every job, with this environment's Python."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "SBATCH", "CUDA"))}
    clean |= {"ENV_PATH": sys.prefix, "PATH": f"{path}:{os.environ['PATH']}" if path else os.environ["PATH"]}
    return subprocess.run(
        ["bash", *map(str, words)],
        env={**clean, **(env or {})},
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def program(folder: Path, name: str, text: str) -> Path:
    """An executable stand-in."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR | stat.S_IXGRP | stat.S_IXOTH)
    return path
