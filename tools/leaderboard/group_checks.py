"""What may be wrong with all runs of a submission together, and with a submission beside the others on the board."""

import hashlib
import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from tools.analysis.statistics import mean, sd
from tools.leaderboard.evidence import Run
from tools.leaderboard.significance import judge
from tools.leaderboard.tracks import Track

Problems = Iterator[tuple[str, str]]
SAME = 1e-5  # nats: curves of different seeds differ by a thousand times that
MOST_OVERLAP_RANKS = 8  # a host with this many ranks at work has no room for as many more


@dataclass(frozen=True)
class Result:
    """What a submission comes to: recomputed from its evidence, whatever its record says. Losses in nats."""

    runs: int
    losses: tuple[float, ...]
    mean_loss: float
    sd_loss: float | None
    p_value: float | None
    met: bool
    said: str  # the test in words
    seconds: tuple[float, ...]
    mean_seconds: float
    steps: int
    tokens: int | None
    gpu: str
    world_size: int


def recipe_digest(run: Run) -> str:
    """One SHA-256 over the knobs that say what was trained."""
    return hashlib.sha256(json.dumps(run.recipe, sort_keys=True).encode()).hexdigest()


def result_of(runs: Sequence[Run], track: Track) -> Result:
    """The figures of a submission. The test is the track's."""
    losses = tuple(run.val_loss for run in runs)
    seconds = tuple(run.train_ms / 1000 for run in runs)
    p_value, met, said = judge(losses, [run.steps for run in runs], track)
    first = runs[0]
    return Result(
        len(runs), losses, mean(losses), sd(losses), p_value, met, said, seconds, mean(seconds),
        first.steps, first.tokens, first.gpu, first.world_size,
    )  # fmt: skip


def check_group(runs: Sequence[Run], track: Track) -> Problems:
    """Runs of one submission beside each other."""
    yield from _same(runs)
    yield from _seeds(runs)
    for a, b in itertools.combinations(runs, 2):
        yield from _pair(a, b)
    yield from _overlaps(runs)


def _same(runs: Sequence[Run]) -> Problems:
    first = runs[0]
    for run in runs[1:]:
        if run.kind != first.kind:
            yield "runs", f"{run.label}: another kind of log than {first.label}"
        if run.source_sha256 != first.source_sha256:
            yield "runs", f"{run.label}: other source than {first.label}; a submission is one source"
        if recipe_digest(run) != recipe_digest(first):
            names = sorted(
                n for n in run.recipe.keys() | first.recipe.keys() if run.recipe.get(n) != first.recipe.get(n)
            )
            yield "runs", f"{run.label}: another recipe than {first.label} ({', '.join(names)[:80]})"
        if (run.gpu, run.world_size) != (first.gpu, first.world_size):
            here, there = (f"{one.world_size} x {one.gpu or 'unknown'}" for one in (run, first))
            yield "runs", f"{run.label}: on {here}, {first.label} on {there}; their times do not compare"
        if run.steps != first.steps:
            yield "runs", f"{run.label}: stopped after {run.steps} steps, {first.label} after {first.steps}"
        if run.software.get("torch", run.software.get("pytorch")) != first.software.get(
            "torch", first.software.get("pytorch")
        ):
            yield "runs", f"{run.label}: ran with another PyTorch than {first.label}"
        if run.record.get("data") != first.record.get("data"):
            yield "runs", f"{run.label}: was trained on other data than {first.label}"


def _seeds(runs: Sequence[Run]) -> Problems:
    seeds = [run.seed for run in runs if run.seed is not None]
    if twice := sorted({seed for seed in seeds if seeds.count(seed) > 1}):
        yield (
            "runs",
            f"{seeds.count(twice[0])} runs have the seed {twice[0]}; runs of one seed are not independent",
        )
    for key, what in ((lambda run: run.log_sha256, "log"), (lambda run: run.run_id, "run_id")):
        keys = [key(run) for run in runs if key(run)]
        if len(set(keys)) < len(keys):
            yield "duplicates", f"two of the runs have one {what}; a run counts once"


def _pair(a: Run, b: Run) -> Problems:
    """One run handed in twice: the same losses, the same losses moved by a constant, or the same clock."""
    theirs = {p.step: p.loss for p in b.train if p.loss is not None}
    theirs |= {-1 - p.step: p.loss for p in b.val}
    ours = {p.step: p.loss for p in a.train if p.loss is not None} | {-1 - p.step: p.loss for p in a.val}
    apart = [ours[step] - theirs[step] for step in ours if step in theirs]
    coarse = a.kind == "modded"  # its losses have four decimals: some are equal by chance
    if len(apart) >= 3:
        equal = sum(abs(value) < 1e-12 for value in apart)
        centre = sorted(apart)[len(apart) // 2]
        if equal == len(apart) or (not coarse and equal > max(2, len(apart) // 4)):
            yield (
                "duplicates",
                f"{a.label} and {b.label}: {equal} of {len(apart)} losses are equal; they are one run",
            )
        elif not coarse and all(abs(value - centre) < SAME for value in apart):
            yield (
                "duplicates",
                f"{a.label} and {b.label}: their losses differ by a constant; they are one run",
            )
    if not coarse and a.val_loss == b.val_loss and a.seed != b.seed:
        yield (
            "duplicates",
            f"{a.label} and {b.label}: different seeds, and the same final loss to its last digit",
        )
    clocks = [
        (p.ms, q.ms) for p, q in zip(a.train, b.train, strict=False) if p.ms is not None and q.ms is not None
    ]
    same = sum(x == y for x, y in clocks)
    if not coarse and len(clocks) >= 10 and same > len(clocks) // 2:
        yield (
            "duplicates",
            f"{a.label} and {b.label}: {same} of {len(clocks)} step times are equal; they are one clock",
        )


def _overlaps(runs: Sequence[Run]) -> Problems:
    """Runs that need a whole host cannot have run on it at one time."""
    timed = sorted(
        (run for run in runs if run.started and run.host and run.world_size >= MOST_OVERLAP_RANKS),
        key=lambda run: run.started,
    )
    for a, b in itertools.pairwise(timed):
        gap = (b.started - a.started).total_seconds()
        if a.host == b.host and gap < a.train_ms / 1000:
            yield (
                "duplicates",
                f"{a.label} and {b.label}: both used {a.world_size} ranks of {a.host} at one time",
            )


def check_statistics(result: Result, track: Track, kind: str) -> Problems:
    """The target, over all submitted runs. A negative result misses it, and a re-run is shown whatever it finds."""
    if kind != "record":
        return
    if result.runs < track.min_runs:
        word = "one run is a claim, not evidence" if result.runs == 1 else f"{result.runs} runs"
        yield "statistics", f"{word}; this track needs at least {track.min_runs} with different seeds"
    elif not result.met:
        yield "statistics", result.said


@dataclass(frozen=True)
class Others:
    """What the board already has, for the checks of a new submission."""

    logs: dict[str, str]  # digest of a log -> record
    losses: dict[tuple[float, ...], str]  # sorted final losses -> record
    recipes: dict[tuple[str, str, str, int, str], str]  # (source, recipe, GPU, ranks, track) -> record
    run_losses: dict[float, str]  # final loss of a run of ours, which has all its digits -> record

    @classmethod
    def none(cls) -> "Others":
        """An empty board."""
        return cls({}, {}, {}, {})


def check_others(runs: Sequence[Run], track: Track, kind: str, others: Others) -> Problems:
    """A submission beside what is on the board."""
    first = runs[0]
    for run in runs:
        if run.log_sha256 in others.logs:
            yield (
                "duplicates",
                f"{run.label}: its log is on the board already, in {others.logs[run.log_sha256]}",
            )
    losses = tuple(sorted(run.val_loss for run in runs))
    if losses in others.losses and first.kind == "engaging":
        yield "duplicates", f"its final losses are those of {others.losses[losses]}, to the last digit"
    else:
        for run in runs:
            if (
                run.kind == "engaging"
                and run.log_sha256 not in others.logs
                and run.val_loss in others.run_losses
            ):
                yield (
                    "duplicates",
                    f"{run.label}: its final loss is that of a run of {others.run_losses[run.val_loss]}, to the last "
                    "digit: a copy, or the same seed once more",
                )
    key = (first.source_sha256, recipe_digest(first), first.gpu, first.world_size, track.name)
    if first.kind == "engaging" and kind != "rerun" and key in others.recipes:
        yield (
            "duplicates",
            (
                f"it is the source and the recipe of {others.recipes[key]}, on the same hardware; hand it in as "
                "a second party's re-run (--kind=rerun)"
            ),
        )
    if kind == "rerun" and key[:2] not in {known[:2] for known in others.recipes}:
        yield "duplicates", "a re-run of nothing: no record on the board has this source and recipe"


def check_template(runs: Sequence[Run], track: Track, kind: str) -> Problems:
    """The recipe that everybody starts from is no result, unless it is run again to confirm it."""
    first = runs[0]
    if (
        track.template[0]
        and (first.source_sha256, recipe_digest(first)) == track.template
        and kind == "record"
    ):
        yield "text", f"it is the unedited template of the track {track.name}: change something, and say what"
