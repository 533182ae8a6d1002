"""The plain twin of `kernels/cross_entropy.py`."""

import torch
import torch.nn.functional as F
from torch import Tensor

from modded_nanogpt.kernels.reference.pointer import mixed

# (place (1,) int64, copied (L,), of the sink (L,)): `cross_entropy.CopyRows`; the next token's term is the mixture's.
Copy = tuple[Tensor, Tensor, Tensor] | None


def soft_cap(z: Tensor, softcap: tuple[float, float, float]) -> Tensor:
    """A sigmoid((z + B) / C): logits in (0, A), most of them near zero. softcap: (A, B, C)."""
    cap, shift, width = softcap
    return cap * torch.sigmoid((z + shift) / width)


def row_losses(
    z: Tensor,
    targets: Tensor,
    prefix_targets: Tensor | None,
    mtp: Tensor,
    prefix_weight: Tensor,
    softcap: tuple[float, float, float],
    copy: Copy = None,
) -> Tensor:
    """(L,) weighted losses of L consecutive tokens. z: (L, V) products, before the cap; the rest as `head_loss`."""
    log_p = F.log_softmax(soft_cap(z, softcap), dim=-1)
    losses = torch.zeros_like(log_p[:, 0])
    for ahead, weight in enumerate(mtp[: len(targets)]):
        count = len(targets) - ahead  # the last tokens have no target so far ahead
        predicted = log_p[:count].gather(1, targets[ahead:, None]).squeeze(1)
        if copy is not None and ahead == 0:
            predicted = _mixed(log_p, predicted, copy)
        losses = losses - F.pad(weight * predicted, (0, ahead))
    if prefix_targets is not None:
        predicted = log_p.gather(1, prefix_targets.clamp(min=0)[:, None]).squeeze(1)
        losses = losses - prefix_weight * torch.where(prefix_targets >= 0, predicted, 0.0)
    return losses


def head_loss(
    x: Tensor,
    head: Tensor,
    targets: Tensor,
    prefix_targets: Tensor | None,
    mtp: Tensor,
    prefix_weight: Tensor,
    softcap: tuple[float, float, float],
    copy: Copy = None,
) -> Tensor:
    """As the kernel's, a float32 scalar (float64 for float64 `x`): the sum of all rows' losses."""
    z = F.linear(x, head)
    z = z if z.dtype == torch.float64 else z.float()
    return row_losses(z, targets, prefix_targets, mtp, prefix_weight, softcap, copy).sum()


def _mixed(log_p: Tensor, predicted: Tensor, copy: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """(L,): the next tokens' log-probabilities with the copy pointer. log_p: (L, V), predicted: (L,), without it."""
    place, copied, of_sink = copy
    return mixed(predicted, log_p[:, place].squeeze(1), copied, of_sink)


def eval_losses(
    x: Tensor,
    head: Tensor,
    targets: Tensor,
    softcap: tuple[float, float, float],
    allowed: Tensor | None = None,
    previous: Tensor | None = None,
    copy: Copy = None,
) -> Tensor:
    """As the kernel's: (L,) losses in nats."""
    z = F.linear(x, head)
    logits = soft_cap(z if z.dtype == torch.float64 else z.float(), softcap)
    if allowed is not None:
        bits = allowed[previous.long()]  # (L, ceil(V / 8))
        places = torch.arange(logits.shape[1], device=x.device)
        may_follow = (bits[:, places // 8] >> (places % 8).to(torch.uint8)) & 1
        if copy is not None:  # canonical tokens do not forbid to copy
            may_follow = may_follow.index_fill(1, copy[0], 1)
        logits = logits.masked_fill(may_follow == 0, -torch.inf)
    if copy is None:
        return F.cross_entropy(logits, targets, reduction="none")
    log_p = F.log_softmax(logits, dim=-1)
    return -_mixed(log_p, log_p.gather(1, targets[:, None]).squeeze(1), copy)
