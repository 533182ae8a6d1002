"""What the campaign has done so far: one JSON file a section, written after each piece, so that it goes on by days.

A piece is a few injections with a seed of its own (`SEED SECTION NUMBER`): a campaign that was interrupted repeats
nothing that was finished, and its figures do not depend on where it was interrupted.
"""

import datetime
import json
import platform
import random
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path

from nanogpt.common.storage import atomic_write_text

FOLDER = Path(__file__).with_name("outcomes")


@dataclass
class Tally:
    """One line of the report: what was done, how often, where it hit, and what went wrong."""

    what: str
    outcome: str
    injected: int = 0
    failures: list[str] = field(default_factory=list)
    where: Counter = field(default_factory=Counter)
    clean: int = 0  # undamaged things that were looked at too, and let pass


@dataclass
class Outcome:
    """A section's tally over its pieces; `date` is that of the last one."""

    section: str
    seed: int
    what: str = ""
    outcome: str = ""
    pieces: int = 0
    injected: int = 0
    clean: int = 0
    seconds: float = 0.0
    date: str = ""
    machine: str = ""
    where: dict[str, int] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)

    def add(self, tally: Tally, seconds: float) -> None:
        """One more piece."""
        self.what, self.outcome, self.pieces = tally.what, tally.outcome, self.pieces + 1
        self.injected, self.clean = self.injected + tally.injected, self.clean + tally.clean
        self.where = dict((Counter(self.where) + tally.where).most_common())
        self.failures += tally.failures
        self.seconds = round(self.seconds + seconds, 1)
        self.date = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d")
        self.machine = (
            f"{platform.system()}, Python {platform.python_version()}, torch {metadata.version('torch')}"
        )


def read(section: str, folder: Path = FOLDER) -> Outcome | None:
    """What is known of a section; None when nothing is."""
    path = folder / f"{section}.json"
    return Outcome(**json.loads(path.read_text(encoding="utf-8"))) if path.exists() else None


def go_on(
    section: str, seed: int, pieces: int, again: bool, one: Callable[[random.Random], Tally],
    say: Callable[[str], None], folder: Path = FOLDER,
) -> Outcome:  # fmt: skip
    """Do the pieces of a section that are missing, each noted when it is done. Another seed begins anew."""
    outcome = read(section, folder)
    if outcome is None or outcome.seed != seed or again:
        outcome = Outcome(section, seed)
    elif outcome.pieces >= pieces:
        say(f"{section}: done on {outcome.date} (seed {seed}); --again=true repeats it")
    while outcome.pieces < pieces:
        began, known = time.monotonic(), len(outcome.failures)
        outcome.add(one(random.Random(f"{seed} {section} {outcome.pieces}")), time.monotonic() - began)
        folder.mkdir(exist_ok=True)
        atomic_write_text(folder / f"{section}.json", json.dumps(asdict(outcome), indent=1) + "\n")
        say(f"{section}: piece {outcome.pieces} of {pieces}, {outcome.injected} injected in all")
        for failure in outcome.failures[known:]:
            say(f"  FAILED: {failure}")
    return outcome
