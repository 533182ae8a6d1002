"""Lanes as graphs: three steps give what three called ones give, and the guards of a recording hold."""

import dataclasses
from functools import partial

import numpy as np
import pytest
import torch

from modded_nanogpt import candidates, lanes, schedule, setup
from modded_nanogpt.batches import Batch
from modded_nanogpt.config import Config
from modded_nanogpt.fast.capture import Recorder
from nanogpt.common.errors import UserError
from nanogpt.common.ranks import Ranks
from tests.modded.test_lanes import TOKENS, VOCAB, lane, small


class Repeater(Recorder):
    """On a CPU: launches call the function again and write where its results were."""

    def _capture(self, body):
        results = body()

        def launch() -> None:
            for kept, result in zip(results, body(), strict=True):
                if kept is not None:
                    kept.copy_(result)

        return launch, results


def sampled(batch: Batch, plan: schedule.StepPlan, slots: int) -> Batch:
    """The lane with as many classes as `plan` says, and so many slots among them."""
    if not plan.classes:
        return batch
    wanted = np.append(batch.targets.numpy(), np.arange(VOCAB, VOCAB + slots))
    chosen = candidates.candidates(wanted, plan.classes, VOCAB + slots, 3)
    return dataclasses.replace(batch, candidates=torch.from_numpy(chosen))


def three_steps(state: lanes.State, ranks: Ranks, plans: list[schedule.StepPlan]) -> tuple[list, dict]:
    """(losses, weights after them) of two lanes a step, from fresh weights."""
    config = state.model.config
    state.model.init_weights(7)
    state.optimizer.reset()
    generator = torch.Generator(ranks.device).manual_seed(8)
    with torch.no_grad():  # what starts at zero would hide a part of the graph
        for parameter in state.model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, device=ranks.device)
            parameter.add_(0.02 * noise)
    setup.refresh_fp8(state, ranks, exact=True)
    losses = []
    for number, plan in enumerate(plans):
        for place in range(2):
            batch = sampled(lane(2 * number + place), plan, int(config.copy_pointer)).to(ranks.device)
            losses.append(lanes.train_lane(state, ranks, batch, plan).item())
        state.optimizer.step(plan)
        setup.refresh_fp8(state, ranks, exact=True)
    weights = {name: weights.detach().clone() for name, weights in state.model.named_parameters()}
    assert state.table.rows.any()
    return losses, weights | {"n-gram table": state.table.rows.clone()}


def compare(device: str, recorder: type[Recorder], tolerance: float, *flags: str) -> None:
    """Tied and untied steps, with Adam and without, two windows, some classes and all."""
    ranks = Ranks(0, 0, 1, torch.device(device))
    config = small(f"--device={device}", *flags)
    state = setup.build(config, ranks)
    first = schedule.at(config, 0)
    wide = dataclasses.replace(first, long_window=64)
    plans = [
        dataclasses.replace(first, adam=False, classes=160),
        dataclasses.replace(wide, adam=True, untie=True, table=schedule.TABLE_EARLY),
        dataclasses.replace(wide, adam=True, tied=False, table=schedule.TABLE_LATE),
    ]
    losses, weights = three_steps(state, ranks, plans)
    made = recorder(ranks.device, partial(lanes.lasting_tensors, state))
    for plan in plans:
        lanes.record_lane(
            state, made, ranks, sampled(lane(9), plan, int(config.copy_pointer)).to(ranks.device), plan
        )
    made.seal()
    state.recorder = made
    replayed, found = three_steps(state, ranks, plans)
    assert len(made.recordings) == 3
    torch.testing.assert_close(torch.tensor(replayed), torch.tensor(losses), rtol=tolerance, atol=0)
    for name, expected in weights.items():
        torch.testing.assert_close(found[name], expected, rtol=0, atol=tolerance, msg=name)


@pytest.mark.parametrize("flags", [(), ("--copy_input=true",), ("--copy_pointer=true",)])
def test_replayed_lanes_train_as_called_ones(flags):
    torch.set_num_threads(1)
    compare("cpu", Repeater, 1e-6, *flags)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "flags", [("false",), ("true",), ("true", "--copy_input=true"), ("true", "--copy_pointer=true")]
)
def test_graphs_train_as_calls_on_a_gpu(flags):
    if not torch.cuda.is_available():
        pytest.skip("no NVIDIA driver on this machine")
    compiled, *more = flags
    compare("cuda", Recorder, 2e-3, f"--compile={compiled}", "--attention=auto", *more)


def test_what_is_no_longer_true_of_a_recording_is_refused():
    table = [torch.ones(2)]
    recorder = Repeater(torch.device("cpu"), lambda: [("table", table[0])])
    wide = torch.arange(2.0)
    recorder.record("a", [wide, None], lambda given: [given[0] * table[0], None])
    table[0].fill_(3.0)
    assert recorder.replay("a", [wide + 1, None])[0].tolist() == [3, 6]
    calls = iter(range(1, 9))
    with pytest.raises(RuntimeError, match=r"b: result 0 of a replay differs .* --capture=false"):
        recorder.record("b", [wide], lambda given: [given[0] + next(calls)])
    recorder.seal()
    with pytest.raises(RuntimeError, match="c: nothing may be recorded any more"):
        recorder.record("c", [wide], lambda given: given)
    with pytest.raises(RuntimeError, match="c: was never recorded; recorded are"):
        recorder.replay("c", [wide])
    table[0] = torch.ones(2)
    with pytest.raises(RuntimeError, match="table: no longer where the graphs read it"):
        recorder.check_addresses()


def test_every_lane_of_a_run_has_a_kind():
    config = Config(steps=30, extension_steps=2)
    kinds = lanes.lane_kinds(config)
    untied = schedule.untying_step(config)
    batches = {step: lane(1) for step in range(32)}
    keys = {lanes.lane_key(batches[step.step], step) for step in kinds}
    assert all(lanes.lane_key(batches[step], schedule.at(config, step)) in keys for step in range(32))
    assert [kind.tied for kind in kinds].count(True) == len([k for k in kinds if k.step <= untied])
    assert lanes.lane_key(lane(1), kinds[0])[0] == TOKENS


def test_graphs_are_refused_where_they_cannot_be():
    for flags, problem in (
        ({"device": "cpu"}, "--capture=true: needs a GPU, but --device=cpu"),
        ({"warmup": False}, "graphs are recorded in the warm-up"),
    ):
        with pytest.raises(UserError, match=problem):
            Config(capture="true", **flags)
