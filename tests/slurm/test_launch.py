"""`engaging launch` on a real SLURM: what the job gets, refusals before queueing, arrays, answers that get lost.

The checkout here is a small one whose run.sh notes what it was given.
"""

import json
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from nanogpt.common.errors import CommandError
from tools import cli
from tools.practice import cluster as practice

ROOT = Path(__file__).resolve().parents[2]
RECORDER = """#!/bin/bash
[ "$1" = --args-file ] || exit 9
mapfile -d '' -t words < "$2"
for word in "${words[@]}"; do
    case $word in --out_dir=*) out=${word#--out_dir=} ;; esac
done
mkdir -p "$out"
cp "$2" "$out/words"
while [ -e "${out%/out/*}/hold" ]; do sleep 0.1; done
env -0 >"$out/environment"
cat "$(dirname "$0")/marker" >"$out/marker"
echo "log of $out"
"""
SECRETS = {
    "WANDB_API_KEY": "wandb-canary-1234567",
    "HF_TOKEN": "hf_canary_7654321",
    "AWS_SECRET_ACCESS_KEY": "aws-canary-777",
}


@pytest.fixture
def checkout(tmp_path):
    """A checkout of its own, in a folder with a space and a quote, whose run.sh is the recorder."""
    root = tmp_path / "my check'out"
    for name in ("nanogpt/common", "nanogpt/config"):
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    (root / "nanogpt" / "train.py").write_text("")
    (root / "nanogpt" / "__init__.py").write_text("")
    (root / "slurm" / "lib").mkdir(parents=True)
    shutil.copytree(ROOT / "slurm" / "sites", root / "slurm" / "sites")
    (root / "slurm" / "lib" / "run.sh").write_text(RECORDER)
    (root / "slurm" / "lib" / "marker").write_text("old code\n")
    (root / "pyproject.toml").write_text("")
    (root / ".gitignore").write_text("/out/\n/logs/\n")
    subprocess.run(["git", "init", "-q", str(root)], check=True)
    return root


@pytest.fixture
def engaging(cluster, checkout, tmp_path):
    """Runs `engaging ARGS` in the small checkout against the cluster."""

    def run(
        *args: object, check: bool = True, env: dict[str, str] | None = None, cwd: Path = checkout, **more
    ):
        full = {
            "PYTHONPATH": str(ROOT),
            "ENV_PATH": sys.prefix,
            "DATA_ROOT": str(tmp_path / "data"),
            **(env or {}),
        }
        return cluster.run(sys.executable, "-m", "tools", *args, check=check, env=full, cwd=cwd, **more)

    return run


def job_of(checkout: Path, name: str) -> str:
    return json.loads((checkout / "out" / ".launch" / name / "001" / "job.json").read_text())["job_id"]


def words_of(checkout: Path, run: str) -> list[str]:
    return (checkout / "out" / run / "words").read_bytes().decode().split("\0")[:-1]


def test_a_run_from_launch_to_status_logs_and_cancel(cluster, engaging, checkout):
    record = "import pathlib, sys; pathlib.Path('checked').write_text('\\n'.join(sys.argv[1:]))\n"
    (checkout / "nanogpt" / "train.py").write_text(record)
    override = "--note=$(touch canary); \"x\" 'y' `touch canary` ; #\\"
    said = engaging(
        "launch", "gpt2", "--gpus", 1, "--name", "first", "--", "--learning_rate=3e-4", override
    ).stdout
    job = job_of(checkout, "first")
    assert f"job {job}" in said and "logs/first-" in said
    assert cluster.wait_for(job) == "COMPLETED"
    out = f"--out_dir={checkout}/out/first"
    assert words_of(checkout, "first") == [
        "nanogpt.train", "train_gpt2", "--learning_rate=3e-4", override, out, "--auto_resume=true",
    ]  # fmt: skip
    assert not list(checkout.rglob("canary"))
    checked = (checkout / "checked").read_text().splitlines()  # before it queued, the run itself and no other
    assert checked == [
        "train_gpt2",
        "--learning_rate=3e-4",
        override,
        out,
        "--auto_resume=true",
        "--check=true",
    ]
    elsewhere = engaging("status", "first", cwd=checkout / "nanogpt").stdout
    assert f"job {job}: COMPLETED" in elsewhere
    assert "log of" in engaging("logs", "first").stdout
    assert f"job {job} has ended already (COMPLETED)" in engaging("cancel", "first").stdout
    row = cluster.job(job)
    assert row["Comment"].startswith("engaging:") and row["Requeue"] == "1"


def test_later_edits_do_not_reach_a_queued_run(cluster, engaging, checkout):
    holder = cluster.sbatch(
        "-p", "mit_normal_gpu", "--gres=gpu:h200:2", "-c", "1", "--wrap", "sleep 60", cwd=checkout
    )
    cluster.wait_for(holder, "RUNNING")
    engaging(
        "launch",
        "gpt2",
        "--gpus",
        2,
        "--gpu-type",
        "h200",
        "--partition",
        "mit_normal_gpu",
        "--name",
        "queued",
    )
    job = job_of(checkout, "queued")
    cluster.wait_until(lambda: "QOS" in cluster.job(job)["Reason"])
    why = engaging("why", job).stdout
    assert "your own limit" in why and "allows 2, you hold 2" in why and "your other jobs end" in why
    (checkout / "slurm" / "lib" / "marker").write_text("new code\n")
    cluster.cancel(holder)
    assert cluster.wait_for(job) == "COMPLETED"
    assert (checkout / "out" / "queued" / "marker").read_text() == "old code\n"


def test_a_name_in_the_queue_is_refused_and_afterwards_goes_on(cluster, engaging, checkout):
    holder = cluster.sbatch(
        "-p", "mit_normal_gpu", "--gres=gpu:h200:2", "-c", "1", "--wrap", "sleep 60", cwd=checkout
    )
    cluster.wait_for(holder, "RUNNING")
    engaging("launch", "gpt2", "--gpus", 1, "--partition", "mit_normal_gpu", "--name", "same")
    job = job_of(checkout, "same")
    refused = engaging("launch", "gpt2", "--name", "same", check=False)
    assert refused.returncode == 2 and f"job {job} of this name is in the queue" in refused.stderr
    cluster.cancel(holder)
    cluster.wait_for(job)
    engaging("launch", "gpt2", "--name", "same")
    assert (checkout / "out" / ".launch" / "same" / "002" / "job.json").is_file()


def test_an_array_of_seeds_with_a_throttle_under_the_users_limit(cluster, engaging, checkout):
    words = ["--partition", "mit_preemptable", "--seeds", 100, "--throttle", 50, "--name", "sweep"]
    (checkout / "hold").touch()  # else all of them may be over before they are cancelled
    said = engaging("launch", "gpt2", *words).stdout
    job = job_of(checkout, "sweep")
    assert "100 seeds, 4 at once" in said  # the limit of mit_preemptable is 4 GPUs a user
    cluster.wait_until(lambda: (checkout / "out" / "sweep-s1340" / "words").is_file())
    cluster.wait_until(lambda: "JobArrayTaskLimit" in engaging("status", "sweep").stdout)
    assert f"job {job} cancelled" in engaging("cancel", "sweep").stdout
    assert words_of(checkout, "sweep-s1338")[-1] == "--seed=1338"
    assert words_of(checkout, "sweep-s1338")[-3] == f"--out_dir={checkout}/out/sweep-s1338"
    cluster.wait_until(lambda: not cluster.squeue("--jobs", job, "--states=PENDING,RUNNING").strip())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["launch", "gpt2", "--gpu-type", "h20"], "did you mean 'h200'"),
        (
            ["launch", "gpt2", "--gpus", "9", "--gpu-type", "h200", "--partition", "pi_lab"],
            "at most 8 h200 GPUs",
        ),
        (["launch", "gpt2", "--gpus", "4", "--partition", "mit_normal_gpu"], "allows 2 GPUs for a user"),
        (
            ["launch", "gpt2", "--gpus", "1", "--gpu-type", "h100", "--partition", "mit_normal_gpu"],
            "has no h100",
        ),
        (
            ["launch", "gpt2", "--time", "7h", "--partition", "mit_normal_gpu"],
            "mit_normal_gpu allows 06:00:00",
        ),
        (["launch", "gpt2", "--time", "8d"], "no partition takes this"),
        (["launch", "gpt2", "--partition", "mit_norml_gpu"], "did you mean 'mit_normal_gpu'"),
        (["launch", "gpt2", "--account", "nobody"], "not one of your accounts"),
        (["launch", "gpt2", "--qos", "nothing"], "not open to you"),
        (["launch", "gpt2", "--gpus", "1", "--partition", "mit_normal"], "mit_normal has no GPUs"),
        (["launch", "gpt2", "--seeds", "900", "--partition", "mit_preemptable"], "jobs in the queue"),
        (["launch", "gpt2", "--cpus", "500", "--partition", "pi_lab"], "500 CPUs"),
        (
            ["launch", "gpt2", "--partition", "mit_normal_gpu,mit_preemptable", "--time", "7h"],
            "mit_normal_gpu allows",
        ),
        (["launch", "gpt2", "--test-only", "--reservation", "none-such"], "sbatch:"),
        (["plan", "gpt2", "--gpu-type", "h20"], "did you mean 'h200'"),
        (["plan", "gpt2", "--partition", "nope"], "no such partition"),
        (["why", "99999999"], "SLURM knows no such job"),
        (["usage", "99999999"], "job 99999999"),
    ],
    ids=lambda value: " ".join(value)[:60] if isinstance(value, list) else "",
)
def test_refused_before_queueing(cluster, checkout, tmp_path, monkeypatch, words, said):
    """In this process: starting Python is most of what a refusal costs."""
    for name, value in {**cluster.env, "ENV_PATH": sys.prefix, "DATA_ROOT": str(tmp_path / "data")}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(checkout)

    def launched() -> set[str]:  # what runs beside these tests was not launched
        lines = cluster.squeue("--me", "-o", "%F %k").splitlines()
        return {line for line in lines if " engaging:" in line}

    before = launched()
    with pytest.raises(CommandError) as refused:
        cli.main(words)
    assert refused.value.exit_code == 2
    assert said in str(refused.value) and "\n" not in str(refused.value)
    assert not (checkout / "out" / ".launch").exists() and launched() <= before


def test_what_the_machine_lacks_is_refused(cluster, engaging, checkout, tmp_path):
    no_environment = engaging("launch", "gpt2", env={"ENV_PATH": str(tmp_path / "none")}, check=False)
    assert no_environment.returncode == 2 and "bash setup_env.sh" in no_environment.stderr
    away = {"PATH": "/nonexistent"}
    no_module = engaging("launch", "gpt2", "--partition", "p", env=away, check=False)
    assert no_module.returncode == 2 and "SLURM_CONF is set: load its module" in no_module.stderr
    no_slurm = engaging("launch", "gpt2", "--partition", "p", env={**away, "SLURM_CONF": ""}, check=False)
    assert no_slurm.returncode == 2 and "no SLURM here" in no_slurm.stderr
    (checkout / "logs").unlink() if (checkout / "logs").is_file() else shutil.rmtree(
        checkout / "logs", ignore_errors=True
    )
    (checkout / "logs").write_text("a file in the place of the folder")
    no_logs = engaging("launch", "gpt2", check=False)
    assert no_logs.returncode in (2, 74) and "logs" in no_logs.stderr and no_logs.stderr.count("\n") == 1


def test_dry_run_prints_the_script_that_launch_submits(cluster, engaging, checkout):
    words = [
        "launch",
        "gpt2",
        "--gpus",
        1,
        "--gpu-type",
        "l40s",
        "--partition",
        "mit_normal_gpu",
        "--name",
        "dry",
        "--time",
        "30m",
    ]
    printed = engaging(*words, "--dry-run").stdout
    assert not (checkout / "out").exists()
    engaging(*words)
    submitted = (checkout / "out" / ".launch" / "dry" / "001" / "submit.sh").read_text()

    def without_token(text: str) -> list[str]:
        return [line for line in text.splitlines() if not line.startswith("#SBATCH --comment=")]

    assert without_token(printed) == without_token(submitted)
    asked = engaging(*words, "--test-only").stdout
    assert "to start at" in asked and "mit_normal_gpu" in asked
    cluster.wait_for(job_of(checkout, "dry"))


def test_secrets_stand_nowhere_but_in_the_jobs_environment(cluster, engaging, checkout):
    done = engaging("launch", "gpt2", "--name", "canary", env=SECRETS)
    job = job_of(checkout, "canary")
    cluster.wait_for(job)
    seen = dict(
        pair.split("=", 1)
        for pair in (checkout / "out" / "canary" / "environment").read_text().split("\0")
        if "=" in pair
    )
    assert seen["WANDB_API_KEY"] == SECRETS["WANDB_API_KEY"] and seen["HF_TOKEN"] == SECRETS["HF_TOKEN"]
    assert "AWS_SECRET_ACCESS_KEY" not in seen and "PYTHONPATH" not in seen
    (checkout / "out" / "canary" / "environment").unlink()  # the recorder's own file
    texts = [
        done.stdout,
        done.stderr,
        cluster.scontrol("show", "job", job),
        cluster.scontrol("write", "batch_script", job, "-"),
    ]
    texts += [path.read_text(errors="replace") for path in checkout.rglob("*") if path.is_file()]
    for value in SECRETS.values():
        assert not any(value in text for text in texts)


def test_a_submission_whose_answer_is_lost_makes_exactly_one_job(cluster, engaging, checkout, tmp_path):
    """sbatch takes the job and its answer is lost; then it is asked again after the controller was away."""
    real, fake = shutil.which("sbatch", path=cluster.env.get("PATH")), tmp_path / "bin"
    fake.mkdir()
    lost = 'echo "sbatch: error: Socket timed out on send/recv operation" >&2; exit 1'
    script = f'#!/bin/bash\n"{real}" "$@" >/dev/null\n{lost}\n'
    (fake / "sbatch").write_text(script)
    (fake / "sbatch").chmod(0o755)
    said = engaging(
        "launch",
        "gpt2",
        "--name",
        "lost",
        "--partition",
        "mit_preemptable",
        env={"PATH": f"{fake}:{cluster.env['PATH']}"},
    )
    job = job_of(checkout, "lost")
    assert "did not answer" in said.stdout and f"job {job}" in said.stdout
    assert cluster.squeue("--me", "--states=all", "--name=lost", "-o", "%F").split() == [job]
    cluster.wait_for(job)


def test_of_two_launches_of_a_name_at_one_instant_one_is_refused(cluster, engaging, checkout):
    """And two without a name are two runs, though both are named after the same second."""
    for words, outcomes in ((["--name", "twin"], [0, 2]), ([], [0, 0])):
        words = ["launch", "gpt2", "--partition", "mit_preemptable", *words]
        with ThreadPoolExecutor(2) as pool:
            both = list(pool.map(lambda words: engaging(*words, check=False), [words, words]))
        assert sorted(done.returncode for done in both) == outcomes, [done.stderr for done in both]
    named = cluster.squeue("--me", "--states=all", "--name=twin", "-o", "%F").split()
    assert named == [job_of(checkout, "twin")]
    (refused,) = (path for path in (checkout / "out" / ".launch").iterdir() if path.name == "twin")
    assert [path.name for path in refused.iterdir()] == ["001"]
    made = [path.name for path in (checkout / "out" / ".launch").iterdir()]
    assert len(made) == 3 and not any(name.startswith(".") for name in made), made
    for name in made:
        cluster.wait_for(job_of(checkout, name))


@pytest.mark.campaign
def test_the_controller_away_during_a_submission(cluster, engaging, checkout):
    cluster.kill_slurmctld()
    try:
        done = engaging("launch", "gpt2", "--name", "away", check=False, timeout=600)
        assert done.returncode == 75 and "does not answer" in done.stderr and done.stderr.count("\n") == 1
        assert not (checkout / "out" / ".launch" / "away").exists()
    finally:
        practice.start_controller(cluster.folder)
    try:  # before the nodes have reported to it, it refuses what they have: that is waited for
        assert (
            "Recommended: 2 h200 GPUs" in engaging("plan", "gpt2", "--gpus", 2, "--gpu-type", "h200").stdout
        )
    finally:
        practice.wait_for_registration(cluster.folder)
    engaging("launch", "gpt2", "--name", "away", "--partition", "mit_preemptable")
    cluster.wait_for(job_of(checkout, "away"))
