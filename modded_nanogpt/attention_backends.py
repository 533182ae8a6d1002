"""Attention over packed documents: four implementations behind one function, chosen once.

varlen     torch's own FlashAttention 2 (Dao 2023, arXiv 2307.08691), what torch.nn.attention.varlen calls: sm_80 and
           later, nothing to install
fa3        FlashAttention 3 (Shah et al. 2024, arXiv 2407.08608) on Hopper, from a prebuilt library where one is there
triton     our kernel for packed documents and short windows, `kernels/attention.py`
reference  plain torch in blocks, any device: for the CPU and for comparison

Each is one operator that `torch.compile` takes whole. The window reaches it as a tensor on the CPU: its value is read
when the operator runs, so that one compiled graph serves all windows.
"""

import ctypes
import importlib.util
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from modded_nanogpt.kernels import attention as packed
from modded_nanogpt.kernels.launch import INTERPRETED, triton
from modded_nanogpt.kernels.reference import attention as reference
from nanogpt.common.errors import UserError

# attend(q, k, v, cu_seqlens, doc_start, doc_end, max_document, window) -> (T, H, D); see `Backend`.
Attend = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, int, Tensor], Tensor]

# What `auto` takes, the first that runs here. Forward and backward of 49,152 tokens in 74 documents, 6 heads of 128, at
# windows 128 / 640 / 1408: varlen 0.82 / 1.29 / 1.58 ms, triton 0.48 / 0.99 / 1.22, fa3 (which has to be installed)
# 0.57 / 0.91 / 1.01; benchmarks/speedrun_attention.py on one H200, torch 2.11.0+cu130.
PREFERRED = {"cuda": ("triton", "varlen", "reference"), "other": ("reference",)}
FA3_LIBRARY = "pip install --no-deps xformers==0.0.34 nvidia-cuda-runtime-cu12"


@dataclass(frozen=True)
class Backend:
    """What was chosen and why, for the log, and the function.

    attend(q, k, v, cu_seqlens, doc_start, doc_end, max_document, window): q, k, v (T, H, D), any strides; cu_seqlens
    (N,) int32, the first place of each document, then T, repeated as often as there are empty documents; doc_start,
    doc_end as `documents` makes them; max_document: at least the longest document; window: 0-dim int32 on the CPU.
    Query i sees the keys max(doc_start[i], i - window) .. i. Softmax scale 1: q comes scaled.
    """

    name: str
    why: str
    attend: Attend


def choose(wanted: str, device: torch.device, dtype: torch.dtype) -> Backend:
    """The backend for --attention=`wanted`; UserError when one is named that cannot run: no other is used instead."""
    if wanted != "auto":
        if wanted not in _BACKENDS:
            raise UserError(f"--attention={wanted}: unknown; use auto or one of {', '.join(_BACKENDS)}")
        problem = _problem(wanted, device, dtype)
        if problem is not None:
            raise UserError(f"--attention={wanted}: {problem}; --attention=auto takes one that runs here")
        return Backend(wanted, "asked for", _BACKENDS[wanted])
    passed = []
    for name in PREFERRED.get(device.type, PREFERRED["other"]):
        problem = _problem(name, device, dtype)
        if problem is None:
            first = f"auto: the first for {device.type} that runs here"
            return Backend(name, "; ".join([first, *passed]), _BACKENDS[name])
        passed.append(f"not {name}: {problem}")
    raise UserError(f"--attention=auto: nothing runs on {device}: {'; '.join(passed)}")


def documents(cu_seqlens: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """(doc_start, doc_end), each (tokens,) int32: the place where each token's document begins, and ends.

    cu_seqlens: (N,) int32 as in `Backend`. Traceable: shapes depend on nothing but `tokens`.
    """
    places = torch.arange(tokens, dtype=torch.int32, device=cu_seqlens.device)
    behind = torch.searchsorted(cu_seqlens, places, right=True)
    return cu_seqlens[behind - 1], cu_seqlens[behind]


def _problem(name: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why a backend cannot run here, None when it can. Loads what it needs."""
    if name == "reference":
        return None
    if device.type != "cuda":
        interpreted = name == "triton" and INTERPRETED
        return None if interpreted else f"needs a CUDA GPU, the device is {device}"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"needs bfloat16 or float16, not {dtype}"
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        return f"needs compute capability 8.0, this GPU has {capability[0]}.{capability[1]}"
    if name == "triton":
        return "Triton is not installed" if triton is None else None
    if name == "fa3":
        return _load_fa3(capability)
    if not torch.backends.cuda.is_flash_attention_available():
        return f"torch {torch.__version__} was built without FlashAttention"
    if getattr(torch.nn.attention, "current_flash_attention_impl", lambda: None)() is not None:
        torch.nn.attention.restore_flash_attention_impl()
    return None


def _load_fa3(capability: tuple[int, int]) -> str | None:
    """Make torch's FlashAttention calls run version 3; why that cannot be, or None.

    From the package `flash_attn_interface` (a build of one's own), or the library inside of the xformers wheel: it is
    built against torch's stable interface, so that it loads under other versions of torch than it was made for.
    """
    if capability != (9, 0):
        return f"is for Hopper (9.0), this GPU has {capability[0]}.{capability[1]}"
    activate = getattr(torch.nn.attention, "activate_flash_attention_impl", None)
    if activate is None:
        return f"torch {torch.__version__} cannot take it, 2.11 can"
    try:
        if (
            "flash_attn_interface" not in sys.modules
            and importlib.util.find_spec("flash_attn_interface") is None
        ):
            library = _xformers_library()
            if library is None:
                return f"is not installed ({FA3_LIBRARY})"
            torch.ops.load_library(str(library))
            # torch imports a module of this name and then asks only for the operators that the library registered.
            sys.modules["flash_attn_interface"] = types.ModuleType("flash_attn_interface")
        activate("FA3")
    except (ImportError, OSError, RuntimeError, AttributeError, ValueError) as error:
        return "did not load: " + " ".join(str(error).split())[:300]
    return None


def _xformers_library() -> Path | None:
    """FlashAttention 3 inside of an installed xformers, which is not imported; its CUDA 12 runtime gets loaded."""
    package = importlib.util.find_spec("xformers")
    if package is None or package.origin is None:
        return None
    library = next(iter(sorted((Path(package.origin).parent / "flash_attn_3").glob("_C*.so"))), None)
    runtime = importlib.util.find_spec("nvidia")
    for folder in runtime.submodule_search_locations or () if runtime else ():
        for file in (Path(folder) / "cuda_runtime" / "lib").glob("libcudart.so.12*"):
            ctypes.CDLL(str(file), mode=ctypes.RTLD_GLOBAL)
    return library


@torch.library.custom_op("speedrun::attention_flash", mutates_args=())
def _flash(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_document: int, window: Tensor
) -> tuple[Tensor, Tensor]:
    """FlashAttention 2 or 3, whichever torch's call runs in this process: (output (T, H, D), log-sum-exp (H, T))."""
    lengths = (cu_seqlens, cu_seqlens, max_document, max_document)
    q, k, v = (packed.rows_together(x) for x in (q, k, v))
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        q, k, v, *lengths, 0.0, False, False, scale=1.0, window_size_left=int(window), window_size_right=0
    )
    return out.contiguous(), lse


@_flash.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_document: int, window: Tensor
) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)


@torch.library.custom_op("speedrun::attention_flash_backward", mutates_args=())
def _flash_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, cu_seqlens: Tensor,
    max_document: int, window: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    lengths = (cu_seqlens, cu_seqlens, max_document, max_document)
    grad, q, k, v = (packed.rows_together(x) for x in (grad, q, k, v))
    no_dropout = torch.zeros(2, dtype=torch.uint64, device=q.device)
    gradients = torch.ops.aten._flash_attention_backward(
        grad, q, k, v, out, lse, *lengths, 0.0, False, no_dropout, no_dropout,
        scale=1.0, window_size_left=int(window), window_size_right=0,
    )  # fmt: skip
    return tuple(x.contiguous() for x in gradients)


@_flash_backward.register_fake
def _(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, cu_seqlens: Tensor,
    max_document: int, window: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _flash_save(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: tuple) -> None:
    q, k, v, cu_seqlens, ctx.max_document, window = inputs
    ctx.save_for_backward(q, k, v, *output, cu_seqlens, window)


def _flash_gradients(ctx: torch.autograd.function.FunctionCtx, grad: Tensor, _: Tensor | None) -> tuple:
    *saved, window = ctx.saved_tensors
    gradients = torch.ops.speedrun.attention_flash_backward(grad, *saved, ctx.max_document, window)
    return (*gradients, None, None, None)


_flash.register_autograd(_flash_gradients, setup_context=_flash_save)


@torch.library.custom_op("speedrun::attention_reference", mutates_args=())
def _reference(q: Tensor, k: Tensor, v: Tensor, doc_start: Tensor, window: Tensor) -> Tensor:
    return reference.attention(q, k, v, doc_start, int(window))


@_reference.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, doc_start: Tensor, window: Tensor) -> Tensor:
    return v.new_empty(v.shape)


@torch.library.custom_op("speedrun::attention_reference_backward", mutates_args=())
def _reference_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, doc_start: Tensor, window: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return reference.attention_gradients(grad, q, k, v, doc_start, int(window))


@_reference_backward.register_fake
def _(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, doc_start: Tensor, window: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _reference_save(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _reference_gradients(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple:
    return (*torch.ops.speedrun.attention_reference_backward(grad, *ctx.saved_tensors), None, None)


_reference.register_autograd(_reference_gradients, setup_context=_reference_save)


def _attend_flash(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, doc_start: Tensor, doc_end: Tensor,
    max_document: int, window: Tensor,
) -> Tensor:  # fmt: skip
    return torch.ops.speedrun.attention_flash(q, k, v, cu_seqlens, max_document, window)[0]


def _attend_triton(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, doc_start: Tensor, doc_end: Tensor,
    max_document: int, window: Tensor,
) -> Tensor:  # fmt: skip
    return packed.attention(q, k, v, doc_start, doc_end, window)


def _attend_reference(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, doc_start: Tensor, doc_end: Tensor,
    max_document: int, window: Tensor,
) -> Tensor:  # fmt: skip
    return torch.ops.speedrun.attention_reference(q, k, v, doc_start, window)


_BACKENDS: dict[str, Attend] = {
    "varlen": _attend_flash,
    "fa3": _attend_flash,
    "triton": _attend_triton,
    "reference": _attend_reference,
}
