"""Every script on the cluster, through both doors, with GPUs in all forms: real training of a tiny model."""

import json
import re

import pytest
from conftest import TINY

SHAKESPEARE = "slurm/nanogpt/train_shakespeare.sh"
SPEEDRUN = "slurm/modded/train_speedrun.sh"


def finished(cluster, job: str, timeout: float = 600) -> str:
    """The job's log, once it has ended well."""
    state = cluster.wait_for(job, timeout=timeout)
    assert state == "COMPLETED", f"{state}\n{cluster.log(job)}"
    return cluster.log(job)


@pytest.fixture(scope="module")
def standin(project) -> dict[str, str]:
    """The settings that put the stand-in behind the speedrun's script, whose data is there: no torch but torchrun's."""
    (project.data / "doors" / "fineweb10B").mkdir(parents=True)
    (project.data / "doors" / "fineweb10B" / "manifest.json").touch()
    return {"SPEEDRUN_TRAINER": project.standin, "DATA_ROOT": str(project.data / "doors")}


def test_both_doors_and_every_form_of_gpus(cluster, project, slow_jobs, standin):
    """Jobs at once: bash and sbatch, typed and untyped, one rank and several, fewer than allocated; one trains."""
    steps = "--steps=2"
    jobs = {
        "bash": project.submit(SHAKESPEARE, "--time=9", "--", *TINY, "--max_iters=8", "--out_dir=out/bash"),
        "type": project.submit(
            SPEEDRUN, steps, "--out_dir=out/type", GPU_TYPE="h100", NUM_GPUS="2", TIME="20m", **standin
        ),
        "sbatch": project.sbatch(
            "-p",
            "pi_lab",
            "--gres=gpu:1",
            "--export=ENV_PATH,DATA_ROOT,SPEEDRUN_TRAINER,A=1",  # case G4
            SPEEDRUN,
            "--",
            steps,
            "--out_dir=out/sbatch",
            **standin,
        ),
        "fewer": project.sbatch(
            *("-p", "pi_lab", "--gres=gpu:2", SPEEDRUN, steps, "--out_dir=out/fewer"), NUM_GPUS="1", **standin
        ),
    }
    step = [
        "srun",
        "-p",
        "pi_lab",
        "-c1",
        "--gres=gpu:1",
        "--mem=1G",
    ]  # case G2: sbatch passes on what it was told
    wide = ["-p", "pi_lab", "--gres=gpu:2", "--cpus-per-gpu=4", "--mem-per-gpu=1G"]
    words = [*step, "sbatch", "--parsable", *wide, SPEEDRUN, steps, "--out_dir=out/inside"]
    jobs["inside"] = cluster.run(*words, env={**project.env, **standin}, cwd=project.root).stdout.strip()
    logs = {name: finished(cluster, job, 180) for name, job in jobs.items()}
    assert "rank 1 of 2, 4 threads" in logs["inside"]
    history = project.root / "logs/.attempts" / f"practice-{jobs['inside']}" / "history"
    assert "status=0" in history.read_text()  # it was the job that started the step, which requeues
    assert "1 rank " in logs["bash"]
    assert "rank 0 of 2, 8 threads" in logs["type"] and "rank 1 of 2" in logs["type"]
    assert "rank 0 of 1, 8 threads" in logs["sbatch"] and "rank 1" not in logs["sbatch"]
    assert "rank 0 of 1, 16 threads" in logs["fewer"]
    assert "1 of the job's 2 GPUs" in logs["fewer"]
    job = cluster.job(jobs["type"])
    assert (job["Partition"], job["TimeLimit"]) == ("mit_preemptable", "00:20:00")  # no H100 elsewhere
    assert "gres:gpu:h100:2" in job["TresPerNode"]
    assert (job := cluster.job(jobs["bash"]))["Partition"] == "mit_normal_gpu" and job[
        "TimeLimit"
    ] == "00:09:00"
    assert not list(project.root.rglob("pwned")), "a path was run as a command"


def test_two_nodes_by_sbatch_and_by_srun(beside):
    assert "rank 1 of 2" in beside["on_two_nodes_by_srun"].result(600)
    log, losses, nodes = beside["two_nodes"].result(600)
    assert "2 ranks" in log
    assert "no InfiniBand" in log
    assert len(nodes) == 2
    assert max(losses) == 7


@pytest.mark.campaign
def test_a_mistake_on_two_nodes_ends_both_at_once(cluster, project):
    job = project.sbatch("-p", "pi_lab", "--nodes=2", "--gres=gpu:1", SHAKESPEARE, "--learning_rate=fast")
    assert cluster.wait_for(job, timeout=600) == "FAILED"
    assert cluster.job(job)["ExitCode"] == "2:0"
    assert "--learning_rate=fast" in cluster.log(job)


def test_more_gpus_than_allocated_name_the_command(cluster, project):
    job = project.sbatch("-p", "pi_lab", "--gres=gpu:1", SHAKESPEARE, *TINY, NUM_GPUS="4")
    wrong = project.sbatch("-p", "pi_lab", "--gres=gpu:h100:1", SHAKESPEARE, *TINY, GPU_TYPE="h200")
    for one in (job, wrong):
        assert cluster.wait_for(one) == "FAILED"
        assert cluster.job(one)["ExitCode"] == "2:0"
    assert "NUM_GPUS=4: this job has 1 on each node" in cluster.log(job)
    assert f"sbatch --gres=gpu:4 {SHAKESPEARE}" in cluster.log(job)
    assert "GPU_TYPE=h200: this job was given h100" in cluster.log(wrong)


def test_speedrun_without_data_holds_no_gpu(cluster, project):
    job = project.sbatch("-p", "pi_lab", SPEEDRUN)
    assert cluster.wait_for(job) == "FAILED"
    assert "sbatch slurm/modded/prepare_fineweb.sh" in cluster.log(job)
    out = project.bash(SPEEDRUN, NUM_GPUS="1").stdout
    first, second = re.findall(r"^submitted job (\d+)", out, re.MULTILINE)
    assert f"--dependency=afterany:{first}" in out
    assert cluster.job(first)["Partition"] == "mit_normal"
    assert cluster.wait_for(first) == "FAILED"  # there is no network here, and it says so
    assert "HF_HUB_OFFLINE" in cluster.log(first)
    assert cluster.wait_for(second) == "FAILED"
    assert f"(job {first} did: FAILED, its log: logs/modded-prepare-fineweb-{first}.out)" in cluster.log(
        second
    )


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--dataset=nothing",), "--dataset=nothing: no tokens in"),
        (("--data_root", "/nonexistent"), "DATA_ROOT=/nonexistent: no fineweb10B there; prepare it first"),
    ],
)
def test_a_speedrun_on_tokens_that_are_not_there_is_refused_before_it_queues(project, words, said):
    done = project.bash(SPEEDRUN, *words, check=False, NUM_GPUS="1")
    assert done.returncode == 2 and said in done.stderr and done.stderr.count("\n") == 1, done.stderr


@pytest.mark.parametrize(
    ("script", "partition"),
    [
        ("slurm/nanogpt/prepare_shakespeare.sh", "mit_quicktest"),
        ("slurm/nanogpt/prepare_openwebtext.sh", "mit_normal"),
        ("slurm/modded/prepare_fineweb.sh", "mit_normal"),
    ],
)
def test_preparation_runs_on_cpu_partitions(cluster, project, script, partition):
    job = project.submit(script)
    state = cluster.wait_for(job)
    log = cluster.log(job)
    assert cluster.job(job)["Partition"] == partition
    assert "gres" not in cluster.job(job).get("TresPerNode", "")
    if state == "COMPLETED":
        assert "shakespeare_char" in log
        assert (project.data / "shakespeare_char" / "manifest.json").is_file()
    else:  # no network in the tests: one line says so, and nothing half-made looks finished
        assert log.count("error: ") == 1
        assert "Traceback" not in log
        assert not list(project.data.glob("openwebtext/manifest.json"))


def test_run_sh_takes_its_words_from_a_file(cluster, project):
    """Values reach the trainer byte for byte: they are never script text."""
    values = [
        "a b",
        "x'y",
        'x"y',
        "$(touch pwned)",
        "`touch pwned`",
        "; touch pwned",
        "line\nbreak",
        "*",
        "\\",
        "é☃",
    ]
    words = [project.standin, "--out_dir=out/words", "--steps=1", *(f"--note={value}" for value in values)]
    path = project.root / "words.bin"
    path.write_bytes(b"".join(word.encode() + b"\0" for word in words))
    script = project.root / "job.sh"
    script.write_text("#!/bin/bash\nexec bash slurm/lib/run.sh --args-file words.bin\n")
    job = project.sbatch("-p", "mit_quicktest", "-o", "logs/%x-%j.out", script)
    finished(cluster, job)
    assert json.loads((project.root / "out/words/words").read_text()) == words[1:]
    assert not list(project.root.rglob("pwned"))


def test_hostile_job_names_do_no_harm(cluster, project, standin):
    names = ["a b", "x;touch pwned", "$(touch pwned)", "`id`", "n\ntouch pwned", "-rf", "é☃", "'", '"']
    jobs = [
        project.sbatch(
            *("-p", "pi_lab", "--gres=gpu:1", f"--job-name={name}", "-o", f"logs/hostile-{index}.out"),
            *(SPEEDRUN, "--steps=1", f"--out_dir=out/hostile-{index}"),
            **standin,
        )
        for index, name in enumerate(names)
    ]
    for job in jobs:
        cluster.wait_for(job, timeout=600)
    texts = [(project.root / f"logs/hostile-{index}.out").read_text() for index in range(len(names))]
    assert all("finished" in text for text in texts), texts  # the trainer's own word: it was reached
    assert not list(project.root.rglob("pwned"))


@pytest.mark.campaign
def test_the_speedrun_is_told_to_save_requeued_and_goes_on(cluster, project, speedrun):
    """The trainer itself, at its smallest, on two ranks; begun with the first test here, told before its first step."""
    job, told = speedrun
    told.result(300)
    log = finished(cluster, job, 300)
    assert "--- saved" in log and f"job {job} attempt 2" in log and "resumed from step_" in log, log
    assert "Traceback" not in log, log
    assert len(set(project.training(job, f"speedrun-{job}"))) == 4
