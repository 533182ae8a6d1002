"""The model: shapes, causality, GPT-2's names and sizes and initial weights, and the two forms of its loss."""

import math
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from nanogpt.config import GPT2_SIZES
from nanogpt.cross_entropy import linear_cross_entropy
from nanogpt.model import GPT, Shape

SHAPE = Shape(vocab_size=37, block_size=12, n_layer=2, n_head=3, n_embd=24, bias=True)


def model_of(shape: Shape = SHAPE, seed: int = 1, **kwargs: object) -> GPT:
    model = GPT(shape, **kwargs)
    model.init_weights(seed)
    return model


def tokens_of(*size: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(SHAPE.vocab_size, size, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [(1, 1), (2, 5), (3, 12)])
def test_shapes_and_dtypes(dtype, size):
    model = model_of(dtype=dtype)
    hidden = model.hidden(tokens_of(*size))
    assert (hidden.shape, hidden.dtype) == ((*size, 24), dtype)
    assert model.logits(hidden).shape == (*size, 37)
    loss = model(tokens_of(*size), tokens_of(*size, seed=1))
    assert (loss.shape, loss.dtype) == ((), torch.float32)
    loss.backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.shape == p.shape for p in model.parameters())


def test_what_comes_later_changes_nothing_before():
    model, tokens = model_of(), tokens_of(2, 12)
    before = model.logits(model.hidden(tokens))
    for cut in range(1, 12):
        changed = tokens.clone()
        changed[:, cut:] = (changed[:, cut:] + 1 + cut) % SHAPE.vocab_size
        after = model.logits(model.hidden(changed))
        torch.testing.assert_close(after[:, :cut], before[:, :cut], rtol=0, atol=1e-6)
        assert (after[:, cut] - before[:, cut]).abs().max() > 1e-3


def test_what_comes_before_does_change_what_is_later():
    model, tokens = model_of(), tokens_of(1, 12)
    changed = tokens.clone()
    changed[0, 0] = (changed[0, 0] + 1) % SHAPE.vocab_size
    difference = (model.hidden(tokens) - model.hidden(changed)).abs().amax(-1)
    assert (difference > 1e-6).all()


def test_positions_count_from_start():
    model, tokens = model_of(), tokens_of(1, 4)
    shifted = model.hidden(tokens, start=3)
    assert not torch.allclose(shifted, model.hidden(tokens))
    torch.testing.assert_close(shifted, model.hidden(tokens, start=torch.tensor([3])))
    with torch.no_grad():
        model.transformer.wpe.weight[:4] = model.transformer.wpe.weight[3:7].clone()
    torch.testing.assert_close(shifted, model.hidden(tokens))


def test_the_names_are_gpt2s():
    names = {
        "transformer.wte.weight",
        "transformer.wpe.weight",
        "transformer.ln_f.weight",
        "transformer.ln_f.bias",
    }
    for layer in range(SHAPE.n_layer):
        for part in ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj"):
            names |= {f"transformer.h.{layer}.{part}.{kind}" for kind in ("weight", "bias")}
    assert set(model_of().state_dict()) == names
    without = GPT(Shape(**{**vars(SHAPE), "bias": False})).state_dict()
    assert set(without) == {name for name in names if name.endswith("weight")}


@pytest.mark.parametrize(
    ("name", "vocab_size", "bias", "millions"),
    [("gpt2", 50304, False, 123.59), ("gpt2", 50257, True, 123.65), ("gpt2-medium", 50257, True, 353.77),
     ("gpt2-large", 50257, True, 772.72), ("gpt2-xl", 50257, True, 1555.97)],
)  # fmt: skip
def test_the_number_of_parameters_is_that_of_the_published_models(name, vocab_size, bias, millions):
    layers, heads, width = GPT2_SIZES[name]
    with torch.device("meta"):
        model = GPT(Shape(vocab_size, 1024, layers, heads, width, bias))
    assert model.num_parameters() / 1e6 == pytest.approx(millions, abs=0.01)
    assert sum(p.numel() for p in model.parameters()) == model.num_parameters() + 1024 * width


def test_flops_per_token_by_hand():
    with torch.device("meta"):
        model = GPT(Shape(50304, 1024, 12, 12, 768, False))
    assert model.flops_per_token() == 6 * 123_587_328 + 12 * 12 * 768 * 1024


def test_the_initial_weights_have_gpt2s_statistics():
    model = model_of(Shape(vocab_size=500, block_size=64, n_layer=8, n_head=4, n_embd=64, bias=True))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert (parameter == 0).all()
        elif parameter.ndim == 1:
            assert (parameter == 1).all()
        else:
            std = 0.01 if name == "transformer.wpe.weight" else 0.02
            if name.endswith("c_proj.weight"):
                std /= math.sqrt(2 * 8)
            # The standard deviation of a sample's standard deviation is std / sqrt(2 n).
            assert abs(parameter.std().item() - std) < 5 * std / math.sqrt(2 * parameter.numel()), name
            assert abs(parameter.mean().item()) < 5 * std / math.sqrt(parameter.numel()), name


def test_the_initial_weights_come_from_the_seed():
    same = zip(model_of(seed=3).parameters(), model_of(seed=3).parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in same)
    assert not torch.equal(model_of(seed=3).transformer.wte.weight, model_of(seed=4).transformer.wte.weight)


def test_an_untrained_model_knows_nothing():
    loss = model_of()(tokens_of(8, 12), tokens_of(8, 12, seed=1))
    assert loss.item() == pytest.approx(math.log(37), rel=0.02)


def test_dropout_is_for_training_only():
    model, tokens = model_of(dropout=0.5), tokens_of(2, 12)
    assert not torch.equal(model.hidden(tokens), model.hidden(tokens))
    model.eval()
    assert torch.equal(model.hidden(tokens), model.hidden(tokens))


def test_the_plain_loss_equals_float64_and_leaves_out_ignored_targets():
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(9, 5, generator=generator), torch.randn(7, 5, generator=generator)
    targets = torch.tensor([0, 6, -100, 3, 3, 1, -100, 2, 5])
    kept = targets >= 0
    logits = x.double() @ weight.double().T
    expected = (logits.logsumexp(-1)[kept] - logits[kept, targets[kept]]).mean()
    assert linear_cross_entropy(x, weight, targets).item() == pytest.approx(expected.item(), rel=1e-6)


COMPARE_FUSED = """
import sys
import torch
import torch.nn.functional as F
from nanogpt.cross_entropy import linear_cross_entropy

device = sys.argv[1]
low = torch.bfloat16 if device == "cuda" else torch.float32
for rows, width, vocabulary, spread in ((1, 16, 2, 1), (3, 16, 37, 1), (7, 8, 1000, 30), (5, 24, 8191, 1),
                                        (4, 16, 8200, 100), (2, 8, 16385, 1)):
    generator = torch.Generator().manual_seed(rows)
    x = (spread * torch.randn(rows, width, generator=generator)).to(device, low).requires_grad_()
    weight = torch.randn(vocabulary, width, generator=generator).to(device).requires_grad_()
    targets = torch.randint(vocabulary, (rows,), generator=generator).to(device)
    targets[-1] = vocabulary - 1
    loss = linear_cross_entropy(x, weight, targets, fused=True)
    (3 * loss).backward()
    # Float64 from the logits as this dtype rounds them: what is compared is the loss, not the product before it.
    logits = (x.detach() @ weight.detach().to(low).T).double()
    exact = F.cross_entropy(logits, targets)
    slope = 3 * (logits.softmax(-1) - F.one_hot(targets, vocabulary)) / rows
    exact_x, exact_weight = slope @ weight.detach().double(), slope.T @ x.detach().double()
    plain_x, plain_weight = x.detach().clone().requires_grad_(), weight.detach().clone().requires_grad_()
    plain = linear_cross_entropy(plain_x, plain_weight, targets)
    (3 * plain).backward()
    rtol = 2e-2 if low == torch.bfloat16 else 1e-4
    for ours, twin, truth in ((loss, plain, exact), (x.grad, plain_x.grad, exact_x),
                              (weight.grad, plain_weight.grad, exact_weight)):
        scale = truth.abs().max().item()
        error = (ours.double() - truth).abs().max().item() / scale
        assert error < rtol, (rows, width, vocabulary, spread, error)
        apart = (ours.double() - twin.double()).abs().max().item() / scale
        assert apart < 2 * rtol, (rows, width, vocabulary, spread, apart)
print("equal")
"""


def test_the_fused_loss_equals_its_twin_and_float64_interpreted(run_python):
    """The Triton kernel itself, run by Triton's interpreter on the CPU, at sizes that fit no block.

    No fork: Triton must not have been imported before it is told to interpret.
    """
    done = run_python("-c", COMPARE_FUSED, "cpu", env={"TRITON_INTERPRET": "1"})
    assert done.stdout.endswith("equal\n"), done.stderr[-2000:]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
def test_the_fused_loss_equals_its_twin_and_float64_on_a_gpu(root):
    done = subprocess.run(
        [sys.executable, "-c", COMPARE_FUSED, "cuda"], cwd=root, capture_output=True, text=True, timeout=600
    )
    assert done.stdout.endswith("equal\n"), done.stderr[-2000:]


def test_attention_is_told_which_layer_it_serves():
    """The hook that sampling uses: called once a layer, in order, with the heads apart; its answer is what counts."""
    model, tokens, seen = model_of(), tokens_of(2, 6), []

    def attend(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        seen.append((layer, q.shape))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    torch.testing.assert_close(model.hidden(tokens, 0, attend), model.hidden(tokens))
    assert seen == [(0, (2, 3, 6, 8)), (1, (2, 3, 6, 8))]
    silent = model.hidden(tokens, 0, lambda layer, q, k, v: torch.zeros_like(q))
    assert not torch.allclose(silent, model.hidden(tokens), atol=1e-3)
