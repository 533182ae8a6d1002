"""Which tokens each step trains on: a pure function of (seed, step, place in the step), so nothing has to be saved.

The training text is cut into blocks of block_size + 1 tokens (inputs, and targets one further on). An epoch visits
every block once in an order shuffled with the epoch's seed, and the cuts are shifted from epoch to epoch. Step s
takes the next `sequences_per_step` blocks whatever the number of ranks, so 1, 2 and 8 GPUs see the same steps.
"""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from nanogpt.common.errors import UserError
from nanogpt.common.shards import Shard, TokenSet

IGNORED = -100  # the target that cross entropy leaves out


def _too_short(token_set: TokenSet, split: str, needed: int) -> UserError:
    names = ", ".join(shard.path.name for shard in token_set.shards if shard.split == split) or "no file"
    return UserError(
        f"{token_set.folder}: {split} has {token_set.num_tokens(split):,} tokens ({names}), one sequence needs "
        f"{needed:,}; prepare more data, or lower --block_size"
    )


class TrainBatches:
    """The training batches of one rank. `get(step, micro_step)` returns them in any order asked for."""

    def __init__(
        self, token_set: TokenSet, *, block_size: int, batch_size: int, micro_steps: int, rank: int,
        world_size: int, seed: int, device: torch.device,
    ) -> None:  # fmt: skip
        self.block_size, self.batch_size, self.micro_steps = block_size, batch_size, micro_steps
        self.rank, self.world_size, self.seed, self.device = rank, world_size, seed, device
        self.tokens = [shard.tokens() for shard in token_set.shards_train]
        # One block less than fits, so that the cuts can be shifted by up to block_size - 1.
        blocks = [max(0, (len(tokens) - block_size) // block_size) for tokens in self.tokens]
        self.first_block = np.cumsum([0, *blocks])
        self.num_blocks = int(self.first_block[-1])
        if self.num_blocks == 0:
            raise _too_short(token_set, "train", 2 * block_size)
        self._epoch, self._order, self._shift = -1, np.empty(0, np.int64), 0
        # On a GPU the next batch is read while this one is computed: the first touch of a page may go to a network.
        self._reader = ThreadPoolExecutor(1) if device.type == "cuda" else None
        self._ahead: tuple[tuple[int, int], Future] | None = None

    def get(self, step: int, micro_step: int) -> tuple[Tensor, Tensor]:
        """(inputs, targets), each (batch_size, block_size) int64 on the device."""
        if self._reader is None:
            block = torch.from_numpy(self._read(step, micro_step))
            return block[:, :-1].contiguous(), block[:, 1:].contiguous()
        if self._ahead and self._ahead[0] == (step, micro_step):
            block = self._ahead[1].result()
        else:
            block = self._read_pinned(step, micro_step)
        following = (step, micro_step + 1) if micro_step + 1 < self.micro_steps else (step + 1, 0)
        self._ahead = (following, self._reader.submit(self._read_pinned, *following))
        block = block.to(self.device, non_blocking=True)
        return block[:, :-1].contiguous(), block[:, 1:].contiguous()

    def micro_batch(self, step: int, micro_step: int) -> int:
        """The number of this micro-batch over all ranks and steps: what dropout is seeded with."""
        return (step * self.micro_steps + micro_step) * self.world_size + self.rank

    def _read_pinned(self, step: int, micro_step: int) -> Tensor:
        return torch.from_numpy(self._read(step, micro_step)).pin_memory()

    def _read(self, step: int, micro_step: int) -> np.ndarray:
        first = self.micro_batch(step, micro_step) * self.batch_size
        rows = [self._block(sequence) for sequence in range(first, first + self.batch_size)]
        return np.stack(rows).astype(np.int64)

    def _block(self, sequence: int) -> np.ndarray:
        epoch, place = divmod(sequence, self.num_blocks)
        if epoch != self._epoch:
            generator = np.random.Generator(np.random.Philox(key=[self.seed, epoch]))
            self._epoch, self._shift = epoch, int(generator.integers(self.block_size))
            self._order = generator.permutation(self.num_blocks)
        block = int(self._order[place])
        shard = int(np.searchsorted(self.first_block, block, side="right")) - 1
        start = (block - int(self.first_block[shard])) * self.block_size + self._shift
        return self.tokens[shard][start : start + self.block_size + 1]


class ValBatches:
    """The fixed validation set: sequential blocks from the start of each shard, dealt to the ranks in turn."""

    def __init__(
        self, token_set: TokenSet, *, block_size: int, batch_size: int, max_tokens: int, rank: int,
        world_size: int, device: torch.device,
    ) -> None:  # fmt: skip
        self.block_size, self.batch_size = block_size, batch_size
        self.rank, self.world_size, self.device = rank, world_size, device
        starts = [
            (shard, start)
            for shard in token_set.shards_val
            for start in range(0, shard.num_tokens - block_size, block_size)
        ]
        self.starts = starts[: max(1, max_tokens // block_size)] if max_tokens else starts
        if not self.starts:
            raise _too_short(token_set, "val", block_size + 1)
        self._maps: dict[Shard, np.memmap] = {}

    @property
    def num_tokens(self) -> int:
        """Tokens that a validation predicts, over all ranks."""
        return len(self.starts) * self.block_size

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, int]]:
        """(inputs, targets, predicted tokens) of this rank; every batch has the full shape, filled with IGNORED."""
        for first in range(self.rank * self.batch_size, len(self.starts), self.world_size * self.batch_size):
            chosen = self.starts[first : first + self.batch_size]
            block = np.zeros((self.batch_size, self.block_size + 1), np.int64)
            for row, (shard, start) in enumerate(chosen):
                if shard not in self._maps:
                    self._maps[shard] = shard.tokens()
                tokens = self._maps[shard]
                block[row] = tokens[start : start + self.block_size + 1]
            batch = torch.from_numpy(block).to(self.device)
            inputs, targets = batch[:, :-1].contiguous(), batch[:, 1:].contiguous()
            targets[len(chosen) :] = IGNORED
            yield inputs, targets, len(chosen) * self.block_size
