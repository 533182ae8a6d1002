"""The small trainer: GPT-2's size on FineWeb, for studies of optimizers and variants, on any GPU from sm_80 and CPUs.

    torchrun --standalone --nproc_per_node=8 -m modded_nanogpt.train_gpt_simple
    python -m modded_nanogpt.train_gpt_simple simple --optimizer=adam --seed=7 --out_dir=out/adam-7
    python -m modded_nanogpt.train_gpt_simple --variant=palm_parallel       # or a copy that you changed: my/idea.py
    STAGE_NUM_ITERATIONS=1000 STAGE_WARMDOWN_ITERS=284 python -m modded_nanogpt.train_gpt_simple historical
    python -m modded_nanogpt.train_gpt_simple tiny --dataset=shakespeare_char             # on a CPU, in seconds
    python -m modded_nanogpt.train_gpt_simple --plan=runs.json              # many runs: one process, one compilation

Data, their order, the batch and the architecture are fixed; what is compared is how fast the loss falls. The clock
(train_ms) stands while the model is compiled, validated or saved. The run directory (--out_dir) is described in
docs/run-directory.md. This file reads from top to bottom: the model, the loop; the optimizers are in simple_optim.py.
"""

import sys
from pathlib import Path

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from modded_nanogpt import compile_cache, simple_launch
from modded_nanogpt.simple_config import PROG, Config, Plan, lr_factor, resolve, steps_named
from nanogpt.common import compiler, rundir
from nanogpt.common.errors import EXIT_INTERRUPTED, NonFiniteError, run_command

OWN_RUN = rundir.running_from_copy(Path(__file__)) if __name__ == "__main__" else None
if __name__ == "__main__" and OWN_RUN is None:
    # A command line gets no further than here, without torch: the run goes on in its own copy of this file.
    run_command(lambda argv: simple_launch.launch(argv, __doc__))
if __name__ == "__main__":
    compiler.use_local_folders(compile_cache.operators())  # before torch is imported

import math
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modded_nanogpt import simple_setup
from modded_nanogpt.clock import Clock
from modded_nanogpt.kernels.cross_entropy import eval_losses, head_loss
from modded_nanogpt.simple_data import TrainBatches, ValBatches
from modded_nanogpt.simple_graphs import graphs_for, in_sequences, on_device, sum_gradients, variant_class
from modded_nanogpt.simple_optim import optimizer_of
from modded_nanogpt.variants.baseline import norm
from nanogpt.common import hang, hardware, tracking, training
from nanogpt.common import ranks as ranks_module
from nanogpt.common.launch import open_run
from nanogpt.common.ranks import Ranks
from nanogpt.common.stop import StopRequest

SOFTCAP = (30.0, 0.0, 7.5)  # logits = 30 sigmoid(z / 7.5), which is 15 tanh(z / 15) and a constant
ATTENTION_SCALE = 1.36  # times 1 / sqrt(D), for queries and keys that are normed: 0.12 at D = 128
ROTARY_BASE = 1024.0
ROWS_AT_ONCE = 65_536  # of logits in memory: 6.6 GB in bfloat16, less with a smaller --device_batch_size
SHOW_SECONDS = 1.0  # most often that a step is printed; metrics.jsonl has them all

# ---- the model -----------------------------------------------------------------------------------------------------
# B sequences of T tokens, N = B T, width C, H heads of D numbers, V rows of vocabulary. Weights are float32, and cast
# where they are used.


class Attention(nn.Module):
    """Causal attention over the whole sequence, with normed queries and keys and half-truncated rotary positions."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Parameter(torch.empty(3, width, width))  # three matrices to Muon, one product here
        self.out = nn.Parameter(torch.empty(width, width))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x: (B, T, C); cos, sin: (T, 1, D / 2) float32. (B, T, C)."""
        B, T, C = x.shape
        qkv = F.linear(x, self.qkv.flatten(0, 1).to(x.dtype)).view(B, T, 3, self.heads, C // self.heads)
        q, k, v = qkv.unbind(2)
        q, k = rotated(norm(q), cos, sin), rotated(norm(k), cos, sin)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        scale = ATTENTION_SCALE / math.sqrt(C // self.heads)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
        return F.linear(y.transpose(1, 2).reshape(B, T, C), self.out.to(x.dtype))


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions (Su et al. 2021) for x (B, T, H, D): number i of a head turns with number i + D / 2."""
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat([first * cos + second * sin, second * cos - first * sin], dim=-1).to(x.dtype)


class MLP(nn.Module):
    """C -> 4 C -> C with ReLU squared (So et al. 2021)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.empty(4 * width, width))
        self.down = nn.Parameter(torch.empty(width, 4 * width))

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        return F.linear(F.relu(F.linear(x, self.up.to(x.dtype))).square(), self.down.to(x.dtype))


class GPT(nn.Module):
    """The language model. How a layer puts attention and MLP together is the variant's `layer`."""

    def __init__(self, config: Config, rows: int, layer: Callable[..., Tensor], dtype: torch.dtype) -> None:
        super().__init__()
        C, self.layer, self.dtype = config.model_dim, layer, dtype
        self.loss_scale = 1.0 / (config.batch_size * config.sequence_length)
        self.embed, self.head = nn.Parameter(torch.empty(rows, C)), nn.Parameter(torch.empty(rows, C))
        self.attention = nn.ModuleList(Attention(C, config.num_heads) for _ in range(config.num_layers))
        self.mlp = nn.ModuleList(MLP(C) for _ in range(config.num_layers))
        quarter = C // config.num_heads // 4  # of a head's D / 2 pairs the first half turns
        speeds = ROTARY_BASE ** -torch.linspace(0.0, 1.0, quarter)
        angles = torch.arange(config.sequence_length)[:, None, None] * F.pad(speeds, (0, quarter))
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)
        self.register_buffer(
            "one", torch.ones(1), persistent=False
        )  # the weight of the next token in the loss

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Embedding normal(1); matrices uniform of deviation 1 / (2 sqrt(C)); head and what writes to the stream 0.

        Drawn on the CPU from `seed`, so that the weights are the same on every device.
        """
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.named_parameters():
            if name == "embed":
                parameter.copy_(torch.empty(parameter.shape).normal_(generator=generator))
            elif name.endswith((".qkv", ".up")):
                bound = 0.5 * math.sqrt(3 / parameter.shape[-1])
                parameter.copy_(torch.empty(parameter.shape).uniform_(-bound, bound, generator=generator))
            elif name == "head" or name.endswith((".out", ".down")):
                parameter.zero_()
            else:
                raise ValueError(f"the parameter {name} has no initialisation")

    def hidden(self, inputs: Tensor, gates: Tensor | None) -> Tensor:
        """Tokens (B, T), gates (layers,) -> final normed activations (N, C)."""
        cos, sin = self.cos[: inputs.shape[1]], self.sin[: inputs.shape[1]]
        x = norm(F.embedding(inputs, self.embed)).to(self.dtype)
        for number, (attention, mlp) in enumerate(zip(self.attention, self.mlp, strict=True)):
            gate = None if gates is None else gates[number]
            x = self.layer(x, lambda u, attention=attention: attention(u, cos, sin), mlp, gate)
        return norm(x).flatten(0, 1)

    def loss(self, inputs: Tensor, targets: Tensor, gates: Tensor | None) -> Tensor:
        """Sum of the losses of `targets` (N,) in nats: call (loss * loss_scale).backward().

        The inputs may have more tokens than there are targets: the last sequence is then filled up.
        """
        x = self.hidden(inputs, gates)[: len(targets)]
        head, none = self.head.to(x.dtype), torch.zeros_like(self.one)
        return head_loss(
            x, head, targets, None, self.one, none, SOFTCAP, self.loss_scale, False, ROWS_AT_ONCE
        )  # fmt: skip

    def losses(self, inputs: Tensor, targets: Tensor, gates: Tensor | None) -> Tensor:
        """(N,) float32 losses in nats, for validation."""
        x = self.hidden(inputs, gates)
        return eval_losses(x, self.head.to(x.dtype), targets, SOFTCAP)

    def flops_per_token(self) -> float:
        """Of training, forward and backward: 6 N + 12 L C T, the embedding's look-up not counted (PaLM, appendix B)."""
        weights = sum(parameter.numel() for parameter in self.parameters()) - self.embed.numel()
        return 6 * weights + 12 * len(self.mlp) * self.embed.shape[1] * len(self.cos)


# ---- one process, any number of runs -------------------------------------------------------------------------------


def main(argv: list[str]) -> int:
    """Train the run whose copy this is, then the rest of its plan; the exit status."""
    stop = StopRequest()
    first = Path(OWN_RUN)
    later = simple_launch.later_runs(argv, __doc__, first)
    config = Config(**rundir.read_json(first / "config.json")["config"])
    ranks = ranks_module.start(config.device, config.backend, config.num_threads)
    watch = hang.Watch(first, ranks)
    status = go_on(first, ranks, stop)
    for values in later:
        if status == 0 and ranks.sum(torch.tensor(float(stop.look()), device=ranks.device)).item():
            status = EXIT_INTERRUPTED
        if status:
            break
        folder = open_run(simple_launch.trainer([values]), values, argv)
        status = go_on(folder, ranks, stop) if folder else 0  # None: it has been finished meanwhile
    ranks.wait()  # for rank 0 to have saved: when one rank leaves with 75, torchrun ends the others
    stop.done()
    watch.close()
    ranks_module.leave(status)
    return status


def go_on(folder: Path, ranks: Ranks, stop: StopRequest) -> int:
    """Train a run that is open; the exit status."""
    run = rundir.RunDir(folder, writes=ranks.is_main)
    config = Config(**run.config["config"])
    stop.stop_file = folder / "stop" if ranks.is_main else None
    try:
        return train(run, config, resolve(config, ranks.world_size), ranks, stop)
    finally:
        run.close()


def train(run: rundir.RunDir, config: Config, plan: Plan, ranks: Ranks, stop: StopRequest) -> int:
    """From the first line of the log to the last checkpoint; the exit status."""
    device = ranks.device
    token_set = training.checked_tokens(config, ranks, run.say)
    run.say(f"{token_set.folder}: {token_set.num_tokens('train'):,} training tokens, checked")
    variant = variant_class(config.variant)(config, plan.total_steps, plan.warmdown_steps)
    run.say(plan.describe(config))
    rows = simple_launch.vocabulary_rows(token_set)

    def make(dtype: torch.dtype) -> GPT:
        return GPT(config, rows, variant.layer, dtype)

    graphs = graphs_for(config, rows, variant, ranks, run.say, make)
    model, optimizer = graphs.model, optimizer_of(graphs.model, variant, config, plan)
    model.init_weights(config.seed)
    progress = simple_setup.resume(run, ranks, model, optimizer.load, variant, plan.end_step)
    resumed, progress = progress is not None, progress or dict(simple_setup.NEW_PROGRESS)
    batches = TrainBatches(token_set, config, plan, ranks)
    val_batches = ValBatches(token_set, config, ranks)
    flops, peak = model.flops_per_token(), hardware.peak_flops(device)
    run.say(
        f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, "
        f"{str(model.dtype).removeprefix('torch.')}, {hardware.describe(device)}; "
        f"attention: {graphs.attention}; compiled: {str(graphs.compiled).lower()}; "
        f"validation: {val_batches.num_tokens:,} tokens"
    )
    run.record("resume" if resumed else "start", step=progress["step"], world_size=ranks.world_size)
    clock, last_ms = Clock(ranks, progress["train_ms"]), progress["train_ms"]
    saved_step, saved_at = progress["step"] if resumed else -1, time.monotonic()
    asked_to_stop, save_due, shown, val_steps = False, False, 0.0, set(steps_named(config.val_steps))

    def non_finite(what: str) -> NonFiniteError:
        saved = f"the checkpoint of step {saved_step} stays"
        kept = saved if saved_step >= 0 else "there is no checkpoint yet"
        return NonFiniteError(f"{run.folder}: {what}: stopped; {kept}; {simple_setup.lower_what(config)}")

    while True:
        # Validate at fixed steps and at the end; save at the end, when it is time, and before stopping.
        step = progress["step"]
        at_end = step >= plan.end_step
        due = at_end or step in val_steps or (config.val_loss_every and step % config.val_loss_every == 0)
        if due and not asked_to_stop and progress["val_step"] != step:
            progress["train_ms"] = clock.stop() if clock.began else clock.before
            gates = on_device(variant.gates(step, False), device)
            val_loss = simple_setup.evaluate(graphs.losses, gates, config.sequence_length, val_batches, ranks)
            if not math.isfinite(val_loss):
                ranks.fail(non_finite(f"step {step}: validation loss {val_loss}"))
            progress.update(val_step=step, val_loss=val_loss)
            run.record(
                "val", step=step, val_loss=val_loss, tokens=progress["tokens"], train_ms=progress["train_ms"]
            )
            run.say(f"step {step}: val loss {val_loss:.4f}, {progress['train_ms'] / 1e3:.2f} s of training")
        if (save_due or asked_to_stop or at_end) and saved_step != step and step > 0:
            progress["train_ms"] = clock.stop() if clock.began else clock.before
            tensors, state = {} if at_end else optimizer.tensors(), {**progress, "variant": variant.state()}
            simple_setup.save(run, config, ranks, model, tensors, state)
            run.record("save", step=step)
            saved_step, saved_at, save_due = step, time.monotonic(), False
        if asked_to_stop or at_end:
            break
        if not clock.began:
            clock.start()

        # One optimizer step: forward and backward over the micro-steps, one look at the numbers, the update.
        length, gates = variant.length(step), on_device(variant.gates(step, True), device)
        loss_sum = torch.zeros((), device=device)
        for micro_step in range(plan.micro_steps):
            hang.beat()
            inputs, targets = batches.get(step, micro_step)
            loss = graphs.loss(in_sequences(inputs, length), targets, gates)
            (loss * model.loss_scale).backward()
            loss_sum += loss.detach()
        sum_gradients(model, ranks)
        wants_save = ranks.is_main and simple_setup.save_is_due(config, step + 1, saved_at)
        told = ranks.sum(torch.stack([loss_sum, *loss_sum.new_tensor([stop.look(), wants_save])])).tolist()
        mean_loss, asked_to_stop, save_due = told[0] / plan.tokens_per_step, told[1] > 0, told[2] > 0
        if not math.isfinite(mean_loss):
            ranks.fail(non_finite(f"step {step}: loss {mean_loss}"))
        optimizer.step(step)
        note = variant.observe(step, mean_loss)
        if note:
            run.say(note)
        progress["step"] += 1
        progress["tokens"] += plan.tokens_per_step
        progress["train_ms"] = clock.now()
        ms, last_ms = progress["train_ms"] - last_ms, progress["train_ms"]
        if step % config.log_interval == 0 or step + 1 == plan.end_step:
            speed = 1e3 * plan.tokens_per_step / ms
            mfu = hardware.utilisation(speed * flops, peak, ranks.world_size)
            run.record(
                "train", step=step, loss=mean_loss, lr=lr_factor(plan, step), ms=round(ms, 3),
                train_ms=round(progress["train_ms"], 3), tokens_per_s=round(speed), mfu=mfu,
                memory_gib=hardware.memory_gib(device), tokens=progress["tokens"],
            )  # fmt: skip
            if time.monotonic() - shown > SHOW_SECONDS or step < 2 or step + 1 == plan.end_step:
                shown = time.monotonic()
                run.say(
                    f"step {step}/{plan.end_step}: loss {mean_loss:.4f}, {ms:.1f} ms, {speed:,.0f} tokens/s, MFU "
                    f"{hardware.utilisation_words(mfu)}, {progress['train_ms'] / 1e3:.1f} s"
                )

    batches.close()
    status = "finished" if at_end else "stopped" if stop.reason == "stop file" else "interrupted"
    target, val_loss = config.target_val_loss or None, progress["val_loss"]
    met = target is not None and val_loss <= target
    if at_end:
        against = "" if target is None else f", the target {target:g} is {'reached' if met else 'missed'}"
        run.say(
            f"finished at step {step}: val loss {val_loss:.4f}{against}; "
            f"{progress['train_ms'] / 1e3:,.1f} s of training"
        )
    else:
        by_file = f"rm {run.folder}/stop; " if stop.reason == "stop file" else ""
        run.say(
            f"stopped at step {step} ({stop.reason or 'another rank was asked to'}); checkpoint saved; go on with: "
            f"{by_file}{PROG} --init_from=resume --out_dir={run.folder}"
        )
    run.record(
        "end", step=step, status=status, val_loss=val_loss, train_ms=progress["train_ms"], target=target,
        target_met=met, val_tokens=val_batches.num_tokens, world_size=ranks.world_size,
    )  # fmt: skip
    tracking.finish(at_end)
    return 0 if at_end else EXIT_INTERRUPTED


if __name__ == "__main__":
    run_command(main)
