"""One lane through the model: its loss and gradients in training, the loss of every token in validation.

With --capture a lane is a CUDA graph (`fast.capture`), recorded in the warm-up once for each `lane_key` of the run.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from modded_nanogpt import attention_backends, schedule
from modded_nanogpt.attention import Documents
from modded_nanogpt.batches import Batch, ValBatches
from modded_nanogpt.clock import to_device
from modded_nanogpt.config import Config
from modded_nanogpt.fast.capture import Recorder
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
    recorder: Recorder | None = None  # None: lanes are called, not replayed
    sums: list[Tensor] = field(
        default_factory=list
    )  # where replayed gradients of parameters add up, one each
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
    if state.recorder is not None:
        loss, *gradients = state.recorder.replay(lane_key(batch, step), _given(batch, step, ranks.device))
        of_rows, of_parameters = gradients[: len(Rows._fields)], gradients[len(Rows._fields) :]
        _add_up(state, of_parameters)
        add_gradients(state.model, batch, Rows(*of_rows), step.tied)
        return loss.clone()  # the next replay overwrites it
    rows = look_up(state.model, batch, step.tied, train=True)
    loss = state.train_graph(*train_arguments(state, ranks, batch, rows, step))
    (loss * loss_scale(ranks)).backward()
    gradients = Rows(*(None if part is None else part.grad for part in rows))
    add_gradients(state.model, batch, gradients, step.tied)
    return loss.detach()


def lane_kinds(config: Config) -> list[StepPlan]:
    """One step of each kind of lane that a run of `config` has, in the run's order: what `lane_key` tells apart."""
    found: dict[tuple, StepPlan] = {}
    for number in range(schedule.total_steps(config)):
        step = schedule.at(config, number)
        kind = (step.batch_tokens, step.max_document, step.short_window, step.long_window, step.tied)
        found.setdefault(kind, step)
    return list(found.values())


def lane_key(batch: Batch, step: StepPlan) -> tuple:
    """Everything of a lane that is a number to Python, and so is fixed in a graph."""
    shape = (batch.inputs.numel(), batch.cu_seqlens.numel(), batch.max_document)
    return (*shape, step.short_window, step.long_window, step.tied)


def record_lane(state: State, recorder: Recorder, ranks: Ranks, batch: Batch, step: StepPlan) -> None:
    """Make the graph of all lanes with the key of this one, which has been called before: it compiles nothing."""
    parameters = [parameter for _, parameter in state.model.named_parameters()]
    if not state.sums:
        state.sums = [torch.empty_like(parameter) for parameter in _with_gradient(state)]

    def body(given: list[Tensor | None]) -> list[Tensor | None]:
        *tensors, mtp, prefix = given
        copied = dataclasses.replace(batch, **dict(zip(BATCH_INPUTS, tensors, strict=True)))
        rows = look_up(state.model, copied, step.tied, train=True)
        loss = state.train_graph(*train_arguments(state, ranks, copied, rows, step, (mtp, prefix)))
        leaves = [part for part in rows if part is not None] + parameters
        found = torch.autograd.grad(loss * loss_scale(ranks), leaves, allow_unused=True)
        of_leaf = {id(leaf): gradient for leaf, gradient in zip(leaves, found, strict=True)}
        of_rows = [None if part is None else of_leaf[id(part)] for part in rows]
        return [loss.detach(), *of_rows, *(of_leaf[id(parameter)] for parameter in _with_gradient(state))]

    recorder.record(lane_key(batch, step), _given(batch, step, ranks.device), body)


def lasting_tensors(state: State) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of what lanes read and change besides their batch: none may move while there are graphs."""
    yield from state.model.named_parameters()
    yield from state.model.named_buffers()
    if state.prefix_table is not None:
        yield "prefix table", state.prefix_table
    if state.model.fp8 is not None:
        yield from state.model.fp8.lasting()


def _with_gradient(state: State) -> list[torch.nn.Parameter]:
    """The parameters whose gradients come from the graph of a lane: all but the tables whose rows are looked up."""
    tables = {"embed", "embed2", "value_embeds", "bigram"}
    return [parameter for name, parameter in state.model.named_parameters() if name not in tables]


BATCH_INPUTS = (
    "inputs",
    "targets",
    "cu_seqlens",
    "bigram_rows",
    "sign_rows",
)  # fields that a lane's graph reads


def _given(batch: Batch, step: StepPlan, device: torch.device) -> list[Tensor | None]:
    """What changes from lane to lane of one key."""
    tensors = [getattr(batch, name) for name in BATCH_INPUTS]
    return [*tensors, *_loss_weights(step, device)]


@torch.no_grad()
def _add_up(state: State, gradients: list[Tensor | None]) -> None:
    """Add a lane's gradients of parameters to those of the lanes before it, in memory that stays."""
    found = zip(_with_gradient(state), state.sums, gradients, strict=True)
    found = [(parameter, total, gradient) for parameter, total, gradient in found if gradient is not None]
    first = [(total, gradient) for parameter, total, gradient in found if parameter.grad is None]
    others = [(parameter.grad, gradient) for parameter, _, gradient in found if parameter.grad is not None]
    for parameter, total, _ in found:
        if parameter.grad is None:
            parameter.grad = total
    if first:
        torch._foreach_copy_(*map(list, zip(*first, strict=True)))
    if others:
        torch._foreach_add_(*map(list, zip(*others, strict=True)))


def loss_scale(ranks: Ranks) -> float:
    """What a lane's loss is multiplied with before its gradients are taken: the optimizer averages over the ranks."""
    return ranks.world_size / RECORD_LANES


def train_arguments(
    state: State,
    ranks: Ranks,
    batch: Batch,
    rows: Rows,
    step: StepPlan,
    weights: tuple[Tensor, Tensor] | None = None,
) -> tuple:
    """What `lane_loss` is called with. weights: those of the loss, where they are on the device already."""
    return (
        state.model, rows, batch.sign_rows, batch.targets, batch.cu_seqlens, batch.max_document,
        *_windows(step.short_window, step.long_window), state.prefix_table,
        *(weights or _loss_weights(step, ranks.device)), loss_scale(ranks), state.fp8_head, state.fp8_mlp,
    )  # fmt: skip


def _loss_weights(step: StepPlan, device: torch.device) -> tuple[Tensor, Tensor]:
    """(mtp (3,), prefix (1,)) float32."""
    return to_device(step.mtp, device), to_device([step.prefix], device)


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
