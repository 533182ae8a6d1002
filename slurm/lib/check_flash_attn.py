"""Compares an installed FlashAttention with torch's own attention: `python check_flash_attn.py fa2|fa3|prebuilt`.

Reference: attention in float32. The kernel in bfloat16 may be at most twice as far from it as torch's bfloat16
attention is, for the output and for the three gradients, causal, at head sizes 64 and 128.
"""

import importlib.util
import sys
import types
from collections.abc import Callable
from pathlib import Path

BATCH, TOKENS, HEADS = 2, 777, 4  # an odd length finds wrong masks


def main(argv: list[str]) -> int:
    """0 when the numbers agree, 1 when they do not, 2 when there is nothing to compare."""
    if len(argv) != 1 or argv[0] not in ("fa2", "fa3", "prebuilt"):
        print("error: usage: check_flash_attn.py fa2|fa3|prebuilt", file=sys.stderr)
        return 2
    import torch

    if not torch.cuda.is_available():
        print(
            "error: no GPU here: FlashAttention is installed but not checked; run it in a job",
            file=sys.stderr,
        )
        return 2
    attention = load(argv[0])
    worst = 0.0
    for head_size in (64, 128):
        ratio = compare(attention, head_size)
        print(f"{argv[0]}: head size {head_size}: error {ratio:.2f} times that of torch's bfloat16 attention")
        worst = max(worst, ratio)
    if not worst <= 2:
        print(
            f"error: {argv[0]}: {worst:.1f} times torch's error: this build is wrong, do not use it",
            file=sys.stderr,
        )
        return 1
    print(f"{argv[0]}: agrees with torch on {torch.cuda.get_device_name()}")
    return 0


def load(kind: str) -> Callable:
    """attention(q, k, v) -> output, all [batch, tokens, heads, head size], causal."""
    import torch

    if kind == "fa2":
        from flash_attn import flash_attn_func

        return lambda q, k, v: flash_attn_func(q, k, v, causal=True)
    if kind == "fa3":
        from flash_attn_interface import flash_attn_func

        def attention(q, k, v):
            out = flash_attn_func(q, k, v, causal=True)
            return out[0] if isinstance(out, tuple) else out

        return attention
    found = importlib.util.find_spec("xformers")  # found, not imported: its own modules want their own torch
    for place in found.submodule_search_locations or []:
        torch.ops.load_library(str(Path(place) / "flash_attn_3" / "_C.so"))
    from torch.nn.attention import activate_flash_attention_impl
    from torch.nn.attention.varlen import varlen_attn

    sys.modules.setdefault(
        "flash_attn_interface", types.ModuleType("flash_attn_interface")
    )  # torch asks for it
    activate_flash_attention_impl("FA3")

    def packed(q, k, v):
        batch, tokens = q.shape[:2]
        starts = torch.arange(0, (batch + 1) * tokens, tokens, dtype=torch.int32, device=q.device)
        flat = [x.reshape(batch * tokens, *x.shape[2:]) for x in (q, k, v)]
        out = varlen_attn(*flat, starts, starts, tokens, tokens, window_size=(-1, 0))
        return out.view(q.shape)

    return packed


def compare(attention: Callable, head_size: int) -> float:
    """The largest ratio of errors over output and gradients; NaN when the kernel gives NaN."""
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    def torchs(q, k, v):
        return scaled_dot_product_attention(
            *(x.transpose(1, 2) for x in (q, k, v)), is_causal=True
        ).transpose(1, 2)

    torch.manual_seed(0)
    shape = (BATCH, TOKENS, HEADS, head_size)
    inputs = [torch.randn(shape, device="cuda") for _ in range(4)]

    def results(function: Callable, dtype: torch.dtype) -> list[torch.Tensor]:
        q, k, v, upstream = (x.to(torch.bfloat16).to(dtype) for x in inputs)
        leaves = [x.requires_grad_() for x in (q, k, v)]
        out = function(*leaves)
        return [x.float() for x in (out, *torch.autograd.grad(out, leaves, upstream))]

    exact, plain = results(torchs, torch.float32), results(torchs, torch.bfloat16)
    ours = results(attention, torch.bfloat16)
    ratios = [
        (mine - right).abs().max() / (theirs - right).abs().max()
        for mine, theirs, right in zip(ours, plain, exact, strict=True)
    ]
    return torch.stack(ratios).max().item()


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
