"""The attention kernels, compiled by Triton for GPUs that need not be here: shared memory, registers, tensor cores.

Triton brings NVIDIA's assembler along, so that this runs on any machine. Only a GPU tells how fast they are.
"""

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="this build of torch has no Triton")

from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import compiler as nvidia
from triton.compiler import ASTSource, CompiledKernel
from triton.compiler import compile as compile_kernel

from modded_nanogpt.kernels import attention as packed
from modded_nanogpt.kernels import attention_kernels, dynamic_composition, dynamic_composition_kernels
from modded_nanogpt.kernels.launch import INTERPRETED

pytestmark = pytest.mark.skipif(INTERPRETED, reason="TRITON_INTERPRET: nothing is compiled")

AMPERE, LESSER, HOPPER = 80, 89, 90  # A100; L40S, which has the least shared memory of those we name; H100
SHARED_MEMORY = {HOPPER: 227 * 1024, LESSER: 99 * 1024}  # bytes that one program can have
FLOATS = ("lse", "delta", "w1", "w2", "dw1", "dw2", "d_band")
SIZES = {
    "D": 128,
    "V": 128,
    "D_WIDTH": 128,
    "V_WIDTH": 128,
    "WIDTH": 128,
    "EVEN": True,
    "H": 6,
    "WINDOW": 112,
}


def compiled(
    kernel: object, target: int, constants: dict[str, int], warps: int, stages: int
) -> CompiledKernel:
    """As a launch at the speedrun's sizes would compile it."""
    constants = {name: value for name, value in (SIZES | constants).items() if name in kernel.arg_names}
    signature, aligned = {}, {}
    for place, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            continue
        plain = name.endswith(("_row", "_head")) or name in ("T", "window")
        kind = "i32" if name.startswith("doc_") else "fp32" if name in FLOATS else "bf16"
        signature[name] = "i32" if plain else f"*{kind}"
        if name != "window":
            aligned[(place,)] = [["tt.divisibility", 16]]
    places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(fn=kernel, signature=signature, constexprs=places, attrs=aligned)
    return compile_kernel(
        source, target=GPUTarget("cuda", target, 32), options={"num_warps": warps, "num_stages": stages}
    )


def spilled(program: CompiledKernel, tmp_path: Path, target: int) -> int:
    """Bytes of registers that the assembler had to put into memory."""
    code = tmp_path / "kernel.cubin"
    code.write_bytes(program.asm["cubin"])
    dump = Path(nvidia.get_ptxas(target).path).with_name("cuobjdump")
    usage = subprocess.run([dump, "--dump-resource-usage", code], capture_output=True, text=True, check=True)
    return int(re.search(r"STACK:(\d+)", usage.stdout)[1])


def attention_programs(plan: packed.Plan) -> Iterator[tuple]:
    names = ("forward", "query_gradient", "key_gradient")
    for name in names:
        tiles = getattr(plan, name)
        kernel = getattr(attention_kernels, f"{name}_kernel")
        yield kernel, {"ROWS": tiles.rows, "STEP": tiles.step}, tiles.warps, tiles.stages


def composition_programs(target: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple]:
    sizes = {"ROWS": dynamic_composition.ROWS, "BACK": dynamic_composition.BACK}
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: divmod(target, 10))
    dynamic_composition.query_options.cache_clear()
    query = dynamic_composition.query_options(torch.device("cuda", 0))
    dynamic_composition.query_options.cache_clear()
    for name in ("compose", "mixed_gradient", "compose_query", "compose_key"):
        options = (
            query if name == "compose_query" else {"num_warps": 8, "num_stages": dynamic_composition.STAGES}
        )
        yield getattr(dynamic_composition_kernels, f"{name}_kernel"), sizes, *options.values()


@pytest.mark.parametrize("plan", [packed.LARGE_SHORT, packed.LARGE_LONG], ids=["short", "long"])
def test_attention_on_hopper(plan, tmp_path):
    """Warp-group products (no older instruction), and registers enough: a few spilled ones cost nothing."""
    for program in attention_programs(plan):
        _on_hopper(program, tmp_path)


def test_dynamic_composition_on_hopper(tmp_path, monkeypatch):
    for program in composition_programs(HOPPER, monkeypatch):
        _on_hopper(program, tmp_path)


def _on_hopper(program: tuple, tmp_path: Path) -> None:
    built = compiled(program[0], HOPPER, *program[1:])
    assert built.metadata.shared <= SHARED_MEMORY[HOPPER]
    assert "wgmma.mma_async" in built.asm["ptx"] and "mma.sync" not in built.asm["ptx"]
    assert spilled(built, tmp_path, HOPPER) <= 128, built.metadata.name


@pytest.mark.campaign
@pytest.mark.parametrize("target", [AMPERE, LESSER])
def test_both_fit_a_lesser_gpu(target, tmp_path, monkeypatch):
    """With some spilled registers, not with hundreds: their older tensor cores take all operands from registers."""
    for program in (*attention_programs(packed.SMALL), *composition_programs(target, monkeypatch)):
        built = compiled(program[0], target, *program[1:])
        assert built.metadata.shared <= SHARED_MEMORY[LESSER], built.metadata.name
        assert spilled(built, tmp_path, target) <= 1024, built.metadata.name
