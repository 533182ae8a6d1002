"""A register of forgeries, and the test that each is refused for its own reason and for nothing else.

The forger is careful: digests, heads and sums are made to fit unless the forgery is about them. A refusal for another
reason would mean that the check in question was never reached.
"""

from collections.abc import Callable
from pathlib import Path

import board_kit as kit
import pytest
from board_kit import Made

from tools.leaderboard import command

Runs = list[Made]
Change = Callable[[Runs], None]


class Register(list):
    """Pytest parameters (change, said, more), one a forgery."""

    def __call__(self, said: str, **more: object) -> Callable[[Change], Change]:
        """Registers a function that changes three honest runs before they are written; `said`: the reason it gets.

        `also`: other words that a reason may have; `words`: of the command line.
        """

        def register(change: Change) -> Change:
            self.append(pytest.param(change, said, more, id=change.__name__))
            return change

        return register


def verify(runs: Runs, folder: Path, *words: str, after: Callable[[Path], None] | None = None) -> int:
    """The exit status of `verify` for these runs; `after` may damage the second one's directory."""
    paths, data = kit.write_all(runs, folder)
    if after:
        after(paths[1])
    return command.main(["verify", *map(str, paths), f"--data_root={data}", *words])


def check(change: Change, said: str, more: dict, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The forgery is refused, all reasons are the expected ones."""
    runs = kit.seeds(3)
    change(runs)
    assert verify(runs, folder, *more.get("words", ())) == command.EXIT_REFUSED
    reasons = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  REFUSED")]
    also = more.get("also", ())
    wanted = (said, also) if isinstance(also, str) else (said, *also)
    assert reasons and all(any(word in line for word in wanted) for line in reasons), reasons
    assert any(said in line for line in reasons)
