"""The head and its loss in one: z = x W^T, logits = A sigmoid((z + B) / C), weighted cross entropies of each row.

The logits are by far the largest tensor of the model. Their gradient is formed in the same kernel as the loss, and the
gradients of x and W at once, so that nothing of their size outlives the forward pass (the idea of Liger Kernel, Hsu et
al. 2024, arXiv 2410.10989). As the cap keeps logits within (0, A), exp(logit - A) can neither overflow nor vanish: the
softmax needs no maximum, and a row is read twice, the second time from the L2 cache. Cap: Gemma 2 (arXiv 2408.00118),
in the asymmetric form of record 54; several targets a row: records 53 and 88; 8-bit operands: records 51 and 67.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from modded_nanogpt.kernels.fp8 import E4M3, E5M2, constant, quantise, scaled_mm, transpose_bytes
from modded_nanogpt.kernels.launch import on_device_of, uses_kernels
from modded_nanogpt.kernels.reference import cross_entropy as reference

try:
    import triton
    import triton.language as tl

    from modded_nanogpt.kernels.pointer_kernels import mixture
except ImportError:
    triton = None

ROWS_AT_ONCE = 49_152  # 4.9 GB of bfloat16 logits at V = 50,304
EVAL_ROWS_AT_ONCE = 16_384
# Record 51: |x| is at most sqrt(768) = 28 after the norm and seldom passes 10; larger weights than 1.6 are clamped; the
# gradient of a logit is at most A / 4C = 0.77 times the weights' sum.
X_SCALE, HEAD_SCALE, GRADIENT_SCALE = 100 / 448, 1.6 / 448, 0.75 / 448
BLOCK, WARPS = (
    8192,
    16,
)  # of a row, at a time: two rows a multiprocessor, so that all rows under way fit in L2


class CopyRows(NamedTuple):
    """What the copy pointer (`pointer_loss`) knows of each row, and where its gradients go. Float32 but for `place`."""

    place: Tensor  # (1,) int64: where its slot is among the classes
    copied: Tensor  # (L,): the pointer's mass on the next token
    of_sink: Tensor  # (L,): and on its sink
    d_copied: Tensor | None = None  # (L,): gradients of the loss itself
    d_sink: Tensor | None = None

    def part(self, rows: slice) -> "CopyRows":
        """Those of some rows."""
        return CopyRows(self.place, *(None if each is None else each[rows] for each in self[1:]))


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
    rows_at_once: int = ROWS_AT_ONCE,
) -> Tensor:
    """Sum over rows t of sum_k mtp[k] CE(logits_t, targets[t + k]) + prefix_weight CE(logits_t, prefix_targets[t]).

    x: (L, d) bfloat16; head: (V, d) bfloat16; targets: (L,) int64, those past the end are left out; prefix_targets:
    (L,) int64, -1 for none; mtp: (<= 3,) float32; prefix_weight: (1,) float32; softcap: (A, B, C), A < 80. Weights are
    tensors, so that a new value compiles nothing. Returns a float32 scalar.

    The gradients are formed here, at the size they have in (loss * loss_scale).backward(), and rounded at that size;
    what arrives from above multiplies them, and is 1 when it is `loss_scale` that arrives.
    With `fp8` L, V and d must be multiples of 16. At most `rows_at_once` rows of logits are in memory.
    """
    if not uses_kernels(x):
        return reference.head_loss(x, head, targets, prefix_targets, mtp, prefix_weight, softcap)
    cap, shift, width = softcap
    return torch.ops.speedrun.head_loss(
        x, head, targets, prefix_targets, mtp, prefix_weight, cap, shift, width, loss_scale, fp8, rows_at_once
    )[0]


def eval_losses(
    x: Tensor,
    head: Tensor,
    targets: Tensor,
    softcap: tuple[float, float, float],
    allowed: Tensor | None = None,
    previous: Tensor | None = None,
    rows_at_once: int = EVAL_ROWS_AT_ONCE,
) -> Tensor:
    """(L,) float32 losses in nats, without approximations beyond the product's bfloat16 and without gradients.

    allowed: (V, ceil(V / 8)) uint8: bit v % 8 (from the lowest) of allowed[u, v // 8] says whether token v may
    follow token u; others get probability 0 (canonical tokens, arXiv 2506.07956). previous: (L,) integers, the tokens
    before the targets.
    """
    if not uses_kernels(x):
        return reference.eval_losses(x, head, targets, softcap, allowed, previous)
    return torch.ops.speedrun.eval_losses(x, head, targets, *softcap, allowed, previous, rows_at_once)


@torch.library.custom_op("speedrun::head_loss", mutates_args=())
def _head_loss(
    x: Tensor, head: Tensor, targets: Tensor, prefix_targets: Tensor | None, mtp: Tensor, prefix_weight: Tensor,
    cap: float, shift: float, width: float, loss_scale: float, fp8: bool, rows_at_once: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(loss, gradient of loss * loss_scale by x, by head), both in the dtype of what they belong to."""
    aims = (targets, prefix_targets, mtp, prefix_weight)
    return loss_and_gradients(x, head, aims, (cap, shift, width), loss_scale, fp8, rows_at_once)


def loss_and_gradients(
    x: Tensor, head: Tensor, aims: tuple[Tensor, Tensor | None, Tensor, Tensor], softcap: tuple[float, float, float],
    loss_scale: float, fp8: bool, rows_at_once: int, copy: CopyRows | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """What the operator returns. aims: (targets, prefix_targets, mtp, prefix_weight)."""
    tokens, (targets, prefix_targets, mtp, prefix_weight) = x.shape[0], aims
    losses = torch.empty(tokens, dtype=torch.float32, device=x.device)
    x_grads, head_grad = [], None
    products = _Fp8Products(x, head, loss_scale) if fp8 else _Products(x, head, loss_scale)
    for start in range(0, tokens, rows_at_once):
        rows = slice(start, min(start + rows_at_once, tokens))
        logits = products.logits(rows)
        grad = logits if products.grad_dtype is None else torch.empty_like(logits, dtype=products.grad_dtype)
        _launch(
            logits, losses[rows], softcap, grad=grad, scale=products.grad_scale, start=start, copy=copy,
            targets=targets, prefix_targets=prefix_targets, mtp=mtp, prefix_weight=prefix_weight,
        )  # fmt: skip
        del logits  # with 8-bit gradients: before the transposed copy is made
        x_grads.append(products.x_grad(grad))
        piece = products.head_grad(grad, rows)
        if start == 0 and rows.stop == tokens:
            head_grad = piece
        else:
            head_grad = piece.float() if head_grad is None else head_grad.add_(piece)
    x_grad = x_grads[0] if len(x_grads) == 1 else torch.cat(x_grads)
    return losses.sum(), x_grad, head_grad.to(head.dtype)


@_head_loss.register_fake
def _(x: Tensor, head: Tensor, *others: Tensor | float | None) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty((), dtype=torch.float32), torch.empty_like(x), torch.empty_like(head)


def _save(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: tuple) -> None:
    ctx.set_materialize_grads(False)  # or zeros as large as the gradients would be made, to be ignored
    ctx.save_for_backward(output[1], output[2])
    ctx.loss_scale = inputs[9]


def _backward(
    ctx: torch.autograd.function.FunctionCtx, grad: Tensor, *unused: None
) -> tuple[Tensor | None, ...]:
    """The gradients that the forward pass has formed, times what arrives.

    Would they ignore it, torch.compile could put the whole backward pass into the forward graph, with every activation
    alive in it and none recomputed: more memory, more traffic, a graph twice as long.
    """
    factor = grad / ctx.loss_scale
    return *((factor * saved).to(saved.dtype) for saved in ctx.saved_tensors), *(None,) * 10


_head_loss.register_autograd(_backward, setup_context=_save)


class _Products:
    """The three matrix products around the loss, in the dtype of x."""

    grad_dtype: torch.dtype | None = None  # None: the gradient overwrites the logits

    def __init__(self, x: Tensor, head: Tensor, loss_scale: float) -> None:
        self.x, self.head, self.grad_scale = x, head, loss_scale

    def logits(self, rows: slice) -> Tensor:
        """(rows, V)."""
        return self.x[rows] @ self.head.T

    def x_grad(self, grad: Tensor) -> Tensor:
        """(rows, d)."""
        return grad @ self.head

    def head_grad(self, grad: Tensor, rows: slice) -> Tensor:
        """(V, d)."""
        return grad.T @ self.x[rows]


class _Fp8Products(_Products):
    """The same with 8-bit operands and fixed scales: no pass over memory to find them."""

    grad_dtype = E5M2

    def __init__(self, x: Tensor, head: Tensor, loss_scale: float) -> None:
        (tokens, width), vocabulary = x.shape, head.shape[0]
        self.dtype, device = x.dtype, x.device
        self.x_scale, self.head_scale = constant(X_SCALE, device), constant(HEAD_SCALE, device)
        self.low_grad_scale = constant(GRADIENT_SCALE * loss_scale, device)
        self.grad_scale = 1.0 / GRADIENT_SCALE  # relative to the loss itself: the products carry loss_scale
        self.low_x = torch.empty(tokens, width, dtype=E4M3, device=device)
        self.low_head = torch.empty(vocabulary, width, dtype=E4M3, device=device)
        self.head_by_column = torch.empty(width, vocabulary, dtype=E4M3, device=device)
        self.x = x
        quantise(x[None], self.x_scale[None], rows=self.low_x)
        quantise(head[None], self.head_scale[None], self.low_head, self.head_by_column)

    def logits(self, rows: slice) -> Tensor:
        """(rows, V)."""
        return scaled_mm(self.low_x[rows], self.low_head.T, self.x_scale, self.head_scale, self.dtype)

    def x_grad(self, grad: Tensor) -> Tensor:
        """(rows, d). Gradients are summed exactly: the fast sums lose them."""
        by_column = self.head_by_column.T
        return scaled_mm(grad, by_column, self.low_grad_scale, self.head_scale, self.dtype, fast=False)

    def head_grad(self, grad: Tensor, rows: slice) -> Tensor:
        """(V, d)."""
        by_column, turned = transpose_bytes(self.low_x[rows]).T, transpose_bytes(grad)
        return scaled_mm(turned, by_column, self.low_grad_scale, self.x_scale, self.dtype, fast=False)


@torch.library.custom_op("speedrun::eval_losses", mutates_args=())
def _eval_losses(
    x: Tensor, head: Tensor, targets: Tensor, cap: float, shift: float, width: float,
    allowed: Tensor | None, previous: Tensor | None, rows_at_once: int,
) -> Tensor:  # fmt: skip
    return losses_alone(x, head, targets, (cap, shift, width), allowed, previous, rows_at_once)


def losses_alone(
    x: Tensor, head: Tensor, targets: Tensor, softcap: tuple[float, float, float], allowed: Tensor | None,
    previous: Tensor | None, rows_at_once: int, copy: CopyRows | None = None,
) -> Tensor:  # fmt: skip
    """What the operator returns."""
    losses = torch.empty(x.shape[0], dtype=torch.float32, device=x.device)
    for start in range(0, x.shape[0], rows_at_once):
        rows = slice(start, start + rows_at_once)
        before = None if allowed is None else previous[rows]
        _launch(
            x[rows] @ head.T, losses[rows], softcap, targets=targets[rows], allowed=allowed, previous=before,
            copy=None if copy is None else copy.part(rows),
        )  # fmt: skip
    return losses


@_eval_losses.register_fake
def _(x: Tensor, *others: Tensor | float | None) -> Tensor:
    return x.new_empty(x.shape[0], dtype=torch.float32)


def _launch(
    z: Tensor,
    losses: Tensor,
    softcap: tuple[float, float, float],
    targets: Tensor,
    start: int = 0,
    prefix_targets: Tensor | None = None,
    mtp: Tensor | None = None,
    prefix_weight: Tensor | None = None,
    grad: Tensor | None = None,
    scale: float = 1.0,
    allowed: Tensor | None = None,
    previous: Tensor | None = None,
    copy: CopyRows | None = None,
) -> None:
    """Fill `losses` (R,), and `grad` (R, V) with `scale` x their gradient by z (R, V), which `grad` may overwrite.

    The rows are tokens start, start + 1, ... of `targets` and `copy`. Without `grad` the exponentials are exact.
    """
    rows, vocabulary = z.shape
    block = min(BLOCK, triton.next_power_of_2(vocabulary))
    whole = vocabulary // block * block
    with on_device_of(z):
        _row_kernel[(rows,)](
            z, grad, losses, targets, prefix_targets, mtp, prefix_weight, allowed, previous,
            *(copy or (None,) * len(CopyRows._fields)),
            start, targets.shape[0], 1 if mtp is None else mtp.shape[0], *softcap, scale,
            V=vocabulary, WHOLE=whole, BLOCK=block, TAIL=triton.next_power_of_2(max(1, vocabulary - whole)),
            BYTES=0 if allowed is None else allowed.shape[1], FAST=z.is_cuda and grad is not None,
            num_warps=WARPS if block >= 2048 else 4,
        )  # fmt: skip


if triton is not None:

    @triton.jit
    def _tanh(x, FAST: tl.constexpr):
        if FAST:  # one instruction, within 2^-11: less than what the logits' bfloat16 has lost
            return tl.inline_asm_elementwise(
                "tanh.approx.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
            )
        return 2.0 * tl.sigmoid(2.0 * x) - 1.0

    @triton.jit
    def _share(t, cap):
        """exp(logit - A) for logit = A sigmoid = A (t + 1) / 2."""
        return tl.exp2((t - 1.0) * (cap * 0.7213475204444817))  # half of log2(e)

    @triton.jit
    def _may_follow(bits, place, inside):
        return ((tl.load(bits + place // 8, mask=inside, other=0) >> (place % 8).to(tl.uint8)) & 1) != 0

    @triton.jit
    def _shares(
        z, place, bits, cap, shift, slope,
        V: tl.constexpr, MASKED: tl.constexpr, FAST: tl.constexpr, AGAIN: tl.constexpr,
    ):  # fmt: skip
        """(exp(logit - A), zero where no token is or may be; t) of some places of a row.

        AGAIN: the row will be read once more, so it shall stay in the cache.
        """
        policy: tl.constexpr = "evict_last" if AGAIN else "evict_first"
        if MASKED:
            value = tl.load(z + place, mask=place < V, other=0.0, eviction_policy=policy)
        else:
            value = tl.load(z + place, eviction_policy=policy)
        t = _tanh((value.to(tl.float32) + shift) * slope, FAST)
        share = _share(t, cap)
        if MASKED:
            share = tl.where(place < V, share, 0.0)
        if bits is not None:
            share = tl.where(_may_follow(bits, place, place < V), share, 0.0)
        return share, t

    @triton.jit
    def _targets_of(targets, prefix, mtp, prefix_weight, token, tokens, ahead):
        """(4,) ids (-1: none) and weights of what a row shall predict: up to three tokens ahead, and a prefix."""
        k = tl.arange(0, 4)
        wanted = (k < ahead) & (token + k < tokens)
        if mtp is not None:
            weight = tl.load(mtp + k, mask=wanted, other=0.0)
        else:
            weight = tl.where(wanted, 1.0, 0.0)
        target = tl.load(targets + token + k, mask=wanted, other=-1)
        if prefix is not None:
            target = tl.where(k == 3, tl.load(prefix + token), target)
            weight = tl.where(k == 3, tl.load(prefix_weight), weight)
        weight = tl.where(target >= 0, weight, 0.0)
        return tl.where(weight != 0.0, target, -1), weight

    @triton.jit
    def _row_kernel(
        z, grad, losses, targets, prefix, mtp, prefix_weight, allowed, previous,
        slot, copied, of_sink, d_copied, d_sink,
        start, tokens, ahead, cap, shift, width, scale,
        V: tl.constexpr, WHOLE: tl.constexpr, BLOCK: tl.constexpr, TAIL: tl.constexpr,
        BYTES: tl.constexpr, FAST: tl.constexpr,
    ):  # fmt: skip
        """One program a row: blocks of BLOCK places up to WHOLE, then the rest in one of TAIL places."""
        row = tl.program_id(0).to(tl.int64)  # row x V passes 2^31
        z += row * V
        bits = None if allowed is None else allowed + tl.load(previous + row).to(tl.int64) * BYTES
        slope = 0.5 / width
        place, rest = tl.arange(0, BLOCK), WHOLE + tl.arange(0, TAIL)
        AGAIN: tl.constexpr = grad is not None

        target, weight = _targets_of(targets, prefix, mtp, prefix_weight, start + row, tokens, ahead)
        at_target = tl.load(z + target, mask=target >= 0, other=0.0).to(tl.float32)
        target_t = _tanh((at_target + shift) * slope, FAST)
        sums = tl.zeros((BLOCK,), tl.float32)
        for first in tl.range(0, WHOLE, BLOCK):
            sums += _shares(z, first + place, bits, cap, shift, slope, V, False, FAST, AGAIN)[0]
        total = tl.sum(sums, axis=0)
        if WHOLE < V:
            total += tl.sum(_shares(z, rest, bits, cap, shift, slope, V, True, FAST, AGAIN)[0], axis=0)
        if slot is not None:
            slot_place = tl.load(slot)
            slot_t = _tanh((tl.load(z + slot_place).to(tl.float32) + shift) * slope, FAST)
            slot_share = _share(slot_t, cap)
            if bits is not None:  # which do not forbid to copy
                total += tl.where(_may_follow(bits, slot_place, True), 0.0, slot_share)
        log_p = 0.5 * cap * (target_t - 1.0) - tl.log(total)
        if bits is not None:
            log_p = tl.where(_may_follow(bits, target, target >= 0), log_p, -float("inf"))
        if slot is not None:
            k = tl.arange(0, 4)
            copy_p, sink_p = tl.load(copied + start + row), tl.load(of_sink + start + row)
            next_p = tl.sum(tl.where(k == 0, tl.exp(log_p), 0.0), axis=0)
            next_weight = tl.sum(tl.where(k == 0, weight, 0.0), axis=0)
            log_next, rest_total, of_all, of_next, of_slot, of_copied, at_sink = mixture(
                next_p, next_weight, slot_share, total, copy_p, sink_p
            )
            log_p = tl.where(k == 0, log_next, log_p)
        tl.store(losses + row, -tl.sum(tl.where(target >= 0, weight * log_p, 0.0), axis=0))

        if grad is not None:
            grad += row * V
            all_weight = tl.sum(weight, axis=0)
            # d logit / d z = A / C sigmoid (1 - sigmoid) = A / 4C (1 - t^2)
            steepness = 0.25 * cap / width * scale
            if slot is not None:  # the next token's term has another weight, and its own sum of shares
                others = all_weight - next_weight
                per_share = others / total + of_all / rest_total
                weight = tl.where(k == 0, of_next, weight)
                factor = per_share * steepness
                tl.store(d_copied + start + row, of_copied)
                tl.store(d_sink + start + row, at_sink)
            else:
                factor = all_weight / total * steepness
            for first in tl.range(0, WHOLE, BLOCK):
                share, t = _shares(z, first + place, bits, cap, shift, slope, V, False, FAST, False)
                value = share * (factor - factor * t * t)
                tl.store(grad + first + place, value.to(grad.dtype.element_ty))
            if WHOLE < V:
                share, t = _shares(z, rest, bits, cap, shift, slope, V, True, FAST, False)
                value = share * (factor - factor * t * t)
                tl.store(grad + rest, value.to(grad.dtype.element_ty), mask=rest < V)
            # The targets' own places again. Equal targets store equal values: all their weights count in each.
            together = tl.where(target[:, None] == target[None, :], weight[None, :], 0.0)
            if slot is not None:
                value = per_share * _share(target_t, cap) - tl.sum(together, axis=1)
            else:
                value = all_weight * _share(target_t, cap) / total - tl.sum(together, axis=1)
            value *= steepness * (1.0 - target_t * target_t)
            tl.debug_barrier()  # other threads have stored there
            tl.store(grad + target, value.to(grad.dtype.element_ty), mask=target >= 0)
            if slot is not None:
                value = (others * slot_share / total + of_slot) * (steepness * (1.0 - slot_t * slot_t))
                tl.store(grad + slot_place, value.to(grad.dtype.element_ty))
