"""The plain twin of `kernels/pointer.py` and of the mixture in `kernels/pointer_loss.py`."""

import torch
from torch import Tensor

BLOCK = 128  # queries at once
EPSILON = 1e-9  # added to a probability before its logarithm


def first_key(doc_start: Tensor, block: int) -> Tensor:
    """(T,): the first key of each query: of its document, and of its block of `block` tokens or the one before."""
    places = torch.arange(doc_start.shape[0], device=doc_start.device)
    return torch.maximum(doc_start.long(), (places // block - 1) * block)


def copy_shares(
    q: Tensor, k: Tensor, sink: Tensor, tokens: Tensor, targets: Tensor, doc_start: Tensor, block: int
) -> tuple[Tensor, Tensor]:
    """As the kernel's: (mass on keys whose token is the target (T,), mass on the sink (T,)). Differentiable."""
    low, places = first_key(doc_start, block), torch.arange(q.shape[0], device=q.device)
    parts = []
    for first in range(0, q.shape[0], BLOCK):
        rows = slice(first, min(first + BLOCK, q.shape[0]))
        keys = slice(int(low[first]), rows.stop)
        seen = (places[keys] >= low[rows, None]) & (places[keys] < places[rows, None])
        shares = _shares(q[rows], k[keys], sink[rows], seen)
        match = tokens[keys].long() == targets[rows, None]
        parts.append((torch.where(match, shares[:, 1:], 0.0).sum(1), shares[:, 0]))
    copied, of_sink = zip(*parts, strict=True)
    return torch.cat(copied), torch.cat(of_sink)


def copied_tokens(
    q: Tensor, k: Tensor, sink: Tensor, tokens: Tensor, low: int, vocabulary: int
) -> tuple[Tensor, Tensor]:
    """(mass on every token (V,), mass on the sink ()) of one query q (D,) that sees the keys `low` .. len(k) - 1.

    k: (n, D); sink: (1,), the query's score of the sink; tokens: (n,).
    """
    seen = torch.arange(k.shape[0], device=k.device) >= low
    shares = _shares(q[None], k, sink, seen[None])[0]
    mass = shares.new_zeros(vocabulary).index_add_(0, tokens.long(), shares[1:])
    return mass, shares[0]


def _shares(q: Tensor, k: Tensor, sink: Tensor, seen: Tensor) -> Tensor:
    """(rows, 1 + keys): the softmax over the sink and the keys that are seen."""
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = (q.to(wide) @ k.to(wide).mT).masked_fill(~seen, -torch.inf)
    return torch.cat([sink.to(wide)[:, None], scores], dim=1).softmax(-1)


def mixed(log_p: Tensor, log_alpha: Tensor, copied: Tensor, of_sink: Tensor) -> Tensor:
    """log(p + 1e-9) of tokens under the mixture p = p_real (1 - alpha (1 - sink)) + alpha copied.

    log_p: of a softmax that has the slot among its classes; p_real is that of the others alone, p / (1 - alpha).
    log_alpha: of the slot. copied, of_sink: `copy_shares`. All of shapes that broadcast.
    """
    alpha = log_alpha.exp().clamp(max=1.0 - 2.0**-24)
    real = (log_p - torch.log1p(-alpha)).exp()
    return torch.log(real * (1.0 - alpha * (1.0 - of_sink)) + alpha * copied + EPSILON)
