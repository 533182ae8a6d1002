"""The machine code for GPUs that are not here: kernels must compile, use the tensor cores and the copy engine, and fit.

Triton brings a compiler for every generation, so this needs no GPU. What it cannot tell is how fast the code is.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
SHARED_BYTES = {90: 232_448, 120: 101_376}  # what one program may have on Hopper, and on RTX PRO 6000
FP8_MLP = [("fp8e4nv", "fp8e4nv", False, "fp8e4nv"), ("fp8e5", "fp8e4nv", True, "fp8e5")]
BF16_MLP = [("bf16", "bf16", False, None), ("bf16", "bf16", True, None)]


def compiled(kernel: object, capability: int, arguments: dict[str, object], **options: int) -> object:
    """`kernel` as Triton compiles it. Types are strings, `!` marks multiples of 16; all else is a constant."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, constants, attributes = {}, {}, {}
    for place, name in enumerate(kernel.arg_names):
        value = arguments[name]
        signature[name] = value.rstrip("!") if isinstance(value, str) else "constexpr"
        if not isinstance(value, str):
            constants[(place,)] = value
        elif value[0] == "*" or value[-1] == "!":
            attributes[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def row_kernel(capability: int, gradient: str) -> object:
    from modded_nanogpt.kernels import cross_entropy as kernels

    pointers = {"z": "*bf16", "grad": gradient, "losses": "*fp32", "targets": "*i64", "prefix": "*i64",
                "mtp": "*fp32", "prefix_weight": "*fp32", "allowed": None, "previous": None}  # fmt: skip
    numbers = {"start": "i32!", "tokens": "i32!", "ahead": "i32"}
    numbers |= dict.fromkeys(("cap", "shift", "width", "scale"), "fp32")
    block = kernels.BLOCK
    sizes = {
        "V": 50_304,
        "WHOLE": 50_304 // block * block,
        "BLOCK": block,
        "TAIL": 2048,
        "BYTES": 0,
        "FAST": True,
    }
    return compiled(kernels._row_kernel, capability, pointers | numbers | sizes, num_warps=kernels.WARPS)


def mlp_kernel(capability: int, a: str, b: str, has_post: bool, low: str | None) -> object:
    from modded_nanogpt.kernels import mlp as kernels

    cut = kernels.tiles(SHARED_BYTES[capability], a != "bf16", has_post, low is not None)

    def tile(dtype: str | None, columns: int, rows: int = cut.m) -> str | None:
        return None if dtype is None else f"tensordesc<{dtype}[{rows}, {columns}]>"

    half, scale = cut.n // 2, None if a == "bf16" else "*fp32"
    arguments = {
        "a": tile(a, cut.k), "b": tile(b, cut.k, cut.n), "out": tile("bf16", half), "low": tile(low, half),
        "post": tile("bf16" if has_post else None, half), "a_scale": scale, "b_scale": scale, "low_scale": scale,
        "largest": None if has_post else scale, "M": "i32!", "N": "i32!", "K": "i32!", "TOP": 448.0, "PROGRAMS": 132,
        "BLOCK_M": cut.m, "BLOCK_N": cut.n, "BLOCK_K": cut.k,
    }  # fmt: skip
    options = {"num_warps": cut.warps, "num_stages": cut.stages}
    return compiled(kernels._relu_square_kernel, capability, arguments, **options)


def check(name: str) -> None:
    """Called in a process of its own: whatever ran before in this one may have switched Triton to its interpreter."""
    if name == "head":
        text = row_kernel(90, "*fp8e5").asm["ptx"]
        for instruction in (
            "tanh.approx.f32",
            "cvt.rn.satfinite.e5m2x2",
            "ld.global.L1::evict_last",
            ".v4.b32",
        ):
            assert instruction in text, instruction
        assert "st.local" not in text and "tanh.approx.f32" in row_kernel(80, "*bf16").asm["ptx"]
        return
    for capability, products in ((90, "wgmma.mma_async"), (120, "mma.sync")):
        for a, b, has_post, low in FP8_MLP if name == "fp8" else BF16_MLP:
            kernel = mlp_kernel(capability, a, b, has_post, low)
            assert kernel.metadata.shared <= SHARED_BYTES[capability]
            text = kernel.asm["ptx"]
            assert products in text and "cp.async.bulk.tensor" in text and "st.local" not in text


@pytest.mark.parametrize("name", ["head", "bfloat16", "fp8"])
def test_the_code(name, tmp_path):
    pytest.importorskip("triton", reason="a torch without Triton has no kernels")
    env = {**os.environ, "PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    env.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, __file__, name], env=env, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0 and done.stdout.endswith("compiled\n"), done.stderr[-3000:]


if __name__ == "__main__":
    check(sys.argv[1])
    print("compiled")
