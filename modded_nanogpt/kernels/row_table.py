"""A table of hashed rows too large for anything dense: its lookup, and the update of the rows that a cycle touched.

Replaces: a gradient, moments and an update of the table's own size, tens of GB each. Faster because only what was
touched moves: the lookup reads two rows a token and writes their sum once, where the compiler would gather them again
in each of some twenty places that read it; the update reads a cycle's gradients once and each of its rows once.
Invariants: entries come sorted by row (a stable sort), so one program finds all of a row's, adds them in float32 in
their order and updates the row at once: no atomics, no map of the table's size, no buffer of sums, and nothing that the
CPU must wait for to know a size. Exactness: the same bits again from the same entries; twins in `reference/row_table`.
Source: record 92 of the modded-nanogpt speedrun has the equations; it merges entries without sorting them.
"""

import torch
from torch import Tensor

from modded_nanogpt.kernels.launch import on_device_of, uses_kernels
from modded_nanogpt.kernels.reference import row_table as reference
from modded_nanogpt.kernels.reference.row_table import Entries, Rates

try:
    import triton
    import triton.language as tl
except ImportError:  # a CPU build of torch brings no Triton
    triton = None

__all__ = ["Entries", "Rates", "look_up", "sum_entries", "update_rows_"]

BLOCK_TOKENS, BLOCK_COLUMNS = 4, 256  # of a lookup's program
BLOCK_ENTRIES, ENTRY_WARPS = 1, 2  # of one row that are read at once: most have one or two


def look_up(source: Tensor, places: Tensor, pool: Tensor, signs: Tensor) -> Tensor:
    """(T, d): the sum over h of source[places[h, t]] times pool[signs[h, t]], in the dtype of `source` (R, d).

    places, signs: (H, T) int32; pool: (P, d) int8, each 1 or -1.
    """
    if not uses_kernels(source):
        return reference.look_up(source, places, pool, signs)
    halves, tokens = places.shape
    width = source.shape[1]
    found = source.new_empty(tokens, width)
    with on_device_of(source):
        _look_up_kernel[(triton.cdiv(tokens, BLOCK_TOKENS), triton.cdiv(width, BLOCK_COLUMNS))](
            source, places, pool, signs, found, tokens, width,
            HALVES=halves, BLOCK_T=BLOCK_TOKENS, BLOCK_D=BLOCK_COLUMNS, num_warps=4,
        )  # fmt: skip
    return found


def update_rows_(
    rows: Tensor, second: Tensor, last: Tensor, log_kept: Tensor, entries: Entries, rates: Rates
) -> None:
    """Update each row (M, d) that an entry has, its second moment (M,) float32 and its last event (M,) int32.

    log_kept: (events + 1,) float64, the logarithm of what all events up to each one leave of a second moment.
    """
    if not uses_kernels(rows):
        reference.update_rows_(rows, second, last, log_kept, entries, rates)
        return
    count, width = entries.ids.numel(), rows.shape[1]
    if not count:
        return
    with on_device_of(rows):
        _update_rows_kernel[(count,)](
            rows, second, last, log_kept, *_arguments(entries), count, width, rates.event, rates.beta2,
            rates.step_size, rates.decay, rates.scale, rates.epsilon, rates.cautious,
            SIGNED=entries.signs is not None, BLOCK_R=BLOCK_ENTRIES, BLOCK_D=triton.next_power_of_2(width),
            num_warps=ENTRY_WARPS,
        )  # fmt: skip


def sum_entries(entries: Entries, distinct: int) -> Tensor:
    """(distinct, d): the sums of the entries of each row, rows ascending, in the gradients' dtype.

    distinct: how many different rows the entries have, which the CPU must know.
    """
    if not uses_kernels(entries.gradients):
        return reference.sum_entries(entries, distinct)
    count, width = entries.ids.numel(), entries.gradients.shape[1]
    sums = entries.gradients.new_empty(distinct, width)
    if not count:
        return sums
    place = torch.cumsum(entries.ids.diff(prepend=entries.ids.new_full((1,), -1)).ne(0), 0)
    with on_device_of(sums):
        _sum_entries_kernel[(count,)](
            sums, place, *_arguments(entries), count, width, SIGNED=entries.signs is not None,
            BLOCK_R=BLOCK_ENTRIES, BLOCK_D=triton.next_power_of_2(width), num_warps=ENTRY_WARPS,
        )  # fmt: skip
    return sums


def _arguments(entries: Entries) -> tuple:
    """What kernels are given of entries; an absent tensor is one that they do not read."""
    signed = (entries.signs, entries.pool) if entries.signs is not None else (entries.ids, entries.ids)
    return (entries.ids, entries.order, entries.gradients, entries.gradients.shape[0], *signed)


if triton is not None:

    @triton.jit(do_not_specialize=["T"])
    def _look_up_kernel(
        source, places, pool, signs, found, T, D,
        HALVES: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
    ):  # fmt: skip
        """One program a block of tokens and of columns."""
        token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
        column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
        inside = (token < T)[:, None] & (column < D)[None, :]
        total = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
        for half in tl.static_range(HALVES):
            place = tl.load(places + half * T + token, mask=token < T, other=0).to(tl.int64)
            sign = tl.load(signs + half * T + token, mask=token < T, other=0)
            row = tl.load(source + place[:, None] * D + column[None, :], mask=inside, other=0.0)
            factor = tl.load(pool + sign[:, None] * D + column[None, :], mask=inside, other=0)
            total += row.to(tl.float32) * factor.to(tl.float32)
        at = token[:, None].to(tl.int64) * D + column[None, :]
        tl.store(found + at, total.to(found.dtype.element_ty), mask=inside)

    @triton.jit
    def _sum_of_row(
        place, row, ids, order, gradients, N, signs, pool, E, D,
        SIGNED: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
    ):  # fmt: skip
        """(BLOCK_D,) float32: the sum of the entries of `row`, the first of which is at `place`."""
        column = tl.arange(0, BLOCK_D)
        total = tl.zeros((BLOCK_D,), tl.float32)
        taken = tl.where(row >= 0, BLOCK_R, 0)
        while taken == BLOCK_R:
            at = place + tl.arange(0, BLOCK_R)
            mine = tl.load(ids + at, mask=at < E, other=-1) == row
            entry = tl.load(order + at, mask=mine, other=0)
            inside = mine[:, None] & (column < D)[None, :]
            source = (entry % N)[:, None] * D + column[None, :]
            tile = tl.load(gradients + source, mask=inside, other=0.0).to(tl.float32)
            if SIGNED:
                sign = tl.load(signs + entry, mask=mine, other=0)
                factor = tl.load(pool + sign[:, None] * D + column[None, :], mask=inside, other=0)
                tile *= factor.to(tl.float32)
            total += tl.sum(tile, axis=0)
            taken = tl.sum(mine.to(tl.int32), axis=0)
            place += BLOCK_R
        return total

    @triton.jit(do_not_specialize=["N", "E", "event"])
    def _update_rows_kernel(
        rows, second, last, log_kept, ids, order, gradients, N, signs, pool, E, D, event, beta2, step_size, decay,
        scale, epsilon, cautious, SIGNED: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
    ):  # fmt: skip
        """One program an entry; that of a row's first entry does the row's work, the others end at once."""
        place = tl.program_id(0)
        row = tl.load(ids + place)
        if tl.load(ids + place - 1, mask=place > 0, other=-1) == row:
            return
        column = tl.arange(0, BLOCK_D)
        inside = column < D
        # Asked for before the gradients, so that all of it is on its way at once.
        target = rows + row.to(tl.int64) * D + column
        p = tl.load(target, mask=inside, other=0.0).to(tl.float32)
        v = tl.load(second + row)
        missed = tl.load(log_kept + event - 1) - tl.load(log_kept + tl.load(last + row))
        g = scale * _sum_of_row(
            place, row, ids, order, gradients, N, signs, pool, E, D, SIGNED, BLOCK_R, BLOCK_D
        )
        v = beta2 * tl.exp(missed.to(tl.float32)) * v + (1 - beta2) * (tl.sum(g * g, axis=0) / D)
        u = g / (tl.sqrt(v) + epsilon) * step_size
        decays = (u * p > 0) | (cautious == 0)
        p -= u + tl.where(decays, decay * p, 0.0)
        tl.store(target, p.to(rows.dtype.element_ty), mask=inside)
        tl.store(second + row, v)
        tl.store(last + row, event)

    @triton.jit(do_not_specialize=["N", "E"])
    def _sum_entries_kernel(
        sums, slots, ids, order, gradients, N, signs, pool, E, D,
        SIGNED: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
    ):  # fmt: skip
        """One program an entry, as above; slots: which of the rows, from 1 on, each entry has."""
        place = tl.program_id(0)
        row = tl.load(ids + place)
        if tl.load(ids + place - 1, mask=place > 0, other=-1) == row:
            return
        column = tl.arange(0, BLOCK_D)
        total = _sum_of_row(place, row, ids, order, gradients, N, signs, pool, E, D, SIGNED, BLOCK_R, BLOCK_D)
        target = sums + (tl.load(slots + place) - 1) * D + column
        tl.store(target, total.to(sums.dtype.element_ty), mask=column < D)
