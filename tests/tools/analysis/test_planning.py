"""Numbers of seeds and levels of early looks, against published tables, and against chance itself."""

import numpy as np
import pytest
from scipy import stats

from tools.analysis import planning


@pytest.mark.parametrize(
    "kind, effect, alpha, wanted, runs",
    [
        # Cohen's tables for two-sided 0.05 (one-sided 0.025) and a power of 0.80
        ("two-sample", 0.5, 0.025, 0.80, 64),
        ("two-sample", 0.8, 0.025, 0.80, 26),
        ("two-sample", 0.2, 0.025, 0.80, 394),
        ("one-sample", 0.5, 0.025, 0.80, 34),
        ("paired", 0.8, 0.025, 0.80, 15),
        ("two-sample", 0.5, 0.05, 0.95, 88),  # G*Power's manual: 176 in all
    ],
)
def test_numbers_of_runs_are_those_of_the_tables(
    kind: str, effect: float, alpha: float, wanted: float, runs: int
) -> None:
    assert planning.runs_needed(kind, effect, 1.0, alpha, wanted) == runs


def test_the_smallest_difference_is_the_inverse() -> None:
    seen = planning.smallest_difference("two-sample", 10, 0.0014)
    assert seen is not None and planning.power("two-sample", 10, seen / 0.0014) == pytest.approx(
        0.9, abs=1e-9
    )
    assert planning.runs_needed("two-sample", seen * 1.0001, 0.0014) == 10
    assert planning.smallest_difference("two-sample", 1, 0.0014) is None
    assert planning.runs_needed("paired", 1e-9, 1.0) is None
    assert planning.runs_needed("two-sample", 1.0, 1e-3) == 2
    with pytest.raises(ValueError):
        planning.runs_needed("paired", 0.0, 1.0)


@pytest.mark.parametrize(
    "runs, limits",
    [
        # Lan and DeMets' limits for O'Brien and Fleming's spending, two-sided 0.05 (one-sided 0.025)
        ((5, 10, 15, 20, 25), (4.877, 3.357, 2.680, 2.290, 2.031)),
        ((10, 20), (2.963, 1.969)),
        ((10,), (1.960,)),
    ],
)
def test_the_limits_are_those_of_the_tables(runs: tuple[int, ...], limits: tuple[float, ...]) -> None:
    found = planning.looks(runs, alpha=0.025)
    assert [look.z for look in found] == pytest.approx(limits, abs=1e-3)
    assert found[-1].spent == pytest.approx(0.025)


@pytest.mark.parametrize("runs", [(), (4, 4), (8, 4), (1, 4)])
def test_looks_must_ascend(runs: tuple[int, ...]) -> None:
    with pytest.raises(ValueError):
        planning.looks(runs)


def test_looking_as_planned_is_wrong_as_rarely_as_it_says() -> None:
    # no difference at all, 20,000 studies: how many claim one? With and without the plan.
    numbers = np.random.default_rng(11)
    plan = planning.looks((4, 8, 12), alpha=0.05)
    baseline, variant = numbers.normal(size=(2, 20_000, 12))
    claimed = np.zeros(20_000, dtype=bool)
    peeked = np.zeros(20_000, dtype=bool)
    for look in plan:
        found = stats.ttest_ind(
            baseline[:, : look.runs], variant[:, : look.runs], axis=1, equal_var=False, alternative="greater"
        )
        claimed |= found.pvalue < look.level
        peeked |= found.pvalue < 0.05
    assert 0.04 < claimed.mean() < 0.054  # 0.05, with three deviations of chance above
    assert peeked.mean() > 0.08  # what looking three times at the full level would have claimed


@pytest.mark.parametrize("n", [2, 3, 4, 10])
@pytest.mark.parametrize("kind", planning.KINDS)
def test_the_power_is_what_chance_gives(kind: str, n: int) -> None:
    # of the tests that `compare` makes: Welch's needs a larger t than Student's when the runs are few
    numbers = np.random.default_rng(3)
    baseline, variant = numbers.normal(size=(2, 40_000, n))
    gain = 6 / n**0.5
    if kind == "two-sample":
        p = stats.ttest_ind(baseline + gain, variant, axis=1, equal_var=False, alternative="greater").pvalue
    else:
        p = stats.ttest_1samp(baseline + gain, 0, axis=1, alternative="greater").pvalue
    share = planning.power(kind, n, gain)
    assert (p < 0.01).mean() == pytest.approx(share, abs=4 * (share * (1 - share) / 40_000) ** 0.5)
