"""Which classes a lane's loss is computed over, where it is not all of the vocabulary (sampled softmax).

The head is a fifth of a step's arithmetic, and nearly all of it pushes down words that nobody would have said. With
--sampled_softmax a lane scores the tokens that occur among its own targets, and as many others as make the number even
(Jean et al. 2015, arXiv 1412.2007; record 92 of the modded-nanogpt speedrun). The other targets are the frequent
tokens, which hold most of the probability; the rest come in turn, so that every token is pushed down from time to time.
No correction is made for what is left out, and the last part of a run scores everything (`schedule.sampled_classes`).
So the losses of sampled steps are smaller than those of full ones, and only validations can be compared.

A lane's classes follow from its targets, its number and the step's: nothing is drawn, a resumed run has the same.
"""

from functools import cache

import numpy as np
import torch
from torch import Tensor

from nanogpt.common.errors import UserError

STRIDE = 20_011  # the turn of classes: 0, STRIDE, 2 STRIDE, ... modulo the vocabulary's size, which it has no part of


def candidates(targets: np.ndarray, classes: int, vocabulary: int, turn: int) -> np.ndarray:
    """`classes` different classes below `vocabulary`, ascending: those in `targets`, then others from `turn` on. int64.

    UserError when the targets alone are more.
    """
    wanted = np.zeros(vocabulary, bool)
    wanted[targets] = True
    missing = classes - int(wanted.sum())
    if missing < 0:
        raise UserError(
            f"--sampled_softmax=true: a lane has {classes - missing:,} different targets, and {classes:,} classes are "
            "scored; use more --lanes, or --sampled_softmax=false"
        )
    order = np.roll(_in_turn(vocabulary), -(turn % vocabulary))
    wanted[order[~wanted[order]][:missing]] = True
    return np.flatnonzero(wanted)


@cache
def _in_turn(vocabulary: int) -> np.ndarray:
    if np.gcd(STRIDE, vocabulary) != 1:
        raise ValueError(f"vocabulary {vocabulary}: a multiple of {STRIDE}")
    return STRIDE * np.arange(vocabulary, dtype=np.int64) % vocabulary


def turn_of(step: int, lane: int, lanes: int, classes: int, vocabulary: int) -> int:
    """Where the others begin: lanes start evenly spread, and each goes on from step to step."""
    return vocabulary * lane // lanes + step * classes // 2


def places(chosen: Tensor, vocabulary: int) -> Tensor:
    """(vocabulary,) int64: where each class lies in `chosen` (P,) int64; -1 for those that are not there."""
    found = torch.full((vocabulary,), -1, dtype=torch.int64, device=chosen.device)
    found[chosen] = torch.arange(chosen.numel(), device=chosen.device)
    return found
