"""The rules of promotion, each with a study that it decides."""

import numpy as np
import pytest

from nanogpt.common.errors import UserError
from tools.analysis import statistics
from tools.experiments import promote
from tools.experiments.study import Result


def result(label, letter, losses, planned=None, curve=None, **values) -> Result:
    """Losses of seeds 42, 43, ...; `curve`: the mean loss at steps 0, 50 and 100."""
    by_seed = {42 + index: loss for index, loss in enumerate(losses)}
    curves = {seed: [(0, 9.0), *zip((50, 100), curve, strict=True)] for seed in by_seed} if curve else {}
    planned = len(losses) if planned is None else planned
    missing = values.pop("missing", 0)
    return Result(
        label, label, letter, label == "baseline", planned, by_seed, curves, missing=missing, gpus=1,
        seconds=[100.0] * len(losses), **values,
    )  # fmt: skip


BASE = result("baseline", "A", [3.30, 3.31], curve=(4.0, 3.305))


def test_the_lowest_mean_goes_on_and_the_baseline_with_it():
    found = promote.decide([BASE, result("palm", "A", [3.28, 3.29]), result("depth", "A", [3.27, 3.275])])
    assert (found.stage, found.to) == ("A", "B")
    assert found.advance == ["depth", "baseline"] and "depth goes on to stage B" in found.verdict
    assert "ranks before it" in found.reason_for("palm")


def test_a_variant_that_trained_longer_proves_nothing():
    base = result("baseline", "A", [3.30, 3.31], work=1000.0)
    longer = result("longer", "A", [3.10, 3.11], work=1500.0)
    found = promote.decide([base, longer, result("palm", "A", [3.28, 3.29], work=1000.0)])
    assert found.advance[0] == "palm"
    assert found.reason_for("longer") == "trained on 1.5 times the baseline's iterations x batch"
    other = result("script", "A", [3.10, 3.11], work=7.0, kin=("mine.py",))  # nobody knows what its steps are
    assert promote.decide([base, other]).advance[0] == "script"


def test_nothing_goes_on_when_no_variant_beats_the_baseline():
    found = promote.decide([BASE, result("palm", "A", [3.32, 3.33])])
    assert found.advance == [] and "no variant beats the baseline" in found.verdict
    assert "not below the baseline's 3.3050" in found.reason_for("palm")


def test_nothing_is_decided_while_runs_are_missing():
    found = promote.decide([BASE, result("palm", "A", [3.28], planned=2, missing=1)])
    assert found.advance == [] and "not complete" in found.verdict


def test_half_of_the_runs_failed_is_too_many_and_one_of_three_is_not():
    flaky = result("flaky", "A", [3.1, 3.11], planned=4, failed=2)
    firm = result("firm", "A", [3.2, 3.21], planned=3, failed=1)
    found = promote.decide([BASE, flaky, firm])
    assert found.advance[0] == "firm" and "2 failed and left out" in found.reason_for("flaky")


def test_a_wide_spread_sets_a_variant_behind_the_steady_ones():
    wild = result("wild", "A", [3.10, 3.30])
    calm = result("calm", "A", [3.25, 3.252])
    found = promote.decide([BASE, wild, calm, result("other", "A", [3.29, 3.30])])
    assert found.advance[0] == "calm" and found.findings[1].result.label == "other"
    assert "times the median" in found.reason_for("wild")


def test_a_gain_that_shrinks_sets_it_behind():
    early = result("early", "A", [3.27, 3.28], curve=(3.5, 3.275))
    steady = result("steady", "A", [3.285, 3.29], curve=(3.98, 3.2875))
    found = promote.decide([BASE, early, steady])
    assert found.advance[0] == "steady"
    assert "+0.5000 in the middle of the run, +0.0300 at its end" in found.reason_for("early")


def test_two_go_on_only_when_asked_and_within_their_standard_error():
    near = [BASE, result("one", "A", [3.27, 3.29]), result("two", "A", [3.275, 3.29])]
    assert promote.decide(near).advance == ["one", "baseline"]
    assert promote.decide(near, most=2).advance == ["one", "two", "baseline"]
    far = [BASE, result("one", "A", [3.20, 3.201]), result("two", "A", [3.29, 3.30])]
    assert promote.decide(far, most=2).advance == ["one", "baseline"]


B_BASE = result("baseline", "B", [3.300, 3.302, 3.298])


def test_stage_b_confirms():
    found = promote.decide([BASE, B_BASE, result("palm", "B", [3.280, 3.281, 3.279])])
    assert (found.stage, found.to, found.advance) == ("B", "C", ["palm", "baseline"])


@pytest.mark.parametrize(
    ("losses", "rule", "why"),
    [
        ([3.31, 3.32, 3.30], "mean", "not below"),
        ([3.20, 3.31, 3.32], "trend", "1 of 3 runs end below"),
        ([3.2995, 3.3015, 3.2975], "interval", "overlaps"),
        ([3.28], "interval", "one run has no interval"),
    ],
)
def test_what_stage_b_does_not_confirm(losses, rule, why):
    found = promote.decide([B_BASE, result("palm", "B", losses)])
    assert found.advance == []
    assert [text for name, text, ok in found.findings[0].reasons if not ok and name == rule and why in text]


def test_one_pivot_to_the_next_of_stage_a_and_no_second():
    a = [
        BASE,
        result("palm", "A", [3.27, 3.28]),
        result("depth", "A", [3.28, 3.29]),
        result("curr", "A", [3.29, 3.30]),
    ]
    failed = result("palm", "B", [3.31, 3.32, 3.33])
    found = promote.decide([*a, B_BASE, failed])
    assert (found.to, found.advance) == (
        "B",
        ["depth", "baseline"],
    ) and "the one pivot goes to depth" in found.verdict
    again = promote.decide([*a, B_BASE, failed, result("depth", "B", [3.31, 3.32, 3.33])])
    assert again.advance == [] and "the one pivot is used" in again.verdict


PALM_B = result("palm", "B", [3.280, 3.281, 3.279], baseline_val_loss=3.30, baseline_std=0.002)


def test_a_stage_without_a_baseline_gets_it_before_anything_is_decided():
    for stage_a in ([BASE, result("palm", "A", [3.28, 3.29]), result("curr", "A", [3.29, 3.30])], []):
        found = promote.decide([*stage_a, PALM_B])
        assert (found.to, found.advance, found.with_baseline) == (
            "B",
            ["baseline"] if stage_a else [],
            not stage_a,
        )
        assert (
            not found.complete and "stage B has no baseline" in found.verdict
        )  # and no pivot is spent on it
        assert found.could_be_typed == (3.30, 0.002)
    assert promote.decide([result("palm", "A", [3.28, 3.29])]).to == "A"


def test_typed_numbers_stand_in_when_asked_and_no_baseline_is_added():
    found = promote.decide([BASE, PALM_B], typed=(3.30, 0.002))
    assert found.advance == ["palm"] and found.verdict.endswith(promote.TYPED) and not found.with_baseline
    worse = promote.decide([BASE, PALM_B], typed=(3.27, None))
    assert worse.advance == [] and worse.verdict.endswith(promote.TYPED)
    ran = promote.decide([B_BASE, PALM_B], typed=(3.27, None))
    assert ran.advance == ["palm"] and promote.TYPED not in ran.verdict  # runs are better than numbers


def test_the_baseline_goes_to_b_although_stage_a_had_none():
    found = promote.decide([result("palm", "A", [3.28, 3.29], baseline_val_loss=3.30)])
    assert (found.to, found.advance, found.with_baseline) == ("B", ["palm"], True)


def test_a_baseline_whose_runs_all_failed_condemns_nobody():
    lost = result("baseline", "B", [], planned=3, failed=3)
    a = [BASE, result("palm", "A", [3.28, 3.29]), result("curr", "A", [3.29, 3.30])]
    found = promote.decide([*a, lost, PALM_B])
    assert found.advance == [] and "--retry-failed" in found.verdict and not found.complete


@pytest.mark.parametrize("text", ["", "low", "3.3,", "nan", "3.3,0.1,2", "-1", "3.3,-1", "1e400", "3.3,nan"])
def test_typed_numbers_are_numbers(text):
    with pytest.raises(UserError, match=r"--typed-baseline=.*as in 3\.30"):
        promote.typed_numbers(text)


def test_rank_correlation():
    def stage(letter, means):
        return [result(name, letter, [mean]) for name, mean in zip("abcd", means, strict=False)]

    same = promote.rank_correlation(stage("A", [1, 2, 3, 4]) + stage("B", [2, 3, 4, 5]), "A", "B")
    turned = promote.rank_correlation(stage("A", [1, 2, 3, 4]) + stage("B", [5, 4, 3, 2]), "A", "B")
    assert same == (4, pytest.approx(1)) and turned == (4, pytest.approx(-1))
    assert promote.rank_correlation(stage("A", [1, 2]) + stage("B", [2, 3]), "A", "B") == (2, None)
    assert promote.rank_correlation(stage("A", [1, 2]), "A", "B") is None


def test_no_stage_is_said():
    assert "no stage A or B" in promote.decide([result("palm", "", [3.2])]).verdict
    assert "no variant yet" in promote.decide([BASE]).verdict


def test_a_verdict_against_typed_numbers_is_marked_and_one_against_runs_is_not():
    stated = result("palm", "A", [3.28, 3.29], baseline_val_loss=3.30, baseline_std=0.02)
    assert promote.decide([stated]).verdict.endswith(promote.TYPED)
    assert promote.TYPED not in promote.decide([stated, BASE]).verdict


def study_of_three_stages(numbers, gain: float, stays: float) -> tuple[bool, bool]:
    """(stage C is reached, it claims) for three variants, one of which gains `gain` deviations over seeds.

    `stays`: how much of a seed's luck (its variance) is the same at all stages.
    """
    luck = numbers.standard_normal((4, 5))

    def stage(letter: str, seeds: int) -> list[Result]:
        noise = stays**0.5 * luck[:, :seeds] + (1 - stays) ** 0.5 * numbers.standard_normal((4, seeds))
        noise[1] -= gain
        names = ("baseline", "palm", "depth", "curriculum")
        return [
            result(name, letter, [3.3 + 0.002 * float(x) for x in row])
            for name, row in zip(names, noise, strict=True)
        ]

    first, second, third = stage("A", 2), stage("B", 3), stage("C", 5)
    known, there = list(first), {one.variant: one for one in second}
    for _ in range(2):  # the second time for the pivot
        found = promote.decide(known)
        chosen = [name for name in found.advance if name != "baseline"]
        if not chosen or found.to == "C":
            break
        known += [there[name] for name in ("baseline", *chosen) if there[name] not in known]
    found = promote.decide(known)
    chosen = [name for name in found.advance if name != "baseline"]
    if found.to != "C" or not chosen:
        return False, False
    last = {one.variant: list(one.losses.values()) for one in third}
    return True, statistics.welch(last["baseline"], last[chosen[0]]).p < statistics.ALPHA


@pytest.mark.parametrize(
    ("gain", "stays", "reached", "claimed"),
    [
        (0, 0.0, (0.0, 0.04), (0.0, 0.005)),
        (0, 1.0, (0.0, 0.05), (0.0, 0.01)),  # with luck that stays with its seed through all stages
        (2, 0.0, (0.20, 0.35), (0.10, 0.22)),
        (4, 0.0, (0.72, 0.86), (0.71, 0.85)),
    ],
)
def test_what_the_three_stages_let_through(gain, stays, reached, claimed):
    """The figures of the guide: simulated studies, equal spread everywhere."""
    numbers = np.random.default_rng(17)
    found = np.array([study_of_three_stages(numbers, gain, stays) for _ in range(400)]).mean(axis=0)
    assert reached[0] <= found[0] <= reached[1] and claimed[0] <= found[1] <= claimed[1], found
