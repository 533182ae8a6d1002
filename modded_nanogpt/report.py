"""What the log says: what was chosen before the first step, each step, the result."""

import dataclasses
import datetime
import sys
from typing import Any

import torch

from modded_nanogpt import layer_plan, table_plan
from modded_nanogpt.config import FREE, LANES, Config, Plan
from modded_nanogpt.lanes import State
from nanogpt.common import hardware
from nanogpt.common.ranks import Ranks


def describe(config: Config, plan: Plan, state: State, ranks: Ranks) -> list[str]:
    """What was chosen, for the log."""
    numbers = sum(parameter.numel() for parameter in state.model.parameters())
    parts = [
        ("head", state.fp8_head),
        ("up", state.fp8_mlp and config.fp8_up),
        ("down", state.fp8_mlp and config.fp8_down),
        ("the MLPs' backward pass", state.fp8_mlp and state.model.fp8.down_by_row is not None),
        ("Q, K and V", state.model.fp8_qkv),
    ]
    in_fp8 = [name for name, on in parts if on]
    as_recorded = {
        "table_rows": layer_plan.table_rows(config) == layer_plan.SIZES[config.recipe].table_rows,
        "lanes": plan.lanes == LANES,
    }  # whatever number stands for it
    deciding = [
        field
        for field in dataclasses.fields(config)
        if field.name not in FREE and not as_recorded.get(field.name)
    ]
    changed = [f"{field.name}={getattr(config, field.name)}" for field in deciding
               if getattr(config, field.name) != field.default]  # fmt: skip
    return [
        plan.describe(config),
        *table_plan.describe(config, ranks.world_size, state.model.head.element_size()),
        f"{numbers / 1e6:,.1f} M parameters, {str(state.model.head.dtype).removeprefix('torch.')}; FP8: "
        f"{', '.join(in_fp8) or 'none'} ({state.fp8_why}); {hardware.describe(ranks.device)}; "
        f"torch {torch.__version__}; compiled: {str(state.compiled).lower()}",
        f"attention: {state.backend.name} ({state.backend.why})",
        f"unlike the record: {', '.join(changed) or 'nothing'}",
    ]


def graphs_compiled() -> int:
    """How many graphs torch.compile has made in this process."""
    module = sys.modules.get("torch._dynamo.utils")
    return int(module.counters["stats"]["unique_graphs"]) if module else 0


def closing_lines(plan: Plan, progress: dict[str, Any], against: list[str]) -> list[str]:
    """The result in words."""
    loss, seconds = progress["val_loss"], progress["train_ms"] / 1e3
    lines = [f"finished: val loss {loss:.4f} after {progress['step']} steps, {seconds:.2f} s of training"]
    if plan.target_loss:
        met = "reached" if loss <= plan.target_loss else "missed"
        lines.append(
            f"the target {plan.target_loss} is {met}; one run proves nothing: see docs/guide-3-experiments.md"
        )
    lines.append(
        "eligible for a record" if not against else f"not eligible for a record: {'; '.join(against)}"
    )
    return lines


def step_line(
    plan: Plan, step: int, loss: float, train_ms: float, ms: float, speed: float, mfu: float | None
) -> str:
    """One training step: `ms` milliseconds of the clock went by since the last one, `speed` tokens a second."""
    left = datetime.timedelta(seconds=round((plan.total_steps - step - 1) * ms / 1e3))
    return (
        f"step {step}/{plan.total_steps}: loss {loss:.4f}, {train_ms / 1e3:.2f} s, {ms:.1f} ms, "
        f"{speed:,.0f} tokens/s, MFU {hardware.utilisation_words(mfu)}, ETA {left}"
    )


def flops_per_token(config: Config) -> float:
    """Of training: 6 for each weight of the layers' matrices and of the head; attention itself is left out."""
    size = layer_plan.size(config)
    return 6.0 * (layer_plan.matrix_weights(config) + size.padded_vocab * size.width)
