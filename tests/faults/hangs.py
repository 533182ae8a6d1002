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
            variables = {"STUCK": f"{kind} step {rank}"}
            children = launch(
                rig.zygote, rig.folder / "data", folder, 2, out=f"run{number}", module="tests.faults.stuck", **variables
            )  # fmt: skip
            stack.callback(end, children)
            launches.append((kind, rank, children))
        clean = launch(rig.zygote, rig.folder / "data", folder, 2, "--max_iters=1000000", "--lr_decay_iters=1000000",
                       "--eval_interval=100000", "--log_interval=1000", out="clean", module="tests.faults.stuck",
                       STUCK="no step 0")  # fmt: skip
        stack.callback(end, clean)
        named: dict[int, float] = {}  # when each launch had said who hangs; all are looked at in turn
        limit = time.monotonic() + PATIENCE_S
        while len(named) < count and time.monotonic() < limit:
            for number, (_, _, children) in enumerate(launches):
                said = children[0].stderr + children[1].stderr
                if number not in named and "hang: rank 0 " in said and "hang: rank 1 " in said:
                    named[number] = time.time()
            time.sleep(0.2)
        for number, (kind, rank, children) in enumerate(launches):
            tally.injected += 1
            tally.where[KINDS[kind]] += 1
            found = complaint(children[1 - rank].stderr, children[rank].stderr, rank, named.get(number))
            tally.failures += [f"{kind} of rank {rank}: {found}"] if found else []
        tally.clean += 1
        said = "".join(child.stderr for child in clean)
        if said or any(child.status is not None for child in clean):
            tally.failures.append(f"a false alarm, or a run that ended: {said[:500]}")
    return tally


def complaint(witness: str, stuck: str, rank: int, named: float | None) -> str:
    """What is wrong with what the two ranks said, "" for nothing; `named`: when the report was there."""
    if named is None:
        return f"nobody is named: {(witness + stuck)[-500:]}"
    first = next(line for line in (witness + stuck).splitlines() if line.startswith("hang: "))
    if not first.startswith(f"hang: rank {rank} of 2"):
        return f"the wrong rank is named: {first}"
    if "in train\n" not in witness + stuck or "all_reduce" not in witness + stuck:
        return f"no stacks: {(witness + stuck)[-500:]}"
    began = float(next(line.split()[1] for line in stuck.splitlines() if line.startswith("stuck: ")))
    return f"named after {named - began:.0f} s" if named - began > SOON_S else ""


def end(children: list[Child]) -> None:
    """SIGKILL, and wait."""
    for child in children:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child.pid, signal.SIGKILL)
        child.wait()
