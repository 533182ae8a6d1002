"""What `engaging experiment` itself costs: planning 100 seeds, and the runner's own time beside a run's.

    python benchmarks/experiments.py
    python benchmarks/experiments.py --seconds=60 --runs=3       # runs of a minute, as the promise says

The runs are a script that prints the speedrun's usual lines and sleeps, so that all other time is the runner's,
Python's start included. Planning is timed as a user types it, from the command to its end, the least of five.
On a machine that is busy with other work the seconds of the CPU are the ones to read.
"""

import argparse
import itertools
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = """import time
began = time.time()
for step in range(0, 101, 10):
    print(f"step:{step}/100 val_loss:{4 - step / 200:.4f} train_time:{step * 10}ms step_avg:10.00ms", flush=True)
    time.sleep(SECONDS / 11)
with open(LOG, "a") as log:
    log.write(f"{began} {time.time()}\\n")
"""


def clone(folder: Path, seconds: float) -> Path:
    """What the command needs of this repository, and the script, in a folder of its own."""
    for name in ("nanogpt", "tools", "slurm", "modded_nanogpt"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "activate_env.sh", ".gitignore"):
        shutil.copy(ROOT / name, folder)
    head = f"SECONDS, LOG = {seconds!r}, {str(folder / 'sleeper.log')!r}\n"
    (folder / "sleeper.py").write_text(head + SCRIPT)
    config = {"experiment_name": "sleep", "script": "sleeper.py", "n_gpus": 0}
    (folder / "sleep.json").write_text(json.dumps(config))
    return folder


def cpu_seconds() -> float:
    """Of all processes that have ended, this one's children and theirs."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def engaging(folder: Path, *words: object) -> tuple[float, float]:
    """Seconds that `engaging experiment WORDS` takes: (by the clock, of the CPU). An error ends the benchmark."""
    path = os.pathsep.join(("/usr/bin", "/bin"))  # no SLURM
    more = {"ENV_PATH": sys.prefix, "OMP_NUM_THREADS": "1", "PATH": path, "HOME": str(folder)}
    began, before = time.perf_counter(), cpu_seconds()
    command = [sys.executable, "-m", "tools", "experiment", *map(str, words)]
    subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL, env=more)
    return time.perf_counter() - began, cpu_seconds() - before


def overhead(folder: Path, runs: int) -> tuple[float, float, float]:
    """Seconds of the runner: (each run, from the end of one to the start of the next; once a study; CPU a run)."""
    log = folder / "sleeper.log"
    words = ("run", "--config", "sleep.json", "--executor", "local", "--n-runs", runs)
    wall, cpu = engaging(folder, *words)
    times = [tuple(map(float, line.split())) for line in log.read_text().splitlines()]
    between = [later[0] - earlier[1] for earlier, later in itertools.pairwise(times)]
    each = sum(between) / len(between)
    return each, wall - (times[-1][1] - times[0][0]), cpu / runs


def main() -> int:
    """Print the figures, and all of them as one JSON line at the end."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=3.0, help="length of a run (default 3)")
    parser.add_argument("--runs", type=int, default=6, help="how many, at least 2 (default 6)")
    args = parser.parse_args()
    if args.runs < 2 or not 0 < args.seconds < 3600:
        parser.error("--runs: at least 2; --seconds: between 0 and 3600")
    with tempfile.TemporaryDirectory() as place:
        folder = clone(Path(place) / "clone", args.seconds)
        local = ("--executor", "local")
        plan = min(engaging(folder, "plan", "sleep.json", "--n-runs", 100, *local) for _ in range(5))
        dry = min(
            engaging(folder, "run", "--config", "sleep.json", "--n-runs", 100, "--dry-run", *local)
            for _ in range(5)
        )
        each, once, cpu = overhead(folder, args.runs)
    print(
        f"100 seeds planned: {plan[0]:.2f} s, {plan[1]:.2f} s of CPU; every command of them printed (--dry-run): "
        f"{dry[0]:.2f} s, {dry[1]:.2f} s of CPU"
    )
    print(
        f"the runner: {each:.2f} s a run ({each / 60:.2%} of a minute), {once:.2f} s once a study; on the CPU, all of "
        f"it and the script's own Python: {cpu:.2f} s a run"
    )
    print(json.dumps({"plan_s": plan, "dry_run_s": dry, "each_run_s": each, "once_s": once, "cpu_s": cpu}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
