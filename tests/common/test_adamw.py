"""AdamW without torch's compiler: torch's numbers and state to the bit, and nothing of torch._dynamo is imported."""

import sys

import pytest
import torch

from nanogpt.common.adamw import AdamW

SETTINGS = {"lr": 1e-2, "betas": (0.8, 0.95), "fused": True}
SKIPPED = 2  # the step whose update is called off


def trained(kind: type[torch.optim.AdamW]) -> tuple[list[torch.Tensor], dict]:
    """Weights and state of a small model after five steps, with another state dict put back after the first."""
    generator = torch.Generator().manual_seed(3)
    matrix, bias = (torch.randn(*shape, generator=generator).requires_grad_() for shape in ((4, 3), (3,)))
    groups = [{"params": [matrix], "weight_decay": 0.1}, {"params": [bias], "weight_decay": 0.0}]
    optimizer = kind(groups, **SETTINGS)
    for step in range(5):
        ((torch.randn(5, 4, generator=generator) @ matrix + bias) ** 2).sum().backward()
        optimizer.grad_scale, optimizer.found_inf = None, torch.tensor(float(step == SKIPPED))
        before = matrix.detach().clone()
        optimizer.step()
        assert torch.equal(matrix, before) == (step == SKIPPED)
        optimizer.zero_grad(set_to_none=True)
        assert matrix.grad is None
        if step == 0:
            optimizer.load_state_dict(optimizer.state_dict())
    return [matrix, bias], optimizer.state_dict()


def test_the_numbers_and_the_state_are_torchs(monkeypatch):
    theirs, their_state = trained(torch.optim.AdamW)
    monkeypatch.setitem(sys.modules, "torch._dynamo", None)  # importing it is an error now
    ours, our_state = trained(AdamW)
    assert all(map(torch.equal, ours, theirs))
    assert our_state["param_groups"] == their_state["param_groups"]
    for number, state in their_state["state"].items():
        assert state.keys() == our_state["state"][number].keys() == {"step", "exp_avg", "exp_avg_sq"}
        assert all(torch.equal(value, our_state["state"][number][key]) for key, value in state.items())


def test_torchs_own_needs_what_is_avoided(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch._dynamo", None)
    with pytest.raises(ImportError):
        trained(torch.optim.AdamW)
