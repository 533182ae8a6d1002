"""Linear layers whose forward product and input gradient read 8-bit operands (Hopper, Ada and later).

Activations and weights are rounded to e4m3 (3 bits of mantissa), gradients to e5m2 (2 bits, more range), as
Micikevicius et al. 2022 (arXiv 2209.05433) propose. The weight's gradient stays in bfloat16: it is summed over all
tokens, and Hopper's FP8 products would want both of its operands transposed first. Sums are float32 throughout.

Scales are fixed powers of two, so that rounding fuses into whatever produces the tensor and costs no pass over memory
of its own; what lies beyond the range is clamped. Weights, being small, get a scale measured each time.
"""

import torch
from torch import Tensor

E4M3_MAX, E5M2_MAX = 448.0, 57344.0
# After a norm |x| <= sqrt(C) x gain, about 28 at GPT-2's width; attention's output averages values, and GELU's output
# seldom passes 30: 8 leaves room up to 56.
ACTIVATION_SCALE = 8.0
# Gradients are relative to a mean over the rows: times the rows they are of the order of 2^-10 to 2^-4, and e5m2
# holds 2^-16 to 2^15.
GRADIENT_SCALE = 2.0**8


def to_e4m3(tensor: Tensor, scale: Tensor | float) -> Tensor:
    """tensor (any shape) x scale, clamped to +-448 and rounded to e4m3; the same shape."""
    return (tensor * scale).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)


def scaled_to_e4m3(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """(tensor / s in e4m3, s), s a float32 scalar for which the largest entry just fits."""
    scale = tensor.abs().amax().float().clamp(min=1e-12) / E4M3_MAX
    return to_e4m3(tensor, 1.0 / scale), scale


class Fp8Linear(torch.autograd.Function):
    """y = x W^T with 8-bit operands. x: (N, in) bfloat16; weight: (out, in) float32; y: (N, out) bfloat16."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor, weight: Tensor) -> Tensor:
        """The product; what the backward pass needs is kept: x as it is, the weight in e4m3."""
        low_weight, weight_scale = scaled_to_e4m3(weight)
        x_scale = torch.full((), 1.0 / ACTIVATION_SCALE, device=x.device)
        ctx.save_for_backward(x, low_weight, weight_scale)
        return torch._scaled_mm(
            to_e4m3(x, ACTIVATION_SCALE),
            low_weight.T,
            x_scale,
            weight_scale,
            out_dtype=x.dtype,
            use_fast_accum=True,
        )

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of x, with the incoming one in e5m2, and of the weight, from bfloat16 operands."""
        x, low_weight, weight_scale = ctx.saved_tensors
        factor = GRADIENT_SCALE * x.shape[0]
        low_grad = (grad * factor).clamp(-E5M2_MAX, E5M2_MAX).to(torch.float8_e5m2)
        grad_scale = torch.full((), 1.0 / factor, device=x.device)
        by_column = low_weight.T.contiguous().T  # FP8 products want both operands contiguous along the sum
        x_grad = torch._scaled_mm(
            low_grad, by_column, grad_scale, weight_scale, out_dtype=x.dtype, use_fast_accum=True
        )
        return x_grad, (grad.T @ x).float()


def fp8_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """(..., in) -> (..., out) with 8-bit operands; the twin is F.linear."""
    y = Fp8Linear.apply(x.reshape(-1, x.shape[-1]), weight).view(*x.shape[:-1], weight.shape[0])
    return y if bias is None else y + bias.to(y.dtype)
