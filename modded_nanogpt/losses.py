"""The losses of a lane from its last residual: what is predicted, over which classes, in training and in validation.

The product with the head, the softmax and their gradients are one operator (`kernels.cross_entropy`), called outside of
the compiled graph: the number of classes changes in the course of a run, and nothing else has to be compiled for it.
"""

import torch
from torch import Tensor

from modded_nanogpt.candidates import places
from modded_nanogpt.config import Config
from modded_nanogpt.kernels import pointer_loss
from modded_nanogpt.kernels.cross_entropy import CopyRows, head_loss

SOFTCAP, OLD_SOFTCAP = (23.0, 5.0, 7.5), (30.0, 0.0, 7.5)  # A sigmoid((z + B) / C): records 54, and before
ROWS_AT_ONCE = 65_536  # rows of logits in memory at once: 6.6 GB in bfloat16, and half of that again in FP8


def softcap(config: Config) -> tuple[float, float, float]:
    """(A, B, C) of the logits' cap."""
    return SOFTCAP if config.asymmetric_softcap else OLD_SOFTCAP


def train_loss(
    x: Tensor, head: Tensor, targets: Tensor, chosen: Tensor | None, prefix_table: Tensor | None, mtp: Tensor,
    prefix: Tensor, cap: tuple[float, float, float], loss_scale: float, fp8: bool, vocabulary: int,
    copy: CopyRows | None = None,
) -> Tensor:  # fmt: skip
    """Sum of the weighted losses of a lane (float32 scalar): the next tokens and the next one's longest prefix.

    x: (T, d); head: (V, d), or the rows `chosen` of it (P, d); targets: (T,) int64; chosen: (P,) int64 with all targets
    among them, or None for all classes; prefix_table: (V,) int64, -1 for none (`vocabulary.prefix_table`); a prefix
    that was not chosen counts as none. mtp: (<= 3,) and prefix: (1,) float32 weights. loss_scale: see `head_loss`.
    vocabulary: V. copy: of the copy pointer (`pointer.copy_rows`), whose slot is among `chosen`; None without one.
    """
    before = None if prefix_table is None else prefix_table[targets]
    if chosen is not None:
        place = places(chosen, vocabulary)
        targets = place[targets]
        if before is not None:
            before = torch.where(before >= 0, place[before.clamp(min=0)], -1)
        if copy is not None:
            copy = copy._replace(place=place[copy.place])
    given = (x, head, targets, before, mtp, prefix, cap, loss_scale, fp8)
    if copy is not None:
        return pointer_loss.head_loss(*given, copy, ROWS_AT_ONCE)
    return head_loss(*given, ROWS_AT_ONCE)
