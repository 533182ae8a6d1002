"""How many seeds a question needs, and when it is allowed to stop early.

The rule for stopping early (Lan and DeMets, Biometrika 1983, with O'Brien and Fleming's spending of the level):

1. Before the first run, write down the numbers of runs a side at which you will look, say 4, 8 and 12.
2. Look at no other time. At look k the p-value must be below that look's level, not below 0.01: the levels are so
   small early on that all looks together are wrong about as often as one look at 0.01 (simulated: 0.0089 to 0.0105
   where the first look has three runs; 0.0117 for pairs looked at with 2, 3, 4, 5 and 6 of them).
3. Below the level: claim, and stop. At the last look: claim or not, and stop.
4. Giving up early without a claim is allowed at any time; it costs only the chance.

Adding seeds until p < 0.01 without such a plan is not evidence: with enough looks it succeeds by luck.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tools.analysis.statistics import ALPHA

POWER = 0.9
MOST_RUNS = 10_000
SHARES = 64  # equally likely ones, to average over
NODES = 256  # of the integration over the values with which a study goes on
KINDS = ("one-sample", "two-sample", "paired")


@dataclass(frozen=True)
class Look:
    """One planned look: claim when the one-sided p-value is below `level`."""

    runs: int
    z: float
    level: float
    spent: float  # of the whole level, up to here


def power(kind: str, n: int, effect: float, alpha: float = ALPHA) -> float:
    """The chance that a one-sided t-test at `alpha` finds a true difference of `effect` standard deviations.

    `n` runs (a side for "two-sample", which is Welch's test; pairs for "paired", where `effect` is in deviations of
    the differences).
    """
    from scipy import stats

    if n < 2:
        return 0.0
    shift = effect * math.sqrt(n / 2 if kind == "two-sample" else n)
    if shift > 37:  # scipy's noncentral t gives NaN out there; the power is 1 long before
        return 1.0
    if kind != "two-sample":
        return float(stats.nct.sf(stats.t.ppf(1 - alpha, n - 1), n - 1, shift))
    # With as many runs a side Welch's t is Student's; its degrees of freedom follow from how unequal the two
    # samples' variances come out: the share of one in their sum is Beta, and t does not depend on it.
    share = stats.beta.ppf((np.arange(SHARES) + 0.5) / SHARES, (n - 1) / 2, (n - 1) / 2)
    limit = stats.t.ppf(1 - alpha, (n - 1) / (share**2 + (1 - share) ** 2))
    return float(np.mean(stats.nct.sf(limit, 2 * n - 2, shift)))


def runs_needed(
    kind: str, difference: float, sd: float, alpha: float = ALPHA, wanted: float = POWER
) -> int | None:
    """The fewest runs (a side, or pairs) that find `difference` with probability `wanted`; None beyond MOST_RUNS.

    ValueError for a difference or a deviation that is not positive.
    """
    if difference <= 0 or sd <= 0 or kind not in KINDS:
        raise ValueError(f"{kind}: a positive difference and deviation are needed")
    effect = difference / sd
    low, high = 1, 2
    while power(kind, high, effect, alpha) < wanted:
        low, high = high, high * 2
        if high > MOST_RUNS:
            return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if power(kind, middle, effect, alpha) >= wanted else (middle, high)
    return high


def smallest_difference(
    kind: str, n: int, sd: float, alpha: float = ALPHA, wanted: float = POWER
) -> float | None:
    """The difference that `n` runs (a side) find with probability `wanted`; None for fewer than two runs."""
    return None if n < 2 else _smallest_effect(kind, n, alpha, wanted) * sd


@functools.cache
def _smallest_effect(kind: str, n: int, alpha: float, wanted: float) -> float:
    """The same in standard deviations. Kept: the comparisons of a study have few numbers of runs among them."""
    low, high = 0.0, 1.0
    while power(kind, n, high, alpha) < wanted:
        high *= 2
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (low, middle) if power(kind, n, middle, alpha) >= wanted else (middle, high)
    return high


def spending(share: float, alpha: float = ALPHA) -> float:
    """O'Brien and Fleming's spending: how much of the one-sided level may be used up at this share of all runs."""
    from scipy import stats

    return 0.0 if share <= 0 else float(2 * stats.norm.sf(stats.norm.isf(alpha / 2) / math.sqrt(share)))


def looks(runs: Sequence[int], alpha: float = ALPHA) -> list[Look]:
    """The levels of planned looks at these numbers of runs, which must ascend. ValueError when they do not."""
    if not runs or list(runs) != sorted(set(runs)) or runs[0] < 2:
        raise ValueError("the looks must be ascending numbers of runs, the first at least 2")
    from scipy import optimize, stats

    shares = [count / runs[-1] for count in runs]
    found: list[Look] = []
    spent, places, density = 0.0, np.zeros(1), np.ones(1)  # the study begins at 0 for certain
    for index, (count, share) in enumerate(zip(runs, shares, strict=True)):
        budget = spending(share, alpha) - spent
        width = math.sqrt(share - (shares[index - 1] if index else 0.0))

        def crossing(limit: float, places=places, density=density, width=width, budget=budget) -> float:
            return float(np.sum(density * stats.norm.sf((limit - places) / width))) - budget

        high = 60.0
        limit = high if crossing(high) > 0 else float(optimize.brentq(crossing, -10.0, high, xtol=1e-12))
        spent = spending(share, alpha)
        z = limit / math.sqrt(share)
        found.append(Look(count, z, float(stats.norm.sf(z)), spent))
        # where the studies that go on are now: a density over the sums below the limit, by Gauss and Legendre
        nodes, weights = np.polynomial.legendre.leggauss(NODES)
        low = -10.0 * math.sqrt(share)
        now = low + (nodes + 1) / 2 * (limit - low)
        arrival = stats.norm.pdf((now[:, None] - places[None, :]) / width) / width
        places, density = now, (arrival @ density) * weights * (limit - low) / 2
    return found
