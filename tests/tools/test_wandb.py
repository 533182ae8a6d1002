"""Weights & Biases, with the real package: live beside a trainer and afterwards, offline, and nothing is ever asked."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from nanogpt.common import tracking
from nanogpt.common.errors import UserError
from tests.faults import tiny
from tests.modded import simple_kit
from tools import wandb_follow

ROOT = Path(__file__).resolve().parents[2]
if importlib.util.find_spec("wandb") is None:  # without importing it in every process of `make test`
    pytest.skip("needs the package wandb", allow_module_level=True)


@pytest.fixture(autouse=True)
def nobody(monkeypatch, tmp_path) -> None:
    """No login, no settings."""
    for name in [name for name in os.environ if name.startswith("WANDB")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("NETRC", raising=False)


def sent(folder: Path) -> tuple[list[dict], dict, dict]:
    """(history rows, summary, run) from a .wandb file: LevelDB's log format, in blocks of 32 KiB, with protobufs."""
    from wandb.proto.wandb_internal_pb2 import Record

    (path,) = folder.glob("*.wandb")
    data, place, whole = path.read_bytes(), 7, b""
    history, summary, run = [], {}, None
    while place < len(data):
        if 32768 - place % 32768 < 7:
            place += 32768 - place % 32768
            continue
        size, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        whole += data[place + 7 : place + 7 + size]
        place += 7 + size
        if kind not in (1, 4):  # whole, or the last part
            continue
        record, whole = Record.FromString(whole), b""
        if record.HasField("history"):
            history.append(
                {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
            )
        elif record.HasField("summary"):
            summary |= {
                item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.summary.update
            }
        elif record.HasField("run"):
            run = record.run
    return history, summary, run


def offline_runs(folder: Path) -> list[Path]:
    return sorted((folder / "wandb").glob("offline-run*"))


def test_live_beside_a_trainer_that_never_waits_for_it(tiny_data, tmp_path) -> None:
    """Case J1: no key, no terminal, no WANDB_MODE, and only a loopback that leads nowhere."""
    argv = [
        *tiny.FLAGS,
        f"--data_root={tiny_data}",
        f"--out_dir={tmp_path}/run",
        "--wandb_log=true",
        "--max_iters=30",
    ]
    done = subprocess.run(
        [sys.executable, "-m", "nanogpt.train", *argv], cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True,
        text=True, timeout=600, env={**os.environ, "OMP_NUM_THREADS": "1", "HTTPS_PROXY": "http://127.0.0.1:9"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (folder,) = offline_runs(tmp_path / "run")
    assert f"run: kept offline; send it with: wandb sync {folder}\n" in done.stdout
    assert "Enter your choice" not in done.stdout + done.stderr
    history, summary, run = sent(folder)
    assert {row["_step"]: row["loss"] for row in history if "loss" in row} == tiny.losses(tmp_path / "run")
    assert {row["_step"]: row["val_loss"] for row in history if "val_loss" in row} == tiny.val_losses(
        tmp_path / "run"
    )
    assert {"lr", "grad_norm", "tokens_per_s", "ms", "tokens"} <= set(history[0])
    assert summary["status"] == "finished"
    assert run.run_id == json.loads((tmp_path / "run/config.json").read_text())["run_id"]
    assert run.project == "engaging-nanogpt" and run.display_name == "run"


def test_the_small_trainer_has_the_same_flag(zygote, tmp_path) -> None:
    out = tmp_path / "run"
    words = [
        "-m",
        "modded_nanogpt.train_gpt_simple",
        *simple_kit.FLAGS,
        f"--out_dir={out}",
        "--wandb_log=true",
    ]
    env = simple_kit.environment(simple_kit.make_data(tmp_path / "data"), WANDB_MODE="offline")
    child = zygote.run(words, module="tests.faults.forked_python", env=env)
    assert child.status == 0, child.stderr
    (folder,) = offline_runs(out)
    history, summary, _ = sent(folder)
    expected = {step: loss for (kind, step), loss in simple_kit.losses(out).items() if kind == "train"}
    assert {row["_step"]: row["loss"] for row in history if "loss" in row} == expected
    assert summary["status"] == "finished"


def metrics(folder: Path, *lines: dict) -> None:
    folder.mkdir(exist_ok=True)
    with (folder / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps({"attempt": 1, **line}) + "\n" for line in lines)


def test_afterwards_from_any_trainer_and_only_what_is_new(tmp_path, capsys) -> None:
    folder = tmp_path / "speedrun"
    metrics(folder, {"event": "start", "step": 0, "world_size": 1, "time": 1.0},
            {"event": "val", "step": 0, "val_loss": 10.8, "train_ms": 0.0},
            {"event": "train", "step": 0, "loss": 11.5, "train_ms": 3.0, "mfu": None},
            {"event": "train", "step": 1, "loss": 11.0, "train_ms": 6.0})  # fmt: skip
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('no json\n{"event": "train", "step": 2, "lo')  # cut off in the middle
    assert wandb_follow.main([str(folder), "--project=mine", "--name=fast"]) == 0
    (first,) = offline_runs(folder)
    history, _, run = sent(first)
    assert [(row["_step"], row.get("loss"), row.get("val_loss")) for row in history] == [
        (0, 11.5, 10.8),
        (1, 11.0, None),
    ]
    assert (run.project, run.display_name) == ("mine", "fast")
    text = (folder / "metrics.jsonl").read_text()
    (folder / "metrics.jsonl").write_text(text[: text.rindex("\n") + 1])  # as a resume does
    assert wandb_follow.main([str(folder)]) == 0
    assert "everything has been sent already" in capsys.readouterr().out
    metrics(folder, {"event": "resume", "step": 1}, {"event": "train", "step": 0, "loss": 11.5},
            {"event": "train", "step": 2, "loss": 9.0}, {"event": "end", "step": 3, "status": "finished"})  # fmt: skip
    assert wandb_follow.main([str(folder)]) == 0
    history, summary, _ = sent(max(offline_runs(folder), key=lambda path: path.stat().st_mtime_ns))
    assert [(row["_step"], row["loss"]) for row in history] == [(2, 9.0)]
    assert summary["status"] == "finished"


def test_the_end_of_an_earlier_attempt_is_not_the_end(tmp_path) -> None:
    metrics(tmp_path / "run", {"event": "start", "step": 0}, {"event": "end", "step": 3})
    stop = wandb_follow._Stop.__new__(wandb_follow._Stop)
    stop.parent, stop.asked = os.getppid(), False
    lines = wandb_follow.Lines(tmp_path / "run" / "metrics.jsonl", 0)
    wandb_follow.PAUSE_SECONDS, pause = 0, wandb_follow.PAUSE_SECONDS
    try:
        found = wandb_follow.until_the_end(lines, stop, attempt=2)
        assert [next(found)["event"] for _ in range(2)] == ["start", "end"]
        metrics(tmp_path / "run", *({"event": event, "step": 3, "attempt": 2} for event in ("resume", "end")))
        assert [record["event"] for record in found] == ["resume", "end"]
        lines = wandb_follow.Lines(tmp_path / "run" / "metrics.jsonl", 0)
        over_already = wandb_follow.until_the_end(lines, stop, attempt=2)
        assert [record["event"] for record in over_already] == ["start", "end", "resume", "end"]
    finally:
        wandb_follow.PAUSE_SECONDS = pause
    stop.parent = 1 if os.getppid() != 1 else 2
    assert bool(stop)  # the parent has gone


def test_a_trainer_waits_for_its_follower_but_not_for_ever(monkeypatch, capsys) -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as follower:
        monkeypatch.setenv(tracking.FOLLOWER, str(follower.pid))
        monkeypatch.setitem(tracking.PATIENCE, False, 0.0)
        tracking.finish(False)
        assert "send it later: engaging wandb RUN" in capsys.readouterr().out and follower.poll() is None
        monkeypatch.setenv(tracking.FOLLOWER, str(follower.pid))
        follower.stdin.close()
        tracking.finish(True)
        assert capsys.readouterr().out == ""
        with pytest.raises(ChildProcessError):  # it was waited for
            os.waitpid(follower.pid, 0)
    tracking.finish(True)  # nobody is there: nothing to wait for


def test_which_mode(monkeypatch, tmp_path) -> None:
    assert tracking.mode() == "offline"
    for wish, mode in (("offline", "offline"), ("dryrun", "offline"), ("disabled", "disabled")):
        monkeypatch.setenv("WANDB_MODE", wish)
        assert tracking.mode() == mode
    monkeypatch.setenv("WANDB_MODE", "online")
    with pytest.raises(UserError, match=r"no login; run wandb login.*WANDB_MODE=offline"):
        tracking.mode()
    (tmp_path / ".netrc").write_text("machine api.wandb.ai\n  login user\n  password key\n")
    assert tracking.mode() == "online"
    monkeypatch.delenv("WANDB_MODE")
    assert tracking.mode() == "online"
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.lab.example")
    assert tracking.mode() == "offline"
    monkeypatch.setenv("WANDB_API_KEY", "x")
    assert tracking.mode() == "online"
    monkeypatch.setenv("WANDB_MODE", "onlin")
    with pytest.raises(UserError, match="WANDB_MODE=onlin: expected one of"):
        tracking.mode()
    monkeypatch.setattr(tracking.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install wandb"):
        tracking.mode()


def test_a_trainer_refuses_before_it_begins(tiny_data, tmp_path, monkeypatch) -> None:
    from nanogpt import train

    monkeypatch.setenv("WANDB_MODE", "online")
    argv = [*tiny.FLAGS, f"--data_root={tiny_data}", f"--out_dir={tmp_path}/run", "--wandb_log=true"]
    with pytest.raises(UserError, match="--wandb_log=true: WANDB_MODE=online, but there is no login"):
        train.main(argv)
    assert not (tmp_path / "run").exists()


def test_what_is_no_run_and_what_is_disabled(tmp_path, monkeypatch, capsys) -> None:
    with pytest.raises(UserError, match="holds no run"):
        wandb_follow.main([str(tmp_path)])
    metrics(tmp_path / "run", {"event": "start", "step": 0})
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert wandb_follow.main([str(tmp_path / "run")]) == 0
    assert "nothing is sent" in capsys.readouterr().out and not (tmp_path / "run" / "wandb").exists()


def test_no_trainer_imports_a_tracker() -> None:
    for package in ("nanogpt", "modded_nanogpt"):
        for path in (ROOT / package).rglob("*.py"):
            assert "import wandb" not in path.read_text(), path
