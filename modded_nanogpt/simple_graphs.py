"""The small trainer's model on its device, as torch.compile sees it: made once for all runs of a process."""

import importlib
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modded_nanogpt import simple_setup
from modded_nanogpt.simple_config import Config
from modded_nanogpt.variants.baseline import Variant
from nanogpt.common.errors import UserError
from nanogpt.common.ranks import Ranks

MOST_GRAPHS = 64  # that may be compiled in one process: one a length and a variant, and one for validation
# The knobs that a graph depends on; Muon and Adam share one, and so do seeds and schedules.
DECIDING = ("variant", "num_layers", "num_heads", "model_dim", "sequence_length", "batch_size", "device_batch_size",
            "compile")  # fmt: skip


@dataclass(frozen=True)
class Graphs:
    """A model and how its losses are computed. `loss` and `losses` are the model's, compiled or not."""

    model: nn.Module
    loss: Callable[..., Tensor]
    losses: Callable[..., Tensor]
    attention: str
    compiled: bool


_made: dict[tuple, Graphs] = {}  # of this process, by what they depend on


def graphs_for(
    config: Config, rows: int, variant: Variant, ranks: Ranks, say: Callable[[str], None],
    make: Callable[[torch.dtype], nn.Module],
) -> Graphs:  # fmt: skip
    """The graphs of a run: those of an earlier run of this process where they fit, else new ones, warmed up.

    rows: of the vocabulary. The weights mean nothing yet.
    """
    key = (rows, *(getattr(config, name) for name in DECIDING))
    if key in _made:
        nothing = "; nothing is compiled" if _made[key].compiled else ""
        say(f"the model of an earlier run of this process, with new weights{nothing}")
        return _made[key]
    if _made:
        say(f"no earlier run of this process had a model like this one ({config.variant}): it is made anew")
    dtype, attention = simple_setup.tune(config, ranks.device)
    model = make(dtype).to(ranks.device)
    compiled = config.compile == "true" or (config.compile == "auto" and ranks.device.type == "cuda")
    loss, losses = model.loss, model.losses
    if compiled:
        torch._dynamo.config.recompile_limit = MOST_GRAPHS
        loss, losses = (torch.compile(call, fullgraph=True, dynamic=False) for call in (loss, losses))
    made = _made[key] = Graphs(model, loss, losses, attention, compiled)
    if compiled:
        _warm_up(made, config, variant, ranks, say)
    return made


def _warm_up(
    graphs: Graphs, config: Config, variant: Variant, ranks: Ranks, say: Callable[[str], None]
) -> None:
    """Compile and launch every graph once, before the clock starts."""
    began, model = time.perf_counter(), graphs.model
    gates = on_device(variant.gates(0, True), ranks.device)
    model.init_weights(0)
    count = config.device_batch_size * config.sequence_length
    tokens = torch.zeros(count, dtype=torch.int64, device=ranks.device)
    for length in dict.fromkeys(variant.lengths()):
        (graphs.loss(in_sequences(tokens, length), tokens, gates) * model.loss_scale).backward()
    with torch.no_grad():
        graphs.losses(tokens.view(-1, config.sequence_length), tokens, gates)
    model.zero_grad(set_to_none=True)
    ranks.wait()
    say(f"compiled and warmed up in {time.perf_counter() - began:.1f} s")


def variant_class(name: str) -> type[Variant]:
    """The class of a variant in this copy of the source. UserError when it is not made as it should be."""
    found = importlib.import_module(f"modded_nanogpt.variants.{name}").Variant
    if not (isinstance(found, type) and issubclass(found, Variant)):
        base = f"{Variant.__module__}.{Variant.__name__}"
        raise UserError(f"--variant={name}: its class Variant must be derived from {base}")
    return found


def on_device(gates: list[float] | None, device: torch.device) -> Tensor | None:
    """A variant's gates as a float32 tensor [gates]; None stays None."""
    return None if gates is None else torch.tensor(gates, dtype=torch.float32, device=device)


def in_sequences(tokens: Tensor, length: int) -> Tensor:
    """(N,) -> (ceil(N / length), length): the last sequence is filled up with zeros."""
    return F.pad(tokens, (0, -len(tokens) % length)).view(-1, length)


@torch.no_grad()
def sum_gradients(model: nn.Module, ranks: Ranks) -> None:
    """Sum the gradients over the ranks, in one message: always in the same order of addition."""
    if ranks.world_size > 1:
        gradients = [parameter.grad for parameter in model.parameters()]
        flat = ranks.sum(torch.cat([gradient.flatten() for gradient in gradients]))
        parts = flat.split([gradient.numel() for gradient in gradients])
        torch._foreach_copy_(gradients, [part.view_as(to) for part, to in zip(parts, gradients, strict=True)])
