"""The table of hashed n-grams: its rows, who has which, and how they learn (record 92). No parameter of the model.

With 84.6 M rows it is a hundred times the rest of the model, and a step touches one row in a hundred. So there is no
gradient of its size: lanes leave the gradients of their tokens here, and some steps (`schedule.table_event`) update the
rows that were touched since the last such step, a cycle. With g the sum of a row's gradients in a cycle, e the number
of the update, eta the learning rate of the step, W the ranks, v one number a row:

    v <- (product of b2 over the updates that missed the row) v,    v <- b2 v + (1 - b2) mean(g^2)
    u = g / (sqrt(v) + epsilon) x eta sqrt(1 - b2^e)
    p <- p - u - eta^2 wd p [u p > 0]

There is no first moment and no copy of p in float32. A row that is touched for the first time late in the run moves by
several eta: it may have few other chances.

Of W ranks each has an equal range of rows. Before a lane its different rows come from their owners; at an update the
sums of each row go to them.
"""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from modded_nanogpt import layer_plan, schedule, table_plan
from modded_nanogpt.kernels.row_table import Entries, Rates, look_up, sum_entries, update_rows_
from modded_nanogpt.ngrams import HALVES
from modded_nanogpt.optim.row_exchange import RowExchange
from nanogpt.common.errors import UserError
from nanogpt.common.ranks import Ranks

if TYPE_CHECKING:
    from modded_nanogpt.batches import Batch
    from modded_nanogpt.config import Config

RATE = 70.0  # times Adam's base learning rate
EPSILON = 1e-10
SIGNS_SEED = 83  # the same signs in every run: no checkpoint holds them
PIECE_ROWS = 1 << 18  # that are gathered at once for a checkpoint


class RowTable:
    """The rows of this rank, and the gradients that wait for the next update. UserError where memory is too small."""

    def __init__(self, config: "Config", ranks: Ranks, dtype: torch.dtype, learns: bool = True) -> None:
        self.config, self.ranks = config, ranks
        size, device = layer_plan.size(config), ranks.device
        self.count = layer_plan.table_rows(config)
        self.share = -(-self.count // ranks.world_size)
        self.first = ranks.rank * self.share
        tokens = table_plan.cycle_tokens(config, ranks.world_size) if learns else 0
        try:
            self.rows = torch.zeros(self.share, size.width, dtype=dtype, device=device)
            self.second = torch.zeros(self.share, dtype=torch.float32, device=device)
            self.last = torch.zeros(self.share, dtype=torch.int32, device=device)
            self.gradients = torch.zeros(tokens, size.width, dtype=dtype, device=device)
            self.source = self.rows  # what lookups read
            if ranks.world_size > 1:
                most = HALVES * max(table_plan.fetched_tokens(config))
                self.source = torch.zeros(most, size.width, dtype=dtype, device=device)
        except torch.OutOfMemoryError as error:
            needed = table_plan.share_bytes(config, ranks.world_size, dtype.itemsize) / 2**30
            raise UserError(
                f"--table_rows={config.table_rows}: its {needed:.1f} GiB a rank do not fit into the memory of "
                f"{device}; take fewer, or auto"
            ) from error
        self.ids = torch.zeros(HALVES, tokens, dtype=torch.int32, device=device)
        self.signs = torch.zeros(HALVES, tokens, dtype=torch.int32, device=device)
        drawn = torch.Generator().manual_seed(SIGNS_SEED)
        pool = torch.randint(0, 2, (size.sign_rows, size.width), generator=drawn, dtype=torch.int8)
        self.pool = (2 * pool - 1).to(device)
        early, events = schedule.table_events(config)
        betas = [schedule.TABLE_EARLY[0]] * early + [schedule.TABLE_LATE[0]] * max(1, events - early)
        kept = np.cumsum(np.log(np.array([1.0, *betas])))
        self.log_kept = torch.from_numpy(kept).to(device)
        self.exchange = RowExchange(ranks, self.share) if ranks.world_size > 1 else None
        self.event = 0  # updates so far
        self.waiting = 0  # tokens whose gradients wait
        self._wanted: list[np.ndarray] = []  # of several ranks: the different rows of each lane of the cycle

    def fetch(self, batch: "Batch") -> None:
        """Bring the lane's rows here, before `vectors`; all ranks call it, whoever has nothing to look up too."""
        self.fetch_rows(batch.gram_wanted)

    def fetch_rows(self, wanted: Tensor | None) -> None:
        """The same by the rows' numbers; None: this rank needs none and serves the others."""
        if self.exchange is not None:
            self.exchange.pull(wanted, self.rows, self.source)

    def vectors(self, batch: "Batch") -> Tensor:
        """(T, d): what the lane's pairs and triples look up. Reads memory that stays where it is."""
        places = batch.gram_rows if self.exchange is None else batch.gram_places
        return look_up(self.source, places, self.pool, batch.gram_signs)

    def keep(self, batch: "Batch", gradient: Tensor) -> None:
        """Add a lane's gradient (T, d) of `vectors` to what waits; copied. RuntimeError for more than a cycle has."""
        tokens, room = gradient.shape[0], self.gradients.shape[0]
        place = slice(self.waiting, self.waiting + tokens)
        if place.stop > room:
            raise RuntimeError(
                f"n-gram table: {place.stop:,} tokens since its last update, room for {room:,}"
            )
        self.gradients[place].copy_(gradient)
        self.ids[:, place].copy_(batch.gram_rows)
        self.signs[:, place].copy_(batch.gram_signs)
        self.waiting = place.stop
        if self.exchange is not None:
            self._wanted.append(batch.gram_wanted.numpy())

    @torch.no_grad()
    def update(self, kind: tuple[float, float], factor: float) -> None:
        """Update the rows of a cycle. kind: `StepPlan.table`; factor: of the learning rate, by the schedule."""
        self.event += 1
        beta2, decay = kind
        eta = RATE * self.config.adam_lr * factor
        rates = Rates(
            event=min(self.event, self.log_kept.numel() - 1),  # more than the run has: a warm-up's
            beta2=beta2,
            step_size=eta * math.sqrt(1 - beta2**self.event),
            decay=eta * eta * self.config.adam_wd * decay,
            scale=1.0 / self.ranks.world_size,
            epsilon=EPSILON,
            cautious=self.config.cautious_decay,
        )
        entries = self._entries()
        if self.exchange is not None:
            distinct = np.unique(np.concatenate(self._wanted))
            rows, sums = self.exchange.push(distinct, sum_entries(entries, len(distinct)))
            entries = Entries(*torch.sort(rows - self.first, stable=True), sums)
        update_rows_(self.rows, self.second, self.last, self.log_kept, entries, rates)
        self.forget()

    def _entries(self) -> Entries:
        """What waits, in the order of its rows."""
        ids, order = torch.sort(self.ids[:, : self.waiting].flatten(), stable=True)
        signs = self.signs[:, : self.waiting].flatten()
        return Entries(ids, order, self.gradients[: self.waiting], signs, self.pool)

    def forget(self) -> None:
        """Drop the gradients that wait."""
        self.waiting, self._wanted = 0, []

    def reset(self) -> None:
        """As at the first step: rows of zeros, nothing learned."""
        self.forget()
        self.event = 0
        for tensor in (self.rows, self.second, self.last):
            tensor.zero_()

    @property
    def bytes(self) -> int:
        """Of what this rank keeps for the table."""
        kept = (self.rows, self.second, self.last, self.gradients, self.ids, self.signs, self.pool)
        found = sum(tensor.numel() * tensor.element_size() for tensor in kept)
        return found + (self.source.numel() * self.source.element_size() if self.exchange is not None else 0)

    def lasting(self) -> list[tuple[str, Tensor]]:
        """(name, tensor) of what lanes read: it must not move while there are graphs of them."""
        return [("n-gram table", self.source), ("signs of n-grams", self.pool)]

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint holds, whole, on rank 0; all ranks call, the others get {}. Nothing may wait."""
        parts = {"rows": self.rows, "second": self.second, "last": self.last}
        if self.exchange is not None:
            parts = {
                name: self.exchange.collect(part, self.count, PIECE_ROWS) for name, part in parts.items()
            }
        found = {**parts, "event": torch.tensor(self.event)}
        return found if self.ranks.is_main else {}

    def load(self, tensors: Mapping[str, Tensor], where: str) -> None:
        """Put back what `tensors` gave, for any number of ranks. UserError when it is another table's."""
        found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        width = self.rows.shape[1]
        if found != {
            "rows": (self.count, width),
            "second": (self.count,),
            "last": (self.count,),
            "event": (),
        }:
            raise UserError(
                f"{where}: its n-gram table is not this run's of {self.count:,} rows; start another run, or give "
                "the run's own --table_rows"
            )
        self.reset()
        mine = slice(self.first, self.first + self.share)
        for name, part in (("rows", self.rows), ("second", self.second), ("last", self.last)):
            whole = tensors[name][mine]
            part[: len(whole)].copy_(whole)
        self.event = int(tensors["event"])
