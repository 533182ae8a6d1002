"""The MLP: the kernels against float64, the scales' way through the steps, as an op of torch."""

from collections.abc import Iterable

import pytest
import torch
import torch.nn.functional as F

from modded_nanogpt.kernels import mlp as kernels
from modded_nanogpt.kernels.mlp_weights import Fp8Mlp
from modded_nanogpt.kernels.reference import mlp as reference

SIZES = [(1, 16, 16), (33, 48, 80), (70, 96, 208)]  # (tokens, width, hidden): odd beside any tile
BOTH_SIZES = [(16, 16, 16), (48, 48, 80), (80, 96, 208)]  # where the tokens are summed over too
# What reads 8 bits: (up, down, backward), and how far from float64 out, du, d up and d down may be, in norm. Rounding
# to e4m3 loses 2.6% in norm, twice that where it is squared; rounding to e5m2 5%.
KINDS = {
    "bfloat16": (None, (0.004, 0.005, 0.005, 0.005)),
    "up": ((True, False, False), (0.07, 0.06, 0.06, 0.07)),
    "down": ((False, True, False), (0.06, 0.005, 0.005, 0.005)),
    "both": ((True, True, False), (0.08, 0.06, 0.06, 0.07)),
    "backward": ((True, True, True), (0.08, 0.13, 0.14, 0.12)),
}


def sizes_of(kind: str) -> list[tuple[int, int, int]]:
    return BOTH_SIZES if kind == "backward" else SIZES


def inputs(size: tuple[int, int, int], device: str, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """(u of RMS 1, bank of one layer, gradient of out)."""
    tokens, width, hidden = size
    generator = torch.Generator().manual_seed(tokens)
    u = F.rms_norm(torch.randn(tokens, width, generator=generator), (width,))
    bank = torch.randn(1, 2, hidden, width, generator=generator)
    bank[0, 0] /= width**0.5
    bank[0, 1] /= hidden**0.5
    return tuple(
        t.to(device, dtype) for t in (u, bank, 0.1 * torch.randn(tokens, width, generator=generator))
    )


def run(function, u: torch.Tensor, bank: torch.Tensor, grad: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """(out, du, d up, d down)."""
    u, up, down = (t.detach().clone().requires_grad_() for t in (u, *bank[0]))
    out = function(u, up, down)
    out.backward(grad)
    return out.detach(), u.grad, up.grad, down.grad


def state_of(u: torch.Tensor, bank: torch.Tensor, which: tuple[bool, bool, bool]) -> Fp8Mlp:
    """Copies after a step over the same tokens, so that the scale of `post` is known."""
    state = Fp8Mlp(bank, *which)
    state.refresh(exact=True)
    kernels.mlp(u, *bank[0], state, 0)
    state.refresh(exact=True)
    return state


def compare(device: str, dtype: torch.dtype, size: tuple[int, int, int], kind: str) -> None:
    u, bank, grad = inputs(size, device, dtype)
    which, tolerances = KINDS[kind]
    state = None if which is None else state_of(u, bank, which)
    ours = run(lambda *weights: kernels.mlp(*weights, state, 0), u, bank, grad)
    exact = run(reference.mlp, u.double(), bank.double(), grad.double())
    for got, truth, tolerance in zip(ours, exact, tolerances, strict=True):
        assert got.dtype == dtype
        error = (got.double() - truth).norm() / truth.norm()
        allowed = tolerance * (2 if len(u) == 1 else 1)  # few numbers: no average
        assert error <= allowed, (kind, size, dtype, error)


def check_scales(device: str) -> None:
    """The largest entry of `post` reaches next step's scale; weights take this step's or last step's scale."""
    u, bank, _ = inputs((33, 48, 80), device, torch.float32)
    bank = torch.cat([bank, 2 * bank])
    state = Fp8Mlp(bank)
    state.refresh(exact=True)
    weights = bank.abs().amax((2, 3)).view(-1)
    torch.testing.assert_close(state.weight_scale, weights / 448)
    assert (state.post_scale == 1).all()
    for layer in (0, 1):
        for _ in range(2):  # two lanes: the larger one counts
            kernels.mlp(u, *bank[layer], state, layer)
        kernels.mlp(0.5 * u, *bank[layer], state, layer)
    seen = []
    state.refresh(exact=False, reduce=lambda largest: seen.append(largest.clone()))
    post = [F.relu(u @ up.T).square().amax() for up in bank[:, 0]]
    torch.testing.assert_close(seen[0], torch.stack(post), rtol=0.1, atol=0)  # from 8-bit operands
    torch.testing.assert_close(state.post_scale, 1.8 * seen[0] / 448)
    torch.testing.assert_close(state.weight_scale, 1.12 * weights / 448)
    kept = state.post_scale.clone()
    state.refresh(exact=False)
    assert torch.equal(state.post_scale, kept), "no forward pass, nothing new to know"

    with torch.no_grad():
        bank *= 1.1
    state.refresh(exact=False)  # measured before the weights grew
    torch.testing.assert_close(state.weight_scale, 1.12 * weights / 448)
    state.refresh(exact=False)
    torch.testing.assert_close(state.weight_scale, 1.12 * 1.1 * weights / 448)


def check_resume(device: str) -> None:
    """A state that was saved and loaded goes on with equal bits."""
    u, bank, _ = inputs((33, 48, 80), device, torch.bfloat16)
    first = state_of(u, bank, (True, True, False))
    with torch.no_grad():
        bank *= 1.05
    first.refresh(exact=False)
    second = Fp8Mlp(bank)
    second.load(first.tensors())
    outs = []
    for state in (first, second):
        for _ in range(2):
            outs.append(kernels.mlp(u, *bank[0], state, 0))
            state.refresh(exact=False)
    assert torch.equal(outs[0], outs[2]) and torch.equal(outs[1], outs[3])


def check_gradient_layout(device: str) -> None:
    """A gradient that arrives transposed in memory is as good as one that does not."""
    u, bank, grad = inputs((48, 48, 80), device, torch.bfloat16)
    for kind in ("bfloat16", "backward"):
        which, found = KINDS[kind][0], []
        for given in (grad, grad.T.contiguous().T):
            state = None if which is None else state_of(u, bank, which)
            found.append(run(lambda *weights, s=state: kernels.mlp(*weights, s, 0), u, bank, given))
        for one, other in zip(*found, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-2, atol=1e-2)


def check_op(device: str, kinds: Iterable[str], **how: object) -> None:
    """Torch's own checks of an op; a compiled graph without breaks, which changes the state as the plain call does."""
    u, bank, grad = inputs((48, 48, 80), device, torch.bfloat16)
    for kind in kinds:
        which = KINDS[kind][0]
        results = []
        for compiled in (False, True):
            state = None if which is None else state_of(u, bank, which)
            function = kernels.mlp
            if compiled:
                torch._dynamo.reset()
                kernels.before_compiling()
                function = torch.compile(
                    kernels.mlp, fullgraph=True, dynamic=False, **(how or {"backend": "aot_eager"})
                )
            outs = run(lambda *weights, f=function, s=state: f(*weights, s, 0), u, bank, grad)
            largest = [] if state is None else [state.largest[0]]
            results.append((*outs, *largest))
        for one, other in zip(*results, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-2, atol=1e-2)
    arguments = (*(t.clone().requires_grad_() for t in (u, *bank[0])), *[None] * 6)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static")
    torch.library.opcheck(torch.ops.speedrun.mlp.default, arguments, test_utils=checks)


def test_the_twin_by_hand():
    u, up, down = (
        torch.tensor([[1.0, 2.0]]),
        torch.tensor([[3.0, -1.0], [-2.0, 0.5]]),
        torch.tensor([[1.0, 0], [5, 7]]),
    )
    assert kernels.mlp(u, up, down).tolist() == [[1.0, 0.0]]  # pre (1, -1), post (1, 0)


def test_the_cpu_takes_the_twin_and_compiles():
    u, bank, grad = inputs((5, 16, 32), "cpu", torch.float64)
    compiled = torch.compile(kernels.mlp, fullgraph=True, backend="aot_eager")
    for one, other in zip(run(compiled, u, bank, grad), run(reference.mlp, u, bank, grad), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("eight_bit", [False, True])
@pytest.mark.parametrize("shared_kib", [99, 227])
def test_the_tiles_fit(shared_kib, eight_bit):
    """What Triton was seen to reserve: the pieces under way, half tiles of what goes in and out, and a little more."""
    for end_bytes in (2, 3, 4) if not eight_bit else (2, 3, 5):  # only what there is
        cut = kernels.tiles(shared_kib * 1024, eight_bit, end_bytes)
        pieces = (cut.m + cut.n) * cut.k * (1 if eight_bit else 2) * cut.stages
        ends = cut.m * cut.n // 2 * end_bytes
        assert cut.stages >= 2 and pieces + ends + 1024 <= shared_kib * 1024


@pytest.mark.gpu
def test_the_kernels_on_a_gpu():
    if not torch.cuda.is_available():
        pytest.skip("no NVIDIA driver on this machine")
    from modded_nanogpt.kernels import fp8

    if not fp8.choose("auto", torch.device("cuda")).mlp:
        pytest.skip("the MLP's kernels need Hopper or later")
    for kind in KINDS:
        for size in [*sizes_of(kind), (1008, 768, 3072), (16_384, 768, 2816)]:
            compare("cuda", torch.bfloat16, size, kind)
    check_resume("cuda")
    check_gradient_layout("cuda")
    check_op("cuda", KINDS)
    check_op("cuda", KINDS, backend="inductor")


def interpreted(everything: bool) -> None:
    for kind in KINDS if everything else ("bfloat16", "backward"):
        for size in sizes_of(kind) if everything else sizes_of(kind)[1:2]:
            compare("cpu", torch.float32 if size[0] < 20 else torch.bfloat16, size, kind)
    with pytest.raises(ValueError, match="33 tokens: must be a multiple of 16 in 8 bits"):
        compare("cpu", torch.bfloat16, SIZES[1], "backward")
    check_scales("cpu")
    check_resume("cpu")
    check_gradient_layout("cpu")
    check_op("cpu", KINDS if everything else ("bfloat16", "backward"))
    with pytest.raises(ValueError, match="must be multiples of 16"):
        kernels.mlp(torch.ones(2, 24), torch.ones(16, 24), torch.ones(16, 24))
