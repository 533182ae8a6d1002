"""What every trainer does around its steps: checking the data, taking a run up again, writing a checkpoint."""

import dataclasses
import os
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from nanogpt.common import checkpoint_names, checkpoints
from nanogpt.common.errors import UserError
from nanogpt.common.progress import Progress
from nanogpt.common.ranks import Ranks
from nanogpt.common.rundir import RunDir
from nanogpt.common.shards import TokenSet, data_root, open_token_set, verify
from nanogpt.common.storage import check_room


def repeat_exactly() -> None:
    """What --deterministic asks for: the same bits again, also where the code is compiled anew.

    Without the last line inductor takes what it measures to be the fastest, in padding and in the order of sums:
    another node, or another load on the same one, could choose otherwise.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # torch refuses cuBLAS's products without
    torch.use_deterministic_algorithms(True)
    from torch._inductor import config

    config.deterministic = True


class DataConfig(Protocol):
    """The knobs that say which data."""

    dataset: str
    data_root: str
    smoke: bool


def checked_tokens(config: DataConfig, ranks: Ranks, say: Callable[[str], None]) -> TokenSet:
    """The data set, every shard of it read and compared with its manifest; the ranks share the work.

    With --smoke the first shard of each split is: hundreds of them take minutes.
    """
    token_set = open_token_set(config.dataset, data_root(config.data_root))
    for note in token_set.notes:
        say(f"note: {note}")
    failure: UserError | None = None
    looked_at = token_set
    if config.smoke:
        looked_at = dataclasses.replace(
            token_set, shards_train=token_set.shards_train[:1], shards_val=token_set.shards_val[:1]
        )
    try:
        if ranks.is_main:
            with Progress(f"checking {token_set.name}") as bar:
                verify(looked_at, part=ranks.rank, parts=ranks.world_size, progress=bar.update)
        else:
            verify(looked_at, part=ranks.rank, parts=ranks.world_size)
    except UserError as error:
        failure = error
    ranks.agree(failure)  # all ranks leave together: the others would wait for one that left for ever
    return token_set


def latest_checkpoint(run: RunDir, ranks: Ranks) -> checkpoints.Checkpoint | None:
    """The run's newest sound checkpoint, the same on all ranks: rank 0 looks, the others read what it chose."""
    with ranks.main_only() as box:
        if ranks.is_main:
            checkpoint_names.remove_leftovers(run.checkpoints)
            found = checkpoints.load_latest(run.checkpoints, run.say)
            if found is None and run.config.get("must_resume"):
                raise UserError(
                    f"{run.checkpoints}: no sound checkpoint is left to resume from; start again with "
                    "--overwrite=true, or from the beginning of this run with --auto_resume=true"
                )
            box["path"] = found.path.name if found else None
    return checkpoints.load(run.checkpoints / box["path"]) if box["path"] else None


def write_checkpoint(
    run: RunDir,
    step: int,
    parts: dict[str, dict[str, Tensor]],
    record: dict,
    keep: int,
    best: int | None = None,
) -> None:
    """Write a checkpoint as the run's owner, then drop those no longer kept (`best` stays). On rank 0. StorageError."""
    size = sum(tensor.numel() * tensor.element_size() for part in parts.values() for tensor in part.values())

    def save_once():
        check_room(run.folder, size + (1 << 20))
        return checkpoints.save(run.checkpoints, step, parts, record, before_publish=run.check_fence)

    checkpoints.save_or_make_room(run.checkpoints, best, save_once)
    checkpoints.prune(run.checkpoints, keep, set() if best is None else {best})
