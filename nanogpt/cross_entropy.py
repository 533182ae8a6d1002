"""The output layer and its loss in one: logits = x W^T, mean cross entropy against the targets.

At GPT-2's vocabulary the logits are by far the largest tensor of the model. The fused form computes the loss and
overwrites the logits with their gradient in the same pass over memory, and forms the gradients of x and W at once,
so that backward has nothing left to do (the idea of Liger Kernel, Hsu et al. 2024, arXiv 2410.10989, and of cut
cross entropy, Wijmans et al. 2024, arXiv 2411.09009). With `fp8` its three matrix products read 8-bit operands, as
modded-nanogpt's head does: activations and weights in e4m3, gradients in e5m2, one scale a tensor (Micikevicius et
al. 2022, arXiv 2209.05433). The plain form is the twin of both: tests compare them.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from nanogpt.fp8 import scaled_to_e4m3

ROWS_AT_ONCE = 65536  # rows of logits held in memory at once: 6.6 GB at V = 50,304 in bfloat16
# A gradient of the logits is within [-1, 1] before it is divided by the number of rows; e5m2 reaches 57,344.
GRADIENT_SCALE = 2.0**14


def linear_cross_entropy(
    x: Tensor, weight: Tensor, targets: Tensor, fused: bool = False, fp8: bool = False
) -> Tensor:
    """Mean loss in nats, a float32 scalar. x: (N, C); weight: (V, C) float32; targets: (N,) int64."""
    if fused:
        return torch.ops.nanogpt.linear_cross_entropy(x, weight, targets, fp8)[0]
    logits = F.linear(x, weight.to(x.dtype))
    return F.cross_entropy(logits.float(), targets)


@torch.library.custom_op("nanogpt::linear_cross_entropy", mutates_args=())
def _fused(x: Tensor, weight: Tensor, targets: Tensor, fp8: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, d loss / d x in x's dtype, d loss / d weight in float32)."""
    losses = torch.empty(x.shape[0], dtype=torch.float32, device=x.device)
    x_grad = torch.empty_like(x)
    weight_grad = torch.zeros_like(weight) if x.shape[0] > ROWS_AT_ONCE else None
    for start in range(0, x.shape[0], ROWS_AT_ONCE):
        part = slice(start, start + ROWS_AT_ONCE)
        products = _products_fp8 if fp8 else _products
        piece = products(x[part], weight, targets[part], losses[part], x_grad[part], x.shape[0])
        weight_grad = piece.float() if weight_grad is None else weight_grad.add_(piece)
    return losses.mean(), x_grad, weight_grad


def _products(
    x: Tensor, weight: Tensor, targets: Tensor, losses: Tensor, x_grad: Tensor, rows: int
) -> Tensor:
    """Fill `losses` and `x_grad`, return the weight's gradient, in the dtype of x."""
    from nanogpt.cross_entropy_kernel import loss_and_gradient_

    low_weight = weight.to(x.dtype)
    logits = x @ low_weight.T
    loss_and_gradient_(logits, logits, targets, losses, 1.0 / rows)  # the logits become their gradient
    torch.mm(logits, low_weight, out=x_grad)
    return logits.T @ x


def _products_fp8(
    x: Tensor, weight: Tensor, targets: Tensor, losses: Tensor, x_grad: Tensor, rows: int
) -> Tensor:
    """As `_products`, with 8-bit operands. Hopper's FP8 products want both operands contiguous along the sum."""
    from nanogpt.cross_entropy_kernel import loss_and_gradient_, transpose_bytes

    low_x, x_scale = scaled_to_e4m3(x)
    low_weight, weight_scale = scaled_to_e4m3(weight)
    one = torch.ones((), device=x.device)
    logits = torch._scaled_mm(
        low_x, low_weight.T, x_scale, weight_scale, out_dtype=x.dtype, use_fast_accum=True
    )
    grad = torch.empty(logits.shape, dtype=torch.float8_e5m2, device=x.device)
    loss_and_gradient_(logits, grad, targets, losses, GRADIENT_SCALE)
    del logits
    grad_scale = one / (GRADIENT_SCALE * rows)
    weight_by_column = transpose_bytes(low_weight).T
    x_by_column = transpose_bytes(low_x).T
    torch._scaled_mm(
        grad, weight_by_column, grad_scale, weight_scale, out_dtype=x.dtype, use_fast_accum=False, out=x_grad
    )
    return torch._scaled_mm(
        transpose_bytes(grad), x_by_column, grad_scale, x_scale, out_dtype=x.dtype, use_fast_accum=False
    )


@_fused.register_fake
def _(x: Tensor, weight: Tensor, targets: Tensor, fp8: bool) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty((), dtype=torch.float32), torch.empty_like(x), torch.empty_like(weight)


def _save(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: tuple) -> None:
    ctx.save_for_backward(output[1], output[2])


def _backward(
    ctx: torch.autograd.function.FunctionCtx, grad: Tensor, *unused: Tensor
) -> tuple[Tensor, Tensor, None, None]:
    x_grad, weight_grad = ctx.saved_tensors
    return x_grad * grad.to(x_grad.dtype), weight_grad * grad, None, None


_fused.register_autograd(_backward, setup_context=_save)
