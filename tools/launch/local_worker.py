"""What a launch without SLURM leaves running: its tasks one after the other, each through slurm/lib/run.sh.

    python -I local_worker.py LAUNCH_FOLDER TASKS

Run by its path with the standard library only: the checkout may change under it. SIGTERM goes to the whole process
group; here it means that no further task begins.
"""

import signal
import subprocess
import sys
from pathlib import Path


def main(argv: list[str]) -> int:
    """The last task's failure, or 0."""
    folder, tasks = Path(argv[0]), int(argv[1])
    asked: list[int] = []
    status = 0
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda received, _: asked.append(received))
    script = folder / "code" / "slurm" / "lib" / "run.sh"
    for task in range(tasks):
        if asked:
            break
        command = ["bash", str(script), "--args-file", str(folder / "args" / str(task))]
        status = subprocess.Popen(command).wait() or status
    return status


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
