"""What a configuration means as a command: scripts and their old names, flags, variables, plans."""

import json
from pathlib import Path

import kit
import pytest

from nanogpt.common.errors import UserError
from tools.experiments import trainer
from tools.experiments.config import ExperimentConfig, load

ROOT = kit.ROOT
PALM = ROOT / kit.STAGE_A / "palm_screening.json"


def config(**values) -> ExperimentConfig:
    return ExperimentConfig(**{"experiment_name": "x", "script": "train_gpt.py", **values})


def test_one_run_as_words_and_variables(clone):
    palm = load(PALM)
    found = trainer.find(clone, palm, "palm")
    words = trainer.words(palm, found, ["--dataset=tiny"], 43, Path("/runs/run_1_seed_43"))
    assert words == [
        "modded_nanogpt/train_gpt_simple.py", "historical", "--variant=palm_parallel", "--target_val_loss=3.28",
        "--dataset=tiny", "--out_dir=/runs/run_1_seed_43", "--auto_resume=true", "--seed=43",
    ]  # fmt: skip
    assert trainer.variables(palm, found, 43) == {
        "STAGE_NUM_ITERATIONS": "1000", "STAGE_WARMDOWN_ITERS": "284", "STAGE_BATCH_SIZE": "128",
        "STAGE_DEVICE_BATCH_SIZE": "16", "STAGE_VAL_LOSS_EVERY": "25",
    }  # fmt: skip


def test_one_run_of_a_plan(clone):
    palm = load(PALM)
    found = trainer.find(clone, palm, "palm")
    entry = trainer.plan_entry(palm, found, ["--dataset=tiny", "--compile"], 43, Path("/r"))
    assert {name: entry[name] for name in ("out_dir", "seed", "variant")} == {
        "out_dir": "/r", "seed": 43, "variant": "palm_parallel",
    }  # fmt: skip
    assert entry["flags"] == {
        "num_iterations": 1000, "warmdown_iters": 284, "batch_size": 128, "device_batch_size": 16,
        "val_loss_every": 25, "target_val_loss": 3.28, "dataset": "tiny", "compile": True,
    }  # fmt: skip


@pytest.mark.parametrize("script", ["train_gpt.py", "experiments/train_gpt.py", "nanogpt/train_gpt.py"])
def test_an_old_name_is_the_small_trainer_with_what_it_was(clone, script):
    asked = config(script=script)
    found = trainer.find(clone, asked, "x")
    meant = trainer.as_of_old(asked, found)
    assert meant.script == trainer.SMALL and meant.hyperparameters == {"preset": "historical"}
    assert meant.variant == load(ROOT / kit.STAGE_A / "baseline_screening.json").variant


def test_the_scripts_of_the_repository_are_known():
    baseline = trainer.find(ROOT, config(script="nanogpt/train.py"), "x")
    assert baseline.run_directory and not baseline.stage_variables and not baseline.takes_plan
    speedrun = trainer.find(ROOT, config(script="modded_nanogpt/train_gpt.py"), "x")
    assert speedrun.run_directory and not speedrun.stage_variables


def test_a_stage_of_a_trainer_without_the_variables_is_flags(clone):
    stage = config(script="nanogpt/train.py", stage_config={"batch_size": 4})
    found = trainer.find(clone, stage, "x")
    assert trainer.variables(stage, found, 1) == {} and "--batch_size=4" in trainer.flags(stage, found)


def test_a_flag_that_the_stage_sets_is_the_stages_value():
    changed, rest = trainer.staged(load(PALM), ["--num-iterations=7", "--dataset=tiny"])
    assert changed.stage_config.num_iterations == 7 and rest == ["--dataset=tiny"]
    for word in ("--num_iterations=0", "--batch_size=many", "--val_loss_every="):
        with pytest.raises(UserError):
            trainer.staged(load(PALM), [word])


def test_values_never_become_anything_but_words(clone):
    hostile = config(hyperparameters={"note": '$(touch x); `y` "z" \'', "yes": True, "rate": 1e-3})
    words = trainer.flags(hostile, trainer.find(clone, hostile, "x"))
    assert words == ['--note=$(touch x); `y` "z" \'', "--yes=true", "--rate=0.001"]
    assert json.loads(json.dumps(words)) == words
