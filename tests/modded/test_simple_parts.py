"""Parts of the small trainer: schedules, the order of the data, Muon's update, what each variant decides."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from modded_nanogpt.kernels.reference.cross_entropy import head_loss
from modded_nanogpt.simple_config import Config, lr_factor, resolve
from modded_nanogpt.simple_data import Stream
from modded_nanogpt.simple_graphs import in_sequences
from modded_nanogpt.simple_optim import Muon, Optimizer, OwnOptimizer
from modded_nanogpt.train_gpt_simple import GPT, SOFTCAP
from modded_nanogpt.variants import baseline, curriculum, depth_warm, palm_parallel
from nanogpt.common.errors import UserError

TINY = Config(
    num_layers=4, num_heads=2, model_dim=16, sequence_length=16, batch_size=4, device_batch_size=2, num_iterations=100
)  # fmt: skip


def test_learning_rate_and_layout():
    plan = resolve(replace(TINY, warmdown_iters=40), 2)
    assert (plan.micro_steps, plan.tokens_per_step, plan.world_size) == (1, 64, 2)
    factors = [lr_factor(plan, step) for step in range(101)]
    assert factors[:61] == [1.0] * 61 and factors[80] == 0.5 and factors[100] == 0.0
    assert resolve(TINY, 1).warmdown_steps == 70


def test_the_stream_goes_through_the_shards_in_order(tmp_path):
    class Text:
        def __init__(self, tokens):
            self.text = np.array(tokens, np.uint16)

        def tokens(self):
            return self.text

    stream = Stream([Text(range(10)), Text([7]), Text(range(100, 109))], 4)
    rows = stream.read(0, 5)
    assert rows[:, 0].tolist() == [0, 4, 100, 104, 0] and rows[3].tolist() == [104, 105, 106, 107, 108]
    assert stream.read(6, 1)[0, 0] == 100  # round again


def model(variant=baseline.Variant, config=TINY) -> GPT:
    made = GPT(config, 32, variant.layer, torch.float32)
    made.init_weights(3)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(
                torch.randn(parameter.shape, generator=torch.Generator().manual_seed(4)), alpha=0.1
            )
    return made


def test_the_models_two_losses_agree_and_targets_may_be_fewer_than_inputs():
    gpt, tokens = model(), torch.arange(2 * 16) % 32
    with torch.no_grad():
        inputs = in_sequences(tokens, 12)
        assert inputs.shape == (3, 12) and inputs[2, 8:].tolist() == [0] * 4
        loss = gpt.loss(inputs, tokens, None)
        each = gpt.losses(tokens.view(2, 16), tokens, None)
        assert each.shape == (32,)
        whole = gpt.loss(tokens.view(2, 16), tokens, None)
    assert whole.item() == pytest.approx(each.sum().item(), rel=1e-5)
    assert loss.item() != pytest.approx(whole.item(), rel=1e-4)  # less context
    x = gpt.hidden(tokens.view(2, 16), None)
    one, nothing = torch.ones(1), torch.zeros(1)
    assert head_loss(x, gpt.head, tokens, None, one, nothing, SOFTCAP).item() == pytest.approx(
        whole.item(), rel=1e-5
    )


def test_causal_and_the_shorter_sequences_positions():
    gpt = model()
    tokens = torch.randint(32, (1, 16), generator=torch.Generator().manual_seed(1))
    changed = tokens.clone()
    changed[0, 9] = (changed[0, 9] + 1) % 32
    a, b = gpt.hidden(tokens, None), gpt.hidden(changed, None)
    assert torch.equal(a[:9], b[:9]) and not torch.equal(a[9:], b[9:])
    assert torch.allclose(gpt.hidden(tokens[:, :8], None), a[:8], atol=1e-5)


def test_muons_update_has_singular_values_near_one():
    weight = torch.nn.Parameter(torch.zeros(3, 24, 8))
    muon = Muon([weight], lr=0.1, decay=0.0, dtype=torch.float32)
    weight.grad = torch.randn(3, 24, 8, generator=torch.Generator().manual_seed(0))
    muon.step(factor=0.5, momentum=0.9)
    values = torch.linalg.svdvals(weight.detach()) / (0.05 * math.sqrt(3))  # rows / columns = 3
    assert values.min() > 0.6 and values.max() < 1.3


def test_a_layer_without_gradient_stays_where_it_is():
    gpt = model(depth_warm.Variant)
    optimizer = Optimizer(gpt, replace(TINY, muon_wd=0.0), resolve(TINY, 1))
    before = [parameter.detach().clone() for parameter in gpt.mlp[3].parameters()]
    tokens = torch.arange(32) % 32
    (gpt.loss(tokens.view(2, 16), tokens, torch.tensor([1.0, 1.0, 1.0, 0.0])) * gpt.loss_scale).backward()
    optimizer.step(0)
    for old, new in zip(before, gpt.mlp[3].parameters(), strict=True):
        assert torch.equal(old, new)
    assert not torch.equal(gpt.mlp[0].up, model(depth_warm.Variant).mlp[0].up)


@pytest.mark.parametrize("name", ["muon", "adam"])
def test_the_optimizers_state_comes_back(name):
    config = replace(TINY, optimizer=name)

    def steps(gpt, optimizer, numbers):
        tokens = torch.arange(32) % 32
        for step in numbers:
            (gpt.loss(tokens.view(2, 16), tokens, None) * gpt.loss_scale).backward()
            optimizer.step(step)

    plan, gpt = resolve(config, 1), model()
    optimizer = Optimizer(gpt, config, plan)
    steps(gpt, optimizer, range(3))
    other = model()
    other.load_state_dict(gpt.state_dict())
    resumed = Optimizer(other, config, plan)
    resumed.load({key: value.clone() for key, value in optimizer.tensors().items()}, "here")
    steps(gpt, optimizer, range(3, 5))
    steps(other, resumed, range(3, 5))
    for mine, theirs in zip(gpt.parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_palm_sums_both_sublayers_of_one_norm():
    x = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0))
    y = palm_parallel.Variant.layer(x, lambda u: 2 * u, lambda u: u.square(), None)
    u = baseline.norm(x)
    assert torch.allclose(y, x + (2 * u + u.square()) / math.sqrt(2))
    assert torch.allclose(u.square().mean(-1), torch.ones(2, 3), atol=1e-4)


def test_curriculum_moves_on_at_a_plateau_or_when_its_time_is_up():
    config = replace(TINY, sequence_length=1024, num_iterations=1000)

    def lengths(loss_at, state_through_json=False):
        variant, found = curriculum.Variant(config, 1000, 700), []
        for step in range(1000):
            found.append(variant.length(step))
            variant.observe(step, loss_at(step))
            if state_through_json:
                state, variant = (
                    json.loads(json.dumps(variant.state())),
                    curriculum.Variant(config, 1000, 700),
                )
                variant.load(state)
        return found

    falling = lengths(lambda step: 10 - 0.01 * step)
    assert [falling.index(n) for n in (256, 512, 768, 1024)] == [0, 100, 200, 300] and falling[-1] == 1024
    flat = lengths(lambda step: 5.0)
    assert [flat.index(n) for n in (256, 512, 768, 1024)] == [0, 11, 22, 33]
    noisy = [5 - math.log(step + 1) + math.sin(37.0 * step) / 9 for step in range(1000)]
    assert lengths(noisy.__getitem__) == lengths(noisy.__getitem__, state_through_json=True)


def test_depth_warm_switches_layers_on_one_by_one():
    variant = depth_warm.Variant(replace(TINY, num_iterations=1000), 1000, 700)
    assert variant.gates(0, training=False) == [1.0, 1.0, 0.0, 0.0]
    assert variant.gates(75, training=False) == [1.0, 1.0, 0.5, 0.0]
    assert variant.gates(225, training=False) == [1.0, 1.0, 1.0, 0.5]
    assert variant.gates(300, training=True) == [1.0] * 4
    drawn = [variant.gates(step, training=True) for step in range(150)]
    assert all(set(gates) <= {0.0, 1.0} for gates in drawn)
    assert 55 < sum(gates[2] for gates in drawn) < 95
    again = depth_warm.Variant(replace(TINY, num_iterations=1000), 1000, 700)
    assert drawn == [again.gates(step, training=True) for step in range(150)]
    other = depth_warm.Variant(replace(TINY, seed=2), 1000, 700)
    assert drawn != [other.gates(step, training=True) for step in range(150)]


class _Counting(torch.optim.SGD):
    """Keeps an integer, a float and a tensor for each parameter."""

    def step(self, closure=None):
        super().step(closure)
        for group in self.param_groups:
            for parameter in group["params"]:
                kept = self.state[parameter]
                kept["calls"], kept["half"] = kept.get("calls", 0) + 1, 0.5
                kept["last"] = parameter.grad.clone()


def test_numbers_of_a_variants_optimizer_come_back_as_they_were():
    plan = resolve(TINY, 1)

    def made() -> tuple[nn.Module, OwnOptimizer]:
        model = nn.Linear(3, 2)
        return model, OwnOptimizer(model, _Counting(model.parameters(), lr=0.1), TINY, plan)

    (model, first), (other, second) = made(), made()
    model(torch.ones(1, 3)).sum().backward()
    first.step(0)
    second.load(first.tensors(), "here")
    state = second.own.state[other.weight]
    assert state["calls"] == 1 and isinstance(state["calls"], int) and state["half"] == 0.5
    assert torch.equal(state["last"], first.own.state[model.weight]["last"])
    with pytest.raises(UserError, match="here: its optimizer does not fit this run"):
        second.load({"gone/last": torch.ones(1)}, "here")
    with pytest.raises(UserError, match="build_optimizer leaves out bias"):
        OwnOptimizer(model, torch.optim.SGD([model.weight], lr=0.1), TINY, plan)
