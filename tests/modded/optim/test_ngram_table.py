"""The n-gram table as the trainer has it: lookups, updates over cycles, saving, on one rank (`rank_runs` has two)."""

import dataclasses
import math

import pytest
import torch

from modded_nanogpt import ngrams
from modded_nanogpt.optim.row_table import RowTable
from nanogpt.common.errors import UserError
from nanogpt.common.ranks import Ranks
from tests.modded.optim.rank_runs import TABLE_CONFIG, table_lane, train_table

ALONE = Ranks(0, 0, 1, torch.device("cpu"))
EARLY, LATE = (0.95, 5.0), (0.9025, 10.0)


def literal(end: int, pool: torch.Tensor) -> dict[int, torch.Tensor]:
    """{row: its values} after `end` updates, in float64, the specification read aloud."""
    rows, second, missed = {}, {}, {}
    for event in range(1, end + 1):
        beta2, wd = EARLY if event == 1 else LATE
        eta = 70 * 0.008 * 0.5
        sums: dict[int, torch.Tensor] = {}
        for number in (2 * event - 2, 2 * event - 1):
            batch, gradient = table_lane(number)
            tokens = batch.inputs.numpy()
            for which in range(2):
                of, signs = ngrams.gram_rows(tokens, 80)[which], ngrams.gram_signs(tokens, 64)[which]
                for t in range(len(tokens)):
                    part = gradient[t].double() * pool[signs[t]]
                    sums[int(of[t])] = sums.get(int(of[t]), 0) + part
        for row in range(80):
            if row not in sums:
                missed[row] = missed.get(row, 1.0) * beta2
                continue
            g = sums[row]
            v = second.get(row, 0.0) * missed.pop(row, 1.0) * beta2 + (1 - beta2) * g.square().mean()
            second[row], p = v, rows.get(row, torch.zeros(96, dtype=torch.float64))
            u = g / (v.sqrt() + 1e-10) * eta * math.sqrt(1 - beta2**event)
            rows[row] = p - u - torch.where(u * p > 0, eta * eta * 0.005 * wd * p, 0.0)
    return rows


def test_cycles_by_the_specification():
    table = RowTable(TABLE_CONFIG, ALONE, torch.float32)
    train_table(table, 0, 3)
    expected = literal(3, table.pool)
    touched = sorted(expected)
    assert len(touched) > 40 and torch.equal(table.last.nonzero().flatten(), torch.tensor(touched))
    want = torch.stack([expected[row] for row in touched]).float()
    torch.testing.assert_close(table.rows[touched], want, rtol=1e-4, atol=1e-5)
    assert set(table.pool.unique().tolist()) == {-1, 1} and abs(table.pool.float().mean()) < 0.05

    batch, _ = table_lane(7)
    rows, signs = batch.gram_rows.long(), batch.gram_signs.long()
    looked_up = sum(table.rows[rows[h]] * table.pool[signs[h]] for h in range(2))
    torch.testing.assert_close(table.vectors(batch), looked_up)


def test_what_is_loaded_goes_on_the_same_and_a_reset_begins_anew():
    whole, first, second = (RowTable(TABLE_CONFIG, ALONE, torch.float32) for _ in range(3))
    train_table(whole, 0, 4)
    train_table(first, 0, 2)
    saved = {name: tensor.clone() for name, tensor in first.tensors().items()}
    train_table(second, 0, 1)
    second.keep(*table_lane(99))  # is forgotten
    second.load(saved, "here")
    train_table(second, 2, 4)
    assert all(torch.equal(a, whole.tensors()[name]) for name, a in second.tensors().items())
    addresses = [tensor.data_ptr() for _, tensor in second.lasting()]
    second.reset()
    assert not second.rows.any() and not second.second.any() and not second.last.any() and second.event == 0
    train_table(second, 0, 4)
    assert torch.equal(second.rows, whole.rows)
    assert addresses == [tensor.data_ptr() for _, tensor in second.lasting()]
    other = RowTable(dataclasses.replace(TABLE_CONFIG, table_rows="128"), ALONE, torch.float32)
    for bad in (saved, {}):
        with pytest.raises(UserError, match="here: its n-gram table is not this run's of 128 rows"):
            other.load(bad, "here")


def test_more_than_a_cycle_is_a_fault():
    table = RowTable(TABLE_CONFIG, ALONE, torch.float32)
    with pytest.raises(RuntimeError, match="tokens since its last update, room for"):
        for number in range(1000):
            table.keep(*table_lane(number))
