"""How long it takes, and who says so: your own finished runs of a preset, the lab's, ours, or nobody yet."""

import contextlib
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from nanogpt.common.errors import CommandError
from tools.args import counted, spoken, words
from tools.launch import book
from tools.runs import Run, printable, read_run, runs_under

if TYPE_CHECKING:
    from tools.leaderboard.submission import Record

OURS, OURS_GPU = (
    558_045,
    "H100",
)  # tokens a second of GPT-2 124M in bfloat16; docs/performance.md has the command
TOKENS = {"gpt2": 294_912_000_000, "train_gpt2": 294_912_000_000, "train_gpt2_epoch": 9_035_579_392}
LAUNCHES = 40  # names that are looked at, the newest first
# what the batch scripts call their runs, and the track that the lab's records of a preset stand on
SCRIPTS = {
    "nanogpt": r"nanogpt-shakespeare(-\d+)?",
    "gpt2": r"nanogpt-gpt2(-\d+)?",
    "speedrun": r"speedrun-\d+(-\d+)?",
}
TRACKS = {"speedrun": "track1", "record": "track1", "snapshot": "track1", "medium": "medium"}


def gpus_of(run: Run) -> list[str]:
    """The names of the GPUs of a run's last attempt that had any."""
    attempts = run.environment.get("attempts")
    rows = attempts if isinstance(attempts, list) else []
    found = [row["gpus"] for row in rows if isinstance(row, dict) and isinstance(row.get("gpus"), list)]
    return [printable(str(name)) for name in next((names for names in reversed(found) if names), [])]


def past(root: Path, preset: str, gpus: int = 1) -> str:
    """A sentence about how long it takes and who says so: you, the lab, our figure, or nobody."""
    if found := newest(root, preset):
        run, minutes = found
        names = gpus_of(run)
        where = f"{len(names)}x {names[0]}" if names else "the CPU"
        return f"your run {run.name} trained for {words(minutes)} on {where}"
    if record := of_the_lab(preset):
        who = printable(record.contributors[0])
        return (
            f"no run of it has finished here; the lab's newest record ({who}, {record.submitted:%Y-%m-%d}) trained for "
            f"{words(record.seconds / 60)} on {printable(record.hardware)}"
        )
    if (minutes := reckoned(preset, gpus)) is None:
        return "no run of it has finished here, so the time is the limit that is asked for, not a measurement"
    on = f"on {gpus} of them" if gpus > 1 else "in all"
    return (
        f"no run of it has finished here; reckoned from our {OURS:,} tokens/s on one {OURS_GPU} "
        f"(docs/performance.md) it takes {words(minutes)} {on}"
    )


def too_short(root: Path, preset: str, limit: int, gpus: int = 1) -> str:
    """A warning for a time limit (minutes) under what it takes, as `past` has it; "" for none."""
    if found := newest(root, preset):
        minutes: float | None = found[1]
    elif record := of_the_lab(preset):
        minutes = record.seconds / 60 * record.world_size / max(1, gpus)
    else:
        minutes = reckoned(preset, gpus)
    if minutes is None or minutes <= limit:
        return ""
    more = counted(-(-round(minutes) // limit) - 1, "further job")
    hint = "; four hours are 4h or 4:00:00" if limit < 60 else ""
    return f"{spoken(limit)} is less than that, so it would go on in {more} at least{hint}"


def reckoned(preset: str, gpus: int) -> float | None:
    """Minutes of training on `gpus` GPUs as fast as ours, None for a preset that was not measured."""
    return TOKENS[preset] / OURS / max(1, gpus) / 60 if preset in TOKENS else None


def newest(root: Path, preset: str) -> tuple[Run, float] | None:
    """The newest finished run of this preset, a launch's or a batch script's, and its minutes of training."""
    launches = (book.latest(root, name) for name in book.names(root)[:LAUNCHES])
    folders = [root / launch.runs[0] for launch in launches if launch is not None and launch.preset == preset]
    if name := SCRIPTS.get(preset):
        folders += [path for path in runs_under(root / "out") if re.fullmatch(name, path.name)][:LAUNCHES]
    for folder in folders:
        run = read_run(folder)
        if preset == "speedrun" and run.settings.get("recipe") != "record":
            continue
        seconds = next((e.get("seconds") for e in reversed(run.events) if e.get("event") == "end"), None)
        if run.status == "finished" and isinstance(seconds, int | float) and seconds > 0:
            return run, seconds / 60
    return None


def of_the_lab(preset: str) -> "Record | None":
    """The newest record of the lab's board that is a preset's; None without one, or without a board."""
    folder = os.environ.get("ENGAGING_BOARD", "")
    if preset not in TRACKS or not folder:
        return None
    from tools.leaderboard import corrections
    from tools.leaderboard.board import Board
    from tools.leaderboard.submission import Record

    board, found = Board(Path(folder), "", {}), None
    # A board that cannot be read says so in its own commands.
    with contextlib.suppress(OSError, CommandError):
        said = corrections.read(board)
        for path, record in board.read_records():
            gone = path.stem in said and said[path.stem].withdraws
            if isinstance(record, Record) and record.track == TRACKS[preset] and not gone:
                found = record
    return found
