"""nanogpt.train on a machine of another name (root on Linux): what a forked child runs (`module=` of zygote.py)."""

import ctypes
import os
import socket

from tests.faults.zygote import command_of

CLONE_NEWUTS = 0x04000000  # <sched.h>: a host name of its own


def main(argv: list[str]) -> int:
    """Train as `another-node` would."""
    if ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWUTS):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    socket.sethostname("another-node")
    return command_of("nanogpt.train")(argv)
