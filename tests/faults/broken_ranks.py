"""One rank of two dies at a chosen place of the run: all end, what is saved is whole, the next launch is exact."""

import contextlib
import os
import random
import signal
import time

from nanogpt.common import checkpoints
from nanogpt.common.checkpoint_names import name_of, steps
from tests.faults import tiny
from tests.faults.campaign import Rig
from tests.faults.outcomes import Tally
from tests.faults.ranks import launch
from tests.faults.zygote import Child

KINDS, PLACES = ("kill", "segfault", "raise", "exit", "mismatch"), ("init", "step", "save", "eval", "end")
FLAGS = ("--auto_resume=true", "--dropout=0.1", "--eval_interval=5", "--save_interval=3")
PATIENCE_S = 20.0  # in which the others notice; then they are ended, as torchrun ends them at once


def cases() -> list[tuple[str, str, int]]:
    """Every kind at every place on either rank; rank 1 does not save."""
    both = [(kind, place, rank) for kind in KINDS for place in PLACES for rank in (0, 1)]
    return [
        case for case in both if case[1:] != ("save", 1) and not (case[0] == "mismatch" and case[1] == "init")
    ]


def broken_ranks(rig: Rig, rng: random.Random, count: int) -> Tally:
    """`count` of the cases (all of them, where there are not so many)."""
    tally = Tally(
        "one rank of two dies or leaves", "all ranks end, resumed on two ranks, losses and weights equal"
    )
    folder = rig.fresh("ranks")
    folder.mkdir()

    def run(out: str, module: str = "nanogpt.train", **variables: str) -> list[Child]:
        return launch(rig.zygote, rig.folder / "data", folder, 2, *FLAGS, out=out, module=module, **variables)

    straight = run("undisturbed")
    assert ended(straight) == [0, 0], [child.stderr for child in straight]
    for kind, place, rank in rng.sample(cases(), min(count, len(cases()))):
        out = f"{kind}-{place}-{rank}"
        statuses = ended(run(out, "tests.faults.stuck", STUCK=f"{kind} {place} {rank}"))
        tally.injected += 1
        tally.where[f"{kind} at {place}"] += 1
        problem = "" if any(statuses) else f"ended with {statuses}"
        saved = folder / out / "checkpoints"
        problem = problem or "; ".join(
            filter(None, (checkpoints.problem(saved / name_of(step)) for step in steps(saved)))
        )
        again = run(out)
        if not problem and ended(again) != [0, 0]:
            problem = f"resumed, it ended: {again[0].stderr[-300:]}"
        if not problem and not same(folder / out, folder / "undisturbed"):
            problem = "losses or weights differ"
        tally.failures += [f"{out}: {problem}"] if problem else []
    return tally


def ended(children: list[Child]) -> list[int]:
    """The ranks' statuses, when all have ended; one that does not notice another's end is ended, as torchrun does."""
    limit = time.monotonic() + 300
    while all(child.status is None for child in children) and time.monotonic() < limit:
        time.sleep(0.02)
    limit = min(limit, time.monotonic() + PATIENCE_S)
    while any(child.status is None for child in children) and time.monotonic() < limit:
        time.sleep(0.02)
    for child in children:
        if child.status is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child.pid, signal.SIGKILL)
    return [child.wait() for child in children]


def same(out, reference) -> bool:
    """Whether two runs of 20 steps have equal losses and weights."""
    found = [(tiny.losses(run), tiny.val_losses(run), tiny.final_weights(run)) for run in (out, reference)]
    return found[0] == found[1]
