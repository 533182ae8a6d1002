"""What the tests of this folder share: commands in this process as a shell would see them, a study, a browser."""

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import browser_kit
import pytest
import study_kit

from nanogpt.common.errors import run_command
from tools import cli


@dataclass
class Done:
    """What a command left: status, standard output, standard error."""

    status: int
    out: str
    err: str


@pytest.fixture
def engaging(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Callable[..., Done]:
    """`engaging WORDS...`, through the real entry point."""

    def call(*words: object) -> Done:
        monkeypatch.setattr(sys, "argv", ["engaging", *map(str, words)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            run_command(cli.main)
        out, err = capsys.readouterr()
        return Done(ended.value.code or 0, out, err)

    return call


@pytest.fixture(scope="session")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four variants: one helps, one hurts, one shows nothing, and the baseline. Not to be written to."""
    return study_kit.write_study(tmp_path_factory.mktemp("study") / "experiment_logs")


@pytest.fixture(scope="session")
def browser() -> Iterator[browser_kit.Browser]:
    """A real Chromium; skips loudly where none can be had."""
    reason = browser_kit.obstacle()
    if reason:
        pytest.skip(f"PAGES WERE NOT LOOKED AT: {reason}")
    with browser_kit.Browser() as found:
        yield found
