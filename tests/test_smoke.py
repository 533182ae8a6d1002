"""`--smoke`, in every trainer: ten steps of the preset that the user edits, in a run directory that is made anew.

The speedrun's trainers do it from end to end in tests/docs/test_docs.py.
"""

import json
from pathlib import Path

import pytest

from modded_nanogpt import schedule, simple_launch, train_gpt
from modded_nanogpt.config import Config as SpeedrunConfig
from modded_nanogpt.config import resolve
from nanogpt import train
from tests.faults import tiny

PRESET = """
dataset = "tiny"
n_layer = 2
n_head = 2
n_embd = 16
dropout = 0.1
tokens_per_step = 491520
eval_interval = 7
compile = True
"""


@pytest.fixture
def smoke(zygote, tiny_data: Path, tmp_path: Path):
    """`smoke(*flags)`: the baseline's --smoke of a preset of the user's, which says where its runs go."""
    preset = tmp_path / "mine.py"
    preset.write_text(f"{PRESET}out_dir = {str(tmp_path / 'run')!r}\n")

    def run(*flags: str):
        return zygote.run([str(preset), "--smoke", f"--data_root={tiny_data}", *flags], cwd=tmp_path)

    return run


def test_the_preset_in_ten_small_steps_and_one_validation(smoke, tmp_path):
    done = smoke()
    assert done.status == 0, done.stderr
    folder = tmp_path / "run-smoke"
    assert sorted(tiny.losses(folder)) == list(range(10)) and sorted(tiny.val_losses(folder)) == [10]
    config = json.loads((folder / "config.json").read_text())
    assert (config["config"]["n_embd"], config["config"]["dropout"]) == (16, 0.1)  # the user's own
    assert config["plan"]["tokens_per_step"] == 4 * 64 and "compiled: false" in done.stdout
    assert (folder / "checkpoints/step_00000010").is_dir()


def test_a_repetition_replaces_it_and_nothing_else(smoke, zygote, tiny_data, tmp_path):
    folder = tmp_path / "run-smoke"
    assert smoke("--max_iters=2").status == 0
    (folder / "job.json").write_text("{}")  # a launcher's
    first = json.loads((folder / "config.json").read_text())["run_id"]
    assert smoke("--max_iters=3", "--auto_resume=true").status == 0  # which the job scripts add
    assert json.loads((folder / "config.json").read_text())["run_id"] != first
    assert sorted(tiny.losses(folder)) == [0, 1, 2] and (folder / "job.json").exists()
    assert sorted(path.name for path in tmp_path.glob("run*")) == ["run-smoke"]
    real = [*tiny.FLAGS, "--max_iters=1", f"--data_root={tiny_data}", f"--out_dir={tmp_path}/real"]
    assert zygote.run(real, cwd=tmp_path).status == 0
    refused = smoke(f"--out_dir={tmp_path}/real")
    assert refused.status == 2 and "holds a run" in refused.stderr and refused.stderr.count("\n") == 1


@pytest.mark.parametrize("preset", sorted(path.stem for path in train.PRESETS.glob("[a-z]*.py")))
def test_every_preset_of_the_baseline_makes_small_steps(preset):
    values = train.values_of([preset, "--smoke"])
    plan = train.resolve(train.Config(**values), 2)
    assert plan.tokens_per_step <= 2 * 4 * 64 and values["out_dir"].endswith("-smoke")
    assert train.values_of([preset])["out_dir"] + "-smoke" == values["out_dir"]


@pytest.mark.parametrize("on_gpu", [True, False])
@pytest.mark.parametrize("preset", ["record", "record89", "snapshot", "medium", "tiny"])
def test_the_speedrun_goes_through_its_stages(preset, on_gpu, monkeypatch):
    """On a CPU with the layers of the track in a size for CPUs; a user's flag wins."""
    monkeypatch.setattr(train_gpt, "has_nvidia_driver", lambda: on_gpu)
    config = SpeedrunConfig(**train_gpt.values_of(["--smoke", "--seed=3"], preset))
    assert config.recipe == preset if on_gpu else config.recipe.startswith("tiny")
    assert (config.seed, config.warmup, config.compile) == (3, False, "false")
    for ranks in (1, 2, 4):
        monkeypatch.setenv("WORLD_SIZE", str(ranks))
        config = SpeedrunConfig(**train_gpt.values_of(["--smoke"], preset))
        assert max(resolve(config, ranks).lane_tokens) <= 16_384
    stages = schedule.stages(config)
    assert schedule.total_steps(config) in (10, 13) and all(stage.end > stage.start for stage in stages)
    assert train_gpt.values_of(["--smoke", "--steps=20"], preset)["steps"] == 20


def test_the_small_trainer_keeps_the_model_on_a_gpu(monkeypatch):
    def knobs() -> dict:
        return simple_launch.runs_of({"smoke": True, "num_layers": 8, "model_dim": 512}, ["--smoke"])[0]

    monkeypatch.setattr(simple_launch, "has_nvidia_driver", lambda: True)
    assert "model_dim" in knobs() and (knobs()["model_dim"], knobs()["num_layers"]) == (512, 8)
    monkeypatch.setattr(simple_launch, "has_nvidia_driver", lambda: False)
    assert (knobs()["model_dim"], knobs()["num_layers"], knobs()["batch_size"]) == (64, 4, 4)
