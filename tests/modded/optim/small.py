"""A small set of parameters with every name of the optimizer's table, and gradients for it, the same everywhere."""

import dataclasses

import torch
from torch import Tensor
from torch.nn import Parameter

from modded_nanogpt import schedule
from modded_nanogpt.config import PRESETS, Config
from nanogpt.common.flags import parse

WIDTH, VOCABULARY = 16, 24
SHAPES = {
    "qk_bank": (
        6,
        8,
        WIDTH,
    ),  # pairs of heads of 4: two groups are a whole matrix; 3 matrices, padded on 2 ranks
    "vo_bank": (4, WIDTH, WIDTH),
    "mlp_bank": (3, 2, 32, WIDTH),  # 6 matrices: padded on 4 ranks
    "scalars": (8,),
    "smear_gate": (1, 12),
    "ve_gates": (2, 2, 12),
    "head": (VOCABULARY, WIDTH),
    "embed": (VOCABULARY, WIDTH),
    "bigram": (30, WIDTH),  # padded on 4 ranks
    "value_embeds": (2 * VOCABULARY, WIDTH),
    "embed2": (VOCABULARY, WIDTH),
    "post_lambdas": (3, 2),
    "residual_lambdas": (3, 2),
    "mudd_w1": (2, 8, WIDTH),
    "mudd_w2": (2, 5, 8),
    "mudd_b2": (2, 5),
    "gate_w1": (2, 8, WIDTH),
    "gate_w2": (2, 7, 8),
    "gate_b2": (2, 7),
    "gate_scale": (1,),
    "static_gates": (5,),
}
WIDE = {"scalars", "post_lambdas", "residual_lambdas", "gate_scale", "static_gates"}  # float32 always
LANES = 4
STEPS = 8
UNTIE = 3


def config_of(**changes: object) -> Config:
    words = ["record89", "--recipe=tiny_record89", "--device=cpu"]
    return dataclasses.replace(parse(Config, words, prog="t", description="t", presets=PRESETS), **changes)


def parameters(dtype: torch.dtype = torch.float32, leave_out: tuple[str, ...] = ()) -> dict[str, Parameter]:
    """Initial weights, those of the down-projections zero and those of the embedding the head's."""
    generator = torch.Generator().manual_seed(5)
    found = {}
    for name, shape in SHAPES.items():
        values = torch.randn(shape, generator=generator, dtype=torch.float64) * 0.1
        if name == "mlp_bank":
            values[:, 1] = 0
        if name == "embed" and "head" in found:
            values = found["head"].double()
        if name not in leave_out:
            found[name] = Parameter(values.to(torch.float32 if name in WIDE else dtype))
    return {name: parameter for name, parameter in found.items() if name not in leave_out}


def lane_gradient(name: str, step: int, lane: int) -> Tensor:
    """Sixteenths in float64: their sums over lanes and steps are exact in bfloat16. Some rows of tables get none."""
    seed = 1000 * step + 10 * lane + 100_000 * sorted(SHAPES).index(name)
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(-8, 9, SHAPES[name], generator=generator).double() / 16
    if name in ("embed", "bigram", "value_embeds"):
        values[torch.rand(SHAPES[name][0], generator=generator) < 0.5] = 0
    return values


def add_gradients(
    parameters: dict[str, Parameter], step: int, rank: int = 0, world_size: int = 1, factor: float = 1.0
) -> None:
    """What the backward passes of this rank's lanes leave: with one rank the mean over the lanes.

    With a `factor` that is no power of two, the sums are rounded.
    """
    for name, parameter in parameters.items():
        for lane in range(rank, LANES, world_size):
            gradient = lane_gradient(name, step, lane) * (factor ** (lane + 1) * world_size / LANES)
            gradient = gradient.to(parameter.dtype)
            if parameter.grad is None:
                parameter.grad = gradient
            else:
                parameter.grad += gradient


def plan_of(config: Config, step: int, steps: int = STEPS, untie: int = UNTIE) -> schedule.StepPlan:
    """Falling learning rate, rising momentum; tied up to `untie` where the config says so."""
    becomes_free = config.embedding == "tied_then_untied"
    return dataclasses.replace(
        schedule.at(config, 0),
        step=step,
        lr=1.5 - step / steps,
        momentum=0.85 + 0.01 * step,
        two=schedule.two_momenta(config, step),
        adam=schedule.is_adam_step(config, step),
        tied=config.embedding == "tied" or (becomes_free and step <= untie),
        untie=becomes_free and step == untie,
    )
