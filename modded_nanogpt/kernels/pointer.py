"""How much of a one-headed attention falls on keys whose token is the query's target, and how much on a sink.

The copy pointer (proposal 379 of the modded-nanogpt speedrun; pointers: Vinyals et al. 2015, arXiv 1506.03134, with a
sink: Merity et al. 2016, arXiv 1609.07843) needs no values: of each row of the softmax only two sums matter. So a tile
has one product forward and two in each of the two backward kernels. Documents and tiles are as in `attention_kernels`;
gradients are sums in a fixed order. The plain twin is `reference/pointer.py`.
"""

import torch
from torch import Tensor

from modded_nanogpt.kernels.attention import padded, rows_together
from modded_nanogpt.kernels.launch import on_device_of, uses_kernels
from modded_nanogpt.kernels.reference import pointer as reference

ROWS, STEP, WARPS = 64, 64, 4  # a tile of queries and of keys
STAGES = 2


def copy_shares(
    q: Tensor,
    k: Tensor,
    sink: Tensor,
    tokens: Tensor,
    targets: Tensor,
    doc_start: Tensor,
    doc_end: Tensor,
    block: int,
) -> tuple[Tensor, Tensor]:
    """(mass on keys whose token is the target, mass on the sink), each (T,) float32, differentiable by q, k, sink.

    Query i sees the keys of its document before i, in its block of `block` tokens or the one before; softmax scale 1.
    q, k: (T, D), D <= 128; sink: (T,) float32, each query's score of the sink;
    tokens, doc_start, doc_end: (T,) int32, the input at each place, where its document begins and the place behind it;
    targets: (T,) int64, in the numbers of `tokens`.
    """
    if not (uses_kernels(q) or torch.compiler.is_compiling()):
        return reference.copy_shares(q, k, sink, tokens, targets, doc_start, block)
    return torch.ops.speedrun.copy_shares(q, k, sink, tokens, targets, doc_start, doc_end, block)[:2]


@torch.library.custom_op("speedrun::copy_shares", mutates_args=())
def _copy_shares(
    q: Tensor, k: Tensor, sink: Tensor, tokens: Tensor, targets: Tensor, doc_start: Tensor, doc_end: Tensor,
    block: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(copied, of the sink, log2 of the sums of exponentials), each (T,) float32."""
    if not uses_kernels(q):  # in a compiled graph on a CPU, the validation's: it has no backward pass
        return *reference.copy_shares(q, k, sink, tokens, targets, doc_start, block), torch.empty_like(sink)
    from modded_nanogpt.kernels.pointer_kernels import shares_kernel

    q, k = rows_together(q), rows_together(k)
    copied, of_sink, lse = (torch.empty_like(sink, dtype=torch.float32) for _ in range(3))
    _launch(
        shares_kernel, q, q, k, sink, tokens, targets, doc_start, copied, of_sink, lse, block,
        q.shape[0], q.stride(0), k.stride(0),
    )  # fmt: skip
    return copied, of_sink, lse


@_copy_shares.register_fake
def _(q: Tensor, k: Tensor, sink: Tensor, *others: Tensor | int) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(sink.new_empty(sink.shape, dtype=torch.float32) for _ in range(3))


@torch.library.custom_op("speedrun::copy_shares_backward", mutates_args=())
def _copy_shares_backward(
    d_copied: Tensor, d_sink: Tensor, q: Tensor, k: Tensor, tokens: Tensor, targets: Tensor, doc_start: Tensor,
    doc_end: Tensor, copied: Tensor, of_sink: Tensor, lse: Tensor, block: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of q, k and the sink's scores from those of the two masses, (T,) float32 each."""
    from modded_nanogpt.kernels.pointer_kernels import shares_key_kernel, shares_query_kernel

    dq, dk = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k))
    q, k, d_copied = rows_together(q), rows_together(k), d_copied.contiguous()
    delta = d_copied * copied + d_sink * of_sink  # sum over a row of share x its gradient
    rows, shape = (tokens, targets), (q.shape[0], q.stride(0), k.stride(0))
    _launch(shares_query_kernel, q, q, k, *rows, doc_start, lse, d_copied, delta, dq, block, *shape)
    _launch(shares_key_kernel, q, q, k, *rows, doc_end, lse, d_copied, delta, dk, block, *shape)
    return dq, dk, of_sink * (d_sink - delta)


@_copy_shares_backward.register_fake
def _(d_copied: Tensor, d_sink: Tensor, q: Tensor, k: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
    return q.new_empty(q.shape), k.new_empty(k.shape), torch.empty_like(d_sink)


def _save(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: tuple) -> None:
    q, k, _, *rows, ctx.block = inputs
    ctx.save_for_backward(q, k, *rows, *output)


def _gradients(ctx: torch.autograd.function.FunctionCtx, d_copied: Tensor, d_sink: Tensor, _: None) -> tuple:
    found = torch.ops.speedrun.copy_shares_backward(d_copied, d_sink, *ctx.saved_tensors, ctx.block)
    return (*found, *(None,) * 5)


_copy_shares.register_autograd(_gradients, setup_context=_save)


def _launch(kernel: object, q: Tensor, *arguments: object) -> None:
    """One program for each tile of rows."""
    tokens, dimensions = q.shape
    width = padded(dimensions)
    even = tokens % max(ROWS, STEP) == 0 and width == dimensions
    with on_device_of(q):
        kernel[(-(-tokens // ROWS),)](
            *arguments, D=dimensions, WIDTH=width, ROWS=ROWS, STEP=STEP, EVEN=even,
            num_warps=WARPS, num_stages=STAGES,
        )  # fmt: skip
