"""Whether a run that SLURM disturbed is, at its end, the run that nobody disturbed (slurm_runs.py)."""

from collections import Counter
from pathlib import Path

from tests.faults import tiny

STEPS, SAVE_INTERVAL = 400, 40  # of every run


def judge(out: Path, reference: Path, log: str, state: str) -> str:
    """What is wrong with a run that has ended, compared with the undisturbed one; "" when nothing is."""
    try:
        if state != "COMPLETED":
            return f"its job ended {state}: {log[-800:]}"
        if tiny.losses(out) != tiny.losses(reference) or sorted(tiny.losses(out)) != list(range(STEPS)):
            return "training losses differ"
        if tiny.val_losses(out) != tiny.val_losses(reference):
            return "validation losses differ"
        if tiny.final_weights(out, STEPS) != tiny.final_weights(reference, STEPS):
            return "final weights or optimizer state differ"
    except (AssertionError, OSError, ValueError, KeyError) as error:
        return f"{type(error).__name__}: {error}"
    ends = [event for event in tiny.events(out, "end") if event.get("status") == "finished"]
    # Lost after its end, it ends again, alike.
    if len({(event["step"], event["val_loss"]) for event in ends}) != 1:
        return f"it ended in {len(ends)} ways"
    starts = len(tiny.events(out, "start")) + len(tiny.events(out, "resume"))
    if log.count("resumed from step_") < len(tiny.events(out, "resume")):
        return f"{starts} attempts, but the log does not hold them all"
    if repeated(out) > SAVE_INTERVAL * (starts - 1):
        return f"{repeated(out)} steps were computed twice"
    return ""


def repeated(out: Path) -> int:
    """How many steps were computed more than once."""
    counted = Counter(event["step"] for event in tiny.events(out, "train"))
    return sum(times - 1 for times in counted.values())
