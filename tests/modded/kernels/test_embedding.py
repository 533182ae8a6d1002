"""Gradients of embedding tables: the kernel, its twin, and what autograd would have formed."""

import pytest
import torch

from modded_nanogpt.kernels.embedding import Runs, add_rows_, runs_of

CASES = [(1, 8), (5, 7), (33, 96), (100, 40), (150, 300)]  # (tokens, width)


def compare(device: str, tokens: int, width: int, rows: int) -> None:
    """Against a dense float64 gradient: within one step of bfloat16; untouched rows bit for bit. One table, and two."""
    torch.manual_seed(tokens)
    ids = torch.randint(rows, (tokens,), dtype=torch.int32, device=device)
    ids[: tokens // 2] = 3  # one id that fills several tiles
    gradient = torch.randn(2, tokens, width, device=device).bfloat16()
    before = torch.randn(2, rows, width, device=device).bfloat16()
    both, one = before.clone(), before[0].clone()
    runs = Runs(*(torch.from_numpy(part).int().to(device) for part in runs_of(ids.cpu().numpy())))
    add_rows_(both, gradient, runs)
    add_rows_(one, gradient[0], runs)
    assert torch.equal(one, both[0])
    expected = before.double().index_add_(1, ids.long(), gradient.double())
    untouched = torch.ones(rows, dtype=torch.bool, device=device)
    untouched[ids.long()] = False
    assert torch.equal(both[:, untouched], before[:, untouched])
    error = (both.double() - expected).abs() / (expected.abs() + 1e-1)
    assert error.max() <= 2**-8 + 1e-5, error.max()


@pytest.mark.parametrize(("tokens", "width"), CASES)
def test_the_twin_is_a_dense_gradient(tokens, width):
    compare("cpu", tokens, width, 11)


@pytest.mark.gpu
def test_the_kernel_on_a_gpu():
    if not torch.cuda.is_available():
        pytest.skip("no NVIDIA driver on this machine")
    for tokens, width in [*CASES, (49_152, 768)]:
        compare("cuda", tokens, width, 5000)


def interpreted(everything: bool) -> None:
    for case in CASES if everything else [CASES[1], CASES[3]]:
        compare("cpu", *case, 11)
