"""The plain twin of `kernels/symmetric_matmul.py`: on a GPU these are cuBLAS's products, all tiles of them."""

import torch
from torch import Tensor


def gram(x: Tensor, transposed: bool = False) -> Tensor:
    """(n, r, c) -> X X^T (n, r, r), or X^T X (n, c, c) when `transposed`; in x's dtype."""
    return torch.bmm(x.mT, x) if transposed else torch.bmm(x, x.mT)


def polynomial(gram: Tensor, constant: float, linear: float, quadratic: float) -> Tensor:
    """constant I + linear A + quadratic A A, of symmetric matrices A (n, s, s), in their dtype, rounded once.

    The terms cancel: with coefficients or A A rounded to bfloat16, the five rounds are 3 to 10 % off.
    """
    wide = gram.float() if gram.dtype in (torch.bfloat16, torch.float16) else gram
    result = torch.baddbmm(wide, wide, wide, beta=linear, alpha=quadratic)
    result.diagonal(dim1=1, dim2=2).add_(constant)
    return result.to(gram.dtype)
