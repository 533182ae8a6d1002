"""A checkpoint is whole or not there: format, damage, the right choice among several, disks that refuse."""

import errno
import itertools
import random
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from nanogpt.common import checkpoint_names, checkpoints
from nanogpt.common.errors import FencedError, StorageError
from tests.faults import tiny
from tests.faults.disks import remount, small_disk
from tests.faults.shim import fault

ROOT = Path(__file__).resolve().parents[1]
FILES = ("manifest.json", "manifest.sha256", "model.safetensors", "optimizer.safetensors", "state.json")


def parts(seed: int = 0) -> dict[str, dict[str, torch.Tensor]]:
    """Tensors of every kind a checkpoint holds, and some odd ones."""
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(6, 5, generator=generator)
    model = {"matrix": matrix, "half": matrix.bfloat16(), "turned": matrix.T, "empty": torch.empty(0, 3)}
    optimizer = {
        "matrix/step": torch.tensor(7.0),
        "ids": torch.arange(5) + seed,
        "bytes": torch.arange(5).to(torch.uint8),
    }
    return {"model": model, "optimizer": optimizer}


def save(folder: Path, step: int) -> Path:
    """A sound checkpoint of a step."""
    return checkpoints.save(folder, step, parts(step), {"note": "text", "best_val": None})


def test_a_round_trip_and_the_names(tmp_path):
    path = save(tmp_path / "checkpoints", 250)
    assert path.name == "step_00000250"
    assert sorted(file.name for file in path.iterdir()) == sorted(FILES)
    said = []
    found = checkpoints.load_latest(path.parent, said.append)
    assert (found.path, found.step, said) == (path, 250, [])
    assert found.state == {"step": 250, "note": "text", "best_val": None}
    for part, tensors in parts(250).items():
        loaded = found.tensors(part)
        assert loaded.keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert loaded[name].dtype == tensor.dtype
            assert torch.equal(loaded[name], tensor)
    assert found.tensors("nothing") == {}


def test_the_safetensors_library_reads_and_agrees(tmp_path):
    path = save(tmp_path, 1)
    with safe_open(path / "model.safetensors", "pt") as file:
        assert set(file.keys()) == set(parts()["model"])
        assert file.get_slice("matrix").get_shape() == [6, 5]
    assert torch.equal(load_file(path / "optimizer.safetensors")["ids"], torch.arange(5) + 1)


def test_equal_tensors_are_equal_bytes(tmp_path):
    first, second = save(tmp_path / "a", 3), save(tmp_path / "b", 3)
    assert [(first / name).read_bytes() for name in FILES] == [(second / name).read_bytes() for name in FILES]


def test_nothing_is_a_pickle(tmp_path):
    for file in save(tmp_path, 1).iterdir():
        assert not file.read_bytes().startswith((b"\x80", b"PK"))


@pytest.mark.parametrize("number", range(40))
def test_the_newest_whole_one_is_chosen(number, tmp_path):
    """Any files of any of three checkpoints are missing: the newest with none missing is used, the others set aside."""
    rng = random.Random(number)
    hurt = {
        step: [name for name in FILES if rng.random() < rng.choice((0, 0, 0.2, 0.9))] for step in (10, 20, 30)
    }
    for step, names in hurt.items():
        path = save(tmp_path, step)
        for name in names:
            (path / name).unlink()
    whole = [step for step, names in hurt.items() if not names]
    said = []
    found = checkpoints.load_latest(tmp_path, said.append)
    assert (found.step if found else None) == max(whole, default=None)
    bad = [step for step in (30, 20, 10) if step > max(whole, default=0)]
    assert [line.split()[1] for line in said] == [checkpoint_names.name_of(step) for step in bad]
    assert all("is missing" in line for line in said)
    assert checkpoint_names.steps(tmp_path) == [step for step in (10, 20, 30) if step not in bad]
    if bad:
        kept = sorted(path.name for path in (tmp_path / "quarantine").iterdir())
        assert kept == sorted(f"{checkpoint_names.name_of(step)}.0" for step in bad)


@pytest.mark.parametrize("kind", ["dangling", "loop"])
def test_a_link_to_nothing_in_the_place_of_a_checkpoint_is_passed_over(kind, tmp_path):
    save(tmp_path, 20)
    link = tmp_path / checkpoint_names.name_of(30)
    link.symlink_to(link if kind == "loop" else tmp_path / "nowhere")
    said = []
    assert checkpoints.load_latest(tmp_path, said.append).step == 20 and said == []


@pytest.mark.parametrize("name", FILES)
def test_files_of_another_checkpoint(name, tmp_path):
    """Sound by itself, but not in this checkpoint."""
    path, other = save(tmp_path, 10), save(tmp_path / "other", 20)
    shutil.copy(other / name, path / name)
    assert checkpoints.problem(path)


def test_a_whole_checkpoint_under_another_name(tmp_path):
    save(tmp_path, 10).rename(tmp_path / "step_00000020")
    assert "another checkpoint" in checkpoints.problem(tmp_path / "step_00000020")


def test_quarantine_keeps_every_one(tmp_path):
    for number in range(3):
        path = save(tmp_path, 5)
        (path / "state.json").write_text("{}")
        assert checkpoints.load_latest(tmp_path, lambda line: None) is None
        assert (tmp_path / f"quarantine/step_00000005.{number}").is_dir()


def test_leftovers_go_and_nothing_else(tmp_path):
    sound = save(tmp_path, 5)
    for name in (".step_00000006.host.12.tmp", ".trash_step_00000004.99"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(b"half")
    (tmp_path / "notes.txt").write_text("mine")
    checkpoint_names.remove_leftovers(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes.txt", sound.name]


@pytest.mark.parametrize(("keep", "also"), list(itertools.product((1, 2, 9), ((), (10,), (10, 30)))))
def test_prune(keep, also, tmp_path):
    every = [10, 20, 30, 40]
    for step in every:
        save(tmp_path, step)
    checkpoints.prune(tmp_path, keep, set(also))
    assert checkpoint_names.steps(tmp_path) == sorted({*every[-keep:], *also})
    assert not list(tmp_path.glob(".*"))


def test_an_unsound_one_is_replaced_by_a_save_of_its_step(tmp_path):
    path = save(tmp_path, 10)
    (path / "model.safetensors").write_bytes(b"")
    save(tmp_path, 10)
    assert checkpoints.problem(path) == ""
    assert (tmp_path / "quarantine/step_00000010.0").is_dir()


def test_a_save_that_is_called_off_leaves_nothing(tmp_path):
    def fence() -> None:
        raise FencedError("another attempt")

    save(tmp_path, 10)
    with pytest.raises(FencedError):
        checkpoints.save(tmp_path, 20, parts(), {}, before_publish=fence)
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000010"]


@pytest.mark.parametrize("fenced", [True, False])
def test_a_save_that_is_taken_away_says_who_did_it(tmp_path, fenced):
    """Stopped in the middle of a save, an attempt wakes up: the next one has removed what it was writing."""

    class Interrupted(dict):
        def items(self):
            yield "model", parts()["model"]
            (unfinished,) = (path for path in tmp_path.iterdir() if path.name.endswith(".tmp"))
            shutil.rmtree(unfinished)
            yield "optimizer", parts()["model"]

    def fence() -> None:
        if fenced:
            raise FencedError("attempt 2 has taken over")

    with pytest.raises(FencedError if fenced else StorageError):
        checkpoints.save(tmp_path, 20, Interrupted(), {}, before_publish=fence)
    assert not list(tmp_path.iterdir())


# ---- disks that refuse


def big(megabytes: float) -> dict[str, dict[str, torch.Tensor]]:
    """One tensor of that size."""
    return {"model": {"weights": torch.zeros(int(megabytes * 2**18))}}


def test_a_full_disk_keeps_what_is_there(tmp_path):
    with small_disk(tmp_path / "disk", "3m") as disk:
        checkpoints.save(disk, 10, big(2), {})
        with pytest.raises(
            StorageError, match=r"step_00000020: cannot be written: the disk is full"
        ) as caught:
            checkpoints.save(disk, 20, big(2), {})
        assert caught.value.exit_code == 74
        assert [path.name for path in disk.iterdir()] == ["step_00000010"]
        assert checkpoints.problem(disk / "step_00000010") == ""


@pytest.mark.parametrize(("best", "left"), [(None, [20, 30]), (20, [20, 30]), (10, [10, 30])])
def test_the_oldest_spare_makes_room(best, left, tmp_path):
    with small_disk(tmp_path / "disk", "5m") as disk:
        for step in (10, 20):
            checkpoints.save(disk, step, big(2), {})

        def save_once() -> Path:
            return checkpoints.save(disk, 30, big(2), {})

        if best == 10:  # the best and the newest stay: nothing can go
            with pytest.raises(StorageError, match="full"):
                checkpoints.save_or_make_room(disk, best, save_once)
            left = [10, 20]
        else:
            checkpoints.save_or_make_room(disk, best, save_once)
        assert checkpoint_names.steps(disk) == left
        assert all(not checkpoints.problem(disk / checkpoint_names.name_of(step)) for step in left)


def test_a_full_disk_ends_a_run_with_74_and_space_lets_it_go_on(trainer, zygote, tmp_path, tiny_data):
    assert trainer(f"--out_dir={tmp_path}/undisturbed").status == 0
    with small_disk(tmp_path / "disk", "2m") as disk:
        folder = disk / "run"
        flags = ("--auto_resume=true", "--save_interval=5", f"--out_dir={folder}")
        assert trainer(*flags, "--max_iters=6").status == 0
        ballast = disk / "ballast"
        ballast.write_bytes(
            bytes(shutil.disk_usage(disk).free - 32768)
        )  # room for the logs, none for a checkpoint
        done = trainer(*flags)
        assert done.status == 74
        assert done.stderr.startswith("error: ")
        assert done.stderr.count("\n") == 1
        assert "free space" in done.stderr
        assert checkpoint_names.steps(folder / "checkpoints") == [6]  # the spare went to make room, in vain
        assert not list((folder / "checkpoints").glob(".*"))
        ballast.unlink()
        assert trainer(*flags).status == 0
        assert tiny.losses(folder) == tiny.losses(tmp_path / "undisturbed")
        assert tiny.final_weights(folder) == tiny.final_weights(tmp_path / "undisturbed")


def test_a_disk_that_turns_read_only(trainer, tmp_path):
    with small_disk(tmp_path / "disk", "4m") as disk:
        flags = ("--auto_resume=true", f"--out_dir={disk}/run")
        assert trainer(*flags, "--max_iters=6").status == 0
        remount(disk, "ro")
        done = trainer(*flags)
        assert done.status == 74
        assert done.stderr.startswith("error: ")
        assert "read-only" in done.stderr
        assert done.stderr.count("\n") == 1
        remount(disk, "rw")
        assert trainer(*flags).status == 0


@pytest.mark.parametrize("target", ["/metrics.jsonl", "/log.txt", "/config.json", "/lease.json", "/source"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_the_other_files_of_a_run_may_be_refused_too(target, code, trainer, zygote, tmp_path):
    if not zygote.shim:
        pytest.skip("needs a C compiler")
    done = trainer("--auto_resume=true", env=fault("write", 1, code, f"/run{target}", lasting=True))
    if target in ("/config.json", "/lease.json", "/source"):  # written under a temporary name
        done = trainer("--overwrite=true", env=fault("write", 1, code, f"/run/.{target[1:]}", lasting=True))
    assert done.status == 74, (done.status, done.stderr)
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert trainer("--auto_resume=true").status == 0
    assert sorted(tiny.losses(tmp_path / "run")) == list(range(20))


def test_a_file_size_limit(tmp_path, tiny_data):
    """A quota as the shell sets it, in a real process."""
    command = [sys.executable, "-m", "nanogpt.train", *tiny.FLAGS, "--n_embd=256", "--out_dir", str(tmp_path / "run"),
               f"--data_root={tiny_data}"]  # fmt: skip

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))

    done = subprocess.run(command, cwd=ROOT, preexec_fn=limit, capture_output=True, text=True, timeout=600)
    assert done.returncode == 74, done.stderr
    assert done.stderr.startswith("error: ")
    assert "file-size limit" in done.stderr
    assert done.stderr.count("\n") == 1
    assert list((tmp_path / "run/checkpoints").iterdir()) == []
