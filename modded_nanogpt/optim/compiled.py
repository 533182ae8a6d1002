"""The one place where the optimizers meet torch.compile.

On a GPU the elementwise parts of an update are compiled, at their first call, into one pass or two over their memory.
Shapes are static; what changes from step to step comes in as 0-dim CPU tensors, which are handed to the kernels by
value: no recompilation and no copy to the device. On a CPU, or with --compile=false, the same functions run as they are
written, in blocks of rows, so that their temporaries stay small.
"""

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

Function = TypeVar("Function", bound=Callable[..., object])

BLOCK_NUMBERS = 1 << 22  # numbers that one uncompiled call works on


def compiled(function: Function, on: bool) -> Function:
    """`function`, compiled at its first call when `on`. It must have neither branches on data nor breaks."""
    return torch.compile(function, dynamic=False, fullgraph=True) if on else function


def scalar(value: float) -> Tensor:
    """A 0-dim float32 tensor on the CPU."""
    return torch.tensor(value, dtype=torch.float32)


def in_blocks(tensors: Sequence[Tensor], call: Callable[..., object]) -> None:
    """`call` on matching slices of the leading axes of `tensors`, which are equally long."""
    first = tensors[0]
    rows = max(1, BLOCK_NUMBERS * first.shape[0] // max(1, first.numel()))
    for pieces in zip(*(tensor.split(rows) for tensor in tensors), strict=True):
        call(*pieces)
