"""The Triton kernels of the fused cross entropy.

`loss_and_gradient_`: one program a row, two passes over its logits, of which the second hits the L2 cache.
`transpose_bytes`: what FP8 products on Hopper need, as their tensor cores read both operands along the summed axis.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _row_kernel(
    logits, out, targets, losses, stride, out_stride, scale, V,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)  # row x stride passes 2^31
    logits += row * stride
    out += row * out_stride
    target = tl.load(targets + row)
    offsets = tl.arange(0, BLOCK)
    # The sum of exponentials, kept relative to the running maximum (Milakov and Gimelshein 2018).
    top = tl.full((BLOCK,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, V, BLOCK):
        value = tl.load(logits + start + offsets, mask=start + offsets < V, other=-float("inf")).to(
            tl.float32
        )
        new_top = tl.maximum(top, value)
        # A lane that has seen nothing yet holds -inf, and -inf - -inf is not a number.
        shift = tl.where(new_top == -float("inf"), 0.0, new_top)
        total = total * tl.exp(top - shift) + tl.exp(value - shift)
        top = new_top
    row_top = tl.max(top, axis=0)
    log_sum = row_top + tl.log(tl.sum(total * tl.exp(top - row_top), axis=0))
    at_target = tl.load(logits + target).to(tl.float32)
    tl.store(losses + row, log_sum - at_target)
    for start in range(0, V, BLOCK):
        inside = start + offsets < V
        value = tl.load(logits + start + offsets, mask=inside, other=-float("inf")).to(tl.float32)
        probability = tl.exp(value - log_sum)
        grad = tl.where(start + offsets == target, probability - 1.0, probability) * scale
        tl.store(out + start + offsets, grad.to(out.dtype.element_ty), mask=inside)


def loss_and_gradient_(logits: Tensor, out: Tensor, targets: Tensor, losses: Tensor, scale: float) -> None:
    """Write each row's loss into `losses` (N,) float32, and `scale` x its gradient into `out` (N, V).

    `out` may be `logits` (N, V) itself, or a tensor of another dtype.
    """
    rows, vocabulary = logits.shape
    block = min(8192, triton.next_power_of_2(vocabulary))
    warps = 16 if block >= 8192 else 8 if block >= 2048 else 4
    with torch.cuda.device(logits.device) if logits.is_cuda else torch.no_grad():
        _row_kernel[(rows,)](
            logits, out, targets, losses, logits.stride(0), out.stride(0), scale, vocabulary,
            BLOCK=block, num_warps=warps,
        )  # fmt: skip


@triton.jit
def _transpose_kernel(source, target, rows, columns, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    column = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = (row[:, None] < rows) & (column[None, :] < columns)
    tile = tl.load(source + row[:, None] * columns + column[None, :], mask=inside)
    tl.store(target + column[:, None] * rows + row[None, :], tl.trans(tile), mask=tl.trans(inside))


def transpose_bytes(matrix: Tensor) -> Tensor:
    """(N, V) of a one-byte dtype, contiguous -> (V, N), contiguous."""
    rows, columns = matrix.shape
    target = torch.empty(columns, rows, dtype=matrix.dtype, device=matrix.device)
    grid = (triton.cdiv(rows, 128), triton.cdiv(columns, 128))
    _transpose_kernel[grid](
        matrix.view(torch.uint8), target.view(torch.uint8), rows, columns, BLOCK=128, num_warps=8
    )
    return target
