"""A run on this machine, in the background: for laptops and servers without SLURM, and for `--local`.

The process is a session of its own: it outlives the terminal, and `engaging status|logs|cancel NAME` find
it again. Several seeds run one after the other.
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from nanogpt.common.errors import UserError
from nanogpt.common.storage import storage_errors
from tools.args import counted
from tools.launch import snapshot
from tools.launch.book import Launch
from tools.launch.environment import job_environment

WORKER = Path(__file__).with_name("local_worker.py")
GRACE_S = 60.0  # a save, and whatever evaluation stands before it


def start(root: Path, launch: Launch, words: list[list[str]], gpus: int, extra: dict[str, str]) -> int:
    """Copy the code, start the tasks in the background, record the process."""
    from tools.launch.submit import write_args

    folder = launch.folder(root)
    try:
        launch.code = snapshot.copy_code(root, folder / "code")
        write_args(launch, root, words)
        launch.log = f"logs/%x-local-{launch.number:03}.out"
        log = root / launch.log.replace("%x", launch.name)
        visible = {name: os.environ[name] for name in ("CUDA_VISIBLE_DEVICES",) if name in os.environ}
        env = job_environment(
            {
                **extra,
                **visible,
                **({"NUM_GPUS": str(gpus)} if gpus else {"CUDA_VISIBLE_DEVICES": ""}),
            }
        )
        worker = [sys.executable, "-I", str(WORKER), str(folder), str(len(words))]
        with storage_errors(log), log.open("ab") as out:
            process = subprocess.Popen(
                worker,
                cwd=root,
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,
            )
    except BaseException:
        snapshot.remove(folder)
        raise
    launch.state, launch.pid, launch.host = "local", process.pid, socket.gethostname()
    launch.pid_start = started_at(process.pid)
    launch.save(root)
    where = counted(gpus, "GPU") if gpus else "the CPU"
    print(f"{launch.name}: process {process.pid} on this machine, {where}")
    print(f"  run  {launch.runs[0]}\n  log  {log.relative_to(root)}")
    print(f"  next engaging logs {launch.name} -f   engaging cancel {launch.name}")
    return 0


def alive(launch: Launch) -> bool:
    """Whether the launch's own process still runs here (a reused process id does not count)."""
    here = launch.host == socket.gethostname()
    return bool(here and launch.pid > 1 and launch.pid_start and started_at(launch.pid) == launch.pid_start)


def started_at(pid: int) -> int:
    """The kernel's start time of a process, 0 for one that is gone or a zombie."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        rest = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return 0 if rest[0] in "ZX" else int(rest[19])
    return 0


def stop(launch: Launch) -> bool:
    """Ask the run to save and exit; after the grace end its processes. True when something was stopped."""
    if not alive(launch):
        return False
    print(f"{launch.name}: asked to save and stop ...", flush=True)
    for number, wait in ((signal.SIGTERM, GRACE_S), (signal.SIGKILL, 5.0)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(launch.pid, number)  # the worker leads its own session, so its id is the group's
        end = time.monotonic() + wait
        while time.monotonic() < end:
            if not alive(launch):
                return True
            time.sleep(0.1)
    raise UserError(f"{launch.name}: process {launch.pid} does not end")


def local_gpus() -> int:
    """GPUs that nvidia-smi sees on this machine."""
    try:
        done = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return 0
    return sum(line.startswith("GPU ") for line in done.stdout.splitlines()) if done.returncode == 0 else 0
