"""The baseline's loss kernel as Triton compiles it for a Hopper GPU: its interpreter takes more than its compiler."""

import pytest

pytest.importorskip("triton", reason="a torch without Triton has no kernels")


@pytest.mark.parametrize(("vocabulary", "out"), [(50_304, "*bf16"), (65, "*fp8e5")])
def test_it_compiles_for_hopper_with_and_without_whole_blocks(vocabulary, out, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from nanogpt import cross_entropy_kernel as kernel

    block = min(kernel.BLOCK, triton.next_power_of_2(vocabulary))
    whole = vocabulary // block * block
    constants = {
        "V": vocabulary, "WHOLE": whole, "BLOCK": block, "TAIL": triton.next_power_of_2(max(1, vocabulary - whole)),
        "LOG2_E": kernel.LOG2_E,
    }  # fmt: skip
    types = {
        "logits": "*bf16", "out": out, "targets": "*i64", "losses": "*fp32", "stride": "i32", "out_stride": "i32",
        "scale": "fp32", **dict.fromkeys(constants, "constexpr"),
    }  # fmt: skip
    places = {(list(types).index(name),): value for name, value in constants.items()}
    source = ASTSource(kernel._row_kernel, types, constexprs=places)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": kernel.WARPS})
    assert "cubin" in compiled.asm
