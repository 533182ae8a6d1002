"""The MLP: post = relu(u up^T)^2, out = post down, with the activation inside of the first product's kernel.

ReLU^2: Primer (arXiv 2109.08668). Only `post` is kept for the backward pass, where relu(u up^T) is its root: d pre =
2 (g down^T) sqrt(post), again one kernel (records 59 and 87). With FP8 (records 84 and 89) both products of the forward
pass read e4m3. The norm before bounds |u| by sqrt(d), so its scale is fixed: a floating-point format loses nothing by a
scale that is too large by a factor of ten. The scale of `post` is not known before it is there; it comes from the
largest entry of the step before, which the same kernel finds while it writes both `post` and its 8-bit copy.

With FP8 in the backward pass too (record 92) `post` and d pre exist in 8 bits only. Both enter two products that sum
over different axes, and tensor cores want the summed axis last: the kernel that makes a tile writes it in both layouts
from the registers that hold it. A pass of its own that turns them would cost what the weights' gradients gain.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

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
from modded_nanogpt.kernels.launch import INTERPRETED, on_device_of
from modded_nanogpt.kernels.mlp_weights import Fp8Mlp
from modded_nanogpt.kernels.reference import mlp as reference

try:
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:
    triton = None

# Of gradients in the FP8 backward pass. Of losses summed over tokens they are about 2^-14 to 2^-3 here; e5m2 with this
# scale reaches from 2^-24 to 224, so nothing has to be measured.
GRADIENT_SCALE = 2.0**-8


def fused_pays(device_index: int) -> bool:
    """Whether the bfloat16 kernel beats cuBLAS and a pass of its own: it has the tiles for Hopper and B200 only."""
    return torch.cuda.get_device_capability(device_index)[0] in (9, 10)


def before_compiling() -> None:
    """Call it before torch.compile sees `mlp`: it imports the compiler, which takes as long as torch itself."""
    torch.compiler.assume_constant_result(fused_pays)


def mlp(u: Tensor, up: Tensor, down: Tensor, fp8: Fp8Mlp | None = None, layer: int = 0) -> Tensor:
    """relu(u up^T)^2 down. u: (L, d) bfloat16, of RMS 1 at most; up, down: (h, d) bfloat16; returns (L, d).

    fp8: None, or the copies of the bank whose layer `layer` holds up and down, which then receive the gradients only.
    CPU tensors, and bfloat16 on GPUs that are neither Hopper nor B200, take the plain twin, which inductor fuses.
    """
    if fp8 is not None:
        copies = fp8.layers[layer]
        low_u = None
        if copies.up is not None:  # outside of the op, so that it fuses into the norm before
            low_u = to_low(u.detach(), input_scale(u.shape[1]))
        if copies.down_by_row is not None:
            out, _, _, largest = torch.ops.speedrun.mlp_low(u, up, down, low_u, *copies[:5], *copies[6:])
        else:
            out, _, largest = torch.ops.speedrun.mlp(u, up, down, low_u, *copies[:5])
        # Here, as an op with gradients may not change its arguments.
        copies.largest.copy_(torch.maximum(copies.largest, largest.detach()))
        return out
    if INTERPRETED or (u.is_cuda and fused_pays(u.device.index)):
        return torch.ops.speedrun.mlp(u, up, down, *[None] * 6)[0]
    return reference.mlp(u, up, down)


def input_scale(width: int) -> float:
    """That of u: its largest possible entry becomes the largest number of e4m3."""
    return math.sqrt(width) / LARGEST[E4M3]


@torch.library.custom_op("speedrun::mlp", mutates_args=())
def _mlp(
    u: Tensor, up: Tensor, down: Tensor, low_u: Tensor | None, low_up: Tensor | None, up_scale: Tensor | None,
    low_down: Tensor | None, down_scale: Tensor | None, post_scale: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(out (L, d), post (L, h), its largest entry (1,)). The backward pass is in bfloat16."""
    post = u.new_empty(u.shape[0], up.shape[0])
    largest = torch.zeros(1, device=u.device)
    extra = {}
    if low_down is not None:
        extra = {"low": torch.empty_like(post, dtype=E4M3), "low_scale": post_scale, "largest": largest}
    if low_up is None:
        _launch(u, up, post, **extra)
    else:
        _launch(low_u, low_up, post, (constant(input_scale(u.shape[1]), u.device), up_scale), **extra)
    if low_down is None:
        return post @ down, post, largest
    return scaled_mm(extra["low"], low_down.T, post_scale, down_scale, u.dtype), post, largest


@_mlp.register_fake
def _(u: Tensor, up: Tensor, *others: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(u), u.new_empty(u.shape[0], up.shape[0]), u.new_empty(1, dtype=torch.float32)


@torch.library.custom_op("speedrun::mlp_pre_grad", mutates_args=())
def _pre_grad(grad: Tensor, post: Tensor, down: Tensor) -> Tensor:
    """(L, h): 2 (grad down^T) sqrt(post). grad: (L, d)."""
    out = torch.empty_like(post)
    _launch(grad.contiguous(), down, out, post=post)
    return out


@_pre_grad.register_fake
def _(grad: Tensor, post: Tensor, down: Tensor) -> Tensor:
    return torch.empty_like(post)


def _save(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: tuple) -> None:
    ctx.set_materialize_grads(False)  # nobody asks for the gradient by `post`; zeros for it would be large
    ctx.save_for_backward(inputs[0], output[1], inputs[1], inputs[2])


def _backward(
    ctx: torch.autograd.function.FunctionCtx, grad: Tensor, *_: Tensor
) -> tuple[Tensor | None, ...]:
    u, post, up, down = ctx.saved_tensors
    pre_grad = torch.ops.speedrun.mlp_pre_grad(grad, post, down)
    return pre_grad @ up, pre_grad.T @ u, post.T @ grad, *(None,) * 6


_mlp.register_autograd(_backward, setup_context=_save)


@torch.library.custom_op("speedrun::mlp_low", mutates_args=())
def _mlp_low(
    u: Tensor, up: Tensor, down: Tensor, low_u: Tensor, low_up: Tensor, up_scale: Tensor, low_down: Tensor,
    down_scale: Tensor, post_scale: Tensor, up_by_column: Tensor, down_by_row: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(out (L, d), post / post_scale in e4m3 (L, h), the same turned (h, L), the largest entry of post (1,)).

    L must be a multiple of 16. u, up and down receive the gradients; up_by_column and down_by_row serve these.
    """
    shape = u.shape[0], up.shape[0]
    low, turned = u.new_empty(shape, dtype=E4M3), u.new_empty(shape[::-1], dtype=E4M3)
    largest, factors = (
        torch.zeros(1, device=u.device),
        (constant(input_scale(u.shape[1]), u.device), up_scale),
    )
    _launch(low_u, low_up, None, factors, low=low, turned=turned, low_scale=post_scale, largest=largest)
    return scaled_mm(low, low_down.T, post_scale, down_scale, u.dtype), low, turned, largest


@_mlp_low.register_fake
def _(u: Tensor, up: Tensor, *others: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    shape = u.shape[0], up.shape[0]
    both = u.new_empty(shape, dtype=E4M3), u.new_empty(shape[::-1], dtype=E4M3)
    return torch.empty_like(u), *both, u.new_empty(1, dtype=torch.float32)


@torch.library.custom_op("speedrun::mlp_low_gradients", mutates_args=())
def _low_gradients(
    grad: Tensor, low_u: Tensor, low: Tensor, turned: Tensor, post_scale: Tensor,
    up_by_column: Tensor, up_scale: Tensor, down_by_row: Tensor, down_scale: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of u (L, d), up and down (h, d), in grad's dtype, from 8-bit operands alone."""
    grad, device, dtype = grad.contiguous(), grad.device, grad.dtype
    scale, u_scale = constant(GRADIENT_SCALE, device), constant(input_scale(grad.shape[1]), device)
    rows, columns = torch.empty_like(grad, dtype=E5M2), grad.new_empty(grad.shape[::-1], dtype=E5M2)
    quantise(grad[None], scale[None], rows[None], columns[None])
    d_down = scaled_mm(turned, columns.T, post_scale, scale, dtype, fast=False)
    pre, pre_turned = torch.empty_like(low, dtype=E5M2), torch.empty_like(turned, dtype=E5M2)
    _launch(
        rows, down_by_row, None, (scale, down_scale), post=low, post_scale=post_scale,
        low=pre, turned=pre_turned, low_scale=scale,
    )  # fmt: skip
    d_up = scaled_mm(pre_turned, transpose_bytes(low_u).T, scale, u_scale, dtype, fast=False)
    return scaled_mm(pre, up_by_column.T, scale, up_scale, dtype, fast=False), d_up, d_down


@_low_gradients.register_fake
def _(grad: Tensor, low_u: Tensor, low: Tensor, *others: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    weights = (low.shape[1], grad.shape[1])
    return grad.new_empty(grad.shape), grad.new_empty(weights), grad.new_empty(weights)


def _save_low(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: tuple) -> None:
    _, _, _, low_u, _, up_scale, _, down_scale, post_scale, up_by_column, down_by_row = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(
        low_u, output[1], output[2], post_scale, up_by_column, up_scale, down_by_row, down_scale
    )


def _backward_low(
    ctx: torch.autograd.function.FunctionCtx, grad: Tensor, *_: Tensor
) -> tuple[Tensor | None, ...]:
    return *torch.ops.speedrun.mlp_low_gradients(grad, *ctx.saved_tensors), *(None,) * 8


_mlp_low.register_autograd(_backward_low, setup_context=_save_low)


class Tiles(NamedTuple):
    """How a product is cut: a program's tile (m, n), k summed at a time, that many pieces under way, warps."""

    m: int
    n: int
    k: int
    stages: int
    warps: int


def tiles(shared_bytes: int, eight_bit: bool, end_bytes: int) -> Tiles:
    """For a GPU with so much shared memory a program: as many pieces under way as fit beside what goes in and out.

    end_bytes: of one number of the result, over all tensors that the end of a tile reads and writes.
    """
    m, n, k = (128, 256, 64) if shared_bytes >= 220 * 1024 else (128, 128, 64)  # Hopper and B200, or others
    ends = m * n // 2 * end_bytes  # half a tile each
    stages = (shared_bytes - ends - 2048) // ((m + n) * k * (1 if eight_bit else 2))
    return Tiles(m, n, k, min(7, stages), 8)


def _launch(
    a: Tensor,
    b: Tensor,
    out: Tensor | None,
    factors: tuple[Tensor, Tensor] | None = None,
    post: Tensor | None = None,
    post_scale: Tensor | None = None,
    low: Tensor | None = None,
    turned: Tensor | None = None,
    low_scale: Tensor | None = None,
    largest: Tensor | None = None,
) -> None:
    """out (M, N) = relu(A B^T)^2, or with `post` (M, N): 2 (A B^T) sqrt(post).  A: (M, K), B: (N, K), row-major.

    factors: scales of an 8-bit A and B. post_scale: of an 8-bit post. low: (M, N), out / low_scale in 8 bits; turned:
    (N, M), the same transposed, M a multiple of 16. largest: (1,), raised to out's largest.
    """
    (rows, depth), columns = a.shape, b.shape[0]
    if columns % 16 or depth % 16:
        raise ValueError(f"mlp: width and hidden width {depth}, {columns}: must be multiples of 16")
    if turned is not None and rows % 16:
        raise ValueError(f"mlp: {rows} tokens: must be a multiple of 16 in 8 bits")
    if a.is_cuda:
        properties = torch.cuda.get_device_properties(a.device)
        programs, shared = properties.multi_processor_count, properties.shared_memory_per_block_optin
        ends = sum(tensor.element_size() for tensor in (out, post, low, turned) if tensor is not None)
        cut = tiles(shared, factors is not None, ends)
    else:
        programs, cut = 3, Tiles(32, 64, 32, 1, 4)
    half = [cut.m, cut.n // 2]

    def described(tensor: Tensor | None, block: list[int]) -> "TensorDescriptor | None":
        return None if tensor is None else TensorDescriptor.from_tensor(tensor, block)

    with on_device_of(a):
        _relu_square_kernel[(programs,)](
            described(a, [cut.m, cut.k]), described(b, [cut.n, cut.k]), described(out, half),
            described(post, half), described(low, half), described(turned, half[::-1]),
            *(factors or (None, None)), post_scale, low_scale, largest, rows, columns, depth,
            TOP=1.0 if low is None else LARGEST[low.dtype], PROGRAMS=programs,
            BLOCK_M=cut.m, BLOCK_N=cut.n, BLOCK_K=cut.k, num_stages=cut.stages, num_warps=cut.warps,
        )  # fmt: skip


if triton is not None:

    @triton.jit
    def _finish(sums, row, column, out, post, low, turned, from_post, to_low, TOP: tl.constexpr):
        """Store half a tile; returns the largest entry of each of its rows."""
        if post is not None:
            value = 2.0 * sums * tl.sqrt(post.load([row, column]).to(tl.float32) * from_post)
        else:
            value = tl.maximum(sums, 0.0)
            value *= value
        if out is not None:
            out.store([row, column], value.to(out.dtype))
        if low is not None:
            rounded = tl.minimum(tl.maximum(value * to_low, -TOP), TOP).to(low.dtype)
            low.store([row, column], rounded)
            if turned is not None:
                turned.store([column, row], tl.trans(rounded))
        return tl.max(value, axis=1)

    @triton.jit
    def _relu_square_kernel(
        a, b, out, post, low, turned, a_scale, b_scale, post_scale, low_scale, largest, M, N, K,
        TOP: tl.constexpr, PROGRAMS: tl.constexpr,
        BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    ):  # fmt: skip
        """As many programs as multiprocessors, each taking every PROGRAMS-th tile: one tile's stores overlap the next
        one's loads. Tiles of one row of A follow each other: it is read once, and B stays in the L2 cache.

        a, b, out, post, low, turned are tensor descriptors: copy-engine instructions on Hopper, plain loads before it;
        what lies beyond an edge reads as zero and is not written.
        """
        across = tl.cdiv(N, BLOCK_N)
        count = tl.cdiv(M, BLOCK_M) * across
        HALF: tl.constexpr = BLOCK_N // 2
        factor = 1.0
        if a_scale is not None:
            factor = tl.load(a_scale) * tl.load(b_scale)
        from_post = 1.0
        if post_scale is not None:
            from_post = tl.load(post_scale)
        to_low = 1.0
        if low is not None:
            to_low = 1.0 / tl.load(low_scale)
        top = tl.zeros((BLOCK_M,), tl.float32)
        # Counted apart, or the end of a tile would wait for the next one's loads.
        done = tl.program_id(0) - PROGRAMS
        for tile in tl.range(tl.program_id(0), count, PROGRAMS, flatten=True):
            sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            for k in range(tl.cdiv(K, BLOCK_K)):
                left = a.load([tile // across * BLOCK_M, k * BLOCK_K])
                right = b.load([tile % across * BLOCK_N, k * BLOCK_K])
                sums = tl.dot(left, right.T, sums)
            done += PROGRAMS
            row, column = done // across * BLOCK_M, done % across * BLOCK_N
            # In two halves, each with a store of its own: half as much shared memory for what is on its way out.
            first, second = tl.split(tl.permute(tl.reshape(sums, (BLOCK_M, 2, HALF)), (0, 2, 1)))
            top = tl.maximum(
                top, _finish(first * factor, row, column, out, post, low, turned, from_post, to_low, TOP)
            )
            top = tl.maximum(
                top,
                _finish(second * factor, row, column + HALF, out, post, low, turned, from_post, to_low, TOP),
            )
        if largest is not None:
            tl.atomic_max(largest, tl.max(top, axis=0))
