"""What cannot start is refused before it queues, in one line with the remedy; what can is asked for correctly."""

import itertools
import re
import shutil
import subprocess
import sys

import pytest

SHAKESPEARE = "slurm/nanogpt/train_shakespeare.sh"
GPT2 = "slurm/nanogpt/train_gpt2.sh"
SPEEDRUN = "slurm/modded/train_speedrun.sh"


@pytest.mark.parametrize(
    ("script", "settings", "options"),
    [
        (SHAKESPEARE, {}, "--partition=mit_normal_gpu --time=0-01:00:00 --gres=gpu:1 --cpus-per-gpu=8"),
        (SHAKESPEARE, {"NUM_GPUS": "2"}, "--partition=mit_normal_gpu --gres=gpu:2 --cpus-per-gpu=8"),
        (SHAKESPEARE, {"NUM_GPUS": "4"}, "--partition=mit_preemptable --gres=gpu:4"),
        (
            SHAKESPEARE,
            {"GPU_TYPE": "h200"},
            "--partition=mit_normal_gpu --gres=gpu:h200:1 --mem-per-gpu=128G",
        ),
        (SHAKESPEARE, {"GPU_TYPE": "a100"}, "--partition=mit_preemptable --gres=gpu:a100:1"),
        (SHAKESPEARE, {"TIME": "10h"}, "--partition=mit_preemptable --time=0-10:00:00"),
        (SHAKESPEARE, {"TIME": "90"}, "--partition=mit_normal_gpu --time=0-01:30:00"),
        (SHAKESPEARE, {"PARTITION": "mit_preemptable"}, "--partition=mit_preemptable"),
        (
            SHAKESPEARE,
            {"PARTITION": "mit_normal_gpu,mit_preemptable"},
            "--partition=mit_normal_gpu\\,mit_preemptable",
        ),
        (SHAKESPEARE, {"ACCOUNT": "mit_general", "QOS": "normal"}, "--account=mit_general --qos=normal"),
        (GPT2, {}, "--partition=mit_preemptable --gres=gpu:h200:4 --time=2-00:00:00 --cpus-per-gpu=8"),
        (GPT2, {"NODES": "2", "NUM_GPUS": "2"}, "--nodes=2 --ntasks-per-node=1 --gres=gpu:h200:2"),
        (
            GPT2,
            {"PARTITION": "mit_normal_gpu", "NUM_GPUS": "2"},
            "--partition=mit_normal_gpu --time=0-06:00:00",
        ),
        (SPEEDRUN, {"PARTITION": "pi_lab"}, "--partition=pi_lab --gres=gpu:h200:8 --dependency=afterany:"),
        (SPEEDRUN, {"GPU_TYPE": "h100", "NUM_GPUS": "2"}, "--partition=mit_preemptable --gres=gpu:h100:2"),
    ],
)
def test_settings_become_options(project, script, settings, options):
    done = project.bash(script, "--learning_rate=3e-4", DRY_RUN="1", **settings)
    line = done.stdout.splitlines()[-1]
    assert line.startswith("sbatch ")
    assert line.endswith(f"{script} --learning_rate=3e-4")
    for option in options.split():
        assert option in line, line
    assert "learning_rate=3e-4" not in project.cluster.squeue("--me", "-o", "%o"), "it was submitted"


@pytest.mark.parametrize(
    ("script", "settings", "words"),
    [
        (
            SPEEDRUN,
            {},
            ["mit_normal_gpu gives one user 2 GPUs", "mit_preemptable gives one user 4", "NUM_GPUS=4 would"],
        ),
        (SHAKESPEARE, {"NUM_GPUS": "9"}, ["NUM_GPUS=9", "mit_normal_gpu has 8 a node"]),
        (SHAKESPEARE, {"GPU_TYPE": "b200"}, ["GPU_TYPE=b200", "mit_normal_gpu has no b200"]),
        (SHAKESPEARE, {"GPU_TYPE": "h100", "PARTITION": "mit_normal_gpu"}, ["mit_normal_gpu has no h100"]),
        (
            SHAKESPEARE,
            {"TIME": "3-00:00:00"},
            ["TIME=3-00:00:00", "mit_preemptable takes at most 2-00:00:00"],
        ),
        (SHAKESPEARE, {"PARTITION": "nope"}, ["nope is not on this cluster"]),
        (SHAKESPEARE, {"PARTITION": "mit_normal"}, ["mit_normal has no GPUs"]),
        (SHAKESPEARE, {"NODES": "2", "NUM_GPUS": "3"}, ["gives one user 4 GPUs", "NUM_GPUS=2 would"]),
        (GPT2, {"NODES": "3", "NUM_GPUS": "1"}, ["NODES=3", "mit_preemptable has 2 such nodes"]),
        (GPT2, {"NODES": "2"}, ["mit_preemptable gives one user 4 GPUs", "NUM_GPUS=2 would start"]),
        (SHAKESPEARE, {"ACCOUNT": "nobodys"}, ["sbatch refused it", "Invalid account"]),
        (SHAKESPEARE, {"ENV_PATH": "/nonexistent"}, ["ENV_PATH=/nonexistent", "bash setup_env.sh"]),
        (SHAKESPEARE, {"ENGAGING_SITE": "mars"}, ["ENGAGING_SITE=mars"]),
        (SHAKESPEARE, {"NUM_GPUS": "0"}, ["NUM_GPUS=0", "a number of GPUs"]),
    ],
)
def test_what_cannot_start_is_one_line(project, script, settings, words):
    done = project.bash(script, check=False, **settings)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert (done.returncode, len(errors)) == (2, 1), done.stderr
    for word in words:
        assert word in done.stderr
    assert "submitted" not in done.stdout


def test_an_sbatch_that_refuses_once_and_greets_with_numbers_gives_the_jobs_own(cluster, project, tmp_path):
    """By both doors: a controller that has just started knows no GPUs, and a site's filter talks on both streams."""
    sbatch = tmp_path / "sbatch"
    refusal = "sbatch: error: Invalid generic resource (gres) specification"
    sbatch.write_text(
        '#!/bin/bash\nprintf "Welcome to Cluster3\\n3 checks: job 17 of 20 passed\\n2026 is over; 5\\n"\n'
        "echo 'lua: 12345' >&2\n"
        f'if [ "$1" = --help ] || ! mkdir {tmp_path}/asked 2>/dev/null; then\n'
        f'exec {shutil.which("sbatch")} "$@"; fi\n'
        f"echo '{refusal}' >&2; exit 1\n"
    )
    sbatch.chmod(0o755)
    env = {"PATH": f"{tmp_path}:{cluster.env['PATH']}"}
    done = project.bash(SHAKESPEARE, "--check", **env)
    assert "does not know its GPUs yet" in done.stderr
    (job,) = re.findall(r"^submitted job (\S+);", done.stdout, re.MULTILINE)
    line = f"source ./activate_env.sh >/dev/null; sbatch -p mit_normal_gpu --gres=gpu:h200:8 {SHAKESPEARE}"
    typed = cluster.run("bash", "-c", line, env={**project.env, **env}, cwd=project.root)
    (second,) = re.findall(r"^warning: job (\d+) will never start", typed.stderr, re.MULTILINE)
    for one in (job, second):
        assert cluster.job(one)["JobName"] == "nanogpt-train-shakespeare"
    cluster.cancel(job, second)


NASTY = [
    *("$(touch pwned)", "`touch pwned`", "; touch pwned", "x; touch pwned", "| touch pwned", "& touch pwned"),
    *("x\ntouch pwned", "x\r\ntouch pwned", "'; touch pwned; '", '"; touch pwned; "', "${IFS}touch pwned"),
    *(
        "$((1+`touch pwned`))",
        "a[$(touch pwned)]",
        "a[0$(touch pwned)]=1",
        "../../x",
        "-x",
        "--wrap=touch pwned",
    ),
    *(
        "*",
        "?",
        "~root",
        "a b",
        "\t",
        "\\",
        "é☃",
        "x" * 500,
        "\x1b[31m",
        "x y",
        "0x10\n",
        "<(touch pwned)",
        ">pwned",
    ),
]
SETTINGS = ("NUM_GPUS", "NODES", "GPU_TYPE", "PARTITION", "TIME", "ACCOUNT", "QOS", "FINEWEB_CHUNKS")


def test_240_hostile_values_are_refused_and_never_run(cluster, project):
    """Each at the place where all of them are looked at, and one of each setting through the script."""
    cases = list(itertools.product(SETTINGS, NASTY))
    assert len(cases) == 240
    check = 'while IFS= read -r -d "" name && IFS= read -r -d "" value; do'
    check += ' (export "$name=$value"; check_settings) && echo "passed $name"; done'
    words = "".join(f"{name}\0{value}\0" for name, value in cases)
    done = subprocess.run(
        ["bash", "-c", f"set -u; . slurm/lib/common.sh; {check}"],
        cwd=project.root, env=cluster.env, input=words, capture_output=True, text=True,
    )  # fmt: skip
    lines = done.stderr.splitlines()
    assert not done.stdout and len(lines) == len(cases) and "\x1b" not in done.stderr
    assert all(line.startswith(f"error: {name}=") for line, (name, _) in zip(lines, cases, strict=True))
    for name in SETTINGS:
        done = project.bash(SHAKESPEARE, check=False, **{name: "x; touch pwned"})
        assert done.returncode == 2 and done.stderr.startswith(f"error: {name}="), done.stderr
    assert not list(project.root.rglob("pwned"))


def test_log_folders_that_cannot_be_written_are_found_before_queueing(project):
    logs = project.root / "logs"
    kept = logs.rename(project.root / "logs.kept")
    try:
        logs.symlink_to(project.root / "gone")
        done = project.bash(SHAKESPEARE, check=False)
        assert done.returncode == 2
        assert "logs: cannot be made" in done.stderr
        logs.unlink()
        project.bash(SHAKESPEARE, DRY_RUN="1")
        assert logs.is_dir()  # made where it was missing
        logs.rmdir()
    finally:
        kept.rename(logs)


def test_a_full_disk_is_found_before_queueing(cluster, project):
    """logs/ on a file system of 16 kB, in a mount namespace of its own; by `bash`, and by the shell's function."""
    doors = f"(bash {SHAKESPEARE}); [ $? = 2 ] && exec bash slurm/lib/sbatch_as_typed.sh {SHAKESPEARE}"
    script = f"mount -t tmpfs -o size=16k tmpfs logs && {doors}"
    env = project.env
    done = cluster.run("unshare", "-m", "bash", "-c", script, env=env, cwd=project.root, check=False)
    said = [line for line in done.stderr.splitlines() if "logs: the disk or your quota is full" in line]
    assert (done.returncode, len(said)) == (2, 2), done.stderr
    assert "ubmitted" not in done.stdout


def test_a_script_outside_of_the_repository_says_where_to_go(cluster, project, tmp_path):
    """By bash, and by sbatch from another folder: SLURM runs a copy of the script in a folder of its own."""
    copied = tmp_path / "train.sh"
    shutil.copy(project.root / GPT2, copied)
    done = cluster.run("bash", copied, env=project.env, cwd=tmp_path, check=False)
    log = tmp_path / "log"
    options = ["-p", "pi_lab", "--gres=gpu:1", "-o", log]
    job = cluster.sbatch(*options, project.root / GPT2, env=project.env, cwd=tmp_path)
    assert cluster.wait_for(job) == "FAILED" and cluster.job(job)["ExitCode"] == "2:0"
    for said in (done.stderr, log.read_text()):
        assert said == f"error: {tmp_path}: not in the repository; cd to its root and submit from there\n"


def test_a_log_folder_that_vanished_is_explained_by_why(cluster, project):
    """What sbatch cannot know: SLURM starts no job whose log it cannot open, and says so nowhere."""
    kept = (project.root / "logs").rename(project.root / "logs.kept")
    try:
        job = project.sbatch("-p", "pi_lab", SHAKESPEARE)
        assert cluster.wait_for(job) == "FAILED"
    finally:
        kept.rename(project.root / "logs")
    said = cluster.run(sys.executable, "-m", "tools", "why", job).stdout
    assert "its log could not be opened, so it never ran" in said and "mkdir -p" in said


def test_tokens_stand_in_no_argument_and_no_script(cluster, project):
    """A canary in the environment reaches the job, and nothing that others can read."""
    canary = "hf_canary0123456789"
    job = project.submit("slurm/nanogpt/prepare_openwebtext.sh", HF_TOKEN=canary, WANDB_API_KEY=canary)
    shown = cluster.scontrol("show", "job", "-d", job) + cluster.scontrol("write", "batch_script", job, "-")
    assert canary not in shown
    cluster.wait_for(job)
    for path in (project.root / "logs").rglob("*"):
        if path.is_file():
            assert canary not in path.read_text(errors="replace")
