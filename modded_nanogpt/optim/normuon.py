"""NorMuon (Li et al. 2025, arXiv 2510.05491) on one rank's part of a bank of matrices.

Muon's update, the momentum with its singular values set to 1, and then a second moment for each row (each column, in a
wide matrix) that gives the rows one size, without changing the size of the whole. With G the gradient, lr the learning
rate and eta = lr x the matrix's multiplier:

    M <- m M + (1 - m) G,    U = m M + (1 - m) G,    O = orthogonalized U
    rho = mean of O^2 along the longer axis,    V <- b2 V + (1 - b2) rho,    D = max(V, 1e-10)^(-1/2)
    O <- O D |O| / |O D|
    W <- W - eta wd lr W [O W >= 0] - eta O

V starts at 0 and is not corrected for that: the norm cancels it. Decay falls only on what the update moves to zero
anyway (cautious weight decay, Chen et al. 2025, arXiv 2510.12402). The weights are the upper halves of float32 numbers;
the lower 16 bits are kept here ("mantissa", record 57 of the modded-nanogpt speedrun), so the model, its casts and the
messages stay bfloat16 and small updates are not lost.

With two momenta (record 92) there is a slow one besides, S <- 0.98 S + 0.02 G, and M has a momentum f of its own:

    U = m (w M + (1 - w) S) + (1 - m) G,    and the decay falls where S W >= 0, whatever the update does

Passes over memory as compiled for a GPU, in bytes a number: the norm of U 6 (reads G and M), momentum and U 12 (reads
G and M, writes M and U / |U| in bfloat16), the iteration's products, the squares of rows 2, and the update 10 (reads O,
W and its lower half, writes both halves). U and the equalized O are nowhere in memory in float32.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from modded_nanogpt.optim.compiled import compiled, in_blocks, scalar
from modded_nanogpt.optim.orthogonalize import MARGINS, Coefficients, orthogonalize

SLOW = 0.98  # momentum
SMALLEST = 1e-10  # of a second moment, and of the norm that is divided by


def nesterov_(gradient: Tensor, buffer: Tensor, momentum: Tensor, margin: float, scale: float) -> Tensor:
    """Momentum in place; returns Nesterov's average, each matrix divided by `margin` x its norm, in gradient's dtype.

    gradient: (n, r, c), multiplied by `scale` first; buffer: (n, r, c) float32; momentum: 0-dim.
    """
    g = gradient.float() if scale == 1.0 else gradient.float() * scale
    buffer.mul_(momentum).add_((1 - momentum) * g)
    return _divided(momentum * buffer + (1 - momentum) * g, margin, gradient.dtype)


def two_momenta_(
    gradient: Tensor, fast: Tensor, slow: Tensor, momentum: Tensor, fast_momentum: Tensor, share: Tensor,
    margin: float, scale: float,
) -> Tensor:  # fmt: skip
    """As `nesterov_` with a fast buffer, taken at `share`, and a slow one: both (n, r, c) float32, in place."""
    g = gradient.float() if scale == 1.0 else gradient.float() * scale
    fast.mul_(fast_momentum).add_((1 - fast_momentum) * g)
    slow.mul_(SLOW).add_(g, alpha=1 - SLOW)
    both = share * fast + (1 - share) * slow
    return _divided(momentum * both + (1 - momentum) * g, margin, gradient.dtype)


def _divided(mixed: Tensor, margin: float, dtype: torch.dtype) -> Tensor:
    """Each matrix by `margin` x its norm, after rounding to `dtype` and in it."""
    mixed = mixed.to(dtype).float()
    norm = mixed.square().sum((1, 2), keepdim=True).sqrt()
    return (mixed / (margin * norm + 1e-6)).to(dtype)


def equalized(update: Tensor, second: Tensor, beta2: float) -> Tensor:
    """The update (n, r, c) float32 with rows or columns of one size; `second` (n, r, 1) or (n, 1, c) in place."""
    axis = 2 if second.shape[2] == 1 else 1
    mean = update.square().mean(axis, keepdim=True)
    second.mul_(beta2).add_(mean, alpha=1 - beta2)
    inverse = second.clamp_min(SMALLEST).reciprocal()
    length = update.shape[axis]
    norm = (length * mean).sum((1, 2), keepdim=True).sqrt()
    scaled = (length * mean * inverse).sum((1, 2), keepdim=True).sqrt().clamp_min(SMALLEST)
    return update * (inverse.sqrt() * (norm / scaled))


def joined(weights: Tensor, low: Tensor) -> Tensor:
    """The float32 numbers whose upper halves are `weights` (bfloat16) and lower halves `low` (int16)."""
    upper = weights.view(torch.int16).to(torch.int32) << 16
    return (upper | (low.to(torch.int32) & 0xFFFF)).view(torch.float32)


def store_(values: Tensor, weights: Tensor, low: Tensor | None) -> None:
    """Write float32 `values` to `weights`, rounded; or cut in halves, when there is a `low` for the lower ones."""
    if low is None:
        weights.copy_(values)
        return
    bits = values.view(torch.int32)
    low.copy_(((bits << 16) >> 16).to(torch.int16))
    weights.copy_((bits >> 16).to(torch.int16).view(torch.bfloat16))


def apply_(
    update: Tensor, weights: Tensor, multipliers: Tensor, second: Tensor | None, low: Tensor | None,
    slow: Tensor | None, lr: Tensor, decay: Tensor, beta2: float, cautious: bool,
) -> None:  # fmt: skip
    """Equalize the orthogonalized `update` (n, r, c), decay the weights and add it to them.

    multipliers: (n, 1, 1) float32; slow: the momentum that says where to decay, None: the update does; lr and decay:
    0-dim, decay the product of lr and the weight decay.
    """
    o = update.float() if second is None else equalized(update.float(), second, beta2)
    w = weights.float() if low is None else joined(weights, low)
    decayed = torch.where((o if slow is None else slow) * w >= 0, w, 0.0) if cautious else w
    store_(w - lr * multipliers * (decay * decayed + o), weights, low)


class NorMuon:
    """Momentum, second moments and lower halves of this rank's matrices, and their updates.

    weights: (n, r, c), updated in place. equalize false: plain Muon; mantissa false, or weights that are not bfloat16:
    no lower halves. multipliers: of the learning rate, one a matrix. two: fast and slow momentum instead of one.
    """

    def __init__(
        self, weights: Tensor, multipliers: Sequence[float], base_lr: float, base_decay: float, beta2: float,
        coefficients: Coefficients, equalize: bool, cautious: bool, mantissa: bool, two: bool, compile_: bool,
    ) -> None:  # fmt: skip
        count, rows, columns = weights.shape
        self.weights, self.base_lr, self.base_decay = weights, base_lr, base_decay
        self.coefficients, self.beta2, self.cautious, self.compile = coefficients, beta2, cautious, compile_
        self.multipliers = torch.tensor(multipliers, dtype=torch.float32, device=weights.device).view(
            count, 1, 1
        )
        moments = (count, rows, 1) if rows >= columns else (count, 1, columns)
        self.momentum = torch.zeros_like(weights, dtype=torch.float32)
        self.slow = torch.zeros_like(self.momentum) if two else None
        self.second = torch.zeros(moments, device=weights.device) if equalize else None
        halves = mantissa and weights.dtype == torch.bfloat16
        self.low = torch.zeros_like(weights, dtype=torch.int16) if halves else None
        self._mix = compiled(two_momenta_ if two else nesterov_, compile_)
        self._apply = compiled(apply_, compile_)

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint needs, by name: tensors with one entry a matrix on the leading axis, not copies."""
        found = {"momentum": self.momentum, "slow": self.slow, "second": self.second, "mantissa": self.low}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    def reset(self) -> None:
        """Back to the state of step 0."""
        for tensor in self.state().values():
            tensor.zero_()

    def update(
        self,
        gradient: Tensor,
        factor: float,
        momentum: float,
        scale: float,
        two: tuple[float, float] = (0.0, 0.0),
    ) -> None:
        """One update. gradient: shaped as the weights, multiplied by `scale`; factor: of the learning rate.

        two: the fast momentum and its share, where there are two.
        """
        lr, margin, sizes = self.base_lr * factor, MARGINS[self.coefficients], [scalar(momentum)]
        buffers = [self.momentum]
        if self.slow is not None:
            buffers, sizes = [self.momentum, self.slow], [*sizes, *map(scalar, two)]
        mixed = self._mix(gradient, *buffers, *sizes, margin, scale)
        update = orthogonalize(mixed, self.coefficients)
        tensors = [update, self.weights, self.multipliers]
        optional = {"second": self.second, "low": self.low, "slow": self.slow}
        fixed = {
            "lr": scalar(lr),
            "decay": scalar(lr * self.base_decay),
            "beta2": self.beta2,
            "cautious": self.cautious,
        }
        if self.compile:
            self._apply(*tensors, **optional, **fixed)
            return
        present = [name for name, tensor in optional.items() if tensor is not None]

        def one_block(update: Tensor, weights: Tensor, multipliers: Tensor, *others: Tensor) -> None:
            given = dict.fromkeys(optional) | dict(zip(present, others, strict=True))
            apply_(update, weights, multipliers, **given, **fixed)

        in_blocks([*tensors, *(optional[name] for name in present)], one_block)
