"""Several ranks on CPUs (gloo): equal losses whatever their number, resumes from one number to another, deaths.

Most launches fork their ranks (tests/faults/zygote.py) with the variables that torchrun sets; some are real torchruns.
"""

import json
import os
import re
import signal
import time
from pathlib import Path

import pytest

from nanogpt.common import checkpoint_names, checkpoints
from tests.faults import tiny
from tests.faults.ranks import TOKENS, launch

ROOT = Path(__file__).resolve().parents[1]
DROPOUT = "--dropout=0.2"
CLOSE = 1e-5  # relative: sums of float32 in another order


@pytest.fixture
def ranks(zygote, tiny_data, tmp_path):
    """`ranks(n, *flags)`: fork n ranks of one launch; the children, rank 0 first."""
    children = []

    def start(world: int, *flags: str, **options: str):
        started = launch(zygote, tiny_data, tmp_path, world, *flags, **options)
        children.extend(started)
        return started

    yield start
    for child in children:
        if child.status is None:
            os.kill(child.pid, signal.SIGKILL)
            child.wait()


@pytest.fixture(scope="module")
def undisturbed(zygote, tiny_data, tmp_path_factory):
    """`undisturbed(world, *flags)`: the directory of a run of 20 steps on so many ranks, which all tests share."""
    folder, made = tmp_path_factory.mktemp("undisturbed"), {}

    def run(world: int, *flags: str) -> Path:
        if (world, flags) not in made:
            out = f"run{len(made)}"
            children = launch(zygote, tiny_data, folder, world, *flags, out=out)
            assert statuses(children) == [0] * world, stderr_of(children)
            assert [child.stdout for child in children[1:]] == [""] * (world - 1)
            made[world, flags] = folder / out
        return made[world, flags]

    return run


def statuses(children) -> list[int]:
    """Of all ranks, when they have ended."""
    return [child.wait() for child in children]


def assert_close(found: dict[int, float], expected: dict[int, float]) -> None:
    """The same steps, and losses equal to CLOSE."""
    assert found.keys() == expected.keys()
    for step, loss in expected.items():
        assert found[step] == pytest.approx(loss, rel=CLOSE), f"step {step}"


def stderr_of(children) -> str:
    return "".join(child.stderr for child in children)


@pytest.mark.parametrize(("flags", "worlds"), [((), (2,)), ((DROPOUT,), (2, 4))])
def test_the_number_of_ranks_does_not_change_the_losses(flags, worlds, undisturbed):
    one = undisturbed(1, *flags)
    assert sorted(tiny.losses(one)) == list(range(20))
    for world in worlds:
        several = undisturbed(world, *flags)
        assert_close(tiny.losses(several), tiny.losses(one))
        assert_close(tiny.val_losses(several), tiny.val_losses(one))
        plan = json.loads((several / "config.json").read_text())["plan"]
        assert (plan["world_size"], plan["micro_steps"]) == (world, 8 // world)


def test_a_validation_is_the_same_for_any_number_of_ranks(ranks, tmp_path):
    """Equal weights, sums in float64: equal to the last digits, though 35 blocks do not divide by anything."""
    for world in (1, 2, 4):
        children = ranks(world, "--eval_only", "--eval_tokens=560", out=f"run{world}")
        assert statuses(children) == [0] * world, stderr_of(children)
    found = [tiny.val_losses(tmp_path / f"run{world}")[0] for world in (1, 2, 4)]
    assert found == pytest.approx([found[0]] * 3, rel=1e-12)


def test_resumes_from_one_number_of_ranks_to_another(ranks, undisturbed, tmp_path):
    flags = (DROPOUT, "--auto_resume=true")
    for world, steps in ((1, 5), (2, 10), (4, 15), (1, 20)):
        children = ranks(world, *flags, f"--max_iters={steps}")
        assert statuses(children) == [0] * world, stderr_of(children)
    assert_close(tiny.losses(tmp_path / "run"), tiny.losses(undisturbed(1, DROPOUT)))
    resumes = tiny.events(tmp_path / "run", "resume")
    assert [event["world_size"] for event in resumes] == [2, 4, 1]


@pytest.mark.parametrize("world", [2, 4])
def test_a_resume_with_the_same_ranks_is_exact(world, ranks, undisturbed, tmp_path):
    """Bit for bit: the ranks' gradients are added in the same order before and after."""
    flags, reference = (DROPOUT, "--auto_resume=true"), undisturbed(world, DROPOUT)
    for steps in (7, 8, 20):
        assert statuses(ranks(world, *flags, f"--max_iters={steps}")) == [0] * world
    assert tiny.losses(tmp_path / "run") == tiny.losses(reference)
    assert tiny.final_weights(tmp_path / "run") == tiny.final_weights(reference)


def wait_for_step(folder: Path, step: int, children) -> None:
    """Return when the run has logged that step."""
    end = time.monotonic() + 600
    while not (folder / "metrics.jsonl").exists() or len(tiny_lines(folder)) <= step:
        assert time.monotonic() < end
        assert all(child.status is None for child in children), stderr_of(children)
        time.sleep(0.01)


def tiny_lines(folder: Path) -> list[str]:
    return [line for line in (folder / "metrics.jsonl").read_text().splitlines() if '"train"' in line]


LONG = (
    "--max_iters=4000",
    "--lr_decay_iters=4000",
    "--eval_interval=4000",
    "--auto_resume=true",
    "--save_interval=5",
)


@pytest.mark.parametrize("told", [0, 1])
def test_one_rank_that_is_asked_to_stop_stops_all(told, ranks, tmp_path):
    children = ranks(2, *LONG)
    wait_for_step(tmp_path / "run", 3, children)
    os.kill(children[told].pid, signal.SIGTERM)
    assert statuses(children) == [75, 75], stderr_of(children)
    step = tiny.events(tmp_path / "run", "end")[0]["step"]
    assert checkpoint_names.steps(tmp_path / "run/checkpoints")[-1] == step
    assert statuses(ranks(1, *LONG, f"--max_iters={step + 2}")) == [0]


@pytest.mark.parametrize("dead", [0, 1])
def test_the_death_of_a_rank_loses_nothing_saved(dead, ranks, tmp_path):
    children = ranks(2, *LONG)
    wait_for_step(tmp_path / "run", 12, children)
    os.kill(children[dead].pid, signal.SIGKILL)
    other = children[1 - dead]
    assert other.wait() != 0  # gloo notices; with NCCL torchrun ends it
    step = checkpoint_names.steps(tmp_path / "run/checkpoints")[-1]
    assert step >= 5
    assert checkpoints.problem(tmp_path / f"run/checkpoints/{checkpoint_names.name_of(step)}") == ""
    assert statuses(ranks(2, *LONG, f"--max_iters={step + 2}")) == [0, 0]
    assert sorted(tiny.losses(tmp_path / "run"))[-1] >= step + 1


def test_a_loss_that_is_not_finite_is_said_once(ranks, tmp_path):
    wild = ("--learning_rate=1000", "--min_lr=0", "--grad_clip=0", "--warmup_iters=0")
    children = ranks(2, *wild)
    assert statuses(children) == [70, 70]
    assert stderr_of(children).count("error: ") == 1


def test_the_rank_whose_numbers_are_not_finite_is_named(ranks, tmp_path):
    """Its NaN is in the average that every rank has; what each had before says whose it was."""
    children = ranks(2, module="tests.faults.one_bad_rank")
    assert statuses(children) == [70, 70]
    said = stderr_of(children)
    assert (
        "step 12: loss " in said and "gradient norm nan on rank 1 of 2: stopped before the update" in said
    ), said
    assert "the checkpoint of step 10 stays" in said
    assert checkpoint_names.steps(tmp_path / "run/checkpoints") == [10]


def test_ranks_in_words():
    from nanogpt.setup import on_ranks

    said = [on_ranks(bad) for bad in ([1.0], [0.0, 0.0], [1.0, 1.0], [0.0, 1.0, 0.0], [1.0, 0.0, 1.0])]
    assert said == ["", "", " on all 2 ranks", " on rank 1 of 3", " on ranks 0, 2 of 3"]


def test_a_damaged_shard_is_said_once_by_the_rank_that_read_it(ranks, tmp_path):
    """Large sets are checked by all ranks together, after the run directory was made."""
    folder = tiny.make_data(tmp_path / "data")
    path = folder / "tiny_val_000000.bin"  # the second file: rank 1 reads it
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    children = ranks(2, f"--data_root={tmp_path}/data", module="tests.faults.large_set")
    assert statuses(children) == [2, 2], stderr_of(children)
    assert stderr_of(children).count("error: ") == 1
    assert "tiny_val_000000.bin" in children[1].stderr
    assert (tmp_path / "run/config.json").exists()


# ---- the real torchrun


@pytest.fixture
def torchrun(zygote, tiny_data):
    """`torchrun(world, words, *flags)`: `torchrun --standalone` as the README has it; its ranks are real processes."""

    def run(world: int, words: list[str], *flags: str, cwd: Path = ROOT):
        argv = ["--standalone", f"--nproc_per_node={world}", *words, *tiny.FLAGS, f"--data_root={tiny_data}"]
        return zygote.run([*argv, *flags], module="torch.distributed.run", cwd=cwd, env={"PYTHONPATH": ""})

    return run


def test_torchrun_from_the_folder(torchrun, ranks, tmp_path):
    """Two ranks that execute the run's copy, with the losses of the forked ranks."""
    preset = tmp_path / "mine.py"
    preset.write_text("max_iters = 6\nseed = 1337\n")
    flags = (TOKENS, "--max_iters=6", f"--out_dir={tmp_path}/folder")
    folder = torchrun(2, ["train.py", str(preset)], *flags, cwd=ROOT / "nanogpt")
    assert folder.status == 0, folder.stderr
    assert statuses(ranks(2, "--max_iters=6")) == [0, 0]
    assert tiny.losses(tmp_path / "folder") == tiny.losses(tmp_path / "run")


def test_torchrun_from_the_root_with_ranks_that_do_not_divide_says_so_once(torchrun, tmp_path):
    done = torchrun(3, ["-m", "nanogpt.train"], "--tokens_per_step=256", f"--out_dir={tmp_path}/run")
    assert done.status != 0
    lines = [line for line in done.stderr.splitlines() if re.match(r"(\[rank\d\]: *)?error:", line)]
    assert len(lines) == 1, done.stderr
    assert "192 or 384 would" in lines[0]
    assert re.search(r"exitcode +: 2", done.stderr)
    assert list(tmp_path.iterdir()) == []
