"""The plain twin of `kernels/row_table.py`, and what both are given."""

from typing import NamedTuple

import torch
from torch import Tensor


class Entries(NamedTuple):
    """E gradients of rows of a table, sorted by row."""

    ids: Tensor  # (E,) int32: the rows, ascending
    order: Tensor  # (E,) int64: where each came from; entry e is gradient e % N, with the signs of e
    gradients: Tensor  # (N, d)
    signs: Tensor | None = None  # (E,) int32, in the order before sorting: rows of `pool`; None: all 1
    pool: Tensor | None = None  # (P, d) int8, each 1 or -1


class Rates(NamedTuple):
    """What an event does to a touched row; `optim.row_table` has the equations."""

    event: int  # its number, from 1 on
    beta2: float
    step_size: float  # learning rate and correction of the second moment's beginning
    decay: float
    scale: float  # multiplies the gradients
    epsilon: float
    cautious: bool  # decay only where the update goes towards zero


def look_up(source: Tensor, places: Tensor, pool: Tensor, signs: Tensor) -> Tensor:
    """As the kernel."""
    parts = [source[place].float() * pool[sign] for place, sign in zip(places, signs, strict=True)]
    return torch.stack(parts).sum(0).to(source.dtype)


def sum_entries(entries: Entries, distinct: int) -> Tensor:
    """As the kernel."""
    return _sums(entries)[1][:distinct].to(entries.gradients.dtype)


def update_rows_(
    rows: Tensor, second: Tensor, last: Tensor, log_kept: Tensor, entries: Entries, rates: Rates
) -> None:
    """As the kernel; float64 tensors are computed in float64."""
    ids, sums = _sums(entries)
    g = sums * rates.scale
    kept = rates.beta2 * torch.exp(log_kept[rates.event - 1] - log_kept[last[ids]]).to(g.dtype)
    v = kept * second[ids] + (1 - rates.beta2) * g.square().mean(1)
    p = rows[ids].to(g.dtype)
    u = g / (v.sqrt() + rates.epsilon)[:, None] * rates.step_size
    decayed = torch.where(u * p > 0, p, 0.0) if rates.cautious else p
    rows[ids] = (p - (u + rates.decay * decayed)).to(rows.dtype)
    second[ids] = v.to(second.dtype)
    last[ids] = rates.event


def _sums(entries: Entries) -> tuple[Tensor, Tensor]:
    """(the different rows, the sum of the entries of each) in float32, or float64 where the gradients are."""
    ids, place = torch.unique_consecutive(entries.ids, return_inverse=True)
    wide = entries.gradients.dtype if entries.gradients.dtype == torch.float64 else torch.float32
    parts = entries.gradients[entries.order % entries.gradients.shape[0]].to(wide)
    if entries.signs is not None:
        parts = parts * entries.pool[entries.signs[entries.order]]
    sums = torch.zeros(ids.numel(), parts.shape[1], dtype=wide, device=parts.device)
    return ids.long(), sums.index_add_(0, place, parts)
