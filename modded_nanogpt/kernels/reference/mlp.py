"""The plain twin of `kernels/mlp.py`."""

import torch.nn.functional as F
from torch import Tensor


def mlp(u: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """relu(u up^T)^2 down. u: (L, d); up, down: (h, d), both hidden-major; returns (L, d)."""
    return F.relu(F.linear(u, up)).square() @ down
