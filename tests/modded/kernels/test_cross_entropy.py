"""The head's loss and its gradients: the twin by hand, the kernel against float64, as an op of torch."""

import math

import pytest
import torch

from modded_nanogpt.kernels import cross_entropy as kernels
from modded_nanogpt.kernels.reference import cross_entropy as reference

SOFTCAP = (23.0, 5.0, 7.5)
# (rows, width, vocabulary, targets ahead, rows at once): vocabularies below, at and between the kernel's blocks
CASES = [(1, 16, 37, 3, 4), (5, 16, 300, 2, 2), (6, 32, 8192, 1, 6), (7, 16, 9001, 3, 4)]


def inputs(rows: int, width: int, vocabulary: int, ahead: int, device: str, dtype: torch.dtype) -> dict:
    """Targets that coincide, one prefix that is missing, logits over the whole range of the cap."""
    generator = torch.Generator().manual_seed(rows)
    x, head = (torch.randn(n, width, generator=generator) for n in (rows, vocabulary))
    targets, prefix = (torch.randint(vocabulary, (rows,), generator=generator) for _ in range(2))
    targets[-1], prefix[0] = vocabulary - 1, -1
    if rows > 4:
        targets[2] = targets[3] = prefix[2]
    scale = 6 / math.sqrt(width)
    return {
        "x": (3 * x).to(device, dtype).requires_grad_(),
        "head": (scale * head).to(device, dtype).requires_grad_(),
        "targets": targets.to(device),
        "prefix_targets": prefix.to(device),
        "mtp": torch.tensor([1.0, 0.5, 0.25][:ahead], device=device),
        "prefix_weight": torch.tensor([0.25], device=device),
    }


def exact(given: dict, factor: float, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """(loss, gradients of factor x loss) in float64, from logits as `dtype` rounds them."""
    x, head = (given[name].detach().double().requires_grad_() for name in ("x", "head"))
    rounded = (given["x"] @ given["head"].T).detach().double()
    z = x @ head.T
    z = z + (rounded - z).detach()
    others = [given[name] for name in ("targets", "prefix_targets", "mtp", "prefix_weight")]
    loss = reference.row_losses(z, *others, SOFTCAP).sum()
    (factor * loss).backward()
    return loss.detach(), x.grad, head.grad


def close(ours: torch.Tensor, truth: torch.Tensor, tolerance: float) -> None:
    """Within `tolerance` of the largest entry, and in the mean much closer."""
    error, scale = (ours.double() - truth).abs(), truth.abs().max()
    assert torch.isfinite(ours).all()
    assert error.max() <= tolerance * scale, (error.max() / scale, tolerance)


def compare_loss(device: str, dtype: torch.dtype, case: tuple[int, ...], rtol: float) -> None:
    *sizes, rows_at_once = case
    given = inputs(*sizes, device, dtype)
    loss = kernels.head_loss(**given, softcap=SOFTCAP, loss_scale=0.125, fp8=False, rows_at_once=rows_at_once)
    (loss * 0.125).backward()
    for ours, truth in zip(
        (loss, given["x"].grad, given["head"].grad), exact(given, 0.125, dtype), strict=True
    ):
        close(ours, truth, rtol)


def compare_fp8(device: str, rows: int, width: int, vocabulary: int, dtype: torch.dtype) -> None:
    """8-bit operands round to 2^-4 and 2^-3: the gradients' directions must agree, and their sizes."""
    given = inputs(rows, width, vocabulary, 3, device, dtype)
    with torch.no_grad():
        given["head"].mul_(0.3)
    loss = kernels.head_loss(**given, softcap=SOFTCAP, loss_scale=0.125, fp8=True, rows_at_once=rows // 2)
    (loss * 0.125).backward()
    truth = exact(given, 0.125, dtype)
    assert abs(loss.item() / truth[0].item() - 1) < 0.02
    for ours, expected in ((given["x"].grad, truth[1]), (given["head"].grad, truth[2])):
        error = (ours.double() - expected).norm() / expected.norm()
        assert ours.dtype == dtype and error < 0.12, error


def compare_eval(device: str, dtype: torch.dtype, vocabulary: int) -> None:
    """Exact up to the product; a mask takes probability away from what may not follow."""
    given = inputs(5, 16, vocabulary, 1, device, dtype)
    x, head, targets = (given[name].detach() for name in ("x", "head", "targets"))
    z = (x @ head.T).double()
    logits = reference.soft_cap(z, SOFTCAP)
    rows = torch.arange(5, device=device)
    losses = kernels.eval_losses(x, head, targets, SOFTCAP, rows_at_once=2)
    # On a GPU another number of rows may take another product, which rounds elsewhere.
    tolerance = 2e-6 if device == "cpu" else 1e-2
    close(losses, -logits.log_softmax(-1)[rows, targets], tolerance)

    table = torch.rand(vocabulary, vocabulary, device=device) < 0.5
    previous = torch.randint(vocabulary, (5,), dtype=torch.int32, device=device)
    table[previous.long(), targets] = True
    table[previous[0].long(), targets[0]] = False
    allowed = packed(table)
    losses = kernels.eval_losses(x, head, targets, SOFTCAP, allowed, previous, 3)
    logits = logits.masked_fill(~table[previous.long()], -math.inf)
    assert losses[0] == math.inf
    close(losses[1:], -logits.log_softmax(-1)[rows, targets][1:], tolerance)
    twin = reference.eval_losses(x, head, targets, SOFTCAP, allowed, previous)
    if dtype == torch.float32:
        torch.testing.assert_close(losses, twin, rtol=1e-5, atol=1e-5)


def packed(table: torch.Tensor) -> torch.Tensor:
    """Bits from the lowest up, as numpy.packbits(bitorder="little") packs them."""
    padded = torch.nn.functional.pad(table, (0, -table.shape[1] % 8)).view(len(table), -1, 8)
    return (padded << torch.arange(8, device=table.device)).sum(-1).to(torch.uint8)


def check_zero_weights(device: str) -> None:
    """A weight of zero is as good as no target at all, and the plain cross entropy is what remains."""
    given = inputs(6, 16, 300, 3, device, torch.float32)
    given["mtp"] = torch.tensor([1.0, 0.0, 0.0], device=device)
    given["prefix_weight"] = torch.zeros(1, device=device)
    fixed = {"softcap": SOFTCAP, "loss_scale": 1.0, "fp8": False}
    loss = kernels.head_loss(**given, **fixed)
    alone = kernels.head_loss(**given | {"prefix_targets": None, "mtp": given["mtp"][:1]}, **fixed)
    logits = reference.soft_cap(given["x"] @ given["head"].T, SOFTCAP)
    plain = torch.nn.functional.cross_entropy(logits, given["targets"], reduction="sum")
    assert loss.item() == alone.item() == pytest.approx(plain.item(), rel=1e-5 if device == "cpu" else 1e-3)


def check_contract(device: str) -> None:
    """What arrives from above multiplies the gradients; `loss_scale` itself changes no bit of them."""
    seen = []
    for factor in (0.125, 7.0):
        given = inputs(5, 16, 300, 2, device, torch.float32)
        loss = kernels.head_loss(**given, softcap=SOFTCAP, loss_scale=0.125, fp8=False)
        formed = loss.grad_fn.saved_tensors
        (factor * loss).backward()
        if factor == 0.125:
            assert torch.equal(given["x"].grad, formed[0]) and torch.equal(given["head"].grad, formed[1])
        seen.append(given["x"].grad)
    torch.testing.assert_close(seen[1], 56 * seen[0])


def check_op(device: str) -> None:
    """What torch demands of an op: schema, shapes without data, gradients; and a compiled graph without breaks."""
    given = inputs(5, 16, 300, 2, device, torch.float32)
    arguments = (*given.values(), *SOFTCAP, 1.0, False, 3)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static")
    torch.library.opcheck(torch.ops.speedrun.head_loss.default, arguments, test_utils=checks)
    plain = [given["x"].detach(), given["head"].detach(), given["targets"]]
    torch.library.opcheck(torch.ops.speedrun.eval_losses.default, (*plain, *SOFTCAP, None, None, 3))
    check_compiled(device)


def check_compiled(device: str, **how: object) -> None:
    def loss_of(x: torch.Tensor, head: torch.Tensor, **others: torch.Tensor) -> torch.Tensor:
        y = torch.nn.functional.rms_norm(x, (x.shape[1],))
        return kernels.head_loss(y, head, **others, softcap=SOFTCAP, loss_scale=1.0, fp8=False)

    compiled = torch.compile(loss_of, fullgraph=True, **(how or {"backend": "aot_eager"}))
    results = []
    for function in (loss_of, compiled):
        given = inputs(5, 16, 300, 2, device, torch.float32)
        loss = function(**given)
        loss.backward()
        results.append((loss.detach(), given["x"].grad, given["head"].grad))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_the_twin_by_hand():
    """Each target's share of the loss, row by row, with nothing but exp and log."""
    given = inputs(5, 16, 37, 3, "cpu", torch.float64)
    with torch.no_grad():
        loss = kernels.head_loss(**given, softcap=SOFTCAP, loss_scale=1.0, fp8=False)
        z = given["x"] @ given["head"].T
    total = 0.0
    for t, row in enumerate(z.tolist()):
        logits = [23 / (1 + math.exp(-(value + 5) / 7.5)) for value in row]
        log_sum = math.log(sum(math.exp(value) for value in logits))
        wanted = [(w, t + k) for k, w in enumerate((1.0, 0.5, 0.25)) if t + k < 5]
        wanted = [(w, given["targets"][place].item()) for w, place in wanted]
        if t > 0:  # row 0 has no prefix
            wanted.append((0.25, given["prefix_targets"][t].item()))
        total += sum(w * (log_sum - logits[token]) for w, token in wanted)
    assert loss.item() == pytest.approx(total, rel=1e-12)


def test_the_twin_obeys_what_arrives_from_above():
    slopes = []
    for factor in (1.0, 3.0):
        given = inputs(5, 16, 37, 3, "cpu", torch.float64)
        (factor * kernels.head_loss(**given, softcap=SOFTCAP, loss_scale=1.0, fp8=False)).backward()
        slopes.append(given["x"].grad)
    torch.testing.assert_close(slopes[1], 3 * slopes[0])


def test_the_plain_path_compiles_whole():
    check_compiled("cpu")


def test_evaluation_on_the_cpu():
    compare_eval("cpu", torch.float64, 37)
    compare_eval("cpu", torch.float32, 300)


@pytest.mark.gpu
def test_the_kernels_on_a_gpu():
    if not torch.cuda.is_available():
        pytest.skip("no NVIDIA driver on this machine")
    from modded_nanogpt.kernels import fp8

    torch.backends.cuda.matmul.allow_tf32 = False
    for case in [*CASES, (513, 768, 50_304, 3, 200)]:
        compare_loss("cuda", torch.bfloat16, case, 2e-2)  # the fast tanh is within 2^-11
        compare_eval("cuda", torch.bfloat16, case[2] if case[2] < 10_000 else 300)
    if fp8.choose("auto", torch.device("cuda")).head:
        compare_fp8("cuda", 512, 768, 50_304, torch.bfloat16)
    check_zero_weights("cuda")
    check_contract("cuda")
    check_op("cuda")
    check_compiled("cuda", backend="inductor")


def interpreted(everything: bool) -> None:
    for case in CASES if everything else [CASES[0], CASES[3]]:
        compare_loss("cpu", torch.float32, case, 2e-5)
    compare_loss("cpu", torch.bfloat16, CASES[1], 1e-2)
    compare_fp8("cpu", 32, 64, 304, torch.bfloat16)
    for size in (37, 9001) if everything else (37,):
        compare_eval("cpu", torch.float32, size)
    check_zero_weights("cpu")
    check_contract("cpu")
    check_op("cpu")
