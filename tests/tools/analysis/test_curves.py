"""The fast way through metrics.jsonl must see what the slow way sees, and refuse what it refuses."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import study_kit
from hypothesis import given, settings
from hypothesis import strategies as st

from nanogpt.common.errors import UserError
from tools.analysis import curves, lines, strict

ROWS = [
    {"run_id": 0, "step": 0, "val_loss": 10.8, "train_time_ms": 0, "step_avg_ms": 0.0},
    {"run_id": 0, "step": 1, "train_loss": 9.0, "train_time_ms": 120, "step_avg_ms": 120.0},
    {"run_id": 0, "step": 2, "train_loss": 8.0, "train_time_ms": 240, "step_avg_ms": 120.0},
    {"run_id": 1, "step": 2, "val_loss": 8.1, "train_time_ms": 250, "step_avg_ms": 125.0},
]


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def both_ways(data: bytes, keys: dict, folder: Path) -> tuple[object, object]:
    """What the fast and the slow way make of the same lines: rows, or None."""
    fast = lines.parse(data)
    try:
        slow = lines.parse_slowly(write(folder / "metrics.jsonl", data), 0, data, keys, False)[0]
    except UserError:
        slow = None
    return fast, slow


def test_points_of_an_experiment(tmp_path: Path) -> None:
    study_kit.lines(tmp_path / "metrics.jsonl", ROWS)
    part = curves.read_part(tmp_path / "metrics.jsonl", lines.EXPERIMENT_KEYS, 1, False)
    found = curves.by_run(part)
    assert sorted(found) == [0, 1] and part.lines == 4
    assert found[0].val.loss.tolist() == [10.8] and found[0].train.loss.tolist() == [9.0, 8.0]
    assert found[0].train.clock.tolist() == [120.0, 240.0] and np.isnan(found[0].train.tokens).all()
    assert found[1].val.step.tolist() == [2] and len(found[1].train) == 0


def test_a_run_directorys_clock_is_added_up(tmp_path: Path) -> None:
    run = study_kit.write_run(tmp_path / "run", 3.3, steps=60)
    found = curves.read_run(run / "metrics.jsonl")
    assert found.val.step.tolist() == [0, 20, 40, 60]
    assert found.val.clock.tolist() == pytest.approx([0, 200, 400, 600])  # 10 ms a step
    assert found.val.tokens[-1] == 60_000 and found.events[-1]["status"] == "finished"


def test_a_resumed_runs_later_lines_count(tmp_path: Path) -> None:
    rows = [{"event": "val", "step": step, "val_loss": loss} for step, loss in ((0, 5.0), (9, 4.0), (9, 3.5))]
    study_kit.lines(tmp_path / "metrics.jsonl", rows)
    assert curves.read_run(tmp_path / "metrics.jsonl").val.loss.tolist() == [5.0, 3.5]


def test_losses_that_were_not_finite_are_counted(tmp_path: Path) -> None:
    rows = [{"event": "train", "step": 0, "loss": 5.0}, {"event": "train", "step": 1, "loss": None}]
    study_kit.lines(tmp_path / "metrics.jsonl", rows)
    found = curves.read_run(tmp_path / "metrics.jsonl")
    assert (len(found.train), found.missing_losses) == (1, 1)


def test_long_runs_become_buckets_of_equal_mean(tmp_path: Path) -> None:
    rows = [{"run_id": 7, "step": step, "train_loss": float(step % 10)} for step in range(5000)]
    study_kit.lines(tmp_path / "metrics.jsonl", rows)
    whole = curves.read_part(tmp_path / "metrics.jsonl", lines.EXPERIMENT_KEYS, 50, False)
    size = (tmp_path / "metrics.jsonl").stat().st_size
    cuts = [0, 1, 777, size // 3, size // 2, size]
    parts = [
        curves.read_part(tmp_path / "metrics.jsonl", lines.EXPERIMENT_KEYS, 50, False, low, high)
        for low, high in itertools.pairwise(cuts)
    ]
    for part in (whole, curves.merged(parts, 50)):
        train = curves.by_run(part)[7].train
        assert part.lines == 5000 and len(train) == 100
        assert train.loss == pytest.approx(np.full(100, 4.5)) and train.step.tolist() == list(
            range(49, 5000, 50)
        )


ODD = [
    b'{"run_id": 0, "step": 1, "val_loss": NaN}',
    b'{"run_id": 0, "step": 1, "val_loss": 1e400}',
    b'{"run_id": 0, "step": 1, "val_loss": -Infinity}',
    b'{"run_id": 0, "step": 1, "step": 1, "val_loss": 3.0}',
    b'{"run_id": 0, "step": 1, "step" : 1, "val_loss": 3.0}',
    b'{"run_id": 0, "step": 1, "val_loss": 3.0, "note": "a:b", "step" : 1}',
    b'{"run_id": 0, "step": 1, "val_loss": "3.0"}',
    b'{"run_id": 0, "step": 1, "val_loss": true}',
    b'{"run_id": 0, "step": 1.5, "val_loss": 3.0}',
    b'{"run_id": 0, "step": -1, "val_loss": 3.0}',
    b'{"run_id": 0, "step": 99999999999, "val_loss": 3.0}',
    b'{"run_id": 0, "step": 99999999999999999999999, "val_loss": 3.0}',
    b'{"run_id": null, "step": 1, "val_loss": 3.0}',
    b'{"step": 1, "val_loss": 3.0}',
    b'{"run_id": 0, "step": 1}',
    b'{"run_id": 0, "step": 1, "val_loss": 3.0, "train_time_ms": -5}',
    b'{"run_id": 0, "step": 1, "val_loss": 3.0, "train_time_ms": [1]}',
    b'[{"run_id": 0, "step": 1, "val_loss": 3.0}]',
    b'{"run_id": 0, "step": 1, "val_loss": 3.0},{"run_id": 0, "step": 2, "val_loss": 3.0}',
    b'{"run_id": 0, "step": 1, "val_loss": 3.0}}',
    b'{"run_id": 0, "step": 1, "val_loss": 3.',
    b"3.0",
    b"\xff\xfe{}",
    b'{"a":' * 5000,
    b'{"run_id": 0, "step": 1, "val_loss": 3.0, "note": "' + b"x" * (1 << 20) + b'"}',
]


@pytest.mark.parametrize("line", ODD, ids=range(len(ODD)))
@pytest.mark.parametrize("place", [0, 2, 4])
def test_a_bad_line_is_named_wherever_it_stands(tmp_path: Path, line: bytes, place: int) -> None:
    good = [json.dumps(row).encode() for row in ROWS]
    path = write(tmp_path / "metrics.jsonl", b"\n".join([*good[:place], line, *good[place:]]) + b"\n")
    with pytest.raises(UserError) as error:
        curves.read_part(path, lines.EXPERIMENT_KEYS, 1, False)
    assert str(path) in str(error.value) and (
        f"line {place + 1}" in str(error.value) or "KiB" in str(error.value)
    )
    assert len(str(error.value)) < 600 and "\n" not in str(error.value)


def test_lines_that_were_broken_and_joined_are_refused(tmp_path: Path) -> None:
    data = b'{"run_id": 0, "step": 1,\n"val_loss": 3.0}\n{"run_id": 0, "step": 1, "val_loss": 3.0},{"run_id": 1}\n'
    with pytest.raises(UserError, match="line 1"):
        curves.read_part(write(tmp_path / "metrics.jsonl", data), lines.EXPERIMENT_KEYS, 1, False)


def test_every_line_belongs_to_one_part_wherever_the_file_is_cut(tmp_path: Path) -> None:
    study_kit.lines(tmp_path / "metrics.jsonl", ROWS * 2)
    size = (tmp_path / "metrics.jsonl").stat().st_size
    for cut in range(1, size):
        parts = [
            curves.read_part(tmp_path / "metrics.jsonl", lines.EXPERIMENT_KEYS, 1, False, low, high)
            for low, high in ((0, cut), (cut, size))
        ]
        assert sum(part.lines for part in parts) == len(ROWS) * 2, cut


def test_a_line_far_into_a_large_file_is_named(tmp_path: Path) -> None:
    row = json.dumps(ROWS[1]).encode() + b"\n"
    bad = b'{"run_id": 0, "step": 1, "val_loss": NaN}\n'
    path = write(tmp_path / "metrics.jsonl", row * 60_000 + bad + row * 10)
    with pytest.raises(UserError, match="line 60001"):
        curves.read_part(path, lines.EXPERIMENT_KEYS, 1, False, path.stat().st_size // 2, None)


def test_a_half_written_last_line(tmp_path: Path) -> None:
    run = study_kit.write_run(tmp_path / "run", 3.3, status="")
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"event": "val", "st')
    assert curves.read_run(run / "metrics.jsonl").cut_off
    with pytest.raises(UserError, match="cut off in the middle"):
        curves.read_run(run / "metrics.jsonl", cut_off_allowed=False)


VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=6), st.lists(st.integers(), max_size=2),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)  # fmt: skip
NAMES = st.one_of(
    st.sampled_from(["run_id", "step", "val_loss", "train_loss", "train_time_ms"]), st.text(max_size=5)
)


@given(st.lists(st.dictionaries(NAMES, VALUES, max_size=5), min_size=1, max_size=4), st.booleans())
@settings(max_examples=150, deadline=None)
def test_what_the_fast_way_reads_is_what_json_reads(rows: list[dict], ascii_only: bool) -> None:
    data = "".join(json.dumps(row, ensure_ascii=ascii_only) + "\n" for row in rows).encode("utf-8", "replace")
    found = lines.parse(data)
    if found is not None:
        assert found == [strict.loads(line) for line in data.splitlines() if line.strip()]


@given(st.lists(st.binary(max_size=40), min_size=1, max_size=5))
@settings(max_examples=150, deadline=None)
def test_the_fast_way_takes_nothing_that_the_slow_way_refuses(ends: list[bytes]) -> None:
    data = b"".join(b'{"step":1,' + line.replace(b"\n", b"") + b"}\n" for line in ends)
    if lines.parse(data) is not None:
        for line in data.splitlines():
            strict.loads(line)
