"""Steps of the optimizer on one rank, against a literal float64 form of the equations, and each of its switches."""

import dataclasses
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from modded_nanogpt.optim import table
from modded_nanogpt.optim.adam import update_
from modded_nanogpt.optim.compiled import compiled, scalar
from modded_nanogpt.optim.normuon import apply_, equalized, joined, nesterov_, store_
from modded_nanogpt.optim.sharded import Optimizer
from modded_nanogpt.schedule import is_adam_step
from nanogpt.common.ranks import Ranks
from tests.modded.optim import small
from tests.modded.optim.literal import ADAM, Literal

CPU = torch.device("cpu")
ALONE = Ranks(0, 0, 1, CPU)
SWITCHES = [
    {},
    {"polar_express": False},
    {"normuon": False},
    {"cautious_decay": False},
    {"qk_pairs": False},
    {"mantissa": False},
    {"adam_every": 1},
    {"adam_every": 3},
    {"embedding": "tied"},
    {"embedding": "untied"},
    {"two_momenta": True, "steps": 7, "extension_steps": 0},  # from step 4 on they differ
    {"muon_lr": 0.1, "adam_lr": 0.02, "muon_wd": 3.0, "adam_wd": 0.5, "normuon_beta2": 0.5},
]


def optimizer_of(parameters, config):
    return Optimizer(parameters, config, ALONE, CPU)


def mean_gradient(name: str, step: int) -> torch.Tensor:
    return sum(small.lane_gradient(name, step, lane) for lane in range(small.LANES)) / small.LANES


def assert_near(found, expected, start, relative: float) -> None:
    """Errors are at most `relative` of the largest change since the start, of each parameter."""
    for name, value in expected.items():
        moved = (value - start[name].double()).abs().max()
        error = (found[name].detach().double() - value).abs().max()
        assert error <= relative * moved, f"{name}: error {error:.2e}, change {moved:.2e}"


@pytest.mark.parametrize("changes", SWITCHES, ids=lambda changes: ",".join(changes) or "record")
def test_every_step_is_the_literal_one(changes):
    config = small.config_of(**changes)
    parameters = small.parameters(torch.float32)
    start = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    optimizer, literal = optimizer_of(parameters, config), Literal(parameters, config)
    untie = small.UNTIE if config.adam_every != 3 else 2
    for step in range(small.STEPS):
        plan = small.plan_of(config, step, untie=untie)
        small.add_gradients(parameters, step)
        literal.step({name: mean_gradient(name, step) for name in parameters}, plan)
        optimizer.step(plan)
        moved = {name: v for name, v in literal.weights.items() if not torch.equal(v, start[name].double())}
        assert moved.keys() >= {"qk_bank", "vo_bank", "mlp_bank"}
        assert_near(parameters, moved, start, 3e-4)
        for name in parameters.keys() - moved.keys():
            assert torch.equal(parameters[name].detach(), start[name]), name
    assert moved.keys() == parameters.keys()


def test_the_switches_make_a_difference():
    """Else the test above would not notice one that is ignored on both sides."""
    finals = []
    for changes in SWITCHES[:5] + SWITCHES[6:11]:
        config, parameters = small.config_of(**changes), small.parameters()
        optimizer = optimizer_of(parameters, config)
        for step in range(small.STEPS):
            small.add_gradients(parameters, step)
            optimizer.step(small.plan_of(config, step, untie=small.UNTIE if config.adam_every != 3 else 2))
        finals.append(torch.cat([parameter.detach().flatten() for parameter in parameters.values()]))
    for i, one in enumerate(finals):
        for other in finals[:i]:
            assert (one - other).abs().max() > 1e-3


def test_bfloat16_weights_stay_near_the_float64_ones():
    """The iteration is done in bfloat16 too, which costs about a hundredth of each update of a matrix."""
    config, parameters = small.config_of(), small.parameters(torch.bfloat16)
    start = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    optimizer, literal = optimizer_of(parameters, config), Literal(parameters, config)
    for step in range(small.STEPS):
        small.add_gradients(parameters, step)
        literal.step({name: mean_gradient(name, step) for name in parameters}, small.plan_of(config, step))
        optimizer.step(small.plan_of(config, step))
    tensors = optimizer.tensors()
    for name in ("qk_bank", "vo_bank", "mlp_bank"):
        low = tensors[f"{name}/mantissa"].view(parameters[name].shape)
        assert low.any()
        master = joined(parameters[name].detach(), low).double()
        error = (master - literal.weights[name]).norm()
        assert error < 0.03 * (literal.weights[name] - start[name].double()).norm(), name
        assert torch.equal(master.float().view(torch.int32) >> 16, parameters[name].view(torch.int16).int())
    for name in ("head", "embed", "bigram", "value_embeds", "mudd_w1"):
        error = (parameters[name].detach().double() - literal.weights[name]).abs()
        size = literal.weights[name].abs().max() + start[name].abs().max()
        assert error.max() < small.STEPS * 2**-8 * size, name
    assert optimizer.sizes["bigram"] == 2 * 4 * 30 * small.WIDTH


@pytest.mark.parametrize(("mantissa", "moves"), [(True, True), (False, False)])
def test_small_updates_add_up_only_with_the_mantissa(mantissa, moves):
    config = small.config_of(mantissa=mantissa, muon_lr=2e-5, muon_wd=0.0)
    parameters = {"vo_bank": torch.nn.Parameter(torch.full((1, 16, 16), 1.01).bfloat16())}
    optimizer = optimizer_of(parameters, config)
    for _ in range(150):
        parameters["vo_bank"].grad = torch.eye(16)[None].bfloat16()
        optimizer.step(dataclasses.replace(small.plan_of(config, 0), lr=1.0))
    change = parameters["vo_bank"].detach().float() - torch.tensor(1.01).bfloat16().float()
    assert bool((change.diagonal(dim1=1, dim2=2) < -1e-3).all()) == moves
    assert moves or not change.any()


def test_halves_of_float32_numbers_come_back():
    values = torch.cat([torch.randn(1000) * 10.0**k for k in range(-30, 30, 5)] + [torch.zeros(1)])
    weights, low = torch.empty_like(values, dtype=torch.bfloat16), torch.empty_like(values, dtype=torch.int16)
    store_(values, weights, low)
    assert torch.equal(joined(weights, low), values)
    assert (weights.float().abs() <= values.abs()).all()  # truncated, not rounded
    store_(values, weights, None)
    assert torch.equal(weights, values.bfloat16())


def test_the_sign_of_adams_caution_is_strict():
    """No update, no decay; an update towards zero decays; one away from zero does not."""
    weights = torch.tensor([2.0, 2.0, 2.0, -2.0, 0.0])
    gradient = torch.tensor([0.0, 1.0, -1.0, -1.0, 1.0])
    for cautious, expected in ((True, [2.0, 1.8, 2.1, -1.8, -0.1]), (False, [1.9, 1.8, 2.0, -1.8, -0.1])):
        p, g = weights.clone(), gradient.clone()
        update_(
            p,
            g,
            torch.zeros(5),
            torch.zeros(5),
            scalar(0.1),
            scalar(0.05),
            (0.0, 0.0),
            1e-10,
            1.0,
            cautious,
            True,
        )
        torch.testing.assert_close(p, torch.tensor(expected))
        assert not g.any()


def test_the_sign_of_muons_caution_is_not():
    """A matrix without an update decays all the same, as record 43 has it."""
    for cautious, expected in ((True, [1.8, 1.6, 2.2, -1.6]), (False, [1.8, 1.6, 2.0, -1.6])):
        weights, update = torch.tensor([[[2.0, 2.0, 2.0, -2.0]]]), torch.tensor([[[0.0, 2.0, -2.0, -2.0]]])
        apply_(
            update, weights, torch.ones(1, 1, 1), None, None, None, scalar(0.1), scalar(1.0), 0.9, cautious
        )
        torch.testing.assert_close(weights, torch.tensor([[expected]]))


def test_gradients_of_adams_parameters_wait_for_the_odd_step():
    config, parameters = small.config_of(), small.parameters()
    optimizer = optimizer_of(parameters, config)
    buffers = {name: parameters[name].grad.data_ptr() for name in ("bigram", "value_embeds", "embed2")}
    for step in range(4):
        small.add_gradients(parameters, step)
        optimizer.step(small.plan_of(config, step))
        assert optimizer.pending == (not is_adam_step(config, step))
        for name in ADAM:
            gradient = parameters[name].grad
            if step % 2 == 0:
                torch.testing.assert_close(gradient.double(), mean_gradient(name, step))
            elif name in buffers:
                assert gradient.data_ptr() == buffers[name] and not gradient.any()
            else:
                assert gradient is None
        assert all(parameters[name].grad is None for name in ("qk_bank", "vo_bank", "mlp_bank"))


def test_the_embedding_is_the_head_until_it_is_untied():
    config, parameters = small.config_of(), small.parameters(torch.bfloat16)
    optimizer = optimizer_of(parameters, config)
    for step in range(6):
        small.add_gradients(parameters, step)
        optimizer.step(small.plan_of(config, step))
        assert torch.equal(parameters["head"], parameters["embed"]) == (step < 5)
        tensors = optimizer.tensors()
        assert ("embed/first" in tensors) == (step >= 3)
        if step == 3:
            assert torch.equal(tensors["embed/first"], tensors["head/first"])
            assert torch.equal(tensors["embed/second"], tensors["head/second"])
            assert tensors["embed/updates"] == tensors["head/updates"] == 2
    assert not torch.equal(tensors["embed/first"], tensors["head/first"])


def test_a_model_that_reads_rows_of_the_head_while_tied_needs_no_gradient_of_the_embedding():
    finals = []
    for direct in (False, True):
        config, parameters = small.config_of(embedding="tied"), small.parameters()
        optimizer = optimizer_of(parameters, config)
        for step in range(4):
            small.add_gradients(parameters, step)
            if direct:
                parameters["head"].grad += parameters["embed"].grad
                parameters["embed"].grad = None
            optimizer.step(small.plan_of(config, step))
        finals.append({name: parameter.detach().clone() for name, parameter in parameters.items()})
    for name in finals[0]:
        torch.testing.assert_close(finals[0][name], finals[1][name], rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "left_out", [("embed",), ("bigram", "static_gates"), tuple(ADAM), tuple(small.SHAPES)[:3]]
)
def test_parameters_may_be_missing(left_out):
    config = small.config_of()
    parameters = small.parameters(leave_out=left_out)
    optimizer, literal = optimizer_of(parameters, config), Literal(parameters, config)
    plans = [small.plan_of(config, step) for step in range(4)]
    if "embed" in left_out:
        plans = [dataclasses.replace(plan, untie=False) for plan in plans]
    start = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    for step, plan in enumerate(plans):
        small.add_gradients(parameters, step)
        literal.step({name: mean_gradient(name, step) for name in parameters}, plan)
        optimizer.step(plan)
    assert_near(parameters, literal.weights, start, 3e-4)


def test_a_name_without_a_row_and_a_gradient_that_is_missing_are_refused():
    with pytest.raises(ValueError, match=r"without a row in modded_nanogpt/optim/table\.py: mystery"):
        optimizer_of({"mystery": torch.nn.Parameter(torch.zeros(2))}, small.config_of())
    for name, wanted in (("vo_bank", "vo_bank: has no gradient"), ("scalars", "without a gradient: scalars")):
        parameters = small.parameters()
        optimizer = optimizer_of(parameters, small.config_of())
        small.add_gradients(parameters, 1)
        parameters[name].grad = None
        with pytest.raises(ValueError, match=wanted):
            optimizer.step(small.plan_of(small.config_of(), 1))


def test_the_table_has_the_records_rows():
    rows = table.table(small.config_of(), small.SHAPES)
    assert {
        name: (*row.betas, row.lr, row.decay) for name, row in rows.items() if row.spread != "banks"
    } == ADAM
    assert {row.epsilon for row in rows.values()} == {1e-10}


def test_the_table_has_the_medium_tracks_rows():
    """Section 8: its Adam's base rate is 0.004, and 0.008 for scalars; gates at a tenth of NorMuon's."""
    tables = {name: (0.8, 0.95, lr, wd) for name, lr, wd in (
        ("head", 1, 150), ("embed", 1, 150), ("embed2", 75, 5), ("value_embeds", 75, 5)
    )}  # fmt: skip
    scalars = dict.fromkeys(("scalars", "residual_lambdas", "input_lambdas"), (0.9, 0.99, 2, 0))
    gates = dict.fromkeys(("attention_gates", "ve_gates", "skip_gates", "smear_gate"), (1.0,))
    rows = table.table(SimpleNamespace(recipe="medium"), [*tables, *scalars, *gates, "mlp_bank", "vo_bank"])
    found = {name: row for name, row in rows.items() if row.spread != "banks"}
    assert {n: (*row.betas, row.lr, row.decay) for n, row in found.items()} == tables | scalars
    assert {row.epsilon for row in found.values()} == {1e-8}
    assert {name: rows[name].lr for name in gates} == dict.fromkeys(gates, 0.1)
    assert rows["mlp_bank"].multipliers == (1.0, 2.0) and rows["vo_bank"].lr == 1.0
    both = [*table.table(small.config_of(), small.SHAPES).items(), *rows.items()]
    units = {name for name, row in both if row.spread != "whole"} | {"small"}
    assert sorted(units) == sorted(table.REDUCE_ORDER) == sorted(table.UPDATE_ORDER)


def test_reset_leaves_nothing_of_a_warm_up():
    finals = []
    for warm in (False, True):
        config, parameters = small.config_of(), small.parameters(torch.bfloat16)
        start = {name: parameter.detach().clone() for name, parameter in parameters.items()}
        optimizer = optimizer_of(parameters, config)
        for step in range(5 if warm else 0):  # ends untied, and between two Adam steps
            small.add_gradients(parameters, step)
            optimizer.step(small.plan_of(config, step))
        optimizer.reset()
        for name, parameter in parameters.items():
            parameter.data.copy_(start[name])
        for step in range(6):
            small.add_gradients(parameters, step)
            optimizer.step(small.plan_of(config, step))
        finals.append({name: parameter.detach().clone() for name, parameter in parameters.items()})
    assert all(torch.equal(finals[0][name], finals[1][name]) for name in finals[0])


def test_norms_are_kept_and_rows_equalized():
    update = torch.randn(3, 32, 16) * torch.logspace(-2, 1, 32)[None, :, None]
    found = equalized(update, torch.zeros(3, 32, 1), 0.9)
    torch.testing.assert_close(found.norm(dim=(1, 2)), update.norm(dim=(1, 2)))
    sizes = found.norm(dim=2)
    torch.testing.assert_close(sizes, sizes.mean(1, keepdim=True).expand_as(sizes))


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.campaign)])
def test_the_compiled_pieces_are_the_plain_ones(monkeypatch, backend):
    """In one graph each; the code that torch's own compiler makes for a CPU takes it a minute."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    shape, generator = (3, 16, 8), torch.Generator().manual_seed(1)
    gradient = torch.randn(shape, generator=generator).bfloat16()
    results = []
    for on in (False, True):
        buffer, second = torch.ones(shape), torch.ones(3, 16, 1)
        weights, low = torch.ones(shape).bfloat16(), torch.full(shape, 77, dtype=torch.int16)
        update = compiled(nesterov_, on)(gradient, buffer, scalar(0.9), 1.02, 0.5)
        compiled(apply_, on)(
            update, weights, torch.ones(3, 1, 1), second, low, None, scalar(0.02), scalar(0.03), 0.9, True
        )
        results.append((update.float(), buffer, second, joined(weights, low)))
    for plain, fast in zip(*results, strict=True):
        torch.testing.assert_close(plain, fast, rtol=0.01, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
def test_the_compiled_optimizer_on_a_gpu_stays_near_the_literal_one():
    """All of it as it trains: compiled pieces, Triton products, bfloat16; then a resume, which changes no bit."""
    device = torch.device("cuda", 0)
    config = small.config_of(device="cuda")
    start = small.parameters(torch.bfloat16)
    finals = []
    for cut in (None, 4):
        literal = Literal(start, config)
        parameters = {name: torch.nn.Parameter(p.detach().to(device)) for name, p in start.items()}
        optimizer = Optimizer(parameters, config, Ranks(0, 0, 1, device), device)
        for step in range(small.STEPS):
            gradients = {name: mean_gradient(name, step) for name in parameters}
            for name, gradient in gradients.items():
                p = parameters[name]
                added = gradient.to(device, p.dtype)
                p.grad = added if p.grad is None else p.grad.add_(added)
            literal.step(gradients, small.plan_of(config, step))
            optimizer.step(small.plan_of(config, step))
            if step == cut:
                saved = {name: tensor.cpu().clone() for name, tensor in optimizer.tensors().items()}
                optimizer.load(saved)
        finals.append({name: parameter.detach().cpu() for name, parameter in parameters.items()})
    for name, value in literal.weights.items():
        moved = (value - start[name].detach().double()).norm()
        rounding = small.STEPS * 2**-8 * (value.norm() + start[name].detach().norm())
        assert (finals[0][name].double() - value).norm() < 0.1 * moved + rounding, name
        assert torch.equal(finals[0][name], finals[1][name]), name
