"""Symmetric products: the kernel against float64, interpreted and on a GPU, and the matrix iteration made of them."""

import subprocess
import sys

import pytest
import torch

from modded_nanogpt.kernels import symmetric_matmul as kernels
from modded_nanogpt.kernels.reference import symmetric_matmul as reference
from modded_nanogpt.optim.orthogonalize import MARGINS, NEWTON_SCHULZ, POLAR_EXPRESS, orthogonalize

# Argument: cpu or cuda. Sizes that fit a tile, that are smaller than one, and that are neither.
COMPARE = """
import sys
import torch
from modded_nanogpt.kernels import symmetric_matmul as kernels
from modded_nanogpt.kernels.reference import symmetric_matmul as reference

device = sys.argv[1]
sizes = [(2, 40, 24), (1, 65, 130), (3, 16, 16), (1, 200, 96), (1, 64, 128)]
kinds = [(torch.float16, 2e-3)]
if device == "cuda":
    sizes += [(60, 256, 768), (20, 768, 768), (3, 3072, 768), (22, 3072, 768)]
    kinds += [(torch.bfloat16, 1.6e-2)]
generator = torch.Generator(device).manual_seed(3)


def compare(found, expected, tolerance):
    assert found.shape == expected.shape and found.isfinite().all()
    error = (found.double() - expected).abs().max() / expected.abs().max()
    assert error < tolerance, (tuple(found.shape), float(error))
    for k in range(128, found.shape[1], 128):  # outside of diagonal tiles, of 64 or 128, symmetric to the last bit
        assert torch.equal(found[:, k:, :k], found[:, :k, k:].mT)


for dtype, tolerance in kinds:
    for size in sizes:
        x = torch.randn(*size, device=device, generator=generator).to(dtype)
        for transposed in (False, True):
            expected = reference.gram(x.double(), transposed)
            for block in (None, 64, 128):
                compare(kernels._launch(x, transposed, False, block=block), expected, tolerance)
            gram = (expected / expected.abs().max()).to(dtype)
            expected = reference.polynomial(gram.double(), 3.0, -2.0, 0.7)
            for block in (64, 128):
                compare(kernels._launch(gram, False, True, 3.0, -2.0, 0.7, block), expected, tolerance)
            compare(kernels.polynomial(gram, 3.0, -2.0, 0.7), expected, tolerance)
        compare(kernels.gram(x), reference.gram(x.double()), tolerance)
print("equal")
"""

COMPILE = """
import sys
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from modded_nanogpt.kernels.symmetric_matmul import _symmetric_kernel as kernel

for capability, stages, room in ((90, 4, 232_448), (80, 4, 166_912), (89, 3, 101_376)):
    for transposed, polynomial in ((True, False), (False, True)):
        fixed = dict(TRANSPOSED=transposed, POLYNOMIAL=polynomial, EVEN=False, BLOCK=128, BLOCK_K=64)
        signature = dict(x="*bf16", out="*bf16", size="i32", length="i32")
        signature |= dict(constant="fp32", linear="fp32", quadratic="fp32")
        places = {(kernel.arg_names.index(name),): value for name, value in fixed.items()}
        source = ASTSource(
            fn=kernel, signature=signature | {name: "constexpr" for name in fixed}, constexprs=places,
            attrs={(k,): [["tt.divisibility", 16]] for k in range(4)},
        )
        made = compile(source, target=GPUTarget("cuda", capability, 32), options=dict(num_warps=8, num_stages=stages))
        assert made.metadata.shared <= room, (capability, made.metadata.shared)
        ptx = made.asm["ptx"]
        assert ".local" not in ptx  # nothing spilled
        assert ("wgmma" if capability == 90 else "mma.sync") in ptx
print("compiled")
"""


REPAIR = """
from tests.modded.kernels.interpreter_kit import repair
repair()
"""


def test_the_kernel_equals_float64_interpreted(run_python):
    pytest.importorskip("triton", reason="Triton is not installed")
    done = run_python("-c", REPAIR + COMPARE, "cpu", env={"TRITON_INTERPRET": "1"})
    assert done.stdout.endswith("equal\n"), done.stderr[-2000:]


def test_the_kernel_compiles_for_gpus_that_are_not_here(run_python, tmp_path):
    """With tensor-core instructions, within each architecture's shared memory, without spilled registers."""
    pytest.importorskip("triton", reason="Triton is not installed")
    done = run_python("-c", COMPILE, env={"TRITON_CACHE_DIR": str(tmp_path)})
    assert done.stdout.endswith("compiled\n"), done.stderr[-2000:]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
def test_the_kernel_equals_float64_on_a_gpu(root):
    done = subprocess.run(
        [sys.executable, "-c", COMPARE, "cuda"], cwd=root, capture_output=True, text=True, timeout=600
    )
    assert done.stdout.endswith("equal\n"), done.stderr[-2000:]


def normalized(shape: tuple[int, ...], margin: float, seed: int = 0) -> torch.Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return x / (margin * x.norm(dim=(1, 2), keepdim=True))


@pytest.mark.parametrize("shape", [(2, 24, 64), (2, 64, 24), (3, 40, 40)])
@pytest.mark.parametrize("coefficients", [POLAR_EXPRESS, NEWTON_SCHULZ])
def test_singular_values_go_to_one_and_directions_stay(shape, coefficients):
    x = normalized(shape, MARGINS[coefficients]).double()
    found = orthogonalize(x, coefficients)
    left, sizes, right = torch.linalg.svd(x, full_matrices=False)
    after = (left.mT @ found @ right.mT).diagonal(dim1=1, dim2=2)
    torch.testing.assert_close(left @ torch.diag_embed(after) @ right, found, rtol=0, atol=1e-9)
    large = sizes > 0.01  # smaller ones need more rounds than five
    assert large.any() and (after[large] > 0.6).all() and (after[large] < 1.4).all()


def test_a_tall_matrix_gives_the_transpose_of_the_wide_one():
    x = normalized((2, 24, 64), 1.02).double()
    torch.testing.assert_close(orthogonalize(x).mT, orthogonalize(x.mT.contiguous()), rtol=0, atol=1e-10)


def test_bfloat16_rounds_by_a_hundredth():
    x = normalized((2, 128, 384), 1.02)
    exact, found = orthogonalize(x.double()), orthogonalize(x.bfloat16())
    assert found.dtype == torch.bfloat16
    assert (found.double() - exact).norm() < 0.02 * exact.norm()


def test_zero_stays_zero():
    assert not orthogonalize(torch.zeros(1, 4, 8)).any()


def test_the_twin_on_the_cpu():
    x = torch.randn(2, 5, 7, dtype=torch.float64)
    torch.testing.assert_close(kernels.gram(x), x @ x.mT)
    torch.testing.assert_close(kernels.gram(x, transposed=True), x.mT @ x)
    gram = reference.gram(x)
    expected = 3 * torch.eye(5, dtype=torch.float64) - 2 * gram + 0.7 * gram @ gram
    torch.testing.assert_close(kernels.polynomial(gram, 3.0, -2.0, 0.7), expected)
