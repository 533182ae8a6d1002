"""How long it takes, and who says so: your own finished runs of a preset, or nobody yet."""

from pathlib import Path

from tools.args import counted, spoken, words
from tools.launch import book
from tools.runs import Run, printable, read_run

LAUNCHES = 40  # names that are looked at, the newest first


def gpus_of(run: Run) -> list[str]:
    """The names of the GPUs of a run's last attempt that had any."""
    attempts = run.environment.get("attempts")
    rows = attempts if isinstance(attempts, list) else []
    found = [row["gpus"] for row in rows if isinstance(row, dict) and isinstance(row.get("gpus"), list)]
    return [printable(str(name)) for name in next((names for names in reversed(found) if names), [])]


def past(root: Path, preset: str) -> str:
    """A sentence about how long the newest finished run of this preset took, or that nothing is known."""
    if (found := newest(root, preset)) is None:
        return "no run of it has finished here, so the time is the limit that is asked for, not a measurement"
    run, minutes = found
    names = gpus_of(run)
    where = f"{len(names)}x {names[0]}" if names else "the CPU"
    return f"your run {run.name} trained for {words(minutes)} on {where}"


def too_short(root: Path, preset: str, limit: int) -> str:
    """A warning for a time limit (minutes) under what the newest finished run took; "" for none."""
    found = newest(root, preset)
    if found is None or found[1] <= limit:
        return ""
    more = counted(-(-round(found[1]) // limit) - 1, "further job")
    return f"{spoken(limit)} is less than that, so it would go on in {more} at least; four hours are 4h or 4:00:00"


def newest(root: Path, preset: str) -> tuple[Run, float] | None:
    """The newest finished run that was launched here with this preset, and its minutes of training."""
    for name in book.names(root)[:LAUNCHES]:
        launch = book.latest(root, name)
        if launch is None or launch.preset != preset:
            continue
        run = read_run(root / launch.runs[0])
        seconds = next((e.get("seconds") for e in reversed(run.events) if e.get("event") == "end"), None)
        if run.status == "finished" and isinstance(seconds, int | float) and seconds > 0:
            return run, seconds / 60
    return None
