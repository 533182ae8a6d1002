"""The copy pointer's kernels and losses: the twins by hand, the kernels against float64, as operators of torch."""

import math

import pytest
import torch

from modded_nanogpt import attention_backends
from modded_nanogpt.kernels import pointer as kernels
from modded_nanogpt.kernels import pointer_loss
from modded_nanogpt.kernels.cross_entropy import CopyRows
from modded_nanogpt.kernels.reference import cross_entropy as cross_entropy_reference
from modded_nanogpt.kernels.reference import pointer as reference
from tests.modded.kernels.test_cross_entropy import SOFTCAP, close, inputs, packed

# (tokens, dimensions, block, where documents begin): documents of one token, borders beside tiles, bands that end
# inside of tiles and of documents, sizes that fill nothing
CASES = [
    (1, 16, 4, ()),
    (70, 16, 32, (1, 2, 40)),
    (150, 24, 48, (5, 64, 65)),
    (256, 32, 128, ()),
    (333, 128, 64, (192,)),
]
# (rows, width, vocabulary, targets ahead, rows at once)
LOSSES = [(1, 16, 37, 1, 4), (5, 16, 300, 2, 2), (7, 16, 9001, 3, 4)]


def pointers(case: tuple, device: str, dtype: torch.dtype) -> dict:
    """Few tokens, so that many match, and scores far from even."""
    tokens, dimensions, block, begins = case
    generator = torch.Generator().manual_seed(tokens)
    q, k = (torch.randn(tokens, dimensions, generator=generator) for _ in range(2))
    sink = torch.randn(tokens, generator=generator)
    ids = torch.randint(5, (tokens + 1,), generator=generator)
    cu_seqlens = torch.tensor([0, *begins, tokens, tokens], dtype=torch.int32)
    start, end = attention_backends.documents(cu_seqlens, tokens)
    return {
        "q": (2 * q / math.sqrt(dimensions)).to(device, dtype).requires_grad_(),
        "k": k.to(device, dtype).requires_grad_(),
        "sink": sink.to(device, torch.promote_types(dtype, torch.float32)).requires_grad_(),
        "tokens": ids[:-1].to(device, torch.int32),
        "targets": ids[1:].to(device),
        "doc_start": start.to(device),
        "doc_end": end.to(device),
        "block": block,
    }


def by_hand(given: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """Row by row, with lists."""
    copied, of_sink = [], []
    for i, sink in enumerate(given["sink"]):
        start, block = int(given["doc_start"][i]), given["block"]
        keys = [j for j in range(i) if j >= start and j // block >= i // block - 1]
        scores = torch.stack([sink, *(given["q"][i] @ given["k"][j] for j in keys)])
        shares = scores.exp() / scores.exp().sum()
        found = [
            a for a, j in zip(shares[1:], keys, strict=True) if given["tokens"][j] == given["targets"][i]
        ]
        copied.append(sum(found, start=0 * sink))
        of_sink.append(shares[0])
    return torch.stack(copied), torch.stack(of_sink)


def weighed(found: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """A number that both masses of each row have a part in, of its own size."""
    copied, of_sink = found[:2]
    ramp = torch.linspace(0.5, 2.0, copied.numel(), dtype=copied.dtype, device=copied.device)
    return (ramp * torch.log(copied + 0.01) - ramp.flip(0) * of_sink**2).sum()


def compare_shares(device: str, dtype: torch.dtype, case: tuple, tolerance: float) -> None:
    given = pointers(case, device, dtype)
    found = kernels.copy_shares(**given)
    weighed(found).backward()
    wide = {name: given[name].detach().double().requires_grad_() for name in ("q", "k", "sink")}
    others = {name: given[name] for name in ("tokens", "targets", "doc_start", "block")}
    truth = reference.copy_shares(**wide, **others)
    weighed(truth).backward()
    for ours, expected in zip(found, truth, strict=True):
        assert ours.dtype == torch.float32
        close(ours, expected.detach(), tolerance)
    for name in wide:
        if wide[name].grad.abs().max() > 1e-9:
            close(given[name].grad, wide[name].grad, tolerance)
        else:
            assert given[name].grad.abs().max() < 1e-6


def copies(rows: int, vocabulary: int, device: str, dtype: torch.dtype) -> dict:
    """The slot in the middle of the classes; one row that copies nothing, one whose sink takes all."""
    generator = torch.Generator().manual_seed(7)
    parts = torch.rand(rows, 3, generator=generator, dtype=torch.float64).softmax(-1)
    copied, of_sink = parts[:, 0].clone(), parts[:, 1].clone()
    copied[0], copied[-1], of_sink[-1] = 0.0, 0.0, 1.0
    return {
        "place": torch.tensor([vocabulary // 2], device=device),
        "copied": copied.to(device, dtype).requires_grad_(),
        "of_sink": of_sink.to(device, dtype).requires_grad_(),
    }


def loss_inputs(case: tuple, device: str, dtype: torch.dtype, slot_size: float) -> tuple[dict, CopyRows, int]:
    """slot_size: that many times as large a logit as others may have, before the cap; no target is the slot."""
    rows, width, vocabulary, ahead, rows_at_once = case
    given = inputs(rows, width, vocabulary, ahead, device, dtype)
    kind = torch.float64 if dtype == torch.float64 else torch.float32
    copy = CopyRows(**copies(rows, vocabulary, device, kind))
    slot = vocabulary // 2
    with torch.no_grad():
        given["head"][slot] = slot_size * given["x"].mean(0) / math.sqrt(width)
    for name in ("targets", "prefix_targets"):
        given[name] = torch.where(given[name] == slot, 1, given[name])
    return given, copy, rows_at_once


def compare_loss(
    device: str, dtype: torch.dtype, case: tuple, tolerance: float, slot_size: float = 1.0
) -> None:
    given, copy, rows_at_once = loss_inputs(case, device, dtype, slot_size)
    loss = pointer_loss.head_loss(
        **given, softcap=SOFTCAP, loss_scale=0.125, fp8=False, copy=copy, rows_at_once=rows_at_once
    )
    (loss * 0.125).backward()
    x, head = (given[name].detach().double().requires_grad_() for name in ("x", "head"))
    masses = [mass.detach().double().requires_grad_() for mass in copy[1:3]]
    rounded = (given["x"] @ given["head"].T).detach().double()
    z = x @ head.T
    z = z + (rounded - z).detach()
    others = [given[name] for name in ("targets", "prefix_targets", "mtp", "prefix_weight")]
    truth = cross_entropy_reference.row_losses(z, *others, SOFTCAP, (copy.place, *masses)).sum()
    (0.125 * truth).backward()
    close(loss.detach(), truth.detach(), tolerance)
    for ours, expected in zip((given["x"], given["head"], *copy[1:3]), (x, head, *masses), strict=True):
        close(ours.grad, expected.grad, tolerance)


def compare_fp8(device: str, rows: int, width: int, vocabulary: int, dtype: torch.dtype) -> None:
    """8-bit operands round to 2^-4 and 2^-3: directions and sizes must agree.

    A mass's gradient is a quotient of two probabilities, which a logit that is off by 0.1 changes by a tenth.
    """
    given, copy, _ = loss_inputs((rows, width, vocabulary, 3, rows), device, dtype, 1.0)
    with torch.no_grad():
        given["head"].mul_(0.3)
    fixed = {"softcap": SOFTCAP, "loss_scale": 0.125}
    loss = pointer_loss.head_loss(**given, **fixed, fp8=True, copy=copy, rows_at_once=rows // 2)
    (loss * 0.125).backward()
    wide = {name: given[name].detach().double().requires_grad_() for name in ("x", "head")}
    masses = [mass.detach().double().requires_grad_() for mass in copy[1:3]]
    truth = cross_entropy_reference.head_loss(**(given | wide), softcap=SOFTCAP, copy=(copy.place, *masses))
    (truth * 0.125).backward()
    assert abs(loss.item() / truth.item() - 1) < 0.02
    pairs = [(given[name].grad, wide[name].grad, 0.12) for name in wide]
    pairs += [(ours.grad, mass.grad, 0.3) for ours, mass in zip(copy[1:3], masses, strict=True)]
    for ours, expected, tolerance in pairs:
        assert (ours.double() - expected).norm() / expected.norm() < tolerance


def compare_eval(device: str, dtype: torch.dtype, vocabulary: int) -> None:
    """A mask leaves the slot and what is copied alone."""
    given, copy, _ = loss_inputs((5, 16, vocabulary, 1, 2), device, dtype, 1.0)
    x, head, targets = (given[name].detach() for name in ("x", "head", "targets"))
    copy = CopyRows(copy.place, copy.copied.detach(), copy.of_sink.detach())
    table = torch.rand(vocabulary, vocabulary, device=device) < 0.5
    previous = torch.randint(vocabulary, (5,), dtype=torch.int32, device=device)
    table[previous.long(), targets] = True
    table[previous[1].long(), targets[1]] = False
    table[:, copy.place] = False
    z = cross_entropy_reference.soft_cap((x @ head.T).double(), SOFTCAP)
    rows, (place,) = torch.arange(5, device=device), copy.place.tolist()
    at_once = (
        2 if device == "cpu" else 5
    )  # on a GPU fewer rows may take another product, which rounds elsewhere
    for mask in (None, table):
        allowed = None if mask is None else packed(mask)
        losses = pointer_loss.eval_losses(x, head, targets, SOFTCAP, copy, allowed, previous, at_once)
        logits = z if mask is None else z.masked_fill(~mask[previous.long()], -math.inf)
        logits[:, place] = z[:, place]
        alpha = logits.softmax(-1)[:, place]
        real = logits.index_fill(1, copy.place, -math.inf).softmax(-1)[rows, targets]
        p = real * (1 - alpha * (1 - copy.of_sink.double())) + alpha * copy.copied.double()
        close(losses, -(p + 1e-9).log(), 2e-5 if device == "cpu" else 1e-2)


def check_op(device: str) -> None:
    """What torch demands of an operator; and a compiled graph without breaks has the same losses."""
    checks = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static")
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    shares = pointers(CASES[1], device, dtype)
    torch.library.opcheck(torch.ops.speedrun.copy_shares.default, (*shares.values(),), test_utils=checks)
    given, copy, _ = loss_inputs(LOSSES[1], device, dtype, 1.0)
    x, head, *aims = given.values()
    arguments = (x, head, copy.copied, copy.of_sink, copy.place, *aims, *SOFTCAP, 1.0, False, 3)
    torch.library.opcheck(torch.ops.speedrun.pointer_head_loss.default, arguments, test_utils=checks)
    plain = [each.detach() for each in (x, head, copy.place, copy.copied, copy.of_sink, aims[0])]
    torch.library.opcheck(torch.ops.speedrun.pointer_eval_losses.default, (*plain, *SOFTCAP, None, None, 3))


def test_the_masses_by_hand():
    for case in CASES[:3]:
        given = pointers(case, "cpu", torch.float64)
        found, truth = kernels.copy_shares(**given), by_hand(given)
        for ours, expected in zip(found, truth, strict=True):
            torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)
        assert found[0][0] == 0 and found[1][0] == 1  # the first token has nothing to point at
        assert ((found[0] > 0.01).double().mean() > 0.3) or case == CASES[0]


def test_one_query_has_the_masses_of_all():
    given = pointers(CASES[2], "cpu", torch.float64)
    copied, of_sink = kernels.copy_shares(**given)
    low = reference.first_key(given["doc_start"], given["block"])
    for place in (0, 5, 64, 149):
        mass, sink = reference.copied_tokens(
            given["q"][place], given["k"][:place], given["sink"][place : place + 1], given["tokens"][:place],
            int(low[place]), 5,
        )  # fmt: skip
        torch.testing.assert_close(mass[given["targets"][place]], copied[place])
        torch.testing.assert_close(sink, of_sink[place])
        assert (mass.sum() + sink).item() == pytest.approx(1.0)


def test_the_mixture_by_hand():
    """Every term of the loss; and probabilities of all tokens add up to one."""
    given, copy, _ = loss_inputs((5, 16, 37, 3, 4), "cpu", torch.float64, 1.0)
    loss = pointer_loss.head_loss(**given, softcap=SOFTCAP, loss_scale=1.0, fp8=False, copy=copy)
    total, slot = 0.0, 37 // 2
    for t, row in enumerate((given["x"] @ given["head"].T).tolist()):
        shares = [math.exp(23 / (1 + math.exp(-(value + 5) / 7.5))) for value in row]
        alpha, real_sum = shares[slot] / sum(shares), sum(shares) - shares[slot]
        copied, sink = copy.copied[t].item(), copy.of_sink[t].item()
        real = shares[given["targets"][t]] / real_sum
        total -= math.log(real * (1 - alpha * (1 - sink)) + alpha * copied + 1e-9)
        wanted = [(w, given["targets"][t + k]) for k, w in ((1, 0.5), (2, 0.25)) if t + k < 5]
        if t > 0:
            wanted.append((0.25, given["prefix_targets"][t]))
        total -= sum(w * math.log(shares[token] / sum(shares)) for w, token in wanted)
    assert loss.item() == pytest.approx(total, rel=1e-9)

    log_p = torch.randn(37, dtype=torch.float64).log_softmax(-1)
    masses = torch.rand(38, dtype=torch.float64)
    masses[slot] = 0.0
    masses = masses / masses.sum()
    p = reference.mixed(log_p, log_p[slot], masses[:37], masses[37]).exp()
    assert (p.sum() - p[slot]).item() == pytest.approx(1.0, abs=1e-6)


@pytest.mark.gpu
def test_the_kernels_on_a_gpu():
    if not torch.cuda.is_available():
        pytest.skip("no NVIDIA driver on this machine")
    from modded_nanogpt.kernels import fp8

    torch.backends.cuda.matmul.allow_tf32 = False
    large = (49_152, 128, 2048, tuple(range(700, 49_000, 700)))
    for case in [*CASES, large, (16_384, 128, 2048, ())]:
        compare_shares("cuda", torch.bfloat16, case, 2e-2)
    for *sizes, _ in [*LOSSES, (513, 768, 50_304, 3, 0)]:  # all rows at once: see `compare_eval`
        compare_loss("cuda", torch.bfloat16, (*sizes, sizes[0]), 2e-2)
    compare_eval("cuda", torch.bfloat16, 300)
    if fp8.choose("auto", torch.device("cuda")).head:
        compare_fp8("cuda", 512, 768, 50_304, torch.bfloat16)
    check_op("cuda")


def interpreted(everything: bool) -> None:
    for case in CASES if everything else CASES[:3]:
        compare_shares("cpu", torch.float32, case, 2e-5)
    compare_shares("cpu", torch.bfloat16, CASES[1], 2e-2)
    for case in LOSSES if everything else LOSSES[:2]:
        compare_loss("cpu", torch.float32, case, 5e-5)
    compare_loss("cpu", torch.float32, LOSSES[1], 5e-5, slot_size=20.0)
    compare_loss("cpu", torch.bfloat16, LOSSES[1], 1e-2)
    compare_fp8("cpu", 32, 64, 304, torch.bfloat16)
    compare_eval("cpu", torch.float32, 37)
    check_op("cpu")
