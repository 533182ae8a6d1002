"""Dynamic composition of heads: the kernels, interpreted and on a GPU, and their twin, against float64 by hand."""

import pytest
import torch
from torch import Tensor

from modded_nanogpt.kernels import dynamic_composition as kernels
from modded_nanogpt.kernels.reference import attention as blocks
from modded_nanogpt.kernels.reference import dynamic_composition as reference
from tests.modded.kernels.packed_kit import LENGTHS, bounds, fenced, worst

# (lengths, heads, D, rows, back, window): with the record's window of 112 and with small tiles
SHORT = (1, 20, 1, 30, 3)
CASES = [
    (SHORT, 3, 16, 16, 32, 20),
    (SHORT, 1, 16, 16, 16, 17),
    (LENGTHS, 2, 64, 64, 128, 112),
    ((150,), 2, 128, 64, 128, 112),
    ((64,), 1, 16, 64, 128, 112),
    ((1,), 2, 16, 64, 128, 112),
]
NAMES = ("out", "dy", "dq", "dk", "dv", "dw1", "dw2")


def inputs(lengths: tuple[int, ...], heads: int, width: int, device: str, dtype: torch.dtype) -> list[Tensor]:
    """y, q, k, v, w1, w2 and the output's gradient."""
    tokens = sum(lengths)
    given = [fenced((tokens, heads, width), i, dtype, device) for i in range(4)]
    given[1] *= width**-0.5
    weights = [fenced((tokens, heads), 10 + i, dtype, device) for i in range(2)]
    return [*given, *weights, fenced((tokens, heads, width), 4, dtype, device)]


def dense(
    y: Tensor, q: Tensor, k: Tensor, v: Tensor, w1: Tensor, w2: Tensor, doc_start: Tensor, window: int
) -> Tensor:
    """The definition, token by token, with w1 as it comes."""
    rows = []
    for i, first in enumerate(doc_start.tolist()):
        keys = slice(max(first, i - window + 1), i + 1)
        p = torch.einsum("hd,jhd->hj", q[i], k[keys]).softmax(-1)
        weights = w1[i] / (w1[i].square().mean() + 1e-6).sqrt()
        rows.append(y[i] + w2[i][:, None] * torch.einsum("j,jhd->hd", weights @ p, v[keys]))
    return torch.stack(rows)


def truth(given: list[Tensor], doc_start: Tensor, window: int) -> list[Tensor]:
    """Output and gradients in float64, as NAMES lists them."""
    leaves = [x.detach().double().requires_grad_() for x in given[:6]]
    out = dense(*leaves, doc_start, window)
    return [out.detach(), *torch.autograd.grad(out, leaves, given[6].double())]


def compare(device: str, dtype: torch.dtype, case: tuple, tolerance: float) -> None:
    """The kernels with given tiles against float64, with w1 normalised as the operator's caller does."""
    lengths, heads, width, rows, back, window = case
    doc_start, _ = bounds(lengths, device)
    y, q, k, v, w1, w2, grad = inputs(lengths, heads, width, device, dtype)
    tiles = {"rows": rows, "back": back}
    leaf = w1.clone().requires_grad_()
    normal, second = reference.normalised(leaf), w2.float()
    band, lse = kernels._kept(q, **tiles)
    fixed = (q, k, v, normal.detach(), second, doc_start, band.fill_(torch.nan), lse)
    out = kernels.forward(y, *fixed, **tiles, window=window)
    dq, dk, dv, d_normal, dw2 = kernels.backward(grad, *fixed, **tiles, window=window)
    (dw1,) = torch.autograd.grad(normal, leaf, d_normal)
    exact = truth([y, q, k, v, w1, w2, grad], doc_start, window)
    for name, mine, right in zip(NAMES, (out, grad, dq, dk, dv, dw1, dw2), exact, strict=True):
        assert worst(mine, right) <= tolerance, (case, name, worst(mine, right))


def compare_op(device: str, dtype: torch.dtype, tolerance: float) -> None:
    """The function itself: columns of one projection as q, k, v; weights as columns of another."""
    lengths = (130, 1, 40)
    doc_start, _ = bounds(lengths, device)
    y, *_, grad = inputs(lengths, 2, 16, device, dtype)
    qkv, gates = (torch.randn(171, *shape, device=device).to(dtype) for shape in ((3, 2, 16), (2, 2)))
    leaves = [x.requires_grad_() for x in (y.clone(), qkv, gates)]
    q, k, v = qkv.unbind(1)
    w1, w2 = gates.unbind(1)
    out = kernels.dynamic_composition(leaves[0], q, k, v, w1, w2, doc_start)
    dy, dqkv, dgates = torch.autograd.grad(out, leaves, grad)
    exact = truth([y, q, k, v, w1, w2, grad], doc_start, 112)
    ours = (out.detach(), dy, *dqkv.unbind(1), *dgates.unbind(1))
    assert out.dtype == dtype and dgates.dtype == dtype
    for name, mine, right in zip(NAMES, ours, exact, strict=True):
        assert worst(mine, right) <= tolerance, (name, worst(mine, right))


def check_op(device: str, dtype: torch.dtype) -> None:
    """What torch demands of an op, and a compiled graph without breaks."""
    doc_start, _ = bounds((30, 7), device)
    given = [x.detach().clone() for x in inputs((30, 7), 2, 16, device, dtype)]
    leaves = [x.requires_grad_() for x in given[:6]]
    arguments = (*leaves[:4], *(x.detach().float().requires_grad_() for x in leaves[4:]), doc_start)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static")
    torch.library.opcheck(torch.ops.speedrun.dynamic_composition.default, arguments, test_utils=checks)
    compiled = torch.compile(kernels.dynamic_composition, backend="aot_eager", fullgraph=True)
    found = []
    for function in (kernels.dynamic_composition, compiled):
        out = function(*leaves, doc_start)
        found.append([out, *torch.autograd.grad(out, leaves, given[6])])
    for name, *pair in zip(NAMES, *found, strict=True):
        torch.testing.assert_close(*pair, rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.parametrize("window", [1, 20, 112])
def test_the_twin_is_the_definition(window, monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK", 32)  # several blocks, the last not full
    doc_start, _ = bounds(LENGTHS)
    given = inputs(LENGTHS, 3, 5, "cpu", torch.float64)
    exact = truth(given, doc_start, window)
    leaves = [x.clone().requires_grad_() for x in given[:6]]
    out = reference.dynamic_composition(*leaves, doc_start, window)
    ours = [out.detach(), *torch.autograd.grad(out, leaves, given[6])]
    for name, mine, right in zip(NAMES, ours, exact, strict=True):
        assert worst(mine, right) < 1e-12, name
    leaf = given[4].clone().requires_grad_()
    normal = reference.normalised(leaf)
    by_hand = reference.composed_gradients(
        given[6], *given[1:4], normal.detach(), given[5], doc_start, window
    )
    (dw1,) = torch.autograd.grad(normal, leaf, by_hand[3])
    for name, mine, right in zip(NAMES[2:], (*by_hand[:3], dw1, by_hand[4]), exact[2:], strict=True):
        assert worst(mine, right) < 1e-12, name


def test_the_plain_path():
    """On a CPU the operator runs the twin."""
    compare_op("cpu", torch.float32, 1e-5)
    check_op("cpu", torch.float32)


def test_weights_of_zero_change_nothing():
    doc_start, _ = bounds(LENGTHS)
    y, q, k, v, w1, _, _ = inputs(LENGTHS, 2, 16, "cpu", torch.float32)
    out = kernels.dynamic_composition(y, q, k, v, w1, torch.zeros_like(w1), doc_start)
    assert torch.equal(out, y)


@pytest.mark.gpu
def test_the_kernels_on_a_gpu():
    if not torch.cuda.is_available():
        pytest.skip("no NVIDIA driver on this machine")
    for case in [*CASES[2:], ((700, 1, 324), 6, 128, 64, 128, 112)]:
        compare("cuda", torch.bfloat16, case, 2e-2)
    compare_op("cuda", torch.bfloat16, 2e-2)
    check_op("cuda", torch.bfloat16)


def interpreted(everything: bool) -> None:
    """Only `make faults` runs these kernels, which the record no longer uses."""
    if not everything:
        return
    for case in CASES:
        compare("cpu", torch.float32, case, 1e-5)
    compare("cpu", torch.bfloat16, CASES[0], 2e-2)
    compare_op("cpu", torch.float32, 1e-5)
    check_op("cpu", torch.float32)
