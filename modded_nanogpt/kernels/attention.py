"""Causal attention in a sliding window over packed documents, as one operator that `torch.compile` takes whole.

What it is for: the speedrun packs documents of 32 to 2,048 tokens and looks back 128 to 1,664. At these sizes three
quarters of the time of a general kernel is not matrix work: it launches tiles for each document and for the longest
document, and masks most of them. This one tiles the packed buffer itself (see `attention_kernels`).

The window comes as a tensor on the CPU, so that one compiled graph serves every window; its value picks the tiles
from a table here, so that nothing is tuned at run time. Gradients are sums in a fixed order: equal inputs, equal bits.
The plain twin is `reference/attention.py`.
"""

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from modded_nanogpt.kernels.launch import on_device_of


@dataclass(frozen=True)
class Tiles:
    """One program holds `rows` queries (or keys) and walks over the others `step` at a time."""

    rows: int
    step: int
    warps: int
    stages: int  # tiles in flight, with the one in use


@dataclass(frozen=True)
class Plan:
    """The tiles of the three kernels."""

    forward: Tiles
    query_gradient: Tiles
    key_gradient: Tiles


# Hopper and Blackwell data-centre GPUs: the fastest of seven shapes with two and three stages at windows 128, 640, by
# benchmarks/speedrun_attention.py --sweep=true on an H200, torch 2.11.0+cu130. Small programs win: several share a
# multiprocessor and hide each other's start and end.
SHORT_WINDOW = 256
LARGE_SHORT = Plan(Tiles(64, 32, 4, 3), Tiles(64, 32, 4, 2), Tiles(64, 32, 4, 3))
LARGE_LONG = Plan(Tiles(64, 64, 4, 3), Tiles(64, 32, 4, 2), Tiles(64, 32, 4, 3))
# Elsewhere (sm_80, 86, 89, 120) the tensor cores take their operands from registers, and large tiles would spill them.
SMALL = Plan(Tiles(64, 64, 4, 2), Tiles(64, 32, 4, 2), Tiles(64, 32, 4, 2))


def attention(q: Tensor, k: Tensor, v: Tensor, doc_start: Tensor, doc_end: Tensor, window: Tensor) -> Tensor:
    """(T, H, V): query i over the keys max(doc_start[i], i - window) .. i, softmax scale 1.

    q, k: (T, H, D); v: (T, H, V), bfloat16 or float16, any strides; D, V <= 128. doc_start, doc_end: (T,) int32, the
    first place of each token's document and the place behind its last. window: 0-dim int32 on the CPU, >= 0; it must
    keep its value until backward.
    """
    return torch.ops.speedrun.attention(q, k, v, doc_start, doc_end, window)[0]


@torch.library.custom_op("speedrun::attention", mutates_args=())
def _attention(
    q: Tensor, k: Tensor, v: Tensor, doc_start: Tensor, doc_end: Tensor, window: Tensor
) -> tuple[Tensor, Tensor]:
    """(output (T, H, V), log2 of the sums of exponentials (H, T) float32)."""
    return forward(q, k, v, doc_start, int(window), plan_for(q, int(window)).forward)


@_attention.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, doc_start: Tensor, doc_end: Tensor, window: Tensor
) -> tuple[Tensor, Tensor]:
    return v.new_empty(v.shape), q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)


@torch.library.custom_op("speedrun::attention_backward", mutates_args=())
def _attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    doc_start: Tensor, doc_end: Tensor, window: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    width = int(window)
    return backward(grad, q, k, v, out, lse, doc_start, doc_end, width, plan_for(q, width))


@_attention_backward.register_fake
def _(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    doc_start: Tensor, doc_end: Tensor, window: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: tuple) -> None:
    q, k, v, doc_start, doc_end, window = inputs
    ctx.save_for_backward(q, k, v, *output, doc_start, doc_end, window)


def _gradients(ctx: torch.autograd.function.FunctionCtx, grad: Tensor, _: Tensor | None) -> tuple:
    return (*torch.ops.speedrun.attention_backward(grad, *ctx.saved_tensors), None, None, None)


_attention.register_autograd(_gradients, setup_context=_save)


def forward(
    q: Tensor, k: Tensor, v: Tensor, doc_start: Tensor, window: int, tiles: Tiles
) -> tuple[Tensor, Tensor]:
    """(output, log-sum-exp) with given tiles; what the operator runs, and what the benchmark tries tiles with."""
    from modded_nanogpt.kernels.attention_kernels import forward_kernel

    q, k, v = (rows_together(x) for x in (q, k, v))
    tokens, heads, _ = q.shape
    out = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    lse = torch.empty((heads, tokens), dtype=torch.float32, device=q.device)
    _launch(
        forward_kernel, tiles, q, v,
        q, k, v, out, lse, doc_start, min(window, tokens), tokens, *strides(q, k, v, out),
    )  # fmt: skip
    return out, lse


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    doc_start: Tensor, doc_end: Tensor, window: int, plan: Plan,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(dq, dk, dv) with given tiles, contiguous, in the dtypes of q, k, v. `out`, `lse`: from `forward`."""
    from modded_nanogpt.kernels.attention_kernels import key_gradient_kernel, query_gradient_kernel

    grad, q, k, v = (rows_together(x) for x in (grad, q, k, v))
    tokens = q.shape[0]
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    delta = torch.empty_like(lse)
    window = min(window, tokens)
    _launch(
        query_gradient_kernel, plan.query_gradient, q, v,
        q, k, v, out, grad, lse, delta, dq, doc_start, window, tokens, *strides(q, k, v, out, grad, dq),
    )  # fmt: skip
    _launch(
        key_gradient_kernel, plan.key_gradient, q, v,
        q, k, v, grad, lse, delta, dk, dv, doc_end, window, tokens, *strides(q, k, v, grad, dk, dv),
    )  # fmt: skip
    return dq, dk, dv


def plan_for(q: Tensor, window: int) -> Plan:
    """The tiles for q's GPU and a window."""
    if not _large(q.device):
        return SMALL
    return LARGE_SHORT if window <= SHORT_WINDOW else LARGE_LONG


@cache
def _large(device: torch.device) -> bool:
    """Whether operands come from shared memory, of which one program can have 227 KiB."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] in (9, 10)


def _launch(kernel: object, tiles: Tiles, q: Tensor, v: Tensor, *arguments: object) -> None:
    """Run `kernel` with one program for each tile of rows and each head."""
    tokens, heads, dimensions = q.shape
    value_dimensions = v.shape[2]
    widths = [padded(dimensions), padded(value_dimensions)]
    fits = tokens % max(tiles.rows, tiles.step) == 0 and widths == [dimensions, value_dimensions]
    grid = (-(-tokens // tiles.rows), heads)
    with on_device_of(q):
        kernel[grid](
            *arguments, D=dimensions, V=value_dimensions, D_WIDTH=widths[0], V_WIDTH=widths[1],
            ROWS=tiles.rows, STEP=tiles.step, EVEN=fits, num_warps=tiles.warps, num_stages=tiles.stages,
        )  # fmt: skip


def rows_together(x: Tensor) -> Tensor:
    """x itself when a head's row lies together in memory, a copy otherwise."""
    return x if x.stride(-1) == 1 else x.contiguous()


def strides(*tensors: Tensor) -> list[int]:
    """The strides over tokens and heads of each (T, H, D) tensor, in the order of the kernels' arguments."""
    return [tensor.stride(axis) for tensor in tensors for axis in (0, 1)]


def padded(size: int) -> int:
    """The side of a tile that holds `size` dimensions: a power of 2, at least what tensor cores take."""
    return max(16, 1 << (size - 1).bit_length())
