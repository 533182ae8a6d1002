"""The optimizer on 1, 2 and 4 real ranks (gloo): equal weights, and resumes from any number of ranks to any other."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from modded_nanogpt.optim import averaging
from modded_nanogpt.optim.sharded import Optimizer
from nanogpt.common.errors import UserError
from nanogpt.common.ranks import Ranks
from tests.modded.optim import small
from tests.modded.optim.rank_runs import CONFIG, RUNS

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """The folder with the results of all runs."""
    folder = tmp_path_factory.mktemp("ranks")
    root = Path(__file__).resolve().parents[3]
    done = subprocess.run(
        [sys.executable, "-m", "tests.modded.optim.rank_runs", str(folder)],
        cwd=root, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return folder


def assert_equal(folder: Path, one: str, other: str) -> None:
    """The same names and the same bits, weights and state."""
    first, second = load_file(folder / f"{one}.safetensors"), load_file(folder / f"{other}.safetensors")
    assert first.keys() == second.keys()
    assert len(first) > len(small.SHAPES) * 3
    assert not [name for name, value in first.items() if not torch.equal(value, second[name])]


@pytest.mark.parametrize(("kind", "world"), [("half", 2), ("half", 4), ("full", 2)])
def test_the_number_of_ranks_changes_no_bit_when_the_sums_are_exact(runs, kind, world):
    assert_equal(runs, f"{kind}1", f"{kind}{world}")


@pytest.mark.parametrize("name", ["sparse2", "untold2"])
def test_sending_touched_rows_alone_changes_no_bit(runs, name):
    assert_equal(runs, "half1", name)


def test_these_runs_train(runs):
    last = load_file(runs / "half4.safetensors")
    for name, start in small.parameters(torch.bfloat16).items():
        assert not torch.equal(last[name], start.detach()), name


def test_rounded_sums_change_little(runs):
    one, other = (load_file(runs / f"rough{world}.safetensors") for world in (1, 2))
    start = small.parameters(torch.float32)
    different = 0
    for name in small.SHAPES:
        error, moved = (one[name] - other[name]).abs().max(), (one[name] - start[name].detach()).abs().max()
        assert error <= 3e-4 * moved, name
        different += bool(error)
    assert different


def test_averages_are_the_same_on_any_number_of_ranks(runs):
    """Up to the order of the sums that the norms are made of."""
    one, two, last = (load_file(runs / f"{name}.safetensors") for name in ("averaged1", "averaged2", "full1"))
    for name in small.SHAPES:
        torch.testing.assert_close(one[name], two[name], rtol=1e-5, atol=1e-7)
        assert torch.equal(one[name], last[name]) == (name not in averaging.AVERAGES), name


@pytest.mark.parametrize("name", [name for name, run in RUNS.items() if run[0] > 1])
def test_all_ranks_have_the_same_weights(runs, name):
    first = load_file(runs / f"{name}.rank0.safetensors")
    for rank in range(1, RUNS[name][0]):
        other = load_file(runs / f"{name}.rank{rank}.safetensors")
        assert all(torch.equal(first[key], other[key]) for key in small.SHAPES)


@pytest.mark.parametrize("name", [name for name, run in RUNS.items() if run[4]])
def test_a_resumed_run_ends_as_the_undisturbed_one(runs, name):
    """Saved after an Adam step or (`between`) while gradients wait, while the embedding is tied (`early`) or later."""
    assert_equal(runs, f"half{RUNS[name][0]}", name)


def test_state_that_does_not_fit_is_refused(runs):
    saved = load_file(runs / "cut2.safetensors")
    state = {key.removeprefix("state:"): value for key, value in saved.items() if key.startswith("state:")}

    def load(changes: dict) -> None:
        optimizer = Optimizer(small.parameters(torch.bfloat16), CONFIG, Ranks(0, 0, 1, CPU), CPU)
        optimizer.load({k: v for k, v in {**state, **changes}.items() if v is not None}, "step_6")

    load({})
    with pytest.raises(UserError, match=r"step_6: optimizer state does not fit this model \(bigram/second\)"):
        load({"bigram/second": None})
    with pytest.raises(UserError, match=r"does not fit this model \(mystery/first\)"):
        load({"mystery/first": torch.zeros(1)})
    with pytest.raises(UserError, match=r"step_6: head/first has shape \(2, 2\), not \(24, 16\)"):
        load({"head/first": torch.zeros(2, 2)})


@pytest.mark.parametrize("name", ["table2", "table8", "tablecut1to2", "tablecut2to1"])
def test_the_n_gram_table_is_the_same_on_all_ranks_and_after_a_resume(runs, name):
    """Every row, its state, and what a lane looks up, bit for bit: these gradients' sums are exact."""
    alone, several = load_file(runs / "table1.safetensors"), load_file(runs / f"{name}.safetensors")
    assert alone.keys() == several.keys() and alone["found"].abs().max() > 0.1
    assert (alone["last"] > 0).sum() > 60 and alone["event"] == 4
    assert not [key for key, value in alone.items() if not torch.equal(value, several[key])]
