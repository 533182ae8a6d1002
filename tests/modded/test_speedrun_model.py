"""The forward passes of records 89 and 92 against their specifications, written out naively in float64."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F

from modded_nanogpt import attention_backends, layer_plan, schedule
from modded_nanogpt.attention import Documents, Rotary
from modded_nanogpt.config import PRESETS, Config
from modded_nanogpt.model import Copied, Rows, SpeedrunModel
from modded_nanogpt.optim.table import table
from nanogpt.common.flags import parse_values

T, D, H, HEADS = 60, 96, 16, 6
BOUNDS = [0, 13, 14, 40, 60, 60, 60]  # one document of a single token, two paddings


RECORD89 = ("record89", "--recipe=tiny_record89", "--vocab_size=1000")


def small(*words: str) -> Config:
    values = parse_values(Config, list(words), prog="t", description="t", presets=PRESETS)
    return Config(**values)


def build(config: Config) -> SpeedrunModel:
    """A model whose every parameter matters: what starts at zero is made random."""
    cpu = torch.device("cpu")
    backend = attention_backends.choose("reference", cpu, torch.float64)
    model = SpeedrunModel(config, backend, cpu, torch.float64)
    model.double()
    model.init_weights(1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = 0.3 if name in ("scalars", "post_lambdas", "residual_lambdas", "static_gates") else 0.1
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return model


def rows(model: SpeedrunModel, tokens: torch.Tensor) -> Rows:
    """Looked-up rows; the hash does not matter here."""
    tables = model.size.value_tables
    value = model.value_embeds.view(tables, -1, D)[:, tokens] if hasattr(model, "value_embeds") else None
    bigram = model.bigram[tokens % 4096] if hasattr(model, "bigram") else None
    if layer_plan.table_rows(model.config):
        bigram = torch.randn(4096, D, generator=torch.Generator().manual_seed(4)).double()[tokens % 4096]
        bigram.requires_grad_()
    return Rows(embed=model.embed[tokens], value=value, bigram=bigram)


def norm(x: torch.Tensor) -> torch.Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1.2e-7).sqrt()


def turned(x: torch.Tensor, position: int) -> torch.Tensor:
    """One head at a position: its first four pairs turn, by 1024^(-m / 3) a token; of 16 dimensions half does not."""
    out = x.clone()
    for m in range(H // 4):
        angle = position * 1024 ** (-m / (H // 4 - 1))
        a, b = x[2 * m], x[2 * m + 1]
        out[2 * m] = a * math.cos(angle) + b * math.sin(angle)
        out[2 * m + 1] = b * math.cos(angle) - a * math.sin(angle)
    return out


def soft(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bounds: list[int], window: int) -> torch.Tensor:
    """Softmax attention of one head over (N, D_head), softmax scale 0.1 already in q."""
    out = torch.zeros_like(v)
    for i in range(len(q)):
        start = max([bound for bound in bounds if bound <= i] + [0])
        left = max(start, i - window)
        out[i] = torch.softmax(k[left : i + 1] @ q[i], 0) @ v[left : i + 1]
    return out


def gate_values(model: SpeedrunModel, tier: int, z: torch.Tensor) -> torch.Tensor:
    hidden = F.gelu(z @ model.gate_w1[tier].T)
    return (hidden @ model.gate_w2[tier].T + model.gate_b2[tier]) * model.gate_scale


def mudd(model: SpeedrunModel, block: int, z: torch.Tensor) -> torch.Tensor:
    return 0.1 * (F.gelu(z @ model.mudd_w1[block].T) @ model.mudd_w2[block].T + model.mudd_b2[block])


def attention(model, slot, u, *, layer, window, extra, gate, alpha, dc):
    """Sections 2.5 to 2.8 for one layer, head by head."""
    a, o = model.scalars[2 * layer], model.scalars[2 * layer + 1]
    groups = model.qk_bank[6 * slot : 6 * slot + 6].reshape(12 * H, D)
    q, k = (u @ (a * part).T for part in groups.split(D))
    v = (u @ (a * model.vo_bank[2 * slot]).T).view(T, HEADS, H) + extra
    q, k = norm(q.view(T, HEADS, H)), norm(k.view(T, HEADS, H))
    paired, long = layer in (0, 2, 5, 9), layer in (3, 10)
    for t in range(T):
        for h in range(HEADS):
            place = 2 * t + h % 2 if paired else t
            q[t, h], k[t, h] = 0.1 * turned(q[t, h].clone(), place), turned(k[t, h].clone(), place)
    if long:
        k = torch.stack([torch.cat([k[t, :, : H // 2], k[max(t - 1, 0), :, H // 2 :]], -1) for t in range(T)])
    y = torch.zeros(T, HEADS, H, dtype=torch.float64)
    if paired:  # heads h and h + 3 are one sequence of 2 T places
        for h in range(3):
            line = [torch.stack([p[:, h], p[:, h + 3]], 1).reshape(2 * T, H) for p in (q, k, v)]
            y[:, h], y[:, h + 3] = soft(*line, [2 * b for b in BOUNDS], window).view(T, 2, H).unbind(1)
    else:
        for h in range(HEADS):
            y[:, h] = soft(q[:, h], k[:, h], v[:, h], BOUNDS, window)
    if dc is not None:
        w1 = dc[0] / (dc[0].square().mean(-1, keepdim=True) + 1e-6).sqrt()
        for i in range(T):
            left = max([b for b in BOUNDS if b <= i] + [i - 111])
            p = [torch.softmax(k[left : i + 1, h] @ q[i, h], 0) for h in range(HEADS)]
            mixed = sum(w1[i, h] * p[h] for h in range(HEADS))
            for h in range(HEADS):
                y[i, h] += dc[1][i, h] * (mixed @ v[left : i + 1, h])
    if alpha is not None:
        y = y - (torch.tanh(alpha) * (y * v).sum(-1) / v.square().sum(-1))[..., None] * v
    if gate is not None:
        y = gate[..., None] * y
    return y.reshape(T, D) @ (o * model.vo_bank[2 * slot + 1]).T


@torch.no_grad()
def literal(
    model: SpeedrunModel, tokens: torch.Tensor, signs: torch.Tensor, short: int, long: int
) -> torch.Tensor:
    """Section 2 of the specification, in its order."""
    found = rows(model, tokens)
    e, b = found.embed, found.bigram * model.signs[signs]
    x0 = e.clone()
    for t in range(1, T):
        x0[t] += model.scalars[22] * torch.sigmoid(model.smear_gate[0] @ e[t, :12]) * e[t - 1]
    x0 = norm(x0)
    pre = gate_values(model, 0, x0)
    names = {"xsa1": pre[:, 0:6], "xsa3": pre[:, 6:12], "gate3": pre[:, 12:18]}
    inject = {layer: (pre[:, 18 + 2 * layer, None], pre[:, 19 + 2 * layer, None]) for layer in range(4)}
    x = x0 + inject[0][1] * b
    c, slots, banks = {0: x}, [0, 1, 2, 3, 4, 5, 7, 8, 9, 10], {1: 0, 2: 1, 8: 2, 9: 3}
    for layer in range(10):
        window = long if layer == 3 else short
        if layer == 4:
            post = gate_values(model, 1, x)
            names |= {"xsa4": post[:, 0:6], "xsa7": post[:, 6:12], "gate10": post[:, 12:18]}
            for place, other in enumerate((4, 5, 7, 8, 9)):
                inject[other] = (post[:, 18 + 2 * place, None], post[:, 19 + 2 * place, None])
            skip, dc = post[:, 28, None], (post[:, 29:35], post[:, 35:41])
        if layer == 6:
            x = x + torch.sigmoid(model.scalars[23]) * skip * c[3]
        else:
            u, extra = norm(x if layer < 8 else c[7]), 0.0
            if layer in banks:
                value = found.value[banks[layer]]
                strength = torch.cat([u[:, :6], value[:, :6]], -1) @ model.ve_gates[banks[layer]].T
                extra = 2 * torch.sigmoid(strength)[..., None] * value.view(T, HEADS, H)
            y = attention(
                model, slots.index(layer), u, layer=layer, window=window, extra=extra, gate=names.get(f"gate{layer}"),
                alpha=names.get(f"xsa{layer}"), dc=None,
            )  # fmt: skip
            x = (
                model.residual_lambdas[layer, 0] * x
                + model.post_lambdas[layer, 0] * y
                + inject[layer][0] * x0
            )
            if layer:
                x = x + inject[layer][1] * b
        up, down = model.mlp_bank[layer]
        y = torch.relu(norm(x) @ up.T).square() @ down
        x = model.residual_lambdas[layer, 1] * x + model.post_lambdas[layer, 1] * y
        c[layer if layer else "after 0"] = x
    c[9] = x
    mu = mudd(model, 0, x)[:, :, None]
    extra = (mu[:, 0] * c[0] + mu[:, 1] * c[7] + mu[:, 2] * x).view(T, HEADS, H)
    strength = torch.cat([mu[:, 6].expand(T, 3), mu[:, 7].expand(T, 3)], -1)[..., None]
    extra = extra + strength * found.value[4].view(T, HEADS, H)
    x = (1 + mu[:, 5]) * x + mu[:, 3] * c[0] + mu[:, 4] * c[7]
    y = attention(
        model, 9, norm(c[7]), layer=10, window=long, extra=extra, gate=names["gate10"], alpha=None, dc=dc
    )  # fmt: skip
    x = mu[:, 8] * x + mu[:, 9] * y + mu[:, 10] * c[0] + mu[:, 11] * b
    up, down = model.mlp_bank[10]
    x = mu[:, 12] * x + mu[:, 13] * (torch.relu(norm(x) @ up.T).square() @ down)
    nu = mudd(model, 1, x)[:, :, None]
    x = x + nu[:, 0] * c[0] + nu[:, 1] * c[7] + nu[:, 2] * c[9] + nu[:, 3] * found.value[0] + nu[:, 4] * c[3]
    return norm(x)


def run(
    model: SpeedrunModel, tokens: torch.Tensor, signs: torch.Tensor, short: int, long: int,
    copied: Copied | None = None,
) -> torch.Tensor:  # fmt: skip
    cu = torch.tensor(BOUNDS, dtype=torch.int32)
    start, end = attention_backends.documents(cu, T)
    windows = tuple(torch.tensor(window, dtype=torch.int32) for window in (short, long))
    return model(rows(model, tokens), signs, Documents(cu, start, end, 26), windows, False, copied)


def inputs(vocab: int = 1000) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(vocab, (T,), generator=generator), torch.randint(64, (T,), generator=generator)


def test_the_forward_pass_is_record_89s():
    model = build(small(*RECORD89))
    got, expected = run(model, *inputs(), 8, 16), literal(model, *inputs(), 8, 16)
    assert (got - expected).abs().max() < 1e-5  # the angles are float32


def attention92(model, slot, u, *, layer, window, extra, gate, alpha):
    """One layer of record 92, head by head; layers 3 and 10 are wide, 1 and 8 have narrow values too."""
    a, o = model.scalars[2 * layer], model.scalars[2 * layer + 1]
    wide, width = layer in (3, 10), H // 2 if layer in (1, 8) else H
    groups = model.qk_bank[6 * slot : 6 * slot + 6].reshape(2 * HEADS, H, D)[:, : H if wide else H // 2]
    q, k = norm(torch.einsum("td,hwd->thw", u, groups)).split(HEADS, dim=1)
    v = (u @ (a * model.vo_bank[2 * slot]).T).view(T, HEADS, H) + extra
    v, paired, scale = v[:, :, :width], layer in (0, 2, 5), 0.085 if wide else 0.13
    q, k = q.clone(), k.clone()
    for t in range(T):
        for h in range(HEADS):
            place = 2 * t + h % 2 if paired else t
            q[t, h], k[t, h] = scale * turned(q[t, h].clone(), place), turned(k[t, h].clone(), place)
    if wide:
        k = torch.stack([torch.cat([k[t, :, : H // 2], k[max(t - 1, 0), :, H // 2 :]], -1) for t in range(T)])
    y = torch.zeros(T, HEADS, width, dtype=torch.float64)
    for h in range(3 if paired else HEADS):
        if paired:
            line = [torch.stack([p[:, h], p[:, h + 3]], 1).reshape(2 * T, -1) for p in (q, k, v)]
            y[:, h], y[:, h + 3] = soft(*line, [2 * b for b in BOUNDS], window).view(T, 2, width).unbind(1)
        else:
            y[:, h] = soft(q[:, h], k[:, h], v[:, h], BOUNDS, window)
    if alpha is not None:
        y = y - (torch.tanh(alpha) * (y * v).sum(-1) / v.square().sum(-1))[..., None] * v
    if gate is not None:
        y = gate[..., None] * y
    return (
        y.reshape(T, -1) @ (o * model.vo_bank[2 * slot + 1]).view(D, HEADS, H)[:, :, :width].reshape(D, -1).T
    )


@torch.no_grad()
def literal92(
    model: SpeedrunModel,
    tokens: torch.Tensor,
    signs: torch.Tensor,
    short: int,
    long: int,
    likely: float = 0.0,
) -> torch.Tensor:
    """The layer table of record 92, in its order; likely: (T, d), what joins the residual with `copy_input`."""
    found = rows(model, tokens)
    e, b = found.embed, found.bigram
    x0 = e.clone()
    for t in range(1, T):
        x0[t] += model.scalars[22] * torch.sigmoid(model.smear_gate[0] @ e[t, :12]) * e[t - 1]
    x0 = norm(x0)
    pre = gate_values(model, 0, x0)
    assert pre.shape[1] == 23
    alphas, gates = {1: pre[:, 0:6], 3: pre[:, 6:12]}, {3: pre[:, 12:18]}
    of_x0, of_b = {0: pre[:, 18], 1: pre[:, 20], 2: pre[:, 22]}, {1: pre[:, 21]}
    c0 = x = x0 + pre[:, 19, None] * b + 0.5 * likely
    slots, tables = {0: 0, 1: 1, 2: 2, 3: 3, 5: 4, 8: 5}, {1: 0, 2: 1, 8: 2}
    mlps = {**{k: [k] for k in range(7)}, 8: [7, 10], 9: [8]}
    c = {}

    def feed(u, slot):
        up, down = model.mlp_bank[slot]
        return torch.relu(u @ up.T).square() @ down

    for layer in range(10):
        r, p = model.residual_lambdas[layer], model.post_lambdas[layer]
        if layer == 4:
            post = gate_values(model, 1, x)
            gates[10], skip = post[:, 0:6], post[:, 12, None]
            of_x0 |= {4: post[:, 6], 5: post[:, 8], 7: post[:, 10]}
            of_b |= {4: post[:, 7], 5: post[:, 9], 9: post[:, 11]}
        if layer == 6:
            x = x + torch.sigmoid(model.scalars[23]) * skip * c[3]
        elif layer in slots:
            u, extra = norm(x if layer < 8 else c[7]), 0.0
            if layer in tables:
                value = found.value[tables[layer]]
                strength = torch.cat([u[:, :6], value[:, :6]], -1) @ model.ve_gates[tables[layer]].T
                extra = 2 * torch.sigmoid(strength)[..., None] * value.view(T, HEADS, H)
            y = attention92(
                model, slots[layer], u, layer=layer, window=long if layer == 3 else short, extra=extra,
                gate=gates.get(layer), alpha=alphas.get(layer),
            )  # fmt: skip
            x = r[0] * x + p[0] * y
        else:
            x = r[0] * x
        x = x + of_x0.get(layer, torch.zeros(T))[:, None] * x0 + of_b.get(layer, torch.zeros(T))[:, None] * b
        x = r[1] * x + p[1] * sum(feed(norm(x), slot) for slot in mlps.get(layer, []))
        c[layer] = x
    mu = mudd(model, 0, x)[:, :, None]
    extra = (mu[:, 0] * c0 + mu[:, 1] * c[7] + mu[:, 2] * x).view(T, HEADS, H)
    strength = torch.cat([mu[:, 6].expand(T, 3), mu[:, 7].expand(T, 3)], -1)[..., None]
    extra = extra + strength * found.value[3].view(T, HEADS, H)
    x = (1 + mu[:, 5]) * x + mu[:, 3] * c0 + mu[:, 4] * c[7]
    y = attention92(model, 6, norm(c[7]), layer=10, window=long, extra=extra, gate=gates[10], alpha=None)
    x = mu[:, 8] * x + mu[:, 9] * y + mu[:, 10] * c0 + mu[:, 11] * b
    read = norm(x)
    x = mu[:, 12] * x + mu[:, 13] * feed(read, 9)
    hidden = F.gelu(x @ model.mudd_w1[1].T)
    value = found.value
    sources = [c0, c[7], c[9], value[0], c[3], value[1], value[3], value[2], read, norm(c[7])]
    width, out = D // 12, x.clone()
    for k, source in enumerate(sources):
        for g in range(12):
            weight = hidden @ (model.mudd_w2[1, k] + model.mudd_groups[k, g]) + model.mudd_b2[1, k]
            part = slice(g * width, (g + 1) * width)
            out[:, part] += 0.1 * weight[:, None] * source[:, part]
    return norm(out + likely)


def test_the_forward_pass_is_record_92s():
    model = build(small("tiny", "--vocab_size=1000"))
    got, expected = run(model, *inputs(), 8, 16), literal92(model, *inputs(), 8, 16)
    assert (got - expected).abs().max() < 1e-5  # the angles are float32


def test_what_may_be_copied_joins_the_residual_twice():
    """s_b x norm(embedding) + e_b, a token at a time, and both tables learn."""
    model = build(small("tiny", "--vocab_size=1000", "--copy_input=true"))
    assert model.copy_scales.shape == (31,) and model.copy_embeds.shape == (31, D)
    buckets = torch.randint(31, (T,), generator=torch.Generator().manual_seed(5), dtype=torch.int32)
    buckets[:4] = torch.tensor([0, 30, 0, 1])
    candidates = model.embed[torch.arange(T) + 700].detach()
    likely = torch.stack([
        (model.copy_scales[b] * norm(row) if b else 0.0) + model.copy_embeds[b]
        for b, row in zip(buckets.tolist(), candidates, strict=True)
    ]).detach()  # fmt: skip
    got = run(model, *inputs(), 8, 16, Copied(candidates, buckets))
    assert (got - literal92(model, *inputs(), 8, 16, likely)).abs().max() < 1e-5
    got.square().sum().backward()
    for learned in (model.copy_scales, model.copy_embeds):
        assert learned.grad.abs().sum() > 0
    assert model.copy_scales.grad[0] == 0  # nothing is copied there
    model.init_weights(1)
    with torch.no_grad():
        blank = run(model, *inputs(), 8, 16, Copied(candidates, buckets))
        assert torch.equal(blank, run(model, *inputs(), 8, 16))  # at the start of training it changes nothing


TECHNIQUES = [
    field.name
    for field in dataclasses.fields(Config)
    if field.default is True and field.name not in ("warmup", "fp8_head", "fp8_up", "fp8_down")
]


@pytest.mark.parametrize("name", TECHNIQUES)
def test_each_technique_can_be_left_out(name):
    more = {"half_rope": ["--key_offset=false"], "bigram": ["--bigram_signs=false"]}.get(name, [])
    model = build(small("tiny", "--vocab_size=1000", f"--{name}=false", *more))
    table(model.config, dict(model.named_parameters()))  # ValueError for one that the optimizer does not know
    out = run(model, *inputs(), 8, 16)
    assert out.shape == (T, D) and torch.isfinite(out).all()
    out.square().sum().backward()
    assert not [key for key, part in model.named_parameters() if part.grad is None and key != "head"]


@pytest.mark.parametrize(
    ("config", "attention", "mlp", "all_numbers", "bigram"),
    [
        (small("record89"), 23_592_960, 51_904_512, 635_886_943, 289_751_040),
        (small("record", "--table_rows=0"), 16_515_072, 47_579_136, 585_855_475, 289_751_040),
        (small("record"), 16_515_072, 47_579_136, 296_104_435, 0),
    ],
)
def test_parameters_are_as_many_as_the_records(config, attention, mlp, all_numbers, bigram):
    """Narrow heads leave a part of the attention's banks unused; the table of n-grams is no parameter."""
    model = object.__new__(SpeedrunModel)
    torch.nn.Module.__init__(model)
    model.config, model.size, model.layers = config, layer_plan.size(config), layer_plan.layers(config)
    model.gates, model.end_sources = layer_plan.gates(config), layer_plan.end_sources(config)
    numbers = {name: math.prod(shape) for name, (shape, _) in model.parameter_shapes().items()}
    assert numbers["qk_bank"] + numbers["vo_bank"] == attention and numbers["mlp_bank"] == mlp
    assert numbers.get("bigram", 0) == bigram and sum(numbers.values()) == all_numbers


def test_the_matrices_that_a_token_meets():
    """59.97 M in record 92: 12.39 M of attention, 47.58 M of MLPs; 75.5 M in record 89."""
    assert layer_plan.matrix_weights(small("record89")) == 75_497_472
    assert layer_plan.matrix_weights(small("record")) == 12_386_304 + 47_579_136


def test_rotary_follows_the_windows():
    """Softmax scales of the specification's section 2.6, and frequencies that only ever fall."""
    rotary = Rotary(128, 16, True, torch.float32, torch.device("cpu"))
    scales = []
    for windows in ([384], [384, 896], [384, 896, 1408], [384, 896, 1408, 1664]):
        before = rotary.frequencies
        rotary.follow(windows)
        scales.append(round(rotary.scale.item(), 5))
        assert bool((rotary.frequencies <= before).all())
    assert scales == [0.1, 0.11695, 0.12752, 0.13178]
    assert rotary.frequencies[32:].abs().max() == 0
    assert schedule.yarn_windows(small("record"), 2000) == ((128, 384), (384, 896), (640, 1408), (768, 1664))


def test_record_92s_two_chains_of_tables():
    """Narrow heads follow the short window, and all of them turns; softmax scales as published."""
    config, scales = small("tiny", "--vocab_size=1000"), {}
    model = build(config)
    assert model.rotary["short"].base.tolist() == pytest.approx(model.rotary["long"].base[:4].tolist())
    model.rotary.follow(list(schedule.yarn_windows(small("record"), 2000)))
    scales = {name: round(rotary.scale.item(), 4) for name, rotary in model.rotary.items()}
    assert scales == {"short": 0.1811, "long": 0.112}
