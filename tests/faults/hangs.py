"""Ranks that stop, in three ways, with the limits as they are: who is named, how soon; and runs that go on beside."""

import contextlib
import os
import random
import signal
import time

from tests.faults.campaign import Rig
from tests.faults.outcomes import Tally
from tests.faults.ranks import launch
from tests.faults.zygote import Child

KINDS = {
    "stop": "SIGSTOP",
    "sleep": "waits outside of every collective",
    "lock": "C code keeps Python's lock",
}
SOON_S, PATIENCE_S = 70.0, 180.0


def hangs(rig: Rig, rng: random.Random, count: int) -> Tally:
    """`count` launches of two ranks at once, one rank of each gets stuck; one launch more trains all the time."""
    tally = Tally(
        "a rank that hangs", f"named within {SOON_S:.0f} s, every rank's stack; runs beside it never named"
    )
    folder, launches = rig.fresh("hangs"), []
    folder.mkdir()
    with contextlib.ExitStack() as stack:
        for number in range(count):
            kind, rank = list(KINDS)[number % len(KINDS)], rng.randrange(2)
            variables = {"STUCK": kind, "STUCK_RANK": str(rank)}
            children = launch(
                rig.zygote, rig.folder / "data", folder, 2, out=f"run{number}", module="tests.faults.stuck", **variables
            )  # fmt: skip
            stack.callback(end, children)
            launches.append((kind, rank, children))
        clean = launch(rig.zygote, rig.folder / "data", folder, 2, "--max_iters=1000000", "--lr_decay_iters=1000000",
                       "--eval_interval=100000", "--log_interval=1000", out="clean", module="tests.faults.stuck",
                       STUCK="no")  # fmt: skip
        stack.callback(end, clean)
        for kind, rank, children in launches:
            found, seconds = watched(children[1 - rank], children[rank], rank)
            tally.injected += 1
            tally.where[KINDS[kind]] += 1
            if found:
                tally.failures.append(f"{kind} of rank {rank}: {found}")
            elif seconds > SOON_S:
                tally.failures.append(f"{kind} of rank {rank}: named after {seconds:.0f} s")
        tally.clean += 1
        said = "".join(child.stderr for child in clean)
        if said or any(child.status is not None for child in clean):
            tally.failures.append(f"a false alarm, or a run that ended: {said[:500]}")
    return tally


def watched(witness: Child, stuck: Child, rank: int) -> tuple[str, float]:
    """(what is wrong with what the two ranks said, "" for nothing; seconds from the hang to the report)."""
    limit = time.monotonic() + PATIENCE_S
    while "hang: rank 0 " not in (said := witness.stderr + stuck.stderr) or "hang: rank 1 " not in said:
        if time.monotonic() > limit:
            return f"nobody is named: {said[-500:]}", 0.0
        time.sleep(0.2)
    now, (began, *_) = time.time(), [line for line in stuck.stderr.splitlines() if line.startswith("stuck: ")]
    first = next(line for line in said.splitlines() if line.startswith("hang: "))
    if not first.startswith(f"hang: rank {rank} of 2"):
        return f"the wrong rank is named: {first}", 0.0
    whole = "in train\n" in said and "all_reduce" in said
    return ("" if whole else f"no stacks: {said[-500:]}"), now - float(began.split()[1])


def end(children: list[Child]) -> None:
    """SIGKILL, and wait."""
    for child in children:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child.pid, signal.SIGKILL)
        child.wait()
