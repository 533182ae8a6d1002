"""`cross_entropy`'s two losses with a copy pointer: the next token's probability is a mixture.

One class of the head is no token but a slot: alpha, its share of the softmax, is what the pointer may take. Of that the
pointer gives back what falls on its sink: p = p_real (1 - alpha (1 - sink)) + alpha copied, p_real over the other
classes. The term of the next token is -ln(p + 1e-9), all others stay. The row kernel needs a few numbers more of each
row and no pass over the logits: the gradient of a logit is its share times one factor, and something else at the slot
and the target.
"""

import torch
from torch import Tensor

from modded_nanogpt.kernels.cross_entropy import (
    EVAL_ROWS_AT_ONCE,
    ROWS_AT_ONCE,
    CopyRows,
    loss_and_gradients,
    losses_alone,
)
from modded_nanogpt.kernels.launch import uses_kernels
from modded_nanogpt.kernels.reference import cross_entropy as reference


def head_loss(
    x: Tensor,
    head: Tensor,
    targets: Tensor,
    prefix_targets: Tensor | None,
    mtp: Tensor,
    prefix_weight: Tensor,
    softcap: tuple[float, float, float],
    loss_scale: float,
    fp8: bool,
    copy: CopyRows,
    rows_at_once: int = ROWS_AT_ONCE,
) -> Tensor:
    """As `cross_entropy.head_loss`. Of `copy`, the two masses have gradients: formed here as well, not rounded."""
    aims = (targets, prefix_targets, mtp, prefix_weight)
    if not uses_kernels(x):
        return reference.head_loss(x, head, *aims, softcap, copy[:3])
    return torch.ops.speedrun.pointer_head_loss(
        x, head, copy.copied, copy.of_sink, copy.place, *aims, *softcap, loss_scale, fp8, rows_at_once
    )[0]


def eval_losses(
    x: Tensor,
    head: Tensor,
    targets: Tensor,
    softcap: tuple[float, float, float],
    copy: CopyRows,
    allowed: Tensor | None = None,
    previous: Tensor | None = None,
    rows_at_once: int = EVAL_ROWS_AT_ONCE,
) -> Tensor:
    """As `cross_entropy.eval_losses`. What `allowed` forbids is not p_real's; the slot is always allowed."""
    if not uses_kernels(x):
        return reference.eval_losses(x, head, targets, softcap, allowed, previous, copy[:3])
    return torch.ops.speedrun.pointer_eval_losses(
        x, head, *copy[:3], targets, *softcap, allowed, previous, rows_at_once
    )


@torch.library.custom_op("speedrun::pointer_head_loss", mutates_args=())
def _head_loss(
    x: Tensor, head: Tensor, copied: Tensor, of_sink: Tensor, place: Tensor, targets: Tensor,
    prefix_targets: Tensor | None, mtp: Tensor, prefix_weight: Tensor, cap: float, shift: float, width: float,
    loss_scale: float, fp8: bool, rows_at_once: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(loss, gradients of loss * loss_scale by x and by head, of the loss by copied and of_sink)."""
    copy = CopyRows(place, copied, of_sink, torch.empty_like(copied), torch.empty_like(of_sink))
    aims = (targets, prefix_targets, mtp, prefix_weight)
    found = loss_and_gradients(x, head, aims, (cap, shift, width), loss_scale, fp8, rows_at_once, copy)
    return *found, copy.d_copied, copy.d_sink


@_head_loss.register_fake
def _(
    x: Tensor, head: Tensor, copied: Tensor, of_sink: Tensor, *others: Tensor | float | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    given = (x, head, copied, of_sink)
    return x.new_empty((), dtype=torch.float32), *(torch.empty_like(each) for each in given)


def _save(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: tuple) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[1:])
    ctx.loss_scale = inputs[12]


def _backward(
    ctx: torch.autograd.function.FunctionCtx, grad: Tensor, *unused: None
) -> tuple[Tensor | None, ...]:
    x_grad, head_grad, d_copied, d_sink = ctx.saved_tensors
    factor = grad / ctx.loss_scale
    large = ((factor * saved).to(saved.dtype) for saved in (x_grad, head_grad))
    return *large, grad * d_copied, grad * d_sink, *(None,) * 11


_head_loss.register_autograd(_backward, setup_context=_save)


@torch.library.custom_op("speedrun::pointer_eval_losses", mutates_args=())
def _eval_losses(
    x: Tensor, head: Tensor, place: Tensor, copied: Tensor, of_sink: Tensor, targets: Tensor, cap: float,
    shift: float, width: float, allowed: Tensor | None, previous: Tensor | None, rows_at_once: int,
) -> Tensor:  # fmt: skip
    copy = CopyRows(place, copied, of_sink)
    return losses_alone(x, head, targets, (cap, shift, width), allowed, previous, rows_at_once, copy)


@_eval_losses.register_fake
def _(x: Tensor, *others: Tensor | float | None) -> Tensor:
    return x.new_empty(x.shape[0], dtype=torch.float32)
