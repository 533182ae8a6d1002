"""What the numbers say, in words: a group against its target, a variant against its baseline.

    finding = compare(baseline, variant)
    finding.verdict, finding.sentences

The words follow the numbers by fixed rules, so that two people read the same study alike. A claim rests on p < 0.01
(or the level of a planned look) and at least two seeds a side; everything else is called what it is.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from nanogpt.common.errors import UserError
from tools.analysis import planning, records, statistics, words
from tools.analysis.curves import Curve
from tools.analysis.records import Group, Run
from tools.analysis.statistics import ALPHA, Difference, OneSample, Track3

NOT_IN_TURN = (
    "the runs did not take turns on one machine: a small difference in time may be the machine's; run them "
    "interleaved before you publish it"
)


@dataclass(frozen=True)
class Reached:
    """When a run first validated at or below the target."""

    step: int
    tokens: float | None
    seconds: float | None


@dataclass
class GroupFinding:
    """A group by itself."""

    group: Group
    target: float
    loss: dict  # statistics.describe of the losses
    time: dict  # statistics.describe of the seconds
    track1: OneSample | None
    track3: Track3 | None
    reached: list[Reached] = field(default_factory=list)
    track3_step: int | None = None  # the first at which track 3's rule passes
    sentences: list[str] = field(default_factory=list)


@dataclass
class Comparison:
    """A variant against its baseline. `loss` and `time` are None where they are refused, with the reason."""

    baseline: Group
    variant: Group
    verdict: str
    level: float
    loss: Difference | None = None
    time: Difference | None = None
    loss_refused: str = ""
    time_refused: str = ""
    track3: Track3 | None = None
    pairs: int = 0
    holm: float | None = None  # p of the loss, adjusted for all variants that were tested at once
    needed: int | None = None  # runs a side (or pairs) for `wanted`
    wanted: float | None = None
    visible: float | None = None  # the difference that this many runs see in 9 of 10 studies
    sentences: list[str] = field(default_factory=list)
    cautions: list[str] = field(default_factory=list)


def first_at(curve: Curve, target: float) -> Reached | None:
    """The first validation at or below the target, as it was measured: nothing is interpolated."""
    hits = (curve.loss <= target).nonzero()[0] if len(curve) else []
    if not len(hits):
        return None
    at = int(hits[0])
    tokens, clock = float(curve.tokens[at]), float(curve.clock[at])
    return Reached(
        int(curve.step[at]), tokens if tokens == tokens else None, clock / 1000 if clock == clock else None
    )


def examine(group: Group, target: float | None = None) -> GroupFinding:
    """One group against the target (given, or the group's own, or 3.28)."""
    aim = target or group.target or statistics.TARGET
    losses, runs = group.losses, group.counted
    found = GroupFinding(
        group, aim, statistics.describe(losses), statistics.describe(group.seconds), None, None
    )
    if losses and not repeated(group):
        found.track1 = statistics.track1(losses, aim)
        if len(group.steps) == len(runs):
            found.track3 = statistics.track3(losses, group.steps, aim)
        curves = [run.metrics.val for run in runs if run.metrics]
        if len(curves) == len(runs):
            found.track3_step = statistics.first_track3_step([_by_step(curve) for curve in curves], aim)
        found.reached = [hit for hit in (first_at(curve, aim) for curve in curves) if hit]
    found.sentences = words.about_target(found)
    return found


def _by_step(curve: Curve) -> dict[int, float]:
    return dict(zip(map(int, curve.step), map(float, curve.loss), strict=True))


def adjust(found: Sequence[Comparison]) -> None:
    """Holm's p beside the raw one, where several variants were tested against their baselines at once."""
    tested = [one for one in found if one.loss and one.loss.p is not None]
    if len(tested) < 2:
        return
    for one, p in zip(tested, statistics.holm([one.loss.p for one in tested]), strict=True):
        one.holm = p
        one.sentences.append(
            f"Of {len(tested)} variants tested at once; adjusted for that (Holm): {words.p_is(p)}."
        )
        if one.verdict == "helped" and p >= one.level:
            one.cautions.append(
                f"{one.variant.name}: among {len(tested)} variants tested at once its p is {words.p_value(p)} (Holm), "
                f"not below {one.level:.2g}: repeat it with new seeds before you claim it"
            )


def repeated(group: Group) -> str:
    """Which runs are others once more, in words, or "": listed again they would make any difference significant.

    Some losses of four digits are equal by chance; half of them, or equal whole curves, are not.
    """
    by_loss: dict[float, list[Run]] = {}
    for run in group.counted:
        by_loss.setdefault(run.val_loss, []).append(run)
    again = [runs for runs in by_loss.values() if len(runs) > 1]
    if len(group.counted) >= 4 and 2 * len(by_loss) <= len(group.counted):
        names = "; ".join(" = ".join(run.name for run in runs[:4]) for runs in again[:3])
        return f"{len(group.counted)} runs have only {len(by_loss)} different losses ({names})"
    for runs in again:
        curves = [_by_step(run.metrics.val) for run in runs if run.metrics and len(run.metrics.val) > 2]
        if len(curves) > 1 and any(one == curves[0] for one in curves[1:]):
            return f"{' and '.join(run.name for run in runs[:4])} have the same losses at every validation"
    return ""


def same_seeds(group: Group) -> list[str]:
    """What makes a group's runs suspicious as independent evidence."""
    said = []
    seeds = [run.seed for run in group.counted if run.seed is not None]
    if len(set(seeds)) < len(seeds):
        said.append(f"{group.name}: seeds occur twice; runs of one seed are not independent")
    if len(set(group.losses)) < len(group.losses):
        said.append(f"{group.name}: different runs have exactly equal losses; did the seed take effect?")
    return said


def compare(
    baseline: Group,
    variant: Group,
    *,
    looks: Sequence[int] = (),
    wanted: float | None = None,
    pairing: str = "auto",
) -> Comparison:
    """Did the variant help? `looks`: the plan of `planning.looks`; `wanted`: a loss difference to plan seeds for;

    `pairing`: "auto" pairs runs that took turns on one machine, "seed" pairs equal seeds, "none" never pairs.
    UserError where the plan or the pairing does not fit the runs.
    """
    found = Comparison(baseline, variant, "refused", ALPHA, wanted=wanted)
    found.loss_refused = _loss_obstacle(baseline, variant)
    pairs = _pairs(baseline, variant, pairing)
    found.pairs = len(pairs)
    if not found.loss_refused:
        found.level = _level(baseline, variant, looks)
        found.loss = _difference(pairs, baseline, variant, "val_loss")
        found.verdict = _verdict(found.loss, found.level)
        if len(baseline.steps) == len(baseline.losses) and len(variant.steps) == len(variant.losses):
            found.track3 = statistics.track3_pairwise(
                baseline.losses, baseline.steps, variant.losses, variant.steps
            )
        _plan(found, pairs)
    found.time_refused = _no_runs(baseline, variant) or records.time_obstacle([baseline, variant])
    if not found.time_refused:
        found.time = _difference(pairs, baseline, variant, "seconds")
    found.cautions = _cautions(found)
    found.sentences = [
        sentence
        for sentence in (words.about_loss(found), words.about_time(found), words.about_track3(found))
        if sentence
    ]
    return found


def _no_runs(*groups: Group) -> str:
    return next((f"{group.name}: no run counts" for group in groups if not group.losses), "")


def _loss_obstacle(baseline: Group, variant: Group) -> str:
    if reason := _no_runs(baseline, variant):
        return reason
    for group in (baseline, variant):
        if again := repeated(group):
            return f"{group.name}: {again}: runs that are one run count once"
    data = {run.data for group in (baseline, variant) for run in group.counted if run.data}
    if len(data) > 1:
        return "the runs were made on different data sets (config.json: data), so their losses mean different things"
    return ""


def _pairs(baseline: Group, variant: Group, pairing: str) -> list[tuple[Run, Run]]:
    if pairing == "none":
        return []
    if pairing == "auto":
        return records.interleaved(baseline, variant)
    ours = {run.seed: run for run in baseline.counted}
    theirs = {run.seed: run for run in variant.counted}
    if None in ours or set(ours) != set(theirs) or len(ours) < len(baseline.counted):
        raise UserError(
            f"--pairing=seed: {baseline.name} and {variant.name} do not have the same seeds, each once; "
            "use --pairing=auto"
        )
    return [(ours[seed], theirs[seed]) for seed in sorted(ours)]


def _difference(pairs: list[tuple[Run, Run]], baseline: Group, variant: Group, what: str) -> Difference:
    if pairs:
        return statistics.paired(*([getattr(run, what) for run in side] for side in zip(*pairs, strict=True)))
    sides = (
        [getattr(run, what) for run in group.counted if getattr(run, what) is not None]
        for group in (baseline, variant)
    )
    return statistics.welch(*sides)


def _level(baseline: Group, variant: Group, looks: Sequence[int]) -> float:
    if not looks:
        return ALPHA
    runs = min(len(baseline.losses), len(variant.losses))
    try:
        plan = planning.looks(looks)
    except ValueError as error:
        raise UserError(f"--looks={','.join(map(str, looks))}: {error}") from None
    now = next((look for look in plan if look.runs == runs), None)
    if now is None or len(baseline.losses) != len(variant.losses):
        raise UserError(
            f"--looks={','.join(map(str, looks))}: there are {len(baseline.losses)} and {len(variant.losses)} runs, "
            "and none of the planned looks is at that number on both sides; wait for it, or give up without a claim"
        )
    return now.level


def _verdict(found: Difference, level: float) -> str:
    if min(found.n_baseline, found.n_variant) < 2:
        return "one seed"
    if found.p is None:
        return "unclear"
    return "helped" if found.p < level else "hurt" if found.p_worse < level else "unclear"


def _plan(found: Comparison, pairs: list[tuple[Run, Run]]) -> None:
    """How many runs a side (or pairs) the wanted difference, or the one that was seen, needs.

    From the spread that was seen: of the losses, or where the runs are paired of the pairs' differences.
    """
    kind = "paired" if pairs else "two-sample"
    spread = pooled_sd(found.baseline.losses, found.variant.losses)
    if pairs:
        spread = statistics.sd([old.val_loss - new.val_loss for old, new in pairs])
    difference = found.wanted or abs(found.loss.difference)
    if spread:
        n = min(found.loss.n_baseline, found.loss.n_variant)
        found.visible = planning.smallest_difference(kind, n, spread, found.level)
    if spread and difference > 0:
        found.needed = planning.runs_needed(kind, difference, spread, found.level)


def pooled_sd(first: Sequence[float], second: Sequence[float]) -> float | None:
    """The common standard deviation of two samples; None when neither has a spread."""
    known = [(len(values) - 1, statistics.sd(values)) for values in (first, second) if len(values) > 1]
    total = sum(count for count, _ in known)
    return (sum(count * sd * sd for count, sd in known) / total) ** 0.5 if total else None


def _cautions(found: Comparison) -> list[str]:
    baseline, variant = found.baseline, found.variant
    said = [*same_seeds(baseline), *same_seeds(variant)]
    for group in (baseline, variant):
        if group.excluded:
            said.append(
                f"{group.name}: {len(group.excluded)} of {len(group.runs)} runs do not count (see the list)"
            )
        said += [f"{group.name}: {note}" for note in group.notes]
    if len(variant.losses) > 1 and sorted(variant.losses) == sorted(baseline.losses):
        said.append(f"{variant.name} has exactly the losses of {baseline.name}: did the change take effect?")
    steps = [sorted(set(group.steps)) for group in (baseline, variant)]
    if all(steps) and steps[0] != steps[1]:
        said.append(
            f"the runs did not stop at the same step ({_steps(steps[0])} and {_steps(steps[1])}): the difference in "
            "loss includes that of the training"
        )
    if baseline.stage and variant.stage and baseline.stage != variant.stage:
        said.append(f"different stages: {baseline.stage} and {variant.stage}")
    if found.time and not found.pairs:
        said.append(NOT_IN_TURN)
    return said


def _steps(steps: list[int]) -> str:
    return str(steps[0]) if len(steps) == 1 else f"{steps[0]} to {steps[-1]}"
