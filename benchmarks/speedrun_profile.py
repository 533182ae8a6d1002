"""Where a lane's time goes: milliseconds by kind of work, for each stage, forward, backward and optimizer, on one GPU.

python benchmarks/speedrun_profile.py --dataset=/path/of/tokens              # a table a stage
python benchmarks/speedrun_profile.py --dataset=/path/of/tokens --kernels=40 # and the longest kernels by name
python benchmarks/speedrun_profile.py --dataset=/path/of/tokens --flags="--fp8=off" --trace=trace.json
"""

import dataclasses
import shlex
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)

from modded_nanogpt import compile_cache, train_gpt
from nanogpt.common import compiler, profiling
from nanogpt.common.errors import UserError, run_command
from nanogpt.common.flags import knob, parse, parse_values


@dataclass(frozen=True)
class Options:
    """The command line."""

    dataset: str = knob("", "folder with <name>_train_*.bin and <name>_val_*.bin")
    flags: str = knob("", "further flags of the trainer, as a shell would split them")
    lanes_each: int = knob(4, "lanes that are profiled in each stage", low=1, high=64)
    kernels: int = knob(0, "also list so many kernels by name", low=0, high=1000)
    trace: str = knob("", "write the trace of the last stage here, for chrome://tracing")


def main(argv: list[str]) -> None:
    """Build what the trainer builds, warm it up, profile a few lanes and updates of each stage."""
    options = parse(Options, argv, prog="benchmarks/speedrun_profile.py", description=__doc__)
    if not options.dataset:
        raise UserError("--dataset=: name a folder of token shards")
    compiler.use_local_folders(compile_cache.operators())  # before torch is imported
    train_gpt.choose_allocator()
    import torch

    if not torch.cuda.is_available():
        raise UserError("--dataset: this machine has no GPU that torch can use; run it where there is one")
    from modded_nanogpt import schedule, setup, table_plan
    from modded_nanogpt.batches import TrainBatches, ValBatches
    from modded_nanogpt.config import PRESETS, Config
    from nanogpt.common import ranks as ranks_module
    from nanogpt.common import training
    from nanogpt.common.machine import gpu_memory

    words = [f"--dataset={Path(options.dataset).resolve()}", "--steps=105", "--extension_steps=6", "--data_passes=9",
             "--eval_tokens=262144", *shlex.split(options.flags)]  # fmt: skip
    config = Config(**parse_values(Config, words, prog="trainer", description="", presets=PRESETS))
    ranks = ranks_module.start("cuda", "auto")
    config = table_plan.settle(config, 1, gpu_memory())
    token_set = training.checked_tokens(config, ranks, print)
    began = time.perf_counter()
    state = setup.build(config, ranks)
    place = (0, 1, ranks.device)
    batches, val_batches = TrainBatches(token_set, config, *place), ValBatches(token_set, config, *place)
    setup.warm_up(config, state, ranks, batches, val_batches, print)
    print(f"built and warm after {time.perf_counter() - began:.1f} s", flush=True)
    state.model.init_weights(config.seed)
    if state.fp8_mlp:  # as `setup.start_or_resume` does
        state.model.fp8.load(state.fp8_start)
        state.model.fp8.refresh(exact=True)
    for stage in schedule.stages(config)[:3]:
        profile_stage(options, config, state, ranks, batches, stage)


def profile_stage(options: Options, config, state, ranks, batches, stage) -> None:
    """Time and profile lanes and one Adam and one other update of a stage; print the table."""
    import torch

    from modded_nanogpt import lanes, schedule, setup

    if state.table is not None:
        state.table.forget()
    step = schedule.at(config, stage.start)
    ready = [batches.get(stage.start, number) for number in range(options.lanes_each)]
    for batch in ready:
        lanes.train_lane(state, ranks, batch, step)
    torch.cuda.synchronize()
    began = time.perf_counter()
    for batch in ready:
        lanes.train_lane(state, ranks, batch, step)
    torch.cuda.synchronize()
    lane_ms = 1e3 * (time.perf_counter() - began) / len(ready)
    print(
        f"\nstage {stage.name}: lanes of {stage.batch_tokens // 8:,} tokens, {lane_ms:.2f} ms a lane without profiler"
    )
    for what, number in (("lane", len(ready)), ("update", 2)):
        activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities) as profiler:
            for index in range(number):
                if what == "lane":
                    lanes.train_lane(state, ranks, ready[index], step)
                    continue
                odd = schedule.at(config, stage.start + index)  # one update with Adam, one without
                odd = dataclasses.replace(
                    odd, table=schedule.TABLE_EARLY if odd.adam and state.table else None
                )
                lanes.train_lane(state, ranks, ready[0], odd)
                torch.cuda.synchronize()
                state.optimizer.step(odd)
                setup.refresh_fp8(state, ranks, odd.exact_fp8)
            torch.cuda.synchronize()
        print_table(options, what, profiler, number)
    if options.trace:
        profiler.export_chrome_trace(options.trace)


def print_table(options: Options, what: str, profiler, number: int) -> None:
    """Milliseconds of GPU time by kind of work, for one lane or update (updates: with one lane each)."""
    names = profiling.time_by_name(profiler)
    total = sum(names.values())
    print(
        f"  {what}{' (and its lane)' if what == 'update' else ''}: {total / number / 1e3:.2f} ms of kernels"
    )
    for line in profiling.table(profiling.time_by_kind(names), 100, number):
        print(f"    {line}")
    for line in profiling.table(names, options.kernels, number, width=100):
        print(f"      {line}")
    sys.stdout.flush()


if __name__ == "__main__":
    run_command(main)
