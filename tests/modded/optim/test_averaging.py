"""The averages at the end of a run, against the formula in float64, step by step."""

import pytest
import torch

from modded_nanogpt.optim import averaging
from modded_nanogpt.optim.sharded import Optimizer
from nanogpt.common.ranks import Ranks
from tests.modded.optim import small

CPU = torch.device("cpu")
STEPS = 24
CONFIG = small.config_of(averaging=True, steps=STEPS, extension_steps=0)


def literal(seen: dict[int, torch.Tensor], name: str) -> torch.Tensor:
    """The average that takes the weights' place; seen: those after each step."""
    last, total = seen[STEPS - 1], torch.zeros_like(seen[0])
    for row in averaging.AVERAGES[name]:
        average, keep = None, (1 - averaging.RECORD_STEPS / STEPS / row.tau) ** 4
        for step in range(3, STEPS, 4):  # the last step is one of them
            if step >= STEPS * (1 - row.window / averaging.RECORD_STEPS):
                average = seen[step] if average is None else keep * average + (1 - keep) * seen[step]
        total += row.weight * average
    total += (1 - sum(row.weight for row in averaging.AVERAGES[name])) * last
    return total if name == "value_embeds" else total * (last.norm() / total.norm())


@pytest.mark.parametrize("cut", [None, 17])
def test_the_formula_and_a_resume(monkeypatch, cut):
    monkeypatch.setattr(averaging, "RECORD_STEPS", 500)  # windows of half a run
    parameters, seen = small.parameters(), {name: {} for name in averaging.AVERAGES}
    optimizer = Optimizer(parameters, CONFIG, Ranks(0, 0, 1, CPU), CPU)
    for step in range(STEPS):
        small.add_gradients(parameters, step)
        optimizer.step(small.plan_of(CONFIG, step, steps=STEPS))
        for name, values in seen.items():
            values[step] = parameters[name].detach().double().clone()
        if step == cut:
            saved = {name: tensor.clone() for name, tensor in optimizer.tensors().items()}
            assert "mlp_bank/average1" in saved
            optimizer = Optimizer(parameters, CONFIG, Ranks(0, 0, 1, CPU), CPU)
            optimizer.load(saved)
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    optimizer.average()
    for name, parameter in parameters.items():
        if name in averaging.AVERAGES:
            expected = literal(seen[name], name)
            assert (expected - before[name]).norm() > 1e-3 * expected.norm()
            torch.testing.assert_close(parameter.detach().double(), expected, rtol=1e-5, atol=1e-6)
        else:
            assert torch.equal(parameter, before[name])
    assert not [name for name in optimizer.tensors() if "average" in name], "they are used up"


def test_the_weights_of_each_parameter_sum_to_one_at_most():
    assert all(sum(row.weight for row in rows) <= 1 + 1e-9 for rows in averaging.AVERAGES.values())
