"""The launches of every kernel, with the arguments that the callers really pass, compiled for GPUs that are not here.

Triton is told that it runs on such a GPU, tensors say that they lie on one, and a launch ends after compilation. So
what Triton makes of sizes, strides, None and tensor descriptors is what it would make of them there, and whatever it
refuses (a dtype, a shape, more shared memory or registers than there are) it refuses here. The products must use the
tensor cores' own instructions. By default Hopper's code and each kernel's largest variant; `make faults` does the rest.
"""

import contextlib
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).resolve().parents[3]
# By capability: multiprocessors, and the bytes of shared memory that one program may have.
GPUS = {80: (108, 166_912), 89: (142, 101_376), 90: (132, 232_448), 120: (188, 101_376)}
# All but those of FP8 on an A100, and but the MLP's before Hopper.
KERNELS = {80: 16, 89: 18, 90: 19, 120: 19}
COMPOSITION = 4  # kernels, which only `make faults` compiles
SPILLED = 1024  # bytes a thread; the least that was ever seen to matter is 6,000
NO_PRODUCTS = {
    "_row_kernel", "_add_rows_kernel", "_quantise_kernel", "_transpose_kernel", "_look_up_kernel",
    "_update_rows_kernel", "_sum_entries_kernel",
}  # fmt: skip


class OnGpu(torch.Tensor):
    """A tensor that says it lies on a GPU. What is computed from it says so too."""

    @property
    def is_cuda(self) -> bool:
        return True

    def __matmul__(self, other: torch.Tensor) -> torch.Tensor:
        """No numbers: only the shape counts, and a CPU takes seconds for them."""
        return on_gpu(*self.shape[:-1], other.shape[-1], dtype=self.dtype)


def on_gpu(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.zeros(*shape, dtype=dtype).as_subclass(OnGpu)


def pretend(capability: int) -> list:
    """From now on launches compile for this GPU, and no more; the list fills with what was compiled."""
    import triton.compiler
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    processors, room = GPUS[capability]
    target = GPUTarget("cuda", capability, 32)
    driver.set_active(
        SimpleNamespace(
            get_current_device=lambda: 0,
            get_current_stream=lambda device: 0,
            get_current_target=lambda: target,
        )
    )
    run, compile_source, compiled = JITFunction.run, triton.compiler.compile, []

    def launch(
        self: JITFunction, *arguments: object, grid: object, warmup: bool, **options: object
    ) -> object:
        assert all(0 < size < (1 << 31 if axis == 0 else 1 << 16) for axis, size in enumerate(grid))
        return run(self, *arguments, grid=grid, warmup=True, **options)

    def compile_and_keep(source: object, **options: object) -> object:
        compiled.append(compile_source(source, **options))
        return compiled[-1]

    JITFunction.run, triton.compiler.compile = launch, compile_and_keep
    properties = SimpleNamespace(multi_processor_count=processors, shared_memory_per_block_optin=room)
    torch.cuda.get_device_properties = lambda device: properties
    torch.cuda.get_device_capability = lambda device=None: divmod(capability, 10)
    return compiled


def check(program: object, capability: int) -> None:
    """It fits into a multiprocessor, hardly anything went to memory for want of registers, tensor cores multiply."""
    from triton.backends.nvidia import compiler as nvidia

    name, shared = program.metadata.name, program.metadata.shared
    assert shared <= GPUS[capability][1], (name, shared)
    text = program.asm["ptx"]
    if name not in NO_PRODUCTS:
        assert ("wgmma.mma_async" if capability == 90 else "mma.sync") in text, name
        assert capability != 90 or "mma.sync" not in text, name
    if name == "_relu_square_kernel":
        assert "cp.async.bulk.tensor" in text
    with tempfile.NamedTemporaryFile(suffix=".cubin") as code:
        Path(code.name).write_bytes(program.asm["cubin"])
        dump = Path(nvidia.get_ptxas(capability).path).with_name("cuobjdump")
        command = [dump, "--dump-resource-usage", code.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack = (int(re.search(rf"{key}:(\d+)", usage)[1]) for key in ("REG", "STACK"))
    assert stack <= SPILLED, (name, stack)
    assert registers * 32 * program.metadata.num_warps <= 65_536, (name, registers)


def attention(tokens: int, heads: int, width: int, values: int, plans: tuple, composition: bool) -> None:
    """q, k as columns of one projection, these tiles, and dynamic composition."""
    from modded_nanogpt.kernels import attention as packed
    from modded_nanogpt.kernels import dynamic_composition as composed

    q, k = torch.zeros(tokens, 3, heads, width, dtype=torch.bfloat16).as_subclass(OnGpu).unbind(1)[:2]
    v, grad = on_gpu(tokens, heads, values), on_gpu(tokens, heads, values)
    start, end = (on_gpu(tokens, dtype=torch.int32) for _ in range(2))
    for plan in plans:
        out, lse = packed.forward(q, k, v, start, 128, plan.forward)
        packed.backward(grad, q, k, v, out, lse, start, end, 128, plan)
    if composition:
        capability = torch.device("cuda", 0)
        options, composed.query_options = composed.query_options(capability), lambda device: options
        weights = on_gpu(tokens, heads, dtype=torch.float32)
        kept = (weights, weights, start, *composed._kept(q))
        composed.forward(v, q, k, v, *kept)
        composed.backward(grad, q, k, v, *kept)


def head(fp8: bool, everything: bool) -> None:
    """Loss and gradients with three targets and with one, with and without prefixes; validation and its mask."""
    from modded_nanogpt.kernels import cross_entropy as kernels

    x, weight = on_gpu(64, 768), on_gpu(50_304, 768)
    targets, one = on_gpu(64, dtype=torch.int64), on_gpu(1, dtype=torch.float32)
    for prefix, mtp in ((targets, on_gpu(3, dtype=torch.float32)), (None, one))[: 2 if everything else 1]:
        kernels._head_loss._init_fn(x, weight, targets, prefix, mtp, one, 23.0, 5.0, 7.5, 0.125, fp8, 65_536)
    if everything:
        kernels._eval_losses._init_fn(x, weight, targets, 23.0, 5.0, 7.5, None, None, 48)
    allowed = on_gpu(50_304, 6288, dtype=torch.uint8)
    kernels._eval_losses._init_fn(x, weight, targets, 23.0, 5.0, 7.5, allowed, targets.int(), 64)


def pointer(fp8: bool, everything: bool) -> None:
    """The copy pointer's masses and their gradients, and the head's loss with it; validation with its mask."""
    from modded_nanogpt.kernels import pointer as kernels
    from modded_nanogpt.kernels import pointer_loss

    for tokens, width in ((4096, 128), (198, 96))[: 2 if everything else 1]:
        q, k, sink = on_gpu(tokens, width), on_gpu(tokens, width), on_gpu(tokens, dtype=torch.float32)
        ids, targets = on_gpu(tokens, dtype=torch.int32), on_gpu(tokens, dtype=torch.int64)
        masses = kernels._copy_shares._init_fn(q, k, sink, ids, targets, ids, ids, 2048)
        kernels._copy_shares_backward._init_fn(sink, sink, q, k, ids, targets, ids, ids, *masses, 2048)
    x, weight, mass = on_gpu(64, 768), on_gpu(50_304, 768), on_gpu(64, dtype=torch.float32)
    targets, one = on_gpu(64, dtype=torch.int64), on_gpu(1, dtype=torch.float32)
    place, mtp = on_gpu(1, dtype=torch.int64), on_gpu(3, dtype=torch.float32)
    aims = (targets, targets, mtp, one)
    pointer_loss._head_loss._init_fn(x, weight, mass, mass, place, *aims, 23.0, 5.0, 7.5, 0.125, fp8, 65_536)
    allowed = on_gpu(50_304, 6288, dtype=torch.uint8)
    for mask in (allowed, None)[: 2 if everything else 1]:
        given = (x, weight, place, mass, mass, targets, 23.0, 5.0, 7.5, mask, targets.int(), 64)
        pointer_loss._eval_losses._init_fn(*given)


def mlp(kind: str) -> None:
    """Forward and backward; 8 bits in the forward pass, or in both."""
    from modded_nanogpt.kernels import mlp as kernels

    u, bank = on_gpu(1024, 768), on_gpu(1, 2, 3072, 768)
    low, layer = None, [None] * 5
    if kind != "bfloat16":
        state = kernels.Fp8Mlp(bank, backward=kind == "both")
        state.refresh(exact=True)
        low, (*layer, _, by_column, by_row) = u.to(kernels.E4M3), state.layers[0]
    if kind == "both":
        _, *kept, _ = kernels._mlp_low._init_fn(u, *bank[0], low, *layer, by_column, by_row)
        _, up_scale, _, down_scale, post_scale = layer
        kernels._low_gradients._init_fn(u, low, *kept, post_scale, by_column, up_scale, by_row, down_scale)
        return
    _, post, _ = kernels._mlp._init_fn(u, *bank[0], low, *layer)
    kernels._pre_grad._init_fn(u, post, bank[0, 1])


def others(everything: bool) -> None:
    """Gradients of tables, what the n-gram table does, and Muon's products of all banks."""
    from modded_nanogpt.kernels import embedding, row_table
    from modded_nanogpt.kernels import symmetric_matmul as symmetric

    runs = embedding.Runs(*(on_gpu(size, dtype=torch.int32) for size in (100, 101, 1024)))
    embedding.add_rows_(on_gpu(5000, 768), on_gpu(1024, 768), runs)
    rows, gradients, pool = on_gpu(5000, 768), on_gpu(1024, 768), on_gpu(64, 768, dtype=torch.int8)
    ids = on_gpu(2, 1024, dtype=torch.int32)
    row_table.look_up(rows, ids, pool, ids)
    order = on_gpu(2048, dtype=torch.int64)
    entries = row_table.Entries(ids.flatten(), order, gradients, ids.flatten(), pool)
    second, log_kept = on_gpu(5000, dtype=torch.float32), on_gpu(9, dtype=torch.float64)
    rates = row_table.Rates(3, 0.95, 0.1, 0.01, 1.0, 1e-10, True)
    row_table.sum_entries(entries, 100)
    row_table.update_rows_(rows, second, on_gpu(5000, dtype=torch.int32), log_kept, entries, rates)
    for shape in ((22, 3072, 768), (60, 256, 768), (20, 768, 768))[: 3 if everything else 1]:
        tall = shape[1] > shape[2]
        symmetric.polynomial(symmetric.gram(on_gpu(*shape), tall), 1.0, 2.0, 3.0)


def main(capability: int, everything: bool) -> None:
    from modded_nanogpt.kernels import attention as packed
    from modded_nanogpt.kernels import cross_entropy
    from modded_nanogpt.kernels import mlp as mlp_kernels

    compiled = pretend(capability)
    torch.cuda.device = contextlib.nullcontext

    def product(a: torch.Tensor, b: torch.Tensor, *_: object, **__: object) -> torch.Tensor:
        return on_gpu(a.shape[0], b.shape[1])

    cross_entropy.scaled_mm = mlp_kernels.scaled_mm = product
    plans = (packed.LARGE_LONG, packed.LARGE_SHORT) if capability == 90 else (packed.SMALL,)
    attention(1024, 6, 128, 128, plans if everything else plans[:1], composition=everything)
    if everything and capability in (80, 90):
        attention(198, 1, 96, 128, plans, composition=False)  # not even, and dimensions that fill no tile
    if everything or capability < 89:
        head(False, everything)
    pointer(capability >= 89, everything)
    others(everything)
    if capability >= 89:
        head(True, everything)
    if capability >= 90:
        for kind in ("both", "forward", "bfloat16")[: 3 if everything else 1]:
            mlp(kind)
    names = {program.metadata.name for program in compiled}
    assert len(names) == KERNELS[capability] - (0 if everything else COMPOSITION), names
    for program in compiled:
        check(program, capability)
    print("compiled")


@pytest.mark.parametrize(
    ("capability", "everything"),
    [(90, False), *(pytest.param(each, True, marks=pytest.mark.campaign) for each in GPUS)],
)
def test_all_launches(capability, everything, tmp_path):
    pytest.importorskip("triton", reason="a torch without Triton has no kernels")
    env = {**os.environ, "PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    env.pop("TRITON_INTERPRET", None)
    arguments = [__file__, str(capability), *(["everything"] if everything else [])]
    done = subprocess.run([sys.executable, *arguments], env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0 and done.stdout.endswith("compiled\n"), done.stderr[-3000:]


if __name__ == "__main__":
    main(int(sys.argv[1]), "everything" in sys.argv[2:])
