"""`engaging shell`: what runs on the node, on a terminal of the test's own; salloc's line."""

import os
import pty
import select
import signal
import subprocess
import sys
import time

import pytest

from nanogpt.common.errors import UserError
from tools.launch import shell, shell_inside


@pytest.fixture
def terminal(root, tmp_path):
    """Runs shell_inside.py on a terminal: `run(idle seconds, what is typed)` -> (its screen, exit status)."""
    (tmp_path / "squeue").write_text("#!/bin/sh\necho 4:00\n")
    (tmp_path / "squeue").chmod(0o755)
    environment = {
        **os.environ, "HOME": str(tmp_path), "SLURM_JOB_ID": f"test-{os.getpid()}", "ENV_PATH": sys.prefix,
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
    }  # fmt: skip
    script = root / "tools" / "launch" / "shell_inside.py"

    def run(idle: float, typed: str) -> tuple[str, int]:
        pid, fd = pty.fork()
        if pid == 0:
            os.execvpe(
                sys.executable,
                [sys.executable, "-I", str(script), str(root), "300", str(idle)],
                environment,
            )
        screen, limit = "", time.monotonic() + 600
        while time.monotonic() < limit:
            if select.select([fd], [], [], 0.2)[0]:
                try:
                    screen += os.read(fd, 4096).decode(errors="replace")
                except OSError:  # the terminal's other side is closed
                    break
            if typed and "$ " in screen:
                os.write(fd, typed.encode())
                typed = ""
        else:
            os.kill(pid, signal.SIGKILL)
        os.close(fd)
        return screen, os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    return run


def test_it_warns_before_the_end_and_goes_back_when_idle(terminal):
    screen, status = terminal(1.0, "")
    assert status == 0
    assert "this job ends in 4 min:" in screen and "idle for 0 min: the GPUs go back" in screen


def test_the_environment_is_on_in_the_repository(terminal, root):
    screen, status = terminal(1200, "pwd; type -P python; exit 7\n")
    assert str(root) in screen and f"{sys.prefix}/bin/python" in screen and status == 7


def test_work_in_the_background_is_not_idle(monkeypatch):
    job = f"test-{os.getpid()}"
    monkeypatch.setenv("SLURM_JOB_ID", job)
    monkeypatch.setattr(shell_inside.os, "tcgetpgrp", lambda terminal: 1)
    monkeypatch.setattr(shell_inside.os, "fstat", lambda terminal: os.stat_result((0,) * 10))
    assert (
        shell_inside.idle_for(1) > 1200 and shell_inside.idle_for(2) == 0
    )  # something else has the terminal
    with subprocess.Popen(["sleep", "60"], env={**os.environ, "SLURM_JOB_ID": job}) as work:
        try:
            assert shell_inside.idle_for(1) == 0
            assert shell_inside.others_of_the_job(work.pid) is False
        finally:
            work.kill()


@pytest.mark.parametrize(
    ("said", "seconds"), [("4:00", 240), ("1-02:00:05", 93605), ("59", 59), ("UNLIMITED", 365 * 86400)]
)
def test_time_left_as_slurm_writes_it(monkeypatch, said, seconds):
    answer = type("Done", (), {"stdout": said + "\n"})
    monkeypatch.setattr(shell_inside.subprocess, "run", lambda *words, **options: answer)
    assert shell_inside.seconds_left() == seconds


def test_inside_a_job_and_without_a_cluster_it_is_refused(monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    monkeypatch.setattr(shell.slurm, "available", lambda: True)
    with pytest.raises(UserError, match="job 12 already"):
        shell.main([])
    monkeypatch.setattr(shell.slurm, "available", lambda: False)
    with pytest.raises(UserError, match="no SLURM here"):
        shell.main([])
