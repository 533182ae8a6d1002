"""Which classes a lane scores, and that its loss and gradients over them are those of a softmax over these alone."""

import numpy as np
import pytest
import torch

from modded_nanogpt import candidates, losses, schedule
from modded_nanogpt.config import Config
from nanogpt.common.errors import UserError

V, SOFTCAP = 50_304, (23.0, 5.0, 7.5)


def test_a_lane_scores_its_targets_and_the_others_in_turn():
    rng = np.random.default_rng(1)
    seen = np.zeros(V, int)
    for step in range(12):
        targets = rng.integers(0, 600, 4000)
        turn = candidates.turn_of(step, 3, 8, 10_240, V)
        chosen = candidates.candidates(targets, 10_240, V, turn)
        assert chosen.dtype == np.int64 and len(chosen) == 10_240 and (np.diff(chosen) > 0).all()
        assert np.isin(targets, chosen).all()
        seen[chosen] += 1
    others = seen[600:]
    assert others.min() >= 1 and others.max() <= 4, "every class comes in its turn"
    assert len({candidates.turn_of(0, lane, 8, 10_240, V) for lane in range(8)}) == 8


def test_all_targets_are_scored_or_the_lane_is_refused():
    targets = np.arange(100)
    assert candidates.candidates(targets, 100, 256, 7).tolist() == list(range(100))
    with pytest.raises(
        UserError, match=r"a lane has 101 different targets, and 100 classes are scored; use more"
    ):
        candidates.candidates(np.arange(101), 100, 256, 7)


def given(vocabulary: int, tokens: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    double = {"generator": generator, "dtype": torch.float64}
    prefix = torch.randint(-1, vocabulary, (vocabulary,), generator=generator)
    return {
        "x": torch.randn(tokens, 8, **double).requires_grad_(),
        "head": torch.randn(vocabulary, 8, **double).requires_grad_(),
        "targets": torch.randint(0, vocabulary, (tokens,), generator=generator),
        "prefix_table": prefix,
        "mtp": torch.tensor([1.0, 0.5, 0.25]),
        "prefix": torch.tensor([0.25]),
    }


def loss_of(given: dict, head: torch.Tensor, chosen: torch.Tensor | None) -> torch.Tensor:
    names = ("prefix_table", "mtp", "prefix")
    others = [given[name] for name in names]
    return losses.train_loss(given["x"], head, given["targets"], chosen, *others, SOFTCAP, 1.0, False, 40)


def test_the_sampled_loss_is_that_of_the_scored_classes_alone():
    values = given(40, 12)
    chosen = torch.from_numpy(candidates.candidates(values["targets"].numpy(), 24, 40, 5))
    scored = values["head"].detach()[chosen].requires_grad_()
    loss = loss_of(values, scored, chosen)
    loss.backward()

    x, head = (values[name].detach().clone().requires_grad_() for name in ("x", "head"))
    z = 23 * torch.sigmoid((x @ head.T + 5) / 7.5)
    left_out = torch.ones(40, dtype=torch.bool)
    left_out[chosen] = False
    log_p = z.masked_fill(left_out, -torch.inf).log_softmax(-1)
    expected = 0.0
    for t, target in enumerate(values["targets"].tolist()):
        for ahead, weight in enumerate(values["mtp"].tolist()):
            if t + ahead < 12:
                expected = expected - weight * log_p[t, values["targets"][t + ahead]]
        before = int(values["prefix_table"][target])
        if before >= 0 and not left_out[before]:
            expected = expected - 0.25 * log_p[t, before]
    expected.backward()
    torch.testing.assert_close(loss, expected.detach())
    torch.testing.assert_close(values["x"].grad, x.grad)
    torch.testing.assert_close(scored.grad, head.grad[chosen])
    assert not head.grad[left_out].any()


def test_where_all_classes_are_chosen_the_switch_changes_nothing():
    values = given(40, 12)
    every = torch.arange(40)
    assert loss_of(values, values["head"], every) == loss_of(values, values["head"], None)


def test_the_number_of_classes_by_step():
    config = Config(sampled_softmax=True)
    counts = [schedule.sampled_classes(config, step) for step in range(schedule.total_steps(config))]
    assert list(dict.fromkeys(counts)) == [10_240, 14_336, 24_576, 0]
    assert counts == sorted(counts, key=lambda count: count or V), "more and more, all of them at last"
    assert 0.05 < counts.count(0) / len(counts) < 0.1
    assert not any(schedule.sampled_classes(Config(sampled_softmax=False), step) for step in range(99))
    few = Config(sampled_softmax=True, lanes=4)
    assert schedule.sampled_classes(few, 0) == 16_384 and few.lanes * 2 == schedule.RECORD_LANES
    with pytest.raises(UserError, match="is made for GPT-2's vocabulary"):
        Config(sampled_softmax=True, vocab_size=512)
