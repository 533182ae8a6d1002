"""What the training loop needs before its first step and between its steps: building, warming up, resuming, saving."""

import dataclasses
import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from modded_nanogpt import attention_backends, layer_plan, schedule, table_plan
from modded_nanogpt.batches import Batch, TrainBatches, ValBatches
from modded_nanogpt.clock import Clock
from modded_nanogpt.compile_cache import CompileCache, environment
from modded_nanogpt.config import Config, resolve
from modded_nanogpt.fast.capture import Recorder
from modded_nanogpt.kernels import fp8, mlp
from modded_nanogpt.kernels.mlp_weights import Fp8Mlp
from modded_nanogpt.lanes import (
    NEW_PROGRESS,
    State,
    eval_lane,
    lane_kinds,
    lane_losses,
    lane_residual,
    lasting_tensors,
    record_lane,
    train_lane,
)
from modded_nanogpt.model import SpeedrunModel
from modded_nanogpt.model_medium import MediumModel, SnapshotModel
from modded_nanogpt.optim.row_table import RowTable
from modded_nanogpt.optim.sharded import Optimizer
from modded_nanogpt.precompile import Ahead, compile_ahead, graphs, graphs_key
from modded_nanogpt.report import describe
from modded_nanogpt.schedule import StepPlan
from nanogpt.common import hardware
from nanogpt.common.errors import NonFiniteError, UserError
from nanogpt.common.ranks import Ranks
from nanogpt.common.rundir import RunDir
from nanogpt.common.shards import TokenSet, data_root
from nanogpt.common.storage import check_room
from nanogpt.common.training import checked_tokens, latest_checkpoint, repeat_exactly, write_checkpoint

# By `layer_plan.Size.make`.
MODELS = {
    "record": SpeedrunModel,
    "record89": SpeedrunModel,
    "snapshot": SnapshotModel,
    "medium": MediumModel,
}
# Graphs that may be compiled: one a lane size, and tests with many; attention windows are no part of a graph.
GRAPHS = 64


class Prepared(NamedTuple):
    """What the runs of one process share: compiled and warm, with meaningless weights until `start_or_resume`."""

    state: State
    batches: TrainBatches
    val_batches: ValBatches
    token_set: TokenSet
    keep_caches: Callable[[], None]  # packs what was compiled for later jobs; takes seconds


def prepare(run: RunDir, config: Config, ranks: Ranks, before: Prepared | None) -> Prepared:
    """Everything that comes before the weights. `before`: of another seed's run in this process, which has the same."""
    plan, place = resolve(config, ranks.world_size), (ranks.rank, ranks.world_size, ranks.device)
    token_set = before.token_set if before else checked_tokens(config, ranks, run.say)
    run.say(f"{token_set.folder}: {token_set.num_tokens('train'):,} training tokens, checked")
    if before:
        before.state.start_again()
        before.batches.restart()
        for line in describe(config, plan, before.state, ranks):
            run.say(line)
        run.say("warm-up: that of the process's first run; this one starts from fresh weights as well")
        return before
    caches = restore_caches(config, run, ranks)
    batches, val_batches = TrainBatches(token_set, config, *place), ValBatches(token_set, config, *place)
    needed = graphs(config, batches, val_batches)
    ahead = compile_ahead(config, run, ranks, caches, needed)
    state = build(config, ranks)
    for line in describe(config, plan, state, ranks):
        run.say(line)
    repeated = batches.plan.repeats_from()
    if repeated is not None and state.table is not None:
        run.say(
            f"note: from step {repeated:,} on the text is repeated, and the table of n-grams learns repeated text by "
            "heart, so the validation loss suffers; take more text, or --table_rows=0"
        )
    _check_space(config, state, run, ranks)
    if config.warmup:
        warm_up(config, state, ranks, batches, val_batches, run.say, ahead)

    def keep_caches() -> None:
        if config.warmup and caches and ranks.is_main:
            caches.keep(graphs_key(config, needed))

    return Prepared(state, batches, val_batches, token_set, keep_caches)


def _check_space(config: Config, state: State, run: RunDir, ranks: Ranks) -> None:
    """Say how large checkpoints are. StorageError when the disk has no room for one."""
    last = sum(tensor.numel() * tensor.element_size() for tensor in state.model.parameters())
    table = "" if state.table is None else ", without the table of n-grams (--save_table=true keeps it)"
    if state.table is not None and table_plan.is_saved(config):
        last += ranks.world_size * table_plan.share_bytes(
            config, ranks.world_size, state.model.head.element_size()
        )
        table = ", with the table of n-grams"
    sizes = state.optimizer.sizes
    whole = last + ranks.world_size * sum(size for name, size in sizes.items() if name != "n-gram table")
    if table_plan.is_saved(config):
        run.say(f"a checkpoint takes {whole / 2**30:.2f} GiB, the last one {last / 2**30:.2f} GiB{table}")
    else:
        run.say(f"no checkpoint before the last one, which takes {last / 2**30:.2f} GiB{table}")
    with ranks.main_only():
        if ranks.is_main:
            check_room(run.folder, whole if table_plan.is_saved(config) else last)


def build(config: Config, ranks: Ranks, compile_with: str | Callable = "inductor") -> State:
    """Model, optimizer and graphs, without meaningful weights yet. UserError for what this GPU cannot do.

    compile_with: a backend of torch.compile; with another than inductor there is no optimizer (`precompile`).
    """
    device = ranks.device
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    torch.manual_seed(config.seed)
    if config.deterministic:
        repeat_exactly()
    if config.memory_gib and device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, config.memory_gib * 2**30 / total), device)
    backend = attention_backends.choose(config.attention, device, dtype)
    low_precision = fp8.choose(config.fp8, device)
    model = MODELS[layer_plan.size(config).make](config, backend, device, dtype)
    optimizer = table = None
    if compile_with == "inductor":
        table = RowTable(config, ranks, dtype) if layer_plan.table_rows(config) else None
        optimizer = Optimizer(dict(model.named_parameters()), config, ranks, device, table)
    if low_precision.mlp and (config.fp8_up or config.fp8_down):
        backward = config.fp8_up and config.fp8_down and config.fp8_backward
        model.fp8 = Fp8Mlp(model.mlp_bank, config.fp8_up, config.fp8_down, backward)
    model.fp8_qkv = low_precision.head and config.fp8_qkv
    compiled = config.compile == "true" or (config.compile == "auto" and device.type == "cuda")
    train_graph, eval_graph = lane_residual, lane_losses
    if compiled:
        from torch._functorch import config as functorch_config

        mlp.before_compiling()
        torch._dynamo.config.recompile_limit = GRAPHS
        # The backward pass with the forward pass, not at its first use: then both are kept together, and a process that
        # only compiles (`precompile`) leaves both.
        functorch_config.force_non_lazy_backward_lowering = True
        train_graph = torch.compile(lane_residual, fullgraph=True, dynamic=False, backend=compile_with)
        eval_graph = torch.compile(lane_losses, fullgraph=True, dynamic=False, backend=compile_with)
    return State(
        model, optimizer, train_graph, eval_graph, backend, low_precision.head and config.fp8_head,
        model.fp8 is not None, compiled, *_vocabulary_tables(config, model, device), model.fp8 and model.fp8.tensors(),
        low_precision.why, table,
    )  # fmt: skip


def record_graphs(
    config: Config, state: State, ranks: Ranks, batches: TrainBatches, say: Callable[[str], None]
) -> None:
    """With --capture: every kind of lane of the run as a CUDA graph. Lanes of these sizes have been called before."""
    if config.capture == "false" or ranks.device.type != "cuda":
        if config.capture == "true":
            raise UserError(f"--capture=true: needs a GPU, the device is {ranks.device}; use --capture=auto")
        return
    if state.backend.name == "reference":  # it reads the documents' ends on the CPU
        if config.capture == "true":
            raise UserError("--capture=true: --attention=reference cannot be recorded; use --attention=auto")
        say("warm-up: no CUDA graphs of lanes: --attention=reference cannot be recorded")
        return
    began, recorder = time.perf_counter(), Recorder(ranks.device, partial(lasting_tensors, state))
    for step in lane_kinds(config):
        record_lane(state, recorder, ranks, batches.get(step.step, 0), step)
    recorder.seal()
    state.recorder = recorder  # from here on lanes are replayed
    say(f"warm-up: {len(recorder.recordings)} CUDA graphs of lanes after {time.perf_counter() - began:.1f} s")


@torch.no_grad()
def randomize(state: State, seed: int) -> None:
    """Weights of the warm-up: those of step 0 and a little noise, so that none is zero and no gradient is.

    Noise alone shrinks the residual in every layer, and its gradients may grow beyond every number.
    """
    state.model.init_weights(seed)
    for parameter in state.model.parameters():
        parameter.add_(torch.randn_like(parameter), alpha=0.02)
    if state.fp8_mlp:  # the scales' memory may hold anything: no lane is to compute with NaN
        state.model.fp8.refresh(exact=True)


def restore_caches(config: Config, run: RunDir, ranks: Ranks) -> CompileCache | None:
    """This node's compile caches, filled by its first rank from what earlier jobs packed; None when none are kept."""
    device = ranks.device
    uses = device.type == "cuda" or config.compile == "true"
    if not uses or config.compile_cache == "none":
        return None
    gpu = "cpu"
    if device.type == "cuda":
        gpu = f"{torch.cuda.get_device_name(device)} {torch.cuda.get_device_capability(device)}"
    default = data_root(config.data_root) / "compile-caches"
    folder = Path(config.compile_cache).expanduser().absolute() if config.compile_cache else default
    caches = CompileCache(folder, environment(torch.__version__, gpu), run.config["source_sha256"], run.say)
    if ranks.local_rank == 0:
        caches.restore()
    ranks.wait()
    return caches


def _vocabulary_tables(
    config: Config, model: SpeedrunModel, device: torch.device
) -> tuple[Tensor | None, Tensor | None]:
    """(prefix table, canonical table) of GPT-2's tokens, as far as the config uses them."""
    if not (config.prefix or config.canonical):
        return None, None
    from modded_nanogpt.vocabulary import canonical_table, gpt2_tokens, prefix_table

    tokens, rows = gpt2_tokens(data_root(config.data_root)), model.size.padded_vocab
    prefix = torch.from_numpy(prefix_table(tokens, rows)).to(device) if config.prefix else None
    return prefix, torch.from_numpy(canonical_table(tokens, rows)).to(device) if config.canonical else None


def lanes_and_updates(state: State, ranks: Ranks, batch: Batch, step: StepPlan) -> None:
    """One lane and one update of each kind that a run has, like those of `step`; the weights are meaningless then."""
    for adam, tied, untie in ((False, True, False), (True, True, True), (True, False, False)):
        table = schedule.TABLE_EARLY if adam and state.table is not None else None
        kind = dataclasses.replace(step, adam=adam, tied=tied, untie=untie, table=table)
        train_lane(state, ranks, batch, kind)
        state.optimizer.step(kind)
        refresh_fp8(state, ranks, kind.exact_fp8)


def warm_up(
    config: Config,
    state: State,
    ranks: Ranks,
    batches: TrainBatches,
    val_batches: ValBatches,
    say: Callable[[str], None],
    ahead: Ahead | None = None,
) -> None:
    """Compile and launch whatever the run will launch. The weights are meaningless afterwards.

    The rules leave this untimed as long as the run then starts from a state that knows nothing of it. `ahead`: who
    compiles graphs beside this process.
    """
    *lane_graphs, eval_graph = graphs(config, batches, val_batches)
    randomize(state, config.seed)
    began = time.perf_counter()
    for graph in lane_graphs:
        if ahead:
            ahead.wait(graph)
        batch = batches.get(graph.step, 0)
        lanes_and_updates(state, ranks, batch, schedule.at(config, graph.step))
        if ahead:
            ahead.wait_for_rehearsal()  # larger lanes need its memory
        say(
            f"warm-up: lanes of {batch.inputs.numel():,} tokens ready after {time.perf_counter() - began:.1f} s"
        )
    sizes = {(step.batch_tokens, step.classes) for step in (schedule.at(config, g.step) for g in lane_graphs)}
    for step in lane_kinds(config):  # other numbers of classes: kernels of the head alone
        if (step.batch_tokens, step.classes) not in sizes:
            sizes.add((step.batch_tokens, step.classes))
            train_lane(state, ranks, batches.get(step.step, 0), step)
            if state.table is not None:
                state.table.forget()
    state.optimizer.reset()
    randomize(state, config.seed)  # after a dozen steps at any rate a backward pass may overflow
    record_graphs(config, state, ranks, batches, say)
    if ahead:
        ahead.wait(eval_graph)
    for batch, _ in val_batches:
        eval_lane(state, batch, True, schedule.final_window(config))
        break
    else:
        if state.table is not None:  # other ranks want rows of this one's
            state.table.fetch_rows(None)
    state.optimizer.reset()
    batches.restart()
    ranks.wait()
    if state.compiled:
        from torch._dynamo.utils import counters  # there by now; importing it takes a second

        counts = counters["inductor"]
        say(
            f"warm-up: {counts['fxgraph_cache_hit']} graphs found in the compile caches, "
            f"{counts['fxgraph_cache_miss']} compiled, {counts['fxgraph_cache_bypass']} that torch cannot keep"
        )
    peak = hardware.memory_gib(ranks.device)
    most = "" if peak is None else f" and at most {peak:.1f} GiB of GPU memory"
    took = f"{time.perf_counter() - began:.1f} s{most}"
    say(f"warm-up done in {took}; the run starts from fresh weights")


def start_or_resume(config: Config, state: State, run: RunDir, ranks: Ranks, batches: TrainBatches) -> None:
    """The weights of step 0, or those, the optimizer and the data position of the run's last sound checkpoint."""
    state.model.init_weights(config.seed)
    checkpoint = latest_checkpoint(run, ranks)
    if checkpoint is not None:
        state.model.load_state_dict(checkpoint.tensors("model"), strict=True)
        saved, optimizer = checkpoint.state, checkpoint.tensors("optimizer")
        if optimizer:
            state.optimizer.load(optimizer, str(checkpoint.path))
            if state.table is not None:
                state.table.load(checkpoint.tensors("table"), str(checkpoint.path))
        elif saved["step"] < schedule.total_steps(config):
            raise UserError(
                f"{checkpoint.path}: the end of a shorter run, saved without the optimizer's state; to train longer, "
                "start another run with these --steps"
            )
        state.progress |= {key: math.inf if saved[key] is None else saved[key] for key in NEW_PROGRESS}
        state.resumed = True
        changed = batches.restore(saved["batches"])
        if changed:
            run.say(f"note: {changed}")
        run.say(f"attempt {run.attempt}: resumed from {checkpoint.path.name}")
    elif run.attempt > 1:
        run.say(f"attempt {run.attempt}: no checkpoint was saved; the run starts again from its seed")
    step = state.progress["step"]
    state.model.rotary.follow(list(schedule.yarn_windows(config, max(0, step - 1))))
    if state.fp8_mlp:  # scales are part of the state: the losses depend on them
        state.model.fp8.load(checkpoint.tensors("fp8") if checkpoint else state.fp8_start)
        if checkpoint is None:
            state.model.fp8.refresh(exact=True)


def refresh_fp8(state: State, ranks: Ranks, exact: bool) -> None:
    """New 8-bit copies of the MLPs' weights after an update; the scales are the same on all ranks."""
    if not state.fp8_mlp:
        return
    several = ranks.world_size > 1
    state.model.fp8.refresh(exact, partial(dist.all_reduce, op=dist.ReduceOp.MAX) if several else None)


def save(
    config: Config, state: State, run: RunDir, ranks: Ranks, batches: TrainBatches, at_end: bool
) -> None:
    """Write a checkpoint of this moment, at the end without the optimizer; all ranks call it.

    NonFiniteError, StorageError.
    """
    with ranks.main_only():
        if ranks.is_main:
            run.check_fence()
    optimizer = {} if at_end else state.optimizer.tensors()
    parts = {"model": dict(state.model.named_parameters()), "optimizer": optimizer}
    if state.fp8_mlp:
        parts["fp8"] = state.model.fp8.tensors()
    if state.table is not None and table_plan.is_saved(config):
        parts["table"] = state.table.tensors()
    with ranks.main_only():
        if ranks.is_main:
            _write(config, state, run, parts, batches.state())


def _write(
    config: Config, state: State, run: RunDir, parts: dict[str, dict[str, Tensor]], position: dict
) -> None:
    progress = {key: None if value == math.inf else value for key, value in state.progress.items()}
    step = state.progress["step"]
    finite = [torch.isfinite(tensor).all() for tensor in parts["model"].values()]
    if not bool(torch.stack(finite).all()):
        raise NonFiniteError(
            f"{run.folder}: step {step}: the weights are not finite; nothing was saved, earlier checkpoints stay; "
            "lower --muon_lr or --adam_lr"
        )
    record = {
        **progress,
        "seed": config.seed,
        "attempt": run.attempt,
        "data": run.config.get("data"),
        "batches": position,
    }
    write_checkpoint(run, step, parts, record, config.keep_checkpoints)


def save_is_due(config: Config, step: int, clock: Clock) -> bool:
    """Whether rank 0 wants a checkpoint after `step` steps: by their number, or by the clock; never a useless one."""
    if not table_plan.is_saved(config):
        return False
    by_step = bool(config.save_interval) and step % config.save_interval == 0
    by_clock = bool(config.save_minutes) and time.monotonic() - clock.saved > 60 * config.save_minutes
    if by_step or by_clock:
        clock.saved = time.monotonic()
    return by_step or by_clock
