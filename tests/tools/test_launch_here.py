"""`engaging launch` without SLURM: a process of its own, found again by its name."""

import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tools.launch import book
from tools.launch.local import alive, started_at

ROOT = Path(__file__).resolve().parents[2]
RUN_SH = """#!/bin/bash
mapfile -d '' -t words < "$2"
for word in "${words[@]}"; do
    case $word in --out_dir=*) out=${word#--out_dir=} ;; esac
done
mkdir -p "$out"
trap 'echo stopped >"$out/stopped"; exit 75' TERM
echo "begin ${words[*]}"
echo "$DATA_ROOT $MAX_RESTARTS ${CUDA_VISIBLE_DEVICES-unset}" >"$out/told"
for ((i = 0; i < ${STEPS:-1}; i++)); do sleep 0.1; done
echo end
"""


@pytest.fixture
def checkout(tmp_path):
    root = tmp_path / "check out"
    for name in ("nanogpt/common", "nanogpt/config"):
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name, text in {
        "nanogpt/train.py": "",
        "nanogpt/__init__.py": "",
        "slurm/lib/run.sh": RUN_SH,
        "pyproject.toml": "",
    }.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


@pytest.fixture
def engaging(checkout, run_python, tmp_path):
    """Runs `engaging ARGS` in the checkout, with no SLURM on PATH."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("bash", "git", "mkdir", "sleep", "cat"):
        (programs / name).symlink_to(shutil.which(name))

    def run(*args: object, **env: str) -> subprocess.CompletedProcess:
        full = {
            "PATH": str(programs),
            "PYTHONPATH": str(ROOT),
            "ENV_PATH": sys.prefix,
            "SLURM_CONF": "",
            **env,
        }
        return run_python("-m", "tools", *args, cwd=checkout, env=full)

    return run


def wait_for(condition, seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "not in time"
        time.sleep(0.05)


def test_seeds_run_one_after_the_other_and_are_found_again(engaging, checkout):
    done = engaging("launch", "quickstart", "--name", "here", "--seeds", 2, "--", "--learning_rate=1e-3")
    assert done.returncode == 0 and "process" in done.stdout, done.stderr
    wait_for(lambda: not alive(book.find(checkout, "here")))
    assert (checkout / "out" / "here-s1338" / "told").read_text() == f"{checkout.parent}/data 20 \n"
    log = engaging("logs", "here").stdout
    assert log.count("begin nanogpt.train quickstart") == 2 and "--seed=1338" in log and log.count("end") == 2
    assert "ENDED" in engaging("status", "here").stdout
    assert "here" in engaging("status").stdout


def test_cancel_lets_the_run_save(engaging, checkout):
    (checkout / "slurm" / "lib" / "run.sh").write_text(RUN_SH.replace("${STEPS:-1}", "600"))
    done = engaging("launch", "quickstart", "--name", "slow", "--seeds", 2)
    assert done.returncode == 0, done.stderr
    wait_for(lambda: (checkout / "out" / "slow-s1337" / "told").is_file())
    refused = engaging("launch", "quickstart", "--name", "slow")
    assert refused.returncode == 2 and "runs already" in refused.stderr
    assert "slow: stopped" in engaging("cancel", "slow").stdout
    assert (checkout / "out" / "slow-s1337" / "stopped").is_file()
    assert not (checkout / "out" / "slow-s1338").exists()
    assert "was not running" in engaging("cancel", "slow").stdout


def test_a_reused_process_id_is_not_ours(checkout):

    launch = book.new_launch(
        checkout,
        "x",
        token="t",
        preset="p",
        trainer="t",
        runs=["out/x"],
        args=[],
        state="local",
        pid=os.getpid(),
    )
    launch.host, launch.pid_start = socket.gethostname(), started_at(os.getpid())
    assert alive(launch)
    launch.pid_start += 1
    assert not alive(launch)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--gpus", "64"], "this machine has"),
        (["--nodes", "2"], "without SLURM"),
        (["--account", "x"], "no SLURM here"),
        (["--gpu-type", "h200"], "--gpu-type: no SLURM here"),
        (["--test-only"], "no SLURM here to ask"),
    ],
)
def test_what_needs_slurm_is_refused(engaging, words, said):
    done = engaging("launch", "quickstart", *words)
    assert done.returncode == 2 and said in done.stderr and done.stderr.count("\n") == 1


def test_on_a_cluster_without_sbatch_nothing_runs_here_unless_asked(engaging, checkout, tmp_path):
    """Case G10: the job would train where it was submitted."""
    done = engaging("launch", "quickstart", "--dry-run", SLURM_CONF="/shared/slurm.conf")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == (
        "error: no SLURM here (no sbatch on PATH), yet SLURM_CONF is set: load its module, or --local to train on this "
        "machine\n"
    )
    (tmp_path / "bin" / "srun").symlink_to("/bin/true")
    done = engaging("launch", "quickstart", "--dry-run")
    assert done.returncode == 2 and "yet srun is there: load" in done.stderr
    assert engaging("launch", "quickstart", "--dry-run", "--local").returncode == 0


def test_dry_run_prints_the_commands(engaging, checkout):
    done = engaging("launch", "quickstart", "--dry-run", "--name", "d")
    assert done.stdout == (
        f"bash slurm/lib/run.sh nanogpt.train quickstart --out_dir={checkout}/out/d --auto_resume=true\n"
    )
    assert not (checkout / "out").exists()


def test_a_name_is_held_by_one_process_and_freed_with_it(tmp_path):
    code = (
        "import sys, time; from pathlib import Path; from tools.launch import book\n"
        "with book.held(Path(sys.argv[1]), 'a') as held: print(held, flush=True); time.sleep(60)"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert other.stdout.readline() == "True\n"
    with book.held(tmp_path, "a") as mine, book.held(tmp_path, "b") as another:
        assert (mine, another) == (False, True)
    other.kill()
    other.communicate()
    with book.held(tmp_path, "a") as mine:
        assert mine
    assert not (tmp_path / "out" / ".launch").exists(), "the lock leaves nothing"
