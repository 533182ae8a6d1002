"""The statistics against answers known from elsewhere: the contests' own rules, tables, worked examples."""

import math
import subprocess
import sys

import pytest

from tools.analysis import statistics


def test_the_summary_has_the_form_that_users_know() -> None:
    rows = [
        {"run_id": 0, "seed": 42, "final_val_loss": 3.275, "time_seconds": 420.5, "success": True},
        {"run_id": 1, "seed": 43, "final_val_loss": 3.282, "time_seconds": 418.2, "success": True},
        {"run_id": 2, "seed": 44, "final_val_loss": None, "time_seconds": 3.0, "success": False},
        {"run_id": 3, "seed": 45, "final_val_loss": float("nan"), "time_seconds": 3.0, "success": True},
    ]
    found = statistics.summary(rows)
    assert (found["n_runs"], found["successful_runs"]) == (4, 2)
    loss = found["val_loss"]
    assert list(loss) == ["mean", "std", "min", "max", "median", "ci_95"]
    assert loss["mean"] == pytest.approx(3.2785) and loss["median"] == pytest.approx(3.2785)
    assert loss["std"] == pytest.approx(0.007 / math.sqrt(2))
    # Student's t with one degree of freedom: 12.7062 standard errors on each side
    assert loss["ci_95"] == pytest.approx([3.2785 - 12.7062 * 0.0035, 3.2785 + 12.7062 * 0.0035], abs=1e-6)
    assert found["time"] == {"mean": 419.35, "std": pytest.approx(2.3 / math.sqrt(2)), "total": 838.7}
    assert [row["run_id"] for row in found["excluded"]] == [2, 3]
    assert all(row["reason"] for row in found["excluded"])


@pytest.mark.parametrize("rows", [[], [{"run_id": 0, "seed": 1, "success": False}]])
def test_a_summary_of_nothing_has_no_numbers(rows: list[dict]) -> None:
    found = statistics.summary(rows)
    assert found["successful_runs"] == 0 and set(found["val_loss"].values()) == {None}
    assert found["time"] == {"mean": None, "std": None, "total": None}


def test_one_run_has_no_spread() -> None:
    found = statistics.summary([{"run_id": 0, "seed": 1, "final_val_loss": 3.3, "success": True}])
    assert found["val_loss"]["mean"] == 3.3
    assert found["val_loss"]["std"] is None and found["val_loss"]["ci_95"] is None


@pytest.mark.parametrize("level", [0.5, 0.95, 0.99])
def test_students_t_is_scipys(level: float) -> None:
    from scipy import stats

    for df in (*range(1, 40), 99, 100, 999):
        assert statistics.student(df, level) == pytest.approx(stats.t.ppf((1 + level) / 2, df), rel=1e-11)


def test_the_summary_after_each_run_waits_for_no_scipy() -> None:
    # its import takes about a second, in every task of an array and while the GPUs are held
    code = (
        "import sys; from tools.analysis import statistics; "
        "rows = [{'success': True, 'final_val_loss': 3.0 + i, 'time_seconds': 1.0} for i in range(3)]; "
        "print(statistics.summary(rows)['val_loss']['ci_95'], 'scipy' in sys.modules, 'numpy' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("] False False\n")


def test_track_1_is_the_t_test_of_the_rules() -> None:
    # the rules' rule of thumb: with ten runs the mean must lie 0.89 deviations below the target
    losses = [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0]
    deviation = math.sqrt(82.5 / 9)
    for share, passes in ((0.885, False), (0.900, True)):
        found = statistics.track1(losses, target=4.5 + share * deviation)
        assert found.passed is passes and found.p == pytest.approx(0.01, abs=4e-4)


@pytest.mark.parametrize("n, below", [(4, 0.0032), (8, 0.0015), (13, 0.0010)])
def test_how_far_below_the_target_the_mean_must_be(n: int, below: float) -> None:
    # a deviation of 0.0014 over seeds, p < 0.01: Student's t by hand (4.541, 2.998, 2.681 at 3, 7, 12 degrees)
    values = [(-1) ** i for i in range(n // 2 * 2)] + [0] * (n % 2)
    scale = 0.0014 / statistics.sd(values)
    for shift, passes in ((0.94, False), (1.06, True)):
        losses = [3.28 - below * shift + scale * value for value in values]
        assert statistics.track1(losses).passed is passes


def test_track_1_asks_for_a_spread() -> None:
    for losses in ([3.0], [3.0, 3.0, 3.0]):
        found = statistics.track1(losses)
        assert (found.passed, found.p) == (False, None)


def test_track_3_is_the_rule_to_the_letter() -> None:
    assert statistics.track3([3.278] * 4, [3000] * 4).passed  # 0.002 * 2 is 0.004: just enough
    assert not statistics.track3([3.2781] * 4, [3000] * 4).passed
    assert statistics.track3([3.276], [3000]).passed and not statistics.track3([3.2761], [3000]).passed
    for n in range(1, 60):  # on the limit, rounding errors must not decide
        assert statistics.track3([round(3.28 - 0.004 / math.sqrt(n) - 5e-8, 7)] * n, [3000] * n).passed
    found = statistics.track3([3.276], [3000])
    assert found.p == pytest.approx(0.001046, abs=2e-6)  # 0.004 / 0.0013 = 3.077 deviations
    refused = statistics.track3([3.27, 3.27], [3000, 3010])
    assert not refused.passed and "3000 ... 3010" in refused.reason


def test_track_3_pairwise_counts_saved_steps() -> None:
    old, new = [3.279] * 4, [3.279] * 4
    # 100 steps saved are worth 0.0045; / sqrt(1/4 + 1/4)
    found = statistics.track3_pairwise(old, [3200] * 4, new, [3100] * 4)
    assert found.value == pytest.approx(0.0045 / math.sqrt(0.5)) and found.passed
    found = statistics.track3_pairwise(old, [3200] * 4, [3.2805] * 4, [3100] * 4)
    assert found.value == pytest.approx((0.0045 - 0.0015) / math.sqrt(0.5)) and found.passed
    assert not statistics.track3_pairwise(old, [3200] * 4, new, [3140] * 4).passed
    assert "same step" in statistics.track3_pairwise(old, [3200] * 4, new, [3100, 3110, 3100, 3100]).reason


# Student's and Welch's own worked examples, as they stand in textbooks and in R's documentation
SLEEP = (
    [0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0],
    [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4],
)


def test_welch_gives_the_known_answer() -> None:
    first, second = SLEEP
    found = statistics.welch(second, first)
    assert (found.t, found.df) == (pytest.approx(1.8608, abs=1e-4), pytest.approx(17.776, abs=1e-3))
    assert found.p == pytest.approx(0.07939 / 2, abs=1e-5) and found.p_worse == pytest.approx(
        1 - 0.07939 / 2, abs=1e-5
    )
    assert found.interval == pytest.approx((-0.2054832, 3.3654832), abs=1e-6)
    assert found.difference == pytest.approx(1.58)


def test_the_paired_test_gives_the_known_answer() -> None:
    first, second = SLEEP
    found = statistics.paired(second, first)
    assert (found.t, found.df) == (pytest.approx(4.0621, abs=1e-4), 9)
    assert found.p == pytest.approx(0.002833 / 2, abs=1e-6)
    assert found.interval == pytest.approx((0.7001142, 2.4598858), abs=1e-6)
    with pytest.raises(ValueError):
        statistics.paired([1.0, 2.0], [1.0])


def test_no_p_value_from_one_seed() -> None:
    for found in (statistics.welch([3.0], [2.0, 2.1]), statistics.paired([3.0], [2.0])):
        assert (found.p, found.interval) == (None, None) and found.difference > 0.9


def test_rounding_is_no_spread() -> None:
    old, new = [3.501, 3.504, 3.509], [3.401, 3.404, 3.409]  # every difference is 0.1, but for the last bit
    assert statistics.paired(old, new).p is None
    assert statistics.track1([3.1 + 1e-15, 3.1, 3.1]).p is None
    assert statistics.welch([3.1 + 1e-15, 3.1], [3.0, 3.0]).p is None


def test_holm_against_the_textbook() -> None:
    # Holm 1979; R: p.adjust(c(0.01, 0.04, 0.03, 0.005), "holm") is 0.03 0.06 0.06 0.02
    assert statistics.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert statistics.holm([0.6, 0.9]) == [1.0, 1.0] and statistics.holm([]) == []


def test_the_first_step_at_which_track_3_passes() -> None:
    curves = [
        {100: 3.290, 200: 3.281, 300: 3.277, 400: 3.276},
        {100: 3.288, 200: 3.279, 300: 3.277, 350: 3.2},
    ]
    # at 300: (3.28 - 3.277) * sqrt(2) = 0.00424; 350 and 400 are not every seed's
    assert statistics.first_track3_step(curves) == 300
    assert statistics.first_track3_step([{100: 3.279}, {100: 3.279}]) is None
    assert statistics.first_track3_step([]) is None
