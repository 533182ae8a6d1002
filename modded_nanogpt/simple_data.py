"""The small trainer's tokens, in a fixed order: the train shards one after the other, cut into sequences.

Step s takes the sequences s x batch_size ... of the whole stream, whatever the seed and the number of ranks; micro-step
m of rank r takes the (m x ranks + r)-th share of them. So nothing has to be saved, and every world size sees the same.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from modded_nanogpt.simple_config import Config, Plan
from nanogpt.common.ranks import Ranks
from nanogpt.common.shards import Shard, TokenSet


class Stream:
    """Shards cut into sequences of `length` tokens and one more, the last one's target; what is left over is unused."""

    def __init__(self, shards: Sequence[Shard], length: int) -> None:
        self.length = length
        self.tokens = [shard.tokens() for shard in shards]
        self.ends = np.cumsum([max(0, len(tokens) - 1) // length for tokens in self.tokens])

    def read(self, first: int, count: int) -> np.ndarray:
        """(count, length + 1) int64: the sequences from `first` on, from the beginning again after the last one."""
        rows = np.empty((count, self.length + 1), np.int64)
        for row in range(count):
            number = (first + row) % int(self.ends[-1])
            shard = int(self.ends.searchsorted(number, side="right"))
            start = (number - (int(self.ends[shard - 1]) if shard else 0)) * self.length
            rows[row] = self.tokens[shard][start : start + self.length + 1]
        return rows


class TrainBatches:
    """`get(step, micro_step)` returns what this rank trains on, and has the next one read meanwhile."""

    def __init__(self, token_set: TokenSet, config: Config, plan: Plan, ranks: Ranks) -> None:
        self.stream = Stream(token_set.shards_train, config.sequence_length)
        self.size, self.batch_size, self.plan, self.ranks = (
            config.device_batch_size, config.batch_size, plan, ranks,
        )  # fmt: skip
        self._reader = ThreadPoolExecutor(1)
        self._ahead: tuple[tuple[int, int], Future] | None = None

    def get(self, step: int, micro_step: int) -> tuple[Tensor, Tensor]:
        """(inputs, targets) on the device, int64 (device_batch_size x sequence_length,): consecutive text."""
        if self._ahead and self._ahead[0] == (step, micro_step):
            rows = self._ahead[1].result()
        else:
            rows = self._read(step, micro_step)
        following = (step, micro_step + 1) if micro_step + 1 < self.plan.micro_steps else (step + 1, 0)
        self._ahead = (following, self._reader.submit(self._read, *following))
        rows = rows.to(self.ranks.device, non_blocking=True)
        return rows[:, :-1].flatten(), rows[:, 1:].flatten()

    def close(self) -> None:
        """Stop reading ahead."""
        self._reader.shutdown(wait=True, cancel_futures=True)

    def _read(self, step: int, micro_step: int) -> Tensor:
        share = micro_step * self.ranks.world_size + self.ranks.rank
        rows = torch.from_numpy(self.stream.read(step * self.batch_size + share * self.size, self.size))
        return rows.pin_memory() if self.ranks.device.type == "cuda" else rows


class ValBatches:
    """The fixed validation text: the first `val_tokens` of it, dealt to the ranks a batch at a time."""

    def __init__(self, token_set: TokenSet, config: Config, ranks: Ranks) -> None:
        self.stream = Stream(token_set.shards_val, config.sequence_length)
        self.size, self.ranks = config.device_batch_size, ranks
        self.sequences = config.val_tokens // config.sequence_length or int(self.stream.ends[-1])

    @property
    def num_tokens(self) -> int:
        """Tokens that a validation predicts, over all ranks."""
        return self.sequences * self.stream.length

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, int]]:
        """(inputs, targets, n) as in training: only the first n count; the last batch is filled up."""
        stride = self.ranks.world_size * self.size
        for first in range(self.ranks.rank * self.size, self.sequences, stride):
            rows = torch.from_numpy(self.stream.read(first, self.size)).to(self.ranks.device)
            counting = min(self.size, self.sequences - first) * self.stream.length
            yield rows[:, :-1].flatten(), rows[:, 1:].flatten(), counting
