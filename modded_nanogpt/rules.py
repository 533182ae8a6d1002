"""What makes a run count: the rules of the speedrun, and the record's own curve to hold ours against.

The rules are those of KellerJordan/modded-nanogpt (its README, tracks 1 and 2): the tokens and their order are given,
the loss is that of the first 10,485,760 validation tokens, and all is timed but compiling, warming up and validating.
"""

import bisect

from modded_nanogpt import layer_plan, schedule
from modded_nanogpt.config import Config, Plan

VAL_TOKENS = 10_485_760
DATASETS = ("fineweb10B", "fineweb100B")
# Mean validation losses of ten runs of record 85: of the logged ones it is nearest to the present schedule.
RECORD_STEPS = 1290
RECORD_CURVE = (
    (0, 10.831),
    (250, 4.432),
    (500, 4.065),
    (750, 3.661),
    (1000, 3.419),
    (1250, 3.297),
    (1290, 3.2785),
)


def record_loss(config: Config, step: int) -> float | None:
    """The record's loss at the same part of its run, linear between logged points; None where it says nothing.

    Of record 92, the preset `record`, no curve was published: its runs validate at the end only.
    """
    if config.recipe != "record89" or config.dataset != "fineweb10B":
        return None
    place = step / schedule.total_steps(config) * RECORD_STEPS
    index = bisect.bisect_right([point for point, _ in RECORD_CURVE], place)
    if not 0 < index <= len(RECORD_CURVE):
        return None
    (left, low), (right, high) = RECORD_CURVE[index - 1], RECORD_CURVE[min(index, len(RECORD_CURVE) - 1)]
    return low if left == right else low + (high - low) * (place - left) / (right - left)


def reasons_against(
    config: Config, plan: Plan, *, resumed: bool, val_tokens: int, has_manifest: bool, val_loss: float
) -> list[str]:
    """Why the run is not eligible for a record, one phrase each; empty when it is."""
    found = []
    if config.recipe in layer_plan.CPU_RECIPES:
        found.append(f"the recipe {config.recipe} has no record")
    if config.dataset not in DATASETS:
        found.append(f"the data set is {config.dataset}, not FineWeb")
    elif not has_manifest:
        found.append("the data set has no manifest, so its tokens cannot be told from others")
    if val_tokens != VAL_TOKENS or config.eval_tokens != VAL_TOKENS:
        found.append(f"validated on {val_tokens:,} tokens, not on {VAL_TOKENS:,}")
    if config.data_passes > 1:
        found.append(f"--data_passes={config.data_passes}: training data may have been used more than once")
    if resumed:
        found.append("the run was interrupted and resumed, so its time leaves out what was lost")
    if plan.target_loss and not val_loss <= plan.target_loss:
        found.append(f"the loss {val_loss:.4f} is above the target {plan.target_loss}")
    return found
