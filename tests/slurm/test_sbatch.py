"""`sbatch` as the guides print it: the function of activate_env.sh, and what a job does that came without it."""

import re
import shutil

import pytest

SHAKESPEARE = "slurm/nanogpt/train_shakespeare.sh"
GPT2 = "slurm/nanogpt/train_gpt2.sh"
SPEEDRUN = "slurm/modded/train_speedrun.sh"
H100, H200 = "GPU_TYPE=h100", "GPU_TYPE=h200"
DOCUMENTS = "sbatch --gres=gpu:${GPU_TYPE}:${NUM_GPUS}"


@pytest.fixture
def typed(cluster, project):
    """`typed(line, **env)`: a line in a shell that has sourced activate_env.sh; the jobs are cancelled afterwards."""
    jobs = []

    def run(line: str, check: bool = True, shell: str = "bash", **env: str):
        words = [shell, "-c", f"source ./activate_env.sh >/dev/null; {line}"]
        done = cluster.run(*words, env={**project.env, **env}, cwd=project.root, check=check)
        done.job = ([*re.findall(r"^(?:Submitted batch job )?(\d+)$", done.stdout, re.MULTILINE), ""])[0]
        jobs.append(done.job)
        return done

    yield run
    cluster.cancel(*filter(None, jobs))


@pytest.mark.parametrize(
    ("line", "fields", "remark"),
    [
        (f"{H100} NUM_GPUS=1 {DOCUMENTS} -H {SPEEDRUN}", "mit_preemptable gpu:h100:1 gpu:8 gpu:122880", "no h100"),
        (f"{H200} NUM_GPUS=2 {DOCUMENTS} -H {SPEEDRUN}", "mit_normal_gpu gpu:h200:2 PerTres=gres:gpu:8", ""),
        (f"{H200} NUM_GPUS=4 {DOCUMENTS} -H {SPEEDRUN}", "mit_preemptable gpu:h200:4", "one user 2 GPUs"),
        (f"{H200} NUM_GPUS=8 {DOCUMENTS} {SPEEDRUN}", "mit_normal_gpu gpu:h200:8", "8 GPUs asked, your limit is 2"),
        (f"GPU_TYPE=a100 sbatch -H --gres=gpu:${{GPU_TYPE}}:1 {SHAKESPEARE}", "mit_preemptable gpu:a100:1", ""),
        (f"GPU_TYPE=a100 NUM_GPUS=2 sbatch -H {SHAKESPEARE}", "mit_preemptable gpu:a100:2 PerTres=gres:gpu:8", ""),
        (f"sbatch -N2 --ntasks-per-node=1 --gres=gpu:4 {GPT2}", "mit_preemptable gpu:4", "your limit is 4"),
        (f"sbatch -H -G h200:2 {SHAKESPEARE}", "mit_normal_gpu gpu:h200:2", ""),
        (f"sbatch -H --gres=gpu:2 -c 8 --mem=64G {SHAKESPEARE}", "gpu:2 gres:gpu:4 gpu:32768", "--cpus-per-gpu=4"),
        (f"sbatch -H -p mit_normal_gpu --gres=gpu:1 {GPT2}", "mit_normal_gpu TimeLimit=06:00:00", "all that"),
        (f"sbatch -H -t 4:00 {SHAKESPEARE}", "TimeLimit=00:04:00", "--time=4:00: 4 minutes, as SLURM reads it"),
        (f"sbatch -H --export=A=1 {SHAKESPEARE}", "gpu:1", "leaves ENV_PATH, DATA_ROOT, SPEEDRUN_TRAINER behind"),
        (f"sbatch -H --account=mit_general {SHAKESPEARE} --seed=1", "Account=mit_general", "without --qos"),
        (f"cd slurm/nanogpt && sbatch -H {SHAKESPEARE[14:]}", "logs/nanogpt-train-shakespeare-", "its log goes"),
    ],
    ids=range(14),
)  # fmt: skip
def test_what_people_type_becomes_what_fits(cluster, typed, line, fields, remark):
    done = typed(line)
    shown = cluster.scontrol("show", "job", done.job)
    assert all(field in shown for field in fields.split()), shown
    assert remark in done.stderr and done.stdout == f"Submitted batch job {done.job}\n"


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (f"{DOCUMENTS} {SPEEDRUN}", "--gres=gpu::: no GPU type in it, and GPU_TYPE is not set"),
        (f"sbatch --gres=gpu:h200: {SPEEDRUN}", "no number in it, and NUM_GPUS is not set"),
        (
            f"GPU_TYPE=b200 NUM_GPUS=1 {DOCUMENTS} {SPEEDRUN}",
            "GPU_TYPE=b200 NUM_GPUS=1: nothing here can start",
        ),
        (f"GPU_TYPE=h100 NUM_GPUS=5 {DOCUMENTS} {SPEEDRUN}", "mit_preemptable has 4 h100 a node"),
        (
            f"sbatch -p mit_normal_gpu --gres=gpu:h100:1 {SPEEDRUN}",
            "--partition=mit_normal_gpu: mit_normal_gpu has no",
        ),
        (f"GPU_TYPE=h100 sbatch --gres=gpu:h200:1 {SPEEDRUN}", "GPU_TYPE=h100 says otherwise"),
        (f"NUM_GPUS=4 sbatch --gres=gpu:h200:1 {SPEEDRUN}", "NUM_GPUS=4 is more"),
        (f"GPU_TYPE='$(touch pwned)' NUM_GPUS=1 {DOCUMENTS} {SPEEDRUN}", "GPU_TYPE="),
        (f"sbatch --gres='gpu:$(touch pwned):1' {SPEEDRUN}", "no GPU type of this cluster"),
        (f"sed 's/$/\\r/' {SPEEDRUN} >dos.sh; sbatch dos.sh", "has Windows line ends; sed -i"),
        (
            f"sbatch --ntasks=4 --gpus-per-task=1 {SPEEDRUN}",
            "--gpus-per-task=1: one task a node starts a rank for",
        ),
    ],
    ids=range(11),
)
def test_what_cannot_be_filled_in_is_one_line(project, typed, line, said):
    done = typed(line, check=False)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr
    assert done.stderr.startswith("error: ") and said in done.stderr
    assert not list(project.root.rglob("pwned"))


def test_everything_else_goes_to_slurm_untouched(project, typed):
    other = project.root / "other.sh"
    other.write_text('#!/bin/bash\n#SBATCH -o /dev/null\n#SBATCH -H\necho "$1"\n')
    assert typed("sbatch other.sh 'a b'").stderr == ""
    assert typed("sbatch -H -o /dev/null --wrap 'true'").stderr == ""
    refused = typed(f"ENGAGING_SBATCH=0 {DOCUMENTS} {SPEEDRUN}", check=False)
    assert refused.returncode == 1 and "Invalid generic resource" in refused.stderr
    number = typed(
        f"J=$(GPU_TYPE=h100 NUM_GPUS=1 {DOCUMENTS} -H --parsable {SPEEDRUN}); echo $J; echo ${{GPU_TYPE:-none}}"
    )
    assert number.job.isdigit() and number.stdout.endswith("\nnone\n") and "note: " in number.stderr
    inside = typed(f"sbatch -H {SHAKESPEARE}", SLURM_JOB_ID="1", SLURM_NTASKS="3", SLURM_CPUS_PER_TASK="1")
    assert "from inside job 1" in inside.stderr
    if shutil.which("zsh"):
        line = f"GPU_TYPE=h100 NUM_GPUS=1 {DOCUMENTS} -H {SPEEDRUN}; echo ${{GPU_TYPE:-none}}"
        assert typed(line, shell="zsh").stdout.endswith("\nnone\n")


def test_later_edits_reach_a_job_only_when_it_came_by_plain_sbatch_and_it_says_so(cluster, project, typed):
    trainer = project.root / "nanogpt" / "marked.py"
    trainer.write_text("print('old code')\n")
    (project.data / "fineweb10B").mkdir(exist_ok=True)
    (project.data / "fineweb10B" / "manifest.json").touch()
    passed_on = "ENV_PATH,DATA_ROOT,SPEEDRUN_TRAINER"  # case G4: not ALL, and the job's copy of the trainer goes along
    line = f"sbatch -H -p pi_lab --gres=gpu:1 --export={passed_on},A=1 {SPEEDRUN}"
    try:
        jobs = [typed(line, SPEEDRUN_TRAINER="nanogpt.marked", ENGAGING_SBATCH=on).job for on in ("1", "0")]
        cluster.wait_until(lambda: cluster.run("sleep", "1.1"))  # SLURM notes the second of a submission
        trainer.write_text("print('new code')\n")
        for job in jobs:
            cluster.scontrol("release", job)
            assert cluster.wait_for(job) == "COMPLETED", cluster.log(job)
    finally:
        trainer.unlink()
        shutil.rmtree(project.data / "fineweb10B")
    copied, plain = (cluster.log(job) for job in jobs)
    assert "old code" in copied and "note: changed" not in copied
    assert "new code" in plain and "note: changed since this job was submitted" in plain
    assert "nanogpt/marked.py" in plain


def test_training_waits_for_ones_own_job_that_prepares_its_data(cluster, project, typed):
    """By the function it is submitted behind that job; by plain sbatch it goes behind it when it starts."""
    data = project.root / "later"
    env = {"DATA_ROOT": str(data), "SPEEDRUN_TRAINER": project.standin}
    name = ("-p", "pi_lab", "-o", "/dev/null", "-J", "modded-prepare-fineweb", "--wrap")
    makes = project.sbatch(
        *name,
        "until [ -e go ]; do sleep 0.2; done; mkdir -p later/fineweb10B; touch later/fineweb10B/manifest.json",
    )
    behind = typed(f"sbatch -p pi_lab --gres=gpu:1 {SPEEDRUN} --out_dir=out/behind --steps=1", **env)
    assert f"it waits for your job {makes}, which prepares fineweb10B" in behind.stderr
    assert cluster.job(behind.job)["Dependency"].startswith(f"afterany:{makes}")
    plain = project.sbatch(
        "-p", "pi_lab", "--gres=gpu:1", SPEEDRUN, "--out_dir=out/plain", "--steps=1", **env
    )
    copy = project.root / "mine" / "my copy.sh"
    copy.parent.mkdir()
    copy.write_text((project.root / SPEEDRUN).read_text().replace("modded-speedrun", "mine"))
    fails = project.sbatch("-p", "pi_lab", "--gres=gpu:1", copy, "--data_root=nowhere", **env)
    # What has trained on tokens that are there waits for no others.
    begun = project.root / "out" / "begun" / "checkpoints"
    begun.mkdir(parents=True)
    (begun / "step_00000001").write_text('{"step": 1, "loss": 3.0}')
    (project.root / "sooner" / "fineweb10B").mkdir(parents=True)
    (project.root / "sooner" / "fineweb10B" / "fineweb_train_000001.bin").touch()
    sooner = {**env, "DATA_ROOT": str(project.root / "sooner")}
    goes_on = project.sbatch(
        "-p", "pi_lab", "--gres=gpu:1", SPEEDRUN, "--out_dir=out/begun", "--steps=2", **sooner
    )
    for job in (plain, fails):
        cluster.wait_until(
            lambda job=job: cluster.job(job).get("Dependency", "").startswith(f"afterany:{makes}")
        )
    assert cluster.wait_for(goes_on) == "COMPLETED", cluster.log(goes_on)
    assert cluster.job(goes_on)["Restarts"] == "0" and cluster.state(makes) == "RUNNING"
    (project.root / "go").touch()
    for job in (behind.job, plain):
        assert cluster.wait_for(job) == "COMPLETED", cluster.log(job)
    log = cluster.log(plain)
    assert f"your job {makes} prepares it: this job goes back into the queue behind it" in log
    assert cluster.job(plain)["Restarts"] == "1" and f"job {plain} attempt 2" in log
    assert cluster.wait_for(fails) == "FAILED" and cluster.job(fails)["ExitCode"] == "2:0"
    said = [line for line in cluster.log(fails).splitlines() if line.startswith("error: ")]
    assert (
        len(said) == 1
        and "no fineweb10B there; prepare it first: sbatch slurm/modded/prepare_fineweb.sh" in said[0]
    )
    assert f"(job {makes} did: COMPLETED" in said[0]


def test_words_after_a_scripts_name_are_sbatchs_or_after_two_dashes_the_trainers(project):
    def line(*words: str, **env: str) -> str:
        return project.bash(SHAKESPEARE, *words, DRY_RUN="1", **env).stdout.splitlines()[-1]

    done = line(
        "--mail-type=END",
        "--gres=gpu:h200:2",
        "--time=4:00",
        "-A",
        "mit_general",
        "-q",
        "normal",
        "--",
        "--seed=1",
    )
    assert done.endswith(f"--mail-type=END {SHAKESPEARE} --seed=1")
    for option in ("--gres=gpu:h200:2", "--time=0-00:04:00", "--account=mit_general", "--qos=normal"):
        assert option in done
    assert "--partition=mit_preemptable" in line(SBATCH_PARTITION="mit_preemptable")
    mixed = project.bash(SHAKESPEARE, "--account=x", "--max_iters=5", check=False)
    assert (
        mixed.returncode == 2
        and "the trainer's flags go after --: ... --account=x -- --max_iters=5" in mixed.stderr
    )


def test_what_engaging_config_has_set_holds_for_scripts(cluster, project, typed, tmp_path):
    """By `bash` and by the function; flags and the environment stand before it, and its partition is for GPUs."""
    (tmp_path / "engaging").mkdir()
    rows = {"account": "mit_general", "qos": "normal", "partition": "mit_preemptable", "env_path": "/gone"}
    (tmp_path / "engaging/config.toml").write_text("".join(f'{key} = "{row}"\n' for key, row in rows.items()))
    own = {"XDG_CONFIG_HOME": str(tmp_path)}

    def line(script: str, *words: str, **env: str) -> str:
        return project.bash(script, *words, DRY_RUN="1", **own, **env).stdout.splitlines()[-1]

    for option in ("--account=mit_general", "--qos=normal", "--partition=mit_preemptable"):
        assert option in line(SHAKESPEARE)
    assert "--partition=pi_lab" in line(SHAKESPEARE, "--partition=pi_lab", "--") and "--qos=labs" in line(
        SHAKESPEARE, SBATCH_QOS="labs"
    )
    assert "--partition=mit_quicktest" in line("slurm/nanogpt/prepare_shakespeare.sh")
    no_environment = project.bash(SHAKESPEARE, check=False, **own, ENV_PATH="")
    assert no_environment.returncode == 2 and "ENV_PATH=/gone: no Python there" in no_environment.stderr
    done = typed(f"sbatch -H {SHAKESPEARE}", **own)
    row = cluster.job(done.job)
    assert (row["Account"], row["QOS"]) == ("mit_general", "normal") and "warning" not in done.stderr


def test_on_a_login_node_make_runs_by_srun(cluster, project):
    def run(*words: str, without: str = "NOTHING", **env: str):
        words = ("env", f"--unset={without}", "bash", "slurm/lib/here_or_srun.sh", *words)
        return cluster.run(*words, env={**project.env, **env}, cwd=project.root, check=False)

    show = ("bash", "-c", "echo ${SLURM_JOB_PARTITION:-here}")
    done = run(*show)
    assert (
        done.stdout == "mit_quicktest\n"
        and "this is a login node: srun --partition=mit_quicktest" in done.stderr
    )
    assert run(*show, HERE="1").stdout == "here\n" and run(*show, without="SLURM_CONF").stdout == "here\n"
    said = run("--say", "make test")
    assert (
        said.returncode == 2
        and said.stderr.count("\n") == 1
        and said.stderr.rstrip().endswith("HERE=1 make test)")
    )
    assert run("--say", "make test", SLURM_JOB_ID="1").returncode == 0


def test_a_build_from_source_goes_to_cpus_and_its_check_behind_it_to_a_gpu(project):
    script = "slurm/modded/build_flash_attn.sh"
    build, check = project.bash(
        script, "--mail-type=END", "--", "--fa2", DRY_RUN="1", GPU_TYPE="h100"
    ).stdout.splitlines()
    assert "--partition=mit_normal --gres=none --cpus-per-task=32" in build and "--mail-type=END" in build
    assert "--gres=gpu:h100:1" in check and "--dependency=afterok:" in check and "--time=0-00:30:00" in check
    assert build.endswith(f"{script} --fa2") and check.endswith(f"{script} --fa2")
    (prebuilt,) = project.bash(script, "--prebuilt", DRY_RUN="1", GPU_TYPE="h100").stdout.splitlines()
    assert "--gres=gpu:h100:1" in prebuilt and prebuilt.endswith("--prebuilt")
