"""Dynamic composition of attention heads after the softmax, rank one (DCMHA, Xiao et al. 2024, arXiv 2405.08553).

Each token mixes the attention of its heads into one pattern and adds the values under that pattern to each head:

    p^h_ij = softmax over j of q_i^h . k_j^h,  j in max(doc_start[i], i - 111) .. i     (a softmax of its own)
    A_ij   = sum_h w1_ih p^h_ij,               w1 divided by its root mean square over the heads
    y_i^h  <- y_i^h + w2_ih sum_j A_ij v_j^h

One operator, forward and backward, so that `torch.compile` takes it whole; on a CPU it is the plain twin,
`reference/dynamic_composition.py`. Gradients are sums in a fixed order: equal inputs, equal bits.
"""

from functools import cache

import torch
from torch import Tensor

from modded_nanogpt.kernels.attention import padded, rows_together, strides
from modded_nanogpt.kernels.launch import on_device_of, uses_kernels
from modded_nanogpt.kernels.reference import dynamic_composition as reference

WINDOW = 112  # keys that a query sees, itself included
ROWS = 64  # queries (or keys) of a program
BACK = 128  # keys before a tile of queries that are looked at: a power of 2, at least WINDOW - 1
# Without tiles in flight Triton 3.9 gives one of these kernels 32 registers on an A100, and keeps 6 KB a thread in
# memory. With two they take 88 KiB of shared memory at most, which all GPUs since have.
STAGES = 2


def dynamic_composition(
    y: Tensor, q: Tensor, k: Tensor, v: Tensor, w1: Tensor, w2: Tensor, doc_start: Tensor
) -> Tensor:
    """y + the composed heads, (T, H, D), in y's dtype.

    y, q, k, v: (T, H, D), any strides, q scaled already; w1, w2: (T, H), any floating dtype, w1 as it comes;
    doc_start: (T,) int32, the place of the first token of each token's document.
    """
    w1, w2 = reference.normalised(w1), w2.float()
    return torch.ops.speedrun.dynamic_composition(y, q, k, v, w1, w2, doc_start)[0]


@torch.library.custom_op("speedrun::dynamic_composition", mutates_args=())
def _compose(
    y: Tensor, q: Tensor, k: Tensor, v: Tensor, w1: Tensor, w2: Tensor, doc_start: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(output, A as a band (T, BACK + ROWS), log2-sum-exp (H, T)); the last two are empty where the twin serves."""
    band, lse = _kept(q)
    if not uses_kernels(q):
        return reference.composed(y, q, k, v, w1, w2, doc_start, WINDOW), band, lse
    return forward(y, q, k, v, w1, w2, doc_start, band, lse), band, lse


@_compose.register_fake
def _(
    y: Tensor, q: Tensor, k: Tensor, v: Tensor, w1: Tensor, w2: Tensor, doc_start: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return y.new_empty(y.shape), *_kept(q)


@torch.library.custom_op("speedrun::dynamic_composition_backward", mutates_args=())
def _compose_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, w1: Tensor, w2: Tensor, doc_start: Tensor,
    band: Tensor, lse: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(dq, dk, dv, dw1, dw2)."""
    if not uses_kernels(q):
        return reference.composed_gradients(grad, q, k, v, w1, w2, doc_start, WINDOW)
    return backward(grad, q, k, v, w1, w2, doc_start, band, lse)


@_compose_backward.register_fake
def _(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, w1: Tensor, w2: Tensor, doc_start: Tensor,
    band: Tensor, lse: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return tuple(x.new_empty(x.shape) for x in (q, k, v, w1, w2))


def _save(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: tuple) -> None:
    ctx.save_for_backward(*inputs[1:], *output[1:])


def _gradients(ctx: torch.autograd.function.FunctionCtx, grad: Tensor, *unused: Tensor | None) -> tuple:
    gradients = torch.ops.speedrun.dynamic_composition_backward(grad, *ctx.saved_tensors)
    return grad, *gradients, None


_compose.register_autograd(_gradients, setup_context=_save)


def _kept(q: Tensor, rows: int = ROWS, back: int = BACK) -> tuple[Tensor, Tensor]:
    """Room for what backward needs: A in q's dtype, and the log-sum-exp in float32."""
    tokens, heads, _ = q.shape
    if not uses_kernels(q):
        tokens = 0
    return q.new_empty((tokens, back + rows)), q.new_empty((heads, tokens), dtype=torch.float32)


def forward(
    y: Tensor, q: Tensor, k: Tensor, v: Tensor, w1: Tensor, w2: Tensor, doc_start: Tensor,
    band: Tensor, lse: Tensor, rows: int = ROWS, back: int = BACK, window: int = WINDOW,
) -> Tensor:  # fmt: skip
    """The output; fills `band` and `lse`. Tests choose small tiles and windows."""
    from modded_nanogpt.kernels.dynamic_composition_kernels import compose_kernel

    y, q, k, v = (rows_together(x) for x in (y, q, k, v))
    out = torch.empty(y.shape, dtype=y.dtype, device=y.device)
    tokens, heads, dimensions = q.shape
    with on_device_of(q):
        compose_kernel[(-(-tokens // rows),)](
            y, q, k, v, w1.contiguous(), w2.contiguous(), out, band, lse, doc_start, tokens,
            *strides(y, q, k, v, out), H=heads, D=dimensions, WIDTH=padded(dimensions), WINDOW=window,
            ROWS=rows, BACK=back, num_warps=8, num_stages=STAGES,
        )  # fmt: skip
    return out


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, w1: Tensor, w2: Tensor, doc_start: Tensor,
    band: Tensor, lse: Tensor, rows: int = ROWS, back: int = BACK, window: int = WINDOW,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(dq, dk, dv, dw1, dw2), contiguous; `band` and `lse` as `forward` filled them."""
    from modded_nanogpt.kernels import dynamic_composition_kernels as kernels

    grad, q, k, v = (rows_together(x) for x in (grad, q, k, v))
    w1, w2 = w1.contiguous(), w2.contiguous()
    dq, dk, dv, dw1, dw2 = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v, w1, w2))
    d_band = torch.empty(band.shape, dtype=torch.float32, device=band.device)
    tokens, heads, dimensions = q.shape
    tiles = -(-tokens // rows)
    shape = {"H": heads, "D": dimensions, "WIDTH": padded(dimensions), "ROWS": rows, "BACK": back}
    with on_device_of(q):
        kernels.mixed_gradient_kernel[(tiles,)](
            grad, v, w2, band, d_band, dw2, tokens, *strides(grad, v),
            **shape, num_warps=8, num_stages=STAGES,
        )  # fmt: skip
        kernels.compose_query_kernel[(tiles, heads)](
            q, k, w1, lse, d_band, dq, dw1, doc_start, tokens, *strides(q, k, dq),
            **shape, WINDOW=window, **query_options(q.device),
        )  # fmt: skip
        kernels.compose_key_kernel[(tiles, heads)](
            grad, q, k, w1, w2, band, lse, d_band, dw1, dk, dv, doc_start, tokens,
            *strides(grad, q, k, dk, dv), **shape, WINDOW=window, num_warps=8, num_stages=STAGES,
        )  # fmt: skip
    return dq, dk, dv, dw1, dw2


@cache
def query_options(device: torch.device) -> dict[str, int]:
    """How the kernel of the queries' gradient is compiled: small, where products read from shared memory."""
    large = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] in (9, 10)
    return {"num_warps": 4, "num_stages": STAGES} if large else {"num_warps": 8, "num_stages": 1}
