"""The speedrun's knobs: presets, layouts over ranks, contradictions, and what `--help` may cost."""

import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from modded_nanogpt import config as config_module
from modded_nanogpt.config import FREE, PRESETS, Config, resolve
from nanogpt.common.errors import UserError
from nanogpt.common.flags import parse, to_argv
from nanogpt.common.machine import world_size_from_environment


def parsed(*argv: str) -> Config:
    return parse(Config, list(argv), prog="train_gpt.py", description="", presets=PRESETS)


def test_presets():
    assert parsed("record") == Config()
    assert parsed("tiny").recipe == "tiny"
    medium = parsed("medium", "--steps=120")
    assert (medium.recipe, medium.muon_lr, medium.cooldown, medium.steps) == ("medium", 0.015, 0.7, 120)
    for name in ("record", "record89", "snapshot", "medium", "tiny"):
        assert parsed(*to_argv(parsed(name))) == parsed(name)


def test_the_records_numbers():
    config = Config()
    assert (config.muon_lr, config.adam_lr, config.muon_wd, config.adam_wd) == (0.023, 0.008, 2.25, 0.005)
    assert (config.normuon_beta2, config.cooldown, config.lr_floor, config.adam_every) == (0.9, 0.80, 0.30, 2)
    off = {field.name for field in dataclasses.fields(config) if field.type is bool and not field.default}
    assert off == {
        "auto_resume", "overwrite", "check", "attention_at_6", "dc", "canonical", "wandb_log", "deterministic",
        "fp8_qkv", "smoke", "new_source", "save_table", "normalised_grams", "copy_input", "copy_pointer",
    }  # fmt: skip
    assert {field.name for field in dataclasses.fields(config)} >= FREE


def test_every_technique_is_in_the_table_of_the_documents():
    text = (Path(__file__).resolve().parents[2] / "docs" / "speedrun.md").read_text()
    rows = text.partition("| Switch |")[2].partition("\n## ")[0].splitlines()
    named = {
        name
        for row in rows
        for name in re.findall(r"`(\w+)(?:=[\d.]+)?`", row.split("|")[1] if "|" in row else "")
    }
    fields = {field.name for field in dataclasses.fields(Config)}
    on = {field.name for field in dataclasses.fields(Config) if field.default is True} - {"warmup"}
    assert on <= named and named - fields <= {"record89"}


@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
def test_layouts(world_size):
    plan = resolve(Config(), world_size)
    assert (plan.lanes, plan.micro_steps) == (8, 8 // world_size)
    assert plan.lane_tokens == (16_384, 32_768, 49_152, 40_960, 16_384)
    assert (plan.total_steps, plan.total_tokens, plan.target_loss) == (1194, 328_663_040, 3.28)
    assert plan.eval_slices == 40
    lanes = [plan.lane(m, rank) for m in range(plan.micro_steps) for rank in range(world_size)]
    assert lanes == list(range(8))
    narrow = resolve(Config(lanes=32), world_size)
    assert narrow.lane_tokens[0] == 4096 and narrow.micro_steps == 32 // world_size
    assert "1,194 steps" in plan.describe(Config())


BAD = {
    "--steps=2": "--steps=4 is the least",
    "--lanes=3": "--lanes=3: stage 1's 131,072 tokens do not divide",
    "--lanes=48": "do not divide into 48 lanes",
    "--device=gpu": "expected auto, cpu, cuda or cuda:N",
    "--device=cpu --fp8=force": "--fp8=force: needs a GPU",
    "--device=cpu --attention=fa3": "--attention=fa3: needs a GPU",
    "--device=cpu --backend=nccl": "--backend=nccl: needs GPUs",
    "--fp8=force --fp8_head=false --fp8_up=false --fp8_down=false": "nothing is left to compute with it",
    "--half_rope=false": "add --key_offset=false",
    "--vocab_size=1": "nothing is left to predict",
    "--vocab_size=512 --canonical=true": "made for GPT-2's tokens",
    "--vocab_size=512 --normalised_grams=true": "--normalised_grams=true: is made for GPT-2's tokens",
    "--auto_resume=true --overwrite=true": "keep one",
    "--init_from=resume --overwrite=true": "keep one",
    "--accept_changed=weather": "expected any of config,data,torch",
    "--out_dir= ": "needs a directory",
    "--out_dir=~nobody-here/x": "there is no such user",
    "--recipe=medium": "has no place for it",
    "record89 --normalised_grams=true": "has no place for it",
    "snapshot --copy_input=true": "has no place for it",
    "--recipe=big": "expected one of record, record89, snapshot, medium, tiny, tiny_record89",
    "--embedding=tie": "expected one of tied_then_untied, tied, untied",
    "--cooldown=1.5": "must be at most 1.0",
    "--muon_lr=nan": "expected a finite number",
    "--mud=false": "did you mean '--mudd'?",
}


@pytest.mark.parametrize("argv", BAD)
def test_contradictions_are_one_line(argv):
    with pytest.raises(UserError) as caught:
        parsed(*argv.split(" ") if "= " not in argv else [argv])
    assert BAD[argv] in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("world_size", [0, 3, 5, 6, 7, 16])
def test_other_world_sizes_are_refused(world_size):
    with pytest.raises(UserError, match="1, 2, 4 or 8 ranks"):
        resolve(Config(), world_size)


def test_lanes_must_divide_over_the_ranks():
    with pytest.raises(UserError, match=r"--lanes=4: does not divide into 8 ranks; --lanes=8 would"):
        resolve(Config(lanes=4), 8)


@pytest.mark.parametrize("text", ["", "two", "-1", "1.5", "²"])
def test_world_size_of_the_environment(monkeypatch, text):
    monkeypatch.setenv("WORLD_SIZE", text)
    with pytest.raises(UserError, match="WORLD_SIZE"):
        world_size_from_environment()
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert world_size_from_environment() == 4
    monkeypatch.delenv("WORLD_SIZE")
    assert world_size_from_environment() == 1


def test_only_the_standard_library():
    code = (
        "import sys; before = set(sys.modules)\n"
        "import modded_nanogpt.config, modded_nanogpt.schedule, modded_nanogpt.layer_plan\n"
        "new = {name.partition('.')[0] for name in set(sys.modules) - before}\n"
        "print(sorted(new - set(sys.stdlib_module_names)))"
    )
    root = PRESETS.parents[1]
    env = {**os.environ, "PYTHONPATH": str(root)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=600)
    assert done.stdout.strip() == "['modded_nanogpt', 'nanogpt']", done.stderr
    assert config_module.PRESETS.is_dir()
