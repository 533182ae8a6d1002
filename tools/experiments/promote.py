"""Which variants go on to the next stage: rules that are written down before the runs, applied without looking away.

From A (screening) to B (validation):
  1. complete   every planned run has ended; a variant half of whose runs failed is out; so is one that trained longer
                or shorter than the baseline.
  2. mean       its mean final validation loss is below the baseline's.
  3. order      the lowest mean first.
  4. spread     a standard deviation over 3 times the stage's median one sets it behind the steady ones.
  5. trend      a gain over the baseline that has shrunk to less than half since the middle of the runs likewise.
  The first one goes on; the second as well when the two means differ by less than their standard error (--advance 2).
From B (validation) to C (full):
  1. complete   as above.
  2. mean       below the baseline's at this stage.
  3. trend      all its runs but at most one end below the baseline's mean.
  4. interval   its 95% interval and the baseline's overlap by at most half of the narrower one.
  What fails here is replaced by the next of stage A, once: one pivot. After that the study ends.
Stages are never compared with each other, so the baseline goes along to every stage; where it is not, nothing is
decided and `--run` adds it. Only numbers that somebody typed can stand in for it (--typed-baseline MEAN,STD, the
cheaper plan; stage A takes baseline_val_loss and baseline_std of the configurations too): the verdict then says so.
"""

import statistics as exact
from dataclasses import dataclass, field

from nanogpt.common.errors import UserError
from tools.experiments.study import Result

Typed = tuple[float, float | None]  # a baseline's mean and standard deviation that somebody wrote down

UNSTEADY = 3.0  # times the median spread
SHRUNK = 0.5  # of the gain in the middle of the run
OVERLAP = 0.5  # of the narrower interval
PIVOTS = 1
GAIN = "trend of the gain"
SET_BACK = ("spread", GAIN)  # rules of stage A that throw nobody out
TYPED = "(against typed numbers, not evidence: no baseline ran at this stage)"
NEXT = {"A": "B", "B": "C"}


@dataclass
class Finding:
    """One variant under the rules: `reasons` are (rule, sentence, passed)."""

    result: Result
    reasons: list[tuple[str, str, bool]] = field(default_factory=list)
    mean: float | None = None
    std: float | None = None
    set_back: bool = False

    @property
    def passed(self) -> bool:
        """Whether no rule threw it out (being set back is no throwing out)."""
        return all(ok for rule, _, ok in self.reasons if rule not in SET_BACK)

    def add(self, rule: str, text: str, ok: bool) -> None:
        """Note what a rule says."""
        self.reasons.append((rule, text, ok))


@dataclass
class Decision:
    """What the rules say: `advance` are the variants (Result.variant) for stage `to`, the baseline not among them."""

    stage: str
    to: str
    findings: list[Finding] = field(default_factory=list)  # in order of rank
    advance: list[str] = field(default_factory=list)
    baseline: Result | None = None
    verdict: str = ""
    complete: bool = True  # False: runs are missing, so nothing is decided yet
    pivots_used: int = 0
    with_baseline: bool = False  # the baseline belongs to stage `to`, and no stage here tells which one it is
    could_be_typed: Typed | None = (
        None  # what the configurations state, where the missing baseline is asked for
    )

    def passes(self, letter: str, variant: str) -> bool:
        """Whether `variant` goes on to the stage `letter`."""
        return self.to == letter and variant in self.advance

    def reason_for(self, variant: str) -> str:
        """Why a variant does not go on, in a sentence."""
        for finding in self.findings:
            if finding.result.variant == variant:
                failed = [text for rule, text, ok in finding.reasons if not ok]
                return failed[0] if failed else "another variant ranks before it"
        if self.baseline is not None and self.baseline.variant == variant:
            return "it is the baseline"
        return "it was not run at the stage before"


def decide(results: list[Result], stage: str = "", most: int = 1, typed: Typed | None = None) -> Decision:
    """Apply the rules to the newest stage in `results` (or to `stage`). The baseline's key is in `advance` too.

    `typed` stands in for a baseline that did not run at this stage, and keeps it from the next one.
    """
    letters = sorted({result.letter for result in results if result.letter in NEXT})
    stage = stage or (letters[-1] if letters else "")
    if stage not in NEXT:
        return Decision(stage, "", verdict="there is no stage A or B here, so nothing is to be promoted")
    here = [result for result in results if result.letter == stage]
    decision = Decision(stage, NEXT[stage], baseline=next((r for r in here if r.baseline), None))
    variants = [result for result in here if not result.baseline]
    if not variants:
        decision.verdict = f"stage {stage} has no variant yet"
        return decision
    numbers = typed or (stated(here) if stage == "A" else None)
    reference = _reference(decision.baseline, numbers)
    steady = _median_spread(here)
    judge = _judge_a if stage == "A" else _judge_b
    decision.findings = [judge(result, decision.baseline, reference, steady) for result in variants]
    for finding in decision.findings:
        _same_length(finding, decision.baseline)
    decision.findings.sort(key=_rank)
    if reference is None:
        _without_baseline(decision, results)
        decision.could_be_typed = stated(here) if decision.baseline is None else None
        return decision
    if stage == "A":
        _advance_a(decision, most)
    else:
        _advance_b(decision, results)
    if reference[2] == 0:
        decision.verdict += " " + TYPED
    if decision.advance and not typed:
        known = _baseline_of(results)
        decision.advance += [known] if known else []
        decision.with_baseline = not known
    return decision


def stated(here: list[Result]) -> Typed | None:
    """What the configurations of a stage say about a baseline that was not run."""
    found = ((r.baseline_val_loss, r.baseline_std) for r in here if r.baseline_val_loss is not None)
    return next(found, None)


def typed_numbers(text: str) -> Typed:
    """A type for --typed-baseline: `3.30` or `3.30,0.02`, a mean loss and a standard deviation. UserError else."""
    try:
        mean, *rest = [float(part) for part in text.split(",")]
    except ValueError:
        mean, rest = -1.0, []
    if not 0 < mean <= 1000 or len(rest) > 1 or not all(0 <= std <= 1000 for std in rest):
        raise UserError(
            f"--typed-baseline={text[:60]!r}: expected the baseline's mean loss and its spread, as in 3.30,0.02"
        )
    return mean, rest[0] if rest else None


def _baseline_of(results: list[Result]) -> str | None:
    """The baseline's key, from any stage that has one."""
    return next((result.variant for result in results if result.baseline), None)


def _without_baseline(decision: Decision, results: list[Result]) -> None:
    """Nothing is decided: the baseline has to run at this stage first."""
    stage, decision.complete = decision.stage, False
    if decision.baseline is None:
        known = _baseline_of(results)
        decision.to, decision.advance, decision.with_baseline = stage, [known] if known else [], not known
        decision.verdict = (
            f"stage {stage} has no baseline, and stages are never compared with each other: it has to run here "
            "before anything is decided"
        )
    elif decision.baseline.missing:
        decision.verdict = f"stage {stage} is not complete, so nothing is decided yet"
    else:
        decision.verdict = (
            f"every run of stage {stage}'s baseline failed, so there is nothing to hold the variants against: "
            f"engaging experiment resume {decision.baseline.name} --retry-failed"
        )


def _rank(finding: Finding) -> tuple:
    mean = finding.mean if finding.mean is not None else float("inf")
    return (not finding.passed, finding.set_back, mean, finding.result.label)


def _reference(baseline: Result | None, typed: Typed | None) -> tuple[float, float | None, int] | None:
    """(mean, std, n) of the baseline: its runs, else typed numbers (n = 0) where none was run at all."""
    if baseline is None:
        return (*typed, 0) if typed else None
    if not baseline.losses:
        return None
    values = list(baseline.losses.values())
    return exact.fmean(values), exact.stdev(values) if len(values) > 1 else None, len(values)


def _median_spread(here: list[Result]) -> float | None:
    spreads = [exact.stdev(r.losses.values()) for r in here if len(r.losses) > 1]
    return exact.median(spreads) if spreads else None


def _begin(result: Result, reference: tuple[float, float | None, int] | None) -> Finding:
    """Rules 1 and 2, the same at both stages."""
    finding = Finding(result)
    values = list(result.losses.values())
    if values:
        finding.mean = exact.fmean(values)
        finding.std = exact.stdev(values) if len(values) > 1 else None
    done = f"{len(values)} of {result.planned} runs finished"
    if result.missing:
        finding.add("complete", f"{done}, {result.missing} still missing: engaging experiment resume", False)
    elif result.failed:
        ok = result.failed * 2 < result.planned
        finding.add("complete", f"{done}, {result.failed} failed and left out", ok)
    else:
        finding.add("complete", done, bool(values))
    if finding.mean is None:
        return finding
    if reference is None:
        finding.add("mean", "no baseline at this stage to hold it against", False)
    else:
        gain = reference[0] - finding.mean
        side = "below" if gain > 0 else "equal to" if gain == 0 else "not below"
        text = f"mean {finding.mean:.4f}, {side} the baseline's {reference[0]:.4f} ({gain:+.4f} gained)"
        finding.add("mean", text, gain > 0)
    return finding


def _same_length(finding: Finding, baseline: Result | None) -> None:
    """Rule 1: losses after more steps, or larger ones, than the baseline's are not held against it."""
    mine = finding.result
    if baseline is not None and mine.kin == baseline.kin and mine.work and baseline.work != mine.work:
        share = mine.work / baseline.work if baseline.work else float("inf")
        finding.add("length", f"trained on {share:.3g} times the baseline's iterations x batch", False)


def _judge_a(result: Result, baseline: Result | None, reference, steady: float | None) -> Finding:
    finding = _begin(result, reference)
    if finding.std is not None and steady:
        unsteady = finding.std > UNSTEADY * steady
        text = f"std {finding.std:.4f}" + (
            f", over {UNSTEADY:g} times the median {steady:.4f}" if unsteady else ""
        )
        finding.add("spread", text, not unsteady)
        finding.set_back |= unsteady
    gains = _gains(result, baseline)
    if gains is not None:
        middle, end = gains
        shrinking = middle > 0 and end < SHRUNK * middle
        finding.add(GAIN, f"{middle:+.4f} in the middle of the run, {end:+.4f} at its end", not shrinking)
        finding.set_back |= shrinking
    return finding


def _judge_b(result: Result, baseline: Result | None, reference, steady: float | None) -> Finding:
    finding = _begin(result, reference)
    if finding.mean is None or reference is None:
        return finding
    values = list(result.losses.values())
    below = sum(value < reference[0] for value in values)
    finding.add(
        "trend", f"{below} of {len(values)} runs end below the baseline's mean", below >= len(values) - 1
    )
    overlap = _overlap(values, baseline, reference)
    if overlap is None:
        finding.add("interval", "one run has no interval: at least 2 runs on each side are needed", False)
    else:
        text = f"its 95% interval overlaps {overlap:.0%} with the baseline's (at most {OVERLAP:.0%})"
        finding.add("interval", text, overlap <= OVERLAP)
    return finding


def _gains(result: Result, baseline: Result | None) -> tuple[float, float] | None:
    """The mean gain over the baseline at the middle step that both have, and at the last one."""
    if baseline is None or not result.curves or not baseline.curves:
        return None
    mine, theirs = _mean_curve(result), _mean_curve(baseline)
    steps = sorted(mine.keys() & theirs.keys())
    if len(steps) < 3:
        return None
    middle = min(steps, key=lambda step: abs(step - steps[-1] / 2))
    return theirs[middle] - mine[middle], theirs[steps[-1]] - mine[steps[-1]]


def _mean_curve(result: Result) -> dict[int, float]:
    """Step -> mean loss, at the steps that all runs have."""
    curves = [dict(curve) for curve in result.curves.values()]
    shared = set.intersection(*(set(curve) for curve in curves))
    return {step: exact.fmean(curve[step] for curve in curves) for step in shared}


def _overlap(values: list[float], baseline: Result | None, reference) -> float | None:
    """Shared length of the two 95% intervals of the mean, as part of the narrower one."""
    from tools.analysis import statistics

    mine = statistics.interval(values)
    if baseline is not None and len(baseline.losses) > 1:
        theirs = statistics.interval(list(baseline.losses.values()))
    elif reference[1] is not None:
        theirs = (reference[0] - 1.96 * reference[1], reference[0] + 1.96 * reference[1])
    else:
        theirs = None
    if mine is None or theirs is None:
        return None
    shared = min(mine[1], theirs[1]) - max(mine[0], theirs[0])
    narrower = min(mine[1] - mine[0], theirs[1] - theirs[0])
    if shared <= 0:
        return 0.0
    return shared / narrower if narrower > 0 else 1.0


def _advance_a(decision: Decision, most: int) -> None:
    good = [finding for finding in decision.findings if finding.passed]
    waiting = [f for f in decision.findings if f.result.missing]
    if waiting or (decision.baseline is not None and decision.baseline.missing):
        decision.verdict, decision.complete = "stage A is not complete, so nothing is decided yet", False
        return
    if not good:
        decision.verdict = "no variant beats the baseline at stage A: nothing goes on (that is a result, too)"
        return
    decision.advance = [good[0].result.variant]
    names = good[0].result.label
    if most > 1 and len(good) > 1 and not good[1].set_back and _close(good[0], good[1]):
        decision.advance.append(good[1].result.variant)
        names += f" and {good[1].result.label}, which is within their standard error,"
    decision.verdict = f"{names} {'go' if len(decision.advance) > 1 else 'goes'} on to stage B"


def _close(first: Finding, second: Finding) -> bool:
    if None in (first.std, second.std, first.mean, second.mean):
        return False
    errors = first.std**2 / len(first.result.losses) + second.std**2 / len(second.result.losses)
    return second.mean - first.mean < errors**0.5


def _advance_b(decision: Decision, results: list[Result]) -> None:
    waiting = [f for f in decision.findings if f.result.missing]
    if waiting or (decision.baseline is not None and decision.baseline.missing):
        decision.verdict, decision.complete = "stage B is not complete, so nothing is decided yet", False
        return
    good = [finding for finding in decision.findings if finding.passed]
    if good:
        decision.advance = [good[0].result.variant]
        decision.verdict = f"{good[0].result.label} goes on to stage C"
        return
    screened = (
        decide([r for r in results if r.letter == "A"], "A")
        if any(r.letter == "A" for r in results)
        else None
    )
    tried = {finding.result.variant for finding in decision.findings}
    decision.pivots_used = max(0, len(tried) - 1)
    rest = [f for f in screened.findings if f.passed and f.result.variant not in tried] if screened else []
    if decision.pivots_used < PIVOTS and rest:
        decision.to = "B"
        decision.advance = [rest[0].result.variant]
        decision.verdict = (
            f"stage B did not confirm it: the one pivot goes to {rest[0].result.label}, next at stage A"
        )
    elif decision.pivots_used >= PIVOTS:
        decision.verdict = "stage B confirmed neither choice and the one pivot is used: the study ends here"
    else:
        decision.verdict = (
            "stage B did not confirm it, and stage A has no other variant that passed: it ends here"
        )


# ---- what it saved, and whether the cheap stages told the truth ------------------------------------------------------


def rank_correlation(results: list[Result], first: str, second: str) -> tuple[int, float | None] | None:
    """(variants, Spearman's rho) of the mean losses of two stages; rho is None under 3 variants, None without 2."""
    means = {
        letter: {
            r.variant: exact.fmean(r.losses.values()) for r in results if r.letter == letter and r.losses
        }
        for letter in (first, second)
    }
    both = sorted(means[first].keys() & means[second].keys())
    if len(both) < 2:
        return None
    if len(both) == 2:
        return 2, None
    from scipy import stats

    rho = stats.spearmanr([means[first][v] for v in both], [means[second][v] for v in both]).statistic
    return len(both), float(rho)
