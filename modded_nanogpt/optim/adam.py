"""Adam (Kingma and Ba 2015) with cautious weight decay (arXiv 2510.12402), on one rank's part of the parameters.

With t the number of updates so far, this one included, and lr the learning rate of the parameter:

    m <- b1 m + (1 - b1) g,    v <- b2 v + (1 - b2) g^2
    u = m / (sqrt(v) + epsilon) x lr sqrt(1 - b2^t) / (1 - b1^t)
    p <- p - u - lr^2 wd p [u p > 0]

m and v are float32 whatever the parameter is; a bfloat16 parameter is rounded to nearest after the update. Three
quarters of all parameters are rows of tables, whose update only moves memory. Compiled it is one pass, which reads p,
g, m and v and writes p, m and v, and for a lasting gradient one that fills it with zeros: 22 and 2 bytes a number with
bfloat16 p and g. No other tensor of the table's size exists at any time.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from modded_nanogpt.optim.compiled import compiled, in_blocks, scalar
from modded_nanogpt.optim.table import Row


def update_(
    weights: Tensor, gradient: Tensor, first: Tensor, second: Tensor, step_size: Tensor, decay: Tensor,
    betas: tuple[float, float], epsilon: float, scale: float, cautious: bool, clear: bool,
) -> None:  # fmt: skip
    """One update in place; all tensors have one shape, `step_size` and `decay` are 0-dim.

    scale: multiplies the gradient; cautious: decay only where the update goes towards zero; clear: zero the gradient.
    """
    g = gradient.float() if scale == 1.0 else gradient.float() * scale
    first.mul_(betas[0]).add_(g, alpha=1 - betas[0])
    second.mul_(betas[1]).addcmul_(g, g, value=1 - betas[1])
    p = weights.float()
    update = first / (second.sqrt() + epsilon) * step_size
    decayed = torch.where(update * p > 0, p, 0.0) if cautious else p
    weights.copy_(p - (update + decay * decayed))
    if clear:
        gradient.zero_()


def update_all_(
    weights: list[Tensor], gradients: list[Tensor], first: list[Tensor], second: list[Tensor],
    step_sizes: list[Tensor], decays: list[Tensor], constants: tuple[tuple[tuple[float, float], float], ...],
    scale: float, cautious: bool, clear: bool,
) -> None:  # fmt: skip
    """`update_` of several parameters, compiled together. constants: (betas, epsilon) of each."""
    for p, g, m, v, step_size, decay, (betas, epsilon) in zip(
        weights, gradients, first, second, step_sizes, decays, constants, strict=True
    ):
        update_(p, g, m, v, step_size, decay, betas, epsilon, scale, cautious, clear)


class Adam:
    """The moments of one parameter, or of several that are updated together, and their updates.

    weights: this rank's parts, updated in place. Until `allocate` or `adopt` there are no moments.
    """

    def __init__(
        self, rows: Sequence[Row], weights: Sequence[Tensor], base_lr: float, base_decay: float, cautious: bool,
        compile_: bool,
    ) -> None:  # fmt: skip
        self.rows, self.weights = tuple(rows), list(weights)
        self.base_lr, self.base_decay, self.cautious, self.compile = base_lr, base_decay, cautious, compile_
        self.first: list[Tensor] = []
        self.second: list[Tensor] = []
        self.updates = 0
        self._update_all = compiled(update_all_, compile_)

    @property
    def allocated(self) -> bool:
        """Whether the moments exist."""
        return bool(self.first)

    def allocate(self) -> None:
        """Moments of zero, no updates so far."""
        self.free()
        self.first = [torch.zeros_like(part, dtype=torch.float32) for part in self.weights]
        self.second = [torch.zeros_like(part, dtype=torch.float32) for part in self.weights]

    def free(self) -> None:
        """Forget the moments."""
        self.first, self.second, self.updates = [], [], 0

    def adopt(self, other: "Adam") -> None:
        """Take over a copy of the moments, and the number of updates, of parameters of the same shapes."""
        self.first = [moment.clone() for moment in other.first]
        self.second = [moment.clone() for moment in other.second]
        self.updates = other.updates

    def state(self) -> dict[str, list[Tensor]]:
        """What a checkpoint needs besides `updates`: one tensor for each part of the weights, not a copy."""
        return {"first": self.first, "second": self.second}

    def update(self, gradients: list[Tensor], factor: float, scale: float, clear: bool) -> None:
        """One update. gradients: shaped as the weights; factor: of the learning rate, by the schedule.

        scale: multiplies the gradients first (1 / ranks where they are sums); clear: zero them when they are used.
        """
        self.updates += 1
        step_sizes, decays = [], []
        for row in self.rows:
            lr = self.base_lr * factor * row.lr
            growth = math.sqrt(1 - row.betas[1] ** self.updates) / (1 - row.betas[0] ** self.updates)
            step_sizes.append(scalar(lr * growth))
            decays.append(scalar(lr * lr * self.base_decay * row.decay))
        constants = tuple((row.betas, row.epsilon) for row in self.rows)
        columns = (self.weights, gradients, self.first, self.second)
        if self.compile:
            self._update_all(*columns, step_sizes, decays, constants, scale, self.cautious, clear)
            return
        for *tensors, step_size, decay, (betas, epsilon) in zip(
            *columns, step_sizes, decays, constants, strict=True
        ):
            fixed = (step_size, decay, betas, epsilon, scale, self.cautious, clear)
            in_blocks(tensors, lambda *pieces, fixed=fixed: update_(*pieces, *fixed))
