"""What the training loop needs before its first step and between its steps: building, resuming, evaluating, saving."""

import datetime
import hashlib
import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nanogpt.batches import ValBatches
from nanogpt.common import checkpoints, compiler, hang
from nanogpt.common.errors import NonFiniteError, UserError
from nanogpt.common.hardware import memory_gib, utilisation_words
from nanogpt.common.ranks import Ranks
from nanogpt.common.rundir import RunDir
from nanogpt.common.shards import TokenSet
from nanogpt.common.training import latest_checkpoint, repeat_exactly, write_checkpoint
from nanogpt.config import GPT2_SIZES, Config
from nanogpt.model import GPT, Shape
from nanogpt.optim import load_optimizer_tensors, make_optimizer, optimizer_tensors

SHOW_SECONDS = 1.0  # most often that a step is printed; metrics.jsonl has them all
PADDED_GPT2_VOCABULARY = 50304  # GPT-2's 50,257 rounded up to a multiple of 64, which matrix units like
BUCKET_NUMBERS = 1 << 26  # gradients averaged in one message: 268 MB
FUSED_FROM = 4096  # vocabularies from this size on take the fused cross entropy
NEW_PROGRESS = {
    "step": 0, "val_step": -1, "val_loss": math.inf, "best_val": math.inf, "best_step": -1, "tokens": 0, "seconds": 0.0,
}  # fmt: skip


@dataclass
class State:
    """Everything that a step changes. `model` is `raw_model` as torch.compile sees it, or the same object."""

    raw_model: GPT
    model: nn.Module
    optimizer: torch.optim.AdamW
    scaler: torch.amp.GradScaler
    progress: dict[str, Any]
    resumed: bool
    compiled: bool
    fused: bool
    attention: str


def average_gradients(model: nn.Module, ranks: Ranks) -> Tensor:
    """Average the gradients over the ranks, in the same order of addition at every step.

    Returns the largest size of a number among this rank's own ones, a float32 scalar: the average is NaN on every rank
    when it is on one. (With a single rank 0: there the norm tells.)

    DistributedDataParallel would overlap this with the backward pass, but it rearranges its buckets after the first
    step of a process, and with them the order in which more than two ranks are added up: a resumed run would differ in
    the last bits. A compiled backward pass hands over all its gradients at its end anyway.
    """
    largest = torch.zeros((), device=ranks.device)
    if ranks.world_size == 1:
        return largest
    bucket: list[Tensor] = []
    gradients = [parameter.grad for parameter in model.parameters()]
    for number, gradient in enumerate(gradients):
        bucket.append(gradient)
        if sum(part.numel() for part in bucket) < BUCKET_NUMBERS and number + 1 < len(gradients):
            continue
        flat = torch.cat([part.flatten() for part in bucket])
        largest = torch.maximum(largest, torch.linalg.vector_norm(flat, math.inf))
        ranks.sum(flat).div_(ranks.world_size)
        for part, mean in zip(bucket, flat.split([part.numel() for part in bucket]), strict=True):
            part.copy_(mean.view_as(part))
        bucket = []
    return largest


def on_ranks(bad: list[float]) -> str:
    """In words, which ranks' flag in `bad` (one a rank) is set; "" for a single rank, and where none is."""
    named = [str(rank) for rank, flag in enumerate(bad) if flag]
    if len(bad) == 1 or not named:
        return ""
    if len(named) == len(bad):
        return f" on all {len(bad)} ranks"
    return f" on rank{'s' if len(named) > 1 else ''} {', '.join(named)} of {len(bad)}"


def seed_and_tune(config: Config, device: torch.device) -> None:
    """Global switches of torch: seed, TF32 for what stays float32, determinism when asked for."""
    torch.manual_seed(config.seed)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    if config.deterministic:
        repeat_exactly()


def dropout_seed(seed: int, micro_batch: int) -> int:
    """What dropout in this micro-batch is seeded with. Hashed: torch's CPU generator looks at 32 bits of a seed."""
    return int.from_bytes(hashlib.blake2b(f"{seed} {micro_batch}".encode(), digest_size=7).digest(), "little")


def vocabulary_of(config: Config, token_set: TokenSet) -> int:
    """Rows of the embedding: the character set's size, GPT-2's exact size for its weights, padded otherwise."""
    size = token_set.vocab_size or 50257
    if config.init_from in GPT2_SIZES:
        return 50257
    return PADDED_GPT2_VOCABULARY if 50000 < size <= 50257 else size


def build(config: Config, token_set: TokenSet, ranks: Ranks, dtype: torch.dtype, run: RunDir) -> State:
    """Model and optimizer, with the weights that init_from names or the run's last sound checkpoint."""
    shape = Shape(
        vocab_size=vocabulary_of(config, token_set), block_size=config.block_size, n_layer=config.n_layer,
        n_head=config.n_head, n_embd=config.n_embd, bias=config.bias,
    )  # fmt: skip
    raw_model = GPT(shape, config.dropout, dtype)
    checkpoint = latest_checkpoint(run, ranks)
    if checkpoint is None:
        if config.init_from in GPT2_SIZES:
            from nanogpt.pretrained import load_published

            load_published(raw_model, config.init_from, run.say, is_main=ranks.is_main, share=ranks.share)
        else:
            raw_model.init_weights(config.seed)
    else:
        _check_shape(checkpoint, shape)
        if checkpoint.step and not checkpoint.tensors("optimizer"):
            raise UserError(
                f"{checkpoint.path}: holds weights without the optimizer's state, so a resume would not be exact; "
                "delete it to resume from the one before, or start again with --overwrite=true"
            )
        raw_model.load_state_dict(checkpoint.tensors("model"))
    state = prepare(config, raw_model, ranks, dtype)
    if asks_to_compile(config, ranks.device) and not state.compiled:
        run.say(f"note: {compiler.missing(ranks.device.type)}, so nothing is compiled, which is slower")
    if checkpoint is not None:
        load_optimizer_tensors(
            raw_model, state.optimizer, checkpoint.tensors("optimizer"), str(checkpoint.path)
        )
        state.resumed = True
        state.progress |= {
            key: math.inf if checkpoint.state[key] is None else checkpoint.state[key] for key in NEW_PROGRESS
        }
        if state.scaler.is_enabled():
            state.scaler.load_state_dict(checkpoint.state["scaler"])
        run.say(f"attempt {run.attempt}: resumed from {checkpoint.path.name}")
    return state


def prepare(config: Config, raw_model: GPT, ranks: Ranks, dtype: torch.dtype) -> State:
    """A model that has its weights, made ready to train from step 0: device, optimizer, attention, compiler, ranks."""
    device, shape = ranks.device, raw_model.shape
    raw_model.to(device)
    optimizer = make_optimizer(raw_model, config)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16 and device.type == "cuda")
    attention = choose_attention(config, shape, dtype, device)
    compiled = asks_to_compile(config, device) and not compiler.missing(device.type)
    fused = device.type == "cuda" and shape.vocab_size >= FUSED_FROM and dtype == torch.bfloat16
    if config.fp8:
        refuse_fp8(device, dtype)
        raw_model.use_fp8()
    return State(
        raw_model, torch.compile(raw_model) if compiled else raw_model, optimizer, scaler, dict(NEW_PROGRESS), False,
        compiled, fused and not config.deterministic, attention,
    )  # fmt: skip


def asks_to_compile(config: Config, device: torch.device) -> bool:
    """Whether the knobs ask for torch.compile on this device."""
    return config.compile.lower() == "true" or (config.compile == "auto" and device.type == "cuda")


def _check_shape(checkpoint: checkpoints.Checkpoint, shape: Shape) -> None:
    saved = checkpoint.state["shape"]
    for name, value in asdict(shape).items():
        if saved.get(name) != value:
            raise UserError(
                f"{checkpoint.path}: holds a model with {name}={saved.get(name)}, this run has {value}; "
                "resume with the settings it was started with"
            )


def refuse_fp8(device: torch.device, dtype: torch.dtype) -> None:
    """UserError unless the device multiplies 8-bit numbers and the activations are bfloat16."""
    if device.type == "cpu":
        raise UserError("--fp8=true: there is no GPU here; leave the flag away")
    if torch.cuda.get_device_capability(device) < (8, 9) or dtype != torch.bfloat16:
        name = torch.cuda.get_device_name(device)
        raise UserError(
            f"--fp8=true: {name} has no 8-bit matrix products in bfloat16 training; leave the flag away"
        )


def choose_attention(config: Config, shape: Shape, dtype: torch.dtype, device: torch.device) -> str:
    """Set torch's attention backend once and name it. cuDNN's is the fastest on Hopper and Blackwell.

    Dropout and determinism stay with FlashAttention 2, whose backward has a deterministic mode.
    """
    if device.type == "cpu" or dtype == torch.float32:
        return "torch"
    new_enough = torch.cuda.get_device_capability(device) >= (9, 0)
    if new_enough and not config.dropout and not config.deterministic and shape.n_embd // shape.n_head <= 128:
        torch.backends.cuda.enable_flash_sdp(False)
        torch.backends.cuda.enable_mem_efficient_sdp(False)
        torch.backends.cuda.enable_cudnn_sdp(True)
        return "cuDNN"
    torch.backends.cuda.enable_cudnn_sdp(False)
    return "FlashAttention 2" if torch.cuda.get_device_capability(device) >= (8, 0) else "memory-efficient"


@torch.no_grad()
def evaluate(model: nn.Module, batches: ValBatches, ranks: Ranks) -> float:
    """Mean loss in nats over the fixed validation tokens, summed in float64: the same number every time."""
    model.eval()
    total = torch.zeros(2, dtype=torch.float64, device=ranks.device)
    for inputs, targets, count in batches:
        hang.beat()
        total[0] += model(inputs, targets).double() * count
        total[1] += count
    ranks.sum(total)
    model.train()
    return (total[0] / total[1]).item()


def guarded_step(optimizer: torch.optim.AdamW, scaler: torch.amp.GradScaler, finite: Tensor) -> None:
    """The update, made a no-op on the device when `finite` is false, so that nobody has to wait for the answer."""
    if scaler.is_enabled():
        scaler.step(optimizer)
        scaler.update()
        return
    optimizer.found_inf = (~finite).float()  # fused AdamW skips the update where this is 1
    optimizer.grad_scale = None
    optimizer.step()


def is_finite(loss: float, grad_norm: float, scaler: torch.amp.GradScaler) -> bool:
    """Whether training may go on. With float16 an infinite gradient only means that the scale was too large."""
    return math.isfinite(loss) and (math.isfinite(grad_norm) or scaler.is_enabled())


def save(run: RunDir, config: Config, state: State) -> None:
    """Write a checkpoint of this moment, then drop those no longer kept. StorageError when the disk refuses."""
    progress = {key: None if value == math.inf else value for key, value in state.progress.items()}
    record = {
        **progress, "shape": asdict(state.raw_model.shape), "seed": config.seed, "attempt": run.attempt,
        "scaler": state.scaler.state_dict(), "data": run.config.get("data"),
    }  # fmt: skip
    parts = {
        "model": dict(state.raw_model.named_parameters()),
        "optimizer": optimizer_tensors(state.raw_model, state.optimizer),
    }
    largest = torch.stack(torch._foreach_norm(list(parts["model"].values()), math.inf)).max()
    if not math.isfinite(largest.item()):
        raise NonFiniteError(
            f"{run.folder}: step {state.progress['step']}: the weights are not finite after the last update; "
            "nothing was saved, earlier checkpoints stay; lower --learning_rate"
        )
    run.check_fence()
    step, best = state.progress["step"], state.progress["best_step"]
    write_checkpoint(run, step, parts, record, config.keep_checkpoints, best)


def step_line(
    config: Config, step: int, loss: float, lr: float, grad_norm: float, seconds: float, pace: float,
    speed: float, mfu: float | None, device: torch.device,
) -> str:  # fmt: skip
    """The line a person reads: where the step is, how it goes, when it ends at `pace` seconds a step."""
    left = datetime.timedelta(seconds=round((config.max_iters - step - 1) * pace))
    memory = memory_gib(device)
    return (
        f"step {step}/{config.max_iters}: loss {loss:.4f}, lr {lr:.2e}, norm {grad_norm:.2f}, {1e3 * seconds:.1f} ms, "
        f"{speed:,.0f} tokens/s, MFU {utilisation_words(mfu)}"
        + (f", {memory:.1f} GiB" if memory is not None else "")
        + f", ETA {left}"
    )
