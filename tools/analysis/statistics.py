"""The tests behind every claim, each one a few lines of scipy: losses in nats a token, times in seconds.

Track 1 (time to a loss):   p < 0.01 in a one-sided one-sample t-test of the losses against the target.
Track 3 (steps to a loss):  (target - mean) * sqrt(n) >= 0.004; against an older result the pairwise formula.
Two variants:               Welch's t-test, or the paired t-test where the runs were interleaved.

A function gets numbers and returns numbers and a plain answer; what it cannot answer (one seed has no spread)
is None, never a guess. The words around them are written by `compare` and `analyze`.
"""

import math
import statistics as exact
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

TARGET = 3.28  # nats a token on FineWeb's validation set, tracks 1 and 3
ALPHA = 0.01  # track 1's level, and the level of every claim here
TRACK3_MARGIN = 0.004  # nats: about p < 0.001 with TRACK3_SIGMA
TRACK3_SIGMA = 0.0013  # the spread over seeds that track 3's rule assumes
TRACK3_LOSS_PER_STEP = 0.0045 / 100  # what a saved step is worth in the pairwise formula
ROUNDING = 1e-9  # losses are logged with 4 to 6 digits; a sum of them must not miss a limit by the last bit


@dataclass(frozen=True)
class OneSample:
    """Losses against a target: does the mean lie below it? `p` is None where one value has no spread."""

    n: int
    mean: float
    sd: float | None
    target: float
    t: float | None
    p: float | None
    passed: bool


@dataclass(frozen=True)
class Track3:
    """The rule of the contest that counts steps. `reason` says why it cannot be applied, else it is empty."""

    n: int
    value: float | None  # (target - mean) * sqrt(n), or the pairwise formula; to be >= TRACK3_MARGIN
    p: float | None  # one-sided, from the assumed spread
    passed: bool
    reason: str = ""


@dataclass(frozen=True)
class Difference:
    """`baseline - variant`, so that a positive difference is a gain (lower loss, less time).

    `p` is one-sided, for "the variant is lower". `interval` is the two-sided 95% confidence interval.
    """

    method: str  # "Welch" or "paired"
    n_baseline: int
    n_variant: int
    difference: float
    interval: tuple[float, float] | None
    t: float | None
    df: float | None
    p: float | None
    p_worse: float | None  # one-sided, for "the variant is higher"


def mean(values: Sequence[float]) -> float:
    """The mean, with the sum taken exactly."""
    return math.fsum(values) / len(values)


def sd(values: Sequence[float]) -> float | None:
    """The sample standard deviation (n - 1); None for fewer than two values."""
    return exact.stdev(values) if len(values) > 1 else None


def _flat(spread: float | None) -> bool:
    """Whether there is no spread to judge by: one value, or values that differ by rounding at most."""
    return spread is None or spread < ROUNDING


def interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float] | None:
    """Student's confidence interval of the mean; None for fewer than two values."""
    spread = sd(values)
    if spread is None:
        return None
    half = student(len(values) - 1, level) * spread / math.sqrt(len(values))
    return mean(values) - half, mean(values) + half


def student(df: int, level: float) -> float:
    """Student's t between whose negative and itself `level` of the distribution lies.

    The finite series for whole degrees of freedom (Abramowitz and Stegun, 26.7.3 and 26.7.4), solved by halving.
    Here without scipy, whose import takes longer than all that the runner does between two runs.
    """
    odd = df % 2

    def between(angle: float) -> float:
        cosine = math.cos(angle)
        term, total = (cosine if odd else 1.0), 0.0
        for k in range(2 + odd, df + 1, 2):
            total += term
            term *= cosine * cosine * (k - 1) / k
        total *= math.sin(angle)
        return 2 / math.pi * (angle + total) if odd else total

    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if between(middle) < level else (low, middle)
    return math.tan(low) * math.sqrt(df)


def track1(losses: Sequence[float], target: float = TARGET, alpha: float = ALPHA) -> OneSample:
    """Track 1's rule, `scipy.stats.ttest_1samp(losses, target, alternative="less").pvalue < alpha`."""
    spread = sd(losses)
    middle = mean(losses)
    if _flat(spread):
        return OneSample(len(losses), middle, spread, target, None, None, False)
    from scipy import stats

    found = stats.ttest_1samp(losses, target, alternative="less")
    t, p = float(found.statistic), float(found.pvalue)
    return OneSample(len(losses), middle, spread, target, t, p, p < alpha)


def track3(losses: Sequence[float], steps: Sequence[int], target: float = TARGET) -> Track3:
    """Track 3's rule: `(target - mean) * sqrt(n) >= 0.004`, every seed stopped at the same step."""
    if reason := _different_steps(steps):
        return Track3(len(losses), None, None, False, reason)
    return _against_margin(len(losses), (target - mean(losses)) * math.sqrt(len(losses)))


def track3_pairwise(
    old: Sequence[float], old_steps: Sequence[int], new: Sequence[float], new_steps: Sequence[int]
) -> Track3:
    """Track 3's rule against an older result.

    `(final_loss_diff + exp_stepbased_loss_diff) / sqrt(1/n1 + 1/n2) >= 0.004`: the losses' difference is old
    minus new, and each 100 steps saved count as 0.0045.
    """
    if reason := _different_steps(old_steps) or _different_steps(new_steps):
        return Track3(len(new), None, None, False, reason)
    saved = (old_steps[0] - new_steps[0]) * TRACK3_LOSS_PER_STEP
    value = (mean(old) - mean(new) + saved) / math.sqrt(1 / len(old) + 1 / len(new))
    return _against_margin(len(new), value)


def _different_steps(steps: Sequence[int]) -> str:
    found = sorted(set(steps))
    if len(found) < 2:
        return ""
    return (
        f"the runs stopped at different steps ({found[0]} ... {found[-1]}); the rule asks for the same step"
    )


def _against_margin(n: int, value: float) -> Track3:
    from scipy import stats

    return Track3(n, value, float(stats.norm.sf(value / TRACK3_SIGMA)), value >= TRACK3_MARGIN - ROUNDING)


def welch(baseline: Sequence[float], variant: Sequence[float]) -> Difference:
    """Welch's t-test of two independent samples; no p-value when one of them has a single value."""
    gain = mean(baseline) - mean(variant)
    spreads = sd(baseline), sd(variant)
    if None in spreads or all(_flat(spread) for spread in spreads):
        return Difference("Welch", len(baseline), len(variant), gain, None, None, None, None, None)
    from scipy import stats

    found = stats.ttest_ind(baseline, variant, equal_var=False, alternative="greater")
    both = stats.ttest_ind(baseline, variant, equal_var=False).confidence_interval(0.95)
    p = float(found.pvalue)
    return Difference(
        "Welch", len(baseline), len(variant), gain, (float(both.low), float(both.high)),
        float(found.statistic), float(found.df), p, 1 - p,
    )  # fmt: skip


def paired(baseline: Sequence[float], variant: Sequence[float]) -> Difference:
    """The paired t-test; `baseline[i]` and `variant[i]` ran side by side. ValueError for unequal lengths."""
    gains = [old - new for old, new in zip(baseline, variant, strict=True)]
    n, gain = len(gains), mean(gains)
    if _flat(sd(gains)):
        return Difference("paired", n, n, gain, None, None, None, None, None)
    from scipy import stats

    found = stats.ttest_rel(baseline, variant, alternative="greater")
    p = float(found.pvalue)
    return Difference(
        "paired", n, n, gain, interval(gains), float(found.statistic), float(found.df), p, 1 - p
    )


def holm(ps: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment: of `len(ps)` tests at once, the chance of one false claim stays below the level."""
    order = sorted(range(len(ps)), key=lambda at: ps[at])
    adjusted, largest = [0.0] * len(ps), 0.0
    for rank, at in enumerate(order):
        largest = max(largest, min(1.0, (len(ps) - rank) * ps[at]))
        adjusted[at] = largest
    return adjusted


def first_track3_step(curves: Sequence[Mapping[int, float]], target: float = TARGET) -> int | None:
    """The first step at which track 3's rule passes over all seeds: `curves` are each seed's {step: loss}.

    Only steps at which every seed was validated; None where the rule passes at none of them.
    """
    common = set.intersection(*(set(curve) for curve in curves)) if curves else set()
    for step in sorted(common):
        if track3([curve[step] for curve in curves], [step] * len(curves), target).passed:
            return step
    return None


def summary(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The `statistics` of an experiment's summary.json, from the rows of its results.jsonl.

    {"n_runs", "successful_runs", "val_loss": {"mean", "std", "min", "max", "median", "ci_95": [low, high]},
    "time": {"mean", "std", "total"}, "excluded": [{"run_id", "seed", "reason"}]}: seconds, sample deviations.
    A row counts as successful when `success` is true and `final_val_loss` is a finite number; every other row is
    in `excluded` with its reason. What too few runs cannot give is None (null in JSON). Times are those of the
    successful runs.
    """
    losses, times, excluded = [], [], []
    for row in results:
        reason = why_excluded(row)
        if reason:
            excluded.append({"run_id": row.get("run_id"), "seed": row.get("seed"), "reason": reason})
            continue
        losses.append(float(row["final_val_loss"]))
        if is_number(row.get("time_seconds")):
            times.append(float(row["time_seconds"]))
    return {
        "n_runs": len(results),
        "successful_runs": len(losses),
        "val_loss": describe(losses),
        "time": {
            "mean": mean(times) if times else None,
            "std": sd(times),
            "total": math.fsum(times) if times else None,
        },
        "excluded": excluded,
    }


def why_excluded(row: Mapping[str, Any]) -> str:
    """Why a row of results.jsonl does not count, or "" when it does."""
    if row.get("success") is not True:
        said = row.get("reason") or row.get("error")
        return str(said) if said else "the run did not succeed"
    if not is_number(row.get("final_val_loss")):
        return "no finite validation loss"
    return ""


def is_number(value: object) -> bool:
    """Whether `value` is a finite int or float; True and False are not."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < float("inf")


def describe(values: Sequence[float]) -> dict[str, Any]:
    """mean, std, min, max, median and ci_95 of `values`; None for what too few values cannot give."""
    if not values:
        return dict.fromkeys(("mean", "std", "min", "max", "median", "ci_95"))
    limits = interval(values)
    return {
        "mean": mean(values),
        "std": sd(values),
        "min": min(values),
        "max": max(values),
        "median": exact.median(values),
        "ci_95": list(limits) if limits else None,
    }
