"""How long it takes, and who says so: your own finished runs of a preset, ours, or nobody yet."""

from pathlib import Path

from tools.args import counted, spoken, words
from tools.launch import book
from tools.runs import Run, printable, read_run

OURS, OURS_GPU = (
    558_045,
    "H100",
)  # tokens a second of GPT-2 124M in bfloat16; docs/performance.md has the command
TOKENS = {"gpt2": 294_912_000_000, "train_gpt2": 294_912_000_000, "train_gpt2_epoch": 9_035_579_392}
LAUNCHES = 40  # names that are looked at, the newest first


def gpus_of(run: Run) -> list[str]:
    """The names of the GPUs of a run's last attempt that had any."""
    attempts = run.environment.get("attempts")
    rows = attempts if isinstance(attempts, list) else []
    found = [row["gpus"] for row in rows if isinstance(row, dict) and isinstance(row.get("gpus"), list)]
    return [printable(str(name)) for name in next((names for names in reversed(found) if names), [])]


def past(root: Path, preset: str, gpus: int = 1) -> str:
    """A sentence about how long it takes and who says so: your newest finished run, our figure, or nobody."""
    if (found := newest(root, preset)) is None:
        if (minutes := reckoned(preset, gpus)) is None:
            return "no run of it has finished here, so the time is the limit that is asked for, not a measurement"
        on = f"on {gpus} of them" if gpus > 1 else "in all"
        return (
            f"no run of it has finished here; reckoned from our {OURS:,} tokens/s on one {OURS_GPU} "
            f"(docs/performance.md) it takes {words(minutes)} {on}"
        )
    run, minutes = found
    names = gpus_of(run)
    where = f"{len(names)}x {names[0]}" if names else "the CPU"
    return f"your run {run.name} trained for {words(minutes)} on {where}"


def too_short(root: Path, preset: str, limit: int, gpus: int = 1) -> str:
    """A warning for a time limit (minutes) under what it takes, as `past` has it; "" for none."""
    found = newest(root, preset)
    minutes = found[1] if found else reckoned(preset, gpus)
    if minutes is None or minutes <= limit:
        return ""
    more = counted(-(-round(minutes) // limit) - 1, "further job")
    hint = "; four hours are 4h or 4:00:00" if limit < 60 else ""
    return f"{spoken(limit)} is less than that, so it would go on in {more} at least{hint}"


def reckoned(preset: str, gpus: int) -> float | None:
    """Minutes of training on `gpus` GPUs as fast as ours, None for a preset that was not measured."""
    return TOKENS[preset] / OURS / max(1, gpus) / 60 if preset in TOKENS else None


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
