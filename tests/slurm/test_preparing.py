"""Jobs that make data or build: ended by the scheduler they keep what has come, and only those that got on go on."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import DONE

from tests.data.hub_server import REPOSITORY, HubServer, parquet
from tests.slurm.branch_kit import ROOT, bash, program

# Goes on until it is told to end, and leaves a child behind, as a compiler's driver does.
WORK = 'trap "exit 130" TERM; echo >>work; sleep 600 & echo $! >child; while :; do sleep 0.02; done'


@pytest.fixture
def hub() -> Iterator[HubServer]:
    """Four files; one thread has written shards of the first three before it asks for the last, which is held back."""
    texts = [f"{number} words of text " * 1000 for number in range(300)]
    parts = [texts[:100], texts[100:101], texts[101:250], texts[250:]]
    server = HubServer({f"t/{number}.parquet": parquet(part) for number, part in enumerate(parts)})
    server.held = "t/3.parquet"
    yield server
    server.close()


def test_openwebtext_near_its_time_limit_requeues_itself_and_goes_on(cluster, project, hub, mirror) -> None:
    folder = project.data / "t"
    words = ["--name=t", "--shard_tokens=20000", f"--repository={REPOSITORY}", "--num_workers=1"]
    settings = {
        "HF_ENDPOINT": hub.url,
        "HF_HUB_OFFLINE": "0",
        "HF_HOME": str(project.root / "hf"),
        "DATA_MIRROR": str(mirror),
    }
    job = project.sbatch("-p", "pi_lab", "slurm/nanogpt/prepare_openwebtext.sh", *words, **settings)
    cluster.wait_until(lambda: len(list(folder.glob("t_train_*.bin"))) > 2 or cluster.state(job) in DONE)
    assert cluster.state(job) == "RUNNING", cluster.log(job)
    cluster.run("scancel", "--batch", "--signal=USR1", job)
    cluster.wait_until(lambda: cluster.job(job).get("Restarts") == "1", describe=lambda: cluster.log(job))
    hub.held = ""
    assert cluster.wait_for(job) == "COMPLETED", cluster.log(job)
    first, second = cluster.log(job).split(f"--- job {job} attempt 2")
    said = first.splitlines()
    assert "interrupted; the same command goes on where this one stopped" in said
    assert f"--- what has come is kept; job {job} requeues itself and will go on" in said
    assert "shards are there; going on" in second and "t: prepared" in second


def alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize(
    ("work", "limit", "said"),
    [
        (WORK, "00:02:00", "--- what has come is kept; job 7 requeues itself and will go on"),
        (
            WORK.replace("echo >>work; ", ""),
            "00:02:00",
            "--- out of time before anything new was in .: submit it again",
        ),
        (WORK.replace("echo >>work; ", ""), "1-00:00:00", "--- what has come is kept; job 7 requeues itself"),
        ("exit 69", "00:02:00", ""),
    ],
    ids=["got on", "got nowhere", "got nowhere but was preempted", "failed by itself"],
)
def test_only_work_that_gets_on_starts_again(tmp_path, work, limit, said) -> None:
    """Else a time limit that is too short would keep a job in the queue for ever. A stand-in for the controller."""
    show = f"JobState=RUNNING BatchFlag=1 TimeLimit={limit}"
    requeue = f'echo "$@" >>{tmp_path}/asked; kill -9 $PPID'
    answers = f'case $1 in show) echo " {show} " ;; requeue) {requeue} ;; esac'
    program(tmp_path / "bin", "scontrol", f"#!/bin/sh\n{answers}\n")
    # What fails by itself gets no signal: one in time would be heard first.
    tell = '(until [ -e ready ]; do sleep 0.02; done; kill -USR1 "$$") &' if said else ":;"
    work = f"work() {{ : >ready; {work}; }}"
    libraries = 'set -euo pipefail; . "$1/slurm/lib/common.sh"; . "$1/slurm/lib/requeue.sh"'
    command = f"{libraries}; {work}; {tell} go_on_later . work work"
    done = bash("-c", command, "x", ROOT, env={"SLURM_JOB_ID": "7"}, cwd=tmp_path, path=str(tmp_path / "bin"))
    assert said in done.stdout, done
    child = tmp_path / "child"
    while child.exists() and alive(int(child.read_text())):  # for ever, where only its parent was told
        time.sleep(0.02)
    requeued = (tmp_path / "asked").exists()
    assert requeued == ("requeues itself" in said), done
    if not requeued:
        assert done.returncode == (130 if said else 69)
