"""The medium track's forward pass against section 8 of the specification, written out naively in float64."""

import math

import pytest
import torch

from modded_nanogpt import attention_backends, layer_plan
from modded_nanogpt.attention import Documents
from modded_nanogpt.config import PRESETS, Config
from modded_nanogpt.model import Rows
from modded_nanogpt.model_medium import MediumModel
from nanogpt.common.flags import parse
from tests.modded.test_speedrun_model import BOUNDS, norm, soft, turned

T, D, H, HEADS, LAYERS, VOCAB = 60, 64, 16, 4, 16, 256
LONG = (0, 4, 11, 15)
TABLE = {0: 0, 1: 1, 2: 2, 3: 3, 4: 4, 11: 0, 12: 1, 13: 2, 14: 3, 15: 4}
SKIPS = {9: 6, 10: 4, 11: 2}
TOKENS = torch.randint(VOCAB, (T,), generator=torch.Generator().manual_seed(3))


def medium(*flags: str) -> Config:
    words = ["medium", "--recipe=tiny_medium", f"--vocab_size={VOCAB}", "--eval_slice=128", *flags]
    return parse(Config, words, prog="t", description="t", presets=PRESETS)


def build(config: Config) -> MediumModel:
    """A model whose every parameter matters: what starts at zero is made random."""
    cpu = torch.device("cpu")
    backend = attention_backends.choose("reference", cpu, torch.float64)
    model = MediumModel(config, backend, cpu, torch.float64)
    model.double()
    model.init_weights(1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            scale = 0.3 if parameter.ndim == 1 else 0.1
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return model


def rows(model: MediumModel) -> Rows:
    value = model.value_embeds.view(5, -1, D)[:, TOKENS] if hasattr(model, "value_embeds") else None
    return Rows(embed=model.embed[TOKENS], second=model.embed2[TOKENS], value=value)


def run(model: MediumModel, short: int, long: int) -> torch.Tensor:
    cu = torch.tensor(BOUNDS, dtype=torch.int32)
    start, end = attention_backends.documents(cu, T)
    windows = tuple(torch.tensor(window, dtype=torch.int32) for window in (short, long))
    return model(rows(model), None, Documents(cu, start, end, 26), windows, False)


def attention(model: MediumModel, layer: int, u: torch.Tensor, window: int) -> torch.Tensor:
    """One layer, head by head; Q and K lie in the bank behind each other, V and O alternate."""
    qk = model.qk_bank.reshape(LAYERS, 2 * D, D)[layer]
    before, after = model.scalars[2 * layer], model.scalars[2 * layer + 1]
    q, k = norm((u @ qk[:D].T).view(T, HEADS, H)), norm((u @ qk[D:].T).view(T, HEADS, H))
    v = (u @ (before * model.vo_bank[2 * layer]).T).view(T, HEADS, H)
    if layer in TABLE:
        gate = torch.sigmoid(u[:, :16] @ model.ve_gates[list(TABLE).index(layer)].T)
        v = v + 2 * gate[:, :, None] * rows(model).value[TABLE[layer]].view(T, HEADS, H)
    for t in range(T):
        for h in range(HEADS):
            q[t, h], k[t, h] = 0.1 * turned(q[t, h].clone(), t), turned(k[t, h].clone(), t)
    if layer in LONG:
        k = torch.stack([torch.cat([k[t, :, : H // 2], k[max(t - 1, 0), :, H // 2 :]], -1) for t in range(T)])
    y = torch.stack([soft(q[:, h], k[:, h], v[:, h], BOUNDS, window) for h in range(HEADS)], 1)
    y = torch.sigmoid(u[:, :16] @ model.attention_gates[layer].T)[:, :, None] * y
    return y.reshape(T, D) @ (after * model.vo_bank[2 * layer + 1]).T


@torch.no_grad()
def literal(model: MediumModel, short: int, long: int) -> torch.Tensor:
    smear, skip, backout = model.scalars[32], model.scalars[33:36], model.scalars[36]
    e, second = rows(model).embed, norm(rows(model).second)
    x0 = e.clone()
    for t in range(1, T):
        x0[t] += smear * torch.sigmoid(model.smear_gate[0] @ e[t, :16]) * e[t - 1]
    x = x0 = norm(x0)
    after = {}
    for layer in range(LAYERS):
        if layer in SKIPS:
            number = list(SKIPS).index(layer)
            gate = 2 * torch.sigmoid(x0[:, :16] @ model.skip_gates[number])[:, None]
            x = x + torch.sigmoid(skip[number]) * gate * after[SKIPS[layer]]
        first, other = model.input_lambdas[layer]
        x = model.residual_lambdas[layer] * x + first * x0 + other * second
        x = x + attention(model, layer, norm(x), long if layer in LONG else short)
        up, down = model.mlp_bank[layer]
        x = x + torch.relu(norm(x) @ up.T).square() @ down
        after[layer] = x
    return norm(x - backout * after[11])


def test_the_forward_pass_is_the_specifications():
    model = build(medium())
    got, expected = run(model, 8, 16), literal(model, 8, 16)
    assert (got - expected).abs().max() < 1e-5  # the angles are float32


@pytest.mark.parametrize(
    "name", ["key_offset", "half_rope", "value_embeds", "smear", "attention_gates", "skip"]
)
def test_each_technique_can_be_left_out(name):
    more = ["--key_offset=false"] if name == "half_rope" else []
    model = build(medium(f"--{name}=false", *more))
    out = run(model, 8, 16)
    assert out.shape == (T, D) and torch.isfinite(out).all()
    out.square().sum().backward()
    without = [key for key, parameter in model.named_parameters() if parameter.grad is None and key != "head"]
    assert not without


def test_what_training_starts_with():
    """Section 8's initial values; the network begins as the identity, a little of a late residual taken out."""
    config = medium()
    backend = attention_backends.choose("reference", torch.device("cpu"), torch.float32)
    model = MediumModel(config, backend, torch.device("cpu"), torch.float32)
    model.init_weights(1)
    for values, deviation in (
        (model.qk_bank, D**-0.5), (model.vo_bank[::2], D**-0.5), (model.mlp_bank[:, 0], 0.5 * D**-0.5),
        (model.head, 0.005),
    ):  # fmt: skip
        assert values.std().item() == pytest.approx(deviation, rel=0.02)
    assert model.qk_bank.abs().max() <= math.sqrt(3 / D)
    zero = (
        model.vo_bank[1::2],
        model.mlp_bank[:, 1],
        model.value_embeds,
        model.input_lambdas,
        model.ve_gates,
    )
    assert not any(values.any() for values in zero)
    assert torch.equal(model.embed, model.head) and model.embed2.abs().max() > 0
    assert set(model.residual_lambdas.tolist()) == {torch.tensor(1.05).item()}
    assert model.scalars.tolist() == [0.5, 1.0] * LAYERS + [0.0, -1.5, -1.5, -1.5, 0.5]
    with torch.no_grad():
        x0 = norm(rows(model).embed)
        torch.testing.assert_close(run(model, 8, 16), norm(x0), atol=1e-4, rtol=1e-4)


def test_activations_stay_in_bfloat16():
    """As on a GPU: no float32 number among the learned ones widens the residual, and none is off by more than that."""
    exact, config = build(medium()), medium()
    cpu = torch.device("cpu")
    model = MediumModel(
        config, attention_backends.choose("reference", cpu, torch.bfloat16), cpu, torch.bfloat16
    )
    model.load_state_dict(exact.state_dict())
    out = run(model, 8, 16)
    assert out.dtype == torch.bfloat16
    assert (out.double() - run(exact, 8, 16)).abs().mean() < 0.05
    out.square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is None or parameter.grad.dtype == parameter.dtype, name


def test_parameters_are_as_many_as_the_records():
    model = object.__new__(MediumModel)
    torch.nn.Module.__init__(model)
    config = parse(Config, ["medium"], prog="", description="", presets=PRESETS)
    model.config, model.size, model.layers = config, layer_plan.size(config), layer_plan.layers(config)
    numbers = {name: math.prod(shape) for name, (shape, _) in model.parameter_shapes().items()}
    assert numbers["qk_bank"] + numbers["vo_bank"] == 67_108_864
    assert numbers["mlp_bank"] == 134_217_728
    tables = sum(numbers[name] for name in ("head", "embed", "embed2", "value_embeds"))
    assert tables == 8 * 50_304 * 1024
    assert sum(numbers.values()) == pytest.approx(613.4e6, abs=0.05e6)
    assert sum(numbers.values()) == tables + 201_326_592 + 3_477
