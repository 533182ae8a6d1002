"""The end of a run is an average: moving averages of the last weights take their place before the last validation.

A high learning rate explores well and ends badly; the mean of its last steps ends where a low rate would have led
(Polyak and Juditsky 1992; Izmailov et al. 2018, arXiv 1803.05407; record 92 of the modded-nanogpt speedrun, whose
windows these are). So the rate need not fall as far, and the optimizer itself never sees an average. With W the weights
of the last step, A_i the averages, begun as a copy of W and then A_i <- A_i + (W - A_i) / tau_i a step, and w_i their
weights:

    W <- s [(1 - sum w_i) W + sum w_i A_i],    s such that |W| of the whole tensor stays what it was

(s: an average of directions that differ is shorter, and the layers around expect its size.) The averages are float32
and cut over the ranks as the optimizer's state is. Every fourth step brings them up to date: weights hardly move.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from modded_nanogpt.optim.compiled import in_blocks
from nanogpt.common.ranks import Ranks

if TYPE_CHECKING:
    from modded_nanogpt.optim.exchange import Sharded

EVERY = 4  # steps
RECORD_STEPS = 1194  # that the windows below were chosen for; of another run they are the same parts


@dataclass(frozen=True)
class Average:
    """One moving average of a parameter: over its last `window` steps, with time constant `tau`, taken at `weight`."""

    window: int
    tau: float
    weight: float


_LONG, _SHORT = Average(298, 150.0, 0.3493), Average(250, 53.0, 0.6507)
AVERAGES: dict[str, tuple[Average, ...]] = {
    "qk_bank": (Average(298, 150.0, 0.55),),
    "vo_bank": (_SHORT, _LONG),
    "mlp_bank": (_SHORT, _LONG),
    "head": (Average(298, 149.5, 0.65),),
    "embed": (Average(298, 149.5, 0.65),),
    "value_embeds": (Average(250, 53.0, 1.0),),
}
NORM_STAYS = {"qk_bank", "vo_bank", "mlp_bank", "head", "embed"}


@dataclass
class _Kept:
    """The averages of this rank's part of one parameter."""

    exchange: "Sharded"
    rows: tuple[Average, ...]
    values: list[Tensor]
    begun: list[bool] = field(default_factory=list)


class Averages:
    """The averages of all parameters in `exchanges` that `AVERAGES` names. Their memory is there from the beginning."""

    def __init__(self, exchanges: Mapping[str, "Sharded"], total_steps: int, ranks: Ranks) -> None:
        self.total_steps, self.ranks = total_steps, ranks
        self.kept = {
            name: _Kept(
                exchange,
                AVERAGES[name],
                [torch.zeros_like(exchange.weights, dtype=torch.float32) for _ in AVERAGES[name]],
                [False for _ in AVERAGES[name]],
            )
            for name, exchange in exchanges.items()
            if name in AVERAGES
        }

    def tick(self, step: int) -> None:
        """After the update of `step` (from 0): bring the averages up to date where it is time."""
        if (self.total_steps - 1 - step) % EVERY:
            return
        scale = self.total_steps / RECORD_STEPS
        for kept in self.kept.values():
            for place, (row, value) in enumerate(zip(kept.rows, kept.values, strict=True)):
                if step < self.total_steps - row.window * scale:
                    continue
                rate = 1.0 - (1.0 - min(1.0, 1.0 / (row.tau * scale))) ** EVERY
                add_to_average_(value, kept.exchange.weights, rate if kept.begun[place] else 1.0)
                kept.begun[place] = True

    def apply(self) -> None:
        """Put the averages in the weights' place, on all ranks; then there are none any more."""
        for name, kept in self.kept.items():
            if all(kept.begun):
                self._apply(name, kept)
        self.reset()

    def _apply(self, name: str, kept: _Kept) -> None:
        weights, combined = kept.exchange.weights, kept.values[0]
        rest = 1.0 - sum(row.weight for row in kept.rows)
        combined.mul_(kept.rows[0].weight)
        for row, value in zip(kept.rows[1:], kept.values[1:], strict=True):
            combined.add_(value, alpha=row.weight)
        if rest > 1e-9:
            combined.add_(weights, alpha=rest)
        if name in NORM_STAYS:
            sizes = torch.stack([weights.float().square().sum(), combined.square().sum()])
            before, after = self.ranks.sum(sizes)
            combined.mul_((before / after.clamp_min(1e-30)).sqrt())
        weights.copy_(combined)
        kept.exchange.launch_gather()
        kept.exchange.finish()

    def reset(self) -> None:
        """As before the first step."""
        for kept in self.kept.values():
            kept.begun = [False for _ in kept.begun]

    def tensors(self) -> dict[str, Tensor]:
        """The averages that have begun, `<parameter>/average<k>`, whole, on rank 0; all ranks must call."""
        return {
            f"{name}/average{place}": kept.exchange.collect(value)
            for name, kept in self.kept.items()
            for place, value in enumerate(kept.values)
            if kept.begun[place]
        }

    def shapes(self, tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
        """Names and shapes of those of these averages that `tensors` has."""
        return {
            f"{name}/average{place}": kept.exchange.view
            for name, kept in self.kept.items()
            for place in range(len(kept.rows))
            if f"{name}/average{place}" in tensors
        }

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Put back what `tensors` gave."""
        for name, kept in self.kept.items():
            for place, value in enumerate(kept.values):
                whole = tensors.get(f"{name}/average{place}")
                kept.begun[place] = whole is not None
                if whole is not None:
                    kept.exchange.distribute_(value, whole)

    @property
    def bytes(self) -> int:
        """Of this rank's averages."""
        return sum(value.numel() * 4 for kept in self.kept.values() for value in kept.values)


def add_to_average_(average: Tensor, weights: Tensor, rate: float) -> None:
    """average <- average + rate (weights - average) in place. average: float32, weights: any float dtype, one shape."""
    in_blocks([average, weights], lambda old, new: old.lerp_(new.float(), rate))
