"""What mostly waits for SLURM, run beside the other tests from the first one on (conftest.py), and judged at the end.

Each is a function of the cluster and the project, and returns what its test looks at.
"""

from conftest import TINY, Cluster, Project

SHAKESPEARE = "slurm/nanogpt/train_shakespeare.sh"
SPEEDRUN = "slurm/modded/train_speedrun.sh"
LONG = [*TINY, "--max_iters=100000", "--gradient_accumulation_steps=2", "--batch_size=4"]


def stop(cluster: Cluster, project: Project, job: str, run: str) -> None:
    """Ask the run to stop by its file, as a user does, and see that the job ends and stays ended."""
    (project.root / "out" / run / "stop").touch()
    cluster.wait_for(job, timeout=600)
    assert "stopped by its file 'stop'" in cluster.log(job)


def undisturbed(cluster: Cluster, project: Project, steps: int) -> dict[int, float]:
    """The losses of the run that nothing happens to, of so many steps and more."""
    job = project.sbatch("-p", "pi_lab", SHAKESPEARE, *LONG, "--out_dir=out/undisturbed")
    project.wait_for_step(job, "undisturbed", steps)
    stop(cluster, project, job, "undisturbed")
    return project.training(job, "undisturbed")


def preempt(cluster: Cluster, project: Project, places: dict[str, tuple]) -> dict[str, tuple]:
    """Each run loses its node to the node's owner, and comes back. {run: (GPUs, node, partition, save interval)} ->
    {run: (job, losses, log)}"""
    jobs = {
        run: project.sbatch(
            *("-p", partition, "-w", node, f"--gres=gpu:{gpus}", "--cpus-per-gpu=2", "--mem-per-gpu=4G"),
            *(SHAKESPEARE, *LONG, f"--out_dir=out/{run}", f"--save_interval={save_interval}"),
        )
        for run, (gpus, node, partition, save_interval) in places.items()
    }
    for run, job in jobs.items():
        project.wait_for_step(job, run, 60)
    nodes = ",".join(node for _, node, *_ in places.values())
    alone = ["-w", nodes, f"-N{len(places)}", "--exclusive", "-o", "/dev/null", "--wrap", "sleep 1"]
    owner = cluster.sbatch("-p", "pi_lab", *alone)
    cluster.wait_for(owner, "COMPLETED", 300)
    before = {run: max(project.training(job, run)) for run, job in jobs.items()}
    for run, job in jobs.items():
        project.wait_for_step(job, run, before[run] + 60)
    for run, job in jobs.items():
        stop(cluster, project, job, run)
    return {run: (job, project.training(job, run), cluster.log(job)) for run, job in jobs.items()}


def preempted(cluster: Cluster, project: Project) -> tuple[tuple, dict]:
    """(job, losses, log) of a preempted run, and the losses of the undisturbed one, as far as that went."""
    (run,) = preempt(cluster, project, {"preempted": (1, "node6", "mit_preemptable", 0)}).values()
    return run, undisturbed(cluster, project, max(run[1]))


def array_tasks(cluster: Cluster, project: Project) -> list[list[str]]:
    """The attempts of an array's three tasks, of which the last is told to save before any may go on."""
    (project.data / "array" / "fineweb10B").mkdir(parents=True)
    (project.data / "array" / "fineweb10B" / "manifest.json").touch()
    standin = {"SPEEDRUN_TRAINER": project.standin, "DATA_ROOT": str(project.data / "array")}
    gate = project.root / "gate of the array"
    options = ["-p", "pi_lab", "--gres=gpu:1", "--cpus-per-gpu=1", "--mem-per-gpu=1G", "--array=0-2"]
    job = project.sbatch(*options, SPEEDRUN, "--steps=2", f"--gate={gate}", **standin)
    runs = [project.root / f"out/speedrun-{job}-{task}" for task in range(3)]
    cluster.wait_until(
        lambda: all((run / "metrics.jsonl").exists() for run in runs),
        describe=lambda: "\n".join(cluster.log(f"{job}_{task}") for task in range(3)),
    )
    cluster.run("scancel", "--batch", "--signal=USR1", f"{job}_2")  # the last task's id is the array's own
    cluster.wait_until(lambda: cluster.job(f"{job}_2").get("Restarts") == "1")
    gate.touch()
    for task in range(3):
        cluster.wait_until(lambda task=task: cluster.state(f"{job}_{task}") == "COMPLETED")
    return [(run / "attempts").read_text().splitlines() for run in runs]


def two_nodes(cluster: Cluster, project: Project) -> tuple[str, dict, list[str]]:
    """(log, losses, nodes) of a training on two nodes that nothing but `sbatch --nodes=2` was said about."""
    tiny = [*TINY, "--max_iters=8", "--gradient_accumulation_steps=0", "--tokens_per_step=64"]
    script = "slurm/nanogpt/train_gpt2.sh"
    job = project.sbatch("-p", "pi_lab", "--nodes=2", "--gres=gpu:1", script, *tiny, "--out_dir=out/two")
    assert cluster.wait_for(job) == "COMPLETED", cluster.log(job)
    return cluster.log(job), project.training(job, "two"), cluster.nodes_of(job)


def on_two_nodes_by_srun(cluster: Cluster, project: Project) -> str:
    """What srun prints inside an allocation of two nodes; the trainer is the stand-in."""
    (project.data / "srun" / "fineweb10B").mkdir(parents=True)
    (project.data / "srun" / "fineweb10B" / "manifest.json").touch()
    standin = {"SPEEDRUN_TRAINER": project.standin, "DATA_ROOT": str(project.data / "srun")}
    return cluster.run(
        *("salloc", "-p", "pi_lab", "-N2", "--gres=gpu:1", "-c2", "--mem=4G", "-t10", "-Q"),
        *("srun", "--ntasks-per-node=1", "bash", SPEEDRUN, "--out_dir=out/srun"),
        env={**project.env, **standin},
        cwd=project.root,
        timeout=600,
    ).stdout


SCENES = (preempted, array_tasks, two_nodes, on_two_nodes_by_srun)
