"""What this cluster counts and takes: cores by the GPU, GPUs that are asked for twice, arrays over its limits."""

import os

import pytest

from nanogpt.common.errors import UserError
from tools import cli
from tools.site import slurm
from tools.site.cluster import ask_cluster
from tools.site.why import explain

SPEEDRUN = "slurm/modded/train_speedrun.sh"
SHAKESPEARE = "slurm/nanogpt/train_shakespeare.sh"
WAITING = ("-pmit_normal_gpu", "-t5", "-o/dev/null", "--wrap", "true")


def test_why_counts_cores_by_the_gpu_and_names_the_limit_that_never_passes(cluster, monkeypatch):
    """SLURM names one limit of several, and shows one core for a job that asks for eight by the GPU."""
    cores = cluster.sbatch("--gres=gpu:h200:2", "--cpus-per-gpu=20", *WAITING)
    gpus = cluster.sbatch("--gres=gpu:h200:8", "--cpus-per-gpu=8", *WAITING)
    try:
        for job in (cores, gpus):
            cluster.wait_until(lambda job=job: cluster.job(job)["Reason"].startswith("QOSMax"), 60)
        monkeypatch.setattr(os, "environ", {**os.environ, **cluster.env})
        facts = ask_cluster()
        rows = [slurm.fields(cluster.scontrol("show", "job", "-o", job)) for job in (cores, gpus)]
        many, never = (explain(row, facts) for row in rows)
    finally:
        cluster.cancel(cores, gpus)
    assert "it asks for 40 cores, 'mit_normal_gpu' allows 32" in many.text, many
    assert many.remedy.startswith("--cpus-per-gpu=16 "), many
    assert "it asks for 8, 'mit_normal_gpu' allows 2" in never.text, never
    assert "Gres=gpu:h200:2 " in never.remedy, never


def test_a_count_beside_the_scripts_own_is_told(cluster, project):
    """SLURM takes --gres, as in every header here, and drops --gpus-per-node without a word."""
    job = project.sbatch(
        "-ppi_lab", "--gres=gpu:a100:1", "--gpus-per-node=a100:2", "--cpus-per-gpu=1", "--mem-per-gpu=1G",
        SPEEDRUN, "--out_dir=out/twice", "--steps=1", "--dataset=tiny", SPEEDRUN_TRAINER=project.standin,
    )  # fmt: skip
    assert cluster.wait_for(job) in ("COMPLETED", "FAILED")
    assert (
        "--gpus-per-node=a100:2: SLURM takes the script's --gres instead, so this job has 1"
        in cluster.log(job)
    )


@pytest.mark.parametrize("variable", ["SBATCH_GPUS_PER_NODE", "SBATCH_GPUS", "SBATCH_GRES"])
def test_sbatchs_variables_for_gpus_are_obeyed_by_both_doors(cluster, project, variable):
    asked = {variable: "gpu:h200:2" if variable == "SBATCH_GRES" else "h200:2"}
    submitted = project.submit(SHAKESPEARE, "--hold", **asked)
    line = f"source ./activate_env.sh >/dev/null; sbatch --parsable --hold {SHAKESPEARE}"
    typed = cluster.run("bash", "-c", line, env={**project.env, **asked}, cwd=project.root).stdout.strip()
    try:
        for job in (submitted, typed):
            assert cluster.job(job)["TresPerNode"].strip() == "gres:gpu:h200:2"
    finally:
        cluster.cancel(submitted, typed)


def test_two_nodes_without_a_type_may_differ_and_are_told_so(cluster, project):
    line = "source ./activate_env.sh >/dev/null; sbatch --parsable --hold -N2 {} slurm/nanogpt/train_gpt2.sh"
    for gres, said in (("--gres=gpu:2", True), ("--gres=gpu:h200:2", False), ("--gres=gpu:2 -N1", False)):
        done = cluster.run("bash", "-c", line.format(gres), env=project.env, cwd=project.root)
        cluster.cancel(done.stdout.strip())
        assert ("mit_preemptable has several: the nodes may differ" in done.stderr) == said, (
            gres,
            done.stderr,
        )
        assert ("the pace; --gres=gpu:h200:2\n" in done.stderr) == said


@pytest.mark.parametrize(
    ("tasks", "said"),
    [
        (1001, "indices of --array stay below 1001 on this cluster"),
        (600, "over a limit of yours, such as that of jobs in the queue"),
    ],
)
def test_an_array_over_a_limit_is_refused_by_the_scripts(project, tasks, said):
    done = project.bash(SHAKESPEARE, f"--array=0-{tasks}", check=False)
    assert done.returncode == 2 and "submitted" not in done.stdout, done
    assert said in done.stderr.splitlines()[-1], done.stderr


def test_an_array_over_the_limit_is_refused_by_launch(cluster, monkeypatch):
    for name, value in cluster.env.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(
        UserError, match=r"^--seeds=1200: an array of this cluster holds 1000 \(MaxArraySize\)"
    ):
        cli.main(["launch", "gpt2", "--seeds", "1200", "--partition", "pi_lab", "--dry-run"])
