"""How large the n-gram table is, how often it learns, and what a smaller one costs in steps."""

import dataclasses

import pytest

from modded_nanogpt import schedule, table_plan
from modded_nanogpt.config import PRESETS, Config
from nanogpt.common.errors import UserError
from nanogpt.common.flags import parse_values

RECORD, GIB = 84_602_880, 2**30


def config(*words: str) -> Config:
    return Config(**parse_values(Config, list(words), prog="t", description="t", presets=PRESETS))


def rows(settled: Config) -> int:
    return int(settled.table_rows)


def test_the_records_updates():
    """Every odd step before 336 of 1,194, then the steps that are 3 mod 4."""
    record = config("record")
    events = [step for step in range(1194) if schedule.at(record, step).table]
    assert events == [s for s in range(1194) if (s % 2 == 1 if s < 336 else s % 4 == 3)]
    kinds = [schedule.at(record, step).table for step in events]
    assert schedule.table_events(record) == (kinds.count((0.95, 5.0)), len(kinds)) == (168, 382)
    assert kinds == [(0.95, 5.0)] * 168 + [(0.9025, 10.0)] * 214


@pytest.mark.parametrize(
    "flags", [("--steps=105", "--extension_steps=6"), ("--adam_every=3",), ("--steps=4",)]
)
def test_updates_of_other_runs_are_counted_too(flags):
    of = config("record", *flags)
    kinds = [schedule.at(of, step).table for step in range(schedule.total_steps(of))]
    early = sum(kind == schedule.TABLE_EARLY for kind in kinds)
    assert schedule.table_events(of) == (early, sum(kind is not None for kind in kinds))
    tokens, waiting = 0, 0
    for step, kind in enumerate(kinds):
        waiting += schedule.at(of, step).batch_tokens
        tokens = max(tokens, waiting)
        waiting = 0 if kind else waiting
    assert table_plan.cycle_tokens(of, 2) == tokens // 2


def test_auto_takes_what_fits():
    """The specification's table: the record's on 8 GPUs of 80 GiB, fewer on one; the number is whole millions."""
    assert rows(table_plan.settle(config("record"), 8, 79 * GIB)) == RECORD
    alone = rows(table_plan.settle(config("record"), 1, 79 * GIB))
    assert 20_000_000 <= alone <= 40_000_000 and alone % 1_000_000 == 0
    small = table_plan.settle(config("record"), 1, 40 * GIB)
    assert rows(table_plan.settle(config("record", "--lanes=8"), 1, 40 * GIB)) < rows(small) < alone
    assert table_plan.share_bytes(small, 1) < 25 * GIB
    assert rows(table_plan.settle(config("record"), 1, 8 * GIB)) == table_plan.WHOLE_ROWS
    assert rows(table_plan.settle(config("record", "--device=cpu"), 1, None)) == table_plan.CPU_ROWS
    assert rows(table_plan.settle(config("tiny"), 1, 79 * GIB)) == 8192
    assert rows(table_plan.settle(config("record89"), 1, 79 * GIB)) == 0
    assert rows(table_plan.settle(config("record", "--bigram=false"), 1, 79 * GIB)) == 0


def test_lanes_are_smaller_where_the_records_would_leave_no_room():
    """Eight on 80 GiB, as in the record; a number that is given stays, and so does 0 without a GPU."""
    for memory, lanes in ((139, 8), (79, 8), (44, 16), (39, 16), (23, 32), (8, 32)):
        assert table_plan.settle(config("record"), 1, memory * GIB).lanes == lanes
        assert table_plan.settle(config("snapshot"), 1, memory * GIB).lanes == lanes
    assert table_plan.settle(config("record", "--lanes=8"), 1, 39 * GIB).lanes == 8
    assert table_plan.settle(config("record", "--device=cpu"), 1, None).lanes == 0
    assert table_plan.settle(config("tiny"), 1, 39 * GIB).lanes == 0


def test_a_number_stays_and_must_fit():
    given = config("record", "--table_rows=38000000", "--lanes=8")
    assert table_plan.settle(given, 2, 79 * GIB) is given
    with pytest.raises(UserError, match=r"--table_rows=38000000: its 54\.6 GiB .* does, and so does auto"):
        table_plan.settle(given, 1, 79 * GIB)
    assert table_plan.settle(table_plan.settle(config("record"), 1, 79 * GIB), 1, 79 * GIB)  # auto's own fits
    with pytest.raises(
        UserError, match=r"--table_rows=1073741824: its 3,080\.0 GiB on this machine do not fit"
    ):
        table_plan.settle(config("record", "--table_rows=1073741824", "--device=cpu"), 2, None)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["record", "--table_rows=lots"], "--table_rows=lots: expected auto or a number"),
        (["record", "--table_rows=-1"], "--table_rows=-1"),
        (["record", "--table_rows=1000"], "--table_rows=992"),
        (["record", "--table_rows=16"], "--table_rows=64"),
        (["record89", "--table_rows=160"], "has no table of n-grams"),
    ],
)
def test_numbers_that_are_none(flags, said):
    with pytest.raises(UserError, match=said):
        config(*flags)


def test_a_smaller_table_makes_the_run_longer():
    """2.7 mnat a halving down to 21.2 M rows, 5.3 below, 0.25 a step; and --steps has the last word."""
    steps = {n: schedule.total_steps(config("record", f"--table_rows={n}")) - 1194 for n in
             (RECORD, RECORD // 2, RECORD // 4, RECORD // 8, 38_000_000, 0)}  # fmt: skip
    assert steps == {RECORD: 0, RECORD // 2: 12, RECORD // 4: 22, RECORD // 8: 44, 38_000_000: 14, 0: 0}
    said, table = table_plan.describe(config("record", "--table_rows=38000000"), 1, 2)
    assert table.startswith(
        "n-gram table: 38,000,000 rows; 54.64 GiB of rows and state, 2.33 GiB for the gradients"
    )
    assert said.startswith("1,194 -> 1,208 steps: the table has 38 M rows") and "--steps=1174" in said
    for flags in (("--steps=1174", "--table_rows=38000000"), ("--table_rows=0",), ()):
        assert schedule.total_steps(config("record", *flags)) == 1194
        assert not any("->" in line for line in table_plan.describe(config("record", *flags), 1, 2))
    assert schedule.total_steps(config("tiny", "--table_rows=64")) == 51


def test_what_checkpoints_hold():
    record = config("record")
    assert not table_plan.is_saved(record) and table_plan.is_saved(
        dataclasses.replace(record, save_table=True)
    )
    for words in (("record", "--table_rows=2000000"), ("record", "--table_rows=0"), ("snapshot",), ("tiny",)):
        assert table_plan.is_saved(config(*words))
    (line,) = table_plan.describe(record, 8, 2)
    assert "8 ranks have equal shares" in line and "checkpoints hold it: false" in line
    assert table_plan.describe(config("snapshot"), 8, 2) == []
