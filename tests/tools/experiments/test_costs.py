"""GPU-hours and money: what is scaled from what, and what has no price."""

import json
from pathlib import Path
from types import SimpleNamespace

import kit
import pytest

from tools.experiments import costs
from tools.experiments.config import parse
from tools.experiments.study import Result, kin_of, work_of
from tools.site import limits
from tools.site.slurm import Node

STAGE = {"num_iterations": 1000, "batch_size": 128}


def config(stage="C", preset="tiny", variant="palm", **stage_config):
    values = {
        "experiment_name": f"{variant}_{stage}", "script": "train_gpt.py", "stage": stage, "n_runs": 2, "n_gpus": 8,
        "hyperparameters": {"preset": preset, "variant": variant}, "stage_config": {**STAGE, **stage_config},
    }  # fmt: skip
    return parse(json.dumps(values).encode(), Path("c.json"))


def measured(like, seconds=3600.0, **values) -> Result:
    return Result(
        like.variant, like.label, like.letter, False, 2, seconds=[seconds] * 2, gpus=values.pop("gpus", 1),
        work=work_of(like), kin=kin_of(like), **values,
    )  # fmt: skip


def test_a_run_is_scaled_only_from_runs_of_its_script_preset_and_kind_of_batch():
    short = measured(config("A"))
    assert costs.estimate(config(num_iterations=3000), 8, [short], 60).gpu_hours == 3
    other_variant_last = [short, measured(config("A", variant="slow"), 7200.0)]
    assert costs.estimate(config(num_iterations=3000), 8, other_variant_last, 60).gpu_hours == 3
    strangers = [measured(config("A", preset="historical")), measured(config("A", batch_size=None))]
    for unlike in strangers:
        found = costs.estimate(config(), 8, [unlike], 60)
        assert found.gpu_hours == 8 and "upper bound" in found.source
    assert "upper bound" in costs.estimate(config(), 8, [measured(config("A"), gpus=0)], 60).source


def test_the_hours_of_a_cpu_have_no_price():
    on_cpu = measured(config("A"), gpus=0)
    lines = costs.saved([on_cpu], [config(num_iterations=3000)], {"": 2.0})
    assert lines[0] == "spent at stage A: 2 hours of a CPU in 2 runs"
    assert "6 hours of a CPU" in lines[1] and not any("$" in line or "GPU" in line for line in lines)


@pytest.mark.parametrize(
    ("prices", "said"),
    [
        ({"h200": 3.0}, "spent at stage A: 2 GPU-hours, $6.00 in 2 runs"),
        ({"h100": 3.0}, "no price for h200: --price h200=..."),
        (None, "money: --price 2.50 (a GPU-hour), or --price h100=2.99,l40s=0.80"),
    ],
)
def test_the_price_of_the_type_that_the_job_got(prices, said, monkeypatch):
    monkeypatch.delenv("ENGAGING_GPU_PRICES", raising=False)
    assert said in costs.saved([measured(config("A"), gpu_type="h200")], [], prices)


def test_no_more_runs_at_once_than_the_nodes_hold():
    def node(name, gpus, state="IDLE", cpus=64):
        return Node(name, state, ("p",), cpus, 0, 10**6, 0, gpus, {})

    nodes = [
        node("a", {"h200": 8}),
        node("b", {"h200": 8}),
        node("c", {"l40s": 4}),
        node("d", {"h200": 8}, "DOWN"),
    ]
    cluster = SimpleNamespace(nodes_of=lambda name: nodes)

    def room(gpus, kind, cpus):
        return limits.room(cluster, "p", limits.Request(gpus, kind, 60, 1, cpus))

    assert [room(4, "h200", 8), room(8, "h200", 8), room(1, "l40s", 8), room(1, "h200", 16)] == [4, 2, 4, 8]
    assert room(0, None, 32) == 6 and room(8, "l40s", 8) == 1


def test_without_prices_the_stages_cost_what_their_budget_says(clone):
    """The document's sum: 16 + 30 + 42 and 7 for a pivot, against 168 for all variants in full: 43% saved."""
    words = ("plan", "tools/experiments/configs", "--executor", "local", "--minutes", "30m")
    said = kit.engaging(clone, *words, check=False).stdout
    assert "A $2.00, B $10.00, C $8.40 a run; --price sets yours" in said
    assert "$88.00 and $7.00 for a pivot, 43% less than $168.00" in said
    rows = json.loads(kit.engaging(clone, *words, "--json", check=False).stdout)
    assert [row["cost"] for row in rows] == [16.0, 120.0, 168.0]
    rows = json.loads(kit.engaging(clone, *words, "--json", "--price", "1", check=False).stdout)
    assert [row["cost"] for row in rows] == [4.0, 24.0, 80.0]
    rows = json.loads(kit.engaging(clone, *words, "--json", "--n-gpus", 2, check=False).stdout)
    assert [row["cost"] for row in rows] == [None] * 3


def test_what_runs_here_has_no_time_limit_to_take_for_a_bound(clone):
    words = ("plan", kit.STAGE_A, "--executor", "local", "--n-gpus", 0)
    said = kit.engaging(clone, *words).stdout
    assert "a guess of 2 h a run, none was measured here: --minutes" in said and "limit" not in said
    assert "times: your estimate" in kit.engaging(clone, *words, "--minutes", "5m").stdout
