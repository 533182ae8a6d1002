"""tools/gpu.py with an nvidia-smi of our own on PATH, and with real processes to end."""

import os
import pty
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TWO_GPUS = """\
0, GPU-aaaa1111, 1024, 81559, 97, 61, NVIDIA H100 80GB HBM3
1, GPU-bbbb2222, [N/A], 81559, [N/A], 40, Odd, with a comma
"""
ENDS, STAYS = 0, 1


@pytest.fixture
def smi(tmp_path: Path):
    """Puts an nvidia-smi on PATH that answers with the given rows; returns the environment to run with."""

    def make(gpus: str = TWO_GPUS, processes: str = "", status: int = 0) -> dict[str, str]:
        (tmp_path / "gpus").write_text(gpus)
        (tmp_path / "processes").write_text(processes)
        script = tmp_path / "bin" / "nvidia-smi"
        script.parent.mkdir(exist_ok=True)
        which = f"case $1 in *compute-apps*) cat '{tmp_path}/processes' ;; *) cat '{tmp_path}/gpus' ;; esac"
        script.write_text(f"#!/bin/sh\n{which}\nexit {status}\n")
        script.chmod(0o755)
        path = f"{script.parent}:{os.environ['PATH']}"
        clean = {key: value for key, value in os.environ.items() if key != "CUDA_VISIBLE_DEVICES"}
        return {**clean, "PATH": path}

    return make


def gpu(*args: str, env: dict[str, str], **options) -> subprocess.CompletedProcess:
    """`python -m tools.gpu ARGS`, without a terminal."""
    command = [sys.executable, "-m", "tools.gpu", *args]
    options = {"stdin": subprocess.DEVNULL, "timeout": 60, **options}
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, **options)


def refused(done: subprocess.CompletedProcess, *words: str) -> None:
    """Asserts the contract of bad input: status 2, nothing but one line, which holds `words`."""
    assert done.returncode == 2, done
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1, done.stderr
    for word in words:
        assert word in done.stderr


@pytest.fixture
def sleeper():
    """Starts processes to be ended, by kind and user; whatever is left of them ends with the test."""
    running: list[subprocess.Popen] = []

    def start(kind: int = ENDS, uid: int | None = None) -> subprocess.Popen:
        ignore = "signal.signal(signal.SIGTERM, signal.SIG_IGN)" if kind == STAYS else "pass"
        code = f"import signal, time; {ignore}; print('up', flush=True); time.sleep(60)"
        # sh for another user, who may not be able to read this one's Python.
        process = subprocess.Popen(
            ["/bin/sh", "-c", "echo up; exec sleep 60"]
            if uid is not None
            else [sys.executable, "-S", "-c", code],
            stdout=subprocess.PIPE,
            text=True,
            user=uid,
            cwd="/",
        )
        assert process.stdout.readline() == "up\n"
        running.append(process)
        return process

    yield start
    for process in running:
        process.kill()
        process.wait()
        process.stdout.close()


def rows(*processes: subprocess.Popen, uuid: str = "GPU-aaaa1111") -> str:
    """What nvidia-smi would say of these processes."""
    return "".join(f"{uuid}, {process.pid}, 500, python train.py, really\n" for process in processes)


def test_status_shows_gpus_processes_and_their_users(smi, sleeper):
    mine = sleeper()
    done = gpu("status", env=smi(processes=rows(mine) + "GPU-bbbb2222, 4194304, [N/A], gone\n"))
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[1].split() == ["0", "NVIDIA", "H100", "80GB", "HBM3", "1024", "/", "81559", "97", "61"]
    assert "Odd, with a comma" in lines[2]
    assert lines[2].split()[-5:] == ["-", "/", "81559", "-", "40"]
    user = subprocess.run(["id", "-un"], capture_output=True, text=True).stdout.strip()
    assert any(line.split()[:4] == ["0", str(mine.pid), user, "500"] for line in lines)
    assert any(line.split()[:4] == ["1", "4194304", "?", "-"] for line in lines)


def test_status_without_processes_says_so(smi):
    assert "no processes on them" in gpu("status", env=smi()).stdout


@pytest.mark.parametrize("action", ["status", "hot", "kill"])
def test_no_driver_no_gpu_and_a_broken_driver_are_one_line(smi, action, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    refused(gpu(action, env={**os.environ, "PATH": str(empty)}), "no NVIDIA driver")
    refused(gpu(action, env=smi(gpus="")), "none on this machine")
    refused(gpu(action, env=smi(gpus="cannot communicate with the driver", status=9)), "cannot communicate")
    refused(gpu(action, env=smi(gpus="No devices were found\n")), "cannot be read")


@pytest.mark.parametrize(
    ("gpus", "words"),
    [
        ("7", ["'7' is no GPU here", "0,1"]),
        ("0,0", ["named twice"]),
        ("0,x", ["'x' is no GPU here"]),
        ("0,", ["'' is no GPU here"]),
        ("-1", ["-1"]),
    ],
)
@pytest.mark.parametrize("action", ["hot", "kill"])
def test_wrong_gpus_are_refused(smi, action, gpus, words):
    refused(gpu(action, gpus, env=smi()), *words)


def test_gpus_of_other_jobs_are_refused(smi):
    refused(gpu("hot", "0", env={**smi(), "CUDA_VISIBLE_DEVICES": "1"}), "CUDA_VISIBLE_DEVICES", "GPU 0")
    refused(gpu("hot", "1", env={**smi(), "CUDA_VISIBLE_DEVICES": "GPU-aaaa"}), "GPU 1")
    refused(gpu("hot", env={**smi(), "CUDA_VISIBLE_DEVICES": ""}), "allows no GPU")


def test_hot_with_a_driver_that_torch_cannot_use_is_one_line(smi, zygote):
    """nvidia-smi answers, and torch finds no GPU behind it: what a CPU build of torch looks like."""
    words, env = ["-m", "tools.gpu", "hot", "0"], {**smi(), "CUDA_VISIBLE_DEVICES": None}
    child = zygote.run(words, module="tests.faults.forked_python", env=env)
    refused(
        subprocess.CompletedProcess(words, child.status, child.stdout, child.stderr), "torch", "setup_env.sh"
    )


@pytest.mark.parametrize(
    "flags", [["--seconds", "x"], ["--seconds=-1"], ["--grace=nan"], ["--what"], ["a", "b"]]
)
def test_wrong_flags_are_refused(smi, flags):
    refused(gpu("hot", *flags, env=smi()))
    refused(gpu("burn", env=smi()), "status")


def test_kill_ends_own_processes_only(smi, sleeper):
    """Another user's process on the same GPU is neither listed nor touched, and stubborn ones get SIGKILL."""
    polite, stubborn = sleeper(ENDS), sleeper(STAYS)
    stranger = sleeper(uid=65534) if os.getuid() == 0 else None
    listed = rows(polite, stubborn, *([stranger] if stranger else []))
    done = gpu("kill", "--yes", "--grace=0.5", env=smi(processes=listed))
    assert done.returncode == 0, done
    assert polite.wait(600) == -signal.SIGTERM
    assert stubborn.wait(600) == -signal.SIGKILL
    assert f"SIGKILL: {stubborn.pid}" in done.stdout
    if stranger:
        assert str(stranger.pid) not in done.stdout
        assert stranger.poll() is None


def test_kill_keeps_to_the_named_gpus(smi, sleeper):
    zero, one = sleeper(), sleeper()
    listed = rows(zero) + rows(one, uuid="GPU-bbbb2222")
    assert gpu("kill", "1", "--yes", env=smi(processes=listed)).returncode == 0
    assert one.wait(600) == -signal.SIGTERM
    assert zero.poll() is None


def test_kill_without_a_terminal_ends_nothing(smi, sleeper):
    mine = sleeper()
    done = gpu("kill", env=smi(processes=rows(mine)))
    assert done.returncode == 2
    assert "--yes" in done.stderr
    assert str(mine.pid) in done.stdout
    assert mine.poll() is None


@pytest.mark.parametrize(("answer", "ended"), [("n\n", False), ("\n", False), ("\x04", False), ("y\n", True)])
def test_kill_asks_at_a_terminal(smi, sleeper, answer, ended):
    mine = sleeper()
    master, slave = pty.openpty()
    try:
        command = [sys.executable, "-m", "tools.gpu", "kill"]
        env = smi(processes=rows(mine))
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=env,
            stdin=slave,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        os.write(master, answer.encode())
        output = process.communicate(timeout=600)[0]
    finally:
        os.close(master)
        os.close(slave)
    assert process.returncode == 0, output
    assert "[y/N]" in output
    assert ("nothing was ended" in output) is not ended
    time.sleep(0.1)
    assert (mine.poll() is not None) is ended


def test_kill_with_nothing_to_end_says_so(smi):
    done = gpu("kill", env=smi())
    assert (done.returncode, done.stdout) == (0, "no GPU process of yours here\n")


def test_help_is_fast_and_imports_no_torch(smi):
    seconds = []  # of the processor, which another process may have meanwhile; the best of three
    for _ in range(3):
        before = os.times()
        done = gpu("--help", env=smi())
        after = os.times()
        seconds.append(
            after.children_user + after.children_system - before.children_user - before.children_system
        )
        assert done.returncode == 0
        assert "kill" in done.stdout
    assert min(seconds) < 0.5


@pytest.mark.gpu
@pytest.mark.skipif(shutil.which("nvidia-smi") is None, reason="no NVIDIA driver on this machine")
def test_hot_heats_a_real_gpu():
    done = gpu("hot", "--seconds=6", env=dict(os.environ), timeout=600)
    assert done.returncode == 0, done.stderr
    rate = float(done.stdout.split("TFLOP/s")[0].split()[-1])
    assert rate > 10
