"""The optimizer of the speedrun: NorMuon and Adam over one set of parameters, cut over the ranks. No arithmetic here.

A step sends all gradients off, then takes one parameter after the other: waits for its sum, updates this rank's part,
sends the part back. The orders are data (`table.REDUCE_ORDER`, `table.UPDATE_ORDER`). There are no hooks: what happens
when can be read in `Optimizer.step`.

Matrices are updated in every step, the rest by Adam in every second one (`StepPlan.adam`), the gradients adding up in
between. While the embedding is tied, its gradient is added to the head's, and after an update it is copied from the
head.

Equal whatever the number of ranks: the lanes, the sums' order within a rank, and every operation of an update on its
matrix or row. Different: a sum over ranks is rounded (in the gradient's dtype) where one rank's sum over its lanes is
rounded elsewhere. With gradients whose sums are exact, 1, 2 and 4 ranks give bit-equal weights.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter

from modded_nanogpt import schedule
from modded_nanogpt.optim.adam import Adam
from modded_nanogpt.optim.averaging import Averages
from modded_nanogpt.optim.exchange import Sharded, Whole
from modded_nanogpt.optim.normuon import NorMuon
from modded_nanogpt.optim.orthogonalize import NEWTON_SCHULZ, POLAR_EXPRESS, SIX_ROUNDS
from modded_nanogpt.optim.row_table import RowTable
from modded_nanogpt.optim.sparse import TouchedRows
from modded_nanogpt.optim.table import REDUCE_ORDER, UPDATE_ORDER, Row, table
from nanogpt.common.errors import UserError
from nanogpt.common.ranks import Ranks

if TYPE_CHECKING:
    from modded_nanogpt.config import Config
    from modded_nanogpt.schedule import StepPlan

SMALL = "small"  # the unit of all parameters that are kept whole


@dataclass
class Unit:
    """A parameter, or the small ones together: how it travels and how it is updated."""

    name: str
    exchange: Sharded | Whole
    maths: NorMuon | Adam
    names: tuple[str, ...]  # of its parameters

    @property
    def is_adam(self) -> bool:
        return isinstance(self.maths, Adam)


class Optimizer:
    """NorMuon and Adam over the named `parameters` (`table` has a row for each), of which any may be absent.

    Make it before the model is compiled and before anything keeps views of the parameters: with several ranks, banks
    that do not divide move to larger memory. Tables whose rows get their gradients in place (`Row.lasting_gradient`)
    have a gradient of zeros from here on; the trainer never touches `.grad` of any parameter itself. row_table: no
    parameter; it is updated where the plan says so, and neither `tensors` nor `load` know it.
    """

    def __init__(
        self, parameters: Mapping[str, Parameter], config: "Config", ranks: Ranks, device: torch.device,
        row_table: RowTable | None = None,
    ) -> None:  # fmt: skip
        self.parameters, self.config, self.ranks, self.row_table = dict(parameters), config, ranks, row_table
        self.compile = device.type == "cuda" and config.compile != "false"
        self.pending = False  # whether gradients of Adam's parameters, or of n-grams, wait for a later step
        self.rows = table(config, self.parameters)
        self.units = {name: self._unit(name, row) for name, row in self.rows.items() if row.spread != "whole"}
        small = {name: self.parameters[name] for name, row in self.rows.items() if row.spread == "whole"}
        if small:
            exchange = Whole(small, ranks)
            self.units[SMALL] = Unit(SMALL, exchange, self._adam(small, exchange.weights), tuple(small))
        for unit in self.units.values():
            if unit.is_adam and not (unit.name == "embed" and config.embedding != "untied"):
                unit.maths.allocate()
        self.averages: Averages | None = None
        if config.averaging:
            exchanges = {name: unit.exchange for name, unit in self.units.items() if name != SMALL}
            self.averages = Averages(exchanges, schedule.total_steps(config), ranks)

    def _unit(self, name: str, row: Row) -> Unit:
        parameter = self.parameters[name]
        if row.spread == "rows":
            sparse = 1 < row.sparse_from <= self.ranks.world_size
            kind = TouchedRows if sparse else Sharded
            exchange = kind(name, parameter, tuple(parameter.shape), self.ranks, row.lasting_gradient)
            return Unit(name, exchange, self._adam([name], [exchange.weights]), (name,))
        config = self.config
        rows, columns = parameter.shape[-2:]
        if name == "qk_bank" and not config.qk_pairs:
            rows = columns  # whole matrices: the head pairs of one lie behind each other
        view = (parameter.numel() // (rows * columns), rows, columns)
        exchange = Sharded(name, parameter, view, self.ranks, row.lasting_gradient)
        base = max(1.0, rows / columns) ** 0.5
        multipliers = [base * row.lr * row.multipliers[k % len(row.multipliers)] for k in range(view[0])]
        multipliers += [0.0] * (exchange.share * self.ranks.world_size - view[0])
        polar = SIX_ROUNDS if config.two_momenta else POLAR_EXPRESS
        maths = NorMuon(
            exchange.weights, multipliers[exchange.mine], config.muon_lr, config.muon_wd, config.normuon_beta2,
            polar if config.polar_express else NEWTON_SCHULZ, config.normuon, config.cautious_decay,
            config.mantissa, config.two_momenta, self.compile,
        )  # fmt: skip
        return Unit(name, exchange, maths, (name,))

    def _adam(self, names: Iterable[str], weights: list[Tensor]) -> Adam:
        config, rows = self.config, [self.rows[name] for name in names]
        return Adam(rows, weights, config.adam_lr, config.adam_wd, config.cautious_decay, self.compile)

    def touch(self, name: str, rows: Tensor) -> None:
        """Say which rows of the table `name` a lane's gradients were added to: rows, an int tensor on the CPU.

        With many ranks only these then travel. Call it for every lane between two Adam steps, or for none: then the
        whole gradient does. It does nothing where the whole gradient travels anyway.
        """
        unit = self.units.get(name)
        if unit is not None and isinstance(unit.exchange, TouchedRows):
            unit.exchange.touch(rows)

    @torch.no_grad()
    def step(self, plan: "StepPlan") -> None:
        """One update of what `plan` says, from the gradients that the parameters hold; used gradients are cleared."""
        tied = (plan.tied or plan.untie) and {"head", "embed"} <= self.units.keys()
        due = {
            name: unit
            for name, unit in self.units.items()
            if (plan.adam or not unit.is_adam) and not (tied and name == "embed")
        }
        if plan.adam and tied:
            self._add_embeddings_gradient()
        for name in REDUCE_ORDER:
            if name in due:
                due[name].exchange.launch_reduce()
        if self.row_table is not None and plan.table is not None:
            self.row_table.update(plan.table, plan.lr)
        for name in UPDATE_ORDER:
            if name in due:
                self._update(due[name], plan)
        # The head's gather was the first of the large ones that the next forward pass, or the copy here, needs.
        for name in sorted(due, key=lambda name: name != "head"):
            if isinstance(due[name].exchange, Sharded):
                due[name].exchange.finish()
            if name == "head" and tied:
                self.parameters["embed"].data.copy_(self.parameters["head"].data)
        if plan.adam and plan.untie and tied:
            self.units["embed"].maths.adopt(self.units["head"].maths)
        self.pending = not plan.adam and any(unit.is_adam for unit in self.units.values())
        self.pending |= self.row_table is not None and self.row_table.waiting > 0
        if self.averages is not None:
            self.averages.tick(plan.step)

    @torch.no_grad()
    def average(self) -> None:
        """After the last step: the weights become the averages that the config asks for."""
        if self.averages is not None:
            self.averages.apply()

    def _update(self, unit: Unit, plan: "StepPlan") -> None:
        """Wait for the unit's gradient, update this rank's part, clear the gradient and send the part off."""
        exchange, scale = unit.exchange, 1.0 / self.ranks.world_size
        if isinstance(exchange, Whole):
            unit.maths.update(exchange.gradients(), plan.lr, scale, clear=False)
            exchange.clear(updated=True)
            return
        gradient = exchange.gradient()
        if unit.is_adam:
            if not unit.maths.allocated:  # an embedding that is free without a step that unties it
                unit.maths.allocate()
            unit.maths.update([gradient], plan.lr, scale, clear=exchange.in_place)
        else:
            unit.maths.update(gradient, plan.lr, plan.momentum, scale, plan.two)
        del gradient
        exchange.launch_gather()
        exchange.clear(updated=True)

    def _add_embeddings_gradient(self) -> None:
        """Add the tied embedding's gradient to the head's; there is none when the model reads rows of the head."""
        head, embed = self.parameters["head"], self.parameters["embed"]
        if embed.grad is not None:
            head.grad.add_(embed.grad)
            embed.grad = None

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of optimizer state on this rank, by unit; gradients and weights are not counted."""
        found = {
            name: sum(tensor.numel() * tensor.element_size() for tensor in _state_tensors(unit))
            for name, unit in self.units.items()
        }
        if self.row_table is not None:
            found["n-gram table"] = self.row_table.bytes
        return found if self.averages is None else found | {"averages": self.averages.bytes}

    def reset(self) -> None:
        """Forget everything, as after construction: what a warm-up leaves is undone. Weights stay."""
        for unit in self.units.values():
            if not unit.is_adam:
                unit.maths.reset()
            elif unit.name == "embed" and self.config.embedding != "untied":
                unit.maths.free()
            else:
                unit.maths.allocate()
            unit.exchange.clear(updated=False)
        self.pending = False
        if self.averages is not None:
            self.averages.reset()
        if self.row_table is not None:
            self.row_table.reset()

    @torch.no_grad()
    def tensors(self) -> dict[str, Tensor]:
        """The state as whole tensors, `<parameter>/<kind>`; all ranks must call, ranks other than 0 get {}.

        With one rank these are the state itself: write them before the next step. Best called when `pending` is false;
        else the waiting gradients come along, averaged over the ranks, which several ranks resume from only up to that
        rounding.
        """
        found: dict[str, Tensor] = {}
        for unit in self.units.values():
            if isinstance(unit.maths, NorMuon):
                for kind, part in unit.maths.state().items():
                    found[f"{unit.name}/{kind}"] = unit.exchange.collect(part)
            elif unit.maths.allocated:
                for kind, parts in unit.maths.state().items():
                    for name, part in zip(unit.names, parts, strict=True):
                        whole = isinstance(unit.exchange, Whole)
                        found[f"{name}/{kind}"] = part if whole else unit.exchange.collect(part)
                for name in unit.names:
                    found[f"{name}/updates"] = torch.tensor(unit.maths.updates)
            if unit.is_adam and self.pending:
                waiting = [name for name in unit.names if self.parameters[name].grad is not None]
                found |= {f"{name}/gradient": self._average_gradient(name) for name in waiting}
        if self.averages is not None:
            found |= self.averages.tensors()
        return found if self.ranks.is_main else {}

    def _average_gradient(self, name: str) -> Tensor:
        gradient = self.parameters[name].grad
        if self.ranks.world_size == 1:
            return gradient
        average = gradient.clone()
        dist.all_reduce(average)
        return average.div_(self.ranks.world_size).cpu()

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor], where: str = "checkpoint") -> None:
        """Put back what `tensors` gave, on every rank, for any number of ranks. UserError when it does not fit.

        The weights are the trainer's to load, in place. `where` names the source in an error.
        """
        expected = self._expected(tensors)
        if expected.keys() != tensors.keys():
            odd = sorted(expected.keys() ^ tensors.keys())[0]
            raise UserError(
                f"{where}: optimizer state does not fit this model ({odd}); was the model changed?"
            )
        for name, shape in expected.items():
            if tuple(tensors[name].shape) != shape:
                raise UserError(f"{where}: {name} has shape {tuple(tensors[name].shape)}, not {shape}")
        self.reset()
        for unit in self.units.values():
            if isinstance(unit.maths, NorMuon):
                for kind, part in unit.maths.state().items():
                    unit.exchange.distribute_(part, tensors[f"{unit.name}/{kind}"])
            elif f"{unit.names[0]}/first" in tensors:
                self._load_adam(unit, tensors)
        for name in self.parameters:
            if f"{name}/gradient" in tensors:
                self._load_gradient(name, tensors[f"{name}/gradient"])
                self.pending = True
        if self.averages is not None:
            self.averages.load(tensors)

    def _load_adam(self, unit: Unit, tensors: Mapping[str, Tensor]) -> None:
        unit.maths.allocate()
        for kind, parts in unit.maths.state().items():
            for name, part in zip(unit.names, parts, strict=True):
                whole = tensors[f"{name}/{kind}"]
                if isinstance(unit.exchange, Whole):
                    part.copy_(whole)
                else:
                    unit.exchange.distribute_(part, whole)
        unit.maths.updates = int(tensors[f"{unit.names[0]}/updates"])

    def _load_gradient(self, name: str, gradient: Tensor) -> None:
        parameter = self.parameters[name]
        if parameter.grad is None:
            parameter.grad = torch.empty_like(parameter)
        parameter.grad.copy_(gradient)
        if name in self.units and isinstance(self.units[name].exchange, TouchedRows):
            self.units[name].exchange.came_whole()

    def _expected(self, tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
        """Names and shapes of a checkpoint of this optimizer that was saved when `tensors` was.

        Either all of Adam's gradients wait or none; a tied embedding has no moments, and need not have a gradient.
        """
        found: dict[str, tuple[int, ...]] = {}
        pending = any(name.endswith("/gradient") for name in tensors)
        for unit in self.units.values():
            if isinstance(unit.maths, NorMuon):
                for kind, part in unit.maths.state().items():
                    found[f"{unit.name}/{kind}"] = (unit.exchange.view[0], *part.shape[1:])
                continue
            for name in unit.names:
                shape = tuple(self.parameters[name].shape)
                if name != "embed" or "embed/first" in tensors:
                    found |= {f"{name}/first": shape, f"{name}/second": shape, f"{name}/updates": ()}
                if pending and (name != "embed" or "embed/gradient" in tensors):
                    found[f"{name}/gradient"] = shape
        return found if self.averages is None else found | self.averages.shapes(tensors)


def _state_tensors(unit: Unit) -> list[Tensor]:
    if isinstance(unit.maths, NorMuon):
        return [*unit.maths.state().values(), unit.maths.multipliers]
    return [*unit.maths.first, *unit.maths.second]
