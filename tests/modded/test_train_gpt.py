"""The speedrun's trainer as a user runs it, with the small preset on the CPU: trained, killed, resumed, replayed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

from modded_nanogpt import sample, train_gpt
from nanogpt.common.errors import UserError
from nanogpt.common.machine import has_nvidia_driver
from nanogpt.common.manifest import write_manifest
from nanogpt.common.shards import write_shard
from tests.modded.forked import finished, launch
from tests.modded.refusals import refused

ROOT = Path(__file__).resolve().parents[2]
VOCAB, EOT, STEPS = 512, 511, 8
HAS_GPU = has_nvidia_driver()
FLAGS = (
    "tiny", "--dataset=tiny", f"--vocab_size={VOCAB}", "--prefix=false", "--steps=7", "--extension_steps=1",
    "--eval_interval=3", "--eval_tokens=2048", "--eval_slice=1024", "--warmup=false", "--num_threads=1",
    "--device=cpu",
)  # fmt: skip
# A sixteenth of each step's tokens, for what no loss has to fall for. The same command makes such a run anew; without
# --smoke it goes on.
SHORT_STEPS = 9
SHORT = "--smoke", f"--steps={SHORT_STEPS - 1}", "--lanes=4"


def counting(folder: Path, values: int) -> None:
    """The set `folder`: documents of 1 to 300 tokens, each counting upwards below `values`: something to learn."""
    folder.mkdir()
    rng = np.random.default_rng(5)

    def text(tokens: int) -> np.ndarray:
        pieces: list[np.ndarray] = []
        while sum(map(len, pieces)) < tokens:
            length, first = rng.integers(1, 300), rng.integers(0, values)
            pieces += [np.array([EOT]), (first + np.arange(length)) % values]
        return np.concatenate(pieces)[:tokens].astype(np.uint16)

    entries = []
    for split, number, tokens in (("train", 1, 40_000), ("train", 2, 40_000), ("val", 0, 3000)):
        entry = write_shard(folder / f"{folder.name}_{split}_{number:06}.bin", text(tokens))
        entries.append({**entry, "split": split})
    write_manifest(folder, folder.name, "gpt2", VOCAB, EOT, entries)


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data root with the set `tiny`, in whose documents nothing is repeated."""
    root = tmp_path_factory.mktemp("data")
    counting(root / "tiny", 500)
    return root


def environment(data: Path) -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith("SLURM_")}
    return {**kept, "DATA_ROOT": str(data), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def start(data: Path, out: Path, *flags: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "modded_nanogpt.train_gpt", *FLAGS, f"--out_dir={out}", *flags]
    return subprocess.Popen(
        command, env=environment(data), cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def run(data: Path, out: Path, *flags: str, timeout: float = 600) -> str:
    """What the command has printed."""
    process = start(data, out, *flags)
    said, errors = process.communicate(timeout=timeout)
    assert process.returncode == 0, (said, errors)
    return said


@pytest.fixture
def fork(zygote, data):
    """`fork(out, *flags)`: the children of a launch like `start`'s."""

    def begin(out: Path, *flags: str, ranks: int = 1, **variables: str) -> list:
        return launch(zygote, "train_gpt", [*FLAGS, f"--out_dir={out}", *flags], data, ranks, **variables)

    return begin


def records(out: Path, event: str) -> list[dict]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == event]


def losses(out: Path) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in records(out, "train")}


@pytest.fixture(scope="module")
def undisturbed(zygote, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing happens to."""
    out = tmp_path_factory.mktemp("runs") / "undisturbed"
    finished(launch(zygote, "train_gpt", [*FLAGS, f"--out_dir={out}"], data))
    return out


@pytest.fixture(scope="module")
def short(zygote, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run like `undisturbed` on fewer tokens."""
    out = tmp_path_factory.mktemp("runs") / "short"
    finished(launch(zygote, "train_gpt", [*FLAGS, f"--out_dir={out}", *SHORT], data))
    return out


def test_it_learns_and_leaves_evidence(undisturbed):
    found = losses(undisturbed)
    assert list(found) == list(range(STEPS))
    validations = [line["val_loss"] for line in records(undisturbed, "val")]
    assert validations[0] == pytest.approx(np.log(VOCAB), abs=0.01)
    assert validations[-1] < validations[0] - 1
    (end,) = records(undisturbed, "end")
    assert end["status"] == "finished" and end["val_tokens"] == 2048 and end["world_size"] == 1
    assert end["eligible"] is False and "the recipe tiny has no record" in end["ineligible"]
    assert end["train_ms"] == pytest.approx(
        sum(line["ms"] for line in records(undisturbed, "train")), rel=0.3
    )
    log = (undisturbed / "log.txt").read_text()
    assert "modded_nanogpt/model.py" in log and "not eligible for a record" in log
    assert (undisturbed / "source" / "modded_nanogpt" / "kernels" / "mlp.py").exists()


def test_killed_and_told_to_stop_it_resumes_exactly(data, fork, undisturbed, tmp_path):
    """SIGKILL after a checkpoint, SIGTERM later on: every loss equals the undisturbed run's.

    The first attempt is warmed up, which must change nothing; the last one is the command itself.
    """
    out = tmp_path / "run"
    (child,) = fork(out, "--save_interval=2", "--warmup=true")
    wait_for(lambda: (out / "checkpoints" / "step_00000002").exists() or child.status is not None)
    os.kill(child.pid, signal.SIGKILL)
    said, _ = finished([child], status=-signal.SIGKILL)
    assert "warm-up done" in said
    (child,) = fork(out, "--save_interval=2", "--auto_resume=true")
    wait_for(lambda: len(records(out, "resume")) == 1 or child.status is not None)
    os.kill(child.pid, signal.SIGTERM)
    said, _ = finished([child], status=75)
    assert "checkpoint saved; go on with" in said
    run(data, out, "--auto_resume=true")
    assert losses(out) == losses(undisturbed)
    assert [line["val_loss"] for line in records(out, "val")][-1] == records(undisturbed, "val")[-1][
        "val_loss"
    ]
    (end,) = [line for line in records(out, "end") if line["status"] == "finished"]
    assert any("resumed" in reason for reason in end["ineligible"])


def wait_for(condition, seconds: float = 600.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def test_two_ranks_train_the_same_lanes(fork, short, tmp_path):
    finished(fork(tmp_path / "two", *SHORT, ranks=2))
    alone, together = losses(short), losses(tmp_path / "two")
    assert list(together) == list(alone) == list(range(SHORT_STEPS))
    assert (
        max(abs(together[step] - alone[step]) for step in alone) < 1e-4
    )  # sums are rounded in another order
    difference = records(tmp_path / "two", "val")[-1]["val_loss"] - records(short, "val")[-1]["val_loss"]
    assert abs(difference) < 1e-4


def test_with_copies_it_resumes_exactly_and_two_ranks_agree(fork, tmp_path):
    """--copy_input, on texts that repeat: a killed run has the losses of one alone, two ranks nearly."""
    counting(tmp_path / "cycles", 40)
    same = f"--dataset={tmp_path}/cycles", "--copy_input=true", "--save_interval=2", "--keep_checkpoints=9"
    flags = (*same, *SHORT, "--lanes=2")  # which are long enough for the last bucket
    alone, killed, two = (tmp_path / name for name in ("alone", "killed", "two"))
    finished(fork(alone, *flags))
    learned = load_file(max((alone / "checkpoints").glob("step_*")) / "model.safetensors")
    assert learned["copy_scales"].shape == (31,) and learned["copy_scales"][[1, 30]].abs().min() > 0
    assert learned["copy_scales"][0] == 0 and learned["copy_embeds"][[0, 1, 30]].abs().min() > 0
    finished(fork(killed, *flags, "--warmup=true", KILLED_AT_SAVE="2"), status=-signal.SIGKILL)
    finished(fork(killed, *same, SHORT[1], "--auto_resume=true"))
    assert losses(killed) == losses(alone) and len(records(killed, "resume")) == 1
    finished(fork(two, *flags, ranks=2))
    assert max(abs(losses(two)[step] - loss) for step, loss in losses(alone).items()) < 1e-4


def test_a_run_is_replayed_from_its_log_alone(data, short, tmp_path):
    log = tmp_path / "log.txt"
    log.write_bytes((short / "log.txt").read_bytes())
    done = subprocess.run(
        [sys.executable, "-m", "tools", "repro", str(log), f"--out_dir={tmp_path / 'again'}"],
        env=environment(data), cwd=ROOT, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "again") == losses(short)


@pytest.mark.campaign
def test_a_run_that_leaves_out_its_table_starts_again(fork, tmp_path):
    """Its checkpoints would be worth nothing: none is saved but the last, with which nobody can sample."""
    out, flags = tmp_path / "run", ("--table_rows=2000016", "--save_interval=1", "--auto_resume=true")
    (child,) = fork(out, *flags)
    log = out / "metrics.jsonl"
    wait_for(lambda: (log.exists() and records(out, "start")) or child.status is not None)
    os.kill(child.pid, signal.SIGTERM)
    said, _ = finished([child], status=75)
    assert (
        "no checkpoint before the last one" in said and "nothing saved, since checkpoints leave out" in said
    )
    assert not (out / "checkpoints").exists() or not list((out / "checkpoints").iterdir())
    said, _ = finished(fork(out, *flags))
    assert "attempt 2: no checkpoint was saved; the run starts again from its seed" in said
    assert list(losses(out)) == list(range(STEPS)) and records(out, "end")[-1]["status"] == "finished"
    (last,) = (out / "checkpoints").glob("step_*")
    assert {path.name for path in last.glob("*.safetensors")} == {
        "model.safetensors",
        "optimizer.safetensors",
    }
    with pytest.raises(UserError, match=r"leaves out the table of 2,000,016 hashed n-grams"):
        sample.main([f"--out_dir={out}", "--device=cpu", "--start=a"])


@pytest.mark.gpu
def test_on_a_gpu_it_learns_as_on_a_cpu_and_stops_when_asked(data, undisturbed, tmp_path):
    """In bfloat16 and FP8, compiled and warmed up before the clock; other random weights than a CPU draws."""
    if not HAS_GPU:
        pytest.skip("no NVIDIA driver on this machine")
    flags = ("--device=cuda", "--warmup=true", f"--compile_cache={tmp_path}/caches")
    said = run(data, tmp_path / "gpu", *flags, timeout=900)
    assert "warm-up done" in said and "compiled: true" in said
    here, there = (
        [line["val_loss"] for line in records(out, "val")] for out in (tmp_path / "gpu", undisturbed)
    )
    assert here[0] == pytest.approx(np.log(VOCAB), abs=0.02)
    assert here[-1] == pytest.approx(there[-1], abs=0.5)
    out = tmp_path / "stopped"
    process = start(data, out, *flags, "--save_interval=2", "--steps=2000", "--data_passes=999")
    wait_for(lambda: any((out / "checkpoints").glob("step_*")) or process.poll() is not None, 600)
    process.send_signal(signal.SIGTERM)
    said, errors = process.communicate(timeout=600)
    assert process.returncode == 75, (said, errors)


def test_a_loss_that_is_no_number_stops_the_run(fork, tmp_path):
    _, errors = finished(fork(tmp_path / "nan", *SHORT, "--muon_lr=1e3", "--adam_lr=1e3"), status=70)
    assert errors.count("error: ") == 1 and "lower --muon_lr" in errors and "Traceback" not in errors


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--dataset=nothing"], "nothing"),
        (["--steps=100"], "tiny_train_000001.bin"),
        (["--eval_tokens=4096"], "--eval_tokens=4096"),
        (["--lanes=12"], "--lanes=12"),
        (["--fp8=force"], "--fp8=force"),
        (["--table_rows=17"], "--table_rows=64"),
        (["--attention=fa3"], "--attention=fa3"),
        pytest.param(["--device=cuda"], "--device=cuda", marks=pytest.mark.skipif(HAS_GPU, reason="has a GPU")),
        (["--xsaa=false"], "did you mean '--xsa'"),
        (["--half_rope=false"], "--key_offset=false"),
        (["--recipe=medium"], "--recipe=medium"),
        (["snapshot", "--copy_pointer=true"], "--recipe=snapshot has no place for it; --copy_pointer=false"),
        (["--overwrite=true", "--auto_resume=true"], "keep one"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line(data, tmp_path, monkeypatch, capsys, flags, said):
    argv = [*FLAGS, f"--out_dir={tmp_path}/bad", *flags]
    assert said in refused(train_gpt.main, argv, monkeypatch, capsys, data)
    assert not (tmp_path / "bad" / "config.json").exists()


@pytest.mark.parametrize("world", ["3", "16", "zero"])
def test_a_world_of_another_size_is_refused(data, tmp_path, monkeypatch, capsys, world):
    argv = [*FLAGS, f"--out_dir={tmp_path}/x"]
    line = refused(train_gpt.main, argv, monkeypatch, capsys, data, WORLD_SIZE=world)
    assert f"WORLD_SIZE={world}" in line.replace("'", "")


def test_without_a_gpu_the_real_tracks_say_what_to_do(data, tmp_path):
    if HAS_GPU:
        pytest.skip("this machine has an NVIDIA GPU")
    for script in ("train_gpt.py", "train_gpt_medium.py"):
        done = subprocess.run(
            [sys.executable, script, f"--out_dir={tmp_path / 'x'}"],
            env=environment(data), cwd=ROOT / "modded_nanogpt", capture_output=True, text=True, timeout=600,
        )  # fmt: skip
        assert done.returncode == 2 and "has no NVIDIA GPU" in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize("name", train_gpt.ALLOCATOR_VARIABLES)
def test_what_the_environment_says_of_gpu_memory_stays(monkeypatch, name):
    for variable in train_gpt.ALLOCATOR_VARIABLES:
        monkeypatch.setenv(variable, "")  # so that both are as before afterwards
        monkeypatch.delenv(variable)
    with monkeypatch.context() as given:
        given.setenv(name, "expandable_segments:False")
        train_gpt.choose_allocator()
        assert [os.environ.get(key) for key in train_gpt.ALLOCATOR_VARIABLES if key in os.environ] == [
            "expandable_segments:False"
        ]
    train_gpt.choose_allocator()
    wanted = None if Path("/dev/dxg").exists() else "expandable_segments:True"
    assert os.environ.get("PYTORCH_ALLOC_CONF") == wanted
