"""Muon's matrix iteration: X, of Frobenius norm at most 1, goes to nearly U V^T, where X = U S V^T.

Each of the rounds applies an odd polynomial to the singular values: with the Gram matrix A on the shorter side,
X <- a X + (b A + c A^2) X, or X <- a X + X (b A + c A^2) for tall matrices. Polar Express (Amsel et al. 2025, arXiv
2505.16932) takes the best polynomial for each round in turn; Newton-Schulz (K. Jordan's Muon, 2024) repeats one.

a goes into the diagonal of b A + c A^2, so that a round is three products and nothing else: a sum of its own would read
X once more, and write and read a copy of it. In bfloat16 that rounds as well as the literal form: 1.1 % against 1.0 %
from the exact result for a 256 x 768 normal matrix, 1.03 % against 1.02 % for 768 x 768.

Two of the three products are symmetric; on a GPU our kernels compute half of each.
"""

import torch
from torch import Tensor

from modded_nanogpt.kernels.symmetric_matmul import gram, polynomial

Coefficients = tuple[tuple[float, float, float], ...]

# From the paper's procedure for five rounds, with 2 % safety and a cushion of 2.
POLAR_EXPRESS: Coefficients = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)
# Six rounds of record 92: singular values from 0.003 on end within 0.5 % of 1, where five rounds leave 14 %.
SIX_ROUNDS: Coefficients = (
    (3.923798038567, -6.095026865488, 3.905234618423),
    (3.278126713798, -3.328923386476, 0.989127286973),
    (3.505298394150, -5.137358782410, 1.968325560615),
    (2.815058591845, -3.685181239622, 1.417196497642),
    (2.245503932403, -2.443826979899, 0.963091710461),
    (2.256537145403, -2.166840097229, 0.929501253245),
)
NEWTON_SCHULZ: Coefficients = ((3.4445, -4.7750, 2.0315),) * 5

# A matrix is divided by its Frobenius norm times the margin: these polynomials are made for singular values that have
# some room below 1.
MARGINS = {POLAR_EXPRESS: 1.02, SIX_ROUNDS: 1.05, NEWTON_SCHULZ: 1.0}


def orthogonalize(x: Tensor, coefficients: Coefficients = POLAR_EXPRESS) -> Tensor:
    """x: (n, rows, columns), each matrix of norm at most 1, in the dtype to compute in. The same shape and dtype."""
    tall = x.shape[1] > x.shape[2]
    for a, b, c in coefficients:
        factor = polynomial(gram(x, transposed=tall), a, b, c)
        x = torch.bmm(x, factor) if tall else torch.bmm(factor, x)
    return x
