"""Bad input that lies in files and folders: presets, data sets, run directories, disks. See test_bad_input.py."""

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults import tiny
from tests.faults.disks import small_disk
from tests.refusal_kit import assert_refused, snapshot

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
