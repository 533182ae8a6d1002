"""Train a GPT-2 as nanoGPT does, on one CPU, one GPU, or the GPUs of several machines.

    python -m nanogpt.train train_shakespeare_char
    python -m nanogpt.train train_shakespeare_char --device=cpu --n_layer=4 --n_head=4 --n_embd=128
    torchrun --standalone --nproc_per_node=4 -m nanogpt.train train_gpt2
    cd nanogpt && torchrun --standalone --nproc_per_node=4 train.py config/train_gpt2.py
    python -m nanogpt.train --init_from=resume --out_dir=out/nanogpt-gpt2

Flags are nanoGPT's, plus a few. The run directory (--out_dir) is described in docs/run-directory.md.
"""

import sys
from pathlib import Path

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import dataclasses
import math
import os
import time
import typing
from collections import deque
from statistics import median

from nanogpt.common import compiler, rundir
from nanogpt.common.errors import EXIT_INTERRUPTED, NonFiniteError, UserError, run_command
from nanogpt.common.flags import flag_given, parse_values
from nanogpt.common.launch import SMOKE_STEPS, Trainer, open_run, rank_zero_speaks, smoke_values
from nanogpt.common.machine import has_nvidia_driver, world_size_from_environment
from nanogpt.config import FREE, OPERATORS, PRESETS, Config, Plan, resolve

if typing.TYPE_CHECKING:
    from nanogpt.common.shards import TokenSet

PROG = "python -m nanogpt.train"
SMOKE_BATCH = {"batch_size": 4, "block_size": 64}  # at most
SMOKE_LAYERS_ON_CPU, SMOKE_MODEL_ON_CPU = 4, {"n_embd": 128, "n_head": 4}  # wider ones take minutes there
SMALL_DATA = 1 << 28  # bytes that are read and checked before the run directory is made; more by all ranks


def inspect(config: Config) -> tuple[Config, dict]:
    """Check what needs no GPU: the plan and the data. Prints the plan when that is all the user wants."""
    from nanogpt.common.shards import data_root, open_token_set, verify
    from nanogpt.common.tokenizer import tokens_of

    plan = resolve(config, world_size_from_environment())
    _refuse_missing_gpu(config)
    root = data_root(config.data_root)
    token_set = open_token_set(config.dataset, root)
    _refuse_short(token_set, config.block_size)
    if sum(shard.bytes for shard in token_set.shards) <= SMALL_DATA:
        verify(token_set)
    if config.check:
        print(plan.describe(config))
        print(
            f"{token_set.folder}: {token_set.num_tokens('train'):,} training tokens, "
            f"{token_set.num_tokens('val'):,} validation tokens"
        )
    config = dataclasses.replace(
        config, data_root=str(root), tokens_per_step=plan.tokens_per_step, gradient_accumulation_steps=0,
        eval_tokens=plan.eval_tokens, eval_iters=0,
    )  # fmt: skip
    details = {
        "plan": dataclasses.asdict(plan),
        "data": token_set.fingerprint(),
        "tokens": tokens_of(token_set),
    }
    return config, details


TRAINER = Trainer(
    Config, Path(__file__).resolve().parents[1], ("nanogpt",), "nanogpt/train.py", FREE, inspect,
    steps=lambda config: config.max_iters,
)  # fmt: skip


def _refuse_missing_gpu(config: Config) -> None:
    none = not has_nvidia_driver()
    if config.device.startswith("cuda") and none:
        raise UserError(
            f"--device={config.device}: this machine has no NVIDIA GPU; use --device=cpu, or ask SLURM for a GPU"
        )
    if config.backend == "nccl" and (config.device == "cpu" or none):
        raise UserError("--backend=nccl: needs GPUs; use --backend=gloo on CPUs")


def _refuse_short(token_set: "TokenSet", block_size: int) -> None:
    """UserError when no shard has room for a block: train needs two, because its cuts are shifted."""
    for split, shards, needed in (
        ("train", token_set.shards_train, 2 * block_size),
        ("val", token_set.shards_val, block_size + 1),
    ):
        longest = max(shard.num_tokens for shard in shards)
        if longest < needed:
            raise UserError(
                f"--block_size={block_size}: the longest {split} shard of {token_set.folder} has {longest:,} tokens, "
                f"it takes {needed:,}; lower --block_size, or prepare more data"
            )


def main(argv: list[str]) -> int:
    """Open the run, continue in its copy of the source, train."""
    folder = rundir.running_from_copy(Path(__file__))
    if folder is None:
        with rank_zero_speaks():
            values = values_of(argv)
        folder = open_run(TRAINER, values, argv)
        if folder is None:
            return 0
        rundir.enter_copy(folder, TRAINER.entry)
    return go_on(folder)


def values_of(argv: list[str]) -> dict[str, object]:
    """The knobs that presets and flags set. UserError for whatever they may not be."""
    values = parse_values(Config, argv, prog=PROG, description=__doc__, presets=PRESETS)
    values |= {} if flag_given(argv, "out_dir") else {"out_dir": default_out_dir(values)}
    if not values.get("smoke"):
        return values
    batch, block = (min(int(values.get(name, 1 << 20)), most) for name, most in SMOKE_BATCH.items())
    small = {
        "batch_size": batch, "block_size": block, "tokens_per_step": 0, "gradient_accumulation_steps": 0,
        "max_iters": SMOKE_STEPS, "eval_iters": 0, "eval_tokens": 4 * batch * block, "log_interval": 1,
        "compile": "false", "wandb_log": False,
    }  # fmt: skip
    on_cpu = values.get("device") == "cpu" or not has_nvidia_driver()
    if values.get("init_from", "scratch") != "scratch":  # it keeps its size, which several threads are for
        small["num_threads"] = 0
    elif on_cpu:
        small["n_layer"] = min(int(values.get("n_layer", Config.n_layer)), SMOKE_LAYERS_ON_CPU)
        wide = int(values.get("n_embd", Config.n_embd)) > SMOKE_MODEL_ON_CPU["n_embd"]
        small |= SMOKE_MODEL_ON_CPU if wide else {}
    return smoke_values(values, argv, small)


def default_out_dir(values: dict[str, object]) -> str:
    """A preset's out_dir, or the default one: relative to the repository, from whatever folder it is started.

    So `cd nanogpt && python train.py config/x.py` leaves its run where `sample.py --out_dir=../out/x` looks for it.
    """
    folder = Path(str(values.get("out_dir", Config.out_dir))).expanduser()
    here = TRAINER.root == Path.cwd() or folder.is_absolute()
    return str(folder if here else TRAINER.root / folder)


def go_on(folder: Path) -> int:
    """Train the run that `open_run` has opened in `folder`; the exit status."""
    compiler.use_local_folders(OPERATORS)  # before torch is imported
    from nanogpt.common import hang
    from nanogpt.common import ranks as ranks_module

    run = rundir.RunDir(folder, writes=os.environ.get("RANK", "0") == "0")
    config = Config(**run.config["config"])
    ranks = ranks_module.start(config.device, config.backend, config.num_threads)
    watch = hang.Watch(run.folder, ranks)
    try:
        status = train(run, config, resolve(config, ranks.world_size), ranks)
    finally:
        watch.close()
        run.close()
    ranks_module.leave(status)
    return status


def _non_finite(run: rundir.RunDir, step: int, what: str, saved_step: int) -> NonFiniteError:
    kept = f"the checkpoint of step {saved_step} stays" if saved_step >= 0 else "there is no checkpoint yet"
    return NonFiniteError(
        f"{run.folder}: step {step}: {what}: stopped before the update; {kept}; lower --learning_rate, "
        "or look at the data of this step"
    )


def train(run: rundir.RunDir, config: Config, plan: Plan, ranks) -> int:
    """The training loop, from the first line of the log to the last checkpoint; the exit status."""
    import torch

    from nanogpt import setup
    from nanogpt.batches import TrainBatches, ValBatches
    from nanogpt.common import hang, hardware, tracking, training
    from nanogpt.common.stop import StopRequest
    from nanogpt.optim import set_learning_rate
    from nanogpt.schedule import learning_rate

    stop = StopRequest(run.folder / "stop" if ranks.is_main else None)
    device, dtype = ranks.device, hardware.choose_dtype(config.dtype, ranks.device)
    setup.seed_and_tune(config, device)
    token_set = training.checked_tokens(config, ranks, run.say)
    run.say(
        f"{token_set.folder}: {token_set.num_tokens('train'):,} training tokens, "
        f"{token_set.num_tokens('val'):,} validation tokens, checked"
    )
    state = setup.build(config, token_set, ranks, dtype, run)
    optimizer, scaler = state.optimizer, state.scaler
    place = {"rank": ranks.rank, "world_size": ranks.world_size, "device": device}
    batches = TrainBatches(
        token_set, block_size=config.block_size, batch_size=config.batch_size, micro_steps=plan.micro_steps,
        seed=config.seed, **place,
    )  # fmt: skip
    val_batches = ValBatches(
        token_set, block_size=config.block_size, batch_size=config.batch_size, max_tokens=plan.eval_tokens, **place
    )  # fmt: skip
    flops_per_token, peak = state.raw_model.flops_per_token(), hardware.peak_flops(device)
    progress = state.progress  # step, best_val, val_step, tokens, ...: what a resume goes on with
    step, last_save = progress["step"], time.monotonic()
    saved_step = step if state.resumed else -1
    run.say(plan.describe(config))
    run.say(
        f"{state.raw_model.num_parameters() / 1e6:.2f} M parameters, {str(dtype).removeprefix('torch.')}, "
        f"{hardware.describe(device)}; attention: {state.attention}; compiled: {str(state.compiled).lower()}; "
        f"validation: {val_batches.num_tokens:,} tokens"
    )
    run.record("resume" if state.resumed else "start", step=step, world_size=ranks.world_size)

    def save() -> None:
        nonlocal saved_step, last_save
        progress.update(step=step)
        if ranks.is_main:
            began = time.perf_counter()
            setup.save(run, config, state)
            run.record("save", step=step, seconds=round(time.perf_counter() - began, 3))
        saved_step, last_save = step, time.monotonic()

    one_hot = torch.eye(ranks.world_size, device=device)[ranks.rank]
    val_loss, asked_to_stop, shown = float("nan"), False, time.perf_counter()
    recent: deque[float] = deque(maxlen=50)  # the time left is theirs: one slow step says little
    while True:
        # Validate at fixed steps and at the end; save what is best, or everything, as asked.
        # A stop does not wait for a validation: the grace that SLURM gives may be shorter. The resume makes it.
        at_end = (step >= config.max_iters or config.eval_only) and not asked_to_stop
        val_due = (at_end or (step % config.eval_interval == 0 and not config.smoke)) and not asked_to_stop
        if val_due and (progress["val_step"] != step or config.eval_only):
            try:
                val_loss = setup.evaluate(state.model, val_batches, ranks)
            except Exception:  # out of memory, say: what was trained is not to be lost with it
                if saved_step != step and step > 0 and not config.eval_only:
                    save()
                    run.say(f"step {step}: the validation broke; the checkpoint of this step is saved")
                raise
            if not math.isfinite(val_loss):
                ranks.fail(_non_finite(run, step, f"validation loss {val_loss}", saved_step))
            improved = val_loss < progress["best_val"]
            progress.update(val_step=step, val_loss=val_loss)
            if improved:
                progress.update(best_val=val_loss, best_step=step)
            run.say(f"step {step}: val loss {val_loss:.4f}{' (best so far)' if improved else ''}")
            run.record("val", step=step, val_loss=val_loss, tokens=progress["tokens"])
            if step > 0 and not config.eval_only and (improved or config.always_save_checkpoint or at_end):
                save()
            shown = time.perf_counter()
        due = (config.save_interval and step % config.save_interval == 0 and step > 0) or (
            config.save_minutes and time.monotonic() - last_save > 60 * config.save_minutes
        )
        if (due or asked_to_stop or at_end) and saved_step != step and not config.eval_only and step > 0:
            save()
        if asked_to_stop or at_end:
            break

        # One optimizer step: forward and backward over the micro-steps, one look at the numbers, the update.
        began = time.perf_counter()
        set_learning_rate(optimizer, lr := learning_rate(config, step))
        loss_sum = torch.zeros((), device=device)
        for micro_step in range(plan.micro_steps):
            hang.beat()
            inputs, targets = batches.get(step, micro_step)
            if config.dropout:  # masks depend on the micro-batch alone, so no random state outlives a step
                torch.manual_seed(setup.dropout_seed(config.seed, batches.micro_batch(step, micro_step)))
            loss = state.model(inputs, targets, fused=state.fused)
            scaler.scale(loss / plan.micro_steps).backward()
            loss_sum += loss.detach()
        largest = setup.average_gradients(state.raw_model, ranks)
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(
            state.raw_model.parameters(), config.grad_clip or float("inf"), foreach=True
        )
        # Losses, requests to stop and whose own numbers are bad, in one message; a bad number makes the update a no-op.
        bad = one_hot * ~(torch.isfinite(loss_sum) & torch.isfinite(largest))
        told = torch.stack([loss_sum / plan.micro_steps, norm.new_tensor(float(stop.look())), *bad])
        ranks.sum(told)
        setup.guarded_step(optimizer, scaler, finite=torch.isfinite(told[0]) & torch.isfinite(norm))
        optimizer.zero_grad(set_to_none=True)
        grad_norm, loss_total, requests, *bad = torch.cat([norm.view(1), told]).tolist()
        mean_loss = loss_total / ranks.world_size
        if not setup.is_finite(mean_loss, grad_norm, scaler):
            where = setup.on_ranks(bad)
            ranks.fail(
                _non_finite(run, step, f"loss {mean_loss}, gradient norm {grad_norm}{where}", saved_step)
            )
        seconds = time.perf_counter() - began
        recent.append(seconds)
        step += 1
        asked_to_stop = requests > 0
        progress["tokens"] += plan.tokens_per_step
        progress["seconds"] += seconds
        if (step - 1) % config.log_interval == 0 or step == config.max_iters:
            speed = plan.tokens_per_step / seconds
            mfu = hardware.utilisation(speed * flops_per_token, peak, ranks.world_size)
            run.record(
                "train", step=step - 1, loss=mean_loss, lr=lr, grad_norm=grad_norm, ms=round(1e3 * seconds, 3),
                tokens_per_s=round(speed), mfu=mfu, memory_gib=hardware.memory_gib(device), tokens=progress["tokens"],
            )  # fmt: skip
            if time.perf_counter() - shown > setup.SHOW_SECONDS or step <= 2 or step == config.max_iters:
                shown = time.perf_counter()
                pace = median(recent)
                run.say(
                    setup.step_line(
                        config, step - 1, mean_loss, lr, grad_norm, seconds, pace, speed, mfu, device
                    )
                )

    by_file = stop.reason == "stop file"
    status = "finished" if at_end else "stopped" if by_file else "interrupted"
    best = (
        f"; best {progress['best_val']:.4f} at step {progress['best_step']}"
        if progress["best_step"] >= 0
        else ""
    )
    run.say(
        f"{status} at step {step}: val loss {progress['val_loss']:.4f}{best}; {progress['tokens'] / 1e6:,.1f} M tokens "
        f"in {progress['seconds']:,.1f} s of training"
        if at_end
        else f"stopped at step {step} ({stop.reason or 'another rank was asked to'}); checkpoint saved; go on with: "
        f"{f'rm {run.folder}/stop; ' if by_file else ''}{PROG} --init_from=resume --out_dir={run.folder}"
    )
    run.record("end", step=step, status=status, val_loss=progress["val_loss"], seconds=progress["seconds"])
    tracking.finish(at_end)
    ranks.wait()  # for rank 0 to have saved: when one rank leaves with 75, torchrun ends the others
    stop.done()
    return 0 if at_end else EXIT_INTERRUPTED


if __name__ == "__main__":
    run_command(main)
