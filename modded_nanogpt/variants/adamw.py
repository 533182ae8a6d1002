"""AdamW (Loshchilov and Hutter 2019) for every parameter: how a variant brings an optimizer of its own.

`named_parameters` has the embedding ("embed"), the head ("head") and four parameters a layer, such as "attention.3.qkv"
and "mlp.3.up". Whatever torch.optim.Optimizer comes back is saved, resumed and scheduled by the trainer.
"""

import torch
from torch import nn

from modded_nanogpt.simple_config import Config
from modded_nanogpt.variants import baseline

MATRIX_LR, MATRIX_DECAY = 0.0015, 0.125
BETAS = (0.9, 0.95)


class Variant(baseline.Variant):
    """The baseline with another optimizer."""

    def build_optimizer(
        self, named_parameters: dict[str, nn.Parameter], config: Config
    ) -> torch.optim.Optimizer:
        """Three groups: embedding and head at the trainer's rates, the matrices at theirs and with decay."""
        matrices = [
            parameter for name, parameter in named_parameters.items() if name not in ("embed", "head")
        ]
        groups = [
            {"params": [named_parameters["embed"]], "lr": config.embed_lr},
            {"params": [named_parameters["head"]], "lr": config.head_lr},
            {"params": matrices, "lr": MATRIX_LR, "weight_decay": MATRIX_DECAY},
        ]
        return torch.optim.AdamW(groups, betas=BETAS, weight_decay=0.0)
