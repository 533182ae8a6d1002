"""How long commands take to say something: `--help` of each, and the quickstart's first training step on a CPU.

python benchmarks/startup.py
"""

import re
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)

from nanogpt.common.errors import CommandError, run_command

REPEATS = 5
HELPS = (
    "-m nanogpt.train",
    "-m nanogpt.sample",
    "-m nanogpt.bench",
    "nanogpt/data/shakespeare_char/prepare.py",
    "nanogpt/data/shakespeare/prepare.py",
    "nanogpt/data/openwebtext/prepare.py",
    "nanogpt/data/python_source/prepare.py",
    "-m tools.quickstart",
    "-m tools",
)


def seconds_of(words: list[str]) -> float:
    """The fastest of a few runs of `python WORDS`, in seconds."""
    times = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, check=True)
        times.append(time.perf_counter() - began)
    return min(times)


def first_step(out_dir: Path) -> float:
    """Seconds from the start of the trainer to its first step's line; the run is ended there.

    CommandError when it comes to no first step: what it said is on stderr.
    """
    command = [sys.executable, "-m", "nanogpt.train", "quickstart", f"--out_dir={out_dir}", "--device=cpu",
               "--overwrite=true"]  # fmt: skip
    began, stepped = time.perf_counter(), False
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if re.match(r"step 0/", line):
                stepped = True
                break
        seconds = time.perf_counter() - began
        process.terminate()
        process.stdout.read()
    if not stepped:
        raise CommandError(f"the trainer ended with status {process.returncode}, before its first step")
    return seconds


def main(argv: list[str]) -> int:
    """Print a line for each."""
    for words in HELPS:
        print(f"{seconds_of([*words.split(), '--help']):6.3f} s  python {words} --help", flush=True)
    print(
        f"{first_step(Path('out/benchmark-startup')):6.3f} s  quickstart: from launch to the first step's line"
    )
    return 0


if __name__ == "__main__":
    run_command(main)
