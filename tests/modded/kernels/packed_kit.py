"""Packed documents for the tests of attention, and tensors whose surroundings betray a kernel that reads too far."""

import torch
from torch import Tensor

# One-token documents at the start, inside and at the end; the total, 198, fits no tile.
LENGTHS = (1, 37, 1, 90, 3, 65, 1)


def bounds(lengths: tuple[int, ...], device: str = "cpu") -> tuple[Tensor, Tensor]:
    """(doc_start, doc_end), each (T,) int32."""
    count = torch.tensor(lengths)
    ends = count.cumsum(0)
    columns = (torch.repeat_interleave(x, count) for x in (ends - count, ends))
    return tuple(x.to(device, torch.int32) for x in columns)


def fenced(shape: tuple[int, ...], seed: int, dtype: torch.dtype, device: str = "cpu") -> Tensor:
    """Normal numbers with 256 rows of NaN before and behind: one that is read spoils the result."""
    around = torch.full((256 + shape[0] + 256, *shape[1:]), torch.nan, dtype=dtype, device=device)
    inside = around[256:-256]
    inside.copy_(torch.randn(shape, generator=torch.Generator().manual_seed(seed)))
    return inside


def worst(ours: Tensor, truth: Tensor) -> float:
    """The largest error, as a share of the largest true entry (1 at least); infinite when something is not finite."""
    if not torch.isfinite(ours).all():
        return float("inf")
    return ((ours.double() - truth).abs().max() / truth.abs().max().clamp(min=1.0)).item()
