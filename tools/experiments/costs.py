"""GPU-hours and money: what a study has cost, what it will cost, what the stages saved.

Prices are the user's (`--price`, or ENGAGING_GPU_PRICES in the environment): nothing here knows what a GPU costs.
"""

import os
from dataclasses import dataclass

from nanogpt.common.errors import UserError
from tools.args import counted
from tools.experiments import records
from tools.experiments.config import ExperimentConfig
from tools.experiments.flags import price, price_of
from tools.experiments.records import Experiment
from tools.experiments.study import Result, kin_of, result_of, work_of

# (GPUs, dollars a run) of each stage on what it is made for (an L40, 4 A100, 8 H100): the staged workflow's budget.
USUAL = {"A": (1, 2.00), "B": (4, 10.00), "C": (8, 8.40)}
RESERVE = 7.00  # of that budget, for a pivot
LIMIT = "its time limit: an upper bound"  # of a job; what runs here has none


def usual(letter: str, gpus: int) -> float | None:
    """Dollars a run, when nobody has set prices and the run has its stage's number of GPUs; else None."""
    made_for, cost = USUAL.get(letter, (0, 0.0))
    return cost if made_for == gpus else None


@dataclass(frozen=True)
class Estimate:
    """GPU-hours of one run, and where the figure comes from."""

    gpu_hours: float
    source: str


def prices(asked: dict[str, float] | None) -> dict[str, float] | None:
    """The flag's prices, else the environment's."""
    text = os.environ.get("ENGAGING_GPU_PRICES", "")
    return asked or (price(text) if text else None)


def history(root) -> list[Result]:
    """What every experiment here has measured."""
    found = []
    for folder in records.all_in(root / records.SHELF):
        try:
            found.append(result_of(records.read(folder), with_curves=False))
        except UserError:
            continue  # a damaged old folder is no reason not to plan
    return [result for result in found if result.seconds and any(result.seconds)]


def estimate(config: ExperimentConfig, gpus: int, past: list[Result], limit_minutes: int) -> Estimate:
    """A run's GPU-hours: measured on the same variant and stage, else scaled by iterations x batch, else the limit."""
    same = [r for r in past if (r.variant, r.letter, r.gpus) == (config.variant, config.letter, gpus)]
    if same:
        return Estimate(_per_run(same[-1]), f"measured over {len(same[-1].seconds)} runs")
    work = work_of(config)
    scaled = [r for r in past if r.work and work and r.kin == kin_of(config) and bool(r.gpus) == bool(gpus)]
    if scaled and work:
        last = ([r for r in scaled if r.variant == config.variant] or scaled)[-1]
        hours = _per_run(last) * work / (last.work or work)
        return Estimate(hours, f"scaled from stage {last.letter or '-'} by iterations x batch")
    return Estimate(max(gpus, 1) * limit_minutes / 60, LIMIT)


def _per_run(result: Result) -> float:
    return sum(result.seconds) / len(result.seconds) * max(result.gpus, 1) / 3600


def money(hours: float, kind: str | None, known: dict[str, float] | None, gpus: int = 1) -> str:
    """`12.3 GPU-hours, $36.90`; the hours alone without a price. `gpus` 0: a CPU's hours, which have none."""
    if not gpus:
        return f"{hours:.3g} hours of a CPU"
    cost = price_of(known, kind)
    if cost is None and known and kind is None and len(known) == 1:
        cost = next(iter(known.values()))
    return f"{hours:.3g} GPU-hours" + (f", ${hours * cost:.2f}" if cost is not None else "")


def coming(
    root, letter: str, planned: list[Experiment], asked: dict[str, float] | None, late: bool
) -> list[str]:
    """What the experiments that a decision starts will cost, the baseline's part beside the sum; [] for none."""
    from tools.experiments.queue import arguments

    known, past = prices(asked), history(root)
    lines, parts = list[str](), list[tuple[bool, float, float | None]]()
    for experiment in planned:
        gpus, runs = experiment.gpus, len(experiment.runs)
        found = estimate(experiment.config, gpus, past, arguments(experiment, 1).time)
        price = price_of(known, experiment.options.get("gpu_type"))
        each = usual(letter, gpus) if known is None else None if price is None else price * found.gpu_hours
        hours, dollars = runs * found.gpu_hours, None if each is None or not gpus else runs * each
        parts.append((experiment.config.is_baseline, hours, dollars))
        on = counted(gpus, "GPU") if gpus else "a CPU"
        label = experiment.config.label
        lines.append(f"  {label}: {counted(runs, 'run')} on {on}, {_sum(parts[-1:], gpus)} ({found.source})")
    if not planned:
        return []
    base = [part for part in parts if part[0]]
    aside = f"; the baseline's part: {_sum(base, planned[0].gpus)}" if base and len(parts) > 1 else ""
    lines = [
        f"stage {letter} would start:",
        *lines,
        f"  sum: {_sum(parts, planned[0].gpus)}{aside}",
    ]
    if late:
        lines.append(
            "  after the runs that are there, not in turn with them: how the machine changed is in it"
        )
    elif len(planned) > 1:
        lines.append("  in turn: run 0 of each, then run 1")
    return lines


def _sum(parts: list[tuple[bool, float, float | None]], gpus: int) -> str:
    """`12 GPU-hours, $36.90` of (baseline?, hours, dollars)."""
    hours = sum(part[1] for part in parts)
    dollars = [part[2] for part in parts]
    text = f"{hours:.3g} GPU-hours" if gpus else f"{hours:.3g} hours of a CPU"
    return text if None in dollars else f"{text}, ${sum(dollars):.2f}"


def saved(results: list[Result], full: list[ExperimentConfig], asked: dict[str, float] | None) -> list[str]:
    """What was spent by stage, and what all variants in full would have cost."""
    known = prices(asked)
    lines, spent = [], 0.0
    for letter in sorted({r.letter for r in results if r.seconds}):
        stage = [r for r in results if r.letter == letter]
        hours = sum(sum(r.seconds) * max(r.gpus, 1) / 3600 for r in stage)
        spent += hours
        runs = sum(len(r.seconds) for r in stage)
        cost = money(hours, stage[0].gpu_type, known, stage[0].gpus)
        lines.append(f"spent at stage {letter or '-'}: {cost} in {runs} runs")
    lines += _against_full(results, full, spent, known)
    kinds = sorted({r.gpu_type or "" for r in results if r.gpus and price_of(known, r.gpu_type) is None})
    if kinds and known is None:
        lines.append("money: --price 2.50 (a GPU-hour), or --price h100=2.99,l40s=0.80")
    elif any(kinds):
        lines.append(
            f"no price for {', '.join(filter(None, kinds))}: --price {next(filter(None, kinds))}=..."
        )
    return lines


def _against_full(
    results: list[Result], full: list[ExperimentConfig], spent: float, known: dict[str, float] | None
) -> list[str]:
    """What the study costs beside every variant at its full length."""
    variants = {r.variant for r in results}
    everything = [config for config in full if config.variant in variants]
    measured = [r for r in results if r.seconds and any(r.seconds)]
    if not everything or not measured:
        return []
    gpus, kind = measured[0].gpus, measured[0].gpu_type
    in_full, chosen, sources = 0.0, spent, set()
    reached = {r.variant for r in results if r.letter == "C" and r.seconds}
    for config in everything:
        found = estimate(config, config.n_gpus if gpus else 0, measured, 0)
        if not found.gpu_hours:
            return []  # nothing here was measured that it could be scaled from
        in_full += found.gpu_hours * config.runs()
        sources.add(found.source.partition(" over")[0])
    if not reached:  # what is still to come: the baseline and one variant in full
        chosen += 2 * in_full / len(everything)
    cost = money(in_full, kind, known, gpus)
    lines = [f"all {len(everything)} variants in full: {cost} ({', '.join(sorted(sources))})"]
    if in_full > 0 and len(everything) > 2:  # with one variant there was nothing to choose
        how = "so far" if reached else "with the baseline and one variant in full"
        lines.append(
            f"by stages, {how}: {money(chosen, kind, known, gpus)}; saved: "
            f"{money(in_full - chosen, kind, known, gpus)} ({1 - chosen / in_full:.0%})"
        )
    return lines
