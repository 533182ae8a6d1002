"""Attention and MLP in parallel, both from one RMSNorm, as PaLM has them (Chowdhery et al. 2022, section 2).

Their sum is multiplied by 1/sqrt(2), so that two sublayers at once add to the stream what one alone would.
"""

import math

from torch import Tensor

from modded_nanogpt.variants import baseline
from modded_nanogpt.variants.baseline import Sublayer, norm


class Variant(baseline.Variant):
    """The baseline with another layer."""

    @staticmethod
    def layer(x: Tensor, attention: Sublayer, mlp: Sublayer, gate: Tensor | None) -> Tensor:
        """x + (attention(u) + mlp(u)) / sqrt(2) with u = norm(x)."""
        u = norm(x)
        return x + (attention(u) + mlp(u)) * math.sqrt(0.5)
