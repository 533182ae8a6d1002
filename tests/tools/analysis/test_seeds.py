"""`engaging seeds`: the numbers of a plan, in words."""

from collections.abc import Callable

import pytest

from tools.analysis import planning


def test_how_many_seeds(engaging: Callable) -> None:
    done = engaging("seeds", "--want=0.002")
    assert (done.status, done.err) == (0, "")
    rows = {line.split()[0]: line.split()[1:] for line in done.out.splitlines() if "%" in line}
    assert [int(count) for count in rows["90%"]] == [
        planning.runs_needed(kind, 0.002, 0.0013) for kind in ("two-sample", "one-sample")
    ]
    assert list(rows) == ["50%", "80%", "90%", "95%"]
    assert "more than 10000" in engaging("seeds", "--want=0.000001").out


def test_what_some_runs_show(engaging: Callable) -> None:
    row = next(
        line.split() for line in engaging("seeds", "--runs=5", "--sd=0.002").out.splitlines() if "90%" in line
    )
    assert float(row[1]) == pytest.approx(planning.smallest_difference("two-sample", 5, 0.002), abs=5e-5)
    assert float(row[2]) == pytest.approx(planning.smallest_difference("one-sample", 5, 0.002), abs=5e-5)


def test_the_levels_of_looks(engaging: Callable) -> None:
    out = engaging("seeds", "--looks=4,8,12").out
    for look in planning.looks((4, 8, 12)):
        assert f"{look.runs:>11}   {look.level:>14.2g}" in out
    assert planning.looks((4, 8, 12))[0].level < planning.looks((4, 8, 12))[-1].level < 0.01


@pytest.mark.parametrize(
    "words",
    [(), ("--want=0",), ("--want=x",), ("--sd=-1", "--runs=3"), ("--runs=1",), ("--looks=8,4",), ("3",)],
)
def test_what_makes_no_sense_is_refused(engaging: Callable, words: tuple[str, ...]) -> None:
    done = engaging("seeds", *words)
    assert (done.status, done.out, done.err.count("\n")) == (2, "", 1)
