"""What can be said about the machine and a command line's words for it before torch is imported. Standard library."""

import os
import shutil
import subprocess
from collections.abc import MutableMapping
from pathlib import Path

from nanogpt.common.errors import UserError

DRIVERS = ("/dev/nvidiactl", "/dev/nvidia0", "/dev/dxg")  # the last is WSL's


def has_nvidia_driver() -> bool:
    """Whether an NVIDIA driver is loaded here."""
    return any(Path(path).exists() for path in DRIVERS)


def gpu_memory() -> int | None:
    """Bytes of the smallest GPU that this process may use, as nvidia-smi has it; None where it shows none."""
    tool, chosen = shutil.which("nvidia-smi"), os.environ.get("CUDA_VISIBLE_DEVICES")
    if tool is None or chosen in ("", "-1"):
        return None
    command = [tool, "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(
            [*command, f"--id={chosen}"] if chosen else command, capture_output=True, text=True, timeout=60
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    found = [int(line) for line in done.stdout.split() if line.isdigit()]
    return min(found) << 20 if found and not done.returncode else None


def usable_cores() -> int:
    """This process's cores, at most what SLURM gave the job: not every cluster keeps jobs off each other's cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    given = os.environ.get("SLURM_CPUS_PER_TASK") or os.environ.get("SLURM_CPUS_ON_NODE") or ""
    return min(cores, int(given)) if given.isdecimal() and int(given) else cores


def local_ranks() -> int:
    """Ranks that torchrun started on this machine, 1 without it."""
    return max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def share_cores(environment: MutableMapping[str, str]) -> None:
    """Let OpenMP's threads soon sleep while they wait for each other, as somebody else may compute here at any time.

    By default they spin for milliseconds, each on a core that the other thread may need. The quickstart's 2,000 steps
    take 22.7 to 26.9 s on two idle cores with this, and 24.5 without; what sleeps a hundred times sooner needs 56, and
    is no better beside two other programs. What the user has set stays; libgomp reads it when torch is loaded.
    """
    if not has_nvidia_driver() and "OMP_WAIT_POLICY" not in environment:
        environment.setdefault("GOMP_SPINCOUNT", "100000")


def check_device(device: str) -> None:
    """UserError unless `device` is spelled as `--device` must be."""
    kind, _, index = device.partition(":")
    if device not in ("auto", "cpu", "cuda") and not (kind == "cuda" and _small(index)):
        raise UserError(f"--device={device}: expected auto, cpu, cuda or cuda:N")


def refuse_unknown_home(flag: str, path: str) -> None:
    """UserError for a path that begins with the home of somebody who does not exist."""
    try:
        Path(path).expanduser()
    except RuntimeError:
        raise UserError(f"--{flag}={path}: there is no such user; write the path out") from None


def world_size_from_environment() -> int:
    """The number of ranks torchrun started, 1 without it. UserError when the variable is not a positive number."""
    text = os.environ.get("WORLD_SIZE", "1")
    if not _small(text) or int(text) < 1:
        raise UserError(
            f"WORLD_SIZE={text!r}: expected a positive number (torchrun sets it; unset it otherwise)"
        )
    return int(text)


def _small(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) < 6
