"""The medium track's trainer end to end in a size for CPUs: it learns, is stopped and goes on."""

import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.modded.test_train_gpt import ROOT, VOCAB, environment, losses, records, wait_for
from tests.modded.test_train_gpt import data as data  # a fixture

pytestmark = pytest.mark.campaign  # minutes of compiling; tests/docs runs its --smoke in every run
STEPS = 13
FLAGS = (
    "--recipe=tiny_medium", "--dataset=tiny", f"--vocab_size={VOCAB}", f"--steps={STEPS - 1}", "--extension_steps=1",
    "--eval_interval=13", "--eval_tokens=2048", "--eval_slice=1024", "--num_threads=1",
    "--device=cpu",
)  # fmt: skip


def start(data: Path, out: Path, *flags: str, ranks: int = 1) -> subprocess.Popen:
    torchrun = (
        ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []
    )
    return subprocess.Popen(
        [sys.executable, *torchrun, "train_gpt_medium.py", *FLAGS, f"--out_dir={out}", *flags],
        env=environment(data), cwd=ROOT / "modded_nanogpt", text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def finish(process: subprocess.Popen, status: int = 0) -> str:
    said, errors = process.communicate(timeout=600)
    assert process.returncode == status, (said, errors)
    return said


@pytest.fixture(scope="module")
def undisturbed(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("medium") / "undisturbed"
    said = finish(start(data, out))
    assert "warm-up done" in said and "unlike the record" in said
    return out


def test_it_learns(undisturbed):
    assert list(losses(undisturbed)) == list(range(STEPS))
    validations = [line["val_loss"] for line in records(undisturbed, "val")]
    assert validations[0] == pytest.approx(np.log(VOCAB), abs=0.01)
    assert validations[-1] < validations[0] - 1
    (end,) = records(undisturbed, "end")
    assert end["status"] == "finished" and "the recipe tiny_medium has no record" in end["ineligible"]


def test_stopped_on_one_rank_it_goes_on_on_two(data, undisturbed, tmp_path):
    """A step of Adam's still to come, and banks of three and of one matrix to be shared by two ranks."""
    out = tmp_path / "run"
    process = start(data, out, "--save_interval=3", "--warmup=false")
    wait_for(lambda: process.poll() is not None or any((out / "checkpoints").glob("step_*")))
    process.send_signal(signal.SIGTERM)
    finish(process, status=75)
    finish(start(data, out, "--auto_resume=true", "--warmup=false", ranks=2))
    expected, found = losses(undisturbed), losses(out)
    assert list(found) == list(expected)
    assert (
        max(abs(found[step] - expected[step]) for step in found) < 1e-3
    )  # sums are rounded in another order
