"""One lane as one graph: no breaks, no recompilation from step to step, the same loss and gradients as eager."""

import dataclasses
import os

import numpy as np
import pytest
import torch
from torch._inductor import config as inductor_config

from modded_nanogpt import lanes, schedule, setup
from modded_nanogpt.batches import Batch
from modded_nanogpt.config import PRESETS, Config
from modded_nanogpt.copying import find_copies
from modded_nanogpt.kernels.embedding import Runs, runs_of
from modded_nanogpt.ngrams import gram_rows, gram_signs
from nanogpt.common.flags import parse_values
from nanogpt.common.ranks import Ranks

VOCAB, TOKENS = 512, 96
ALONE = Ranks(0, 0, 1, torch.device("cpu"))


PRESET = {
    "tiny": ["tiny"],
    "tiny_pointer": ["tiny", "--copy_pointer=true"],
    "tiny_record89": ["record89", "--recipe=tiny_record89"],
    "tiny_snapshot": ["snapshot", "--recipe=tiny_snapshot"],
    "tiny_medium": ["medium", "--recipe=tiny_medium"],
}


def small(*flags: str, recipe: str = "tiny") -> Config:
    words = [
        *PRESET[recipe],
        f"--vocab_size={VOCAB}",
        "--prefix=false",
        "--eval_slice=128",
        "--device=cpu",
        *flags,
    ]
    return Config(**parse_values(Config, words, prog="t", description="t", presets=PRESETS))


def lane(seed: int) -> Batch:
    rng = np.random.default_rng(seed)
    tokens = torch.from_numpy(rng.integers(0, VOCAB, TOKENS + 1))
    bounds = torch.tensor(
        [0, *sorted(rng.choice(range(1, TOKENS), 4, replace=False)), TOKENS, TOKENS, TOKENS]
    )
    rows = torch.from_numpy(rng.integers(0, 4096, TOKENS)).int()
    runs = [Runs(*(torch.from_numpy(p).int() for p in runs_of(ids.numpy()))) for ids in (tokens[:-1], rows)]
    grams = [
        torch.from_numpy(make(tokens[:-1].numpy(), size))
        for make, size in ((gram_rows, 8192), (gram_signs, 64))
    ]
    copied = find_copies(tokens[:-1].int(), tokens[:-1] % 64)  # of one document, as if there were 64 classes
    both = dict(
        zip(("gram_rows", "gram_signs"), grams, strict=True)
    )  # each model takes what it has a table for
    return Batch(
        tokens[:-1].int(), tokens[1:], bounds.int(), rows, (rows % 64).int(), rows, *runs, TOKENS, **both,
        copy_tokens=copied[0], copy_buckets=copied[1],
    )  # fmt: skip


def gradients(
    state: lanes.State, batch: Batch, step: schedule.StepPlan
) -> tuple[float, dict[str, torch.Tensor]]:
    state.optimizer.reset()
    if state.table is not None:  # rows of zeros would hide a part of the graph
        state.table.rows.normal_(generator=torch.Generator().manual_seed(3))
    loss = lanes.train_lane(state, ALONE, batch, step)
    return loss.item(), {
        name: p.grad.clone() for name, p in state.model.named_parameters() if p.grad is not None
    }


@pytest.mark.parametrize("world_size", [1, 2, 8])
def test_a_lanes_gradient_is_that_of_an_eighth_before_the_ranks_are_averaged(world_size):
    assert lanes.loss_scale(Ranks(0, 0, world_size, torch.device("cpu"))) / world_size == 1 / 8


# The other two differ from these in few lines, which `test_speedrun_model` and `test_model_snapshot` go through.
PARAMS = [
    pytest.param(name, marks=() if name in ("tiny", "tiny_pointer", "tiny_medium") else pytest.mark.campaign)
    for name in PRESET
]


@pytest.fixture(scope="module", params=PARAMS)
def state(request: pytest.FixtureRequest) -> lanes.State:
    torch.set_num_threads(1)
    made = setup.build(small(recipe=request.param), ALONE)
    made.model.init_weights(7)
    generator = torch.Generator().manual_seed(8)
    with torch.no_grad():  # what starts at zero would hide a part of the graph
        for parameter in made.model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return made


def test_windows_weights_and_batches_need_no_other_graph(state):
    """Three stages of windows and loss weights, two batches: one graph, and eager's loss and gradients."""
    torch._dynamo.reset()
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]):
        graphs.append(graph)
        return graph

    compiled = dataclasses.replace(
        state, train_graph=torch.compile(lanes.lane_residual, fullgraph=True, backend=backend)
    )
    config = state.model.config
    for step in (0, 20, 40):
        plan = dataclasses.replace(schedule.at(config, step), tied=step < 30)
        state.model.rotary.follow(list(schedule.yarn_windows(config, step)))
        batch = lane(step)
        expected, want = gradients(state, batch, plan)
        loss, got = gradients(compiled, batch, plan)
        assert loss == pytest.approx(expected, rel=1e-6)
        assert got.keys() == want.keys()
        for name, gradient in got.items():
            torch.testing.assert_close(gradient, want[name], rtol=1e-4, atol=1e-6)
    assert len(graphs) == 1


def test_with_copies_a_lane_is_one_graph_too():
    """--copy_input: the compiled lane gives eager's loss and gradients, and the validation is compiled whole."""
    torch.set_num_threads(1)
    torch._dynamo.reset()
    state = setup.build(small("--copy_input=true"), ALONE)
    setup.randomize(state, 7)
    compiled = dataclasses.replace(
        state,
        train_graph=torch.compile(lanes.lane_residual, fullgraph=True, backend="eager"),
        eval_graph=torch.compile(lanes.lane_losses, fullgraph=True, backend="eager"),
    )
    batch, plan = lane(1), schedule.at(state.model.config, 0)
    assert 0 < int((batch.copy_buckets > 0).sum()) < TOKENS
    expected, want = gradients(state, batch, plan)
    loss, got = gradients(compiled, batch, plan)
    assert loss == pytest.approx(expected, rel=1e-6) and got.keys() == want.keys()
    for name, gradient in got.items():
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(gradient, want[name], rtol=1e-4, atol=1e-6)
    losses = lanes.eval_lane(state, batch, False, (16, 32))
    torch.testing.assert_close(lanes.eval_lane(compiled, batch, False, (16, 32)), losses)
    nothing = dataclasses.replace(batch, copy_buckets=torch.zeros_like(batch.copy_buckets))
    assert not torch.allclose(lanes.eval_lane(state, nothing, False, (16, 32)), losses)


def test_every_parameter_learns(state):
    config = state.model.config
    with torch.no_grad():
        state.model.embed.copy_(state.model.head)
    _, tied = gradients(state, lane(1), schedule.at(config, 0))
    _, free = gradients(state, lane(1), dataclasses.replace(schedule.at(config, 0), tied=False))
    assert {name for name, _ in state.model.named_parameters()} == free.keys()
    for name, gradient in free.items():
        assert gradient.abs().max() > 0, name
    assert torch.allclose(tied["head"], free["head"] + free["embed"], rtol=1e-4, atol=1e-7)


def test_a_finite_difference_agrees(state):
    """The whole lane in one number: along a random direction the loss changes as its gradient says."""
    model, batch, plan = (
        state.model,
        lane(2),
        dataclasses.replace(schedule.at(state.model.config, 0), tied=False),
    )
    _, found = gradients(state, batch, plan)
    generator = torch.Generator().manual_seed(9)
    direction = {
        name: torch.randn(g.shape, generator=generator) * g.abs().mean() for name, g in found.items()
    }
    slope = sum((direction[name].double() * g.double()).sum() for name, g in found.items())
    size, losses = 1e-3 / max(d.abs().max() for d in direction.values()), []
    for sign in (1, -1):
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.add_(direction[name], alpha=sign * float(size))
        losses.append(gradients(state, batch, plan)[0] * ALONE.world_size / lanes.RECORD_LANES)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.sub_(direction[name], alpha=sign * float(size))
    assert (losses[0] - losses[1]) / (2 * float(size)) == pytest.approx(slope.item(), rel=0.05)


def test_validation_is_the_same_twice_and_no_training_loss(state):
    batch = lane(3)
    first = lanes.eval_lane(state, batch, False, (16, 32))
    assert first.shape == (TOKENS,) and first.dtype == torch.float32
    assert torch.equal(first, lanes.eval_lane(state, batch, False, (16, 32)))
    once = dataclasses.replace(state.model.config, mtp=False)
    plain = dataclasses.replace(schedule.at(once, 0), tied=False, short_window=16, long_window=32)
    loss, _ = gradients(state, batch, plain)
    assert loss == pytest.approx(first.sum().item(), rel=1e-5)


def test_deterministic_runs_allow_cublas(monkeypatch):
    """Without the variable torch refuses every matrix product on a GPU."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    try:
        setup.build(small("--deterministic=true"), ALONE)
        assert torch.are_deterministic_algorithms_enabled()
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
        assert inductor_config.deterministic  # nothing is chosen by measuring it
    finally:
        torch.use_deterministic_algorithms(False)
        inductor_config.deterministic = False
