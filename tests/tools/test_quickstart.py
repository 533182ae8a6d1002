"""`python -m tools.quickstart`: the whole of it without a network, interrupted and repeated, and what it says."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import run_kit

from nanogpt.common import checkpoints, lease
from nanogpt.common.machine import has_nvidia_driver
from tools import quickstart
from tools.children import Children, Interrupted
from tools.runs import Run, ValPoint, read_run

FLAGS = (*run_kit.TINY, "--max_iters=6", "--eval_interval=3")


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_kit.make_clone(tmp_path_factory.mktemp("quickstart") / "clone")


def cut_off(command: list[str]) -> tuple[list[str], dict[str, str]]:
    """`command` in a machine without a network; where that is not ours to arrange, behind a proxy that is not there."""
    dead = dict.fromkeys(("http_proxy", "https_proxy"), "http://127.0.0.1:9")
    if os.geteuid() == 0 and subprocess.run(["unshare", "-n", "true"], capture_output=True).returncode == 0:
        return ["unshare", "-n", *command], {}
    return command, dead


def start(clone: Path, *flags: str) -> subprocess.Popen:
    """The quickstart in the clone, without a network, with its output in a pipe."""
    command, more = cut_off([sys.executable, "-m", "tools.quickstart", *flags])
    environment = run_kit.environment(clone / "data", **more)
    return subprocess.Popen(
        command, cwd=clone, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def finish(child: subprocess.Popen) -> tuple[int, str, str]:
    out, err = child.communicate(timeout=600)
    return child.returncode, out, err


def test_without_a_network_from_nothing_to_a_report_whose_commands_work(clone: Path, zygote) -> None:
    status, out, err = finish(start(clone, *FLAGS))
    assert status == 0, out + err
    assert "no network: https://" in out
    assert "so the text is the source of Python's own standard library" in out
    stages = [out.index(f"[{number}/4]") for number in (1, 2, 3, 4)]
    assert stages == sorted(stages)
    folder = clone / "out" / "quickstart"
    run = read_run(folder)
    assert run.status == "finished" and run.config["config"]["dataset"] == "python_source"
    report = out[stages[3] :]
    assert "run directory     out/quickstart\n" in report
    assert f"validation loss   {run.val_loss:.4f} nats a character; expected: " in report
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert " |o" in report and "o validation" in report
    written = re.search(r"\[3/4\] a sample.*?\n(.*)\[4/4\]", out, re.DOTALL)
    assert written and len(written[1]) > 200
    commands = re.findall(r"^(?:next)? {13,17} ((?:python|engaging) .*)$", report, re.MULTILINE)
    assert len(commands) == 3
    small = {"nanogpt.sample": ["--max_new_tokens=8", "--num_samples=1"], "nanogpt.train": FLAGS}
    for command in commands:  # the second one trains what the third one plots
        words = shlex.split(command)
        if words[0] == "python":  # the quickstart has started both for real
            done = run_kit.forked(zygote, clone, clone / "data", *words[1:], *small[words[2]])
        else:
            done = run_kit.run(clone, clone / "data", "-m", "tools", *words[1:])
        assert done.returncode == 0, f"{command}\n{done.stderr}"
    assert (clone / "compare.png").exists()
    first, wider = (read_run(clone / "out" / name).config["config"] for name in ("quickstart", "wider"))
    assert {**wider, "out_dir": ""} == {**first, "out_dir": ""}  # n_embd is that of FLAGS, appended above


def test_the_run_to_compare_with_has_the_settings_that_the_quickstart_chose(
    tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    settings = ["--data_root=/my data", "--dtype=bfloat16", "--seed=2"]
    _, wider, _ = quickstart.next_commands(tmp_path / "out/quickstart", "python_source", settings)
    words = ["--dataset=python_source", *settings, "--n_embd=192", "--out_dir=out/wider"]
    assert shlex.split(wider) == ["python", "-m", "nanogpt.train", "quickstart", *words]


def wait_for_step(folder: Path, step: int) -> None:
    end = time.monotonic() + 600
    while time.monotonic() < end:
        if (read_run(folder).step or 0) >= step:
            return
        time.sleep(0.02)
    raise AssertionError(f"{folder}: step {step} never came")


def test_stopped_while_it_trains_it_goes_on_and_a_report_that_is_missing_is_made(
    clone: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    folder = clone / "out" / "again"
    flags = (
        "--dataset=python_source", f"--out_dir={folder}", *run_kit.TINY, "--max_iters=1500", "--eval_interval=1500",
    )  # fmt: skip
    child = start(clone, *flags)
    wait_for_step(folder, 20)
    child.send_signal(signal.SIGINT)
    status, out, err = finish(child)
    assert status == 75, out + err
    assert "stopped by Ctrl-C; nothing is lost: `python -m tools.quickstart " in out
    end = read_run(folder).events[-1]
    assert end["status"] == "interrupted" and 20 <= end["step"] < 1500
    assert read_run(folder).max_steps == 1500 and (read_run(folder).eta_s() or 0) > 0, "what watch shows"

    (folder / "stop").touch()  # as if it had been stopped this way: whoever types it again means to go on
    status, out, err = finish(start(clone, *flags))
    assert status == 0, out + err
    assert "going on with the interrupted run" in out and f"resumed from step_{end['step']:08d}" in out
    run = read_run(folder)
    assert run.attempts == 2 and run.step == 1500 and [point.step for point in run.train] == list(range(1500))

    (folder / "loss.png").unlink()  # as if it had been stopped after the training
    monkeypatch.chdir(clone)
    monkeypatch.setattr(quickstart, "ROOT", clone)
    monkeypatch.setenv("DATA_ROOT", str(clone / "data"))
    with monkeypatch.context() as broken, pytest.raises(SystemExit) as left:
        broken.setattr(quickstart, "SAMPLE_TOKENS", -1)  # case E3: what comes after the training breaks
        quickstart.main(list(flags))
    assert left.value.code == 2
    said = capsys.readouterr().out
    assert "no sample (status 2); the trained model is saved: " in said and not (folder / "loss.png").exists()
    assert checkpoints.problem(folder / "checkpoints" / "step_00001500") == ""
    monkeypatch.setattr(quickstart, "sample", lambda *_: None)  # both runs above have written theirs
    assert quickstart.main(list(flags)) == 0 and "trained already" in capsys.readouterr().out
    assert (folder / "loss.png").exists() and read_run(folder).attempts == 2


@pytest.fixture
def finished(clone: Path, tmp_path: Path) -> tuple[Path, list[str]]:
    """A run directory, complete but for its numbers, and the command line it was started with."""
    folder = tmp_path / "run"
    argv = ["quickstart", "--dataset=letters", f"--out_dir={folder}", "--max_iters=5"]
    (folder / "checkpoints").mkdir(parents=True)
    run_kit.make_data(tmp_path / "data")
    write_run(folder, argv, fingerprint=quickstart._fingerprint("letters", str(tmp_path / "data")))
    return folder, argv


def write_run(folder: Path, argv: list[str], **changed: str) -> None:
    own = quickstart.source.digest(quickstart.source.collect(quickstart.ROOT, ("nanogpt",)))
    record = {
        "config": {"dataset": "letters"},
        "source_sha256": changed.get("source", own),
        "data": changed["fingerprint"],
    }
    torch = quickstart.metadata.version("torch")
    attempt = {"argv": argv, "packages": {"torch": changed.get("torch", torch)}}
    (folder / "config.json").write_text(json.dumps(record))
    (folder / "environment.json").write_text(json.dumps({"attempts": [attempt]}))


def why(finished: tuple[Path, list[str]], argv: list[str] | None = None) -> str:
    return quickstart.why_anew(finished[0], argv or finished[1], str(finished[0].parent / "data"))


def test_an_unfinished_run_of_the_same_code_flags_and_data_goes_on(finished) -> None:
    assert why(finished) == ""


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"source": "0" * 64}, "other code"),
        ({"fingerprint": "0" * 64}, "other data"),
        ({"torch": "1.0"}, "another version of torch"),
    ],
)
def test_what_makes_a_run_begin_anew(finished, change: dict[str, str], reason: str) -> None:
    folder, argv = finished
    data = {"fingerprint": quickstart._fingerprint("letters", str(folder.parent / "data"))}
    write_run(folder, argv, **{**data, **change})
    assert reason in why(finished)


def test_other_flags_and_unreadable_runs_begin_anew(finished) -> None:
    folder, argv = finished
    assert "other flags" in why(finished, [*argv, "--seed=2"])
    write_run(
        folder,
        [*argv, "--overwrite=true"],
        fingerprint=quickstart._fingerprint("letters", str(folder.parent / "data")),
    )
    assert why(finished) == ""  # --overwrite is the quickstart's own
    (folder / "environment.json").write_text("{}")
    assert "cannot be read" in why(finished)


def test_a_complete_run_begins_anew_and_one_without_its_report_does_not(finished) -> None:
    folder, _ = finished
    (folder / "metrics.jsonl").write_text(
        '{"event": "end", "step": 5, "status": "finished", "val_loss": 2.0}\n'
    )
    assert why(finished) == "" and quickstart.is_finished(folder)
    (folder / "loss.png").touch()
    assert why(finished) == "a complete run"


def test_a_run_that_somebody_is_writing_is_left_alone(clone: Path, finished) -> None:
    folder, _ = finished
    lease.take(folder)  # by this process, which lives
    (folder / "stop").touch()
    status, _, err = finish(start(clone, "--dataset=python_source", f"--out_dir={folder}"))
    assert status == 2 and f"process {os.getpid()} of this machine is writing this run" in err
    assert (folder / "stop").exists() and (folder / "config.json").exists()


def test_the_loss_is_judged_by_the_one_table(tmp_path: Path) -> None:
    for dataset, expected in quickstart.EXPECTED.items():
        good = Run(tmp_path, val=[ValPoint(9, expected.loss)])
        bad = Run(tmp_path, val=[ValPoint(9, expected.loss + expected.within + 0.01)])
        assert "HIGHER" not in quickstart.verdict(good, dataset, [])
        assert "HIGHER THAN USUAL" in quickstart.verdict(bad, dataset, [])
        told = quickstart.verdict(bad, dataset, ["--max_iters=9"])
        assert "with unchanged settings (yours: --max_iters=9)" in told and "HIGHER" not in told
    assert "not known" in quickstart.verdict(Run(tmp_path), "python_source", [])
    assert set(quickstart.EXPECTED) == {quickstart.WITH_NETWORK, quickstart.WITHOUT_NETWORK}


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--dataset=openwebtext"], "invalid choice"),
        (["--dataset=python_source", "--max_iter=3"], "unknown flag --max_iter; did you mean '--max_iters'"),
        (["--dataset=python_source", "--n_embd=30"], "--n_head=4"),
    ],
)
def test_bad_flags_are_one_line_and_status_2(clone: Path, flags: list[str], told: str) -> None:
    status, _, err = finish(start(clone, *flags, f"--out_dir={clone}/out/bad"))
    assert status == 2 and err.startswith("error: ") and err.count("\n") == 1 and told in err
    assert not (clone / "out" / "bad").exists()


def test_a_mirror_that_lacks_the_text_is_a_mistake_not_a_missing_network(clone: Path, tmp_path: Path) -> None:
    done = run_kit.run(
        clone,
        tmp_path / "data",
        "-m",
        "tools.quickstart",
        env=run_kit.environment(tmp_path / "data", DATA_MIRROR=str(tmp_path)),
    )
    assert done.returncode == 2 and "DATA_MIRROR" in done.stderr and "Traceback" not in done.stderr


# ---- children: signals become a polite end ---------------------------------------------------------------------------

SAVES_ON_SIGTERM = (
    "import signal, sys, time\n"
    "signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))\n"
    "open(sys.argv[1], 'w').close()\n"
    "time.sleep(60)\n"
)
DRIVER = (
    "import sys; from tools.children import Children, Interrupted\n"
    "try:\n    Children().run([sys.executable, '-c', sys.argv[1], sys.argv[2]])\n"
    "except Interrupted as stopped:\n    print(f'stopped by {stopped}')\n"
)


@pytest.mark.parametrize(
    ("number", "name"), [(signal.SIGINT, "Ctrl-C"), (signal.SIGTERM, "SIGTERM"), (signal.SIGHUP, "SIGHUP")]
)
def test_a_signal_ends_the_child_with_sigterm(tmp_path: Path, number: int, name: str) -> None:
    ready = tmp_path / "ready"
    command = [sys.executable, "-c", DRIVER, SAVES_ON_SIGTERM, str(ready)]
    driver = subprocess.Popen(
        command, cwd=run_kit.ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    while not ready.exists():
        time.sleep(0.02)
    driver.send_signal(number)
    out, err = driver.communicate(timeout=600)
    assert out == f"stopped by {name}\n" and "once more to stop without saving" in err


SAVES_SLOWLY = SAVES_ON_SIGTERM.replace(
    "sys.exit(75)", "(time.sleep(0.5), print('saved', flush=True), sys.exit(75))"
)


@pytest.mark.parametrize(("between", "saved"), [(0.1, True), (1.3, False)])
def test_a_signal_told_twice_at_once_is_one_and_later_a_second(
    tmp_path: Path, between: float, saved: bool
) -> None:
    """`timeout make quickstart`: the group gets SIGTERM, and make passes its own on."""
    ready, wait = tmp_path / "ready", "0.5" if saved else "20"
    child = SAVES_SLOWLY.replace("0.5", wait)
    driver = subprocess.Popen(
        [sys.executable, "-c", DRIVER.replace("{stopped}'", "{stopped}, {stopped.saved}'"), child, str(ready)],
        cwd=run_kit.ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    while not ready.exists():
        time.sleep(0.02)
    driver.send_signal(signal.SIGTERM)
    time.sleep(between)
    driver.send_signal(signal.SIGTERM)
    out, _ = driver.communicate(timeout=600)
    assert out == ("saved\nstopped by SIGTERM, True\n" if saved else "stopped by SIGTERM, False\n")


def test_a_command_that_takes_too_long_is_ended_and_its_error_kept_back(capfd) -> None:
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        children = Children()
        assert children.run_quietly([sys.executable, "-c", "import time; time.sleep(60)"], 0.3) == (None, "")
        fails = "import sys; print('1 of 2', file=sys.stderr); sys.exit('error: it broke')"
        assert children.run_quietly([sys.executable, "-c", fails], 30) == (1, "error: it broke")
        assert capfd.readouterr().err == "1 of 2\n"
        with pytest.raises(Interrupted, match="SIGTERM"):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_bfloat16_is_taken_where_the_cpu_multiplies_it(tmp_path, capsys):
    new, old = tmp_path / "new", tmp_path / "old"
    new.write_text("flags\t: fpu avx512f avx512_bf16 sse\n")
    old.write_text("flags\t: fpu avx2 sse\n")
    if quickstart.fast_arithmetic([], new):  # [] on a machine with a GPU: auto is right there
        assert "--dtype=float32 would not" in capsys.readouterr().out
    else:
        assert Path("/dev/nvidiactl").exists() or Path("/dev/nvidia0").exists() or Path("/dev/dxg").exists()
    assert quickstart.fast_arithmetic([], old) == []
    assert quickstart.fast_arithmetic([], tmp_path / "not there") == []
    assert quickstart.fast_arithmetic(["--dtype=float32"], new) == []
    assert quickstart.fast_arithmetic(["--device=cpu"], new) == []


@pytest.mark.skipif(has_nvidia_driver(), reason="a GPU computes here")
def test_two_threads_compute_only_where_two_cores_are_idle(finished, tmp_path, monkeypatch, capsys):
    nothing, argv = tmp_path / "none", finished[1]
    monkeypatch.setattr(quickstart, "usable_cores", lambda: 4)
    for idle, words in ((3.5, ["--num_threads=2"]), (0.4, ["--num_threads=1"])):
        assert quickstart.threads(nothing, [], lambda idle=idle: idle) == words
    assert "0.4 cores have nothing else to do" in capsys.readouterr().out
    for word in ("--num_threads=3", "--device=cpu"):
        assert quickstart.threads(nothing, [word], lambda: 4.0) == []
    # What goes on is the same run: its flags are.
    assert quickstart.threads(finished[0], [], lambda: 4.0) == []
    write_run(
        finished[0], [*argv, "--num_threads=1"],
        fingerprint=quickstart._fingerprint("letters", str(finished[0].parent / "data")),
    )  # fmt: skip
    assert quickstart.threads(finished[0], [], lambda: 4.0) == ["--num_threads=1"]


def test_idle_cores_are_counted(tmp_path):
    if sys.platform == "linux":
        assert 0.0 <= quickstart.idle_cores() <= 1.2 * os.cpu_count() + 0.2
    assert quickstart.idle_cores(tmp_path / "not there") == float("inf")
    (tmp_path / "odd").write_text("cpu  1 2\n")
    assert quickstart.idle_cores(tmp_path / "odd") == 0.0
