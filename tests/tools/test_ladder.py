"""`engaging next`: each rung from what is on the disk, and the group's ticks."""

import json
import math
import os
import re

import pytest

from nanogpt.common.errors import UserError
from tools.launch.book import new_launch
from tools.leaderboard import corrections
from tools.leaderboard.board import Board
from tools.site import estimate, ladder
from tools.site.cluster import Cluster
from tools.site.estimate import past, too_short
from tools.site.slurm import Answer, Association, Job


@pytest.fixture
def home(tmp_path, monkeypatch):
    """An empty checkout on a machine with neither SLURM nor GPUs."""
    monkeypatch.setattr(ladder.slurm, "available", lambda: False)
    monkeypatch.setattr(ladder.checks_machine, "driver_version", lambda: None)
    monkeypatch.setattr(ladder, "checkout", lambda: tmp_path)
    for name in ("DATA_ROOT", "ENGAGING_BOARD"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("ENV_PATH", str(tmp_path / "env"))
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def torch_of(home, cuda):
    package = home / "env" / "lib" / "python3.11" / "site-packages" / "torch"
    package.mkdir(parents=True, exist_ok=True)
    (package / "__init__.py").touch()
    (package / "version.py").write_text(f"__version__ = '2.13.0'\ncuda: Optional[str] = {cuda!r}\n")
    (home / "env" / "bin").mkdir(exist_ok=True)
    (home / "env" / "bin" / "python").touch()


def a_run(home, name, loss, config=None, gpus=(), status="finished", seconds=1.0):
    path = home / "out" / name
    path.mkdir(parents=True)
    lines = [
        {"event": "train", "step": 9, "loss": loss},
        {"event": "val", "step": 9, "val_loss": loss},
        {"event": "end", "step": 9, "status": status, "seconds": seconds},
    ]
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (path / "config.json").write_text(json.dumps({"config": config or {}}))
    (path / "environment.json").write_text(json.dumps({"attempts": [{"gpus": list(gpus)}]}))


def standing(home):
    facts = ladder.Facts(home)
    return {rung.name: rung for rung in (rung(facts) for rung in ladder.LADDER)}


CHAR = {"dataset": "shakespeare_char", "max_iters": 5000}


def test_the_ladder_is_climbed_rung_by_rung(home, capsys):
    assert ladder.main([]) == 0
    assert "next: bash setup_env.sh" in capsys.readouterr().out
    torch_of(home, None)
    assert standing(home)["quickstart"].command == "make quickstart"
    a_run(home, "quickstart", 1.85)
    rungs = standing(home)
    assert rungs["quickstart"].state == rungs["torch"].state == "done" and "ssh" in rungs["GPU"].command
    a_run(home, "shakespeare", 1.47, CHAR, gpus=["NVIDIA L40S"])
    a_run(home, "speedrun-1", 3.279, {"extension_steps": 40, "recipe": "record"}, gpus=["NVIDIA H200"] * 8)
    rungs = standing(home)
    assert rungs["GPU"].text.endswith(("1x NVIDIA L40S", "8x NVIDIA H200"))
    assert rungs["char model"].state == rungs["speedrun"].state == "done"
    data = home / "data" / "fineweb10B"
    data.mkdir(parents=True)
    entry = {"name": "a.bin", "split": "train", "tokens": 1, "bytes": 1026, "sha256": "0" * 64}
    (data / "a.bin").write_bytes(b"\0" * 1026)
    facts = {"name": "fineweb10B", "tokenizer": "gpt2", "vocab_size": 50257, "eot": 50256, "files": [entry]}
    (data / "manifest.json").write_text(json.dumps(facts))
    assert standing(home)["data"].state == "done"
    for name in ("baseline", "palm"):
        folder = home / "experiment_logs" / name
        folder.mkdir(parents=True)
        said = {"experiment_name": name, "statistics": {"successful_runs": 2}}
        (folder / "summary.json").write_text(json.dumps(said))
    capsys.readouterr()
    ladder.main([])
    assert "all done" in capsys.readouterr().out


def test_a_failed_rung_names_its_fix(home):
    torch_of(home, None)
    a_run(home, "quickstart", 3.9)
    a_run(home, "mine", 1.6, CHAR)
    a_run(home, "speedrun-1", 5.0, {"extension_steps": 40, "recipe": "record"}, status="interrupted")
    data = home / "data" / "fineweb10B"
    data.mkdir(parents=True)
    (data / "manifest.json").write_text("{}")
    experiment = home / "experiment_logs" / "x"
    experiment.mkdir(parents=True)
    (experiment / "summary.json").write_text("[]")
    rungs = standing(home)
    for name in ("quickstart", "char model", "speedrun", "data"):
        assert rungs[name].state == "failed" and rungs[name].command, rungs[name]
    assert "engaging repro out/mine/log.txt" in rungs["char model"].text
    assert "--name speedrun-1" in rungs["speedrun"].command and rungs["comparison"].state == "todo"


def test_a_time_names_its_source(home):
    """Case C4 with it: a limit under the estimate."""
    ours = past(home, "gpt2", 4)
    assert "reckoned from our 558,045 tokens/s on one H100" in ours and ours.endswith("1 d 12 h on 4 of them")
    assert too_short(home, "gpt2", 4, 4).startswith(
        "4 minutes is less than that, so it would go on in 550 further"
    )
    launch = new_launch(
        home, "first", token="f" * 24, preset="gpt2", trainer="nanogpt.train", runs=["out/first"], args=[]
    )
    assert launch.number == 1 and "reckoned" in past(home, "gpt2")
    a_run(home, "first", 3.1, gpus=["NVIDIA H200"] * 4, seconds=7200.0)
    assert past(home, "gpt2") == "your run first trained for 2 h on 4x NVIDIA H200"
    assert "not a measurement" in past(home, "nanogpt")
    assert too_short(home, "gpt2", 4).startswith(
        "4 minutes is less than that, so it would go on in 29 further jobs"
    )
    assert too_short(home, "gpt2", 120) == too_short(home, "nanogpt", 4) == ""


def test_a_time_comes_from_a_scripts_run_and_from_the_labs_board(home, monkeypatch):
    board = home / "board" / "records"
    board.mkdir(parents=True)
    monkeypatch.setenv("ENGAGING_BOARD", str(home / "board"))
    assert "not a measurement" in past(home, "speedrun", 8)
    a_record(board, "a" * 16, "2026-01-02", 900.0, "Ada")
    a_record(board, "b" * 16, "2026-03-04", 600.0, "Bob")
    a_record(board, "c" * 16, "2026-05-06", 300.0, "taken back")
    corrections.write(Board(home / "board", "", {}), "c" * 16, "another run's log")
    corrections.write(Board(home / "board", "", {}), "b" * 16, "a slip", "in other words: it stays")
    said = past(home, "speedrun", 8)
    assert said.startswith("no run of it has finished here; the lab's newest record (Bob, 2026-03-04)"), said
    assert said.endswith(" trained for 10 min on 8 x NVIDIA H100"), said
    assert "1 further job at least" in too_short(home, "speedrun", 60, 1) and not too_short(
        home, "speedrun", 60, 8
    )
    record = {"extension_steps": 40, "recipe": "record"}
    a_run(home, "speedrun-12", 3.28, {**record, "recipe": "tiny"}, seconds=60.0)
    a_run(home, "speedrun-smoke", 9.0, record, seconds=1.0)
    assert past(home, "speedrun", 8) == said, "a small recipe, or a smoke run, says nothing about it"
    a_run(home, "speedrun-13", 3.28, record, gpus=["NVIDIA H200"] * 2, seconds=1800.0)
    assert past(home, "speedrun", 2) == "your run speedrun-13 trained for 30 min on 2x NVIDIA H200"


def a_record(folder, name, day, seconds, who):
    digest = "0" * 64
    blob = {"sha256": digest, "bytes": 1}
    run = {"seed": 1, "val_loss": 3.27, "seconds": seconds, "files": {"log.txt": blob}}
    said = {
        "format": "engaging-nanogpt submission 1", "id": name, "kind": "record", "track": "track1",
        "description": "d", "contributors": [who], "log_url": "", "submitted": f"{day}T00:00:00+00:00",
        "seconds": seconds, "steps": 10, "mean_loss": 3.27, "p_value": 0.001, "gpu": "NVIDIA H100",
        "world_size": 8, "source_sha256": digest, "recipe_sha256": digest, "runs": [run], "data": None,
    }  # fmt: skip
    (folder / f"{name}.json").write_text(json.dumps(said))


def test_our_figures_are_those_of_their_homes(root):
    assert f"| {estimate.OURS:,} |" in (root / "docs/performance.md").read_text()
    for preset, tokens in estimate.TOKENS.items():
        file = root / "nanogpt/config" / f"train_{preset.removeprefix('train_')}.py"
        values = dict(
            re.findall(r"^(max_iters|tokens_per_step) = ([0-9* ]+)", file.read_text(), re.MULTILINE)
        )
        assert int(values["max_iters"]) * math.prod(map(int, values["tokens_per_step"].split("*"))) == tokens


def test_what_slurm_says(home, monkeypatch):
    monkeypatch.setattr(ladder.slurm, "available", lambda: True)
    nobody = Cluster(associations=[])
    monkeypatch.setattr(ladder, "ask_cluster", lambda: nobody)
    assert standing(home)["account"].state == "failed"
    job = Job("7", "7", "PENDING", "Priority", "gpu", "train-shakespeare", {"h200": 1})
    somebody = Cluster(associations=[Association("mit_general", ("normal",))], my_jobs=[job])
    monkeypatch.setattr(ladder, "ask_cluster", lambda: somebody)
    rungs = standing(home)
    assert rungs["account"].text == "mit_general" and rungs["quickstart"].command == "make quickstart"
    assert "engaging why 7" in rungs["char model"].text


def test_the_gpus_of_the_practice_cluster_ask_for_no_other_torch(home, monkeypatch):
    torch_of(home, None)
    monkeypatch.setattr(ladder.slurm, "available", lambda: True)
    monkeypatch.setattr(ladder, "ask_cluster", lambda: Cluster(associations=[]))
    monkeypatch.setattr(Cluster, "gpu_types", lambda _: ["h200"])
    for name, state in (("practice", "done"), ("eofe7", "failed")):
        monkeypatch.setattr(ladder.profile, "cluster_name", lambda name=name: name)
        assert standing(home)["torch"].state == state


def test_a_command_that_a_signal_ended_got_no_answer():
    assert Answer(-13, "", "").unreachable and not Answer(1, "", "no such job").unreachable


@pytest.mark.parametrize(
    ("said", "wanted"),
    [
        ("scontrol: fatal: Could not establish a configuration source", "no cluster is configured"),
        ("scontrol: error: Unable to contact slurm controller (connect failure)", "try again in a minute"),
    ],
)
def test_no_cluster_and_a_controller_that_is_away_are_two_things(home, monkeypatch, said, wanted):
    monkeypatch.setattr(ladder.slurm, "available", lambda: True)
    monkeypatch.setattr(ladder.slurm, "ask", lambda *_, **__: Answer(1, "", said))
    account = standing(home)["account"]
    assert account.state == "failed" and wanted in account.text and "\n" not in account.text


def test_the_labs_ladder_shows_those_who_opted_in(home, monkeypatch, capsys):
    with pytest.raises(UserError, match="engaging config set board"):
        ladder.main(["--lab"])
    board = home / "board"
    board.mkdir()
    monkeypatch.setenv("ENGAGING_BOARD", str(board))
    ladder.main([])
    assert not (board / "ladder").exists()
    ladder.main(["--share"])
    torch_of(home, None)
    ladder.main([])  # goes on sharing
    (board / "ladder" / "somebody-else.json").write_text('{"when": 1, "rungs": {"account": "done"}}')
    (board / "ladder" / "broken.json").write_text("{")
    capsys.readouterr()
    ladder.main(["--lab"])
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(ladder._owner(os.getuid())[:16]) and " 3 of 9  quickstart" in line
    ladder.main(["--unshare"])
    assert not ladder._shared()
