"""Refusals: a command called in the test's own process, and what a refusal must look like."""

import contextlib
import io
import sys
from pathlib import Path

import pytest

from nanogpt.common.errors import run_command
from tests.faults.zygote import command_of


def snapshot(folder: Path) -> dict[str, tuple]:
    """Names, sizes, times and modes of everything in a folder."""
    found = {}
    for path in sorted(folder.rglob("*")):
        state = path.lstat()
        changes = None if path.is_dir() else state.st_mtime_ns
        found[str(path)] = (state.st_mode, state.st_size if path.is_file() else 0, changes)
    return found


def assert_refused(status: int, stderr: str, words: tuple[str, ...] = (), code: int = 2) -> None:
    """One line, no traceback, the right status, and what it must name."""
    assert status == code, (status, stderr)
    assert stderr.startswith("error: "), stderr
    assert stderr.endswith("\n")
    assert stderr.count("\n") == 1, stderr
    assert "Traceback" not in stderr
    assert len(stderr) < 1000
    for word in words:
        assert word in stderr, (word, stderr)


def call(module: str, argv: list[str], cwd: Path, env: dict[str, str]) -> tuple[int, str, str]:
    """(exit status, stdout, stderr) of a command that does not get as far as torch, without a process of its own."""
    said, complained = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(cwd)
        patch.setattr(sys, "argv", [module, *argv])
        for name, value in env.items():
            patch.setenv(name, value)
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(complained):
            try:
                run_command(command_of(module))
            except SystemExit as end:
                return int(end.code or 0), said.getvalue(), complained.getvalue()
    raise AssertionError(f"{module} {argv}: run_command has returned")
