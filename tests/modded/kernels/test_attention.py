"""Attention over packed documents: the kernels, interpreted and on a GPU, and their twin, against float64 by hand."""

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from modded_nanogpt.kernels import attention as packed
from modded_nanogpt.kernels.attention import LARGE_LONG, LARGE_SHORT, SMALL, Plan, Tiles
from modded_nanogpt.kernels.reference import attention as reference
from tests.modded.kernels.packed_kit import LENGTHS, bounds, fenced, worst

EVEN = (100, 28, 64)  # 192 tokens: whole tiles of 16, 32 and 64
WIDE, TALL = Tiles(16, 32, 4, 1), Tiles(32, 16, 4, 1)
SMALL_TILES = Plan(WIDE, TALL, WIDE), Plan(TALL, WIDE, TALL)
# (lengths, heads, D, V, window, plan): windows of no past, shorter and longer than documents
CASES = [
    (LENGTHS, 1, 16, 16, 0, SMALL_TILES[0]),
    (LENGTHS, 1, 16, 16, 20, SMALL_TILES[1]),
    (LENGTHS, 1, 16, 32, 1000, SMALL_TILES[0]),
    (EVEN, 2, 16, 16, 40, SMALL_TILES[1]),
    (LENGTHS, 1, 64, 64, 50, LARGE_SHORT),
    (LENGTHS, 1, 96, 128, 70, LARGE_LONG),
    (LENGTHS, 1, 128, 128, 128, SMALL),
    ((1,), 1, 16, 16, 5, LARGE_LONG),
]
QUICK_CASES = [((1, 20, 1, 17), 1, 16, 32, 20, SMALL_TILES[1]), ((20, 12), 2, 16, 16, 40, SMALL_TILES[0])]


def dense(q: Tensor, k: Tensor, v: Tensor, doc_start: Tensor, window: int) -> Tensor:
    """The definition, with one row of scores for every query."""
    place = torch.arange(len(q), device=q.device)
    seen = (place[None] <= place[:, None]) & (place[None] >= (place - window)[:, None])
    seen &= place[None] >= doc_start[:, None]
    scores = torch.einsum("ihd,jhd->hij", q, k).masked_fill(~seen, -torch.inf)
    return torch.einsum("hij,jhd->ihd", scores.softmax(-1), v)


def truth(given: list[Tensor], doc_start: Tensor, window: int) -> list[Tensor]:
    """Output, dq, dk, dv in float64 of q, k, v and the output's gradient."""
    q, k, v = (x.detach().double().requires_grad_() for x in given[:3])
    out = dense(q, k, v, doc_start, window)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), given[3].double())]


def compare(device: str, dtype: torch.dtype, case: tuple, tolerance: float) -> None:
    """The kernels with given tiles against float64."""
    lengths, heads, qk, width, window, plan = case
    doc_start, doc_end = bounds(lengths, device)
    sizes = (qk, qk, width, width)
    given = [fenced((len(doc_start), heads, size), i, dtype, device) for i, size in enumerate(sizes)]
    given[0] *= qk**-0.5
    out, lse = packed.forward(*given[:3], doc_start, window, plan.forward)
    ours = [out, *packed.backward(given[3], *given[:3], out, lse, doc_start, doc_end, window, plan)]
    for name, mine, exact in zip(
        ("out", "dq", "dk", "dv"), ours, truth(given, doc_start, window), strict=True
    ):
        assert worst(mine, exact) <= tolerance, (case, name, worst(mine, exact))


def compare_strided(device: str, dtype: torch.dtype) -> None:
    """The operator, with q, k, v as columns of one projection, a transposed v, and a gradient that is one number."""
    doc_start, doc_end = bounds((40, 30), device)
    qkv = torch.randn(70, 3, 2, 16, generator=torch.Generator().manual_seed(5)).to(device, dtype)
    q, k, v = qkv.requires_grad_().unbind(1)
    v = v.transpose(1, 2).contiguous().transpose(1, 2)
    window = torch.tensor(24, dtype=torch.int32)
    packed.attention(q, k, v, doc_start, doc_end, window).sum().backward()
    parts = [x.detach() for x in qkv.unbind(1)]
    exact = torch.stack(truth([*parts, torch.ones_like(parts[2])], doc_start, 24)[1:], 1)
    assert worst(qkv.grad, exact) <= (1e-5 if dtype == torch.float32 else 2e-2)


def check_large_scores(device: str, dtype: torch.dtype) -> None:
    """Scores of some thousands, where a softmax without its running maximum would overflow."""
    doc_start, doc_end = bounds((70,), device)
    given = [100 * fenced((70, 1, 16), i, dtype, device) for i in range(4)]
    out, lse = packed.forward(*given[:3], doc_start, 50, TALL)
    ours = packed.backward(given[3], *given[:3], out, lse, doc_start, doc_end, 50, SMALL_TILES[0])
    assert worst(out, truth(given, doc_start, 50)[0]) < 1e-2
    assert all(torch.isfinite(x).all() for x in ours)


def check_op(device: str, dtype: torch.dtype) -> None:
    """What torch demands of an op, and one compiled graph for all windows."""
    doc_start, doc_end = bounds((30, 7), device)
    q, k, v = (torch.randn(37, 1, 16, device=device, dtype=dtype).requires_grad_() for _ in range(3))
    windows = [torch.tensor(size, dtype=torch.int32) for size in (3, 8, 300)]
    checks = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static")
    torch.library.opcheck(
        torch.ops.speedrun.attention.default, (q, k, v, doc_start, doc_end, windows[0]), test_utils=checks
    )
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(packed.attention, backend=counter, fullgraph=True)
    for window in windows:
        found = []
        for function in (packed.attention, compiled):
            out = function(q, k, v, doc_start, doc_end, window)
            found.append([out, *torch.autograd.grad(out.float().square().sum(), (q, k, v))])
        assert all(torch.equal(*pair) for pair in zip(*found, strict=True))
    assert counter.frame_count == 1


@pytest.mark.parametrize("window", [0, 20, 1000])
def test_the_twin_is_the_definition(window, monkeypatch):
    monkeypatch.setattr(reference, "BLOCK", 32)  # several blocks, the last not full
    doc_start, _ = bounds(LENGTHS)
    given = [torch.randn(len(doc_start), 2, 5, dtype=torch.float64) for _ in range(4)]
    exact = truth(given, doc_start, window)
    leaves = [x.clone().requires_grad_() for x in given[:3]]
    out = reference.attention(*leaves, doc_start, window)
    by_autograd = torch.autograd.grad(out, leaves, given[3])
    by_hand = reference.attention_gradients(given[3], *given[:3], doc_start, window)
    for ours in ([out, *by_autograd], [out, *by_hand]):
        assert max(worst(a.detach(), b) for a, b in zip(ours, exact, strict=True)) < 1e-12


def test_the_twin_keeps_dtypes():
    doc_start, _ = bounds((5,))
    given = [torch.randn(5, 1, 4).bfloat16() for _ in range(4)]
    found = [
        reference.attention(*given[:3], doc_start, 9),
        *reference.attention_gradients(given[3], *given[:3], doc_start, 9),
    ]
    assert [x.dtype for x in found] == [torch.bfloat16] * 4


@pytest.mark.gpu
def test_the_kernels_on_a_gpu():
    if not torch.cuda.is_available():
        pytest.skip("no NVIDIA driver on this machine")
    for lengths, heads, qk, width, window, _ in CASES:
        for plan in (SMALL, packed.plan_for(torch.empty(1, device="cuda"), window)):
            compare("cuda", torch.bfloat16, (lengths, heads, qk, width, window, plan), 2e-2)
    long = (2048, 1, 700, 33, 1314)  # 4,096 tokens: even
    for window in (128, 640, 1408):
        plan = packed.plan_for(torch.empty(1, device="cuda"), window)
        compare("cuda", torch.bfloat16, (long, 6, 128, 128, window, plan), 2e-2)
    compare_strided("cuda", torch.bfloat16)
    check_large_scores("cuda", torch.bfloat16)
    check_op("cuda", torch.bfloat16)


def interpreted(everything: bool) -> None:
    """By default one case each of even and of odd sizes, and what no window or width decides."""
    for case in CASES if everything else QUICK_CASES:
        compare("cpu", torch.float32, case, 2e-5)
    compare("cpu", torch.bfloat16, CASES[1] if everything else QUICK_CASES[1], 2e-2)
    compare_strided("cpu", torch.float32)
    check_large_scores("cpu", torch.float32)
    check_op("cpu", torch.float32)
