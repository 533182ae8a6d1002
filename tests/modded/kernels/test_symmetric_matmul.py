"""Symmetric products: the kernel against float64, interpreted and on a GPU, and the matrix iteration made of them."""

import pytest
import torch

from modded_nanogpt.kernels import symmetric_matmul as kernels
from modded_nanogpt.kernels.reference import symmetric_matmul as reference
from modded_nanogpt.optim.orthogonalize import (
    MARGINS,
    NEWTON_SCHULZ,
    POLAR_EXPRESS,
    SIX_ROUNDS,
    orthogonalize,
)

# Sizes that fit a tile, that are smaller than one, and that are neither.
SIZES = [(2, 40, 24), (1, 65, 130), (3, 16, 16), (1, 200, 96), (1, 64, 128)]
GPU_SIZES = [(60, 256, 768), (20, 768, 768), (3, 3072, 768), (22, 3072, 768)]


def compare(found: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    assert found.shape == expected.shape and found.isfinite().all()
    error = (found.double() - expected).abs().max() / expected.abs().max()
    assert error < tolerance, (tuple(found.shape), float(error))
    for k in range(
        128, found.shape[1], 128
    ):  # outside of diagonal tiles, of 64 or 128, symmetric to the last bit
        assert torch.equal(found[:, k:, :k], found[:, :k, k:].mT)


def compare_all(device: str, dtype: torch.dtype, tolerance: float, sizes: list[tuple[int, int, int]]) -> None:
    """Gram matrices of both sides and their polynomials, with each tile size and with the one that is chosen."""
    generator = torch.Generator(device).manual_seed(3)
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


def interpreted(everything: bool) -> None:
    compare_all("cpu", torch.float16, 2e-3, SIZES if everything else SIZES[1:3])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
def test_the_kernel_equals_float64_on_a_gpu():
    compare_all("cuda", torch.float16, 2e-3, SIZES + GPU_SIZES)
    compare_all("cuda", torch.bfloat16, 1.6e-2, SIZES + GPU_SIZES)


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


def test_six_rounds_end_within_half_a_percent():
    sizes = torch.logspace(-2.5, 0, 60, dtype=torch.float64) / MARGINS[SIX_ROUNDS]  # from 0.003 on
    found = orthogonalize(torch.diag(sizes)[None], SIX_ROUNDS).diagonal(dim1=1, dim2=2)
    assert (found > 0.994).all() and (found < 1.001).all()


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
