"""The practice cluster itself: it has Engaging's shape, its faults are real, and it leaves nothing behind."""

import os
import pwd
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tools.practice import cluster as practice
from tools.practice.commands import environment
from tools.practice.processes import with_environment

ROOT = Path(__file__).resolve().parents[2]


def practice_command(*args: object, **kwargs: object) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "tools.practice", *map(str, args)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        **kwargs,
    )


@pytest.fixture(scope="module")
def waiting(cluster, tmp_path_factory) -> dict[str, object]:
    """What takes half a minute of SLURM's own time, begun before the other tests: a preemption, and a lost node."""
    folder = tmp_path_factory.mktemp("waiting")
    script, beat = folder / "job.sh", folder / "beat"
    script.write_text(
        "#!/bin/bash\necho attempt $SLURM_RESTART_COUNT\n"
        "srun bash -c 'trap \"echo warned\" TERM; while :; do sleep 0.2; done'\n"
    )
    options = ["-t", "10", "--requeue", "--open-mode=append", f"--output={folder}/log"]
    preempted = cluster.sbatch("-p", "mit_preemptable", "-w", "node6", "--exclusive", *options, script)
    lost = cluster.sbatch(
        *("-p", "pi_lab", "-w", "node4", "--no-requeue", "-o", "/dev/null"),
        *("--wrap", f"while :; do date +%s.%N > {beat}; sleep 0.1; done"),
    )
    cluster.wait_until(beat.exists)
    cluster.kill_slurmd("node4")
    cluster.wait_for(preempted, "RUNNING")
    owner = cluster.sbatch(
        "-p", "pi_lab", "-w", "node6", "--exclusive", "-o", "/dev/null", "--wrap", "sleep 2"
    )
    return {"preempted": preempted, "owner": owner, "lost": lost, "beat": beat}


def test_partitions_and_gpu_types_are_engagings(cluster):
    lines = cluster.run("sinfo", "-h", "-o", "%P|%l|%G").stdout.split()
    assert "mit_normal*|12:00:00|(null)" in lines
    assert "mit_normal_gpu|6:00:00|gpu:h200:8" in lines
    assert "mit_quicktest|15:00|(null)" in lines
    assert "mit_preemptable|2-00:00:00|gpu:a100:4" in lines
    assert not any(line.startswith("mit_normal_gpu") and "h100" in line for line in lines)


def test_jobs_get_their_gpus_and_their_nodes_names(cluster):
    shown = cluster.run(
        "srun",
        "-p",
        "pi_lab",
        "--exclusive",  # another test's job may have the node's first GPU
        "--gres=gpu:h100:2",
        "bash",
        "-c",
        "hostname; echo $CUDA_VISIBLE_DEVICES $SLURM_GPUS_ON_NODE",
    ).stdout.split()
    assert shown[0] in ("node3", "node4")
    assert shown[1:] == ["0,1", "2"]


def test_user_limits_hold_jobs_back_by_name(cluster):
    first = cluster.sbatch("-p", "mit_normal_gpu", "--gres=gpu:2", "-o", "/dev/null", "--wrap", "sleep 60")
    second = cluster.sbatch("-p", "mit_normal_gpu", "--gres=gpu:1", "-o", "/dev/null", "--wrap", "sleep 60")
    third = cluster.sbatch("-p", "mit_preemptable", "--gres=gpu:8", "-o", "/dev/null", "--wrap", "sleep 60")
    try:
        cluster.wait_for(first, "RUNNING")
        for job in (second, third):
            cluster.wait_until(lambda job=job: cluster.job(job)["Reason"] == "QOSMaxGRESPerUser")
    finally:
        cluster.cancel(first, second, third)


@pytest.mark.campaign
def test_second_start_changes_nothing_and_down_leaves_nothing(cluster):
    assert practice.up(cluster.folder) is False
    with tempfile.TemporaryDirectory(prefix="practice-", dir="/tmp") as name:
        Path(name).chmod(0o755)  # munge wants its socket within everybody's reach
        folder = Path(name) / "c"
        assert practice.up(folder)
        env = {**os.environ, **environment(folder)}
        subprocess.run(
            ["sbatch", "-o", "/dev/null", "--wrap", "setsid sleep 321 & sleep 300"], env=env, check=True
        )
        mark = f"SLURM_CONF={folder}/etc/slurm.conf"
        Path(folder / "run" / "slurmdbd.pid").unlink()  # a lost PID file must not save a daemon
        assert practice.down(folder)
        assert with_environment(mark) == []
        assert str(folder) not in Path("/proc/mounts").read_text()
        assert practice.down(folder) is False


def test_strangers_with_another_key_are_refused(cluster):
    """Reaching the port is not enough: without the cluster's munge key nothing is accepted."""
    with tempfile.TemporaryDirectory(prefix="practice-", dir="/tmp") as name:
        text = (cluster.folder / "etc" / "slurm.conf").read_text()
        conf = Path(name) / "slurm.conf"
        conf.write_text(text.replace(f"{cluster.folder}/run/munge.sock", f"{name}/no.sock"))
        done = cluster.run("sbatch", "--wrap", "true", env={"SLURM_CONF": str(conf)}, check=False)
        assert done.returncode != 0


@pytest.mark.parametrize(
    ("folder", "reason"),
    [("/tmp/" + "x" * 70, "60 characters"), ("/tmp/with space", "plain path"), ("/etc", "not empty")],
)
def test_bad_folders_are_one_line(folder, reason, cluster):
    done = practice_command("up", "--dir", folder)
    assert done.returncode == 2
    assert reason in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_without_root_the_reason_is_one_line(cluster):
    nobody = pwd.getpwnam("nobody")
    code = "from tools.practice.packages import obstacle; print(obstacle())"
    with tempfile.TemporaryDirectory(
        prefix="practice-", dir="/tmp"
    ) as copy:  # this checkout may be its owner's alone
        for package in ("tools", "nanogpt"):
            shutil.copytree(
                ROOT / package, Path(copy) / package, ignore=shutil.ignore_patterns("__pycache__")
            )
        subprocess.run(["chmod", "-R", "a+rX", copy], check=True)
        done = subprocess.run(
            ["/usr/bin/env", "python3", "-c", code],
            cwd=copy,
            capture_output=True,
            text=True,
            user=nobody.pw_uid,
            check=False,
        )
    assert "needs root" in done.stdout, done.stderr


@pytest.mark.campaign
def test_a_preempted_job_is_warned_then_requeued(cluster, waiting):
    job = waiting["preempted"]
    cluster.wait_for(waiting["owner"], "COMPLETED", 60)
    cluster.wait_for(job, "RUNNING", 60)
    cluster.wait_until(lambda: "attempt 1" in cluster.log(job))
    assert "warned" in cluster.log(job)
    cluster.cancel(job)


@pytest.mark.campaign
def test_a_lost_node_goes_on_and_a_dead_one_does_not(cluster, waiting):
    beat = waiting["beat"]
    cluster.wait_for(waiting["lost"], "NODE_FAIL", 60)
    before = beat.read_text()
    cluster.wait_until(lambda: beat.read_text() not in (before, ""))  # the old attempt still writes
    cluster.stop_node("node4")
    last = beat.read_text()
    with pytest.raises(AssertionError):
        cluster.wait_until(lambda: beat.read_text() != last, 1)
    cluster.start_node("node4")
