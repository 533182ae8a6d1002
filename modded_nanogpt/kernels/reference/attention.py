"""The plain twin of `kernels/attention.py`: causal attention in a window over packed documents, without Triton.

Queries go in blocks, each with the keys that it can see, so that memory grows with block x window and not with T^2:
the same code serves the tests in float64, training on a CPU, and evaluation slices of 262,144 tokens.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

BLOCK = 128  # queries at once


def attention(q: Tensor, k: Tensor, v: Tensor, doc_start: Tensor, window: int) -> Tensor:
    """(T, H, V): query i over the keys max(doc_start[i], i - window) .. i, softmax scale 1. Differentiable.

    q, k: (T, H, D); v: (T, H, V); doc_start: (T,) int32, the place of the first token of each token's document.
    Computes in float32, in float64 when the inputs are.
    """
    parts = []
    for queries, keys, seen in blocks(doc_start, window):
        p = probabilities(by_head(q[queries]), by_head(k[keys]), seen)
        parts.append((p @ by_head(v[keys])).transpose(0, 1))
    return torch.cat(parts).to(v.dtype)


def attention_gradients(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, doc_start: Tensor, window: int
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) of `attention`, written out, for where autograd is off; grad: (T, H, V)."""
    work = torch.promote_types(q.dtype, torch.float32)
    dq, dk, dv = (torch.zeros(x.shape, dtype=work, device=x.device) for x in (q, k, v))
    for queries, keys, seen in blocks(doc_start, window):
        block_q, block_k, block_v, block_grad = (
            by_head(x) for x in (q[queries], k[keys], v[keys], grad[queries])
        )
        p = probabilities(block_q, block_k, seen)
        dp = block_grad @ block_v.mT
        ds = p * (dp - (p * dp).sum(-1, keepdim=True))
        dq[queries] = (ds @ block_k).transpose(0, 1)
        dk[keys] += (ds.mT @ block_q).transpose(0, 1)
        dv[keys] += (p.mT @ block_grad).transpose(0, 1)
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


def blocks(doc_start: Tensor, window: int) -> Iterator[tuple[slice, slice, Tensor]]:
    """For each block of queries: its place, the place of its keys, and which are seen, (queries, keys) bool."""
    tokens = doc_start.shape[0]
    position = torch.arange(tokens, device=doc_start.device)
    low = torch.maximum(doc_start, position - window)
    for first, lowest in zip(range(0, tokens, BLOCK), low[::BLOCK].tolist(), strict=True):
        queries = slice(first, min(first + BLOCK, tokens))
        keys = slice(lowest, queries.stop)
        place = position[keys]
        yield queries, keys, (place >= low[queries, None]) & (place <= position[queries, None])


def by_head(x: Tensor) -> Tensor:
    """(T, H, D) -> (H, T, D) in float32 or wider."""
    return x.transpose(0, 1).to(torch.promote_types(x.dtype, torch.float32))


def probabilities(q: Tensor, k: Tensor, seen: Tensor) -> Tensor:
    """Softmax of q k^T over the keys that are seen: (H, queries, D), (H, keys, D), (queries, keys) bool."""
    return (q @ k.mT).masked_fill(~seen, -torch.inf).softmax(-1)
