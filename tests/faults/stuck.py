"""nanogpt.train whose rank STUCK_RANK stops at its fifth batch: what a forked child runs (`module=` of zygote.py).

STUCK says how: `sleep` (outside of every collective), `lock` (C code that keeps Python's lock), `stop` (SIGSTOP), or
`no`. HANG_LIMIT is `hang.LIMIT_S`, 60 s unless it is there.
"""

import ctypes
import os
import signal
import sys
import time

import nanogpt.batches
from nanogpt.common import hang
from tests.faults.zygote import command_of


def forever() -> None:
    """Where a rank is that hangs."""
    kind = os.environ["STUCK"]
    print(f"stuck: {time.time()}", file=sys.stderr, flush=True)
    if kind == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif kind == "lock":
        ctypes.PyDLL(None).sleep(600)
    else:
        time.sleep(600)


def main(argv: list[str]) -> int:
    """Train; get stuck."""
    if "HANG_LIMIT" in os.environ:
        hang.LIMIT_S = float(os.environ["HANG_LIMIT"])
        hang.TICK_S, hang.LATE = hang.LIMIT_S / 8, 1
    whole = nanogpt.batches.TrainBatches.get

    def get(self, step: int, micro_step: int):
        if (
            os.environ["STUCK"] != "no"
            and step == 5
            and os.environ.get("RANK", "0") == os.environ["STUCK_RANK"]
        ):
            forever()
        return whole(self, step, micro_step)

    nanogpt.batches.TrainBatches.get = get
    return command_of("nanogpt.train")(argv)
