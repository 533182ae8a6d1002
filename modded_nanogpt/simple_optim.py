"""The small trainer's optimizers: Muon with Adam beside it, Adam for everything, or whatever a variant builds."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from modded_nanogpt.optim.orthogonalize import MARGINS, POLAR_EXPRESS, orthogonalize
from modded_nanogpt.simple_config import Config, Plan, lr_factor
from nanogpt.common.adamw import AdamW
from nanogpt.common.errors import UserError

if TYPE_CHECKING:
    from modded_nanogpt.variants.baseline import Variant

MUON_MOMENTUM = (0.85, 0.95, 300)  # from, to, steps
EMBED_BETAS, MATRIX_BETAS = (0.8, 0.95), (0.9, 0.95)
NUMBER = "number:"  # before the key of a state entry that is no tensor


def optimizer_of(
    model: nn.Module, variant: "Variant", config: Config, plan: Plan
) -> "Optimizer | OwnOptimizer":
    """The variant's own optimizer, or the trainer's. UserError for one that leaves parameters out."""
    own = variant.build_optimizer(dict(model.named_parameters()), config)
    return Optimizer(model, config, plan) if own is None else OwnOptimizer(model, own, config, plan)


class Muon:
    """Muon (K. Jordan 2024): momentum whose singular values are set to 1, for the matrices of the layers.

        M <- m M + (1 - m) G,   U = m M + (1 - m) G,   W <- (1 - lr wd) W - lr sqrt(max(1, rows / columns)) polar(U)

    Matrices of one shape are worked on together. Every rank makes the same update of everything.
    """

    def __init__(
        self, parameters: Sequence[nn.Parameter], lr: float, decay: float, dtype: torch.dtype
    ) -> None:
        self.lr, self.decay, self.dtype = lr, decay, dtype
        self.groups: dict[str, list[nn.Parameter]] = {}
        for parameter in parameters:
            rows, columns = parameter.shape[-2:]
            self.groups.setdefault(f"{rows}x{columns}", []).append(parameter)
        self.momentum = {name: torch.zeros_like(self._stacked(group)) for name, group in self.groups.items()}
        for buffer in self.momentum.values():
            if buffer.is_cuda:  # Triton compiles for each shape: now, and not in the first step, on the clock
                orthogonalize(buffer.to(dtype), POLAR_EXPRESS)

    @staticmethod
    def _stacked(tensors: Sequence[Tensor]) -> Tensor:
        return torch.cat([tensor.detach().reshape(-1, *tensor.shape[-2:]) for tensor in tensors])

    @torch.no_grad()
    def step(self, factor: float, momentum: float) -> None:
        """One update with the learning rate times `factor`."""
        for name, group in self.groups.items():
            gradient, buffer = self._stacked([parameter.grad for parameter in group]), self.momentum[name]
            buffer.lerp_(gradient, 1 - momentum)
            mixed = gradient.lerp_(buffer, momentum)
            size = MARGINS[POLAR_EXPRESS] * torch.linalg.vector_norm(mixed, dim=(1, 2), keepdim=True)
            update = orthogonalize((mixed / (size + 1e-12)).to(self.dtype), POLAR_EXPRESS).float()
            _, rows, columns = update.shape
            parts = update.split([parameter.numel() // (rows * columns) for parameter in group])
            parts = [part.view_as(parameter) for part, parameter in zip(parts, group, strict=True)]
            rate = self.lr * factor
            torch._foreach_mul_(group, 1 - rate * self.decay)
            torch._foreach_add_(group, parts, alpha=-rate * math.sqrt(max(1.0, rows / columns)))


class Optimizer:
    """Muon, or Adam (Kingma and Ba 2014; decay as Loshchilov and Hutter 2019), for the matrices; Adam for the rest."""

    def __init__(self, model: nn.Module, config: Config, plan: Plan) -> None:
        self.config, self.plan = config, plan
        self.names = {parameter: name for name, parameter in model.named_parameters()}
        matrices = [parameter for parameter, name in self.names.items() if name not in ("embed", "head")]
        rest = {"warmup": 0, "betas": EMBED_BETAS, "eps": 1e-10, "weight_decay": 0.0}
        groups = [
            {"params": [model.embed], "base": config.embed_lr, **rest},
            {"params": [model.head], "base": config.head_lr, **rest},
        ]
        self.muon = None
        if config.optimizer == "muon":
            self.muon = Muon(matrices, config.muon_lr, config.muon_wd, model.dtype)
        else:
            own = {"warmup": config.adam_warmup, "betas": MATRIX_BETAS, "eps": 1e-8}
            groups.append({"params": matrices, "base": config.adam_lr, "weight_decay": config.adam_wd, **own})
        self.adam = AdamW(groups, fused=True)

    def step(self, step: int) -> None:
        """The update of step `step`; gradients are dropped."""
        factor = lr_factor(self.plan, step)
        for group in self.adam.param_groups:
            group["lr"] = group["base"] * factor * min(1.0, (step + 1) / max(1, group["warmup"]))
        self.adam.step()
        if self.muon:
            low, high, steps = MUON_MOMENTUM
            self.muon.step(factor, low + (high - low) * min(1.0, step / steps))
        for parameter in self.names:
            parameter.grad = None

    def tensors(self) -> dict[str, Tensor]:
        """The state for a checkpoint, by name, not copied."""
        found = {
            f"{self.names[parameter]}/{key}": value
            for parameter, state in self.adam.state.items()
            for key, value in state.items()
        }
        buffers = self.muon.momentum if self.muon else {}
        return found | {f"momentum/{name}": buffer for name, buffer in buffers.items()}

    def load(self, tensors: dict[str, Tensor], where: str) -> None:
        """Put back what `tensors` gave. UserError when it does not fit."""
        mine = [parameter for group in self.adam.param_groups for parameter in group["params"]]
        try:
            for parameter in mine:
                keys = ("step", "exp_avg", "exp_avg_sq")
                state = {key: tensors[f"{self.names[parameter]}/{key}"].to(parameter.device) for key in keys}
                self.adam.state[parameter] = state
            for name, buffer in (self.muon.momentum if self.muon else {}).items():
                buffer.copy_(tensors[f"momentum/{name}"])
        except (KeyError, RuntimeError) as error:
            why = f"its optimizer does not fit this run ({error})"
            raise UserError(f"{where}: {why}; was the configuration changed?") from None


class OwnOptimizer:
    """Any torch optimizer that a variant has built. Each group's learning rate follows the trainer's schedule."""

    def __init__(self, model: nn.Module, own: torch.optim.Optimizer, config: Config, plan: Plan) -> None:
        self.own, self.plan = own, plan
        names = {parameter: name for name, parameter in model.named_parameters()}
        self.parameters = [parameter for group in own.param_groups for parameter in group["params"]]
        left = [
            name
            for parameter, name in names.items()
            if not any(parameter is mine for mine in self.parameters)
        ]
        if left:
            raise UserError(
                f"--variant={config.variant}: build_optimizer leaves out {', '.join(left[:3])}; put them into a group"
            )
        self.names = [names[parameter] for parameter in self.parameters]
        self.rates = [float(group["lr"]) for group in own.param_groups]

    def step(self, step: int) -> None:
        """The update of step `step`; gradients are dropped."""
        for group, rate in zip(self.own.param_groups, self.rates, strict=True):
            group["lr"] = rate * lr_factor(self.plan, step)
        self.own.step()
        self.own.zero_grad(set_to_none=True)

    def tensors(self) -> dict[str, Tensor]:
        """The state for a checkpoint, by name; numbers become tensors."""
        found = {}
        for parameter, name in zip(self.parameters, self.names, strict=True):
            for key, value in self.own.state.get(parameter, {}).items():
                if isinstance(value, Tensor):
                    found[f"{name}/{key}"] = value
                elif isinstance(value, int | float):
                    kind = torch.int64 if isinstance(value, int) else torch.float64
                    found[f"{name}/{NUMBER}{key}"] = torch.tensor(value, dtype=kind)
                else:
                    raise UserError(
                        f"the optimizer's state {key!r} is a {type(value).__name__}, which no checkpoint holds; keep "
                        "tensors and numbers there"
                    )
        return found

    def load(self, tensors: dict[str, Tensor], where: str) -> None:
        """Put back what `tensors` gave. UserError when it does not fit."""
        places = {name: index for index, name in enumerate(self.names)}
        state: dict[int, dict] = {}
        for label, tensor in tensors.items():
            name, _, key = label.rpartition("/")
            if name not in places:
                raise UserError(
                    f"{where}: its optimizer does not fit this run ({label}); was the variant changed?"
                )
            value = tensor.item() if key.startswith(NUMBER) else tensor
            state.setdefault(places[name], {})[key.removeprefix(NUMBER)] = value
        self.own.load_state_dict({"state": state, "param_groups": self.own.state_dict()["param_groups"]})
