"""How one parameter, or the small ones together, travels between ranks: no optimizer's arithmetic here.

A gradient is summed over the ranks in its own dtype, each rank receiving the part that it updates; the update divides
by the number of ranks, a power of two. Afterwards every rank gathers all parts. Both are started early and waited for
late. With one rank nothing moves and nothing is copied: the part is the whole.

A part is an equal share of the leading axis. Where that does not divide, the parameter's memory is extended by zero
rows, whose updates stay zero: the model sees the same parameter, and gathers write to it directly.
"""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter

from nanogpt.common.ranks import Ranks

# torch 2.13 renames the two and warns at every call of the old names.
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class Sharded:
    """A parameter of which each rank updates an equal share of rows: of its leading axis, or of the `view` of it.

    With `lasting_gradient`, `parameter.grad` is a buffer from here on, zero after every `clear`; else it is dropped.
    When the rows have to be padded the parameter's memory moves: make this before anything keeps a view of it.
    """

    def __init__(
        self, name: str, parameter: Parameter, view: tuple[int, ...], ranks: Ranks, lasting_gradient: bool
    ) -> None:
        self.name, self.parameter, self.view, self.ranks, self.lasting = (
            name,
            parameter,
            view,
            ranks,
            lasting_gradient,
        )
        self.share = -(-view[0] // ranks.world_size)
        self.padded = self.share * ranks.world_size != view[0]
        self.memory = self._extended(parameter.data)
        self.mine = slice(ranks.rank * self.share, (ranks.rank + 1) * self.share)
        self.weights = self.memory[self.mine]  # this rank's rows
        self.gradient_memory: Tensor | None = None
        if lasting_gradient:
            self.gradient_memory = torch.zeros_like(self.memory)
            parameter.grad = self.gradient_memory[: view[0]].view(parameter.shape)
        if self.padded:
            parameter.data = self.memory[: view[0]].view(parameter.shape)
        self._work: dist.Work | None = None
        self._part: Tensor | None = None

    def _extended(self, full: Tensor) -> Tensor:
        """`full` in contiguous rows, with rows of zeros behind them so that they divide; a view where that can be."""
        rows = full.reshape(self.view)
        if not self.padded:
            return rows.contiguous()
        extended = rows.new_empty(self.share * self.ranks.world_size, *self.view[1:])
        extended[: self.view[0]] = rows
        extended[self.view[0] :] = 0
        return extended

    def launch_reduce(self) -> None:
        """Send the gradient off."""
        if self.parameter.grad is None:
            raise ValueError(f"{self.name}: has no gradient")
        if self.ranks.world_size == 1:
            self._part = self.parameter.grad.reshape(self.view)
            return
        whole = self.gradient_memory if self.lasting else self._extended(self.parameter.grad)
        self._part = torch.empty_like(whole[self.mine])
        self._work = _reduce_scatter(self._part, whole, async_op=True)

    def gradient(self) -> Tensor:
        """This rank's rows of the sum over the ranks, when they have come."""
        self._wait()
        return self._part

    def launch_gather(self) -> None:
        """Send this rank's updated rows to the others."""
        self._part = None
        if self.ranks.world_size > 1:
            self._work = _all_gather(self.memory, self.weights, async_op=True)

    def finish(self) -> None:
        """Wait until the parameter is whole again."""
        self._wait()

    def _wait(self) -> None:
        if self._work is not None:
            self._work.wait()
            self._work = None

    @property
    def in_place(self) -> bool:
        """Whether `gradient` gives rows of the lasting buffer itself, which the update is then to set to zero."""
        return self.lasting and self.ranks.world_size == 1

    def clear(self, updated: bool) -> None:
        """Drop the gradient; a lasting one becomes zero. updated: an update has just cleared what is its to clear."""
        if not self.lasting:
            self.parameter.grad = None
        elif not (updated and self.in_place):
            self.gradient_memory.zero_()

    def collect(self, part: Tensor) -> Tensor:
        """The whole of a state tensor of which every rank has `part`, rows first; on the CPU with several ranks.

        All ranks must call this; ranks other than 0 get an empty tensor.
        """
        if self.ranks.world_size == 1:
            return part
        # As bytes: not every backend knows 16-bit integers.
        pieces = part.contiguous().view(torch.uint8)
        whole = pieces.new_empty(pieces.shape[0] * self.ranks.world_size, *pieces.shape[1:])
        _all_gather(whole, pieces)
        if not self.ranks.is_main:
            return part.new_empty(0)
        return whole.view(part.dtype)[: self.view[0]].cpu()

    def distribute_(self, part: Tensor, whole: Tensor) -> None:
        """Write this rank's rows of `whole`, which every rank has, to `part`; its rows of padding stay as they are."""
        rows = whole.reshape(self.view[0], *part.shape[1:])[self.mine]
        part[: rows.shape[0]].copy_(rows)


class Whole:
    """Small parameters that every rank keeps and updates the same way: one message with all gradients, in float32."""

    def __init__(self, parameters: dict[str, Parameter], ranks: Ranks) -> None:
        self.parameters, self.ranks = parameters, ranks
        self.weights = [parameter.data for parameter in parameters.values()]
        self._work: dist.Work | None = None
        self._flat: Tensor | None = None

    def launch_reduce(self) -> None:
        """Send the gradients off."""
        missing = [name for name, parameter in self.parameters.items() if parameter.grad is None]
        if missing:
            raise ValueError(f"parameters without a gradient: {', '.join(missing)}")
        if self.ranks.world_size > 1:
            self._flat = torch.cat([p.grad.flatten().float() for p in self.parameters.values()])
            self._work = dist.all_reduce(self._flat, async_op=True)

    def gradients(self) -> list[Tensor]:
        """The sums over the ranks, when they have come, shaped as the parameters."""
        if self._work is None:
            return [parameter.grad for parameter in self.parameters.values()]
        self._work.wait()
        self._work = None
        sizes = [parameter.numel() for parameter in self.parameters.values()]
        return [
            piece.view(parameter.shape)
            for piece, parameter in zip(self._flat.split(sizes), self.parameters.values(), strict=True)
        ]

    def clear(self, updated: bool) -> None:
        """Drop the gradients, after an update or without one."""
        self._flat = None
        for parameter in self.parameters.values():
            parameter.grad = None
