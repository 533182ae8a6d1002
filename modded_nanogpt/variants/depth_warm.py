"""A network that grows: the lower half of the layers works from the start, the others are switched on one by one.

While a layer warms up it takes part in a step with a probability that rises to 1 (stochastic depth, Huang et al. 2016);
in validation it counts with that probability. After the first `WARMING` of the run all layers take part in every step.
A layer that is switched off is multiplied by 0 and gets no gradient; it is computed all the same, so that one graph
serves all depths: what this variant can save is steps, not milliseconds.
"""

import random

from torch import Tensor

from modded_nanogpt.variants import baseline
from modded_nanogpt.variants.baseline import Sublayer, norm

WARMING = 0.3  # of the run


class Variant(baseline.Variant):
    """The baseline with gates."""

    @staticmethod
    def layer(x: Tensor, attention: Sublayer, mlp: Sublayer, gate: Tensor | None) -> Tensor:
        """The baseline's layer on x [B, T, width], what it adds multiplied by its gate."""
        gate = gate.to(x.dtype)
        x = x + gate * attention(norm(x))
        return x + gate * mlp(norm(x))

    def probability(self, layer: int, step: int) -> float:
        """That the layer takes part in the step: 0, rising in its turn, then 1."""
        lower = (self.config.num_layers + 1) // 2
        turns = self.config.num_layers - lower
        if layer < lower or step >= WARMING * self.total_steps:
            return 1.0
        turn = WARMING * self.total_steps / turns  # steps in which one layer warms up
        return min(1.0, max(0.0, step / turn - (layer - lower)))

    def gates(self, step: int, training: bool) -> list[float]:
        """0 or 1 in training, drawn from seed, step and layer; the probabilities in validation."""
        chances = [self.probability(layer, step) for layer in range(self.config.num_layers)]
        if not training:
            return chances
        draw = random.Random(f"depth {self.config.seed} {step}")
        return [float(draw.random() < chance) for chance in chances]
