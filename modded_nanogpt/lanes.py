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

from modded_nanogpt import attention_backends, losses, pointer, schedule
from modded_nanogpt.attention import Documents
from modded_nanogpt.batches import Batch, ValBatches
from modded_nanogpt.clock import to_device
from modded_nanogpt.config import Config
from modded_nanogpt.fast.capture import Recorder
from modded_nanogpt.kernels import pointer_loss
from modded_nanogpt.kernels.cross_entropy import eval_losses
from modded_nanogpt.kernels.reference.cross_entropy import soft_cap
from modded_nanogpt.model import Copied, Rows, SpeedrunModel
from modded_nanogpt.optim.row_table import RowTable
from modded_nanogpt.optim.sharded import Optimizer
from modded_nanogpt.schedule import StepPlan
from modded_nanogpt.tables import add_gradients, look_up, look_up_copied
from nanogpt.common import hang
from nanogpt.common.ranks import Ranks

# The loss of a step is the sum over its tokens divided by this, whatever the number of ranks.
RECORD_LANES = 8
NEW_PROGRESS = {"step": 0, "val_step": -1, "val_loss": math.inf, "tokens": 0, "train_ms": 0.0}


@dataclass
class State:
    """Everything that a step changes, and how it is computed."""

    model: SpeedrunModel
    optimizer: Optimizer
    train_graph: Callable[..., tuple]  # `lane_residual`, compiled or not
    eval_graph: Callable[..., Tensor]  # `lane_losses`
    backend: attention_backends.Backend
    fp8_head: bool
    fp8_mlp: bool
    compiled: bool
    prefix_table: Tensor | None  # (V,) int64: `vocabulary.prefix_table`
    allowed: Tensor | None  # (V, V / 8) uint8: `vocabulary.canonical_table`
    fp8_start: dict[str, Tensor] | None  # the scales of step 0
    fp8_why: str  # the choice of 8-bit products in words
    table: RowTable | None = None  # of n-grams; updated by the optimizer
    recorder: Recorder | None = None  # None: lanes are called, not replayed
    sums: list[Tensor] = field(
        default_factory=list
    )  # where replayed gradients of parameters add up, one each
    progress: dict[str, Any] = field(default_factory=lambda: dict(NEW_PROGRESS))
    resumed: bool = False

    def start_again(self) -> None:
        """Nothing of the run before remains but its weights, which the next one replaces."""
        self.optimizer.reset()
        self.progress, self.resumed = dict(NEW_PROGRESS), False


def lane_residual(
    model: SpeedrunModel, rows: Rows, sign_rows: Tensor | None, cu_seqlens: Tensor, longest: int,
    short: Tensor, long: Tensor, fp8: bool, copied: Copied | None = None,
) -> tuple[Tensor, pointer.Keys | None]:  # fmt: skip
    """The last residual of one lane (T, d), which the head reads, and the copy pointer's queries and keys, if any.

    The loss is formed from them in `losses`.
    """
    documents = _documents(cu_seqlens, rows.embed.shape[0], longest)
    x = model(rows, sign_rows, documents, (short, long), fp8, copied)
    return x, pointer.keys(model, x)


def lane_losses(
    model: SpeedrunModel, rows: Rows, sign_rows: Tensor | None, targets: Tensor, cu_seqlens: Tensor, longest: int,
    short: Tensor, long: Tensor, allowed: Tensor | None, inputs: Tensor, copied: Copied | None = None,
) -> Tensor:  # fmt: skip
    """The loss of every token (T,) float32, in nats, for validation: bfloat16 operands, no further targets.

    allowed: which token may follow which (`vocabulary.canonical_table`), or None; inputs: (T,) int32.
    """
    documents = _documents(cu_seqlens, targets.numel(), longest)
    x = model(rows, sign_rows, documents, (short, long), False, copied)
    given = (x, model.head, targets, losses.softcap(model.config))
    found = pointer.keys(model, x)
    if found is None:
        return eval_losses(*given, allowed, inputs)
    copy = pointer.copy_rows(model, found, inputs, targets, documents, pointer.EVAL_BLOCK)
    return pointer_loss.eval_losses(*given, copy, allowed, inputs)


def _documents(cu_seqlens: Tensor, tokens: int, longest: int) -> Documents:
    start, end = attention_backends.documents(cu_seqlens, tokens)
    return Documents(cu_seqlens, start, end, longest)


def train_lane(state: State, ranks: Ranks, batch: Batch, step: StepPlan) -> Tensor:
    """Forward and backward of one lane; the sum of its losses, a float32 scalar on the device."""
    if batch.bigram_rows_cpu is not None:
        state.optimizer.touch("bigram", batch.bigram_rows_cpu)
    if state.table is not None:
        state.table.fetch(batch)
    if state.recorder is not None:
        given = _given(batch, step, ranks.device)
        loss, of_head, *gradients = state.recorder.replay(lane_key(batch, step), given)
        of_rows, of_parameters = gradients[: len(Rows._fields)], gradients[len(Rows._fields) :]
        _add_up(state, of_parameters)
        add_gradients(state.model, state.table, batch, Rows(*of_rows), of_head, step.tied)
        return loss.clone()  # the next replay overwrites it
    loss, rows, scored = _forward(state, ranks, batch, step, _loss_weights(step, ranks.device))
    (loss * loss_scale(ranks)).backward()
    gradients = Rows(*(None if part is None else part.grad for part in rows))
    of_head = None if scored is None else scored.grad
    add_gradients(state.model, state.table, batch, gradients, of_head, step.tied)
    return loss.detach()


def _forward(
    state: State, ranks: Ranks, batch: Batch, step: StepPlan, weights: tuple[Tensor, Tensor]
) -> tuple[Tensor, Rows, Tensor | None]:
    """(sum of losses, looked-up rows, the head's scored rows where not all are): the last two are leaves.

    weights: of the loss, (mtp (3,), prefix (1,)) float32.
    """
    model = state.model
    rows = look_up(model, state.table, batch, step.tied, train=True)
    x, found = state.train_graph(*train_arguments(state, batch, rows, step))
    copy = None
    if found is not None:
        documents = _documents(batch.cu_seqlens, batch.inputs.numel(), batch.max_document)
        copy = pointer.copy_rows(model, found, batch.inputs, batch.targets, documents, pointer.TRAIN_BLOCK)
    scored = None if batch.candidates is None else model.head.detach()[batch.candidates].requires_grad_()
    loss = losses.train_loss(
        x, model.head if scored is None else scored, batch.targets, batch.candidates, state.prefix_table, *weights,
        losses.softcap(model.config), loss_scale(ranks), state.fp8_head, model.size.padded_vocab, copy,
    )  # fmt: skip
    return loss, rows, scored


def lane_kinds(config: Config) -> list[StepPlan]:
    """One step of each kind of lane that a run of `config` has, in the run's order: what `lane_key` tells apart."""
    found: dict[tuple, StepPlan] = {}
    for number in range(schedule.total_steps(config)):
        step = schedule.at(config, number)
        kind = (step.batch_tokens, step.short_window, step.long_window, step.tied, step.classes)
        found.setdefault(kind, step)
    return list(found.values())


def lane_key(batch: Batch, step: StepPlan) -> tuple:
    """Everything of a lane that is a number to Python, and so is fixed in a graph."""
    shape = (batch.inputs.numel(), batch.cu_seqlens.numel(), batch.max_document)
    classes = 0 if batch.candidates is None else batch.candidates.numel()
    return (*shape, step.short_window, step.long_window, step.tied, classes)


def record_lane(state: State, recorder: Recorder, ranks: Ranks, batch: Batch, step: StepPlan) -> None:
    """Make the graph of all lanes with the key of this one, which has been called before: it compiles nothing."""
    if not state.sums:
        state.sums = [torch.empty_like(parameter) for parameter in _with_gradient(state)]
    if state.table is not None:
        state.table.fetch(batch)

    def body(given: list[Tensor | None]) -> list[Tensor | None]:
        *tensors, mtp, prefix = given
        copied = dataclasses.replace(batch, **dict(zip(BATCH_INPUTS, tensors, strict=True)))
        loss, rows, scored = _forward(state, ranks, copied, step, (mtp, prefix))
        leaves = [scored, *rows, *_with_gradient(state)]
        there = [leaf for leaf in leaves if leaf is not None]
        found = iter(torch.autograd.grad(loss * loss_scale(ranks), there, allow_unused=True))
        return [loss.detach(), *(None if leaf is None else next(found) for leaf in leaves)]

    recorder.record(lane_key(batch, step), _given(batch, step, ranks.device), body)


def lasting_tensors(state: State) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of what lanes read and change besides their batch: none may move while there are graphs."""
    yield from state.model.named_parameters()
    yield from state.model.named_buffers()
    if state.prefix_table is not None:
        yield "prefix table", state.prefix_table
    if state.table is not None:
        yield from state.table.lasting()
    if state.model.fp8 is not None:
        yield from state.model.fp8.lasting()


def _with_gradient(state: State) -> list[torch.nn.Parameter]:
    """The parameters whose gradients come from the graph of a lane: all but the tables whose rows are looked up."""
    tables = {"embed", "embed2", "value_embeds", "bigram"}
    return [parameter for name, parameter in state.model.named_parameters() if name not in tables]


# The fields of a batch that a lane's graph reads.
BATCH_INPUTS = (
    "inputs", "targets", "cu_seqlens", "bigram_rows", "sign_rows", "candidates", "gram_rows", "gram_signs",
    "gram_places", "copy_tokens", "copy_buckets",
)  # fmt: skip


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


def train_arguments(state: State, batch: Batch, rows: Rows, step: StepPlan) -> tuple:
    """What `lane_residual` is called with."""
    return (
        state.model, rows, batch.sign_rows, batch.cu_seqlens, batch.max_document,
        *_windows(step.short_window, step.long_window), state.fp8_mlp or state.model.fp8_qkv,
        look_up_copied(state.model, batch, step.tied),
    )  # fmt: skip


def _loss_weights(step: StepPlan, device: torch.device) -> tuple[Tensor, Tensor]:
    """(mtp (3,), prefix (1,)) float32."""
    return to_device(step.mtp, device), to_device([step.prefix], device)


@torch.no_grad()
def eval_lane(state: State, batch: Batch, tied: bool, windows: tuple[int, int]) -> Tensor:
    """The loss of every token of the lane (T,) float32."""
    if state.table is not None:
        state.table.fetch(batch)
    rows = look_up(state.model, state.table, batch, tied, train=False)
    return state.eval_graph(
        state.model, rows, batch.sign_rows, batch.targets, batch.cu_seqlens, batch.max_document,
        *_windows(*windows), state.allowed, batch.inputs, look_up_copied(state.model, batch, tied),
    )  # fmt: skip


@torch.no_grad()
def next_logits(state: State, batch: Batch, place: int, tied: bool, windows: tuple[int, int]) -> Tensor:
    """(V,) float32: the capped logits of the token after input `place`, or their like, for sampling."""
    model, rows = state.model, look_up(state.model, state.table, batch, tied, train=False)
    documents = _documents(batch.cu_seqlens, batch.inputs.numel(), batch.max_document)
    copied = look_up_copied(model, batch, tied)
    x = model(rows, batch.sign_rows, documents, _windows(*windows), False, copied)
    logits = soft_cap((model.head @ x[place]).float(), losses.softcap(model.config))
    found = pointer.keys(model, x)
    return logits if found is None else pointer.mixed(model, logits, found, batch.inputs, documents, place)


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
        hang.beat()
        found = eval_lane(state, batch, step.tied, windows)
        total += torch.stack([found[:count].double().sum(), total.new_tensor(float(count))])
    if state.table is not None:
        for _ in range(
            batches.rounds - len(batches)
        ):  # ranks that still have a slice want rows of this one's
            state.table.fetch_rows(None)
    ranks.sum(total)
    return (total[0] / total[1]).item()
