"""x w^T with all three products in 8 bits (record 90): the projections to Q, K and V.

x comes from a norm, which bounds it, so its scale is fixed; the weight's largest entry is measured in each forward
pass, which costs nothing beside the product (a learned factor is in it, so that no stored copy would do); gradients
take e5m2, whose range needs no measuring. What two products read along different axes is written in both layouts at
once.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from modded_nanogpt.kernels.fp8 import (
    E4M3,
    E5M2,
    LARGEST,
    constant,
    quantise,
    scaled_mm,
    to_low,
    transpose_bytes,
)
from modded_nanogpt.kernels.launch import uses_kernels
from modded_nanogpt.kernels.mlp import GRADIENT_SCALE, input_scale


def linear(x: Tensor, w: Tensor, low: bool) -> Tensor:
    """x w^T: x (T, d) of RMS 1 at most, w (n, d), T, d and n multiples of 16 when `low`; in x's dtype.

    low: operands in 8 bits, in the backward pass too. CPU tensors, and all without `low`, take the plain product.
    """
    if not (low and uses_kernels(x)):
        return F.linear(x, w)
    low_x = to_low(
        x.detach(), input_scale(x.shape[1])
    )  # outside of the op, so that it fuses into the norm before
    return torch.ops.speedrun.low_linear(x, w, low_x)[0]


@torch.library.custom_op("speedrun::low_linear", mutates_args=())
def _low_linear(x: Tensor, w: Tensor, low_x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(x w^T (T, n), w / scale in e4m3 and turned (d, n), that scale ()). x receives the gradient, low_x is read."""
    # Not zero, by which nothing can be divided: a weight may begin there.
    scale = (w.abs().amax().float() / LARGEST[E4M3]).clamp(min=1e-12)
    rows, columns = torch.empty_like(w, dtype=E4M3), w.new_empty(w.shape[::-1], dtype=E4M3)
    quantise(w.contiguous()[None], scale[None], rows[None], columns[None])
    x_scale = constant(input_scale(x.shape[1]), x.device)
    return scaled_mm(low_x, rows.T, x_scale, scale, x.dtype), columns, scale


@_low_linear.register_fake
def _(x: Tensor, w: Tensor, low_x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    columns = w.new_empty(w.shape[::-1], dtype=E4M3)
    return x.new_empty(x.shape[0], w.shape[0]), columns, w.new_empty((), dtype=torch.float32)


@torch.library.custom_op("speedrun::low_linear_gradients", mutates_args=())
def _gradients(grad: Tensor, low_x: Tensor, columns: Tensor, w_scale: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of x (T, d) and w (n, d), in grad's dtype."""
    grad, dtype = grad.contiguous(), grad.dtype
    scale, x_scale = constant(GRADIENT_SCALE, grad.device), constant(input_scale(low_x.shape[1]), grad.device)
    rows, turned = torch.empty_like(grad, dtype=E5M2), grad.new_empty(grad.shape[::-1], dtype=E5M2)
    quantise(grad[None], scale[None], rows[None], turned[None])
    d_w = scaled_mm(turned, transpose_bytes(low_x).T, scale, x_scale, dtype, fast=False)
    return scaled_mm(rows, columns.T, scale, w_scale, dtype, fast=False), d_w


@_gradients.register_fake
def _(grad: Tensor, low_x: Tensor, columns: Tensor, w_scale: Tensor) -> tuple[Tensor, Tensor]:
    return grad.new_empty(low_x.shape), grad.new_empty(columns.shape[::-1])


def _save(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: tuple) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(inputs[2], *output[1:])


def _backward(
    ctx: torch.autograd.function.FunctionCtx, grad: Tensor, *_: Tensor | None
) -> tuple[Tensor | None, ...]:
    return *torch.ops.speedrun.low_linear_gradients(grad, *ctx.saved_tensors), None


_low_linear.register_autograd(_backward, setup_context=_save)
