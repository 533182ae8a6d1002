"""A table of whose rows a rank touches few between two updates: only their gradients travel (record 71).

Two lanes leave about four fifths of the bigram table's rows alone. The owners of the others receive them in two
messages with as many rows as there are, first the numbers of the rows and then their gradients, and add them to their
own rows of the gradient where they lie: no further buffer, and only touched rows have to be cleared. How many rows come
is told from CPU to CPU: sizes that only the GPU knew would stop it. The weights travel back whole.
"""

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter

from modded_nanogpt.optim.exchange import Sharded
from nanogpt.common.ranks import Ranks


class TouchedRows(Sharded):
    """As `Sharded`, for a table with a lasting gradient on several ranks; sums arrive in the order of the ranks."""

    def __init__(
        self, name: str, parameter: Parameter, view: tuple[int, ...], ranks: Ranks, lasting_gradient: bool
    ) -> None:
        super().__init__(name, parameter, view, ranks, lasting_gradient)
        self.touched = np.zeros(self.memory.shape[0], dtype=bool)
        self.named = False  # whether the rows that were touched since the last update are known
        self.whole = False  # whether they cannot be known until the next one
        on_cpu = parameter.device.type == "cpu"
        self.cpu_group = None if on_cpu else dist.new_group(backend="gloo")  # None: the ranks' own group
        self._sent: Tensor | None = None
        self._received: list[tuple[Tensor, Tensor]] = []
        self._works: list[dist.Work] = []

    def touch(self, rows: Tensor) -> None:
        """Note that gradients were added to `rows` (int, on the CPU)."""
        self.touched[rows.numpy()] = True
        self.named = not self.whole

    def came_whole(self) -> None:
        """The gradient was loaded, and nobody knows which rows it has: this time it travels whole."""
        self.named, self.whole = False, True

    @property
    def in_place(self) -> bool:
        """This rank's rows of the gradient are summed where they lie."""
        return self.named

    def launch_reduce(self) -> None:
        """Send the touched rows of other ranks to their owners; the whole gradient when nobody has named rows."""
        if not self.named:
            super().launch_reduce()
            return
        device = self.gradient_memory.device
        rows = torch.from_numpy(np.flatnonzero(self.touched))
        owners = rows // self.share
        others = owners != self.ranks.rank
        sizes = torch.bincount(owners[others], minlength=self.ranks.world_size)
        coming = torch.empty_like(sizes)
        dist.all_to_all_single(coming, sizes, group=self.cpu_group)
        rows = rows[others]
        self._sent = rows.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else rows
        values = self.gradient_memory.index_select(0, self._sent)
        places = torch.empty(int(coming.sum()), dtype=torch.int64, device=device)
        sums = values.new_empty(places.shape[0], *values.shape[1:])
        outward, inward = sizes.tolist(), coming.tolist()
        self._works = [
            dist.all_to_all_single(places, self._sent, inward, outward, async_op=True),
            dist.all_to_all_single(sums, values, inward, outward, async_op=True),
        ]
        self._received = list(zip(places.split(inward), sums.split(inward), strict=True))

    def gradient(self) -> Tensor:
        """This rank's rows of the sum over the ranks, when they have come."""
        if not self.named:
            return super().gradient()
        for work in self._works:
            work.wait()
        mine = self.gradient_memory[self.mine]
        for (
            places,
            values,
        ) in self._received:  # one rank's rows are distinct: no two additions meet, no order matters
            mine.index_add_(0, places - self.mine.start, values)
        self._works, self._received = [], []
        return mine

    def clear(self, updated: bool) -> None:
        """The gradient becomes zero: after an update the other ranks' touched rows are what is left of it."""
        if updated and self.named:
            self.gradient_memory.index_fill_(0, self._sent, 0)
        else:
            self.gradient_memory.zero_()
        self.touched[:] = False
        self.named, self.whole, self._sent = False, False, None
