"""Bad input: one line on stderr that names what was wrong and what to do, status 2 (74 for storage), no trace left.

The cases run in forked processes (tests/faults/zygote.py); a sample of them again as the real commands.
"""

import dataclasses
import importlib
import json
import os
import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults import tiny
from tests.faults.disks import small_disk

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


def snapshot(folder: Path) -> dict[str, tuple]:
    """Names, sizes, times and modes of everything in a folder."""
    found = {}
    for path in sorted(folder.rglob("*")):
        state = path.lstat()
        changes = None if path.is_dir() else state.st_mtime_ns
        found[str(path)] = (state.st_mode, state.st_size if path.is_file() else 0, changes)
    return found


def assert_refused(status: int, stderr: str, words: tuple[str, ...] = (), code: int = 2) -> None:
    """One line, no traceback, the right status, and what it must name."""
    assert status == code, (status, stderr)
    assert stderr.startswith("error: "), stderr
    assert stderr.endswith("\n")
    assert stderr.count("\n") == 1, stderr
    assert "Traceback" not in stderr
    assert len(stderr) < 1000
    for word in words:
        assert word in stderr, (word, stderr)


@pytest.fixture
def refuse(zygote, tmp_path, tiny_data):
    """`refuse(module, argv, words)`: the command refuses, and nothing in tmp_path or the data has changed."""

    def run(module: str, argv: list[str], *words: str, code: int = 2, env: dict | None = None) -> None:
        before = snapshot(tmp_path), snapshot(tiny_data)
        environment = {"DATA_ROOT": str(tiny_data), "HOME": str(tmp_path), **(env or {})}
        child = zygote.run(argv, module=module, cwd=tmp_path, env=environment, timeout=600)
        assert_refused(child.status, child.stderr, words, code)
        assert (snapshot(tmp_path), snapshot(tiny_data)) == before, "it changed something"

    return run


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


# ---- presets are data, and hostile ones are refused

PRESETS: dict[str, tuple[str | bytes, str]] = {
    "import": ("import os", ":1: a preset holds only lines"),
    "call": ("out_dir = print('x')", "is not a number"),
    "system": ("__import__('os').system('touch canary')", ":1: a preset holds only lines"),
    "if": ("if True:\n    batch_size = 3", ":1: a preset holds only lines"),
    "for": ("for x in range(9): pass", "only lines"),
    "lambda": ("batch_size = (lambda: 3)()", "is not a number"),
    "comprehension": ("out_dir = [x for x in 'abc']", "is not a number"),
    "f-string": ("out_dir = f'{open(0)}'", "is not a number"),
    "attribute": ("out_dir = ''.join", "is not a number"),
    "subscript": ("batch_size = [1][0]", "is not a number"),
    "walrus": ("batch_size = (x := 3)", "is not a number"),
    "tuple": ("batch_size, block_size = 3, 4", "only lines"),
    "chain": ("batch_size = block_size = 4", "only lines"),
    "annotated": ("batch_size: int = 4", "only lines"),
    "augmented": ("batch_size = 4\nbatch_size += 1", ":2: a preset holds only lines"),
    "power": ("max_iters = 9**9**9", "is not a number"),
    "shift": ("max_iters = 1 << 9999999999", "is not a number"),
    "repeated text": ("out_dir = 'a' * 10**9", "is not a number"),
    "product": ("max_iters = 10000000000000000 * 10000000000000000", "is not a number"),
    "huge literal": ("max_iters = " + "9" * 4000, "max_iters"),
    "huger literal": ("max_iters = " + "9" * 5000, "not a preset"),
    "huge quotient": ("learning_rate = " + "9" * 4000 + " / 1", "too large"),
    "zero": ("batch_size = 1 / 0", "division by zero"),
    "not a number": ("learning_rate = 1e999 - 1e999", "is not a number"),
    "infinity": ("learning_rate = 1e999", "a finite number"),
    "unknown": ("batchsize = 3", "unknown setting 'batchsize'; did you mean 'batch_size'?"),
    "wrong type": ("batch_size = 'three'", "batch_size=three: expected a whole number"),
    "bool for int": ("batch_size = True", "batch_size=True: expected a whole number"),
    "None": ("batch_size = None", "batch_size=None"),
    "range": ("dropout = 2", "must be at most 0.95"),
    "syntax": ("batch_size = = 3", ":1: not a preset"),
    "brackets": ("(" * 5000, "not a preset"),
    "minus signs": ("max_iters = " + "-" * 9000 + "1", "preset"),
    "plus signs": ("max_iters = " + "1+" * 9000 + "1", "preset"),
    "some plus signs": ("max_iters = " + "1+" * 700 + "1.5", "preset"),
    "zero byte": (b"out_dir = 'a\0b'", "not a preset"),
    "zero byte, escaped": ("out_dir = 'a\\0b'", "out_dir="),
    "not UTF-8": (b"out_dir = '\xff'", "not a preset"),
    "binary": (bytes(range(256)) * 10, "not a preset"),
    "too long": ("# comment\n" * 10000, "larger than"),
    "escape": ("out_dir = '\\d' + 1", "is not a number"),
    "names": ("batch_size = max_iters", "is not a number"),
    "contradiction": ("n_embd = 100\nn_head = 3", "--n_embd=100"),
}


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_read_as_data(name, refuse, tmp_path):
    text, word = PRESETS[name]
    path = tmp_path / "preset.py"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    words = [word] if "--" in word else [str(path), word]
    refuse(
        "nanogpt.train",
        [str(path), f"--out_dir={tmp_path}/run", "--dataset=tiny"],
        *words if word != "preset" else [],
    )
    assert not (tmp_path / "canary").exists()


# ---- data that are damaged


def shard(change: Callable[[bytearray], object]) -> Callable[[Path], None]:
    """Change the bytes of the training shard."""

    def damage(folder: Path) -> None:
        path = folder / "tiny_train_000001.bin"
        data = bytearray(path.read_bytes())
        changed = change(data)
        path.write_bytes(data if changed is None else bytes(changed))

    return damage


def manifest(**changes: object) -> Callable[[Path], None]:
    """Change fields of the manifest."""

    def damage(folder: Path) -> None:
        path = folder / "manifest.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return damage


DATA: dict[str, tuple[Callable[[Path], object], str]] = {
    "empty shard": (shard(lambda data: b""), "tiny_train_000001.bin"),
    "cut shard": (shard(lambda data: data[:-2]), "tiny_train_000001.bin"),
    "cut header": (shard(lambda data: data[:100]), "tiny_train_000001.bin"),
    "longer shard": (shard(lambda data: data + b"\0\0"), "tiny_train_000001.bin"),
    "magic": (shard(lambda data: struct.pack_into("<i", data, 0, 7)), "tiny_train_000001.bin"),
    "version": (shard(lambda data: struct.pack_into("<i", data, 4, 2)), "version 2"),
    "count": (shard(lambda data: struct.pack_into("<i", data, 8, 5)), "its header says 5 tokens"),
    "negative count": (shard(lambda data: struct.pack_into("<i", data, 8, -5)), "tiny_train_000001.bin"),
    "flipped bit": (shard(lambda data: data.__setitem__(5000, data[5000] ^ 1)), "its content has changed"),
    "shard missing": (lambda folder: (folder / "tiny_train_000001.bin").unlink(), "tiny_train_000001.bin"),
    "shard is a folder": (
        lambda f: [(f / "tiny_val_000000.bin").unlink(), (f / "tiny_val_000000.bin").mkdir()], "tiny_val"
    ),
    "manifest is no JSON": (lambda folder: (folder / "manifest.json").write_text("{"), "manifest.json: not JSON"),
    "manifest is a list": (lambda folder: (folder / "manifest.json").write_text("[]"), "expected a JSON object"),
    "manifest without files": (manifest(files=[]), "files"),
    "vocabulary": (manifest(vocab_size=0), "vocab_size"),
    "other vocabulary": (manifest(vocab_size=5), "vocab_size"),
    "tokenizer": (manifest(tokenizer="x"), "tokenizer"),
    "no characters": (lambda folder: (folder / "meta.json").unlink(), "meta.json"),
    "no files": (lambda f: [path.unlink() for path in f.iterdir()], "holds no token shards"),
    "unfinished": (lambda f: [(f / "manifest.json").unlink(), (f / "progress.json").write_text("{}")], "not finished"),
    "a file": (lambda f: [shutil.rmtree(f), f.write_text("")], "is not a folder"),
}  # fmt: skip


@pytest.mark.parametrize("name", DATA)
def test_damaged_data_are_refused(name, refuse, tmp_path):
    damage, word = DATA[name]
    damage(tiny.make_data(tmp_path / "data"))
    argv = [*tiny.FLAGS, f"--data_root={tmp_path}/data", f"--out_dir={tmp_path}/run"]
    refuse("nanogpt.train", argv, word)


# ---- run directories that are not what they should be


RUNS: dict[str, tuple[Callable[[Path], object], list[str], str]] = {
    "holds a run": (lambda run: None, ["--seed=5"], "--seed=5, was 1337"),
    "config is no JSON": (lambda run: (run / "config.json").write_text("{"), ["--auto_resume"], "config.json"),
    "config is a list": (lambda run: (run / "config.json").write_text("[]"), ["--auto_resume"], "config.json"),
    "config is empty": (lambda run: (run / "config.json").write_text("{}"), ["--auto_resume"], "config: missing"),
    "config of another time": (
        lambda run: (run / "config.json").write_text('{"config": {}, "asked": {}, "source_sha256": 3}'),
        ["--auto_resume"], "source_sha256: missing or damaged",
    ),
    "no environment": (lambda run: (run / "environment.json").unlink(), ["--auto_resume"], "environment.json"),
    "no source": (lambda run: (run / "source/nanogpt/train.py").unlink(), ["--auto_resume"], "source copy was"),
    "no checkpoint": (lambda run: shutil.rmtree(run / "checkpoints"), ["--init_from=resume"], "no checkpoint to"),
    "other model": (lambda run: None, ["--auto_resume", "--n_layer=2"], "--n_layer=2"),
    "other data": (lambda run: None, ["--auto_resume", "--dataset=other"], "--dataset=other"),
    "not a run": (
        lambda run: [shutil.rmtree(run), run.mkdir(), (run / "thesis.tex").write_text("")], [], "'thesis.tex'"
    ),
    "not a run, resumed": (
        lambda run: [shutil.rmtree(run), run.mkdir(), (run / "thesis.tex").write_text("")],
        ["--init_from=resume"], "holds no run to resume",
    ),
    "a file": (lambda run: [shutil.rmtree(run), run.write_text("")], [], "is a file"),
    "below a file": (lambda run: None, ["--out_dir={run}/config.json/run"], "a file is in the place of the folder"),
}  # fmt: skip


@pytest.fixture(scope="module")
def finished_run(zygote, tiny_data, tmp_path_factory):
    """A run of two steps, to be copied and damaged."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    argv = [*tiny.FLAGS, "--max_iters=2", f"--data_root={tiny_data}", f"--out_dir={folder}"]
    assert zygote.run(argv).status == 0
    return folder


@pytest.mark.parametrize("name", RUNS)
def test_a_run_directory_that_is_not_the_right_one(name, refuse, finished_run, tmp_path):
    change, flags, word = RUNS[name]
    run = tmp_path / "run"
    shutil.copytree(finished_run, run)
    change(run)
    flags = [flag.replace("{run}", str(run)) for flag in flags]
    argv = [*tiny.FLAGS, f"--out_dir={run}", *flags]
    refuse("nanogpt.train", argv, word, code=74 if name == "below a file" else 2)


def test_a_checkpoint_of_another_model(zygote, finished_run, tmp_path, tiny_data):
    """Sound, but of another width: said with both widths, and nothing is touched."""
    wide, run = tmp_path / "wide", tmp_path / "run"
    argv = [*tiny.FLAGS, "--max_iters=2", f"--data_root={tiny_data}"]
    assert zygote.run([*argv, "--n_embd=32", f"--out_dir={wide}"]).status == 0
    shutil.copytree(finished_run, run)
    shutil.rmtree(run / "checkpoints")
    shutil.copytree(wide / "checkpoints", run / "checkpoints")
    before = snapshot(run / "checkpoints")
    child = zygote.run([*argv, f"--out_dir={run}", "--auto_resume", "--max_iters=3"])
    assert_refused(child.status, child.stderr, ("n_embd=32", "this run has 16", "step_00000002"))
    assert snapshot(run / "checkpoints") == before


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


def test_the_other_ranks_are_silent(zygote, tmp_path, tiny_data):
    for flags in (["--batchsize=3"], ["--min_lr=5"], ["train_gpt3"]):
        argv = [*tiny.FLAGS, f"--out_dir={tmp_path}/run", *flags]
        child = zygote.run(argv, env={"RANK": "1", "WORLD_SIZE": "2", "DATA_ROOT": str(tiny_data)})
        assert (child.status, child.stderr, child.stdout) == (2, "", "")


# ---- storage


def test_a_read_only_folder(refuse, tmp_path):
    with small_disk(tmp_path / "disk", "1m", read_only=True) as disk:
        refuse(
            "nanogpt.train", [*tiny.FLAGS, f"--out_dir={disk}/run"], "read-only", "another folder", code=74
        )
        refuse("nanogpt.data.python_source.prepare", [f"--data_root={disk}/data"], "read-only", code=74)


def test_a_full_disk(zygote, tmp_path, tiny_data):
    with small_disk(tmp_path / "disk", "64k") as disk:
        child = zygote.run([*tiny.FLAGS, f"--data_root={tiny_data}", f"--out_dir={disk}/run"])
        assert_refused(child.status, child.stderr, ("full", str(disk)), code=74)
        shutil.rmtree(disk / "run")
        child = zygote.run([f"--data_root={disk}/data"], module="nanogpt.data.python_source.prepare")
        assert_refused(child.status, child.stderr, (str(disk),), code=74)


@pytest.mark.parametrize("place", ["/proc/run", "/sys/run", "/dev/null/run", "/proc/self/mem"])
def test_places_where_nothing_can_be_made(place, zygote, tiny_data):
    child = zygote.run([*tiny.FLAGS, f"--data_root={tiny_data}", f"--out_dir={place}"])
    assert child.status in (2, 74)
    assert_refused(child.status, child.stderr, (place,), code=child.status)


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
]  # fmt: skip


@pytest.mark.parametrize(("script", "argv", "word"), REAL, ids=[f"{s} {' '.join(a)}" for s, a, _ in REAL])
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
    tables = (MISSPELT, _wrong_values(), TRAIN, PRESETS, DATA, RUNS, REAL)
    assert sum(map(len, tables)) >= 200
    assert len(_wrong_values()) == len(set(_wrong_values()))
