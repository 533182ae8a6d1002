"""8-bit copies of the MLPs' weights, made once an update, and the scales that all of `mlp`'s products share.

A weight's scale follows from its largest entry, with some room, that of `post` from the largest entry of the step
before (records 84 and 89). What is kept in both layouts is written by one kernel, which reads each weight once.
"""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from modded_nanogpt.kernels.fp8 import E4M3, LARGEST, quantise, scales

POST_ROOM = 1.8  # record 89: how much larger the largest entry of `post` may become from one step to the next
WEIGHT_ROOM = 1.12


class Fp8Layer(NamedTuple):
    """What one layer's products read. None: that product reads bfloat16."""

    up: Tensor | None  # (h, d) e4m3
    up_scale: Tensor
    down: Tensor | None  # (d, h) e4m3: transposed
    down_scale: Tensor
    post_scale: Tensor
    largest: Tensor  # (1,), raised by each forward pass to the largest entry of `post`
    up_by_column: Tensor | None  # (d, h) e4m3, for the FP8 backward pass
    down_by_row: Tensor | None  # (h, d) e4m3


class Fp8Mlp:
    """8-bit copies of all layers' weights, and the scales. All tensors stay where they are: compiled graphs read them.

    bank: (layers, 2, h, d) bfloat16, up and down, contiguous; h and d multiples of 16. up, down: which products of the
    forward pass read 8 bits; backward: all others too, which takes both of the former.
    Call `refresh` before the first step and after each optimizer step.
    """

    def __init__(self, bank: Tensor, up: bool = True, down: bool = True, backward: bool = False) -> None:
        layers, _, hidden, width = bank.shape
        device = bank.device
        if backward and not (up and down):
            raise ValueError("mlp: 8 bits in the backward pass take 8-bit copies of the forward pass")
        self.bank = bank
        self.weight_scale = scales(2 * layers, 1.0, device)  # up and down alternate
        self.weight_largest = scales(2 * layers, 0.0, device)
        self.post_scale = scales(layers, 1.0, device)

        def copies(used: bool, *shape: int) -> Tensor | None:
            return torch.empty(layers, *shape, dtype=E4M3, device=device) if used else None

        self.up, self.up_by_column = copies(up, hidden, width), copies(backward, width, hidden)
        self.down, self.down_by_row = copies(down, width, hidden), copies(backward, hidden, width)
        # One storage each: a graph that changes one of several views of a storage is compiled badly.
        self.largest = [torch.zeros(1, device=device) for _ in range(layers)]

        def of(tensor: Tensor | None, layer: int) -> Tensor | None:
            return None if tensor is None else tensor[layer]

        self.layers = [
            Fp8Layer(
                of(self.up, i), self.weight_scale[2 * i], of(self.down, i), self.weight_scale[2 * i + 1],
                self.post_scale[i], self.largest[i], of(self.up_by_column, i), of(self.down_by_row, i),
            )
            for i in range(layers)
        ]  # fmt: skip

    @torch.no_grad()
    def refresh(self, exact: bool, reduce: Callable[[Tensor], object] | None = None) -> None:
        """New weight copies, and next step's scales.

        exact: measure the weights for their scales, one more pass over them (the first steps: down starts at zero and
        grows fast); else the largest entries of the last refresh serve, with some room. reduce: takes the maximum of a
        (layers,) tensor over all ranks, in place, so that every rank, and every number of them, uses the same scales.
        """
        largest = torch.cat(self.largest)
        if reduce is not None:
            reduce(largest)
        # Without a forward pass since the last refresh nothing is known.
        scale = (largest * (POST_ROOM / LARGEST[E4M3])).clamp_(min=1e-12)  # its reciprocal stays finite
        self.post_scale.copy_(torch.where(largest > 0, scale, self.post_scale))
        torch._foreach_zero_(self.largest)
        if exact:
            norm = torch.linalg.vector_norm(self.bank, math.inf, dim=(-2, -1), dtype=torch.float32)
            self.weight_largest.copy_(norm.view(-1))
        room = (1.0 if exact else WEIGHT_ROOM) / LARGEST[E4M3]
        self.weight_scale.copy_((self.weight_largest * room).clamp_(min=1e-12))
        self._copy_weights()

    def _copy_weights(self) -> None:
        self.weight_largest.zero_()
        for index, rows, columns in ((0, self.up, self.up_by_column), (1, self.down_by_row, self.down)):
            if rows is not None or columns is not None:
                scale, largest = self.weight_scale[index::2], self.weight_largest[index::2]
                quantise(self.bank[:, index], scale, rows, columns, largest)

    def lasting(self) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor) of everything that products read or change."""
        for place, layer in enumerate(self.layers):
            parts = layer._asdict().items()
            yield from ((f"fp8 {name} {place}", part) for name, part in parts if part is not None)

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint needs, taken after a refresh: the scales now in use."""
        return {"weight_scale": self.weight_scale.clone(), "post_scale": self.post_scale.clone()}

    @torch.no_grad()
    def load(self, tensors: dict[str, Tensor]) -> None:
        """Go on as after the refresh before `tensors()`; the bank must hold the weights of that moment."""
        self.weight_scale.copy_(tensors["weight_scale"])
        self.post_scale.copy_(tensors["post_scale"])
        torch._foreach_zero_(self.largest)
        self._copy_weights()
