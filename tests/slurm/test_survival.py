"""Runs that are disturbed: preempted, out of time, lost with their node, broken. Losses equal the undisturbed run's."""

import time
from datetime import datetime

import beside as scenes
import pytest
from beside import LONG, SHAKESPEARE, stop


def compare(disturbed: dict[int, float], undisturbed: dict[int, float], at_least: int) -> None:
    common = disturbed.keys() & undisturbed.keys()
    assert len(common) >= at_least, (len(disturbed), len(undisturbed))
    assert set(range(max(common) + 1)) == common, "steps are missing"
    assert {step: disturbed[step] for step in common} == {step: undisturbed[step] for step in common}


@pytest.fixture(scope="module")
def standin(project) -> dict[str, str]:
    """The setting that puts the stand-in behind the speedrun's script, whose data is there."""
    folder = project.data / "fineweb10B"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "fineweb_train_000001.bin").touch()
    return {"SPEEDRUN_TRAINER": project.standin}


@pytest.fixture(scope="module")
def undisturbed(cluster, project) -> dict[int, float]:
    """The losses of the run that nothing happens to."""
    return scenes.undisturbed(cluster, project, 400)


@pytest.fixture(scope="module")
def at_once(cluster) -> str:
    """A partition whose jobs are preempted without grace: SIGTERM, then SIGKILL after KillWait."""
    options = ("Nodes=node[1-8]", "PriorityTier=1", "MaxTime=1:00:00", "PreemptMode=REQUEUE", "GraceTime=0")
    cluster.scontrol("create", "PartitionName=at_once", *options)
    return "at_once"


@pytest.fixture(scope="module")
def lost(cluster, project) -> tuple[str, str]:
    """(job, node) of a run whose slurmd is gone: SLURM takes a while to notice, and meanwhile other tests run."""
    others = "--exclude=node3,node4,node5,node6"  # where the other tests' jobs are
    options = ["-p", "pi_lab", others, "--gres=gpu:1", "--cpus-per-gpu=2", "--mem-per-gpu=4G"]
    job = project.sbatch(*options, SHAKESPEARE, *LONG, "--out_dir=out/lost", "--save_interval=50")
    project.wait_for_step(job, "lost", 30)
    (node,) = cluster.nodes_of(job)
    cluster.kill_slurmd(node)
    return job, node


def went_on(job: str, losses: dict[int, float], log: str) -> None:
    """Every attempt's lines are there, and every step."""
    assert f"job {job} attempt 1" in log, "the first attempt's log is gone"
    assert f"job {job} attempt 2" in log
    assert "resumed from step_" in log and "Traceback" not in log
    assert set(range(max(losses) + 1)) == set(losses), "steps are missing"


def test_a_preempted_run_goes_on_exactly(beside):
    run, same = beside["preempted"].result(600)
    went_on(*run)
    compare(run[1], same, 100)


@pytest.mark.campaign
def test_preempted_runs_go_on_exactly(cluster, project, undisturbed, at_once, lost):
    """One rank and two ranks, with a warning and without.

    The one without a warning saves after every step, so that its end finds it inside a save most of the time.
    """
    places = {
        "preempted-1": (1, "node3", "mit_preemptable", 0),
        "preempted-2": (2, "node6", "mit_preemptable", 0),
        "preempted-at-once": (1, "node4", at_once, 1),
    }
    for name, run in scenes.preempt(cluster, project, places).items():
        went_on(*run)
        if places[name][0] == 1:
            compare(run[1], undisturbed, 100)


@pytest.fixture(scope="module")
def steady(cluster, project) -> str:
    """A run that is there for ten seconds and more before the controller goes: by then that has written it down.

    A job that the controller has not yet written down is forgotten, and its number given out again.
    """
    job = project.sbatch("-p", "pi_lab", SHAKESPEARE, *LONG, "--out_dir=out/controller")
    project.wait_for_step(job, "controller", 5)
    return job


@pytest.mark.campaign
def test_scancel_is_final(cluster, project):
    job = project.sbatch("-p", "pi_lab", SHAKESPEARE, *LONG, "--out_dir=out/cancelled")
    project.wait_for_step(job, "cancelled", 5)
    cluster.cancel(job)
    cluster.wait_for(job, "CANCELLED")
    time.sleep(1)
    assert cluster.state(job) == "CANCELLED"
    assert cluster.job(job)["Restarts"] == "0"


@pytest.mark.campaign
def test_a_lost_node_does_not_spoil_the_run(cluster, project, undisturbed, lost):
    """The controller gives the job to another node, while the old attempt goes on writing until it is fenced off."""
    job, node = lost
    try:
        cluster.wait_until(lambda: cluster.job(job)["Restarts"] == "1")
        cluster.wait_until(lambda: "attempt 2" in cluster.log(job))
        before = max(project.training(job, "lost"))
        project.wait_for_step(job, "lost", before + 60, 120)
        assert cluster.nodes_of(job) != [node]
        stop(cluster, project, job, "lost")
    finally:
        cluster.stop_node(node)
        cluster.start_node(node)
    compare(project.training(job, "lost"), undisturbed, 60)


def test_an_array_task_requeues_itself_alone(beside):
    assert [len(attempts) for attempts in beside["array_tasks"].result(600)] == [1, 1, 2]


@pytest.mark.campaign
def test_a_signal_before_the_trainer_listens_loses_nothing(cluster, project, standin):
    """Told to save while it still imports torch, it cannot: the job requeues all the same."""
    deaf = project.root / "deaf.py"
    deaf.write_text(
        "import os, runpy, time\n"
        "if os.environ.get('SLURM_RESTART_COUNT', '0') == '0':\n"
        "    print('deaf', flush=True); time.sleep(60)\n"
        f"runpy.run_path({project.standin!r}, run_name='__main__')\n"
    )
    options = ["-p", "pi_lab", "--gres=gpu:1", "--cpus-per-gpu=1", "--mem-per-gpu=1G"]
    job = project.sbatch(
        *options, "slurm/modded/train_speedrun.sh", "--out_dir=out/deaf", SPEEDRUN_TRAINER=str(deaf)
    )
    cluster.wait_until(lambda: "deaf" in cluster.log(job))
    cluster.run("scancel", "--batch", "--signal=USR1", job)
    assert cluster.wait_for(job, ("COMPLETED", "FAILED"), timeout=600) == "COMPLETED", cluster.log(job)
    assert "ended before it could save" in cluster.log(job)
    assert cluster.job(job)["Restarts"] == "1"


def test_a_run_that_breaks_at_once_stops_after_three_times(cluster, project, slow_jobs):
    job = slow_jobs["breaks"]
    assert cluster.wait_for(job, timeout=600) == "FAILED"
    assert cluster.log(job).count("this trainer broke") == 3
    assert "3 times in a row without a new checkpoint" in cluster.log(job)
    assert cluster.job(job)["ExitCode"] == "1:0"


def test_the_time_limit_is_a_chain_of_attempts(cluster, project, slow_jobs):
    job = slow_jobs["time"]
    assert cluster.wait_for(job, timeout=600) == "COMPLETED", cluster.log(job)
    attempts = (project.root / "out/time/attempts").read_text().splitlines()
    # An attempt without a line says why: cut before its trainer listened, or waiting for another test's preparation.
    log = cluster.log(job)
    unheard = log.count("ended before it could save") + log.count("goes back into the queue behind it")
    assert len(attempts) + unheard == int(cluster.job(job)["Restarts"]) + 1 and len(attempts) >= 2
    assert sorted(project.training(job, "time")) == list(range(1, 46))
    rows = [row[0] for row in cluster.sacct(job, "State", "-D")]
    assert "REQUEUED" in rows


@pytest.mark.campaign
def test_the_chain_ends_at_max_restarts(cluster, project, slow_jobs):
    job = slow_jobs["chain"]
    assert cluster.wait_for(job, ("FAILED", "COMPLETED", "TIMEOUT"), timeout=600) == "FAILED"
    assert cluster.job(job)["ExitCode"] == "75:0"
    assert "has restarted 1 times (MAX_RESTARTS): submit it again" in cluster.log(job)


@pytest.mark.campaign
def test_the_controller_may_go_and_come_back(cluster, project, undisturbed, steady):
    job = steady
    began = datetime.fromisoformat(cluster.job(job)["StartTime"])
    time.sleep(max(0.0, 10 - (datetime.now() - began).total_seconds()))
    cluster.kill_slurmctld()
    try:
        done = project.bash(SHAKESPEARE, check=False)
        assert done.returncode == 2
        assert "SLURM does not answer" in done.stderr
    finally:
        cluster.start_slurmctld()
    project.wait_for_step(job, "controller", max(project.training(job, "controller")) + 5)
    stop(cluster, project, job, "controller")
    compare(project.training(job, "controller"), undisturbed, 5)
