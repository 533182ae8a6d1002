"""How fast a training step is: ms a step, tokens/s, MFU. Whole steps: data, model, clipping, optimizer.

    python -m nanogpt.bench --batch_size=32 --tokens_per_step=491520
    python -m nanogpt.bench --dataset=openwebtext
    python -m nanogpt.bench --profile --trace=trace.json
    torchrun --standalone --nproc_per_node=4 -m nanogpt.bench --tokens_per_step=491520
    cd nanogpt && python bench.py --device=cpu --n_layer=4 --n_head=4 --n_embd=128 --block_size=64

Steps are made as train.py makes them. There is no run directory; the last line of the output is JSON for programs.
"""

import sys
from pathlib import Path

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import contextlib
import json
import statistics
import time
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields

from nanogpt.common import compiler
from nanogpt.common.errors import UserError, run_command
from nanogpt.common.flags import knob, parse
from nanogpt.common.machine import world_size_from_environment
from nanogpt.common.peaks import utilisation_words
from nanogpt.config import OPERATORS, Config, Plan, resolve

if typing.TYPE_CHECKING:
    import torch
    from torch.profiler import profile

    from nanogpt.common.ranks import Ranks
    from nanogpt.setup import State

PROG = "python -m nanogpt.bench"
PROFILED_STEPS = 3
Batch = tuple["torch.Tensor", "torch.Tensor"]


@dataclass(frozen=True)
class Bench:
    """The command line of `bench.py`: the knobs of training that its speed depends on, and a few of its own."""

    batch_size: int = knob(12, "sequences in one micro-step on one GPU", low=1, high=1 << 20)
    block_size: int = knob(1024, "context length, in tokens", low=1, high=1 << 20)
    tokens_per_step: int = knob(
        0, "tokens in one optimizer step over all GPUs; 0: one micro-step each", low=0
    )
    n_layer: int = knob(12, "transformer blocks", low=1, high=1000)
    n_head: int = knob(12, "attention heads", low=1, high=1000)
    n_embd: int = knob(768, "width", low=1, high=65536)
    vocab_size: int = knob(50304, "rows of the embedding, where the data do not say", low=2, high=65536)
    bias: bool = knob(False, "biases in the linear layers and the norms")
    dropout: float = knob(0.0, "dropout probability", low=0.0, high=0.95)
    steps: int = knob(20, "timed steps", low=1, high=1_000_000)
    warmup_steps: int = knob(10, "steps before them: compilation, caches, clocks", low=1, high=1_000_000)
    real_data: bool = knob(False, "read the data set as training does, instead of random tokens")
    dataset: str = knob("", "the data set, and --real_data=true with it (default openwebtext)")
    data_root: str = knob("", "folder of the data sets; default: $DATA_ROOT, else data/ of the repository")
    profile: bool = knob(False, "also trace a few steps, for chrome://tracing or ui.perfetto.dev")
    trace: str = knob("bench_trace.json", "the file that --profile writes")
    seed: int = knob(1337, "of weights and tokens", low=0, high=(1 << 31) - 1)
    device: str = knob("auto", "auto, cpu, cuda or cuda:N; auto takes the GPU when there is one")
    dtype: str = knob("auto", "of the activations; auto: bfloat16 on GPUs that have it, float16 on older ones",
                      choices=("auto", "float32", "bfloat16", "float16"))  # fmt: skip
    fp8: bool = knob(False, "8-bit operands in matrix products (Ada, Hopper or later)")
    compile: str = knob("auto", "torch.compile: true, false, or auto (on a GPU only)",
                        choices=("auto", "true", "false", "True", "False"))  # fmt: skip

    def training(self) -> Config:
        """The training configuration that is measured; UserError as for training."""
        shared = {field.name for field in fields(Config)} & {field.name for field in fields(self)}
        values = {name: getattr(self, name) for name in shared} | {"dataset": self.dataset or "openwebtext"}
        return Config(**values)


def main(argv: list[str]) -> int:
    """Build, warm up, measure, print."""
    bench = parse(Bench, argv, prog=PROG, description=__doc__)
    config = bench.training()
    plan = resolve(config, world_size_from_environment())
    if bench.profile and not Path(bench.trace).expanduser().absolute().parent.is_dir():
        raise UserError(f"--trace={bench.trace}: its folder does not exist; create it, or choose another")

    compiler.use_local_folders(OPERATORS)  # before torch is imported
    from nanogpt.common import ranks as ranks_module

    ranks = ranks_module.start(config.device, config.backend)
    measure(bench, config, plan, ranks)
    ranks.wait()
    ranks_module.leave(0)
    return 0


def measure(bench: Bench, config: Config, plan: Plan, ranks: "Ranks") -> None:
    """Make the steps, time them, print the result on the main rank."""
    from nanogpt import setup
    from nanogpt.common import hardware
    from nanogpt.model import GPT, Shape

    device, dtype = ranks.device, hardware.choose_dtype(config.dtype, ranks.device)
    setup.seed_and_tune(config, device)
    vocabulary, batches = open_batches(bench, config, plan, ranks)
    shape = Shape(vocabulary, config.block_size, config.n_layer, config.n_head, config.n_embd, config.bias)
    model = GPT(shape, config.dropout, dtype)
    model.init_weights(config.seed)
    state = setup.prepare(config, model, ranks, dtype)
    began = time.perf_counter()
    for step in range(bench.warmup_steps):
        loss = one_step(config, plan, ranks, state, batches, step)
    warmup_seconds = time.perf_counter() - began
    seconds = []
    with profiled(bench, ranks) if bench.profile else contextlib.nullcontext():
        for step in range(bench.warmup_steps, bench.warmup_steps + (PROFILED_STEPS if bench.profile else 0)):
            one_step(config, plan, ranks, state, batches, step)
    for step in range(bench.warmup_steps, bench.warmup_steps + bench.steps):
        began = time.perf_counter()
        loss = one_step(config, plan, ranks, state, batches, step)
        seconds.append(time.perf_counter() - began)
    if ranks.is_main:
        peak = hardware.peak_flops(device)
        speed = plan.tokens_per_step / statistics.fmean(seconds)
        mfu = hardware.utilisation(speed * model.flops_per_token(), peak, ranks.world_size)
        result = {
            "ms": round(1e3 * statistics.fmean(seconds), 3), "ms_median": round(1e3 * statistics.median(seconds), 3),
            "ms_min": round(1e3 * min(seconds), 3), "ms_max": round(1e3 * max(seconds), 3),
            "tokens_per_s": round(speed), "mfu": mfu, "memory_gib": hardware.memory_gib(device),
            "tokens_per_step": plan.tokens_per_step, "micro_steps": plan.micro_steps,
            "world_size": ranks.world_size, "steps": bench.steps, "warmup_s": round(warmup_seconds, 2),
            "parameters": model.num_parameters(), "data": "random" if reads_no_data(bench) else config.dataset,
            "dtype": str(dtype).removeprefix("torch."), "compiled": state.compiled, "fused": state.fused,
            "attention": state.attention, "device": hardware.describe(device), "loss": loss,
        }  # fmt: skip
        report(result, plan.describe(config).split(";")[0])


def one_step(
    config: Config,
    plan: Plan,
    ranks: "Ranks",
    state: "State",
    batches: Callable[[int, int], Batch],
    step: int,
) -> float:
    """A step as train.py makes it, looked at from outside; its loss. UserError when that is not finite."""
    import torch

    from nanogpt import setup
    from nanogpt.optim import set_learning_rate
    from nanogpt.schedule import learning_rate

    set_learning_rate(state.optimizer, learning_rate(config, step))
    loss_sum = torch.zeros((), device=ranks.device)
    for micro_step in range(plan.micro_steps):
        inputs, targets = batches(step, micro_step)
        loss = state.model(inputs, targets, fused=state.fused)
        state.scaler.scale(loss / plan.micro_steps).backward()
        loss_sum += loss.detach()
    setup.average_gradients(state.raw_model, ranks)
    state.scaler.unscale_(state.optimizer)
    limit = config.grad_clip or float("inf")
    norm = torch.nn.utils.clip_grad_norm_(state.raw_model.parameters(), limit, foreach=True)
    mean = ranks.sum(loss_sum / plan.micro_steps) / ranks.world_size
    setup.guarded_step(state.optimizer, state.scaler, finite=torch.isfinite(mean) & torch.isfinite(norm))
    state.optimizer.zero_grad(set_to_none=True)
    loss, grad_norm = torch.stack([mean, norm]).tolist()  # waits for the device, as training does
    if not setup.is_finite(loss, grad_norm, state.scaler):
        raise UserError(f"step {step}: loss {loss}, gradient norm {grad_norm}: these settings do not train")
    return loss


def reads_no_data(bench: Bench) -> bool:
    """Whether the tokens are random, so that their vocabulary is --vocab_size."""
    return not (bench.real_data or bench.dataset)


def open_batches(
    bench: Bench, config: Config, plan: Plan, ranks: "Ranks"
) -> tuple[int, Callable[[int, int], Batch]]:
    """(rows of the embedding, what gives the batch of a step and a micro-step)."""
    import torch

    from nanogpt import setup
    from nanogpt.batches import TrainBatches
    from nanogpt.common.shards import data_root, open_token_set

    if reads_no_data(bench):
        generator = torch.Generator().manual_seed(config.seed + ranks.rank)
        size = (config.batch_size, config.block_size + 1)
        block = torch.randint(bench.vocab_size, size, generator=generator).to(ranks.device)
        batch = block[:, :-1].contiguous(), block[:, 1:].contiguous()
        return bench.vocab_size, lambda step, micro_step: batch
    token_set = open_token_set(config.dataset, data_root(config.data_root))
    batches = TrainBatches(
        token_set, block_size=config.block_size, batch_size=config.batch_size, micro_steps=plan.micro_steps,
        rank=ranks.rank, world_size=ranks.world_size, seed=config.seed, device=ranks.device,
    )  # fmt: skip
    return setup.vocabulary_of(config, token_set), batches.get


@contextlib.contextmanager
def profiled(bench: Bench, ranks: "Ranks") -> Iterator[None]:
    """Trace what happens inside, and write it to --trace on the main rank. StorageError when that cannot be written."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    from nanogpt.common.storage import storage_errors, temporary_name

    path = Path(bench.trace).expanduser().absolute()
    kinds = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
    with profile(activities=kinds) as profiler:
        yield
    if ranks.is_main:
        temporary = temporary_name(path).with_suffix(".json")  # another suffix would be compressed
        with storage_errors(path):
            temporary.touch()  # the profiler itself is silent about a folder that cannot be written
            profiler.export_chrome_trace(str(temporary))
            temporary.replace(path)
        print(f"trace: {path} (open it in chrome://tracing or ui.perfetto.dev)")
        print_kinds(profiler)


def print_kinds(profiler: "profile") -> None:
    """The ten most expensive kinds of work and the ten most expensive kernels, in ms a step."""
    from nanogpt.common import profiling

    by_name = profiling.time_by_name(profiler)
    print(
        f"{sum(by_name.values()) / PROFILED_STEPS / 1e3:.1f} ms of kernels a step, by kind of work and by name:"
    )
    for line in profiling.table(profiling.time_by_kind(by_name), 10, PROFILED_STEPS):
        print(f"  {line}")
    for line in profiling.table(by_name, 10, PROFILED_STEPS, width=80):
        print(f"    {line}")
    sys.stdout.flush()


def report(result: dict, plan: str) -> None:
    """The result for people, then for programs."""
    memory = "" if result["memory_gib"] is None else f", {result['memory_gib']:.1f} GiB"
    mfu = utilisation_words(result["mfu"])
    print(
        f"{result['device']}; {result['dtype']}; attention: {result['attention']}; compiled: {result['compiled']}"
    )
    print(f"{result['parameters'] / 1e6:.2f} M parameters; {plan}; data: {result['data']}")
    print(
        f"{result['ms']:.1f} ms a step (median {result['ms_median']:.1f}, {result['ms_min']:.1f} to "
        f"{result['ms_max']:.1f}), {result['tokens_per_s']:,} tokens/s, MFU {mfu}{memory}"
    )
    result["mfu"] = None if result["mfu"] == float("inf") else result["mfu"]  # JSON has no infinity
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    run_command(main)
