"""`engaging experiment sweep`: equal trials for every arm, and a final comparison on seeds that chose nothing."""

import json

import kit
import pytest
from kit import LOCAL, seeds, two_variants


@pytest.fixture(scope="module")
def swept(clone, tmp_path_factory):
    folder = tmp_path_factory.mktemp("arms")
    two_variants(folder, "arm")
    words = ("sweep", "tune", "--config", folder, "--set", "muon_lr=0.01,0.025,0.06", *LOCAL)
    before = kit.experiments(clone)
    dry = kit.engaging(clone, *words, "--dry-run").stdout
    assert "2 arms, 3 trials each, 1 run a trial" in dry and dry.count("--seed=42") == 6
    assert kit.experiments(clone) == before
    return folder, kit.engaging(clone, *words).stdout


def test_every_arm_gets_the_same_trials_and_its_best_is_taken(clone, swept):
    names = {folder.name.rsplit("_", 2)[0] for folder in kit.experiments(clone, "arm")}
    assert names == {f"arm_{arm}_t{number:02}" for arm in ("base", "palm") for number in (1, 2, 3)}
    said = kit.engaging(clone, "sweep", "tune").stdout
    taken = [line.split()[:2] for line in said.splitlines() if line.endswith("<- taken")]
    assert taken == [["arm_base", "muon_lr=0.025"], ["arm_palm", "muon_lr=0.025"]] and "edge" not in said


def test_what_follows_a_sweep_is_its_choice(clone, swept):
    next_line = "next: engaging experiment sweep tune\n"
    assert swept[1].endswith(next_line)
    assert kit.engaging(clone, "status", "tune").stdout.endswith(next_line)


def test_the_final_comparison_takes_seeds_that_no_trial_had(clone, swept):
    trials = kit.experiments(clone, "arm_base_t")
    assert {seed for folder in trials for _, seed, _ in seeds(folder)} == {42}
    refused = kit.engaging(clone, "sweep", "tune", "--final", "--base-seed", 41, *LOCAL, check=False)
    assert (
        refused.returncode == 2
        and "seed 42 has chosen among the trials of tune; from 43 on" in refused.stderr
    )
    kit.engaging(clone, "sweep", "tune", "--final", *LOCAL)
    finals = kit.experiments(clone, "arm_base_final") + kit.experiments(clone, "arm_palm_final")
    assert [[seed for _, seed, _ in seeds(folder)] for folder in finals] == [[43, 44, 45]] * 2
    flags = json.loads((finals[1] / "config.json").read_text())["hyperparameters"]
    assert flags == {"variant": "palm_parallel", "muon_lr": 0.025}
    assert "It helped" in kit.tools(clone, "compare", "arm_base_final", "arm_palm_final")
    env = kit.environment()
    trial = kit.in_process(clone, ["compare", "arm_base_t01", "arm_palm_t02"], env)
    assert (
        trial.returncode == 2
        and "a trial of the sweep tune" in trial.stderr
        and trial.stderr.count("\n") == 1
    )


def test_nor_seeds_of_another_sweep(clone, swept, tmp_path):
    two_variants(tmp_path, "later", base_seed=50)
    kit.engaging(clone, "sweep", "later", "--config", tmp_path, "--set", "muon_lr=0.025", *LOCAL)
    words = ("sweep", "tune", "--final", "--base-seed", 49, "--dry-run", *LOCAL)
    refused = kit.engaging(clone, *words, check=False)
    assert (
        refused.returncode == 2
        and "seed 50 has chosen among the trials of later; from 51 on" in refused.stderr
    )
    assert "--seed=51" in kit.engaging(clone, "sweep", "tune", "--final", "--dry-run", *LOCAL).stdout


MISTAKES = [
    (
        ["--set", "muon_lr=0.01,0.02", "--set", "arm_base:adam_lr=1,2"],
        "the same number of trials, the baseline too",
    ),
    (["--set", "muon_lr"], "expected NAME=VALUE"),
    (["--set", "nobody:muon_lr=1"], "no arm nobody (there are: arm_base, arm_palm)"),
    (["--set", "muon_lr=1,1"], "stands there twice"),
    (["--set", "muon_lr=" + ",".join(map(str, range(1, 120)))], "at most 200"),
    (["--final"], "leave out --config"),
]


@pytest.mark.parametrize(("words", "told"), MISTAKES, ids=[told for _, told in MISTAKES])
def test_mistakes_are_one_line(clone, swept, words, told):
    done = kit.engaging(clone, "sweep", "other", "--config", swept[0], *words, *LOCAL, check=False)
    assert done.returncode == 2 and told in done.stderr and done.stderr.count("\n") == 1
    again = kit.engaging(clone, "sweep", "tune", "--config", swept[0], "--set", "muon_lr=1", check=False)
    assert again.returncode == 2 and "has begun" in again.stderr
    unknown = kit.engaging(clone, "sweep", "nowhere", check=False)
    assert unknown.returncode == 2 and "no sweep of this name" in unknown.stderr


def test_a_sweep_that_could_not_start_leaves_its_name_free(clone, swept):
    words = ("sweep", "again", "--config", swept[0], "--set", "muon_lr=0.01,0.02")
    refused = kit.engaging(clone, *words, "--n-gpus", 64, *LOCAL, check=False)
    assert refused.returncode == 2 and "n_gpus=64" in refused.stderr
    assert "4 runs" not in kit.engaging(clone, *words, "--dry-run", *LOCAL).stdout
    assert not (clone / "experiment_logs" / ".sweeps" / "again" / "sweep.json").exists()
