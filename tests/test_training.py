"""A run from the command to the files it leaves: it learns, says what it did, and its log has its source.

That the source from a log trains to the same losses: tests/tools/test_repro.py.
"""

import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from nanogpt.common import source
from nanogpt.common.errors import UserError
from tests.faults import tiny

ROOT = Path(__file__).resolve().parents[1]
UNIFORM = math.log(13)  # nats: the 13 characters of the tiny set, all equally likely


def command(
    *argv: str, cwd: Path = ROOT, script: str | None = None, **env: str
) -> subprocess.CompletedProcess:
    """The real command, in a process of its own that executes the run's copy of the source."""
    start = [script] if script else ["-m", "nanogpt.train"]
    return subprocess.run(
        [sys.executable, *start, *argv],
        cwd=cwd, env={**os.environ, **env}, capture_output=True, text=True, timeout=600,
    )  # fmt: skip


@pytest.fixture(scope="module")
def real_run(tiny_data, tmp_path_factory) -> Path:
    """The directory of a run by the real command."""
    folder = tmp_path_factory.mktemp("real") / "run"
    done = command(*tiny.FLAGS, f"--data_root={tiny_data}", f"--out_dir={folder}")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    (folder.parent / "stdout").write_text(done.stdout)
    return folder


def test_it_learns(trainer, tmp_path):
    """600 steps come close to the entropy of random words: 3 bits for a word of 3.75 letters, 0.55 nats a letter."""
    flags = (
        "--max_iters=600",
        "--lr_decay_iters=600",
        "--eval_interval=200",
        "--n_embd=32",
        "--batch_size=8",
    )
    assert trainer(*flags).status == 0
    vals = tiny.val_losses(tmp_path / "run")
    assert vals[0] == pytest.approx(UNIFORM, rel=0.1)
    assert vals[600] < 0.8 < vals[0]
    assert vals[600] > 0.5, "below the entropy: the validation text has leaked"


def test_the_files_of_a_run(real_run):
    names = {path.name for path in real_run.iterdir()}
    assert names == {
        "source",
        "config.json",
        "environment.json",
        "log.txt",
        "metrics.jsonl",
        "checkpoints",
        "lease.json",
    }
    assert [path.name for path in sorted((real_run / "checkpoints").iterdir())] == [
        "step_00000010",
        "step_00000020",
    ]
    config = json.loads((real_run / "config.json").read_text())
    assert config["config"]["n_embd"] == 16
    assert config["plan"] == {"world_size": 1, "tokens_per_step": 64, "sequences_per_step": 4, "micro_steps": 1,
                              "eval_tokens": 512}  # fmt: skip
    attempt = json.loads((real_run / "environment.json").read_text())["attempts"][0]
    assert attempt["packages"]["torch"]
    assert "--max_iters=20" in attempt["argv"]
    assert not list(real_run.rglob("*.pkl")) + list(real_run.rglob("*.pt"))


def test_the_metrics(real_run):
    events = tiny.events(real_run)
    assert [event["event"] for event in events if event["event"] not in ("train", "val", "save")] == [
        "start",
        "end",
    ]
    train = tiny.events(real_run, "train")
    assert [event["step"] for event in train] == list(range(20))
    assert [event["tokens"] for event in train] == [64 * (step + 1) for step in range(20)]
    for event in train:
        assert set(event) == {"event", "step", "loss", "lr", "grad_norm", "ms", "tokens_per_s", "mfu", "memory_gib",
                              "tokens", "attempt"}  # fmt: skip
        assert 0 < event["loss"] < 10
        assert event["ms"] > 0
        assert event["mfu"] is None  # a CPU's peak is not known
    assert sorted(tiny.val_losses(real_run)) == [0, 10, 20]
    assert [event["step"] for event in tiny.events(real_run, "save")] == [10, 20]
    end = events[-1]
    assert (end["status"], end["step"], end["val_loss"]) == ("finished", 20, tiny.val_losses(real_run)[20])


def test_the_terminal_and_the_log_say_the_same(real_run):
    said = (real_run.parent / "stdout").read_text()
    log = source.from_log(real_run / "log.txt")[1]
    for line in said.splitlines():
        assert line in log
    assert re.search(
        r"step 19/20: loss \d\.\d{4}, lr .*, [\d.]+ ms, [\d,]+ tokens/s, MFU unknown, ETA 0:00:00", said
    )
    assert "64 tokens a step = 1 rank x 1 micro-steps x 4 sequences x 16 tokens" in said


def test_the_log_rebuilds_the_source(real_run, tmp_path):
    files, _ = source.from_log(real_run / "log.txt")
    assert files == source.collect(ROOT, ("nanogpt",)) == source.collect(real_run / "source", (".",))
    assert source.digest(files) == json.loads((real_run / "config.json").read_text())["source_sha256"]
    source.write_folder(files, tmp_path / "source")
    for name, data in files.items():
        assert (tmp_path / "source" / name).read_bytes() == data
    assert "nanogpt/train.py" in files


@pytest.mark.parametrize("name", ["first line", "digest", "a file", "cut"])
def test_a_log_that_was_changed_is_refused(name, real_run, tmp_path):
    data = (real_run / "log.txt").read_bytes()
    changed = {
        "first line": b"x" + data,
        "digest": data.replace(b"sha256 ", b"sha256 0", 1),
        "a file": data.replace(b"def train(", b"def trail(", 1),
        "cut": data[: len(data) // 4],
    }
    (tmp_path / "log.txt").write_bytes(changed[name])
    with pytest.raises(UserError, match=r"log\.txt"):
        source.from_log(tmp_path / "log.txt")


def test_a_resume_runs_the_copy_although_the_repository_has_changed(trainer, tiny_data, real_run, tmp_path):
    """Queued and preempted runs do not care what is edited meanwhile."""
    clone = tmp_path / "clone"
    shutil.copytree(ROOT / "nanogpt", clone / "nanogpt", ignore=shutil.ignore_patterns("__pycache__"))
    assert trainer("--max_iters=10").status == 0
    edited = clone / "nanogpt/train.py"
    broken = "def go_on(_):\n    raise SystemExit(99)\n\n\ndef before(folder"
    edited.write_text(edited.read_text().replace("def go_on(folder", broken))
    argv = [*tiny.FLAGS, f"--data_root={tiny_data}", f"--out_dir={tmp_path}/run", "--auto_resume=true"]
    second = command(*argv, cwd=clone / "nanogpt", script="train.py", PYTHONPROFILEIMPORTTIME="1")
    assert second.returncode == 0, second.stderr
    assert " torch.nn\n" in second.stderr, "it tells what is imported"
    assert "torch._dynamo" not in second.stderr, (
        "the compiler, where nothing is compiled: it takes as long as torch"
    )
    assert tiny.losses(tmp_path / "run") == tiny.losses(real_run)
    assert tiny.final_weights(tmp_path / "run") == tiny.final_weights(real_run)
    by_hand = command(
        "--init_from=resume", f"--out_dir={tmp_path}/run", "--max_iters=21", "--new_source", cwd=clone
    )
    assert by_hand.returncode == 99, "the edit does change a run that takes it"
    assert "\n+    raise SystemExit(99)" in (tmp_path / "run/log.txt").read_text()


def test_a_run_inside_the_trainers_folder_is_not_its_source(tiny_data, tmp_path):
    """`cd nanogpt && python train.py` with a relative out_dir."""
    clone = tmp_path / "clone"
    shutil.copytree(ROOT / "nanogpt", clone / "nanogpt", ignore=shutil.ignore_patterns("__pycache__"))
    expected = source.collect(clone, ("nanogpt",))
    shutil.copytree(clone / "nanogpt", clone / "nanogpt/out/run/source/nanogpt")
    (clone / "nanogpt/out/run/log.txt").write_text("")
    assert source.collect(clone, ("nanogpt",)) == expected


def test_without_a_compiler_it_says_so_once_and_trains(trainer, tmp_path):
    done = trainer("--compile=true", "--max_iters=2", env={"CXX": "no-such-compiler"})
    assert done.status == 0, done.stderr
    assert done.stdout.count("no C++ compiler (no-such-compiler; CXX names another)") == 1
    assert "compiled: false" in done.stdout


def test_check_prints_the_plan_and_makes_nothing(trainer, tmp_path):
    done = trainer("--check", "--tokens_per_step=256")
    assert (done.status, done.stderr) == (0, "")
    assert "256 tokens a step = 1 rank x 4 micro-steps x 4 sequences x 16 tokens; 20 steps" in done.stdout
    assert "20,193 training tokens" in done.stdout
    assert list(tmp_path.iterdir()) == []
    assert trainer("--max_iters=1").status == 0
    assert trainer("--check").status == 2  # the folder is taken
    resumed = trainer("--check", "--auto_resume")
    assert resumed.status == 0
    assert sorted(tiny.losses(tmp_path / "run")) == [0]
    assert json.loads((tmp_path / "run/lease.json").read_text())["attempt"] == 1


def test_evaluation_gives_the_same_number_again(trainer, tmp_path):
    assert trainer().status == 0
    last = tiny.val_losses(tmp_path / "run")[20]
    for _ in range(2):
        done = trainer("--init_from=resume", "--eval_only")
        assert done.status == 0
        assert tiny.val_losses(tmp_path / "run")[20] == last  # and val_losses compares those of all attempts
    assert len(tiny.events(tmp_path / "run", "val")) == 5
    assert [path.name for path in sorted((tmp_path / "run/checkpoints").iterdir())] == [
        "step_00000010",
        "step_00000020",
    ]


def test_eval_only_from_the_start_trains_nothing(trainer, tmp_path):
    assert trainer("--eval_only").status == 0
    assert tiny.losses(tmp_path / "run") == {}
    assert list((tmp_path / "run/checkpoints").iterdir()) == []


def test_repeats_are_equal_and_seeds_differ(trainer, tmp_path):
    runs = {
        "a": ["--dropout=0.2"],
        "b": ["--dropout=0.2", "--deterministic"],
        "c": ["--dropout=0.2", "--seed=5"],
    }
    for name, flags in runs.items():
        assert trainer(*flags, f"--out_dir={tmp_path}/{name}").status == 0
    losses = {name: tiny.losses(tmp_path / name) for name in runs}
    assert losses["a"] == losses["b"]
    assert all(losses["a"][step] != losses["c"][step] for step in range(20))


def test_dropout_depends_on_the_seed():
    """torch's CPU generator looks at 32 bits of its seed."""
    from nanogpt.setup import dropout_seed

    low = {dropout_seed(seed, batch) & 0xFFFFFFFF for seed in range(50) for batch in range(50)}
    assert len(low) == 2500
    assert max(dropout_seed(2**31 - 1, 10**12), dropout_seed(0, 0)) < 2**63


def test_accumulation_changes_nothing(trainer, tmp_path):
    """8 sequences at once, or as 4 micro-steps of 2: the same gradients, but for the order of addition."""
    for name, batch in (("one", 8), ("four", 2)):
        assert (
            trainer("--tokens_per_step=128", f"--batch_size={batch}", f"--out_dir={tmp_path}/{name}").status
            == 0
        )
    one, four = tiny.losses(tmp_path / "one"), tiny.losses(tmp_path / "four")
    assert four == pytest.approx(one, rel=1e-5)


def test_the_end_of_a_pipe_is_not_the_end_of_a_run(zygote, trainer, tmp_path):
    """`python -m nanogpt.train ... | head -1`: the run goes on, and its log has every line."""
    pipe = Path(zygote.folder.name) / f"{zygote.count + 1}.out"  # where the next child's output goes
    os.mkfifo(pipe)
    child = trainer.start()
    with pipe.open() as head:
        assert head.readline()
    assert (child.wait(), child.stderr) == (0, "")
    assert sorted(tiny.losses(tmp_path / "run")) == list(range(20))
    assert "finished at step 20" in (tmp_path / "run/log.txt").read_text()


def test_a_presets_out_dir_is_in_the_repository_wherever_it_is_started_from(monkeypatch, tmp_path, root):
    from nanogpt import train

    monkeypatch.chdir(tmp_path)
    assert train.default_out_dir({"out_dir": "out/x"}) == str(root / "out/x")
    assert train.default_out_dir({}) == str(root / "out/nanogpt")
    assert train.default_out_dir({"out_dir": "/else/where"}) == "/else/where"
    monkeypatch.chdir(root)
    assert train.default_out_dir({"out_dir": "out/x"}) == "out/x"
    assert train.flag_given(["--out-dir=a"], "out_dir") and train.flag_given(["--out_dir", "a"], "out_dir")
    assert not train.flag_given(["config/out_dir.py", "--dataset=out_dir"], "out_dir")
