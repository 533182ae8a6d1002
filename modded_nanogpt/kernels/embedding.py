"""Gradients of embedding tables, added row by row.

A dense gradient of one micro-batch would be as large as its table: the bigram table's alone takes 579 MB, to be filled
with zeros, written and added, although a lane touches at most 49,152 of its 377,280 rows. So the tables stay outside of
the compiled graph: the model receives looked-up rows, autograd returns their gradients, and `add_rows_` sums those of
equal ids in float32 and adds each sum to its row once. Nothing is atomic: the same batch gives the same bits. Which
tokens share an id is worked out by the thread that reads the data (`runs_of`), not by the GPU.
"""

from typing import NamedTuple

import numpy as np
from torch import Tensor

from modded_nanogpt.kernels.launch import on_device_of, uses_kernels
from modded_nanogpt.kernels.reference import embedding as reference

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

BLOCK_TOKENS, BLOCK_COLUMNS = (
    32,
    128,
)  # of the rows of one id that are read at once; frequent tokens have thousands


class Runs(NamedTuple):
    """The places of a lane in the order of their ids. int32; as numpy arrays from `runs_of`, as tensors in a batch."""

    ids: Tensor  # (n,): the different ids, ascending
    starts: Tensor  # (n + 1,): where the places of each id begin in `order`, and the number of all
    order: Tensor  # (T,): places, those of one id in the order of the lane


def runs_of(ids: np.ndarray) -> Runs:
    """The runs of `ids`, any integers (T,), T > 0."""
    order = np.argsort(ids, kind="stable")
    inside = ids[order]
    first = np.flatnonzero(np.append(True, inside[1:] != inside[:-1]))
    return Runs(inside[first], np.append(first, len(ids)), order)


def add_rows_(grad: Tensor, rows: Tensor, runs: Runs) -> None:
    """grad[id] += sum of the rows that were looked up under `id`, summed in float32 in a fixed order.

    grad: (R, d), any float dtype; rows: (T, d) contiguous. Or several tables with the same ids in one launch, so that
    the most frequent token, whose rows one program reads, holds up all of them at once: (n, R, d) and (n, T, d).
    """
    if grad.dim() == 2:
        grad, rows = grad[None], rows[None]
    if not uses_kernels(grad):
        for table, part in zip(grad, rows, strict=True):
            reference.add_rows_(table, part, runs.ids, runs.starts, runs.order)
        return
    if not (grad.is_contiguous() and rows.is_contiguous()):
        raise ValueError("add_rows_: tables and rows must be contiguous")
    tables, tokens, width = rows.shape
    with on_device_of(grad):
        _add_rows_kernel[(runs.ids.numel(), triton.cdiv(width, BLOCK_COLUMNS), tables)](
            grad, rows, *runs, grad.shape[1], tokens, width,
            BLOCK_T=BLOCK_TOKENS, BLOCK_D=BLOCK_COLUMNS, num_warps=4,
        )  # fmt: skip


if triton is not None:

    @triton.jit
    def _add_rows_kernel(
        grad, rows, ids, starts, order, R, T, D,
        BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
    ):  # fmt: skip
        """One program an id, a block of columns and a table.

        The rows of a block are added place by place, and the places to each other only at the end: warps that hold
        different places would otherwise have to meet for every block.
        """
        run, table = tl.program_id(0), tl.program_id(2).to(tl.int64)
        column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
        in_row = column < D
        begin, end = tl.load(starts + run), tl.load(starts + run + 1)
        target = grad + (table * R + tl.load(ids + run)) * D + column
        before = tl.load(target, mask=in_row, other=0.0).to(tl.float32)
        rows += table * T * D
        sums = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
        for start in range(begin, end, BLOCK_T):
            places = start + tl.arange(0, BLOCK_T)
            source = tl.load(order + places, mask=places < end, other=0).to(tl.int64)
            inside = (places < end)[:, None] & in_row[None, :]
            tile = tl.load(rows + source[:, None] * D + column[None, :], mask=inside, other=0.0)
            sums += tile.to(tl.float32)
        total = before + tl.sum(sums, axis=0)
        tl.store(target, total.to(grad.dtype.element_ty), mask=in_row)
