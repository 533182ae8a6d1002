"""Runs of the optimizer on 1, 2 and 4 ranks that are real processes with gloo between them; results go to a folder.

    python -m tests.modded.optim.rank_runs FOLDER

Torch is imported once; each rank is a fork of this process. `RUNS` says what is run, each file what it left:
<run>.safetensors weights and whole optimizer state, <run>.rank<r>.safetensors weights as that rank has them.
"""

import dataclasses
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from modded_nanogpt.optim import averaging, table
from modded_nanogpt.optim.sharded import Optimizer
from nanogpt.common.ranks import Ranks
from tests.modded.optim import small

# Times which each lane's gradient is larger than the one before, in the runs whose sums are rounded.
ROUGH = 1.1

CONFIG = small.config_of(averaging=True, two_momenta=True, steps=small.STEPS, extension_steps=0)

# name: (ranks, dtype, first step, end, the run to resume from)
RUNS = {
    f"{kind}{world}": (world, dtype, 0, small.STEPS, None)
    for kind, dtype, worlds in (
        ("half", torch.bfloat16, (1, 2, 4)), ("full", torch.float32, (1, 2)), ("rough", torch.float32, (1, 2)),
        ("averaged", torch.float32, (1, 2)),
    )
    for world in worlds
}  # fmt: skip
# Only touched rows of the bigram table travel; in `untold` they would, but nobody says which they are.
RUNS |= {f"{kind}2": (2, torch.bfloat16, 0, small.STEPS, None) for kind in ("sparse", "untold")}
RUNS |= {f"cut{world}": (world, torch.bfloat16, 0, 6, None) for world in (1, 2, 4)}
RUNS |= {"early2": (2, torch.bfloat16, 0, 2, None), "between1": (1, torch.bfloat16, 0, 5, None)}
RUNS |= {f"{kind}2": (2, torch.bfloat16, 0, 5, None) for kind in ("between", "sparsebetween")}
RUNS |= {
    f"{source}to{world}": (world, torch.bfloat16, RUNS[source][3], small.STEPS, source)
    for source, world in (
        ("cut1", 4), ("cut2", 1), ("cut4", 2), ("early2", 2), ("between1", 2), ("between2", 1), ("sparsebetween2", 2),
    )
}  # fmt: skip


def run(name: str, rank: int, folder: Path) -> None:
    """Rank `rank` of the run `name`."""
    world, dtype, first, end, source = RUNS[name]
    device = torch.device("cpu")
    torch.set_num_threads(1)
    # oneDNN takes over above a size in which the number of matrices counts, and that depends on the number of ranks.
    torch.backends.mkldnn.set_flags(False)
    if world > 1:
        dist.init_process_group(
            "gloo", init_method=f"file://{folder}/{name}.meet", rank=rank, world_size=world
        )
    if name.startswith(("sparse", "untold")):
        table._TABLE["bigram"] = dataclasses.replace(table._TABLE["bigram"], sparse_from=2)
    averaging.RECORD_STEPS = 300  # so that averages begin in the first half of these steps
    config, parameters = CONFIG, small.parameters(dtype)
    optimizer = Optimizer(parameters, config, Ranks(rank, rank, world, device), device)
    if source:
        saved = load_file(folder / f"{source}.safetensors")
        state = {
            key.removeprefix("state:"): value for key, value in saved.items() if key.startswith("state:")
        }
        for key, parameter in parameters.items():
            parameter.data.copy_(saved[key])
        optimizer.load(state, source)
    for step in range(first, end):
        small.add_gradients(parameters, step, rank, world, ROUGH if name.startswith("rough") else 1.0)
        for lane in range(rank, small.LANES, world) if not name.startswith("untold") else ():
            rows = small.lane_gradient("bigram", step, lane).any(1).nonzero().flatten()
            optimizer.touch("bigram", torch.cat([rows, rows[:2]]).int())
        optimizer.step(small.plan_of(config, step))
    if name.startswith("averaged"):
        optimizer.average()
    weights = {key: parameter.detach().clone() for key, parameter in parameters.items()}
    state = {f"state:{key}": value.clone().contiguous() for key, value in optimizer.tensors().items()}
    save_file(weights, folder / f"{name}.rank{rank}.safetensors")
    assert bool(state) == (rank == 0)
    if rank == 0:
        save_file(weights | state, folder / f"{name}.safetensors")


def main(folder: Path) -> int:
    """All runs in order; the exit status is 1 when a rank failed."""
    for name, (world, *_) in RUNS.items():
        children = []
        for rank in range(world):
            child = os.fork()
            if child == 0:
                status = 1
                try:
                    run(name, rank, folder)
                    status = 0
                finally:
                    sys.stderr.flush()
                    os._exit(status)
            children.append(child)
        statuses = [os.waitpid(child, 0)[1] for child in children]
        if any(statuses):
            print(f"run {name} failed", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
