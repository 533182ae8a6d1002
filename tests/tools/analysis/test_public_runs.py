"""1,245 public runs of the speedrun as known answers: our statistics beside scipy's, our reader and record table."""

import csv
import io
import itertools
import json
import lzma
import statistics as exact
from collections import defaultdict
from pathlib import Path

import pytest

from tools.analysis import bands, statistics
from tools.leaderboard.evidence import Refused
from tools.leaderboard.modded_logs import read_modded_log

DATA = Path(__file__).resolve().parents[4] / "shared" / "data"
pytestmark = pytest.mark.skipif(
    not (DATA / "public_runs.csv.xz").is_file(),
    reason="the public runs are not beside this checkout (../shared)",
)


@pytest.fixture(scope="module")
def runs() -> list[dict[str, str]]:
    with lzma.open(DATA / "public_runs.csv.xz", "rt") as file:
        return list(csv.DictReader(io.StringIO(file.read())))


@pytest.fixture(scope="module")
def by_record(runs) -> dict[str, list[dict[str, str]]]:
    found = defaultdict(list)
    for run in runs:
        found[run["record"]].append(run)
    return found


def test_every_records_statistics_are_scipys(by_record) -> None:
    from scipy import stats

    checked = 0
    for rows in by_record.values():
        losses = [float(row["val_loss"]) for row in rows]
        if len(set(losses)) < 2:
            continue
        checked += 1
        theirs = stats.ttest_1samp(losses, 3.28, alternative="less")
        assert statistics.track1(losses).p == pytest.approx(theirs.pvalue, rel=1e-9, abs=1e-300)
        low, high = stats.t.interval(0.95, len(losses) - 1, exact.fmean(losses), stats.sem(losses))
        assert statistics.interval(losses) == pytest.approx((low, high), rel=1e-12)
        steps = [int(row["last_step"]) for row in rows]
        if len(set(steps)) == 1:
            found = statistics.track3(losses, steps)
            assert found.value == pytest.approx((3.28 - exact.fmean(losses)) * len(losses) ** 0.5, abs=1e-12)
            assert found.passed is (found.value >= 0.004)
    assert checked > 60


def test_one_record_after_the_other_by_welch_on_loss_and_time(by_record) -> None:
    from scipy import stats

    track1 = [rows for _, rows in sorted(by_record.items()) if rows[0]["track"] == "track_1_short"]
    checked = 0
    for old, new in itertools.pairwise(track1):
        for field in ("val_loss", "train_time_s"):
            sides = [[float(row[field]) for row in rows if row[field]] for rows in (old, new)]
            if min(map(len, sides)) < 2 or min(len(set(side)) for side in sides) < 2:
                continue
            checked += 1
            theirs = stats.ttest_ind(sides[0], sides[1], equal_var=False, alternative="greater")
            assert statistics.welch(*sides).p == pytest.approx(theirs.pvalue, rel=1e-6, abs=1e-300)
    assert checked > 60


def test_the_table_of_records_is_what_the_logs_say(by_record) -> None:
    """Two years, 45 minutes to 74 seconds: where logs of a record's day are at hand, one of them has its time."""
    records = bands.history()[0]
    assert records[0].minutes == 45.0 and records[-1].minutes < 1.25
    off = []
    for record in records:
        minutes = [
            float(row["train_time_s"]) / 60
            for name, rows in by_record.items()
            if name.startswith(str(record.day))
            for row in rows
            if row["track"] == "track_1_short" and row["gpus"] == "8" and "H100" in row["gpu"]
        ]
        if minutes:
            off.append(min(abs(one / record.minutes - 1) for one in minutes))
    assert len(off) >= 40 and exact.median(off) < 0.002
    assert sum(one < 0.02 for one in off) > 0.85 * len(off)  # logs of some days are of other machines


def test_a_log_of_every_record_is_read_to_its_last_digit(tmp_path: Path) -> None:
    """One run of each record, printed as its trainer prints it, comes back with its steps, losses and clock."""
    seen, path = set(), tmp_path / "log.txt"
    with lzma.open(DATA / "public_curves.jsonl.xz", "rt") as file:
        for line in file:
            one = json.loads(line)
            if one["record"] in seen or one["val"][-1][2] is None:
                continue
            seen.add(one["record"])
            total = one["val"][-1][0]
            third = one["track"].startswith("track_3")
            clock = "train_time:{:.3f}s step_avg:1.00ms" if third else "train_time:{:.0f}ms step_avg:1.00ms"
            rows = [
                f"step:{step}/{total} val_loss:{loss:.6f} {clock.format(seconds * (1 if third else 1000))}"
                for step, loss, seconds in one["val"]
            ]
            path.write_text("\n".join(["=" * 100, "Running Python 3.12.7", "=" * 100, *rows, ""]))
            steps = [row[0] for row in one["val"]]
            if steps != sorted(steps):  # such files are among the real ones
                with pytest.raises(Refused, match="two runs in one file"):
                    read_modded_log(path, "run 1")
                continue
            run = read_modded_log(path, one["record"])
            assert [(point.step, point.loss) for point in run.val] == [tuple(row[:2]) for row in one["val"]]
            assert run.train_ms == pytest.approx(one["val"][-1][2] * 1000, abs=0.51)
    assert len(seen) > 70
