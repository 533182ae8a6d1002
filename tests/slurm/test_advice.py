"""What `engaging` says of a real SLURM without starting a run: plan, site init, doctor, watch."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

from tests.slurm.test_launch import ROOT
from tests.slurm.test_launch import checkout as checkout  # a fixture
from tests.slurm.test_launch import engaging as engaging  # a fixture
from tools.args import clock, parse_minutes


def test_plan_recommends_what_can_start(cluster, engaging):
    never = engaging(
        "plan", "speedrun", "--gpus", 8, "--partition", "mit_normal_gpu,mit_preemptable", check=False
    )
    assert never.returncode == 1 and "cannot start here" in never.stdout and "What can: " in never.stdout
    waves = json.loads(engaging("plan", "gpt2", "--gpus", 1, "--seeds", 12, "--time", "6h", "--json").stdout)
    heading = engaging("plan", "gpt2", "--gpus", 1, "--time", "4:00", "--partition", "mit_normal_gpu").stdout
    assert heading.startswith("gpt2: 1 GPU, 4 minutes at most\n") and "--time 00:04:00" in heading  # case C4
    rows = {row["partition"]: row for row in waves["options"] if row["ok"] and row["gpu_type"] == "h200"}
    assert rows["mit_normal_gpu"]["waves"] == 6 and rows["mit_preemptable"]["waves"] == 3
    assert rows["mit_preemptable"]["gpu_hours"] == 72 and waves["recommended"]["command"].startswith(
        "engaging launch gpt2"
    )


def test_a_time_is_what_slurm_reads(cluster):
    """Case C4: the launcher's own reading of each form against the job's limit."""
    for text in ("4:00", "90", "1-00", "1:30:00", "1-12:30"):
        job = cluster.sbatch("-p", "pi_lab", "-H", f"--time={text}", "-o", "/dev/null", "--wrap", "true")
        limit = cluster.job(job)["TimeLimit"]
        cluster.cancel(job)
        assert clock(parse_minutes(text)) == limit, text


def test_site_init_asks_the_cluster(cluster, engaging, checkout):
    text = engaging("site", "init", "here", "--print").stdout
    assert "[partitions.mit_preemptable]" in text and 'gpu_types = ["h200", "h100", "a100", "l40s"]' in text
    engaging("site", "init", "here")
    assert (checkout / "slurm" / "sites" / "here.toml").read_text() == text
    again = engaging("site", "init", "here", check=False)
    assert again.returncode == 2 and "--overwrite" in again.stderr


def test_doctor_names_account_limits_and_a_grace_that_is_too_short(cluster, engaging, checkout):
    """15 s on this cluster, and a run here that took 20 s to save."""
    run = checkout / "out" / "slow"
    run.mkdir(parents=True)
    (run / "metrics.jsonl").write_text('{"event": "save", "step": 9, "seconds": 20.0}\n')
    found = json.loads(engaging("doctor", "--json", check=False).stdout)["findings"]
    text = {(f["check"], f["level"]): f["text"] for f in found}
    assert any("mit_general" in f["text"] for f in found if f["check"] == "account"), text
    assert any("mit_preemptable: at most" in f["text"] for f in found if f["check"] == "limits")
    said = (
        "15 s from SIGTERM to SIGKILL (10 s grace, KillWait 5 s), NOT enough: the runs here need up to 20.0 s"
    )
    (warning,) = (f for f in found if f["check"] == "preempt" and f["level"] == "warn")
    assert warning["text"].startswith(f"mit_preemptable: preempted jobs are requeued; {said}")
    assert "--save_minutes" in warning["fix"]
    assert said in engaging("plan", "gpt2", "--partition", "mit_preemptable").stdout


@pytest.mark.campaign
def test_watch_asks_squeue_at_most_once_in_ten_seconds(cluster, engaging, checkout, tmp_path):
    """The live screen on a terminal of its own for 6 s, with a squeue that counts; q ends it."""
    import pty

    real, fake, count = (
        shutil.which("squeue", path=cluster.env.get("PATH")),
        tmp_path / "bin",
        tmp_path / "count",
    )
    fake.mkdir()
    (fake / "squeue").write_text(f'#!/bin/bash\necho x >>"{count}"\nexec "{real}" "$@"\n')
    (fake / "squeue").chmod(0o755)
    job = cluster.sbatch("-p", "mit_quicktest", "-J", "watched", "--wrap", "sleep 30", cwd=checkout)
    cluster.wait_for(job, "RUNNING")
    env = {
        **cluster.env,
        "PATH": f"{fake}:{cluster.env['PATH']}",
        "PYTHONPATH": str(ROOT),
        "TERM": "xterm",
        "COLUMNS": "90",
    }
    master, slave = pty.openpty()
    child = subprocess.Popen(
        [sys.executable, "-m", "tools", "watch", job],
        cwd=checkout,
        env=env,
        stdin=slave,
        stdout=slave,
        stderr=slave,
    )
    os.close(slave)
    screen, end = b"", time.monotonic() + 6
    os.set_blocking(master, False)
    while time.monotonic() < end:
        try:
            screen += os.read(master, 65536)
        except BlockingIOError:
            time.sleep(0.05)
    os.write(master, b"q")
    try:
        assert child.wait(20) == 0
    finally:
        if child.poll() is None:
            child.send_signal(signal.SIGKILL)
        cluster.cancel(job)
        os.close(master)
    assert b"RUNNING" in screen and job.encode() in screen
    assert len(count.read_text().split()) == 1
