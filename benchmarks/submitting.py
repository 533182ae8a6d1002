"""What these tools add to sbatch, and what a job does before torchrun begins.

python benchmarks/submitting.py          on a login node, or in a shell of the practice cluster

Every job is held and taken out again, but for one that stops where torchrun would begin. Beside the seconds on the
clock stands how many of them a CPU computed: on a busy machine the rest is waiting for others.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)

from nanogpt.common.errors import CommandError, UserError, run_command

REPEATS = 5
SCRIPT = "slurm/nanogpt/train_shakespeare.sh"
ENGAGING = str(ROOT / "tools" / "bin" / "engaging")
JOB_SECONDS = 120.0
RUN_PY = """
import pathlib, sys, time
pathlib.Path({began!r}).write_text(str(time.time()))
"""


def seconds_of(words: list[str], env: dict[str, str]) -> tuple[float, float, str]:
    """(seconds, of them computed, output) of one command, from its start to its end."""
    began, before = time.perf_counter(), os.times()
    done = subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True)
    took, after = time.perf_counter() - began, os.times()
    if done.returncode:
        raise CommandError(f"{' '.join(words)}: {(done.stderr.strip() or done.stdout.strip())[-300:]}")
    computed = after.children_user + after.children_system - before.children_user - before.children_system
    return took, computed, done.stdout


def fastest_of(words: list[str], env: dict[str, str]) -> tuple[float, float]:
    """(seconds, of them computed): the least of a few submissions; each job is cancelled at once."""
    times = []
    for _ in range(REPEATS):
        took, computed, said = seconds_of(words, env)
        times.append((took, computed))
        numbers = re.findall(r"(?:submitted job|Submitted batch job|: job) (\d+)", said)
        subprocess.run(["scancel", *numbers], env=env, check=True)
    return min(took for took, _ in times), min(computed for _, computed in times)


def to_torchrun(folder: Path, env: dict[str, str]) -> float:
    """Seconds from a job's first command to torchrun's, which a stand-in takes the place of: no import is in it."""
    site = folder / "site" / "torch" / "distributed"
    site.mkdir(parents=True)
    (site.parent / "__init__.py").touch()
    (site / "__init__.py").write_text("import time\nTCPStore = lambda *a, **k: time.sleep(99)\n")
    (site / "run.py").write_text(RUN_PY.format(began=str(folder / "torchrun")))
    text = (
        (ROOT / SCRIPT)
        .read_text()
        .replace("set -euo pipefail", f"date +%s.%N >{folder}/job\nset -euo pipefail", 1)
    )
    (ROOT / "logs").mkdir(exist_ok=True)
    script = folder / "job.sh"
    script.write_text(text)
    job = [
        "sbatch",
        "--parsable",
        "--gres=gpu:2",
        f"--output={folder}/log",
        str(script),
        f"--out_dir={folder}/run",
    ]
    number = seconds_of(job, {**env, "PYTHONPATH": str(folder / "site")})[2].strip().split(";")[0]
    limit = time.monotonic() + JOB_SECONDS
    while not (folder / "torchrun").exists() or not (folder / "torchrun").read_text():
        if time.monotonic() > limit:
            subprocess.run(["scancel", number], env=env, check=True)
            raise CommandError(
                f"job {number} did not come to torchrun in {JOB_SECONDS:.0f} s; engaging why {number}"
            )
        time.sleep(0.1)
    return float((folder / "torchrun").read_text()) - float((folder / "job").read_text())


def main(argv: list[str]) -> int:
    """Print a line for each."""
    if shutil.which("sbatch") is None:
        raise UserError("sbatch: not found: log in to a cluster, or: engaging practice up")
    folder = Path(tempfile.mkdtemp(prefix="benchmark-", dir=ROOT / "logs"))
    (folder / "shakespeare_char").mkdir()
    (folder / "shakespeare_char" / "manifest.json").touch()
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", "SBATCH_"))}
    env = {
        **kept,
        "SLURM_CONF": os.environ.get("SLURM_CONF", ""),
        "DATA_ROOT": str(folder),
        "ENV_PATH": sys.prefix,
    }
    env = {key: value for key, value in env.items() if value}
    seconds_of([sys.executable, "nanogpt/data/python_source/prepare.py"], env)
    launch = [ENGAGING, "launch", "quickstart", "--gpus", "1", "--time", "30m", "--sbatch", "hold"]
    data = ["--", "--dataset=python_source"]
    rows = {
        f"sbatch --hold {SCRIPT}": ["sbatch", "--hold", SCRIPT],
        f"bash {SCRIPT} --hold": ["bash", SCRIPT, "--hold"],
        f"the shell's function: sbatch --hold {SCRIPT}": [
            "bash",
            "slurm/lib/sbatch_as_typed.sh",
            "--hold",
            SCRIPT,
        ],
        "engaging launch quickstart": [*launch, *data],
        "engaging launch quickstart --no-check": [*launch, "--no-check", *data],
        "engaging launch quickstart --seeds 100": [*launch, "--seeds", "100", *data],
    }
    try:
        for name, words in rows.items():
            print("{:6.3f} s, computed {:6.3f} s  {}".format(*fastest_of(words, env), name), flush=True)
        print(
            f"{to_torchrun(folder, env):6.3f} s  from a job's first command to torchrun's, two ranks",
            flush=True,
        )
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return 0


if __name__ == "__main__":
    run_command(main)
