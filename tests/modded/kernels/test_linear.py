"""The projection with 8-bit operands: interpreted and on a GPU, against float64, as an op of torch."""

import pytest
import torch
import torch.nn.functional as F

from modded_nanogpt.kernels.linear import linear

SIZES = [(16, 16, 32), (80, 48, 144)]  # (tokens, width, outputs)


def run(function, device: str, dtype: torch.dtype, size: tuple[int, int, int]) -> list[torch.Tensor]:
    """Output and gradients of x and w."""
    tokens, width, outputs = size
    generator = torch.Generator().manual_seed(tokens)
    x = F.rms_norm(torch.randn(tokens, width, generator=generator), (width,)).bfloat16()
    w = (torch.randn(outputs, width, generator=generator) / width**0.5).bfloat16()
    grad = (0.1 * torch.randn(tokens, outputs, generator=generator)).bfloat16()
    x, w = (t.to(device, dtype).requires_grad_() for t in (x, w))
    out = function(x, w)
    out.backward(grad.to(device, dtype))
    return [out.detach(), x.grad, w.grad]


def compare(device: str, size: tuple[int, int, int]) -> None:
    """e4m3 loses 2.6 % in norm, e5m2 5 %; a graph without breaks gives the same."""
    exact = run(lambda x, w: linear(x, w, False), "cpu", torch.float64, size)
    compiled = torch.compile(lambda x, w: linear(x, w, True), fullgraph=True, backend="aot_eager")
    for function in (lambda x, w: linear(x, w, True), compiled):
        ours = run(function, device, torch.bfloat16, size)
        for mine, truth, tolerance in zip(ours, exact, (0.05, 0.08, 0.08), strict=True):
            error = (mine.cpu().double() - truth).norm() / truth.norm()
            assert mine.dtype == torch.bfloat16 and 1e-3 < error < tolerance, (size, error)


def check_zero_weights(device: str) -> None:
    """Weights that begin at zero give zeros, and gradients as ever: no largest entry is divided by."""
    x = torch.randn(16, 16, device=device).bfloat16().requires_grad_()
    w = torch.zeros(32, 16, device=device, dtype=torch.bfloat16).requires_grad_()
    out = linear(x, w, True)
    out.backward(torch.ones_like(out))
    assert not out.any() and not x.grad.any() and w.grad.isfinite().all() and w.grad.any()


def check_whole_lane() -> None:
    """The first step of the tiny model with everything in 8 bits, whose down-projections are zero: no NaN, and near."""
    from modded_nanogpt import schedule, setup
    from modded_nanogpt.kernels.mlp_weights import Fp8Mlp
    from tests.modded.test_lanes import ALONE, gradients, lane, small

    config = small()
    state = setup.build(config, ALONE)
    model = state.model.to(torch.bfloat16)
    model.init_weights(1)
    found = []
    for low in (False, True):
        model.fp8 = Fp8Mlp(model.mlp_bank, backward=True) if low else None
        if low:
            model.fp8.refresh(exact=True)
        model.fp8_qkv = state.fp8_mlp = state.fp8_head = low
        found.append(gradients(state, lane(1), schedule.at(config, 0)))
    (plain, exact), (loss, ours) = found
    assert abs(loss / plain - 1) < 1e-3
    for name, gradient in ours.items():
        assert gradient.isfinite().all(), name
    for name in ("qk_bank", "vo_bank", "mlp_bank", "head"):
        assert (ours[name] - exact[name]).float().norm() < 0.15 * exact[name].float().norm(), name


def interpreted(everything: bool) -> None:
    for size in SIZES if everything else SIZES[1:]:
        compare("cpu", size)
    check_zero_weights("cpu")
    if everything:
        check_whole_lane()


def test_without_8_bits_it_is_the_plain_product():
    x, w = torch.randn(3, 5), torch.randn(7, 5)
    assert torch.equal(linear(x, w, False), x @ w.T) and torch.equal(linear(x, w, True), x @ w.T)


@pytest.mark.gpu
def test_the_products_on_a_gpu():
    if not torch.cuda.is_available():
        pytest.skip("no NVIDIA driver on this machine")
    for size in [*SIZES, (16_384, 768, 1536)]:
        compare("cuda", size)
    check_zero_weights("cuda")
