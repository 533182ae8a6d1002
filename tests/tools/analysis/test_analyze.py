"""`engaging analyze`: the table, the answers, the pictures, and what it says about what is missing."""

import itertools
import json
import re
import struct
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import study_kit

from nanogpt.common.errors import UserError
from tools.analysis import analyze, bands, pictures, plots, statistics
from tools.analysis.load import load

PICTURES = [
    "difference_by_step",
    "gains",
    "loss_by_seconds",
    "loss_by_step",
    "record_history",
    "time_to_target",
]


def test_the_table_and_the_answers(engaging: Callable, shelf: Path) -> None:
    done = engaging("analyze", shelf, "--no-plots")
    assert (done.status, done.err) == (0, "")
    rows = [line.split() for line in done.out.splitlines()[:5]]
    assert rows[1][:3] == ["nanogpt_palm_parallel_full", "5/5", "3.2763"] and rows[1][-3:] == [
        "helped",
        "401.0",
        "s",
    ]
    assert rows[2][:3] == ["nanogpt_baseline_full", "*", "5/5"]
    assert [row[0] for row in rows[3:]] == ["nanogpt_curriculum_full", "nanogpt_depth_warm_full"]
    text = " ".join(done.out.split())
    assert "track 1's rule (t-test, p < 0.01) holds: p = 0.00014." in text
    assert "3 variants are tested at once" in text and "1 runs do not count" in text
    assert "run 4 (seed 46): exit status 70: the loss was not finite" in text


def test_the_numbers_are_those_of_the_summary(engaging: Callable, shelf: Path) -> None:
    found = json.loads(engaging("analyze", shelf, "--json", "--no-plots").out)
    palm = next(one for one in found["groups"] if "palm" in one["name"])
    assert palm["losses"] == [3.2762, 3.2771, 3.2754, 3.2769, 3.2760] and palm["seeds"] == [
        42,
        43,
        44,
        45,
        46,
    ]
    assert palm["val_loss"]["mean"] == pytest.approx(np.mean(palm["losses"]))
    assert palm["val_loss"]["std"] == pytest.approx(np.std(palm["losses"], ddof=1))
    assert palm["track1"]["passed"] and palm["track3"]["passed"] and len(palm["reached_target"]) == 5
    depth = next(one for one in found["groups"] if "depth" in one["name"])
    assert (depth["n_runs"], depth["successful_runs"], len(depth["reached_target"])) == (5, 4, 0)
    assert [one["verdict"] for one in found["comparisons"]] == ["unclear", "hurt", "helped"]
    raw = {one["variant"]["name"]: one["loss"]["p"] for one in found["comparisons"]}
    holm = {one["variant"]["name"]: one["holm"] for one in found["comparisons"]}
    smallest = min(raw, key=raw.get)
    assert holm[smallest] == pytest.approx(3 * raw[smallest]) and all(holm[name] >= raw[name] for name in raw)
    assert palm["track3_step"] == 400 and depth["track3_step"] is None


def test_every_picture_is_written_whole(engaging: Callable, shelf: Path, tmp_path: Path) -> None:
    done = engaging("analyze", shelf, f"--out={tmp_path / 'new' / 'pictures'}")
    assert done.out.endswith(f"written: 18 pictures in {tmp_path / 'new' / 'pictures'}\n")
    files = sorted(path.name for path in (tmp_path / "new" / "pictures").iterdir())
    assert files == sorted(f"{name}.{kind}" for name in PICTURES for kind in ("png", "svg", "pdf"))
    for path in (tmp_path / "new" / "pictures").iterdir():
        data = path.read_bytes()
        if path.suffix == ".png":
            assert data.startswith(b"\x89PNG\r\n\x1a\n") and struct.unpack(">I", data[16:20])[0] in (
                1011,
                1012,
            )
        elif path.suffix == ".pdf":
            assert (
                data.startswith(b"%PDF") and data.rstrip().endswith(b"%%EOF") and b"CreationDate" not in data
            )
        else:
            assert ElementTree.fromstring(data).tag.endswith("svg") and b"<script" not in data


def test_pictures_are_the_same_every_time(shelf: Path) -> None:
    found = analyze.analyze(load([shelf]))
    first, second = ([plots.svg(one.figure, one.name) for one in pictures.draw(found)] for _ in range(2))
    assert first == second and len(set(first)) == len(first)


def test_no_curve_by_time_over_different_hardware(tmp_path: Path) -> None:
    study_kit.write_experiment(tmp_path, "baseline", [3.28, 3.29])
    study_kit.write_experiment(tmp_path, "palm", [3.27, 3.28], gpu={"name": "L40S", "count": 1})
    found = analyze.analyze(load([tmp_path]))
    names = [one.name for one in pictures.draw(found)]
    assert "loss_by_seconds" not in names and "loss_by_step" in names
    assert next(one for one in pictures.draw(found) if one.name == "time_to_target").title == "Steps to 3.28"
    assert any(
        remark.startswith("times are not compared: different hardware") for remark in analyze.remarks(found)
    )


def test_a_band_holds_every_seed(shelf: Path) -> None:
    group = next(one for one in load([shelf]).groups if "palm" in one.name)
    band = bands.band(group)
    assert band.runs == 5 and band.x.tolist() == list(range(0, 401, 25))
    losses = np.stack([run.metrics.val.loss for run in group.counted])
    assert band.mean == pytest.approx(losses.mean(axis=0))
    assert (band.low == losses.min(axis=0)).all() and (band.high == losses.max(axis=0)).all()
    by_time = bands.band(group, "seconds")  # every run's clock is another: interpolated to common places
    assert (
        len(by_time.x) == bands.POINTS
        and by_time.x[-1] == min(run.metrics.val.clock[-1] for run in group.runs) / 1e3
    )
    assert bands.band(group, "tokens") is None  # not logged


def test_the_first_validation_at_or_below_the_target(shelf: Path) -> None:
    found = analyze.analyze(load([shelf]), target=3.5)
    one = next(each for each in found.groups if "palm" in each.group.name)
    curve = one.group.counted[0].metrics.val
    first = next(i for i, loss in enumerate(curve.loss) if loss <= 3.5)
    assert one.reached[0].step == curve.step[first] and one.reached[0].seconds == curve.clock[first] / 1000


def test_baselines_by_stage_and_by_name(tmp_path: Path) -> None:
    for stage, shift in (("A", 0.1), ("B", 0.0)):
        for name, losses in (("baseline", [3.28, 3.281]), ("palm", [3.27, 3.271])):
            study_kit.write_experiment(
                tmp_path, f"{name}_{stage}", [x + shift for x in losses], config={"stage": stage}
            )
    study = load([tmp_path])
    found = analyze.analyze(study)
    assert [(one.baseline.name, one.variant.name) for one in found.comparisons] == [
        ("baseline_A", "palm_A"), ("baseline_B", "palm_B"),
    ]  # fmt: skip
    named = analyze.analyze(study, baseline="palm_B")
    assert {one.baseline.name for one in named.comparisons} == {"palm_B"} and len(named.comparisons) == 3
    with pytest.raises(UserError, match="did you mean 'palm_B'"):
        analyze.analyze(study, baseline="plam_B")


def test_a_stated_baseline_is_said_to_be_stated(tmp_path: Path) -> None:
    study_kit.write_experiment(tmp_path, "palm", [3.27, 3.271, 3.272], config={"baseline_val_loss": 3.30})
    (one,) = analyze.analyze(load([tmp_path])).groups
    assert "that the configuration states (not measured here): lower by 0.0290" in one.sentences[-1]


def test_plain_runs_and_one_run_alone(engaging: Callable, tmp_path: Path) -> None:
    for seed in (1, 2):
        study_kit.write_run(tmp_path / f"run-{seed}", 3.5 + seed / 1000, seed=seed)
    done = engaging("analyze", tmp_path)
    assert done.status == 0 and (tmp_path / "analysis" / "loss_by_tokens.png").is_file()
    assert "run" in done.out.splitlines()[1] and "2/2" in done.out.splitlines()[1]
    alone = engaging("analyze", tmp_path / "run-1", "--no-plots")
    assert "One seed, loss 3.5010: not below 3.28, an observation, not evidence" in " ".join(
        alone.out.split()
    )
    again = engaging("analyze", tmp_path, "--no-plots")  # the folder with the pictures is no run
    assert again.status == 0


def test_losses_by_tokens_where_a_run_of_the_experiment_counts_them(tmp_path: Path) -> None:
    # the metrics.jsonl of an experiment has steps and times alone
    for name, loss in (("baseline", 3.3), ("idea", 3.2)):
        folder = study_kit.write_experiment(tmp_path, name, [loss, loss + 0.01], steps=100, starts=[0, 1])
        aside = study_kit.write_run(tmp_path / "aside" / name, loss)
        (aside / "metrics.jsonl").rename(folder / "runs" / "run_0_seed_42" / "metrics.jsonl")
    found = analyze.analyze(load([tmp_path / "baseline_20261121_060000", tmp_path / "idea_20261121_060000"]))
    drawn = {one.name: one.figure for one in pictures.draw(found)}
    line = drawn["loss_by_tokens"].axes[0].lines[0].get_xdata()
    assert (line[0], line[-1]) == (0, 0.1)  # 100 steps of 1,000 tokens, in millions


def test_the_record_is_context_for_runs_that_aim_at_its_loss(tmp_path: Path) -> None:
    for name, target in (("ours", 3.28), ("other", 2.9)):
        folder = tmp_path / name
        study_kit.write_experiment(folder, "baseline", [3.25, 3.26], config={"target_val_loss": target})
        names = [one.name for one in pictures.draw(analyze.analyze(load([folder])))]
        assert ("record_history" in names) is (target == 3.28)
        (one,) = analyze.analyze(load([folder])).groups
        assert any("Track 3's rule" in said for said in one.sentences) is (target == 3.28)


def test_names_made_to_break_pictures(tmp_path: Path) -> None:
    for number, name in enumerate(("_hidden", "$x^{$", "a\u202eb\nc", "x" * 300, "\u4e2d\u6587", "<b>&amp;")):
        study_kit.write_experiment(tmp_path / str(number), "e", [3.2, 3.3], config={"experiment_name": name})
    found = analyze.analyze(load([tmp_path]))
    for one in pictures.draw(found):
        assert ElementTree.fromstring(plots.svg(one.figure, one.name)) is not None
        assert ElementTree.fromstring(plots.inline_svg(one.figure, one.name, 'a"<b>&')) is not None
    lines = "\n".join(analyze.text(found))
    assert "\u202e" not in lines and max(map(len, lines.splitlines())) < 230


def test_the_record_history_is_in_order() -> None:
    rows, said = bands.history()
    assert [row.number for row in rows] == sorted(row.number for row in rows) and rows[0].minutes == 45
    assert all(a.day <= b.day for a, b in itertools.pairwise(rows))
    assert (
        next(row for row in rows if row.number == 89).minutes == 1.23 and "modded-nanogpt" in said["source"]
    )


def test_the_records_that_are_missing_are_named_and_the_page_repeats_the_table() -> None:
    rows, said = bands.history()
    named = re.findall(r"(\d+)(?:-(\d+))?", said["note"].partition(" are missing")[0])
    missing = {n for low, high in named for n in range(int(low), int(high or low) + 1)}
    assert missing == set(range(1, 93)) - {row.number for row in rows}
    page = (Path(__file__).resolve().parents[3] / "docs" / "codebase.md").read_text()
    table = re.findall(r"^\| (\d+) \| (\w+ \d{4}) \| ([\d.]+) (min|s) \|", page, re.MULTILINE)
    assert {1, 10, 20, 40, 64, 92} <= {int(number) for number, *_ in table}
    known = {row.number: row for row in rows}
    for number, month, time, unit in table:
        row = known[int(number)]
        ours = row.minutes * (60 if unit == "s" else 1)
        assert f"{row.day:%B %Y}" == month and ours == pytest.approx(float(time), rel=0.005)


def test_help_is_quick_and_needs_no_matplotlib() -> None:
    import subprocess
    import sys

    script = (
        "import sys; from tools import cli\n"
        "for name in ('analyze', 'compare', 'report', 'seeds'):\n"
        "    try: cli.main([name, '--help'])\n"
        "    except SystemExit as end: assert not end.code\n"
        "assert not {'matplotlib', 'scipy', 'torch', 'jinja2'} & set(sys.modules), sorted(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert "stop early" in done.stdout or "stopping early" in done.stdout


def test_a_gain_that_does_not_outlast_the_other_tests_is_said(tmp_path: Path) -> None:
    study_kit.write_experiment(tmp_path, "baseline", [3.2801, 3.2814, 3.2795, 3.2822, 3.2808])
    for number in range(4):
        study_kit.write_experiment(
            tmp_path, f"idea_{number}", [3.2780 + number / 1000 + d for d in (0, 1e-3, 2e-3, 5e-4)]
        )
    found = analyze.analyze(load([tmp_path]))
    first = found.against(next(group for group in found.study.groups if group.name == "idea_0"))
    assert first.verdict == "helped" and first.loss.p < 0.01 < first.holm
    assert any("among 4 variants tested at once" in remark for remark in analyze.remarks(found))


def test_runs_listed_again_are_no_evidence(tmp_path: Path) -> None:
    # three losses listed four times: the t-test's p would fall from 0.066 to 0.00006
    study_kit.write_experiment(tmp_path, "again", [3.2792, 3.2761, 3.2780] * 4)
    study_kit.write_experiment(tmp_path, "nanogpt_baseline", [3.2801, 3.2814, 3.2795, 3.2822])
    found = analyze.analyze(load([tmp_path]))
    one = next(one for one in found.groups if one.group.name == "again")
    assert one.track1 is None and one.sentences[0].startswith(
        "No test: 12 runs have only 3 different losses (run 0 = run 3"
    )
    assert (
        found.against(one.group).verdict == "refused"
        and "count once" in found.against(one.group).loss_refused
    )
    study_kit.write_experiment(tmp_path / "b", "same", [3.2785] * 4)
    (same,) = analyze.analyze(load([tmp_path / "b"])).groups
    assert same.track1 is None and "4 runs have only 1 different losses" in same.sentences[0]


def test_one_equal_loss_of_many_is_chance_and_an_equal_curve_is_not(tmp_path: Path) -> None:
    folder = study_kit.write_experiment(tmp_path, "chance", [3.2792, 3.2761, 3.2780, 3.2792, 3.2770])
    (one,) = analyze.analyze(load([tmp_path])).groups
    assert one.track1.p is not None
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    copied = [row for row in rows if row["run_id"] != 3] + [
        {**row, "run_id": 3} for row in rows if row["run_id"] == 0
    ]
    study_kit.lines(folder / "metrics.jsonl", copied)
    (one,) = analyze.analyze(load([tmp_path])).groups
    assert (
        one.track1 is None and "run 0 and run 3 have the same losses at every validation" in one.sentences[0]
    )


def test_the_known_case_of_the_two_rules() -> None:
    losses = [3.2791, 3.2778, 3.2787, 3.2784]
    one, three = statistics.track1(losses), statistics.track3(losses, [1] * 4)
    assert (round(one.mean, 4), round(one.sd, 6), round(one.p, 6), one.passed) == (
        3.2785,
        0.000548,
        0.005983,
        True,
    )
    assert round(three.value, 4) == 0.003 and not three.passed
