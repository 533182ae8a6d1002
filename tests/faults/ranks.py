"""Launches of several ranks on CPUs (gloo): forked, with the variables that torchrun sets."""

import itertools
import os
import socket
from pathlib import Path

from tests.faults import tiny

TOKENS = "--tokens_per_step=512"  # 8 micro-batches of 4 x 16 tokens: 8, 4 and 2 for each rank
LAUNCHES = itertools.count()


def free_port() -> int:
    """A port nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def launch(
    zygote, data: Path, folder: Path, world: int, *flags: str, out: str = "run", module: str = "nanogpt.train",
    **variables: str,
):  # fmt: skip
    """Fork the ranks of one launch, which trains in folder/out; the children, rank 0 first."""
    port, name = str(free_port()), f"launch-{os.getpid()}-{next(LAUNCHES)}"
    argv = [*tiny.FLAGS, TOKENS, f"--data_root={data}", f"--out_dir={folder}/{out}", *flags]
    started = []
    for rank in range(world):
        env = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world,
               **variables, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": name}  # fmt: skip
        env = {key: str(value) for key, value in env.items()}
        started.append(zygote.start(argv, cwd=folder, env=env, module=module))
    return started
