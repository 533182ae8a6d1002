"""What `engaging shell` runs on the node: a bash in the repository, watched for its end and for idleness.

    python -I shell_inside.py ROOT WARN_SECONDS IDLE_SECONDS

Run by its path with the standard library only. Idle: nothing typed or printed, bash itself in the foreground, and no
other process of the job on this node (a training in the background or in tmux is work).
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

CLIENTS = ("srun", "salloc")  # where the login node is this node too, they carry the job's number


def main(argv: list[str]) -> int:
    """bash's exit status."""
    root, warn_s, idle_s = Path(argv[0]), float(argv[1]), float(argv[2])
    signal.signal(signal.SIGINT, lambda number, frame: None)  # Ctrl-C is bash's; a handler is not inherited
    rc = Path(__file__).with_name("shell.rc")
    shell = subprocess.Popen(
        ["bash", "--rcfile", str(rc), "-i"], env={**os.environ, "ENGAGING_ROOT": str(root)}
    )
    warned = False
    end = time.monotonic() + seconds_left()
    while True:
        try:
            return shell.wait(min(10.0, max(0.1, idle_s / 4)))
        except subprocess.TimeoutExpired:
            pass
        if not warned and time.monotonic() > end - warn_s:
            end = time.monotonic() + seconds_left()  # asked again: the time may have been extended
            if time.monotonic() > end - warn_s:
                left = max(1, round((end - time.monotonic()) / 60))
                say(f"this job ends in {left} min: save your work")
                warned = True
        if idle_for(shell.pid) > idle_s:
            say(f"idle for {idle_s / 60:.0f} min: the GPUs go back to the others")
            shell.send_signal(signal.SIGHUP)
            shell.wait()
            return 0


def say(text: str) -> None:
    """A line between whatever stands on the terminal."""
    print(f"\r\n*** engaging shell: {text}\r", file=sys.stderr, flush=True)


def seconds_left() -> float:
    """Of the job, as SLURM says; a year when it does not."""
    job = os.environ.get("SLURM_JOB_ID", "")
    try:
        asked = subprocess.run(
            ["squeue", "-h", "-j", job, "-o", "%L"], capture_output=True, text=True, timeout=20
        )
    except (OSError, subprocess.TimeoutExpired):
        return 365 * 86400.0
    days, _, clock = asked.stdout.strip().rpartition("-")
    parts = clock.split(":")
    if not all(part.isdigit() for part in parts):
        return 365 * 86400.0
    seconds = 0
    for part in parts:
        seconds = seconds * 60 + int(part)
    return float(seconds + 86400 * int(days or 0))


def idle_for(shell: int) -> float:
    """Seconds in which nothing happened; 0 while something runs."""
    if os.tcgetpgrp(0) != shell or others_of_the_job(shell):
        return 0.0
    terminal = os.fstat(0)
    return time.time() - max(terminal.st_atime, terminal.st_mtime)


def others_of_the_job(shell: int) -> bool:
    """Whether a process of this job runs here besides this one and its bash."""
    wanted = f"SLURM_JOB_ID={os.environ.get('SLURM_JOB_ID', '')}".encode()
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit() or int(folder.name) in (os.getpid(), shell):
            continue
        try:
            mine = wanted in (folder / "environ").read_bytes().split(b"\0")
            if mine and (folder / "comm").read_text().strip() not in CLIENTS:
                return True
        except OSError:  # it ended, or is not ours
            continue
    return False


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
