"""bench.py: whole steps on random tokens and on shards, the trace, and what it refuses."""

import importlib.util
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from nanogpt import bench
from nanogpt.common.errors import CommandError, UserError
from nanogpt.data import small_sets

SMALL = ("--device=cpu", "--n_layer=1", "--n_head=2", "--n_embd=16", "--block_size=16", "--batch_size=2",
         "--vocab_size=50", "--steps=3", "--warmup_steps=1")  # fmt: skip


@pytest.fixture(autouse=True)
def one_thread():
    """bench.py takes all cores, as training does; put them back."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def result_of(capsys, *flags: str) -> dict:
    assert bench.main([*SMALL, *flags]) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_the_last_line_is_json_with_consistent_numbers(capsys):
    result = result_of(capsys, "--tokens_per_step=128")
    assert (result["tokens_per_step"], result["micro_steps"], result["steps"]) == (128, 4, 3)
    assert result["ms_min"] <= result["ms_median"] <= result["ms_max"]
    assert result["tokens_per_s"] == pytest.approx(128e3 / result["ms"], rel=0.01)
    assert result["mfu"] is None
    assert result["data"] == "random"
    assert result["loss"] == pytest.approx(np.log(50), rel=0.1)


def test_steps_really_train(capsys):
    """On one batch again and again the loss falls, so the optimizer is in what is timed."""
    assert result_of(capsys, "--steps=40")["loss"] < result_of(capsys, "--steps=3")["loss"] - 0.005


def test_real_data_are_read(capsys, tmp_path):
    ids = np.random.default_rng(0).integers(30, size=2000).astype(np.uint16)
    small_sets.publish(
        "letters",
        tmp_path,
        {"train": ids[:1500], "val": ids[1500:]},
        "char",
        30,
        "".join(map(chr, range(65, 95))),
    )
    result = result_of(capsys, "--dataset=letters", f"--data_root={tmp_path}")
    assert result["data"] == "letters"
    assert result["parameters"] == result_of(capsys, "--vocab_size=30")["parameters"]


def test_the_trace_is_what_chrome_reads(capsys, tmp_path):
    path = tmp_path / "trace.json"
    assert bench.main([*SMALL, "--profile", f"--trace={path}"]) == 0
    out = capsys.readouterr().out
    assert f"trace: {path}" in out
    kinds, names = (
        re.findall(rf"^ {{{spaces}}}(\S.*?) +[0-9.]+ ms +[0-9.]+ %$", out, re.MULTILINE) for spaces in (2, 4)
    )
    assert "matrix products" in kinds and "optimizer" in kinds
    assert len(names) == 10 and "aten::mm" in names
    events = json.loads(path.read_text())["traceEvents"]
    assert any("aten::mm" in str(event.get("name")) for event in events)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--n_head=3"], "--n_embd=16: not divisible by --n_head=3"),
        (["--tokens_per_step=100"], "--tokens_per_step=100"),
        (["--tokens_per_step=48"], "--batch_size=2"),
        (["--profile", "--trace=/nowhere/at/all.json"], "/nowhere/at/all.json"),
        (["--dataset=letters", "--data_root=/nowhere"], "letters"),
        (["--step=3"], "did you mean '--steps'"),
        (["--steps=0"], "--steps=0"),
        (["--device=gpu"], "--device=gpu"),
        (["--dtype=float8"], "--dtype=float8"),
    ],
)
def test_bad_input_is_one_line(capsys, flags, named):
    with pytest.raises(UserError) as failure:
        bench.main([*SMALL, *flags])
    assert named in str(failure.value)
    assert "\n" not in str(failure.value)


def test_the_start_up_benchmark_has_no_time_for_a_trainer_that_never_starts(tmp_path, monkeypatch):
    path = Path(__file__).resolve().parents[1] / "benchmarks" / "startup.py"
    spec = importlib.util.spec_from_file_location("startup", path)
    startup = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(startup)
    monkeypatch.setenv("DATA_ROOT", str(tmp_path))  # no data there
    with pytest.raises(CommandError, match="status 2, before its first step"):
        startup.first_step(tmp_path / "run")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
def test_on_a_gpu_it_compiles_fuses_and_knows_its_memory(capsys):
    flags = ("--n_layer=2", "--n_head=2", "--n_embd=128", "--block_size=256", "--batch_size=4", "--steps=3",
             "--tokens_per_step=4096", "--vocab_size=8192")  # fmt: skip
    assert bench.main([*flags, "--device=cuda"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["compiled"]
    assert result["memory_gib"] > 0
    assert result["loss"] == pytest.approx(np.log(8192), rel=0.1)


def test_the_table_of_the_baseline_says_what_is_met():
    """benchmarks/baseline.py, its runs replaced by figures."""
    from benchmarks import baseline

    found = {"bf16": (600_000.0, 6.78), "fp8": (640_000.0, 6.785)}

    def run(options, seed, *more):
        speed, loss = found[options.out_dir.rpartition("/")[2]]
        noise = 0.001 * (seed - 1338)
        nan = float("nan")
        return {
            "ms": 1.0,
            "tokens_per_s": speed,
            "mfu": nan,
            "memory_gib": 42.9,
            "val_loss": loss + noise,
            "wall_s": 9.0,
        }

    baseline.gpt2_training.ours, real = run, baseline.gpt2_training.ours
    try:
        options = baseline.Options(data="x")
        theirs, speed = baseline.reference(options, "NVIDIA H200 NVL")
        lines = baseline.table(baseline.training_rows(options, theirs, speed))
        assert lines[2].startswith("| nanoGPT's train.py | 513,500 |")
        assert lines[3].split(" | ")[1:5] == ["600,000", "1.17", "1.15: met", "-"]
        assert "6.7800 | 3 seeds; loss goal 6.79: met |" in lines[3]
        assert lines[4].split(" | ")[1:4] == ["640,000", "1.25", "1.3: missed"]
        assert "1 seed; +0.0050 to bfloat16's loss, goal 0.01: met |" in lines[4]
        unknown = baseline.table(baseline.training_rows(options, *baseline.reference(options, "Foo 1")))
        assert unknown[2].split(" | ")[1:4] == ["600,000", "-", "-"]
    finally:
        baseline.gpt2_training.ours = real
    with pytest.raises(UserError, match="--data=: name a folder"):
        baseline.main([])
