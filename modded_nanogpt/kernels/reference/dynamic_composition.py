"""The plain twin of `kernels/dynamic_composition.py`, in blocks of queries, without Triton."""

import torch
from torch import Tensor

from modded_nanogpt.kernels.reference.attention import blocks, by_head, probabilities

EPSILON = 1e-6


def dynamic_composition(
    y: Tensor, q: Tensor, k: Tensor, v: Tensor, w1: Tensor, w2: Tensor, doc_start: Tensor, window: int = 112
) -> Tensor:
    """y + the composed heads (T, H, D); see `kernels/dynamic_composition.py`. Differentiable.

    Computes in float32, in float64 when the inputs are.
    """
    return composed(y, q, k, v, normalised(w1), w2, doc_start, window)


def normalised(w1: Tensor) -> Tensor:
    """(T, H) -> each row divided by its root mean square, in float32 or wider."""
    w1 = w1.to(torch.promote_types(w1.dtype, torch.float32))
    return w1 * torch.rsqrt(w1.square().mean(-1, keepdim=True) + EPSILON)


def composed(
    y: Tensor, q: Tensor, k: Tensor, v: Tensor, w1: Tensor, w2: Tensor, doc_start: Tensor, window: int
) -> Tensor:
    """As `dynamic_composition`, for weights w1 that are normalised already."""
    parts = []
    for queries, keys, seen in blocks(doc_start, window - 1):
        p = probabilities(by_head(q[queries]), by_head(k[keys]), seen)
        mixed = torch.einsum("hij,ih->ij", p, w1[queries].to(p.dtype))
        change = (mixed @ by_head(v[keys])).transpose(0, 1) * w2[queries].to(p.dtype).unsqueeze(-1)
        parts.append(y[queries].to(p.dtype) + change)
    return torch.cat(parts).to(y.dtype)


def composed_gradients(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, w1: Tensor, w2: Tensor, doc_start: Tensor, window: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(dq, dk, dv, dw1, dw2) of `composed`, written out, for where autograd is off. The gradient of y is `grad`."""
    work = torch.promote_types(q.dtype, torch.float32)
    dq, dk, dv, dw1, dw2 = (torch.zeros(x.shape, dtype=work, device=x.device) for x in (q, k, v, w1, w2))
    for queries, keys, seen in blocks(doc_start, window - 1):
        block_q, block_k, block_v, block_grad = (
            by_head(x) for x in (q[queries], k[keys], v[keys], grad[queries])
        )
        first, second = (w[queries].T.to(work).unsqueeze(-1) for w in (w1, w2))  # (H, queries, 1)
        p = probabilities(block_q, block_k, seen)
        mixed = (first * p).sum(0)
        products = block_grad @ block_v.mT
        d_mixed = (second * products).sum(0)
        dw2[queries] = (mixed * products).sum(-1).T
        along = (p * d_mixed).sum(-1, keepdim=True)
        dw1[queries] = along.squeeze(-1).T
        ds = p * first * (d_mixed - along)
        dq[queries] = (ds @ block_k).transpose(0, 1)
        dk[keys] += (ds.mT @ block_q).transpose(0, 1)
        dv[keys] += (mixed.mT @ (second * block_grad)).transpose(0, 1)
    dtypes = (q.dtype, k.dtype, v.dtype, w1.dtype, w2.dtype)
    return tuple(x.to(dtype) for x, dtype in zip((dq, dk, dv, dw1, dw2), dtypes, strict=True))
