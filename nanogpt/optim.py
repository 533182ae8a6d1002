"""AdamW (Loshchilov and Hutter 2019) with weight decay on the matrices only, and its state keyed by parameter name."""

import torch
from torch import Tensor, nn

from nanogpt.common.adamw import AdamW
from nanogpt.common.errors import UserError
from nanogpt.config import Config

STATE_KEYS = ("exp_avg", "exp_avg_sq", "step")


def make_optimizer(model: nn.Module, config: Config) -> AdamW:
    """AdamW over the model's parameters; embeddings and matrices decay, biases and norms do not."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return AdamW(groups, lr=config.learning_rate, betas=(config.beta1, config.beta2), fused=True)


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state as flat tensors, `<parameter name>/<key>`; empty before the first step."""
    return {
        f"{name}/{key}": optimizer.state[parameter][key]
        for name, parameter in model.named_parameters()
        if parameter in optimizer.state
        for key in STATE_KEYS
    }


def load_optimizer_tensors(
    model: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], where: str
) -> None:
    """Put back what `optimizer_tensors` gave. UserError when names or shapes do not match this model."""
    parameters = dict(model.named_parameters())
    expected = {f"{name}/{key}" for name in parameters for key in STATE_KEYS}
    if tensors and set(tensors) != expected:
        odd = sorted(set(tensors) ^ expected)[0]
        raise UserError(f"{where}: optimizer state does not fit this model ({odd}); was the model changed?")
    for name, parameter in parameters.items() if tensors else ():
        state = {key: tensors[f"{name}/{key}"] for key in STATE_KEYS}
        if state["exp_avg"].shape != parameter.shape:
            raise UserError(
                f"{where}: {name} has shape {tuple(state['exp_avg'].shape)}, not {tuple(parameter.shape)}"
            )
        optimizer.state[parameter] = {
            key: value.to(parameter.device, torch.float32).clone() for key, value in state.items()
        }


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    """Set the learning rate of every group."""
    for group in optimizer.param_groups:
        group["lr"] = value
