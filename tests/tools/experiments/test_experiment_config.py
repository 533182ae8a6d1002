"""Configurations: the twelve that ship, the owner's own keys, and everything that can be written wrongly."""

import json
from pathlib import Path

import pytest

from nanogpt.common.errors import UserError
from tools.experiments.config import LARGEST_FILE, load, parse

ROOT = Path(__file__).resolve().parents[3]
CONFIGS = ROOT / "tools" / "experiments" / "configs"
GOOD = {"experiment_name": "mine", "script": "train_gpt.py"}
OWNERS = {  # as the users' own documents print it
    "experiment_name": "nanogpt_lr_high",
    "description": "Higher learning rate experiment",
    "script": "train_gpt_modified.py",
    "n_gpus": 8,
    "base_seed": 42,
    "modification_type": "hyperparameter",
    "modification_details": "Increased learning_rate from 0.0036 to 0.005",
    "target_val_loss": 3.28,
    "baseline_val_loss": 3.30,
    "baseline_std": 0.02,
    "hyperparameters": {"notes": "Using default hyperparameters from train_gpt.py"},
}


def test_the_thirteen_configurations():
    files = sorted(path.relative_to(CONFIGS).as_posix() for path in CONFIGS.rglob("*.json"))
    assert files == sorted(
        ["baseline.json"]
        + [
            f"stage_a_screening/{name}_screening.json"
            for name in ("baseline", "palm", "curriculum", "depth_warm")
        ]
        + [
            f"stage_b_validation/{n}_validation.json"
            for n in ("baseline", "palm", "curriculum", "depth_warm")
        ]
        + [f"stage_c_full/{n}.json" for n in ("baseline", "palm_parallel", "curriculum_full", "depth_warm")]
    )
    shape = {"A": (1000, 1, 2), "B": (3000, 4, 3), "C": (5100, 8, 5)}
    variants = {}
    for name in files[1:]:
        config = load(CONFIGS / name)
        assert (config.stage_config.num_iterations, config.n_gpus, config.runs()) == shape[config.letter]
        variants.setdefault(config.letter, set()).add(config.variant)
    assert variants["A"] == variants["B"] == variants["C"] and len(variants["A"]) == 4


def test_the_owners_example_and_seeds():
    config = parse(json.dumps(OWNERS).encode(), Path("theirs.json"))
    assert config.seeds(3) == [42, 43, 44] and config.runs() == 5
    assert {**config.as_json(), "stage_config": 0} == {**OWNERS, "stage_config": 0}


def test_the_variant_is_the_same_at_every_stage_and_another_for_another_flag():
    first = parse(json.dumps({**GOOD, "stage": "A", "hyperparameters": {"lr": 1}}).encode(), Path("a"))
    later = parse(
        json.dumps(
            {**GOOD, "experiment_name": "b", "stage": "B", "hyperparameters": {"lr": 1, "notes": "x"}}
        ).encode(),
        Path("b"),
    )
    other = parse(json.dumps({**GOOD, "hyperparameters": {"lr": 2}}).encode(), Path("c"))
    assert first.variant == later.variant != other.variant


def text(**values: object) -> str:
    return json.dumps({**GOOD, **values})


BAD = {
    "": "is empty",
    "   \n": "is empty",
    "{": "not JSON",
    '{"experiment_name": "a",}': "not JSON",
    "[]": "expected an object",
    '"text"': "expected an object",
    "null": "expected an object",
    "7": "expected an object",
    '{"script": "a.py"}': "experiment_name: is missing",
    '{"experiment_name": "a"}': "script: is missing",
    '{"experiment_name": "a", "experiment_name": "b", "script": "c"}': "experiment_name: stands there twice",
    '{"experiment_name": "a", "script": "c", "hyperparameters": {"x": 1, "x": 2}}': "x: stands there twice",
    '{"experiment_name": "a", "script": "c", "target_val_loss": NaN}': "NaN: is not JSON",
    '{"experiment_name": "a", "script": "c", "target_val_loss": -Infinity}': "Infinity: is not JSON",
    '{"experiment_name": "a", "script": "c", "target_val_loss": 1e400}': "1e400: is beyond the largest number",
    '{"experiment_name": "a", "script": "c", "base_seed": ' + "9" * 5000 + "}": "too large a number",
    '{"a":' * 3000 + "1" + "}" * 3000: "nested too deeply",
    text(experimnt_name="x"): "did you mean 'experiment_name'",
    text(n_gpu=1): "did you mean 'n_gpus'",
    text(stage_config={"num_iteration": 5}): "did you mean 'num_iterations'",
    text(stage_config={"num_iterations": "5"}): "stage_config.num_iterations: 5: expected a whole number",
    text(stage_config={"num_iterations": 0}): "greater than or equal to 1",
    text(stage_config={"num_iterations": 2.5}): "expected a whole number",
    text(stage_config=[]): "stage_config: []: expected an object",
    text(n_gpus="8"): "n_gpus: 8: expected a whole number",
    text(n_gpus=True): "n_gpus: true: expected a whole number",
    text(n_gpus=-1): "greater than or equal to 0",
    text(n_gpus=10**6): "less than or equal to 1024",
    text(base_seed=2**31): "less than or equal to",
    text(base_seed=1.5): "expected a whole number",
    text(n_runs=0): "greater than or equal to 1",
    text(target_val_loss="3.28"): "expected a number",
    text(target_val_loss=0): "greater than 0",
    text(baseline_std=-0.1): "greater than or equal to 0",
    text(description=7): "expected text",
    text(description="a\nb"): "line break",
    text(description="a\u202eb"): "cannot be seen",
    text(modification_details="x" * 3000): "longer than 2000 characters",
    text(experiment_name=""): "only letters",
    text(experiment_name="../up"): "only letters",
    text(experiment_name="a b"): "only letters",
    text(experiment_name="a" * 60): "longer than 48 characters",
    text(experiment_name=None): "expected text",
    text(script=""): "is empty",
    text(script=["a"]): "expected text",
    text(stage="D_more"): "expected A, B or C",
    text(stage="screening"): "expected A, B or C",
    text(hyperparameters=[1]): "expected an object",
    text(hyperparameters={"seed": 3}): "set by the runner",
    text(hyperparameters={"out_dir": "x"}): "set by the runner",
    text(hyperparameters={"a b": 3}): "not a flag's name",
    text(hyperparameters={"lr": [1]}): "hyperparameters.lr",
    text(hyperparameters={"lr": None}): "hyperparameters.lr",
    text(hyperparameters={"note": "a\nb"}): "line break",
    '{"experiment_name": "\ud800", "script": "x"}'.encode("utf-8", "surrogatepass"): "not UTF-8",
    b"\xff\xfe{}": "not UTF-8",
    b"\x00" * 10: "not JSON",
    b" " * (LARGEST_FILE + 1): "larger than",
}


@pytest.mark.parametrize("data", BAD, ids=range(len(BAD)))
def test_a_mistake_is_one_line_that_names_the_file(tmp_path, data):
    path = tmp_path / "bad.json"
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    with pytest.raises(UserError) as caught:
        load(path)
    said = str(caught.value)
    assert BAD[data] in said and said.startswith(str(path)) and "\n" not in said and len(said) < 600


@pytest.mark.parametrize("name", ["absent.json", "folder", "a\0b", "x" * 5000])
def test_a_file_that_cannot_be_read(tmp_path, name):
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError):
        load(tmp_path / name)
