"""Presets, and what follows from a configuration: the accumulation is derived, or refused naming sizes that work."""

import dataclasses
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from nanogpt.common.errors import UserError
from nanogpt.common.flags import parse
from nanogpt.config import FREE, GPT2_SIZES, PRESETS, Config, resolve
from nanogpt.schedule import learning_rate

ROOT = Path(__file__).resolve().parents[1]
NANOGPT_TRAIN_GPT2 = """\
# config for training GPT-2 (124M) down to very nice loss of ~2.85 on 1 node of 8X A100 40GB
wandb_log = True
wandb_project = 'owt'
wandb_run_name='gpt2-124M'

# these make the total batch size be ~0.5M
# 12 batch size * 1024 block size * 5 gradaccum * 8 GPUs = 491,520
batch_size = 12
block_size = 1024
gradient_accumulation_steps = 5 * 8

# this makes total number of tokens be 300B
max_iters = 600000
lr_decay_iters = 600000

# eval stuff
eval_interval = 1000
eval_iters = 200
log_interval = 10

# weight decay
weight_decay = 1e-1

# on macbook also add
device = 'cpu'  # run on cpu only
compile = False # do not torch compile the model
"""


def read(*argv: str) -> Config:
    """The configuration of a command line."""
    return parse(Config, argv, prog="train", description="", presets=PRESETS)


@pytest.mark.parametrize("path", sorted(PRESETS.glob("[a-z]*.py")), ids=lambda path: path.stem)
@pytest.mark.parametrize("world", [1, 2, 4, 8])
def test_every_preset_reads_and_resolves(path, world):
    config = read(path.stem)
    if config.init_from in GPT2_SIZES or not config.tokens_per_step:
        config = dataclasses.replace(config, gradient_accumulation_steps=world)
    plan = resolve(config, world)
    assert plan.tokens_per_step == plan.micro_steps * world * config.batch_size * config.block_size
    assert read(f"config/{path.name}", "--out_dir=elsewhere") == dataclasses.replace(
        read(path.stem), out_dir="elsewhere"
    )


def test_the_published_schedules():
    config = read("train_gpt2_epoch")
    assert [resolve(config, world).micro_steps for world in (1, 2, 4, 8)] == [8, 4, 2, 1]
    assert (config.batch_size, config.block_size, resolve(config, 8).tokens_per_step) == (64, 1024, 524_288)
    with pytest.raises(UserError, match="393216 or 589824 would"):
        resolve(config, 3)
    assert resolve(config, 8).tokens_per_step * config.max_iters == pytest.approx(9.04e9, rel=0.01)
    assert (config.max_iters, config.warmup_iters, config.learning_rate, config.min_lr) == (
        17234,
        715,
        6e-4,
        6e-5,
    )
    config = read("train_shakespeare_char")
    assert (config.n_layer, config.n_embd, config.block_size, config.batch_size) == (6, 384, 256, 64)


@pytest.mark.parametrize("name", GPT2_SIZES)
def test_each_published_model_has_its_evaluation(name):
    config = read(f"eval_{name.replace('-', '_')}")
    assert config.eval_only and config.init_from == name and config.eval_tokens == 0
    assert (config.n_layer, config.n_head, config.n_embd) == GPT2_SIZES[name] and config.bias


def test_a_file_of_nanogpt_reads_as_it_is(tmp_path):
    path = tmp_path / "train_gpt2.py"
    path.write_text(NANOGPT_TRAIN_GPT2)
    config = read(str(path))
    assert resolve(config, 8).tokens_per_step == 491_520
    assert resolve(config, 8).micro_steps == 5
    assert resolve(config, 8).eval_tokens == 200 * 12 * 1024
    assert (config.wandb_log, config.compile, config.device) == (True, "False", "cpu")


def test_the_knobs_a_resume_may_change_exist():
    assert {field.name for field in dataclasses.fields(Config)} >= FREE


def test_published_weights_bring_their_shape():
    for name, (layers, heads, width) in GPT2_SIZES.items():
        config = Config(init_from=name)
        assert (config.n_layer, config.n_head, config.n_embd, config.bias) == (layers, heads, width, True)


SIZES = {
    "batch_size": st.integers(1, 200),
    "block_size": st.sampled_from([1, 16, 64, 1000, 1024]),
    "world": st.integers(1, 64),
}


def named(message: str) -> list[int]:
    """The sizes that a refusal names."""
    found = re.search(r"=?(\d+)(?: or (\d+))? would", message)
    assert found, message
    return [int(number) for number in found.groups() if number]


@settings(max_examples=400, deadline=500)
@given(tokens=st.integers(1, 1 << 40) | st.integers(1, 100_000), **SIZES)
def test_tokens_are_divided_exactly_or_refused_with_sizes_that_work(tokens, batch_size, block_size, world):
    config = Config(tokens_per_step=tokens, batch_size=batch_size, block_size=block_size)
    try:
        plan = resolve(config, world)
    except UserError as error:
        flag = "batch_size" if str(error).startswith("--batch_size=") else "tokens_per_step"
        for size in named(str(error).partition(";")[2]):
            assume(size < 1 << 40)
            fixed = dataclasses.replace(config, **{flag: size})
            assert resolve(fixed, world).micro_steps >= 1
        return
    assert plan.tokens_per_step == tokens == plan.micro_steps * world * batch_size * block_size
    assert plan.sequences_per_step * block_size == tokens


@settings(max_examples=200, deadline=500)
@given(total=st.integers(1, 1 << 30), world=st.integers(1, 99999))
def test_accumulation_is_divided_exactly_or_refused_with_sizes_that_work(total, world):
    config = Config(gradient_accumulation_steps=total)
    try:
        assert resolve(config, world).micro_steps * world == total
    except UserError as error:
        steps, _, ranks = str(error).partition(";")[2].partition(", as would ")
        for size in named(steps):
            assume(size <= 1 << 30)
            assert resolve(dataclasses.replace(config, gradient_accumulation_steps=size), world)
        for size in map(int, re.findall(r"\d+", ranks)):
            assert resolve(config, size).micro_steps * size == total


def test_without_tokens_every_rank_makes_one_micro_step():
    plan = resolve(Config(batch_size=4, block_size=16), 3)
    assert (plan.micro_steps, plan.tokens_per_step) == (1, 3 * 64)


def test_the_learning_rate():
    config = Config(learning_rate=1.0, min_lr=0.1, warmup_iters=10, lr_decay_iters=110)
    rates = [learning_rate(config, step) for step in range(200)]
    assert rates[:2] == [1 / 11, 2 / 11]
    assert rates[10] == 1.0
    assert rates[60] == pytest.approx(0.55)
    assert rates[110:] == [0.1] * 90
    assert rates[10:111] == sorted(rates[10:111], reverse=True)
    assert {learning_rate(Config(decay_lr=False, learning_rate=0.5), step) for step in (0, 5, 10**9)} == {0.5}


@pytest.mark.parametrize("command", ["nanogpt.train", "nanogpt.sample", "nanogpt.bench"])
def test_help_is_fast_and_imports_no_torch(command):
    """Under 0.5 s of computing; the clock on the wall would measure who else is using the machine."""
    script = (
        f"import sys, runpy; sys.argv = ['x', '--help']; runpy.run_module({command!r}, run_name='__main__')"
    )
    before = sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=600
    )
    seconds = sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2]) - before
    assert done.returncode == 0
    assert "--device" in done.stdout
    assert seconds < 0.5
    script = f"import sys, {command}; print({{'torch', 'datasets', 'numpy'}} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("set()\n", "")
