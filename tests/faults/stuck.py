"""nanogpt.train of which one rank stops or dies: what a forked child runs (`module=` of zygote.py).

STUCK is `KIND PLACE RANK`. KIND: `sleep` (outside of every collective), `lock` (C code that keeps Python's lock),
`stop` (SIGSTOP), `mismatch` (a collective that no other rank makes), `kill`, `segfault`, `raise`, `exit` (status 0),
or `no`. PLACE: `init`, `step`, `save`, `eval`, `end`; rank 0 alone saves. HANG_LIMIT is `hang.LIMIT_S`, else 60 s.
"""

import ctypes
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

import nanogpt.batches
import nanogpt.setup
from nanogpt.common import hang, ranks, tracking
from tests.faults.zygote import command_of


def break_off(kind: str, note: Path | None) -> None:
    """What a rank does that hangs or dies; once `note`, its own for `hang.Watch`, says that it is here."""
    while note and not (note.is_file() and "in break_off" in note.read_text()):
        time.sleep(0.01)
    print(f"stuck: {time.time()}", file=sys.stderr, flush=True)
    if kind == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif kind == "lock":
        ctypes.PyDLL(None).sleep(600)
    elif kind == "sleep":
        time.sleep(600)
    elif kind == "mismatch":
        dist.broadcast(torch.zeros(3), int(os.environ["RANK"]))
        dist.barrier()
    elif kind == "raise":
        raise ZeroDivisionError("on one rank")
    elif kind == "exit":
        os._exit(0)
    os.kill(os.getpid(), signal.SIGSEGV if kind == "segfault" else signal.SIGKILL)


def main(argv: list[str]) -> int:
    """Train; break off."""
    if "HANG_LIMIT" in os.environ:
        hang.LIMIT_S = float(os.environ["HANG_LIMIT"])
        hang.TICK_S, hang.LATE = hang.LIMIT_S / 8, 1
    kind, place, rank = os.environ["STUCK"].split()
    mine = kind != "no" and os.environ.get("RANK", "0") == rank
    counted: list[int] = []
    run = next(Path(word.partition("=")[2]) for word in argv if word.startswith("--out_dir="))
    note = run / hang.FOLDER / f"rank-{rank}.json" if kind in ("stop", "lock") and place == "step" else None

    def before(owner: object, name: str, time_to: Callable[..., bool]) -> None:
        whole = getattr(owner, name)

        def broken(*args: object, **options: object) -> object:
            counted.append(1)
            if mine and time_to(*args):
                break_off(kind, note)
            return whole(*args, **options)

        setattr(owner, name, broken)

    where = {
        "init": (ranks, "start", lambda *_: True),
        "step": (nanogpt.batches.TrainBatches, "get", lambda _, step, __: step == 5),
        "save": (nanogpt.setup, "save", lambda *_: len(counted) == 2),
        "eval": (nanogpt.setup, "evaluate", lambda *_: len(counted) == 2),
        "end": (tracking, "finish", lambda *_: True),
    }
    before(*where[place])
    return command_of("nanogpt.train")(argv)
