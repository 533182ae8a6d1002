"""The watch screen as text, its thrift with squeue, and doctor's findings."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from nanogpt.common.errors import UserError
from tools.launch.presets import NAMED, resolve
from tools.runs import read_run
from tools.site import checks_gpu, checks_machine, gpu_probe, watch
from tools.site.doctor import Finding, run_checks
from tools.site.slurm import Job


def a_run(path, steps=50):
    path.mkdir(parents=True)
    lines = [
        json.dumps(
            {
                "event": "train",
                "step": s,
                "loss": 4 - s / 50,
                "ms": 100.0,
                "tokens_per_s": 5e5,
                "mfu": 0.41,
                "lr": 1e-3,
            }
        )
        for s in range(steps)
    ]
    lines.append(json.dumps({"event": "val", "step": steps - 1, "val_loss": 3.2}))
    (path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    (path / "config.json").write_text('{"config": {"max_iters": 649}}')
    (path / "log.txt").write_text("".join(f"line {n}\n" for n in range(100)))
    return path


def test_the_screen_says_state_step_loss_eta_and_the_logs_tail(tmp_path):
    view = watch.View(job="12", run_path=a_run(tmp_path / "my-run"))
    view.queue = [
        Job("12", "12", "RUNNING", "None", "gpu", "my-run", {"h200": 4}, limit_minutes=360, node_list="n1")
    ]
    view.gpus = watch.gpu_lines("0, 97, 70000, 81559, 61\nbroken\n1, [N/A], 1, 2, 3\n")
    watch.read_files(view)
    lines = [text for _, text in watch.lines_of(view, 100, 30)]
    text = "\n".join(lines)
    for part in (
        "job 12  my-run",
        "RUNNING",
        "step 49 of 649",
        "loss 3.0200",
        "val 3.2000",
        "ETA 1 min",
        "MFU 41.0%",
        "line 99",
    ):
        assert part in text, text
    assert sum(line.startswith("GPU") for line in lines) == 1 and "97 %" in text
    assert len(lines) <= 29 and max(map(len, lines)) <= 99


@pytest.mark.parametrize(("width", "height"), [(20, 5), (40, 10), (300, 100)])
def test_the_screen_fits_any_terminal(tmp_path, width, height):
    view = watch.View(run_path=a_run(tmp_path / "r"))
    watch.read_files(view)
    lines = watch.lines_of(view, width, height)
    assert len(lines) < height and all(len(text) < width for _, text in lines)


def test_a_file_system_that_hangs_stops_the_figures_and_not_the_screen():
    view, release = watch.View(), threading.Event()
    view.files_at = time.monotonic() - 60
    reader = watch.Reader(0.01, release.wait)
    reader.start()
    time.sleep(0.05)
    began = time.monotonic()
    text = "\n".join(line for _, line in watch.lines_of(view, 80, 20))
    assert time.monotonic() - began < 0.1 and "60 s old" in text
    reader.stopped.set()
    release.set()
    reader.join(2)
    assert not reader.is_alive()


def test_a_reader_survives_errors_and_keeps_its_pace():
    calls = []

    def work():
        calls.append(time.monotonic())
        raise OSError("stale file handle")

    reader = watch.Reader(0.1, work, first=0.1)
    began = time.monotonic()
    reader.start()
    while len(calls) < 4 and time.monotonic() < began + 60:
        time.sleep(0.02)
    reader.stopped.set()
    reader.join(60)
    times = [began, *calls]
    assert (
        len(calls) >= 4 and min(after - before for before, after in zip(times, calls, strict=False)) >= 0.09
    )
    assert watch.SQUEUE_EVERY_S >= 10


def test_spark():
    assert watch.spark([1.0, 2.0, 3.0], 10) == "▁▄█"
    assert len(watch.spark(list(map(float, range(1000))), 40)) <= 40
    assert watch.spark([], 10) == "" and watch.spark([2.0], 10) == "▁"


def test_watch_without_a_terminal_prints_once(run_python, tmp_path):
    run_dir = a_run(tmp_path / "r")
    done = run_python("-m", "tools", "watch", str(run_dir))
    assert done.returncode == 0 and "step 49 of 649" in done.stdout, done.stderr
    assert read_run(run_dir).step == 49


def test_a_job_that_no_run_names_is_not_shown_another_jobs_run(tmp_path, monkeypatch):
    run_path = a_run(tmp_path / "out" / "somebody-elses")
    monkeypatch.setattr(watch, "checkout", lambda: tmp_path)
    unknown, newest = watch.View(), watch.View()
    watch.find_target(unknown, "123")
    assert unknown.job == "123" and unknown.run_path is None
    watch.find_target(newest, None)
    assert newest.run_path == run_path


def test_a_check_that_breaks_is_a_finding():
    def broken(_):
        raise RuntimeError("x")

    found = run_checks({"a": broken, "b": lambda _: [Finding("b", "ok", "fine")]}, None)
    assert [(f.check, f.level) for f in found] == [("a", "warn"), ("b", "ok")]


def test_doctor_json_and_a_missing_environment(run_python, tmp_path):
    env = {
        "HOME": str(tmp_path),
        "ENV_PATH": str(tmp_path / "none"),
        "HF_ENDPOINT": "http://127.0.0.1:9",
        "PATH": "/usr/bin:/bin",
    }
    done = run_python("-m", "tools", "doctor", "--json", env=env)
    facts = {finding["check"]: finding for finding in json.loads(done.stdout)["findings"]}
    assert facts["hub"]["level"] == "warn" and facts["hub"]["fix"]
    assert facts["logs"]["level"] == "ok" and facts["quota"]["level"] == "ok"
    for finding in facts.values():
        assert finding["level"] in ("ok", "skip") or finding["fix"], finding


def test_a_hub_that_may_not_be_asked_is_not(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    (silent,) = checks_machine.hub(tmp_path)
    assert silent.level == "warn" and "does not answer" in silent.text and "DATA_MIRROR" in silent.fix
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (unasked,) = checks_machine.hub(tmp_path)
    assert (unasked.level, unasked.text) == ("skip", "http://127.0.0.1:9 is not asked: HF_HUB_OFFLINE is set")


def test_a_slow_gpu_is_named():
    assert checks_gpu.judge(0, {"name": "NVIDIA H200", "tflops": 700, "gb_per_s": 4300}).level == "ok"
    slow = checks_gpu.judge(1, {"name": "NVIDIA H200", "tflops": 200, "gb_per_s": 4300})
    assert slow.level == "warn" and "exclude" in slow.fix
    assert checks_gpu.judge(0, {"name": "NVIDIA L40S", "tflops": 200, "gb_per_s": 700}).level == "ok"
    assert checks_gpu.judge(0, {"name": "New GPU", "tflops": 1, "gb_per_s": 1}).level == "ok"


def test_the_all_reduce_names_the_rank_that_is_killed_in_it(root, tmp_path):
    probe = root / "tools" / "site" / "gpu_probe.py"
    command = [sys.executable, str(probe), "reduce", "gloo", "2", "600"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env={**os.environ, "TMPDIR": str(tmp_path)}, **pipes) as running:
        said = running.stderr.readline()
        ranks = [int(pid) for pid in re.findall(r"is process ([0-9]+)", said)]
        assert len(ranks) == 2, said
        (folder,) = tmp_path.glob("engaging-nccl-*")
        while gpu_probe.read_note(folder, 1)["round"] < 20:
            assert running.poll() is None, running.stderr.read()
            time.sleep(0.05)
        os.kill(ranks[1], signal.SIGKILL)
        out, errors = running.communicate(timeout=600)
    assert running.returncode == 1 and not out
    assert re.search(rf"rank 1 \(process {ranks[1]}\) was ended by SIGKILL in round [0-9]+", errors), errors
    assert not any(Path(f"/proc/{pid}").exists() for pid in ranks)


def test_who_stands_still_is_the_rank_behind_the_others():
    class Rank:
        pid = 4711

    notes = [{"doing": "reducing", "round": 9}, {"doing": "reducing", "round": 8}]
    assert gpu_probe.stuck(notes, [Rank, Rank]).startswith("rank 1 (process 4711, reducing) stands still")
    assert "link" in gpu_probe.stuck([notes[0], notes[0]], [Rank, Rank])


def test_a_slow_link_and_missing_gpus_are_findings(monkeypatch):
    facts = {"world": 2, "bus_gb_per_s": 300.0, "rounds": 900, "name": "NVIDIA H200"}
    assert checks_gpu.judge_reduce(facts).level == "ok"
    assert checks_gpu.judge_reduce({**facts, "bus_gb_per_s": 20.0}).level == "warn"
    assert checks_gpu.judge_reduce({**facts, "bus_gb_per_s": 20.0, "name": "NVIDIA L40S"}).level == "ok"
    monkeypatch.setattr(checks_gpu, "local_gpus", lambda: 4)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert "--gpus=2: 1 GPU can" in checks_gpu.all_reduce(2, 1).text
    assert checks_gpu.all_reduce(0, 1).level == "skip"


@pytest.mark.parametrize(
    ("line", "share"),
    [
        ("home 190G 200G", 0.95),
        ("/home/u  180.0 GB / 200 GB  90%", 0.9),
        ("Filesystem used limit", None),
        ("x 5 0", None),
    ],
)
def test_quota_lines(line, share):
    assert checks_machine.quota_share(line) == share


def test_quota_rows_by_field():
    row = "srv:/home 1900000* 2000000 2100000 6days 990 0 1000 0"
    assert checks_machine.quota_row(row) == [("blocks", 0.95), ("inodes", 0.99)]
    assert checks_machine.quota_row("Disk quotas for user x (uid 1):") == []


def test_file_system_of_a_folder_that_is_not_there():
    mounts = "/dev/sda / ext4 rw 0 0\nsrv:/h /home nfs4 rw 0 0\ntmpfs /home/u\\040x tmpfs rw 0 0\n"
    assert checks_machine.file_system(Path("/home/nobody/.triton"), mounts) == "nfs4"
    assert checks_machine.file_system(Path("/home/u x/y"), mounts) == "tmpfs"
    assert checks_machine.file_system(Path("/homes/y"), mounts) == "ext4"


@pytest.mark.parametrize(("cuda", "driver"), [("13.0", 580), ("12.8", 525), ("11.8", 450)])
def test_driver_for_cuda(cuda, driver):
    assert checks_machine.minimum_driver(cuda) == driver


def test_presets_by_every_spelling(root):
    assert resolve(root, "gpt2") is NAMED["gpt2"]
    for name in ("quickstart", "config/quickstart.py", "nanogpt/config/quickstart.py", "./config/quickstart"):
        assert resolve(root, name).words == ("quickstart",)
    for name in ("medium", "presets/medium.py", "modded_nanogpt/presets/medium.py"):
        found = resolve(root, name)
        assert (found.trainer, found.words) == ("modded_nanogpt.train_gpt", ("medium",))
        assert "1, 2, 4, 8" in found.refuse_gpus(3)
    with pytest.raises(UserError, match="did you mean 'medium'"):
        resolve(root, "config/medium.py")
