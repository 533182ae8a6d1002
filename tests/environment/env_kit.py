"""What the tests of the environment ask again and again."""

import contextlib
import os
import signal
import subprocess
import time
from pathlib import Path


def env_of(home: Path) -> Path:
    return home / "conda_envs/nanogpt_env"


def works(home: Path, clone: Path) -> None:
    """Asserts that the environment is whole, holds nothing of the clone, and serves `engaging`."""
    python = env_of(home) / "bin/python"
    done = subprocess.run([python, "-c", "import pip, nanogpt"], cwd="/", capture_output=True, text=True)
    assert "No module named 'nanogpt'" in done.stderr, done.stderr
    assert (env_of(home) / ".engaging-nanogpt").is_file()
    assert env_of(home).with_suffix(".setup").read_text() == "done\n"
    said = subprocess.run(
        [clone / "tools/bin/engaging", "--help"], cwd="/", env={**os.environ, "HOME": str(home)},
        capture_output=True, text=True,
    )  # fmt: skip
    assert "usage: engaging" in said.stdout, said


def pip_calls(home: Path) -> list[str]:
    """How pip was called, a line each; they are forgotten."""
    calls = env_of(home) / "pip-calls"
    lines = calls.read_text().splitlines() if calls.exists() else []
    calls.unlink(missing_ok=True)
    return lines


def refused(done: subprocess.CompletedProcess, *words: str) -> None:
    """Asserts status 2 and one line on stderr that holds `words`."""
    assert done.returncode == 2, (done.stdout, done.stderr)
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1, done.stderr
    for word in words:
        assert word in done.stderr


def wait_for(path: Path, process: subprocess.Popen) -> None:
    """Until the file is there."""
    while not path.exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)


def kill_session(leader: subprocess.Popen) -> None:
    """SIGKILL to every process of the session that `leader` (started with start_new_session) opened."""
    while True:
        listed = subprocess.run(["ps", "-A", "-o", "pid=,sess=,stat="], capture_output=True, text=True).stdout
        rows = [line.split() for line in listed.splitlines()]
        left = [int(pid) for pid, session, stat in rows if int(session) == leader.pid and stat[0] != "Z"]
        if not left:
            leader.communicate()
            return
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def activate(shell: str, clone: Path, home: Path, then: str, **env: str) -> subprocess.CompletedProcess:
    """`source activate_env.sh; THEN` in a shell that knows nothing of this test's own environment."""
    script = f". '{clone}/activate_env.sh'\n{then}\n"
    full = {**os.environ, "HOME": str(home), **env}
    return subprocess.run([shell, "-c", script], env=full, cwd=clone, capture_output=True, text=True)
