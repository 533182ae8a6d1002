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


def share_cores(environment: MutableMapping[str, str], load: float) -> None:
    """Where somebody else computes too, let OpenMP's threads sleep while they wait for each other.

    They spin instead, each on a core that the other thread may need: a step that takes some 15 ms alone took 1.7 s on
    two cores at a load of 5, and 0.1 s so. `load` is the machine's load average; nothing that the user has
    set is changed, and libgomp reads it when torch is loaded.
    """
    if load >= 1 and not has_nvidia_driver() and "OMP_WAIT_POLICY" not in environment:
        environment.setdefault("GOMP_SPINCOUNT", "1000")


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
