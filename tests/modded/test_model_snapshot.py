"""The snapshot's model and schedule: record 68's equations written out naively in float64, and the guides' figures."""

import math

import pytest
import torch

from modded_nanogpt import attention_backends, layer_plan, schedule
from modded_nanogpt.attention import Documents
from modded_nanogpt.config import PRESETS, Config, resolve
from modded_nanogpt.model import Rows
from modded_nanogpt.model_medium import SnapshotModel
from modded_nanogpt.optim.table import table
from nanogpt.common.flags import parse
from tests.modded.test_speedrun_model import BOUNDS, norm, soft, turned

T, D, H, HEADS, LAYERS, VOCAB = 60, 96, 16, 6, 11, 256
TABLE = {0: 0, 1: 1, 8: 2, 9: 3, 10: 4}
SLOTS = [0, 1, 2, 3, 4, 5, 7, 8, 9, 10]
TOKENS = torch.randint(VOCAB, (T,), generator=torch.Generator().manual_seed(3))
BIGRAMS = torch.randint(4096, (T,), generator=torch.Generator().manual_seed(4))


def snapshot(*flags: str) -> Config:
    return parse(Config, ["snapshot", *flags], prog="t", description="t", presets=PRESETS)


def build(*flags: str, dtype: torch.dtype = torch.float64) -> SnapshotModel:
    config = snapshot("--recipe=tiny_snapshot", f"--vocab_size={VOCAB}", "--eval_slice=128", *flags)
    cpu = torch.device("cpu")
    model = SnapshotModel(config, attention_backends.choose("reference", cpu, dtype), cpu, dtype)
    model.to(dtype)
    model.init_weights(1)
    return model


def disturbed(*flags: str) -> SnapshotModel:
    """A model whose every parameter matters: what starts at zero is made random."""
    model, generator = build(*flags), torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            scale = 0.3 if parameter.ndim == 1 else 0.1
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return model


def rows(model: SnapshotModel) -> Rows:
    value = model.value_embeds.view(5, -1, D)[:, TOKENS] if hasattr(model, "value_embeds") else None
    bigram = model.bigram[BIGRAMS] if hasattr(model, "bigram") else None
    return Rows(embed=model.embed[TOKENS], value=value, bigram=bigram)


def run(model: SnapshotModel, short: int = 8, long: int = 16) -> torch.Tensor:
    cu = torch.tensor(BOUNDS, dtype=torch.int32)
    start, end = attention_backends.documents(cu, T)
    windows = tuple(torch.tensor(window, dtype=torch.int32) for window in (short, long))
    return model(rows(model), None, Documents(cu, start, end, 26), windows, False)


def attention(model: SnapshotModel, layer: int, u: torch.Tensor, window: int) -> torch.Tensor:
    slot, paired = SLOTS.index(layer), layer in (0, 2, 5, 9)
    qk = model.qk_bank.reshape(len(SLOTS), 2 * D, D)[slot]
    before, after = model.scalars[2 * layer], model.scalars[2 * layer + 1]
    q, k = norm((u @ qk[:D].T).view(T, HEADS, H)), norm((u @ qk[D:].T).view(T, HEADS, H))
    v = (u @ (before * model.vo_bank[2 * slot]).T).view(T, HEADS, H)
    if layer in TABLE:
        gate = torch.sigmoid(u[:, :12] @ model.ve_gates[list(TABLE).index(layer)].T)
        v = v + 2 * gate[:, :, None] * rows(model).value[TABLE[layer]].view(T, HEADS, H)
    for t in range(T):
        for h in range(HEADS):
            place = 2 * t + h % 2 if paired else t
            q[t, h], k[t, h] = 0.1 * turned(q[t, h].clone(), place), turned(k[t, h].clone(), place)
    if layer in (3, 10):
        k = torch.stack([torch.cat([k[t, :, : H // 2], k[max(t - 1, 0), :, H // 2 :]], -1) for t in range(T)])
    y = torch.zeros(T, HEADS, H, dtype=torch.float64)
    for h in range(3 if paired else HEADS):
        if paired:  # heads h and h + 3 are one sequence of 2 T places
            line = [torch.stack([p[:, h], p[:, h + 3]], 1).reshape(2 * T, H) for p in (q, k, v)]
            y[:, h], y[:, h + 3] = soft(*line, [2 * b for b in BOUNDS], window).view(T, 2, H).unbind(1)
        else:
            y[:, h] = soft(q[:, h], k[:, h], v[:, h], BOUNDS, window)
    y = torch.sigmoid(u[:, :12] @ model.attention_gates[slot].T)[:, :, None] * y
    return y.reshape(T, D) @ (after * model.vo_bank[2 * slot + 1]).T


@torch.no_grad()
def literal(model: SnapshotModel, short: int = 8, long: int = 16) -> torch.Tensor:
    smear, skip, backout = model.scalars[22:25]
    e, b = rows(model).embed, rows(model).bigram
    x0 = e.clone()
    for t in range(1, T):
        x0[t] += smear * torch.sigmoid(model.smear_gate[0] @ e[t, :12]) * e[t - 1]
    x = x0 = norm(x0)
    after = {}
    for layer in range(LAYERS):
        if layer == 6:
            gate = 2 * torch.sigmoid(x0[:, :12] @ model.skip_gates[0])[:, None]
            x = x + torch.sigmoid(skip) * gate * after[3]
        x = model.residual_lambdas[layer] * x + model.input_lambdas[layer] * x0
        x = x + model.bigram_lambdas[layer] * b
        if layer != 6:
            x = x + attention(model, layer, norm(x), long if layer in (3, 10) else short)
        up, down = model.mlp_bank[layer]
        after[layer] = x = x + torch.relu(norm(x) @ up.T).square() @ down
    return norm(x - backout * after[7])


def test_the_forward_pass_is_record_68s():
    model = disturbed()
    assert (run(model) - literal(model)).abs().max() < 1e-5  # the angles are float32


@pytest.mark.parametrize(
    "name", ["paired_heads", "value_embeds", "bigram", "smear", "attention_gates", "skip"]
)
def test_each_technique_can_be_left_out(name):
    model = disturbed(f"--{name}=false")
    run(model).square().sum().backward()
    assert not [key for key, part in model.named_parameters() if part.grad is None and key != "head"]
    table(model.config, dict(model.named_parameters()))  # ValueError for one that the optimizer does not know


def test_the_guides_figures():
    """1,515 + 40 steps; 131K / 262K / 393K tokens; 1.0 / 1.52 / 1.73, down to 0.1; documents of 2,048 throughout."""
    config = snapshot()
    stages = schedule.stages(config)
    assert [(stage.start, stage.end) for stage in stages] == [
        (0, 505),
        (505, 1010),
        (1010, 1515),
        (1515, 1555),
    ]
    assert [stage.batch_tokens for stage in stages] == [131_072, 262_144, 393_216, 393_216]
    assert [stage.lr_factor for stage in stages[:3]] == [1.0, 1.52, 1.73]
    assert {stage.max_document for stage in stages} == {2048}
    rates = [schedule.at(config, step).lr for step in (0, 681, 1514, 1515, 1554)]
    assert rates == pytest.approx([1.0, 1.52, 0.1 + 1.63 / 834, 0.1, 0.1])
    assert schedule.untying_step(config) == 1011 and schedule.at(config, 0).prefix == 0.0
    assert resolve(config, 8).total_tokens == pytest.approx(412.9e6, rel=1e-3)
    size, layers = layer_plan.size(config), layer_plan.layers(config)
    assert (size.layers, size.width, size.heads, size.head_dim) == (11, 768, 6, 128)
    assert [layer.index for layer in layers if not layer.attention] == [6]
    assert layer_plan.backout(config) == 7


def test_what_training_starts_with():
    model = build(dtype=torch.float32)
    half = 0.5 * math.sqrt(3 / D)
    for bank in (model.qk_bank, model.vo_bank, model.mlp_bank[:, 0]):
        assert bank.abs().max() <= half and bank.std().item() == pytest.approx(half / math.sqrt(3), rel=0.02)
    assert not any(
        p.any() for p in (model.mlp_bank[:, 1], model.value_embeds, model.bigram, model.input_lambdas)
    )
    assert model.bigram_lambdas.tolist() == pytest.approx([0.1] * LAYERS)
    assert model.residual_lambdas.tolist() == pytest.approx([1.1] * LAYERS)
    assert model.scalars[22:].tolist() == [0.0, -1.5, 0.5]
