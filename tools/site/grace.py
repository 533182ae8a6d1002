"""Does the grace of a preemption suffice for a save? What SLURM gives, against what the runs here have taken.

A preempted job's processes get SIGTERM; SIGKILL comes after the partition's GraceTime and the cluster's KillWait. Until
then the trainer must end the step it is in and save. Its own `save` and `train` lines say how long both take.
"""

import re
from dataclasses import dataclass
from pathlib import Path

from tools.runs import Run, read_run, runs_under
from tools.site import slurm

NEWEST = 5  # runs that are looked at
LEAD_S = 120  # how long before the time limit our jobs are told to save (--signal=B:USR1@120)


@dataclass(frozen=True)
class Cost:
    """What it took the run to stop: its longest save and a long step (the slowest in a hundred), in seconds."""

    run: str
    save_s: float
    step_s: float

    @property
    def total_s(self) -> float:
        """From the signal to the end of the save, a validation that may be under way left out."""
        return self.save_s + self.step_s

    def words(self) -> str:
        """For a sentence."""
        return f"{self.save_s:.1f} s for a save and {self.step_s:.1f} s for a step ({self.run})"


def cost_of(run: Run) -> Cost | None:
    """What the run's own lines say; None when it has not saved yet."""
    saves = [event.get("seconds") for event in run.events if event.get("event") == "save"]
    known = [float(value) for value in saves if isinstance(value, int | float) and value >= 0]
    if not known:
        return None
    steps = sorted(point.ms for point in run.train if point.ms)
    slow = steps[min(len(steps) - 1, len(steps) * 99 // 100)] if steps else 0.0
    return Cost(run.name, max(known), slow / 1000)


def costliest(root: Path) -> Cost | None:
    """Of the newest runs in out/, the one that took longest to stop."""
    found = [cost_of(read_run(path)) for path in runs_under(root / "out")[:NEWEST]]
    return max((cost for cost in found if cost), key=lambda cost: cost.total_s, default=None)


def kill_wait_s() -> int | None:
    """The cluster's KillWait; None when it does not say."""
    answer = slurm.ask(["scontrol", "show", "config"])
    found = re.search(r"^KillWait\s*=\s*([0-9]+)", answer.out, re.MULTILINE)
    return int(found[1]) if found else None


def judge(cost: Cost | None, grace_s: int, kill_wait: int | None) -> tuple[bool, str]:
    """Whether the time suffices as far as is known, and the sentence that says why."""
    given, wait = grace_s + (kill_wait or 0), "?" if kill_wait is None else kill_wait
    text = f"{given} s from SIGTERM to SIGKILL ({grace_s} s grace, KillWait {wait} s)"
    if cost is None:
        return True, f"{text}; no run in out/ has saved yet, so whether that is enough is not known"
    if cost.total_s < given:
        return True, f"{text}, enough: the runs here need at most {cost.words()}"
    return False, f"{text}, NOT enough: the runs here need up to {cost.words()}"


FIX = "save more often (--save_minutes=5): a run that cannot save in time goes on from the save before"


def too_long_for_the_time_limit(cost: Cost | None) -> str:
    """The flag that a job needs when LEAD_S is too short for it; "" when it is not."""
    if cost is None or cost.total_s < LEAD_S:
        return ""
    return f"--signal=B:USR1@{int(cost.total_s * 2)}"
