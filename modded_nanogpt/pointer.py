"""The copy pointer (--copy_pointer): the next token may be one that stands earlier in the document.

A single attention head on the last residual points at earlier tokens of the document, and each of them counts as a
prediction of itself; a learned sink takes what points nowhere. How much of the prediction the pointer makes is for the
head to say: one padding row of it, the slot, is scored like a token, and the probability that it gets is the pointer's,
less what falls on the sink (`kernels.pointer_loss` has the formula). The multi-token and prefix terms of the loss stay.

Proposal 379 of the modded-nanogpt speedrun, not yet ruled on; after the sentinel of Merity et al. 2016 (arXiv
1609.07843).
"""

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from modded_nanogpt.attention import Documents, norm
from modded_nanogpt.kernels.cross_entropy import CopyRows
from modded_nanogpt.kernels.pointer import copy_shares
from modded_nanogpt.kernels.reference import pointer as reference

if TYPE_CHECKING:
    from modded_nanogpt.model import SpeedrunModel

# A query sees the keys of its block of so many tokens and of the block before, as far as they are of its document.
TRAIN_BLOCK, EVAL_BLOCK = 2048, 8192


class Keys(NamedTuple):
    """What the residual of one lane gives."""

    q: Tensor  # (T, D), times the softmax scale
    k: Tensor  # (T, D)
    sink: Tensor  # (T,) float32: each query's score of the sink


def parameter_shapes(width: int, dimensions: int) -> dict[str, tuple[tuple[int, ...], torch.dtype | None]]:
    """As `SpeedrunModel.parameter_shapes`: 196,737 numbers at the record's size."""
    return {
        "pointer_qk": ((2 * dimensions, width), None),
        "pointer_sink": ((dimensions,), torch.float32),
        "pointer_gain": ((1,), torch.float32),
    }


def init_weights(model: "SpeedrunModel", generator: torch.Generator) -> None:
    """Those of step 0. Within `torch.no_grad`."""
    bound = 1 / math.sqrt(model.size.width)
    model.pointer_qk.uniform_(-bound, bound, generator=generator)
    model.pointer_sink.zero_()
    model.pointer_gain.fill_(1.0)


def keys(model: "SpeedrunModel", x: Tensor) -> Keys | None:
    """Of the last residual x (T, d); None for a model without a pointer."""
    if not model.config.copy_pointer:
        return None
    q, k = (norm(part) for part in F.linear(x, model.pointer_qk).chunk(2, dim=-1))
    q = (q * (model.pointer_gain / math.sqrt(q.shape[1]))).to(x.dtype)
    return Keys(q, k, (q * model.pointer_sink).sum(-1))


def copy_rows(
    model: "SpeedrunModel", found: Keys, inputs: Tensor, targets: Tensor, documents: Documents, block: int
) -> CopyRows:
    """What the losses want to know. inputs: (T,) int32; targets: (T,) int64."""
    shares = copy_shares(*found, inputs, targets, documents.start, documents.end, block)
    slot = torch.full((1,), model.size.vocab, dtype=torch.int64, device=targets.device)
    return CopyRows(slot, *shares)


def mixed(
    model: "SpeedrunModel", logits: Tensor, found: Keys, inputs: Tensor, documents: Documents, place: int
) -> Tensor:
    """(V,) float32: logarithms of the probabilities of the token after input `place`; logits: (V,), without pointer."""
    slot, log_p = model.size.vocab, logits.log_softmax(-1)
    low = int(reference.first_key(documents.start, EVAL_BLOCK)[place])
    mass, of_sink = reference.copied_tokens(
        found.q[place], found.k[:place], found.sink[place : place + 1], inputs[:place], low, logits.numel()
    )
    log_mixed = reference.mixed(log_p, log_p[slot], mass.float(), of_sink.float())
    log_mixed[slot] = -torch.inf
    return log_mixed
