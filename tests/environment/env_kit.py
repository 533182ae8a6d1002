"""What the tests of the environment ask again and again."""

import contextlib
import os
import signal
import subprocess
from pathlib import Path

import pytest


def env_of(home: Path) -> Path:
    return home / "conda_envs/nanogpt_env"


def works(home: Path, clone: Path) -> None:
    """Asserts that the environment is whole and imports this clone from anywhere."""
    code = "import setuptools, pip, nanogpt.common.errors as e; print(e.__file__)"
    done = subprocess.run([env_of(home) / "bin/python", "-c", code], cwd="/", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(clone / "nanogpt/common/errors.py")
    assert (env_of(home) / ".engaging-nanogpt").is_file()


def refused(done: subprocess.CompletedProcess, *words: str) -> None:
    """Asserts status 2 and one line on stderr that holds `words`."""
    assert done.returncode == 2, (done.stdout, done.stderr)
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1, done.stderr
    for word in words:
        assert word in done.stderr


def kill_session(leader: subprocess.Popen) -> None:
    """SIGKILL to every process of the session that `leader` (started with start_new_session) opened."""
    while True:
        listed = subprocess.run(["ps", "-A", "-o", "pid=,sess=,stat="], capture_output=True, text=True).stdout
        rows = [line.split() for line in listed.splitlines()]
        left = [int(pid) for pid, session, stat in rows if int(session) == leader.pid and stat[0] != "Z"]
        if not left:
            return
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def without_network() -> tuple[str, ...]:
    """A command prefix that leaves no network, or a skip where the machine forbids it."""
    for prefix in (("unshare", "-n"), ("unshare", "-rn")):
        if subprocess.run([*prefix, "true"], capture_output=True).returncode == 0:
            return prefix
    return pytest.skip("this machine lets nobody switch the network off (unshare -n)")


def activate(shell: str, clone: Path, home: Path, then: str, **env: str) -> subprocess.CompletedProcess:
    """`source activate_env.sh; THEN` in a shell that knows nothing of this test's own environment."""
    dropped = ("CONDA", "ENV_", "VIRTUAL_ENV", "PYTHON")
    clean = {key: value for key, value in os.environ.items() if not key.startswith(dropped)}
    script = f". '{clone}/activate_env.sh'\n{then}\n"
    command = [shell, "-c", script]
    return subprocess.run(
        command, env={**clean, "HOME": str(home), **env}, cwd=home, capture_output=True, text=True
    )
