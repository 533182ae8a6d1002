"""8-bit floating point: whether it is used, how tensors become it, and products of such tensors.

Activations and weights are kept in e4m3 (3 bits of mantissa, up to 448), gradients in e5m2 (2 bits, 2^-16 to 57,344),
as Micikevicius et al. 2022 (arXiv 2209.05433) propose: `low` = tensor / scale, clamped and rounded, one scale a tensor.
Tensor cores of Hopper and Ada read both operands along the summed axis, so what enters two products with different
summed axes is needed in two layouts: `quantise` writes both in one pass, and finds the largest entry on the way.
"""

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from modded_nanogpt.kernels.launch import on_device_of
from nanogpt.common.errors import UserError

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
LARGEST = {E4M3: 448.0, E5M2: 57344.0}
BLOCK = 64  # tiles of the copies, in rows and in columns


@dataclass(frozen=True)
class Choice:
    """Which matrix products may read 8-bit operands here, and the reason in words for the log."""

    head: bool
    mlp: bool
    why: str


def choose(wanted: str, device: torch.device) -> Choice:
    """The `fp8` knob (auto, force, off) against the hardware.

    The head needs FP8 tensor cores: Ada (sm_89) and later. The MLP's kernel also needs a copy engine for its tiles,
    without which Triton fetches them one at a time: Hopper (sm_90) and later. CPUs and older GPUs compute in the
    activations' dtype. UserError when FP8 is forced where there is none.
    """
    if wanted == "off":
        return Choice(False, False, "switched off")
    if device.type != "cuda":
        return _none(wanted, f"device {device.type} has no FP8 products")
    major, minor = torch.cuda.get_device_capability(device)
    name = f"{torch.cuda.get_device_name(device)} (sm_{major}{minor})"
    if triton is None:
        return _none(wanted, f"{name}: this torch comes without Triton")
    if (major, minor) < (8, 9):
        return _none(wanted, f"{name} has no FP8 products")
    if major < 9:
        return Choice(True, False, f"{name}: the head only, as the MLP's kernel needs Hopper's copy engine")
    return Choice(True, True, name)


def _none(wanted: str, why: str) -> Choice:
    if wanted == "force":
        raise UserError(f"--fp8=force: {why}; use --fp8=auto, which takes bfloat16 there")
    return Choice(False, False, why)


@cache
def constant(value: float, device: torch.device) -> Tensor:
    """A float32 scalar on the device, made once and kept (graphs read it): what a product takes as a fixed scale."""
    return torch.full((), value, dtype=torch.float32, device=device)


def scales(count: int, value: float, device: torch.device) -> Tensor:
    """(count,) float32 whose entries lie 16 bytes apart: cuBLAS refuses a scale at any other address."""
    return torch.full((count, 4), value, dtype=torch.float32, device=device)[:, 0]


def scaled_mm(
    a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor, out_dtype: torch.dtype, fast: bool = True
) -> Tensor:
    """(a x a_scale) (b x b_scale), float32 sums. a: (M, K) row-major 8-bit; b: (K, N) column-major 8-bit.

    K and N must be multiples of 16. `fast` keeps the sums within the tensor cores for longer, at a little precision.
    For use within custom ops: the scales' addresses are checked here, and inductor would drop the copy.
    """
    a_scale, b_scale = (
        scale if scale.data_ptr() % 16 == 0 else scale.clone() for scale in (a_scale, b_scale)
    )
    return torch._scaled_mm(a, b, a_scale, b_scale, out_dtype=out_dtype, use_fast_accum=fast)


def to_low(tensor: Tensor, scale: Tensor | float, dtype: torch.dtype = E4M3) -> Tensor:
    """tensor / scale, clamped and rounded, in plain torch: inductor fuses it into what produces the tensor."""
    largest = LARGEST[dtype]
    return (tensor.float() / scale).clamp(-largest, largest).to(dtype)


def quantise(
    matrices: Tensor,
    scale: Tensor,
    rows: Tensor | None = None,
    columns: Tensor | None = None,
    largest: Tensor | None = None,
) -> None:
    """Write 8-bit copies of `matrices` / `scale`: (n, R, C), contiguous matrices at any stride from each other.

    scale: (n,) float32, any stride. Each of these may be left out:
    rows: (n, R, C) of an 8-bit dtype. columns: (n, C, R) of an 8-bit dtype, the same values transposed.
    largest: (n,) float32, any stride, raised to the largest |entry| of each matrix (of `matrices`, not of the copies).
    On a GPU columns are made of bfloat16 only: Triton 3.6 turns a tile that was loaded as float32 with a quarter wrong.
    """
    count, height, width = matrices.shape
    if columns is not None and matrices.is_cuda and matrices.dtype != torch.bfloat16:
        raise ValueError(f"quantise: columns of {matrices.dtype}: give bfloat16")
    if matrices.stride()[1:] != (width, 1):
        raise ValueError(f"quantise: strides {matrices.stride()}: each matrix must be contiguous")
    target = columns if rows is None else rows
    grid = (triton.cdiv(height, BLOCK), triton.cdiv(width, BLOCK), count)
    with on_device_of(matrices):
        _quantise_kernel[grid](
            matrices, scale, rows, columns, largest, matrices.stride(0), scale.stride(0),
            1 if largest is None else largest.stride(0), height, width,
            TOP=LARGEST[target.dtype], BLOCK=BLOCK, num_warps=4,
        )  # fmt: skip


def transpose_bytes(matrix: Tensor) -> Tensor:
    """(R, C) of a one-byte dtype, contiguous, R even -> (C, R), contiguous."""
    height, width = matrix.shape
    if height % 2 or not matrix.is_contiguous():
        raise ValueError(
            f"transpose_bytes: {tuple(matrix.shape)}, strides {matrix.stride()}: needs whole pairs of rows"
        )
    target = torch.empty(width, height, dtype=matrix.dtype, device=matrix.device)
    grid = (triton.cdiv(height, 2 * BLOCK), triton.cdiv(width, 2 * BLOCK))
    with on_device_of(matrix):
        _transpose_kernel[grid](
            matrix.view(torch.uint8), target.view(torch.int16), height // 2, width, BLOCK=BLOCK, num_warps=4
        )
    return target


if triton is not None:

    @triton.jit
    def _quantise_kernel(
        source, scale, rows, columns, largest, stride, scale_stride, largest_stride, R, C,
        TOP: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        matrix = tl.program_id(2).to(tl.int64)
        row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = (row[:, None] < R) & (column[None, :] < C)
        along, across = row[:, None] * C + column[None, :], column[:, None] * R + row[None, :]
        tile = tl.load(source + matrix * stride + along, mask=inside, other=0.0).to(tl.float32)
        if largest is not None:
            tl.atomic_max(largest + matrix * largest_stride, tl.max(tl.abs(tile)))
        low = tile / tl.load(scale + matrix * scale_stride)
        low = tl.minimum(tl.maximum(low, -TOP), TOP)
        if rows is not None:
            tl.store(rows + matrix * R * C + along, low.to(rows.dtype.element_ty), mask=inside)
        if columns is not None:
            turned = tl.trans(low.to(columns.dtype.element_ty))
            tl.store(columns + matrix * R * C + across, turned, mask=tl.trans(inside))

    @triton.jit
    def _transpose_kernel(source, target, pairs, C, BLOCK: tl.constexpr):
        """By pairs of rows: the tensor cores' load instruction turns 16-bit tiles, and none turns bytes.

        Offsets take 64 bits: the gradient of the logits has more than 2^31 entries.
        """
        pair = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        column = tl.program_id(1).to(tl.int64) * (2 * BLOCK) + tl.arange(0, 2 * BLOCK)
        inside = (pair[:, None] < pairs) & (column[None, :] < C)
        upper = source + 2 * pair[:, None] * C + column[None, :]
        first, second = tl.load(upper, mask=inside), tl.load(upper + C, mask=inside)
        both = (first.to(tl.uint16) | (second.to(tl.uint16) << 8)).to(tl.int16, bitcast=True)
        tl.store(target + column[:, None] * pairs + pair[None, :], tl.trans(both), mask=tl.trans(inside))
