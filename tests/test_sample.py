"""sample.py on a run that was really trained, whose data set has gone, and on runs that are broken."""

import json
import shutil
import time
from pathlib import Path

import numpy as np
import pytest

from nanogpt import sample
from nanogpt.common.errors import UserError
from nanogpt.common.tokenizer import CharTokenizer, Gpt2Tokenizer, make_tokenizer
from nanogpt.data import small_sets

CHARS = "\n abcdefghé€😀"  # one to four bytes in UTF-8
TINY = ("--n_layer=1", "--n_head=2", "--n_embd=16", "--block_size=16", "--batch_size=2", "--device=cpu")


@pytest.fixture(scope="module")
def trained(zygote, tmp_path_factory):
    """A run of 30 steps with a checkpoint every 10, trained by train.py; its data set is deleted afterwards."""
    folder = tmp_path_factory.mktemp("sample")
    ids = np.random.default_rng(0).integers(len(CHARS), size=4000).astype(np.uint16)
    splits = {"train": ids[:3600], "val": ids[3600:]}
    small_sets.publish("letters", folder / "data", splits, "char", len(CHARS), CHARS)
    done = zygote.run([*TINY, "--dataset=letters", f"--out_dir={folder / 'run'}", f"--data_root={folder / 'data'}",
                       "--max_iters=30", "--eval_interval=10", "--keep_checkpoints=9", "--warmup_iters=0",
                       "--lr_decay_iters=30", "--learning_rate=1e-3", "--min_lr=1e-4"])  # fmt: skip
    assert done.status == 0, done.stderr
    shutil.rmtree(folder / "data")
    return folder / "run"


@pytest.fixture
def run(trained, tmp_path) -> Path:
    """A copy of the run to break."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


def sampled(capsys, out_dir: Path, *flags: str) -> tuple[str, str]:
    assert (
        sample.main(
            [f"--out_dir={out_dir}", "--device=cpu", "--max_new_tokens=24", "--num_samples=3", *flags]
        )
        == 0
    )
    return capsys.readouterr()


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def test_samples_have_the_start_the_length_and_the_alphabet(trained, capsys):
    out, err = sampled(capsys, trained, "--start=abc\nbad")
    parts = out.split("\n" + sample.RULE + "\n")
    assert parts.pop() == ""
    assert len(parts) == 3
    assert all(part.startswith("abc\nbad") and len(part) == 7 + 24 for part in parts)
    assert set(out) <= set(CHARS + sample.RULE)
    assert len(set(parts)) == 3
    assert "72 tokens in" in err


def test_the_same_seed_gives_the_same_text_streamed_or_not(trained, capsys):
    streamed = sampled(capsys, trained, "--seed=4", "--start=a")[0]
    assert sampled(capsys, trained, "--seed=4", "--start=a", "--stream=false")[0] == streamed
    assert sampled(capsys, trained, "--seed=5", "--start=a")[0] != streamed
    alone = sampled(capsys, trained, "--seed=4", "--start=a", "--num_samples=1")[0]
    assert streamed.startswith(alone)


def test_more_samples_than_are_computed_at_once(trained, capsys):
    many = sampled(capsys, trained, f"--num_samples={sample.TOGETHER + 2}", "--start=a")[0]
    assert many.count(sample.RULE) == sample.TOGETHER + 2
    few = sampled(capsys, trained, "--start=a")[0]
    assert many.startswith(few)


def test_temperature_0_makes_all_samples_one(trained, capsys):
    parts = sampled(capsys, trained, "--temperature=0", "--start=b")[0].split(sample.RULE)
    assert parts[0].strip("\n") == parts[1].strip("\n") == parts[2].strip("\n")


def test_the_start_comes_from_a_file(trained, capsys, tmp_path):
    (tmp_path / "prompt").write_text("face\nbead", encoding="utf-8")
    out, _ = sampled(capsys, trained, f"--start=FILE:{tmp_path / 'prompt'}")
    assert out == sampled(capsys, trained, "--start=face\nbead")[0]
    assert out.startswith("face\nbead")


def test_which_checkpoint_is_used(run, capsys):
    states = {
        int(path.parent.name.removeprefix("step_")): json.loads(path.read_text())
        for path in run.glob("checkpoints/*/state.json")
    }
    assert sorted(states) == [10, 20, 30]
    best = min(states, key=lambda step: (states[step]["val_loss"], -step))
    assert f"step {best}," in sampled(capsys, run)[1]
    assert "step 30," in sampled(capsys, run, "--checkpoint=last")[1]
    assert "step 10," in sampled(capsys, run, "--checkpoint=10")[1]
    flip_a_bit(run / "checkpoints/step_00000030/model.safetensors")
    before = sorted(str(path) for path in run.rglob("*"))
    err = sampled(capsys, run, "--checkpoint=last")[1]
    assert "step_00000030 is not used: model.safetensors" in err
    assert "step 20," in err
    assert sorted(str(path) for path in run.rglob("*")) == before, "sampling writes nothing and moves nothing"
    with pytest.raises(UserError, match=r"step_00000030: model\.safetensors does not have its digest"):
        sampled(capsys, run, "--checkpoint=30")


def test_a_run_without_a_sound_checkpoint(run, capsys):
    for path in run.glob("checkpoints/*/model.safetensors"):
        path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError, match="no sound checkpoint"):
        sampled(capsys, run)
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(UserError, match="no checkpoint yet"):
        sampled(capsys, run)


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--start=abcZ"], "'Z' (place 4)"),
        (["--start=FILE:/nowhere/at/all"], "/nowhere/at/all: cannot be read"),
        (["--start=FILE:/"], "cannot be read"),
        (["--start=FILE:/dev/null"], "is empty"),
        (["--checkpoint=11"], "only of 10, 20, 30"),
        (["--checkpoint=newest"], "expected best, last"),
        (["--device=tpu"], "--device=tpu"),
        (["--top_p=1.5"], "--top_p=1.5"),
        (["--temperature=-1"], "--temperature=-1"),
        (["--num_samples=0"], "--num_samples=0"),
        (["--max_new_tokens=many"], "--max_new_tokens=many"),
        (["--temprature=1"], "did you mean '--temperature'"),
        (["--init_from=gpt3"], "--init_from=gpt3"),
        (["--init_from=gpt2", "--checkpoint=last"], "--checkpoint=last"),
        (["--out_dir=/nowhere"], "holds no run"),
        (["--dtype=int8"], "--dtype=int8"),
        (["config/x.py"], "config/x.py"),
    ],
)
def test_bad_input_is_one_line(trained, capsys, flags, named):
    with pytest.raises(UserError) as failure:
        sampled(capsys, trained, *flags)
    assert named in str(failure.value)
    assert "\n" not in str(failure.value)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda record: record.pop("tokens"), "no tokenizer"),
        (lambda record: record["tokens"].update(tokenizer="unknown"), "meta.json"),
        (lambda record: record["tokens"].update(tokenizer="bytes"), "names no tokenizer"),
        (lambda record: record["tokens"].update(chars="aa"), "names no tokenizer"),
        (lambda record: record["tokens"].update(chars=CHARS + "XYZ"), "not of one run"),
    ],
)
def test_a_config_that_does_not_fit_is_one_line(run, capsys, change, named):
    path = run / "config.json"
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(record))
    with pytest.raises(UserError, match=named):
        sampled(capsys, run)


def test_as_a_command_from_both_places_and_out_of_the_run(trained, root, run_python, zygote):
    """The first is a process of its own, which starts torch; the others do the same in forked ones."""
    flags = (f"--out_dir={trained}", "--device=cpu", "--num_samples=2", "--max_new_tokens=8", "--start=abc")
    module = run_python("-m", "nanogpt.sample", *flags)
    assert module.returncode == 0, module.stderr
    own_copy = trained / "source" / "nanogpt" / "sample.py"
    for script, folder in (("sample.py", root / "nanogpt"), (own_copy, trained)):
        done = zygote.run([script, *flags], module="tests.faults.forked_python", cwd=folder)
        assert (done.status, done.stdout) == (0, module.stdout), done.stderr


def test_an_error_is_one_line_and_exit_2(run_python):
    done = run_python("-m", "nanogpt.sample", "--out_dir=/nowhere")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: --out_dir=/nowhere")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("module", ["nanogpt.sample", "nanogpt.bench", "nanogpt.train"])
def test_help_is_quick_and_imports_no_torch(run_python, module):
    code = (
        f"import sys\nfrom {module} import main\ntry:\n    main(['--help'])\nexcept SystemExit:\n    pass\n"
    )
    began = time.monotonic()
    done = run_python("-c", code + "print('torch' in sys.modules, 'numpy' in sys.modules)")
    seconds = time.monotonic() - began
    assert done.stdout.endswith("False False\n"), done.stdout[-300:]
    assert "--device" in done.stdout
    assert seconds < 5, "0.1 s on an idle machine; this bound leaves room for a busy one"


def test_gpt2_tokens_may_hold_parts_of_characters(root):
    """Every text comes out as it went in, however its characters are cut into tokens; with the real vocabulary."""
    cache = root.parent / "shared" / "data" / "tiktoken_cache"
    import os

    import tiktoken

    if not cache.is_dir():
        pytest.skip("needs GPT-2's vocabulary")
    before = os.environ.get("TIKTOKEN_CACHE_DIR")
    os.environ["TIKTOKEN_CACHE_DIR"] = str(cache)
    try:
        tokenizer = Gpt2Tokenizer(tiktoken.get_encoding("gpt2"))
    finally:
        os.environ.pop("TIKTOKEN_CACHE_DIR")
        os.environ.update({"TIKTOKEN_CACHE_DIR": before} if before else {})
    written = "naïve 😀 €5 日本語 \N{ARABIC LETTER ALEF}<|endoftext|>\n"
    tokens = tokenizer.encode(written)
    decode = tokenizer.decoder()
    pieces = [decode(token) for token in tokens]
    assert "".join(pieces) == written
    assert "" in pieces, "some token must end inside a character, or this shows nothing"
    assert "\ufffd" not in "".join(pieces)
    assert tokens.count(50256) == 1
    cut = tokenizer.decoder()
    assert cut(tokenizer.encode("😀")[0]) + cut(tokenizer.encode("a")[0]) == "\ufffda"


def test_the_char_tokenizer_turns_text_into_tokens_and_back(tmp_path):
    tokenizer = make_tokenizer({"tokenizer": "char", "chars": CHARS}, "here", tmp_path)
    assert isinstance(tokenizer, CharTokenizer)
    assert tokenizer.encode("😀\né") == [12, 0, 10]
    assert "".join(map(tokenizer.decoder(), range(len(CHARS)))) == CHARS


def test_a_terminal_gets_no_control_characters():
    assert sample.printable("a\x1b[2Jb\n\t\x07é😀\r") == "a\ufffd[2Jb\n\t\ufffdé😀\ufffd"
