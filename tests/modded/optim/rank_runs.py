"""Runs of the optimizer on 1, 2 and 4 ranks that are real processes with gloo between them; results go to a folder.

    python -m tests.modded.optim.rank_runs FOLDER

Torch is imported once; each rank is a fork of this process. `RUNS` says what is run, each file what it left:
<run>.safetensors weights and whole optimizer state, <run>.rank<r>.safetensors weights as that rank has them. `TABLES`
are runs of the n-gram table, which leave its state and what a last lane looks up.
"""

import dataclasses
import os
import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from modded_nanogpt.batches import Batch, _Packer
from modded_nanogpt.config import Config
from modded_nanogpt.optim import averaging, table
from modded_nanogpt.optim.row_table import RowTable
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


TABLE_CONFIG = Config(
    recipe="tiny", vocab_size=512, prefix=False, sampled_softmax=False, device="cpu", table_rows="80",
    eval_slice=256,
)  # fmt: skip
EVENTS = 4
# name: (ranks, first update, last one, the run to resume from)
TABLES = {f"table{world}": (world, 0, EVENTS, None) for world in (1, 2, 8)}
TABLES |= {f"tablecut{world}": (world, 0, 2, None) for world in (1, 2)}
TABLES |= {"tablecut1to2": (2, 2, EVENTS, "tablecut1"), "tablecut2to1": (1, 2, EVENTS, "tablecut2")}


def table_lane(number: int, world: int = 1) -> tuple[Batch, torch.Tensor]:
    """A lane of 128 tokens, and a gradient (128, 96) for it whose sums are exact."""
    rng = np.random.default_rng(number)
    tokens = rng.integers(0, 20 + 100 * (number % 3), 129).astype(np.uint16)
    batch = _Packer(TABLE_CONFIG, False, world).pack(tokens, np.array([128]), 3, 128)
    return batch, torch.from_numpy(rng.integers(-200, 200, (128, 96))).float() * 2.0**-14


def train_table(rows: RowTable, first: int, end: int, lanes: int = 2, rank: int = 0, world: int = 1) -> None:
    """This rank's part of `lanes` lanes before each update; one update of the first kind, then of the second."""
    for event in range(first, end):
        for number in range(rank, lanes, world):
            batch, gradient = table_lane(lanes * event + number, world)
            rows.keep(batch, gradient * world)
        rows.update((0.95, 5.0) if event == 0 else (0.9025, 10.0), 0.5)


def run_table(name: str, rank: int, folder: Path) -> None:
    """Rank `rank` of the run `name` of the n-gram table; the last rank of several looks up nothing at the end."""
    world, first, end, source = TABLES[name]
    torch.set_num_threads(1)
    if world > 1:
        dist.init_process_group(
            "gloo", init_method=f"file://{folder}/{name}.meet", rank=rank, world_size=world
        )
    rows = RowTable(TABLE_CONFIG, Ranks(rank, rank, world, torch.device("cpu")), torch.float32)
    if source:
        saved = load_file(folder / f"{source}.safetensors")
        rows.load({key: value for key, value in saved.items() if not key.startswith("found")}, source)
    train_table(rows, first, end, 8, rank, world)
    if rank and rank == world - 1:
        rows.fetch_rows(None)
        found = torch.empty(0)
    else:
        batch, _ = table_lane(100 + rank, world)
        rows.fetch(batch)
        found = rows.vectors(batch)
    state = rows.tensors()
    assert bool(state) == (rank == 0)
    if rank == 0:
        state = {key: value.clone() for key, value in state.items()}
        save_file(state | {"found": found}, folder / f"{name}.safetensors")


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
    for name, (world, *_) in (RUNS | TABLES).items():
        children = []
        for rank in range(world):
            child = os.fork()
            if child == 0:
                status = 1
                try:
                    (run_table if name in TABLES else run)(name, rank, folder)
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
