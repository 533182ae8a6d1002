"""Train the speedrun's model: GPT-2's size on FineWeb to a validation loss of 3.28, on 1, 2, 4 or 8 GPUs of one node.

    torchrun --standalone --nproc_per_node=8 modded_nanogpt/train_gpt.py        # or: cd modded_nanogpt && ./run.sh
    python -m modded_nanogpt.train_gpt --check=true                             # what would run, without a GPU
    python -m modded_nanogpt.train_gpt tiny --dataset=python_source --vocab_size=128 --prefix=false      # on a CPU
    torchrun --standalone --nproc_per_node=8 -m modded_nanogpt.train_gpt --xsa=false --out_dir=out/without-xsa

The clock runs from the first step to the last and stands while the model is validated; compiling and warming up come
before it. The run directory (--out_dir) is described in docs/run-directory.md, the techniques in docs/speedrun.md.
"""

import sys
from pathlib import Path

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import contextlib
import dataclasses
import gc
import json
import math
import os
import typing

from modded_nanogpt import compile_cache, layer_plan, many_runs, schedule, table_plan
from modded_nanogpt.config import FREE, PRESETS, Config, Plan, made_for_gpt2, resolve
from modded_nanogpt.layer_plan import CPU_RECIPES
from nanogpt.common import compiler, rundir
from nanogpt.common.errors import EXIT_INTERRUPTED, NonFiniteError, UserError, run_command
from nanogpt.common.flags import flag_given, parse_values
from nanogpt.common.launch import SMOKE_STEPS, Trainer, open_run, rank_zero_speaks, smoke_values
from nanogpt.common.machine import gpu_memory, has_nvidia_driver, world_size_from_environment

if typing.TYPE_CHECKING:
    from modded_nanogpt.setup import Prepared
    from nanogpt.common.ranks import Ranks
    from nanogpt.common.stop import StopRequest

PROG = "python -m modded_nanogpt.train_gpt"
ALLOCATOR_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")  # the second is the older name
SMALL_DATA = 1 << 28  # bytes that are read and checked before the run directory is made; more by all ranks


def inspect(config: Config) -> tuple[Config, dict]:
    """Check what needs no GPU: the plan and the data. Prints the plan when that is all the user wants."""
    from modded_nanogpt.data_plan import check_targets, check_validation, plan_data
    from modded_nanogpt.vocabulary import gpt2_tokens
    from nanogpt.common.shards import data_root, open_token_set, verify
    from nanogpt.common.tokenizer import tokens_of

    world_size = world_size_from_environment()
    resolve(config, world_size)
    _refuse_missing_gpu(config)
    config = table_plan.settle(config, world_size, _gpu_memory(config))
    plan = resolve(config, world_size)
    root = data_root(config.data_root)
    token_set = open_token_set(config.dataset, root)
    data_plan = plan_data(token_set, config)
    check_targets(data_plan, token_set, config)
    check_validation(token_set, config)
    names = made_for_gpt2(config)
    if names and token_set.tokenizer == "char":
        raise UserError(
            f"--{names[0]}=true: is made for GPT-2's tokens, {token_set.folder} has characters; --{names[0]}=false"
        )
    if names:
        gpt2_tokens(root)  # UserError when the vocabulary is not there and cannot be had
    if sum(shard.bytes for shard in token_set.shards) <= SMALL_DATA:
        verify(token_set)
    if config.check:
        print(plan.describe(config))
        for line in table_plan.describe(config, world_size, itemsize=2 if has_nvidia_driver() else 4):
            print(line)
        print(data_plan.describe(token_set, config))
    config = dataclasses.replace(config, data_root=str(root))
    details = {
        "plan": dataclasses.asdict(plan),
        "data": token_set.fingerprint(),
        "tokens": tokens_of(token_set),
    }
    return config, details


TRAINER = Trainer(
    Config,
    Path(__file__).resolve().parents[1],
    ("modded_nanogpt", "nanogpt"),
    "modded_nanogpt/train_gpt.py",
    FREE,
    inspect,
    steps=schedule.total_steps,
)


def _refuse_missing_gpu(config: Config) -> None:
    none = not has_nvidia_driver()
    if none and config.fp8 == "force":
        raise UserError("--fp8=force: this machine has no NVIDIA GPU; use --fp8=auto or --fp8=off")
    if none and (
        config.device.startswith("cuda") or (config.device == "auto" and config.recipe not in CPU_RECIPES)
    ):
        raise UserError(
            f"--device={config.device}: this machine has no NVIDIA GPU, and --recipe={config.recipe} needs one; ask "
            f"SLURM for one, or try the preset that is made for CPUs: {PROG} tiny"
        )


def _gpu_memory(config: Config) -> int | None:
    """Bytes that each rank may use of its GPU; None without one. UserError when the table needs to know, and cannot."""
    if config.device == "cpu" or not has_nvidia_driver():
        return None
    found = gpu_memory()
    depends = config.table_rows == "auto" and layer_plan.table_rows(config)
    if found is None and depends and config.recipe not in CPU_RECIPES:
        raise UserError(
            "--table_rows=auto: nvidia-smi does not say how much memory the GPU has; give a number, such as "
            "--table_rows=20000000"
        )
    return found if found is None or not config.memory_gib else min(found, int(config.memory_gib * 2**30))


def main(argv: list[str], default_preset: str = "record") -> int:
    """Open the run, or the first of --runs, continue in its copy of the source, train."""
    folder = rundir.running_from_copy(Path(__file__))
    if folder is not None:
        return go_on(folder, json.loads(argv[1]) if argv[1:] else [])
    with rank_zero_speaks():
        runs = many_runs.runs_of(values_of(argv, default_preset))
    left = many_runs.unfinished(runs) if runs[1:] else runs
    folder = open_run(TRAINER, left[0], argv) if left else None
    if folder is not None:
        rundir.enter_copy(folder, TRAINER.entry, *([json.dumps(runs)] if runs[1:] else []))
    if not left and os.environ.get("RANK", "0") == "0":
        print(f"all {len(runs)} runs are finished; to start anew: --overwrite=true, or another --out_dir")
        many_runs.say_together(runs, print)
    return 0


def values_of(argv: list[str], default_preset: str) -> dict[str, object]:
    """The knobs that presets and flags set. UserError for whatever they may not be."""
    named = any(not word.startswith("-") for word in argv)
    words = argv if named else [default_preset, *argv]
    values = parse_values(Config, words, prog=PROG, description=__doc__, presets=PRESETS)
    out_dir = Path(str(values.get("out_dir", Config.out_dir))).expanduser()
    values["out_dir"] = str(out_dir if flag_given(argv, "out_dir") else TRAINER.root / out_dir)
    if not values.get("smoke"):
        return values
    recipe = str(values.get("recipe", Config.recipe))
    if values.get("device") == "cpu" or not has_nvidia_driver():
        small_one = "tiny" if recipe == "record" else f"tiny_{recipe}"  # the same layers, narrower
        recipe = small_one if small_one in CPU_RECIPES else recipe
    least = len(schedule.STAGES[recipe].stages)  # every stage has a step
    small = {
        "recipe": recipe, "steps": max(least, SMOKE_STEPS - 1), "extension_steps": 1, "eval_tokens": 1024,
        "eval_slice": 512, "lanes": max(2, world_size_from_environment()), "log_interval": 1, "warmup": False,
        "compile": "false", "capture": "false", "compile_cache": "none", "data_passes": 1000, "wandb_log": False,
    }  # fmt: skip
    small |= {"sampled_softmax": False} if recipe in CPU_RECIPES else {}  # of GPT-2's vocabulary only
    return smoke_values(values, argv, small)


def go_on(first: Path, runs: list[many_runs.Values]) -> int:
    """Train the run that `open_run` has opened in `first`, then the rest of `runs` (--runs); the exit status."""
    compiler.use_local_folders(compile_cache.operators())  # before torch is imported
    choose_allocator()
    import torch

    from modded_nanogpt import setup
    from nanogpt.common import hang
    from nanogpt.common import ranks as ranks_module
    from nanogpt.common.stop import StopRequest

    config, stop = Config(**rundir.read_json(first / "config.json")["config"]), StopRequest()
    ranks = ranks_module.start(config.device, config.backend, config.num_threads)
    prepared, status, watch = None, 0, hang.Watch(first, ranks)
    for values in [None, *many_runs.others(runs, first)]:
        if values and ranks.sum(torch.tensor(float(stop.look()), device=ranks.device)).item():
            status = EXIT_INTERRUPTED
        if status:
            break
        folder = open_run(TRAINER, values, sys.argv[1:]) if values else first
        if folder is None:
            continue  # it has been finished meanwhile
        run = rundir.RunDir(folder, writes=ranks.is_main)
        config, stop.stop_file = Config(**run.config["config"]), folder / "stop" if ranks.is_main else None
        with contextlib.closing(run):
            prepared = setup.prepare(run, config, ranks, prepared)
            status = train(run, config, resolve(config, ranks.world_size), ranks, prepared, stop)
            if folder == first:
                prepared.keep_caches()
    ranks.wait()  # for rank 0 to have saved: when one rank leaves with 75, torchrun ends the others
    stop.done()
    watch.close()
    if runs and not status and ranks.is_main:
        many_runs.say_together(runs, print)
    ranks_module.leave(status)
    return status


def choose_allocator() -> None:
    """Let torch grow its pieces of GPU memory: those that fit one stage's lanes are too small for the next one's.

    What the environment says stays. WSL refuses such memory at the first allocation. Before torch is imported.
    """
    if not any(name in os.environ for name in ALLOCATOR_VARIABLES) and not Path("/dev/dxg").exists():
        os.environ[ALLOCATOR_VARIABLES[0]] = "expandable_segments:True"


def train(
    run: rundir.RunDir, config: Config, plan: Plan, ranks: "Ranks", prepared: "Prepared", stop: "StopRequest"
) -> int:
    """From the weights of step 0, or the last checkpoint's, to the last line of the log; the exit status."""
    from modded_nanogpt import lanes, report, rules, setup
    from modded_nanogpt.clock import Clock, Messages
    from nanogpt.common import hang, hardware, tracking

    state, batches, val_batches, token_set, _ = prepared
    setup.start_or_resume(config, state, run, ranks, batches)
    flops, peak = report.flops_per_token(config), hardware.peak_flops(ranks.device)
    progress, clock, messages = state.progress, Clock(ranks, state.progress["train_ms"]), Messages(ranks)
    run.record(
        "resume" if state.resumed else "start",
        step=progress["step"],
        world_size=ranks.world_size,
    )
    saved_step = progress["step"] if state.resumed else -1
    resumable = table_plan.is_saved(config)
    asked_to_stop, save_due, last_ms = False, False, progress["train_ms"]

    def save() -> None:
        nonlocal saved_step
        setup.save(config, state, run, ranks, batches, at_end)
        run.record("save", step=progress["step"])
        saved_step = progress["step"]

    def look_back(everything: bool = False) -> None:
        """Say what the messages of some steps ago held; all ranks act on it together."""
        nonlocal asked_to_stop, save_due, last_ms
        for about, (loss, wants_stop, wants_save) in messages.read(everything):
            step, mean = about["step"], loss / about["tokens"]
            if not math.isfinite(mean):
                kept = (
                    f"the checkpoint of step {saved_step} stays"
                    if saved_step >= 0
                    else "there is no checkpoint yet"
                )
                ranks.fail(
                    NonFiniteError(
                        f"{run.folder}: step {step}: loss {mean}: stopped; {kept}; lower --muon_lr"
                    )
                )
            asked_to_stop, save_due = asked_to_stop or wants_stop > 0, save_due or wants_save > 0
            ms, last_ms = about["train_ms"] - last_ms, about["train_ms"]
            speed = 1e3 * about["tokens"] / max(ms, 1e-6)
            mfu = hardware.utilisation(speed * flops, peak, ranks.world_size)
            if step % config.log_interval == 0 or step + 1 == plan.total_steps:
                run.record(
                    "train", step=step, loss=mean / about["weights"], lr=about["lr"], ms=round(ms, 3),
                    train_ms=round(about["train_ms"], 3), tokens_per_s=round(speed), mfu=mfu,
                    memory_gib=hardware.memory_gib(ranks.device), tokens=about["total"],
                )  # fmt: skip
                run.say(
                    report.step_line(plan, step, mean / about["weights"], about["train_ms"], ms, speed, mfu)
                )

    gc.collect()  # not in the middle of the run
    compiled = report.graphs_compiled()
    clock.start()
    while True:
        step = progress["step"]
        at_end = step >= plan.total_steps
        look_back(everything=at_end)
        if (
            (at_end or (step % config.eval_interval == 0 and not config.smoke))
            and not asked_to_stop
            and progress["val_step"] != step
        ):
            if at_end:
                state.optimizer.average()  # on the clock, like everything that the result needs
            progress["train_ms"] = clock.stop()
            look_back(everything=True)
            last_ms = progress["train_ms"]
            val_loss = lanes.evaluate(
                config, state, val_batches, ranks, schedule.at(config, step), last=at_end
            )
            if not math.isfinite(val_loss):
                ranks.fail(
                    NonFiniteError(f"{run.folder}: step {step}: validation loss {val_loss}; lower --muon_lr")
                )
            progress.update(val_step=step, val_loss=val_loss)
            run.record(
                "val", step=step, val_loss=val_loss, tokens=progress["tokens"], train_ms=progress["train_ms"]
            )
            record = rules.record_loss(config, step)
            beside = "" if record is None else f" (the record's run: {record:.3f})"
            run.say(
                f"step {step}/{plan.total_steps}: val loss {val_loss:.4f}{beside}, {progress['train_ms'] / 1e3:.2f} s"
            )
            if not at_end:
                clock.start()
        # Between updates gradients are waiting, which several ranks would round in saving: not there.
        whole = at_end or not state.optimizer.pending or not resumable
        wanted = at_end or ((save_due or asked_to_stop) and resumable)
        if wanted and whole and saved_step != step and step > 0:
            look_back(everything=True)
            # A save in the middle of the run is timed like everything else.
            progress["train_ms"] = clock.now()
            save()
            save_due = False
        if at_end or (asked_to_stop and whole):
            break

        # One optimizer step: the lanes of this rank, then the update. Nothing here waits for the device.
        hang.beat()
        today = schedule.at(config, step)
        if today.yarn_window != schedule.at(config, max(0, step - 1)).yarn_window:
            state.model.rotary.follow(list(schedule.yarn_windows(config, step)))
        losses = [
            lanes.train_lane(state, ranks, batches.get(step, micro_step), today)
            for micro_step in range(plan.micro_steps)
        ]
        state.optimizer.step(today)
        setup.refresh_fp8(state, ranks, today.exact_fp8)
        progress["step"] += 1
        progress["tokens"] += today.batch_tokens
        wants_save = ranks.is_main and setup.save_is_due(config, step + 1, clock)
        about = {
            "step": step, "tokens": today.batch_tokens, "total": progress["tokens"], "lr": today.lr,
            "weights": sum(today.mtp) + today.prefix, "train_ms": clock.now(),
        }  # fmt: skip
        messages.send(about, sum(losses), [stop.look(), wants_save])

    status = "finished" if at_end else "stopped" if stop.reason == "stop file" else "interrupted"
    against = rules.reasons_against(
        config, plan, resumed=state.resumed, val_tokens=val_batches.num_tokens, has_manifest=token_set.has_manifest,
        val_loss=progress["val_loss"],
    )  # fmt: skip
    if at_end:
        for line in report.closing_lines(plan, progress, against):
            run.say(line)
    else:
        by_file = f"rm {run.folder}/stop; " if stop.reason == "stop file" else ""
        again = "checkpoint saved; go on with:" if resumable else (
            "nothing saved, since checkpoints leave out so large a table of n-grams without --save_table=true; the "
            "same command starts again from step 0"
        )  # fmt: skip
        with_what = f" {by_file}{PROG} --init_from=resume --out_dir={run.folder}" if resumable else ""
        run.say(f"stopped at step {step} ({stop.reason or 'another rank was asked to'}); {again}{with_what}")
    run.record(
        "end", step=step, status=status, val_loss=progress["val_loss"], train_ms=progress["train_ms"],
        target=plan.target_loss or None, target_met=bool(plan.target_loss) and progress["val_loss"] <= plan.target_loss,
        eligible=at_end and not against, ineligible=against, val_tokens=val_batches.num_tokens,
        world_size=ranks.world_size, compiled=report.graphs_compiled() - compiled,
    )  # fmt: skip
    tracking.finish(at_end)
    return 0 if at_end else EXIT_INTERRUPTED


if __name__ == "__main__":
    run_command(main)
