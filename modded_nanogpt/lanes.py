"""One lane through the model: its loss and gradients in training, the loss of every token in validation."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from modded_nanogpt import attention_backends, schedule
from modded_nanogpt.attention import Documents
from modded_nanogpt.batches import Batch, ValBatches
from modded_nanogpt.clock import to_device
from modded_nanogpt.config import Config
from modded_nanogpt.kernels.cross_entropy import eval_losses, head_loss
from modded_nanogpt.model import Rows, SpeedrunModel
from modded_nanogpt.optim.sharded import Optimizer
from modded_nanogpt.schedule import StepPlan
from modded_nanogpt.tables import add_gradients, look_up
from nanogpt.common.ranks import Ranks

# The loss of a step is the sum over its tokens divided by this, whatever the number of ranks.
RECORD_LANES = 8
ROWS_AT_ONCE = 65_536  # rows of logits in memory at once: 6.6 GB in bfloat16, and half of that again in FP8
SOFTCAP, OLD_SOFTCAP = (23.0, 5.0, 7.5), (30.0, 0.0, 7.5)  # A sigmoid((z + B) / C): records 54, and before
NEW_PROGRESS = {"step": 0, "val_step": -1, "val_loss": math.inf, "tokens": 0, "train_ms": 0.0}


@dataclass
class State:
    """Everything that a step changes, and how it is computed."""

    model: SpeedrunModel
    optimizer: Optimizer
    train_graph: Callable[..., Tensor]  # `lane_loss`, compiled or not
    eval_graph: Callable[..., Tensor]  # `lane_losses`
    backend: attention_backends.Backend
    fp8_head: bool
    fp8_mlp: bool
    compiled: bool
    prefix_table: Tensor | None  # (V,) int64: `vocabulary.prefix_table`
    allowed: Tensor | None  # (V, V / 8) uint8: `vocabulary.canonical_table`
    fp8_start: dict[str, Tensor] | None  # the scales of step 0
    fp8_why: str  # the choice of 8-bit products in words
    progress: dict[str, Any] = field(default_factory=lambda: dict(NEW_PROGRESS))
    resumed: bool = False


def lane_loss(
    model: SpeedrunModel, rows: Rows, sign_rows: Tensor | None, targets: Tensor, cu_seqlens: Tensor, longest: int,
    short: Tensor, long: Tensor, prefix_table: Tensor | None, mtp: Tensor, prefix: Tensor, loss_scale: float,
    fp8_head: bool, fp8_mlp: bool,
) -> Tensor:  # fmt: skip
    """Sum of the weighted losses of one lane (float32 scalar); its gradient comes scaled by `loss_scale`."""
    documents = _documents(cu_seqlens, targets, longest)
    x = model(rows, sign_rows, documents, (short, long), fp8_mlp)
    before = None if prefix_table is None else prefix_table[targets]
    softcap = SOFTCAP if model.config.asymmetric_softcap else OLD_SOFTCAP
    return head_loss(x, model.head, targets, before, mtp, prefix, softcap, loss_scale, fp8_head, ROWS_AT_ONCE)


def lane_losses(
    model: SpeedrunModel, rows: Rows, sign_rows: Tensor | None, targets: Tensor, cu_seqlens: Tensor, longest: int,
    short: Tensor, long: Tensor, allowed: Tensor | None, inputs: Tensor,
) -> Tensor:  # fmt: skip
    """The loss of every token (T,) float32, in nats, for validation: bfloat16 operands, no further targets.

    allowed: which token may follow which (`vocabulary.canonical_table`), or None; inputs: (T,) int32.
    """
    documents = _documents(cu_seqlens, targets, longest)
    x = model(rows, sign_rows, documents, (short, long), False)
    softcap = SOFTCAP if model.config.asymmetric_softcap else OLD_SOFTCAP
    return eval_losses(x, model.head, targets, softcap, allowed, inputs)


def _documents(cu_seqlens: Tensor, targets: Tensor, longest: int) -> Documents:
    start, end = attention_backends.documents(cu_seqlens, targets.numel())
    return Documents(cu_seqlens, start, end, longest)


def train_lane(state: State, ranks: Ranks, batch: Batch, step: StepPlan) -> Tensor:
    """Forward and backward of one lane; the sum of its losses, a float32 scalar on the device."""
    if batch.bigram_rows_cpu is not None:
        state.optimizer.touch("bigram", batch.bigram_rows_cpu)
    rows = look_up(state.model, batch, step.tied, train=True)
    loss = state.train_graph(*train_arguments(state, ranks, batch, rows, step))
    (loss * loss_scale(ranks)).backward()
    add_gradients(state.model, batch, rows, step.tied)
    return loss.detach()


def loss_scale(ranks: Ranks) -> float:
    """What a lane's loss is multiplied with before its gradients are taken: the optimizer averages over the ranks."""
    return ranks.world_size / RECORD_LANES


def train_arguments(state: State, ranks: Ranks, batch: Batch, rows: Rows, step: StepPlan) -> tuple:
    """What `lane_loss` is called with."""
    device = ranks.device
    return (
        state.model, rows, batch.sign_rows, batch.targets, batch.cu_seqlens, batch.max_document,
        *_windows(step.short_window, step.long_window), state.prefix_table, to_device(step.mtp, device),
        to_device([step.prefix], device), loss_scale(ranks), state.fp8_head, state.fp8_mlp,
    )  # fmt: skip


@torch.no_grad()
def eval_lane(state: State, batch: Batch, tied: bool, windows: tuple[int, int]) -> Tensor:
    """The loss of every token of the lane (T,) float32."""
    rows = look_up(state.model, batch, tied, train=False)
    return state.eval_graph(
        state.model, rows, batch.sign_rows, batch.targets, batch.cu_seqlens, batch.max_document,
        *_windows(*windows), state.allowed, batch.inputs,
    )  # fmt: skip


def _windows(short: int, long: int) -> tuple[Tensor, Tensor]:
    return torch.tensor(short, dtype=torch.int32), torch.tensor(long, dtype=torch.int32)


@torch.no_grad()
def evaluate(
    config: Config, state: State, batches: ValBatches, ranks: Ranks, step: StepPlan, last: bool
) -> float:
    """Mean loss in nats over the first `eval_tokens` validation tokens. The last one looks further back."""
    windows = schedule.final_window(config) if last else (step.short_window, step.long_window)
    total = torch.zeros(2, dtype=torch.float64, device=ranks.device)
    for batch, count in batches:
        losses = eval_lane(state, batch, step.tied, windows)
        total += torch.stack([losses[:count].double().sum(), total.new_tensor(float(count))])
    ranks.sum(total)
    return (total[0] / total[1]).item()
