"""Bad input: one line on stderr that names what was wrong and what to do, status 2 (74 for storage), no trace left.

The cases call `main(argv)` in the test's own process; one or two of each command again as a user types them. What is
wrong in files and folders: test_bad_files.py.
"""

import dataclasses
import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import test_bad_files

from tests.faults import tiny
from tests.refusal_kit import assert_refused, call

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = {  # module -> the class of its flags
    "nanogpt.train": "Config",
    "nanogpt.sample": "Config",
    "nanogpt.bench": "Bench",
    "nanogpt.data.shakespeare_char.prepare": "Config",
    "nanogpt.data.shakespeare.prepare": "Config",
    "nanogpt.data.python_source.prepare": "Config",
    "nanogpt.data.openwebtext.prepare": "Config",
}


def fields(module: str) -> list[dataclasses.Field]:
    """The flags of a command."""
    return list(dataclasses.fields(getattr(importlib.import_module(module), COMMANDS[module])))


# ---- every flag of every command: misspelt, of the wrong type, out of range

MISSPELT = [(module, field.name) for module in COMMANDS for field in fields(module)]


@pytest.mark.parametrize(("module", "name"), MISSPELT)
def test_a_misspelt_flag_names_the_nearest(module, name, refuse):
    wrong = name + name[-1]
    refuse(module, [f"--{wrong}=1"], f"unknown flag --{wrong}", f"did you mean '--{name}'?")


def _wrong_values() -> list[tuple[str, str, str, str]]:
    cases = []
    for module in COMMANDS:
        for field in fields(module):
            kind, meta = field.type, field.metadata
            wrong = {int: ["many", "1.5", ""], float: ["many", "nan", "inf"], bool: ["maybe"]}.get(kind, [])
            wrong += ["nonsense"] if meta.get("choices") else []
            wrong += [f"{meta['low'] - 1:g}"] if meta.get("low") is not None else []
            wrong += [f"{meta['high'] * 2 + 1:.17g}"] if meta.get("high") is not None else []
            cases += [(module, field.name, value, "") for value in wrong]
    return cases


@pytest.mark.parametrize(("module", "name", "value", "_"), _wrong_values())
def test_a_wrong_value_names_the_flag_and_what_is_expected(module, name, value, _, refuse):
    refuse(module, [f"--{name}={value}"], f"--{name}=")


# ---- train.py: what contradicts, what is missing

TRAIN: dict[str, tuple[list[str], tuple[str, ...]]] = {
    "heads": (["--n_embd=100", "--n_head=3"], ("--n_embd=100", "--n_head=3", "99 and 102")),
    "min_lr": (["--learning_rate=1e-4", "--min_lr=1e-3"], ("--min_lr=0.001", "--decay_lr=false")),
    "warm-up": (["--warmup_iters=30", "--lr_decay_iters=20"], ("--warmup_iters=30", "--lr_decay_iters=20")),
    "overwrite and resume": (["--overwrite", "--init_from=resume"], ("--overwrite=true", "--init_from=resume")),
    "overwrite and auto_resume": (["--overwrite", "--auto_resume"], ("--overwrite=true", "--auto_resume=true")),
    "accumulation twice": (
        ["--tokens_per_step=640", "--gradient_accumulation_steps=4"],
        ("--tokens_per_step=640", "--gradient_accumulation_steps=4", "256"),
    ),
    "tokens": (["--tokens_per_step=100"], ("--tokens_per_step=100", "64 or 128 would")),
    "tokens, huge": (["--tokens_per_step=1099511627775"], ("--tokens_per_step=1099511627775", "would")),
    "batch": (["--tokens_per_step=128", "--batch_size=3"], ("--batch_size=3", "--batch_size=2 or 4 would")),
    "accept": (["--accept_changed=everything"], ("--accept_changed=everything", "config,data,torch")),
    "no out_dir": (["--out_dir="], ("--out_dir", "--out_dir=out/my-run")),
    "blank out_dir": (["--out_dir=  "], ("--out_dir",)),
    "nobody's home": (["--out_dir=~nobody-of-that-name/run"], ("--out_dir=~nobody", "write the path out")),
    "nobody's data": (["--data_root=~nobody-of-that-name/data"], ("--data_root=~nobody",)),
    "line break": (["--out_dir=a\nb"], ("--out_dir=", "control characters")),
    "device": (["--device=gpu"], ("--device=gpu", "expected auto, cpu, cuda or cuda:N")),
    "device number": (["--device=cuda:x"], ("--device=cuda:x",)),
    "device number, huge": (["--device=cuda:99999999"], ("--device=cuda:99999999",)),
    "no GPU": (["--device=cuda"], ("--device=cuda", "no NVIDIA GPU", "--device=cpu")),
    "no second GPU": (["--device=cuda:1"], ("--device=cuda:1", "--device=cpu")),
    "nccl on a CPU": (["--backend=nccl"], ("--backend=nccl", "--backend=gloo")),
    "published positions": (["--init_from=gpt2", "--block_size=2048"], ("--block_size=2048", "1024")),
    "published layers": (["--init_from=gpt2", "--n_layer=3"], ("--n_layer=3", "--init_from=gpt2", "12")),
    "resume of nothing": (["--init_from=resume"], ("--out_dir=", "holds no run to resume", "--init_from=scratch")),
    "two typos": (["--batchsize=3", "--lerning_rate=1"], ("did you mean '--batch_size'?",)),
    "one dash": (["-batch_size=3"], ("did you mean '--batch_size'?",)),
    "value missing": (["--batch_size"], ("--batch_size",)),
    "value apart": (["--batch_size", "many"], ("--batch_size=many", "a whole number")),
    "hyphens": (["--batch-sise=3"], ("did you mean '--batch_size'?",)),
    "digits": (["--batch_size=" + "9" * 5000], ("--batch_size=999", "a whole number")),
    "large digits": (["--eval_tokens=" + "9" * 4000], ("--eval_tokens=999", "at most")),
    "not UTF-8": (["--out_dir=a\udcff"], ("--out_dir=", "expected text")),
    "other preset": (["train_gpt3"], ("preset 'train_gpt3'", "did you mean 'train_gpt2'?")),
    "preset in config": (["config/train_gpt3.py"], ("preset 'config/train_gpt3.py'", "train_gpt2")),
    "long preset": (["p" * 3000], ("preset 'ppp", "does not exist")),
    "equals in preset": (["batch_size=3"], ("preset 'batch_size=3'", "does not exist")),
    "no such data": (["--dataset=shakespear_char"], ("--dataset=shakespear_char", "did you mean 'shakespeare_char'?")),
    "data not made": (["--dataset=openwebtext"], ("make it with: python nanogpt/data/openwebtext/prepare.py",)),
    "characters not made": (["--dataset=shakespeare_char"], ("python nanogpt/data/shakespeare_char/prepare.py",)),
    "no name": (["--dataset="], ("--dataset",)),
    "dots": (["--dataset=.."], ("--dataset",)),
    "long name": (["--dataset=" + "d" * 300], ("--dataset=ddd",)),
    "long out_dir": (["--out_dir=" + "d" * 300], ("ddd",)),
    "long data_root": (["--data_root=" + "d" * 300], ("ddd",)),
    "nobody's set": (["--dataset=~nobody-of-that-name/x"], ("--dataset=~nobody",)),
    "context longer than the text": (["--block_size=10000"], ("--block_size=10000", "val", "10,001")),
    "training text too short": (["--block_size=2000", "--dataset=short"], ("1,500", "4,000", "--block_size=2000")),
}  # fmt: skip


@pytest.mark.parametrize("name", TRAIN)
def test_train_refuses(name, refuse, tmp_path, tiny_data):
    argv, words = TRAIN[name]
    if name == "training text too short":
        make_short(tiny_data)
    refuse("nanogpt.train", [*tiny.FLAGS, f"--out_dir={tmp_path}/run", *argv], *words, code=storage(name))


def storage(name: str) -> int:
    """The exit status: the file system itself refuses a name that is too long."""
    return 74 if name == "long out_dir" else 2


def test_a_home_of_nobody_in_the_environment(refuse, tmp_path):
    argv = [*tiny.FLAGS, f"--out_dir={tmp_path}/run"]
    refuse("nanogpt.train", argv, "DATA_ROOT=~nobody", env={"DATA_ROOT": "~nobody-of-that-name/data"})


def make_short(root: Path) -> None:
    """A set whose training text is shorter than its validation text."""
    if not (root / "short").exists():
        import numpy as np

        from nanogpt.common.shards import write_manifest, write_shard

        folder, tokens = root / "short", np.arange(3000, dtype=np.uint16) % 50
        folder.mkdir()
        files = [
            {**write_shard(folder / "short_train_000001.bin", tokens[:1500]), "split": "train"},
            {**write_shard(folder / "short_val_000000.bin", tokens), "split": "val"},
        ]
        write_manifest(folder, "short", "gpt2", 50257, 50256, files)


# ---- ranks


@pytest.mark.parametrize("world", ["0", "-1", "two", "", "1e3", "٣", "99999999"])
def test_a_world_size_that_is_none(world, refuse, tmp_path):
    argv = [*tiny.FLAGS, f"--out_dir={tmp_path}/run"]
    refuse("nanogpt.train", argv, "WORLD_SIZE=", "expected a positive number", env={"WORLD_SIZE": world})


@pytest.mark.parametrize(("world", "flags", "word"), [
    ("3", ["--tokens_per_step=256"], "192 or 384 would"),
    ("8", ["--tokens_per_step=256"], "--batch_size=2 would"),
    ("2", ["--tokens_per_step=96", "--batch_size=2"], "--batch_size=1 or 3 would"),
    ("2", ["--tokens_per_step=128", "--batch_size=3"], "--batch_size=2 or 4 would"),
    ("2", ["--tokens_per_step=48", "--batch_size=2"], "64 would"),
    ("2", ["--tokens_per_step=768", "--batch_size=7"], "--batch_size=6 or 8 would"),
    ("3", ["--gradient_accumulation_steps=4"], "3 or 6 would be, as would 2 or 4 ranks"),
])  # fmt: skip
def test_a_world_size_that_does_not_divide(world, flags, word, refuse, tmp_path):
    argv = [*tiny.FLAGS, f"--out_dir={tmp_path}/run", *flags]
    refuse("nanogpt.train", argv, word, env={"WORLD_SIZE": world})


def test_a_place_that_refuses_shows_before_the_work(refuse, monkeypatch):
    prepare = importlib.import_module("nanogpt.data.python_source.prepare")
    monkeypatch.setattr(prepare, "library_files", None)
    refuse(prepare.__name__, ["--data_root=/proc/x"], "/proc/x", code=74)


def test_the_other_ranks_are_silent(tmp_path, tiny_data):
    for flags in (["--batchsize=3"], ["--min_lr=5"], ["train_gpt3"]):
        argv = [*tiny.FLAGS, f"--out_dir={tmp_path}/run", *flags]
        env = {"RANK": "1", "WORLD_SIZE": "2", "DATA_ROOT": str(tiny_data)}
        assert call("nanogpt.train", argv, tmp_path, env) == (2, "", "")


# ---- the real commands

REAL = [
    ("train.py", ["--batchsize=3"], "did you mean '--batch_size'?"),
    ("train.py", ["--learning_rate=fast"], "--learning_rate=fast"),
    ("train.py", ["--dropout=2"], "--dropout=2"),
    ("train.py", ["--tokens_per_step=1000"], "--tokens_per_step=1000"),
    ("train.py", ["--n_embd=100", "--n_head=3"], "99 and 102"),
    ("train.py", ["--dataset=openwebtex"], "did you mean 'openwebtext'?"),
    ("train.py", ["--dataset=openwebtext", "--device=cpu"], "nanogpt/data/openwebtext/prepare.py"),
    ("train.py", ["--init_from=resume", "--out_dir=/nonexistent/run"], "holds no run to resume"),
    ("train.py", ["config/train_gpt3.py"], "did you mean 'train_gpt2'?"),
    ("train.py", ["config/train_gpt2.py", "--batch_size=7", "--device=cpu"], "--tokens_per_step=491520"),
    ("sample.py", ["--temprature=1"], "did you mean '--temperature'?"),
    ("sample.py", ["--top_p=2"], "--top_p=2"),
    ("sample.py", ["--out_dir=/nonexistent/run"], "--out_dir=/nonexistent/run"),
    ("sample.py", ["--start=FILE:/nonexistent/text"], "/nonexistent/text"),
    ("sample.py", ["--checkpoint=newest"], "--checkpoint=newest"),
    ("bench.py", ["--step=3"], "did you mean '--steps'?"),
    ("bench.py", ["--n_embd=100", "--n_head=3"], "99 and 102"),
    ("bench.py", ["--profile", "--trace=/nonexistent/t.json"], "--trace=/nonexistent/t.json"),
    ("data/shakespeare_char/prepare.py", ["--dataroot=x"], "did you mean '--data_root'?"),
    ("data/shakespeare/prepare.py", ["shakespeare"], "'shakespeare'"),
    ("data/python_source/prepare.py", ["--data_root=/proc/x"], "/proc/x"),
    ("data/openwebtext/prepare.py", ["--worker=3"], "did you mean '--num_workers'?"),
    ("data/text/prepare.py", ["a b\udcff"], "FILE 'a b\\udcff': expected text"),
]  # fmt: skip


NAMED = [f"{script} {' '.join(argv)}" for script, argv, _ in REAL]
FIRST = {case[0]: case for case in reversed(REAL)}  # one process a command


@pytest.mark.parametrize(("script", "argv", "word"), REAL, ids=NAMED)
def test_what_a_user_types_in_the_trainers_folder(script, argv, word, refuse):
    module = "nanogpt." + script.removesuffix(".py").replace("/", ".")
    refuse(module, argv, word, code=74 if "/proc/x" in argv[0] else 2, env={"DATA_ROOT": "data"})


@pytest.mark.parametrize(("script", "argv", "word"), FIRST.values(), ids=list(FIRST))
def test_the_real_commands_refuse_before_torch_is_imported(script, argv, word, tmp_path):
    """As a user types them, in the trainer's folder. `-X importtime` tells what was imported."""
    environment = {**os.environ, "DATA_ROOT": str(tmp_path / "data"), "HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-X", "importtime", script, *argv],
        cwd=ROOT / "nanogpt", env=environment, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    imports, said = [], []
    for line in done.stderr.splitlines(keepends=True):
        (imports if line.startswith("import time:") else said).append(line)
    assert_refused(done.returncode, "".join(said), (word,), code=74 if "/proc/x" in argv[0] else 2)
    imported = {re.split(r"\|", line)[-1].strip().split(".")[0] for line in imports}
    assert "nanogpt" in imported
    assert not imported & {"torch", "datasets", "wandb", "tiktoken"}
    assert list(tmp_path.iterdir()) == []


def test_there_are_enough_cases():
    """The count that the documentation gives."""
    files = (test_bad_files.PRESETS, test_bad_files.DATA, test_bad_files.RUNS)
    tables = (MISSPELT, _wrong_values(), TRAIN, *files, REAL)
    assert sum(map(len, tables)) >= 200
    assert len(_wrong_values()) == len(set(_wrong_values()))
