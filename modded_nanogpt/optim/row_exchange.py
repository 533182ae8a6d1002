"""Rows of a table that is cut over the ranks: asked for, sent back, and their gradients' way home.

How many rows travel is told from CPU to CPU: sizes that only the GPU knew would stop it. What a rank needs of its own
rows takes the same way, as a copy on its own device. Arithmetic is done elsewhere.
"""

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from nanogpt.common.ranks import Ranks


class RowExchange:
    """Exchanges over several ranks, rank r of which owns the rows from r x share on. All ranks make every call."""

    def __init__(self, ranks: Ranks, share: int) -> None:
        self.ranks, self.share = ranks, share
        on_cpu = ranks.device.type == "cpu"
        self.cpu_group = None if on_cpu else dist.new_group(backend="gloo")  # None: the ranks' own group

    def pull(self, wanted: Tensor | None, mine: Tensor, into: Tensor) -> None:
        """into[k] = the row wanted[k], for the different rows `wanted` (K,) int32, ascending, on the CPU.

        mine: this rank's rows (share, d); into: (at least K, d). None: nothing is wanted here.
        """
        rows = torch.empty(0, dtype=torch.int32) if wanted is None else wanted
        outward, inward = self._sizes(rows.numpy())
        asked = torch.empty(sum(inward), dtype=torch.int32, device=mine.device)
        sent = rows.to(mine.device, non_blocking=True)
        dist.all_to_all_single(asked, sent, inward, outward)
        served = mine.index_select(0, asked - self.ranks.rank * self.share)
        dist.all_to_all_single(into[: rows.numel()], served, outward, inward)

    def push(self, rows: np.ndarray, values: Tensor) -> tuple[Tensor, Tensor]:
        """((E,) int32, (E, d)): the rows of this rank that all ranks send `values` of, rank after rank.

        rows: the different rows of `values` (n, d), ascending.
        """
        outward, inward = self._sizes(rows)
        sent = torch.from_numpy(rows)
        sent = sent.pin_memory().to(values.device, non_blocking=True) if values.is_cuda else sent
        ids = torch.empty(sum(inward), dtype=torch.int32, device=values.device)
        came = values.new_empty(ids.numel(), *values.shape[1:])
        dist.all_to_all_single(ids, sent, inward, outward)
        dist.all_to_all_single(came, values, inward, outward)
        return ids, came

    def collect(self, part: Tensor, count: int, piece: int) -> Tensor:
        """The whole of a tensor of which every rank has its rows, on the CPU of rank 0; of others nothing.

        It travels in pieces of so many rows, as the whole would not fit into one GPU.
        """
        whole = torch.empty(count if self.ranks.is_main else 0, *part.shape[1:], dtype=part.dtype)
        for owner in range(self.ranks.world_size):
            for start in range(0, self.share, piece):
                mine = part[start : start + piece]
                if self.ranks.rank != owner:
                    mine = torch.empty_like(mine)
                dist.broadcast(mine, owner)
                at = owner * self.share + start
                if self.ranks.is_main:
                    room = whole[
                        at : at + len(mine)
                    ]  # the last rank's share may have rows that the table has not
                    room.copy_(mine[: len(room)])
        return whole

    def _sizes(self, rows: np.ndarray) -> tuple[list[int], list[int]]:
        """(how many of `rows`, ascending, each rank owns; how many of this rank's each rank has)."""
        borders = np.arange(1, self.ranks.world_size) * self.share
        cuts = np.searchsorted(rows, borders)
        outward = torch.from_numpy(np.diff(cuts, prepend=0, append=len(rows)))
        inward = torch.empty_like(outward)
        dist.all_to_all_single(inward, outward, group=self.cpu_group)
        return outward.tolist(), inward.tolist()
