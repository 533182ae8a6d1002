"""A resumed run is the run that nobody disturbed: equal losses, equal bytes. One that could not be is refused."""

import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest

from nanogpt.common import checkpoint_names
from tests.faults import tiny
from tests.resume_kit import refused, snapshot

DROPOUT, ACCUMULATION = "--dropout=0.2", "--tokens_per_step=256"  # 4 micro-steps


def wait_for(condition, seconds: float = 30.0) -> None:
    """Return once `condition()` holds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)


def steps_done(folder: Path) -> int:
    """Lines of training in a run's metrics so far."""
    path = folder / "metrics.jsonl"
    return path.read_text().count('"train"') if path.exists() else 0


@pytest.fixture(scope="module")
def undisturbed(zygote, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory):
    """`undisturbed(*flags)`: the directory of a run from start to end, which all tests share."""
    folders: dict[tuple[str, ...], Path] = {}

    def run(*flags: str) -> Path:
        if flags not in folders:
            folder = tmp_path_factory.mktemp("undisturbed") / "run"
            done = zygote.run([*tiny.FLAGS, f"--data_root={tiny_data}", f"--out_dir={folder}", *flags])
            assert done.status == 0, done.stderr
            folders[flags] = folder
        return folders[flags]

    return run


def assert_same(folder: Path, reference: Path, steps: int = 20) -> None:
    """Equal losses at every step, equal validations, equal final weights and optimizer state."""
    assert sorted(tiny.losses(reference)) == list(range(steps))
    assert tiny.losses(folder) == tiny.losses(reference)
    assert tiny.val_losses(folder) == tiny.val_losses(reference)
    assert tiny.final_weights(folder, steps) == tiny.final_weights(reference, steps)


@pytest.mark.parametrize("flags", [(), (DROPOUT,), (ACCUMULATION,), (DROPOUT, ACCUMULATION, "--bias=true")])
def test_a_resume_is_exact(flags, trainer, undisturbed, tmp_path):
    stops = (1, 2, 10, 11, 19)  # before, at and after a validation
    reference = undisturbed(*flags)
    for stop in stops:  # max_iters may grow, so a stop is a shorter run that is then extended
        done = trainer(*flags, "--auto_resume=true", f"--max_iters={stop}")
        assert done.status == 0, done.stderr
    assert trainer(*flags, "--auto_resume=true").status == 0
    folder = tmp_path / "run"
    assert tiny.losses(folder) == tiny.losses(reference)
    assert tiny.final_weights(folder) == tiny.final_weights(reference)
    vals, expected = tiny.val_losses(folder), tiny.val_losses(reference)
    assert {step: vals[step] for step in expected} == expected
    assert tiny.events(folder)[-1]["attempt"] == len(stops) + 1


def test_a_clock_that_was_set_back_changes_nothing(trainer, undisturbed, tmp_path):
    """What is newest is told by its step, and durations by a clock that nobody sets."""
    reference, folder = undisturbed(DROPOUT), tmp_path / "run"
    assert trainer(DROPOUT, "--max_iters=12", "--save_interval=4").status == 0
    for age, path in enumerate(sorted(folder.rglob("*"))):
        os.utime(path, (2e9 - age, 2e9 - age))  # the year 2033, later steps before earlier ones
    done = trainer(DROPOUT, "--auto_resume=true", "--max_iters=20", "--save_interval=4")
    assert done.status == 0, done.stderr
    assert "resumed from step_00000012" in done.stdout
    assert tiny.losses(folder) == tiny.losses(reference)
    assert tiny.final_weights(folder) == tiny.final_weights(reference)
    assert all(event["ms"] >= 0 for event in tiny.events(folder, "train"))


@pytest.mark.campaign
def test_twenty_resumes_of_one_run(trainer, undisturbed, tmp_path):
    """Each makes one step: the file `stop` is there all the time."""
    reference, folder = undisturbed(DROPOUT), tmp_path / "run"
    folder.mkdir()
    (folder / "stop").touch()
    statuses = [trainer(DROPOUT, "--auto_resume=true").status for _ in range(20)]
    (folder / "stop").unlink()
    assert statuses == [75] * 20 and trainer(DROPOUT, "--auto_resume=true").status == 0
    assert tiny.losses(folder) == tiny.losses(reference)
    assert tiny.final_weights(folder) == tiny.final_weights(reference)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_saves_and_ends_with_75(number, trainer, zygote, undisturbed, tmp_path):
    flags = ("--max_iters=400", "--lr_decay_iters=400", "--eval_interval=100", DROPOUT)
    reference, folder = undisturbed(*flags), tmp_path / "run"
    child = trainer.start(*flags)
    wait_for(lambda: steps_done(folder) >= 3)
    os.kill(child.pid, number)
    os.kill(child.pid, number)  # under srun it comes twice
    assert child.wait() == 75, child.stderr
    assert child.stderr == ""
    end = tiny.events(folder)[-1]
    assert (end["event"], end["status"]) == ("end", "interrupted")
    assert end["step"] < 400
    assert checkpoint_names.steps(folder / "checkpoints")[-1] == end["step"]
    assert signal.Signals(number).name in child.stdout
    bare = ["--init_from=resume", f"--out_dir={folder}"]  # all else is remembered
    assert zygote.run(bare, cwd=tmp_path).status == 0
    assert_same(folder, reference, 400)


def test_the_stop_file(trainer, undisturbed, tmp_path):
    reference, folder = undisturbed(), tmp_path / "run"
    folder.mkdir()
    (folder / "stop").touch()  # a launcher's cancel may come before the run
    done = trainer("--auto_resume=true")
    assert done.status == 75
    end = tiny.events(folder)[-1]
    assert (end["status"], end["step"]) == ("stopped", 1)
    assert f"rm {folder}/stop" in done.stdout
    (folder / "stop").unlink()
    assert trainer("--auto_resume=true").status == 0
    assert_same(folder, reference)


def test_a_stop_at_a_validation_leaves_it_to_the_resume(trainer, undisturbed, tmp_path):
    """The grace before a kill may be shorter than a validation."""
    reference, folder = undisturbed("--eval_interval=1"), tmp_path / "run"
    folder.mkdir()
    (folder / "stop").touch()
    assert trainer("--eval_interval=1").status == 75
    assert sorted(tiny.val_losses(folder)) == [0]
    (folder / "stop").unlink()
    assert trainer("--auto_resume=true", "--eval_interval=1").status == 0
    assert_same(folder, reference)


def test_auto_resume_starts_goes_on_and_finishes(trainer, tmp_path):
    first = trainer("--auto_resume=true", "--max_iters=5")
    again = trainer("--auto_resume=true", "--max_iters=5")  # nothing is left to do
    assert "finished, val loss" in again.stdout
    more = trainer("--auto_resume=true")
    assert [first.status, again.status, more.status] == [0, 0, 0]
    folder = tmp_path / "run"
    assert sorted(tiny.losses(folder)) == list(range(20))
    assert [
        event["event"] for event in tiny.events(folder) if event["event"] in ("start", "resume", "end")
    ] == (["start", "end", "resume", "end"])
    attempts = json.loads((folder / "environment.json").read_text())["attempts"]
    assert [attempt["world_size"] for attempt in attempts] == [1, 1]


def test_checkpoints_are_pruned_and_the_best_is_kept(trainer, tmp_path):
    """With a rising learning rate the loss turns up after a while: the best checkpoint is not among the newest."""
    flags = ("--warmup_iters=20", "--learning_rate=2", "--eval_interval=2", "--keep_checkpoints=2")
    assert trainer(*flags).status == 0
    folder = tmp_path / "run"
    vals = tiny.val_losses(folder)
    best = min((step for step in vals if step), key=lambda step: (vals[step], step))
    assert vals[best] < vals[0], "the test wants a run that gets better before it gets worse"
    assert best not in (18, 20), "likewise"
    assert checkpoint_names.steps(folder / "checkpoints") == [best, 18, 20]


def test_only_improvements_are_saved_when_asked(trainer, tmp_path):
    flags = ("--warmup_iters=20", "--learning_rate=2", "--eval_interval=2", "--always_save_checkpoint=false",
             "--keep_checkpoints=100")  # fmt: skip
    assert trainer(*flags).status == 0
    vals, best, expected = tiny.val_losses(tmp_path / "run"), float("inf"), set()
    for step in sorted(vals):
        if vals[step] < best:
            best = vals[step]
            expected |= {step} - {0}
    assert set(checkpoint_names.steps(tmp_path / "run" / "checkpoints")) == expected | {20}


def test_save_minutes(trainer, tmp_path):
    assert trainer("--save_minutes=0.00001", "--keep_checkpoints=100", "--max_iters=5").status == 0
    assert checkpoint_names.steps(tmp_path / "run" / "checkpoints") == [1, 2, 3, 4, 5]


def test_the_same_command_goes_on_and_then_says_that_it_is_finished(trainer, undisturbed, tmp_path):
    reference, folder = undisturbed(), tmp_path / "run"
    folder.mkdir()
    (folder / "stop").touch()
    assert trainer().status == 75
    (folder / "stop").unlink()
    assert trainer().status == 0
    assert_same(folder, reference)
    before = snapshot(folder)
    done = trainer()
    assert done.status == 0 and "finished, val loss" in done.stdout and "--overwrite=true" in done.stdout
    assert "attempt" not in done.stdout and snapshot(folder) == before
    refused(
        trainer("--dropout=0.1", "--seed=5"),
        "--dropout=0.1, was 0.0",
        "--seed=5, was 1337",
        "another --out_dir",
    )
    refused(trainer("--max_iters=30"), "--max_iters=30, was 20", "--init_from=resume")
    assert snapshot(folder) == before


@pytest.mark.parametrize("rank", ["0", "1"])
def test_every_rank_knows_that_a_run_is_finished(rank, trainer, tmp_path, monkeypatch):
    """Rank 0 opens nothing then, so the others must not wait for it."""
    assert trainer("--max_iters=2").status == 0
    done = trainer("--max_iters=2", env={"RANK": rank, "WORLD_SIZE": "2"})
    assert done.status == 0 and done.stderr == "" and (done.stdout == "") == (rank == "1")


def test_resume_without_a_sound_checkpoint(trainer, tmp_path):
    assert trainer("--max_iters=2").status == 0
    (tmp_path / "run/checkpoints/step_00000002/model.safetensors").write_bytes(b"")
    refused(trainer("--init_from=resume"), "no sound checkpoint", "--auto_resume=true")
    assert (tmp_path / "run/checkpoints/quarantine/step_00000002.0").is_dir()
    refused(trainer("--init_from=resume"), "no checkpoint")
    assert trainer("--auto_resume=true").status == 0  # from the beginning, and equal
    assert sorted(tiny.losses(tmp_path / "run")) == list(range(20))


def test_weights_alone_are_no_checkpoint_to_resume_from(trainer, tmp_path):
    assert trainer("--max_iters=2").status == 0
    from nanogpt.common import checkpoints

    path = tmp_path / "run/checkpoints/step_00000002"
    loaded = checkpoints.load(path)
    weights = loaded.tensors("model")
    shutil.rmtree(path)
    state = {key: value for key, value in loaded.state.items() if key != "step"}
    checkpoints.save(path.parent, 2, {"model": weights}, state)
    refused(trainer("--init_from=resume"), str(path), "without the optimizer's state", "--overwrite=true")


def test_overwrite_moves_the_old_run_aside(trainer, tmp_path):
    assert trainer("--max_iters=2").status == 0
    before = snapshot(tmp_path / "run")
    refused(trainer("--max_iters=3"), "holds a run already", "--overwrite=true")
    assert snapshot(tmp_path / "run") == before
    assert trainer("--max_iters=3", "--overwrite=true").status == 0
    assert snapshot(tmp_path / "run.1") == before
    assert sorted(tiny.losses(tmp_path / "run")) == [0, 1, 2]


@pytest.mark.parametrize("after", ["source", "log.txt", "environment.json"])
def test_a_start_that_was_killed_is_started_again(after, trainer, tmp_path):
    """config.json is written last: without it there is no run yet, and what is there is moved away."""
    assert trainer("--max_iters=2").status == 0
    folder = tmp_path / "run"
    for name in ("config.json", "checkpoints", "metrics.jsonl", "environment.json", "log.txt"):
        path = folder / name
        if name == after:
            break
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    (folder / "job.json").write_text("{}")  # a launcher's
    assert trainer("--auto_resume=true", "--max_iters=3").status == 0
    assert (folder / "job.json").exists()
    assert (tmp_path / "run.1" / after).exists()
    assert sorted(tiny.losses(folder)) == [0, 1, 2]


def test_a_last_validation_that_breaks_costs_no_training(zygote, trainer, undisturbed, tiny_data, tmp_path):
    reference = undisturbed("--eval_interval=20")
    argv = [*tiny.FLAGS, "--eval_interval=20", f"--data_root={tiny_data}", f"--out_dir={tmp_path}/run"]
    broken = zygote.run(argv, module="tests.faults.broken_validation", cwd=tmp_path)
    assert broken.status == 1 and "MemoryError" in broken.stderr
    assert "step 20: the validation broke; the checkpoint of this step is saved" in broken.stdout
    assert trainer("--eval_interval=20").status == 0
    assert_same(tmp_path / "run", reference)


def test_a_resume_begins_on_a_line_of_its_own(trainer, undisturbed, tmp_path):
    """Case J2: a full disk or a lost node leaves half a line at the end of what is appended to."""
    reference, folder = undisturbed(), tmp_path / "run"
    assert trainer("--max_iters=10").status == 0
    with (folder / "metrics.jsonl").open("a") as metrics, (folder / "log.txt").open("a") as log:
        metrics.write('{"event": "train", "step": 10, "lo')
        log.write("step 10/20: lo")
    done = trainer("--auto_resume=true")
    assert done.status == 0, done.stderr
    assert_same(folder, reference)  # every line is JSON
    assert "\nstep 10/20: lo\n" in (folder / "log.txt").read_text()


# ---- two attempts at once


def test_a_live_run_is_left_alone(trainer, tmp_path):
    child = trainer.start("--max_iters=100000", "--log_interval=1000", "--save_minutes=0")
    wait_for(lambda: steps_done(tmp_path / "run") >= 1)
    for flags in (["--auto_resume=true"], ["--init_from=resume"], ["--overwrite=true"], []):
        refused(trainer(*flags), f"process {child.pid} of this machine")
    os.kill(child.pid, signal.SIGTERM)
    assert child.wait() == 75


@pytest.mark.parametrize("flags", [(), ("--auto_resume=true",), ("--overwrite=true",)])
def test_two_starts_at_once_are_one_run(flags, trainer, undisturbed, tmp_path):
    reference = undisturbed("--max_iters=200", "--lr_decay_iters=200")
    children = [trainer.start("--max_iters=200", "--lr_decay_iters=200", *flags) for _ in range(4)]
    statuses = sorted(child.wait() for child in children)
    assert statuses == [0, 2, 2, 2], [child.stderr for child in children]
    assert_same(tmp_path / "run", reference, 200)
    assert [path.name for path in tmp_path.glob("run*")] == ["run"]


@pytest.mark.skipif(os.geteuid() != 0, reason="a second host name needs root (unshare --uts)")
def test_the_ghost_of_a_lost_node_is_fenced(trainer, undisturbed, tmp_path):
    """The first attempt is stopped as a lost node's would be, another host takes over, the first wakes up again."""
    flags = ("--max_iters=400", "--lr_decay_iters=400", "--save_interval=50")
    reference, folder = undisturbed(*flags), tmp_path / "run"
    ghost = trainer.start(*flags)
    wait_for(lambda: steps_done(folder) >= 60)
    os.kill(ghost.pid, signal.SIGSTOP)
    done = trainer(*flags, "--auto_resume=true", module="tests.faults.another_node")
    assert done.status == 0, done.stderr
    before = snapshot(folder)
    os.kill(ghost.pid, signal.SIGCONT)
    assert ghost.wait() == 76
    assert ghost.stderr.startswith("error: ")
    assert "attempt 2 on another-node has taken over" in ghost.stderr
    assert ghost.stderr.count("\n") == 1
    assert snapshot(folder) == before
    assert_same(folder, reference, 400)


# ---- numbers that are not finite


def test_a_loss_that_is_not_finite_stops_before_the_update(trainer, tmp_path):
    folder = tmp_path / "run"
    wild = ("--learning_rate=1000", "--min_lr=0", "--grad_clip=0", "--warmup_iters=0", "--eval_interval=1000",
            "--save_interval=1")  # fmt: skip
    done = trainer(*wild)
    assert done.status == 70
    assert done.stderr.startswith(f"error: {folder}: step ")
    assert done.stderr.count("\n") == 1
    step = int(done.stderr.split("step ")[1].split(":")[0])
    last = checkpoint_names.steps(folder / "checkpoints")[-1]
    assert f"checkpoint of step {last} stays" in done.stderr
    assert last == step  # its weights are those before the step that went wrong
    import torch

    from nanogpt.common import checkpoints

    assert checkpoints.problem(folder / "checkpoints" / f"step_{last:08d}") == ""
    weights = checkpoints.load(folder / "checkpoints" / f"step_{last:08d}").tensors("model")
    assert all(torch.isfinite(tensor).all() for tensor in weights.values())
    again = trainer("--auto_resume=true", *wild)  # the same end, nothing lost
    assert again.status == 70
    assert checkpoint_names.steps(folder / "checkpoints")[-1] == last


def test_a_validation_that_is_not_finite_saves_nothing(trainer, tmp_path):
    """Weights large enough to overflow the validation's loss are not the run's next checkpoint."""
    assert trainer("--max_iters=2").status == 0
    import torch

    from nanogpt.common import checkpoints

    good = tmp_path / "run/checkpoints/step_00000002"
    loaded = checkpoints.load(good)
    parts = {part: loaded.tensors(part) for part in ("model", "optimizer")}
    parts["model"]["transformer.wte.weight"][0, 0] = torch.inf
    state = {key: value for key, value in loaded.state.items() if key != "step"}
    shutil.rmtree(good)
    checkpoints.save(good.parent, 2, parts, {**state, "val_step": -1})
    done = trainer("--auto_resume=true", "--eval_interval=2")
    assert done.status == 70
    assert "step 2: validation loss" in done.stderr
    assert checkpoint_names.steps(good.parent) == [2]
    assert "val" not in [event["event"] for event in tiny.events(tmp_path / "run")[-1:]]
