"""What the small trainer's loop needs around its steps: data checked, a run resumed, validated, saved."""

import math
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from modded_nanogpt.simple_config import Config
from modded_nanogpt.simple_data import ValBatches
from nanogpt.common import hang
from nanogpt.common.errors import NonFiniteError, UserError
from nanogpt.common.ranks import Ranks
from nanogpt.common.rundir import RunDir
from nanogpt.common.training import latest_checkpoint, repeat_exactly, write_checkpoint

if TYPE_CHECKING:
    from modded_nanogpt.variants.baseline import Variant

NEW_PROGRESS = {"step": 0, "val_step": -1, "val_loss": math.inf, "tokens": 0, "train_ms": 0.0}


def tune(config: Config, device: torch.device) -> tuple[torch.dtype, str]:
    """Torch's global switches; returns the dtype of the activations and the implementation of attention.

    UserError for a GPU older than sm_80: it has no bfloat16. cuDNN's attention is the fastest on Hopper and later;
    deterministic runs take FlashAttention 2, whose backward has a deterministic mode.
    """
    if config.deterministic:
        repeat_exactly()
    if device.type == "cpu":
        return torch.float32, "torch"
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        name = torch.cuda.get_device_name(device)
        raise UserError(
            f"--device={config.device}: {name} is older than sm_80 and has no bfloat16; ask for a newer GPU"
        )
    torch.set_float32_matmul_precision("high")
    cudnn = capability >= (9, 0) and not config.deterministic and config.model_dim // config.num_heads <= 128
    torch.backends.cuda.enable_cudnn_sdp(cudnn)
    torch.backends.cuda.enable_flash_sdp(not cudnn)
    torch.backends.cuda.enable_mem_efficient_sdp(False)
    return torch.bfloat16, "cuDNN" if cudnn else "FlashAttention 2"


def resume(
    run: RunDir, ranks: Ranks, model: nn.Module, load_optimizer: Callable[[dict[str, Tensor], str], None],
    variant: "Variant", total_steps: int,
) -> dict[str, Any] | None:  # fmt: skip
    """Load the run's newest sound checkpoint into all three; the progress it was made at. None when there is none."""
    checkpoint = latest_checkpoint(run, ranks)
    if checkpoint is None:
        return None
    model.load_state_dict(checkpoint.tensors("model"), strict=True)
    optimizer = checkpoint.tensors("optimizer")
    if optimizer:
        load_optimizer(optimizer, str(checkpoint.path))
    elif checkpoint.step < total_steps:
        raise UserError(
            f"{checkpoint.path}: the run was finished at this step, and a finished run keeps no optimizer; start "
            "another one, with another --out_dir"
        )
    variant.load(checkpoint.state["variant"])
    run.say(f"attempt {run.attempt}: resumed from {checkpoint.path.name}")
    saved = checkpoint.state
    return {key: math.inf if saved[key] is None else saved[key] for key in NEW_PROGRESS}


@torch.no_grad()
def evaluate(
    losses: Callable[..., Tensor], gates: Tensor | None, length: int, batches: ValBatches, ranks: Ranks
) -> float:
    """Mean loss in nats over the fixed validation tokens, summed in float64: the same number every time."""
    total = torch.zeros((), dtype=torch.float64, device=ranks.device)
    for inputs, targets, count in batches:
        hang.beat()
        total += losses(inputs.view(-1, length), targets, gates)[:count].double().sum()
    return ranks.sum(total).item() / batches.num_tokens


def save(
    run: RunDir, config: Config, ranks: Ranks, model: nn.Module, optimizer: dict[str, Tensor], state: dict[str, Any]
) -> None:  # fmt: skip
    """Write a checkpoint of this moment (rank 0; the others wait). NonFiniteError, StorageError.

    optimizer: {} at the end of the run. That one needs a third of the room, and the others are then dropped: a study
    has many runs.
    """
    with ranks.main_only():
        if not ranks.is_main:
            return
        run.check_fence()
        step, parts = state["step"], {"model": dict(model.named_parameters())}
        parts |= {"optimizer": optimizer} if optimizer else {}
        finite = [torch.isfinite(tensor).all() for tensor in parts["model"].values()]
        if not bool(torch.stack(finite).all()):
            raise NonFiniteError(
                f"{run.folder}: step {step}: the weights are not finite; nothing was saved, earlier checkpoints stay; "
                f"{lower_what(config)}"
            )
        record = {key: None if value == math.inf else value for key, value in state.items()}
        record |= {"seed": config.seed, "attempt": run.attempt, "data": run.config.get("data")}
        write_checkpoint(run, step, parts, record, config.keep_checkpoints if optimizer else 1)


def save_is_due(config: Config, step: int, last: float) -> bool:
    """Whether this rank wants a checkpoint after `step` steps: by their number, or by the clock since `last`."""
    by_step = bool(config.save_interval) and step % config.save_interval == 0
    return by_step or (bool(config.save_minutes) and time.monotonic() - last > 60 * config.save_minutes)


def lower_what(config: Config) -> str:
    """The remedy for a loss that is not finite."""
    return f"lower --{'muon' if config.optimizer == 'muon' else 'adam'}_lr, --embed_lr or --head_lr"
