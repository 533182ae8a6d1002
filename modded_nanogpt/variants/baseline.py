"""The baseline, and what a variant may change of it: copy this file, change a method, name it with --variant."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modded_nanogpt.simple_config import Config

Sublayer = Callable[[Tensor], Tensor]  # (B, T, C) normed -> (B, T, C)


def norm(x: Tensor) -> Tensor:
    """RMSNorm (Zhang and Sennrich 2019) without weights, over the last axis."""
    return F.rms_norm(x, (x.size(-1),), eps=1.2e-7)


class Variant:
    """One run's choices. `layer` is part of the compiled graph; everything else happens between steps.

    Whatever a method decides must follow from its arguments and `state` alone: then all ranks decide the same, and a
    resumed run decides what the undisturbed one did.
    """

    def __init__(self, config: Config, total_steps: int, warmdown_steps: int) -> None:
        self.config, self.total_steps, self.warmdown_steps = config, total_steps, warmdown_steps

    @staticmethod
    def layer(x: Tensor, attention: Sublayer, mlp: Sublayer, gate: Tensor | None) -> Tensor:
        """One transformer layer on the residual stream x (B, T, C). gate: 0-dim, of this layer, if `gates` has any."""
        x = x + attention(norm(x))
        return x + mlp(norm(x))

    def lengths(self) -> tuple[int, ...]:
        """Every sequence length that `length` may answer: each takes a compilation of its own."""
        return (self.config.sequence_length,)

    def length(self, step: int) -> int:
        """Tokens of a sequence in training at this step. A step's tokens stay the same: there are more sequences."""
        return self.config.sequence_length

    def gates(self, step: int, training: bool) -> list[float] | None:
        """A number for every layer, which `layer` gets; None for all steps when there are none."""
        return None

    def build_optimizer(
        self, named_parameters: dict[str, nn.Parameter], config: Config
    ) -> torch.optim.Optimizer | None:
        """An optimizer of all parameters, from torch or your own; None: the trainer's Muon and Adam.

        The learning rates of its groups follow the trainer's schedule. `adamw.py` is an example.
        """
        return None

    def observe(self, step: int, loss: float) -> str:
        """Look at a step's training loss, the mean over all ranks. Returns a line for the log, or ""."""
        return ""

    def state(self) -> dict[str, Any]:
        """What a checkpoint must keep, as JSON; floats come back exactly."""
        return {}

    def load(self, state: dict[str, Any]) -> None:
        """Go on from what `state` returned."""
