"""Bad input in the test's own process: what `python -m <module> ARGV...` would print, and its exit status."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from nanogpt.common import errors, rundir


def refused(
    main: Callable[[list[str]], int | None], argv: list[str], monkeypatch: pytest.MonkeyPatch, capsys, data: Path,
    notes: bool = False, **variables: str,
) -> str:  # fmt: skip
    """The one line that `main(argv)` is refused with, status 2 (after notes, where there may be some).

    `data` is $DATA_ROOT.
    """

    def went_on(*words: object) -> None:
        pytest.fail(f"not refused: {words}", pytrace=False)

    with monkeypatch.context() as patched:
        for name in ("SLURM_JOB_ID", "RANK", "WORLD_SIZE"):
            patched.delenv(name, raising=False)
        for name, value in {"DATA_ROOT": str(data), **variables}.items():
            patched.setenv(name, value)
        patched.setattr(sys, "argv", ["", *map(str, argv)])
        patched.setattr(rundir, "enter_copy", went_on)
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            errors.run_command(main)
    said = capsys.readouterr().err
    *before, line = said.splitlines()
    assert end.value.code == 2 and line.startswith("error: "), said
    assert all(notes and one.startswith("note: ") for one in before), said
    return line
