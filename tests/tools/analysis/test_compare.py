"""`engaging compare`: the answer follows the numbers, and what cannot be answered is not."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import study_kit

from tools.analysis import findings, planning, statistics
from tools.analysis.load import load


def compared(folder: Path, baseline: list[float], variant: list[float], **options) -> findings.Comparison:
    """Two experiments with these losses, compared."""
    sides = [options.pop(side, {}) for side in ("one", "two")]
    study_kit.write_experiment(folder, "baseline", baseline, **sides[0])
    study_kit.write_experiment(folder, "palm", variant, **sides[1])
    return findings.compare(*load([folder]).groups, **options)


LOW, HIGH = [3.2762, 3.2771, 3.2754, 3.2769], [3.2801, 3.2814, 3.2795, 3.2822]


def test_in_words(engaging: Callable, shelf: Path) -> None:
    baseline = shelf / "nanogpt_baseline_full_20261121_060000"
    for name, verdict in (
        ("palm_parallel", "It helped."),
        ("curriculum", "No evidence"),
        ("depth_warm", "It hurt."),
    ):
        done = engaging("compare", baseline, shelf / f"nanogpt_{name}_full_20261121_060000")
        assert (done.status, done.err) == (0, "")
        changed, _, answer = done.out.partition("\n\n")
        assert changed == "Changed: nothing that the runs have recorded."
        assert answer.splitlines()[0].startswith(
            f"nanogpt_{name}_full against nanogpt_baseline_full: {verdict}"
        )
        assert "Welch, 5 and" in " ".join(done.out.split()) and "3.2801, 3.2814" in done.out
        assert max(map(len, done.out.splitlines())) <= 110
    assert "not counted: run 4 (seed 46): exit status 70: the loss was not finite" in done.out
    assert "1 of 5 runs do not count" in done.out


def test_as_json(engaging: Callable, shelf: Path) -> None:
    sides = [shelf / f"nanogpt_{name}_full_20261121_060000" for name in ("baseline", "palm_parallel")]
    found = json.loads(engaging("compare", *sides, "--json").out)
    assert found["verdict"] == "helped" and found["loss"]["p"] == pytest.approx(5.4e-5, rel=0.01)
    assert (
        found["time"]["difference"] == pytest.approx(19, abs=1) and found["baseline"]["losses"][0] == 3.2801
    )


def test_one_seed_is_called_what_it_is(tmp_path: Path, engaging: Callable) -> None:
    found = compared(tmp_path, [3.29], [3.25])
    assert found.verdict == "one seed" and found.loss.p is None
    done = engaging("compare", *sorted(tmp_path.iterdir()))
    assert "an observation, not evidence" in done.out and "helped" not in done.out
    assert compared(tmp_path / "b", HIGH, [3.2]).verdict == "one seed"


def test_times_from_different_hardware_are_refused(tmp_path: Path) -> None:
    found = compared(tmp_path, HIGH, LOW, two={"gpu": {"gpus": ["NVIDIA A100"] * 8}})
    assert found.verdict == "helped" and found.time is None  # the loss is compared all the same
    assert found.time_refused.startswith(
        "different hardware: baseline on 8 x NVIDIA H100 80GB HBM3; palm on 8 x"
    )
    fewer = compared(tmp_path / "n", HIGH, LOW, two={"gpu": {"gpus": ["NVIDIA H100 80GB HBM3"] * 4}})
    assert "4 x NVIDIA H100" in fewer.time_refused
    unknown = compared(tmp_path / "u", HIGH, LOW, two={"gpu": {}})
    assert unknown.time_refused == "palm: the runs do not say what hardware they ran on"


def test_a_mixture_of_hardware_within_a_variant_is_refused(tmp_path: Path) -> None:
    for seed, gpu in ((1, "H100"), (2, "A100"), (3, "H100")):
        for name in ("a", "b"):
            run = study_kit.write_run(tmp_path / name / f"run-{seed}", 3.3 + seed / 1e3, seed=seed, lr=name)
            (run / "environment.json").write_text(json.dumps({"attempts": [{"host": "n", "gpus": [gpu]}]}))
    found = findings.compare(*(load([tmp_path / name]).groups[0] for name in ("a", "b")))
    assert "its own runs used different hardware" in found.time_refused


def test_losses_on_different_data_are_refused(tmp_path: Path) -> None:
    for name, data in (("a", "11"), ("b", "22")):
        for seed in (1, 2):
            run = study_kit.write_run(tmp_path / name / f"run-{seed}", 3.3 + seed / 1e3, seed=seed)
            config = json.loads((run / "config.json").read_text())
            (run / "config.json").write_text(json.dumps({**config, "data": data * 32}))
    found = findings.compare(*(load([tmp_path / name]).groups[0] for name in ("a", "b")))
    assert found.verdict == "refused" and "different data sets" in found.loss_refused and found.loss is None


def test_runs_that_took_turns_are_paired(tmp_path: Path) -> None:
    # the machine drifts: every pair is slower and worse than the one before, the difference stays
    drift = [0.000, 0.004, 0.009, 0.013]
    found = compared(
        tmp_path, [3.28 + d for d in drift], [3.279 + d + e for d, e in zip(drift, (0, 1e-4, 0, 1e-4), strict=True)],
        one={"starts": [0, 2, 4, 6]}, two={"starts": [1, 3, 5, 7]},
    )  # fmt: skip
    assert (found.pairs, found.loss.method, found.verdict) == (4, "paired", "helped")
    assert not any("take turns" in caution for caution in found.cautions)
    same = findings.compare(*load([tmp_path]).groups, pairing="none")
    assert same.loss.method == "Welch" and same.verdict == "unclear"
    assert any("take turns" in caution for caution in same.cautions)


def test_equal_seeds_can_be_paired_when_asked(tmp_path: Path, engaging: Callable) -> None:
    found = compared(tmp_path, HIGH, LOW, pairing="seed")
    assert (found.pairs, found.loss.method) == (4, "paired")
    study_kit.write_experiment(tmp_path / "more", "palm", LOW, seed=100)
    done = engaging("compare", tmp_path / "baseline_20261121_060000", tmp_path / "more", "--pairing=seed")
    assert done.status == 2 and "do not have the same seeds" in done.err


def test_a_plan_of_looks_sets_the_level(tmp_path: Path, engaging: Callable) -> None:
    found = compared(tmp_path, HIGH, LOW, looks=(4, 8, 12))
    assert found.level == planning.looks((4, 8, 12))[0].level < 1e-4
    assert found.loss.p > found.level and found.verdict == "unclear"
    sides = sorted(tmp_path.iterdir())
    done = engaging("compare", *sides, "--looks=3,8")
    assert (done.status, done.out) == (2, "") and "none of the planned looks is at that number" in done.err
    for bad in ("8,4", "4,4", "1,4", "x", "", "4,", "-4"):
        assert engaging("compare", *sides, f"--looks={bad}").status == 2


def test_how_many_seeds_are_needed(tmp_path: Path, engaging: Callable) -> None:
    found = compared(tmp_path, HIGH, [3.2795, 3.2808, 3.2790, 3.2816], wanted=0.001)
    assert found.verdict == "unclear" and found.needed == planning.runs_needed(
        "two-sample", 0.001, findings.pooled_sd(found.baseline.losses, found.variant.losses)
    )
    assert f"one of 0.0010 would take {found.needed} runs a side" in found.sentences[0]
    done = engaging("compare", *sorted(tmp_path.iterdir()), "--want=0.001")
    assert f"{found.needed} runs a side" in " ".join(done.out.split())
    for bad in ("0", "-1", "nan", "inf", "1e400", "x"):
        assert engaging("compare", *sorted(tmp_path.iterdir()), f"--want={bad}").status == 2


def test_what_makes_a_claim_doubtful_is_said(tmp_path: Path) -> None:
    found = compared(
        tmp_path, HIGH, [3.27, 3.27, 3.271, 3.272],
        one={"steps": 400, "config": {"stage": "B_validation"}},
        two={"steps": 300, "config": {"stage": "A_screening"}},
    )  # fmt: skip
    said = " | ".join(found.cautions)
    assert "exactly equal losses" in said and "did not stop at the same step (400 and 300)" in said
    assert "different stages: B_validation and A_screening" in said
    # 100 steps fewer are worth 0.0045 in track 3's pairwise rule
    gain = found.loss.difference + 0.0045
    assert found.track3.value == pytest.approx(gain / (1 / 4 + 1 / 4) ** 0.5)


def test_run_directories_by_pattern(tmp_path: Path, engaging: Callable) -> None:
    for seed in (1, 2, 3):  # trained in turn by one process: adam, muon, adam, muon ...
        for place, (name, final) in enumerate((("adam", 3.5), ("muon", 3.4))):
            run = study_kit.write_run(
                tmp_path / f"{name}-{seed}", final + seed * seed / 1000, seed=seed, optimizer=name
            )
            attempt = {"time": f"2026-11-21T06:{2 * seed + place:02}:00+00:00", "host": "n", "gpus": ["H100"]}
            (run / "environment.json").write_text(json.dumps({"attempts": [attempt]}))
    done = engaging("compare", tmp_path / "adam-*", tmp_path / "muon-*")
    assert done.status == 0 and "No evidence" in done.out  # every pair differs by 0.1: that is no test
    (tmp_path / "muon-3" / "metrics.jsonl").unlink()
    study_kit.write_run(tmp_path / "new" / "muon-3", 3.4085, seed=3, optimizer="muon")
    (tmp_path / "new" / "muon-3" / "metrics.jsonl").rename(tmp_path / "muon-3" / "metrics.jsonl")
    done = engaging("compare", tmp_path / "adam-*", tmp_path / "muon-*")
    assert done.out.startswith(
        "Changed:\n  optimizer: adam -> muon\n\nmuon against adam: It helped."
    ) and "paired, 3 pairs" in " ".join(done.out.split())
    assert "does not exist" in engaging("compare", tmp_path / "sgd-*", tmp_path / "muon-*").err


def test_a_change_that_changes_nothing_is_noticed(tmp_path: Path) -> None:
    found = compared(tmp_path, HIGH, HIGH)
    assert found.verdict == "unclear" and any(
        "did the change take effect?" in said for said in found.cautions
    )


def test_all_losses_alike_is_no_evidence(tmp_path: Path) -> None:
    found = compared(tmp_path, [3.28] * 3, [3.27] * 3)
    assert found.verdict == "unclear" and "no test is possible" in found.sentences[0]


def test_several_variants_or_none_are_refused(tmp_path: Path, shelf: Path, engaging: Callable) -> None:
    one = shelf / "nanogpt_baseline_full_20261121_060000"
    done = engaging("compare", one, shelf)
    assert done.status == 2 and "holds 4 variants" in done.err
    assert "is the baseline itself" in engaging("compare", one, one).err
    study_kit.write_run(tmp_path / "runs" / "going", 3.3, status="")
    done = engaging("compare", one, tmp_path / "runs")
    assert done.status == 2 and "none of its 1 runs counts (going: it has not ended" in done.err


def test_seeds_of_paired_runs_are_planned_from_the_pairs(tmp_path: Path, engaging: Callable) -> None:
    drift = [0.0, 0.1, 0.2, 0.3]  # between pairs: losses spread a hundred times wider than the differences
    gains = (0.001, -0.001, 0.0005, -0.0001)
    found = compared(
        tmp_path, [3.2 + d for d in drift], [3.2 + d - gain for d, gain in zip(drift, gains, strict=True)],
        wanted=0.002, one={"starts": [0, 2, 4, 6]}, two={"starts": [1, 3, 5, 7]},
    )  # fmt: skip
    spread = statistics.sd(gains)
    assert found.verdict == "unclear" and found.needed == planning.runs_needed("paired", 0.002, spread) < 10
    assert found.visible == pytest.approx(planning.smallest_difference("paired", 4, spread))
    assert "With 4 pairs and this spread" in found.sentences[0]
    assert f"one of 0.0020 would take {found.needed} pairs" in found.sentences[0]
