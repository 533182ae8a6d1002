"""What changes from step to step, as pure functions of the configuration and the step.

A run is cut into stages with larger and larger batches and attention windows, then an extension at the last learning
rate. Everything a step needs is one `StepPlan`; nothing here keeps state, so a resumed run continues exactly.
Windows and document lengths are in tokens, learning rates are factors of the base rates in the config.

Sources: the batch and window schedules of records 29, 31, 39 and 46 of the modded-nanogpt speedrun, multi-token
prediction (53), prefix prediction (88), the learning-rate floor and short first documents (72), unequal
stages, the taper and the small batches at the end (92).
"""

import functools
import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from modded_nanogpt import layer_plan
from modded_nanogpt.stage_table import MTP_ONE, STAGES, Ramp, Recipe, Stage

if TYPE_CHECKING:
    from modded_nanogpt.config import Config

RECORD_LANES = 8  # micro-batches in a step of the record, one a GPU

MOMENTUM_LOW, MOMENTUM_HIGH = 0.85, 0.95
MOMENTUM_WARMUP, MOMENTUM_COOLDOWN = 300, 50  # steps; not scaled with the length of the run
# Of --two_momenta; a step of a shorter run lies at the same part of it.
TWO_HIGH, TWO_WARMUP = 0.93, 240
TWO_FROM, TWO_FAST, TWO_SHARE = 514 / 1194, 0.85, 0.4385
# Of --sampled_softmax: classes in parts of equal length of each stage, for lanes as the record has them; and the part
# of the run after which all are scored in any case.
SAMPLED_CLASSES = ((10_240,), (10_240,), (14_336, 14_336, 24_576))
SAMPLED_UNTIL, SAMPLED_MULTIPLE, SAMPLED_MOST = 1107 / 1194, 2048, 28_672
# Of the table of n-grams: updates are as frequent as Adam's up to this part of the run, and then half as frequent; with
# the second moment's beta and the factor of the base weight decay for both.
TABLE_OFTEN, TABLE_EARLY, TABLE_LATE = 336 / 1194, (0.95, 5.0), (0.9025, 10.0)
# What a smaller table costs in loss, by halving, above so many rows and below; and what a step gains.
TABLE_KNEE, TABLE_COST, STEP_GAIN = 21_150_720, (0.0027, 0.0053), 0.00025
SMOKE_PART = 16  # --smoke trains on a sixteenth of each step's tokens
EXACT_FP8_STEPS = 16  # the down-projection starts at 0 and grows too fast for delayed scales


@dataclass(frozen=True)
class StepPlan:
    """Everything that a step's number decides."""

    step: int
    stage: int  # index into `stages(config)`
    batch_tokens: int  # over all ranks
    max_document: int
    short_window: int  # tokens
    long_window: int
    yarn_window: tuple[int, int]  # the windows that the rotary frequencies are made for (see `yarn_windows`)
    lr: float  # factor of the base learning rates
    momentum: float  # of Muon
    two: tuple[float, float]  # with --two_momenta: the fast momentum, and its share beside the slow one
    mtp: tuple[float, float, float]
    prefix: float
    classes: int  # that the loss scores; 0: all
    adam: bool  # whether Adam updates its parameters; its gradients add up in between
    tied: bool  # the embedding is the head in this step, and is copied from it after the update
    untie: bool  # after this step's update the embedding gets a life of its own
    exact_fp8: bool  # the weight scales of the down-projections are taken from this step's weights
    table: tuple[float, float] | None = None  # `table_event`


def scheduled_steps(config: "Config") -> int:
    """Steps without the extension."""
    return config.steps or STAGES[config.recipe].steps + table_steps(config)


def table_steps(config: "Config") -> int:
    """Further steps that make up for a table with fewer rows than the record's; none for a model that has none.

    The record's authors measured the losses with 84.6, 21.2 and 0.4 M rows, two runs each; a step's gain is theirs too.
    """
    usual, rows = layer_plan.SIZES[config.recipe].table_rows, layer_plan.table_rows(config)
    if config.recipe in layer_plan.CPU_RECIPES or not 0 < rows < usual:
        return 0
    knee = min(TABLE_KNEE, usual)
    above, below = math.log2(usual / max(rows, knee)), math.log2(knee / min(rows, knee))
    steps = (TABLE_COST[0] * above + TABLE_COST[1] * below) / STEP_GAIN
    return 2 * math.ceil(steps / 2)  # even, so that updates of every second step stay where they are


def total_steps(config: "Config") -> int:
    """Optimizer steps of the whole run; the last validation comes after them."""
    extension = config.extension_steps
    return scheduled_steps(config) + (STAGES[config.recipe].extension_steps if extension < 0 else extension)


@functools.lru_cache(maxsize=16)  # every step asks several times
def stages(config: "Config") -> tuple[Stage, ...]:
    """The stages with their steps, the extension last; those without a step are left out."""
    recipe, steps = STAGES[config.recipe], scheduled_steps(config)
    ends = [_boundary(recipe, steps, k) for k in range(len(recipe.stages) + 1)]
    found = [replace(stage, start=ends[k], end=ends[k + 1]) for k, stage in enumerate(recipe.stages)]
    found.append(replace(recipe.extension, start=steps, end=total_steps(config)))
    return tuple(_without_techniques(stage, recipe, config) for stage in found if stage.start < stage.end)


def at(config: "Config", step: int) -> StepPlan:
    """The plan of step `step` (from 0). Steps past the end get the last stage's values: the final validation."""
    found = stages(config)
    index = next((k for k, stage in enumerate(found) if step < stage.end), len(found) - 1)
    stage = found[index]
    part = min(1.0, (step - stage.start) / (stage.end - stage.start))
    untie_step = untying_step(config)
    return StepPlan(
        step=step,
        stage=index,
        batch_tokens=stage.batch_tokens,
        max_document=stage.max_document,
        short_window=stage.short_window,
        long_window=stage.long_window,
        yarn_window=yarn_windows(config, step)[-1],
        lr=learning_rate(config, step),
        momentum=momentum(config, step),
        two=two_momenta(config, step),
        mtp=tuple(_along(ramp, part) for ramp in stage.mtp),
        prefix=_along(stage.prefix, _level(part, stage.prefix_levels)),
        classes=sampled_classes(config, step),
        adam=is_adam_step(config, step),
        tied=config.embedding != "untied" and (untie_step is None or step <= untie_step),
        untie=step == untie_step,
        exact_fp8=step < EXACT_FP8_STEPS,
        table=table_event(config, step),
    )


def learning_rate(config: "Config", step: int) -> float:
    """The stage's factor, and over the last part of the scheduled steps a straight line down to the floor."""
    steps = scheduled_steps(config)
    start = int(steps * (1.0 - config.cooldown) + 1e-9)
    down = min(1.0, max(0.0, (step - start) / (steps - start))) if start < steps else 0.0
    factor = next(
        (stage.lr_factor for stage in stages(config) if step < stage.end), stages(config)[-1].lr_factor
    )
    return (1.0 - down) * factor + down * config.lr_floor


def momentum(config: "Config", step: int) -> float:
    """Muon's: up over the first 300 steps (240), down over the last 50; a shorter run only goes up."""
    if not config.momentum_schedule:
        return TWO_HIGH if config.two_momenta else MOMENTUM_HIGH
    high, warmup = (TWO_HIGH, TWO_WARMUP) if config.two_momenta else (MOMENTUM_HIGH, MOMENTUM_WARMUP)
    part = step / warmup
    if step >= warmup:
        part = min(1.0, max(0.0, (total_steps(config) - step) / MOMENTUM_COOLDOWN))
    return MOMENTUM_LOW + (high - MOMENTUM_LOW) * part


def two_momenta(config: "Config", step: int) -> tuple[float, float]:
    """(fast momentum, its share) of the optimizer with two: at first one momentum as ever, then a mixture."""
    if step < TWO_FROM * total_steps(config):
        return momentum(config, step), 1.0
    return TWO_FAST, TWO_SHARE


def sampled_classes(config: "Config", step: int) -> int:
    """How many classes a lane's loss scores at `step`; 0 for all of them.

    They must hold all tokens of a lane, so fewer and larger lanes than the record's take more: a text has about the
    0.6th power of its length in different tokens.
    """
    if not config.sampled_softmax or step >= SAMPLED_UNTIL * total_steps(config):
        return 0
    index, stage = next((k, stage) for k, stage in enumerate(stages(config)) if step < stage.end)
    if index >= len(SAMPLED_CLASSES):
        return 0
    parts = SAMPLED_CLASSES[index]
    count = parts[(step - stage.start) * len(parts) // (stage.end - stage.start)]
    larger = max(1.0, RECORD_LANES / (config.lanes or RECORD_LANES)) ** 0.6
    return min(SAMPLED_MOST, math.ceil(count * larger / SAMPLED_MULTIPLE) * SAMPLED_MULTIPLE)


def is_adam_step(config: "Config", step: int) -> bool:
    """Whether Adam updates at `step`: the odd steps when `adam_every` is 2."""
    return step % config.adam_every == config.adam_every - 1


def table_event(config: "Config", step: int) -> tuple[float, float] | None:
    """(beta of the second moment, factor of the weight decay) where `step` updates the table of n-grams, else None."""
    if not layer_plan.table_rows(config):
        return None
    early = step < _table_turn(config)
    every = config.adam_every if early else 2 * config.adam_every
    return (TABLE_EARLY if early else TABLE_LATE) if step % every == every - 1 else None


def table_events(config: "Config") -> tuple[int, int]:
    """(how many of the first kind, how many in all) updates of the table of n-grams the run has."""
    turn, every = _table_turn(config), config.adam_every
    early = turn // every
    return early, early + total_steps(config) // (2 * every) - turn // (2 * every)


def _table_turn(config: "Config") -> int:
    """The step from which on the table is updated half as often."""
    return int(TABLE_OFTEN * total_steps(config) + 1e-9)


def untying_step(config: "Config") -> int | None:
    """The first Adam step at or after the boundary where the embedding leaves the head; None when it never does."""
    if config.embedding != "tied_then_untied":
        return None
    recipe = STAGES[config.recipe]
    step = _boundary(recipe, scheduled_steps(config), recipe.untie_after)
    return step + (config.adam_every - 1 - step) % config.adam_every


def yarn_windows(config: "Config", step: int) -> tuple[tuple[int, int], ...]:
    """The (short, long) windows up to `step` that the rotary frequencies went through: a YaRN update lies between two
    neighbours. One pair only without YaRN, or when the windows do not change.
    """
    limit = STAGES[config.recipe].yarn_limit
    seen: list[tuple[int, int]] = []
    for stage in stages(config):
        pair = (stage.short_window, stage.long_window)
        moves = config.yarn and stage.long_window <= limit and bool(seen) and pair[1] != seen[-1][1]
        if stage.start <= max(step, 0) and (moves or not seen):
            seen.append(pair)
    return tuple(seen)


def attention_cap(config: "Config") -> int:
    """Attention does not look across every so many tokens of a document in training; 0: no such borders."""
    return STAGES[config.recipe].attention_cap if config.attention_cap else 0


def final_window(config: "Config") -> tuple[int, int]:
    """Short and long window, in tokens, of the validation after the last step. No YaRN update belongs to it."""
    return STAGES[config.recipe].final_window


def _boundary(recipe: Recipe, steps: int, k: int) -> int:
    """The step at which stage number k (from 0) begins."""
    ends = (0, *recipe.ends)
    return math.ceil(ends[k] * steps / ends[-1]) if recipe.boundary_up else round(ends[k] * steps / ends[-1])


def _level(part: float, levels: int) -> float:
    """`part`, from 0 to 1, rounded down to one of so many levels."""
    return math.floor(part * levels) / levels if levels else part


def _along(ramp: Ramp, part: float) -> float:
    return ramp[0] + (ramp[1] - ramp[0]) * part


def _without_techniques(stage: Stage, recipe: Recipe, config: "Config") -> Stage:
    """The stage as it is when the techniques that the config switches off are taken out."""
    changes: dict[str, object] = {}
    if not config.batch_schedule:
        steady = recipe.stages[recipe.constant_batch]
        changes.update(batch_tokens=steady.batch_tokens, lr_factor=steady.lr_factor)
    if config.smoke:
        changes.update(batch_tokens=stage.batch_tokens // SMOKE_PART)
    if not config.window_schedule:
        last = recipe.stages[-1]
        changes.update(short_window=last.short_window, long_window=last.long_window)
    if not config.short_documents:
        changes.update(max_document=recipe.stages[-1].max_document)
    if not config.mtp:
        changes.update(mtp=MTP_ONE)
    if not config.prefix:
        changes.update(prefix=(0.0, 0.0))
    return replace(stage, **changes)
