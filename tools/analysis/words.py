"""Findings as sentences: the same words for the same numbers, in the terminal and on the page."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from tools.analysis import planning, statistics
from tools.analysis.statistics import ALPHA, Difference

if TYPE_CHECKING:
    from tools.analysis.findings import Comparison, GroupFinding

CONTEST_RANGE = 0.1  # nats around 3.28
# verdict: what heads the answer
VERDICTS = {
    "helped": "It helped.",
    "unclear": "No evidence either way.",
    "one seed": "One seed: an observation, not evidence.",
    "hurt": "It hurt.",
    "refused": "Not comparable.",
}


def number(value: float | None, digits: int = 4) -> str:
    """A number for people; a dash for what is not known."""
    return "-" if value is None else f"{value:.{digits}f}"


def seconds(value: float | None) -> str:
    """A time for people: 0.0194 s, 7.32 s, 419.5 s."""
    return "-" if value is None else f"{value:.3g} s" if value < 10 else f"{value:.1f} s"


def p_value(p: float | None) -> str:
    """A p-value for people: 0.034, 5.4e-05, <1e-6."""
    if p is None:
        return "-"
    if p < 1e-6:
        return "<1e-6"
    return f"{p:.1e}" if p < 1e-4 else f"{p:.2g}" if p < 0.1 else f"{p:.2f}"


def p_is(p: float | None) -> str:
    """`p = 0.034`, `p < 1e-6`."""
    return f"p = {p_value(p)}".replace("= <", "< ")


def about_target(found: "GroupFinding") -> list[str]:
    """A group against its target, by the rules of tracks 1 and 3."""
    group, said = found.group, []
    if not group.losses:
        return ["No run counts."]
    one = found.track1
    if one is None:
        from tools.analysis.findings import repeated

        return [f"No test: {repeated(group)}: runs that are one run count once. Did the seeds take effect?"]
    n, mean = len(group.losses), found.loss["mean"]
    side = "below" if mean < found.target else "not below"
    if n == 1:
        said.append(
            f"One seed, loss {mean:.4f}: {side} {found.target:g}, an observation, not evidence "
            "(one value has no spread)."
        )
    elif one.p is None:
        said.append(
            f"All {n} losses are the same, {mean:.4f}: did the seeds take effect? No test is possible."
        )
    else:
        held = "holds" if one.passed else "does not hold"
        said.append(
            f"Mean loss {mean:.4f} over {n} seeds is {side} {found.target:g}; track 1's rule (t-test, p < {ALPHA:g}) "
            f"{held}: {p_is(one.p)}."
        )
    contest = found.target == statistics.TARGET and near_the_contest(group.losses)
    three = found.track3 if contest else None
    if three and three.reason:
        said.append(f"Track 3's rule cannot be applied: {three.reason}.")
    elif three:
        held = "holds" if three.passed else "does not hold"
        said.append(
            f"Track 3's rule (({found.target:g} - mean) * sqrt(n) >= {statistics.TRACK3_MARGIN:g}) {held}: "
            f"{three.value:.4f}."
        )
        if found.track3_step is not None:
            said.append(f"The first step at which it passes over all {n} seeds: {found.track3_step}.")
    stated = group.config.get("baseline_val_loss")
    if statistics.is_number(stated) and not group.is_baseline:
        against = statistics.track1(group.losses, float(stated))
        said.append(
            f"Against the baseline loss {stated:g} that the configuration states (not measured here): "
            f"{'lower' if mean < stated else 'not lower'} by {abs(stated - mean):.4f}, {p_is(against.p)}."
        )
    return said


def near_the_contest(losses: Sequence[float]) -> bool:
    """Whether track 3's rule means anything: the spread that it assumes is that of runs that end near 3.28."""
    return abs(statistics.mean(losses) - statistics.TARGET) < CONTEST_RANGE


def _counts(found: Difference) -> str:
    return (
        f"{found.n_baseline} pairs"
        if found.method == "paired"
        else f"{found.n_baseline} and {found.n_variant} runs"
    )


def about_loss(found: "Comparison") -> str:
    """The losses of the two sides, and what the test says."""
    if found.loss_refused:
        return f"Loss not compared: {found.loss_refused}."
    loss = found.loss
    means = [statistics.mean(group.losses) for group in (found.baseline, found.variant)]
    way = "lower" if loss.difference > 0 else "higher"
    text = f"Loss {means[1]:.4f} against {means[0]:.4f}: {abs(loss.difference):.4f} {way}"
    if loss.p is None:
        if found.verdict == "one seed":
            return f"{text}, from {_counts(loss)}. Train more seeds: one value has no spread to judge by."
        return f"{text}, and all runs of a side have the same loss: no test is possible."
    low, high = loss.interval
    text += f" (95% interval of the gain: {low:+.4f} to {high:+.4f}; {loss.method}, {_counts(loss)}). "
    p, claim = (loss.p, "lower") if loss.difference > 0 else (loss.p_worse, "higher")
    sign = "below" if p < found.level else "not below"
    text += f"One-sided test that it is {claim}: {p_is(p)}, {sign} {found.level:.2g}."
    return text if found.verdict != "unclear" else f"{text} {_plan_words(found)}"


def sides(found: "Comparison") -> str:
    """What is counted when seeds are planned."""
    return "pairs" if found.loss and found.loss.method == "paired" else "runs a side"


def _plan_words(found: "Comparison") -> str:
    n = min(found.loss.n_baseline, found.loss.n_variant)
    if not found.visible:
        return ""
    text = f"With {n} {sides(found)} and this spread, 9 of 10 studies see a difference of {found.visible:.4f}"
    aim = found.wanted or abs(found.loss.difference)
    if aim:
        many = found.needed if found.needed else f"more than {planning.MOST_RUNS}"
        text += f"; one of {aim:.4f} would take {many} {sides(found)}"
    return f"{text}."


def about_time(found: "Comparison") -> str:
    """The times of the two sides, or why they are not compared."""
    if found.time_refused:
        return f"Time not compared: {found.time_refused}."
    time = found.time
    means = [statistics.mean(group.seconds) for group in (found.baseline, found.variant)]
    way = "less" if time.difference > 0 else "more"
    share = 100 * abs(time.difference) / means[0] if means[0] else 0.0
    text = f"Time {seconds(means[1])} against {seconds(means[0])}: {seconds(abs(time.difference))} ({share:.1f}%) {way}"
    if time.p is None:
        one = min(time.n_baseline, time.n_variant) < 2
        why = "one run has no spread to judge by" if one else "all took the same time: no test is possible"
        return f"{text}; {why}."
    p = time.p if time.difference > 0 else time.p_worse
    low, high = time.interval
    return f"{text} (95%: {low:+.3g} to {high:+.3g} s saved; {time.method}), one-sided {p_is(p)}."


def about_track3(found: "Comparison") -> str:
    """Track 3's pairwise rule, where it applies."""
    three = found.track3
    if not three or found.loss_refused or not near_the_contest(found.variant.losses):
        return ""
    if three.reason:
        return f"Track 3's pairwise rule cannot be applied: {three.reason}."
    return (
        f"Track 3's pairwise rule {'holds' if three.passed else 'does not hold'}: {three.value:.4f}, to be at least "
        f"{statistics.TRACK3_MARGIN:g} (100 steps saved count as 0.0045)."
    )
