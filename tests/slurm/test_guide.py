"""The commands of the cluster's guides as they are printed, on the cluster: what trains is made tiny by appended flags.

What each line must do is in tests/docs/cluster_pages.py, next to the reasons of those that are not run.
"""

import re
import shlex
import sys
from pathlib import Path

import pytest
from conftest import MIRROR, TINY, write_tiny_set

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "docs"))

import cluster_pages

from tools.launch.snapshot import copy_code

GUIDES = [page for page in cluster_pages.PAGES if page.name.startswith("guide")]
# Ranks for two cores: checked only.
TOO_MANY = r"NUM_GPUS=[48]|--nodes=2|train_gpt2\.sh$|--partition=YOUR_PARTITION"
REFUSED = "Invalid generic resource (gres) specification"


class Shell:
    """Somebody who follows a page: a clone, exported variables, the number that sbatch has just printed."""

    def __init__(self, cluster, clone: Path) -> None:
        self.cluster, self.clone = cluster, clone
        self.exported: list[str] = []
        self.jobs: dict[str, str] = {}  # what each job is to do, by its number
        self.last = ""
        self.submitted: list[str] = []
        self.named: dict[str, str] = {}  # the newest job of each log's name
        self.env = {
            "PATH": f"{clone / 'tools/bin'}:{Path(sys.executable).parent}:{cluster.env['PATH']}",
            "ENV_PATH": sys.prefix,
            "DATA_ROOT": str(clone / "data"),
            "DATA_MIRROR": str(MIRROR) if MIRROR.is_dir() else str(clone),
            "HF_HUB_OFFLINE": "1",
            "SPEEDRUN_TRAINER": "nanogpt.train",
            "USER": "root",
        }

    def type(self, line: str, *more: str, check: bool = True, wrap: tuple[str, ...] = ()):
        """Run a line in bash with what the page has exported; `more` words are appended, placeholders filled in."""
        filled = line.replace("YOUR_PARTITION", "pi_lab")
        for name in re.findall(r"logs/([a-z-]+)-JOBID", filled):
            filled = filled.replace(f"{name}-JOBID", f"{name}-{self.named.get(name, 'none')}")
        filled = " ".join([filled.replace("JOBID", self.last), *map(shlex.quote, more)])
        script = "; ".join(["set -o pipefail", *self.exported, filled])
        done = self.cluster.run(
            *wrap, "bash", "-c", script, env=self.env, cwd=self.clone, check=check, timeout=600
        )
        found = re.findall(r"^(?:Submitted batch|submitted) job (\d+)", done.stdout, re.MULTILINE)
        for job in found:
            self.last = job
            self.submitted.append(job)
            self.named[self.cluster.job(job)["JobName"]] = job
        return done

    def end_of(self, job: str) -> str:
        """Wait for a job; what it has printed, once it has done what its line promises."""
        what = self.jobs.pop(job, "")
        state = self.cluster.wait_for(job, timeout=600)
        log = self.cluster.log(job)
        if what == "prepares" and state != "COMPLETED":  # there is no network here, and one line says so
            assert log.count("error: ") == 1 and "Traceback" not in log, log
        else:
            assert state == "COMPLETED", f"{what}: {state}\n{log}"
        return log

    def end_of_all(self) -> dict[str, str]:
        """The logs of all jobs that are under way."""
        return {job: self.end_of(job) for job in list(self.jobs)}


def follow(shell: Shell, line: str) -> None:
    """One line of a page, and what it must do."""
    what = cluster_pages.demanded(line)
    tiny = [
        *TINY,
        "--gradient_accumulation_steps=0",
        "--tokens_per_step=128",
        "--always_save_checkpoint=true",
    ]
    if what == "trains":
        tiny.append("--max_iters=12" if "max_iters" in line else "--max_iters=8")
        shell.type(line, *tiny, *(["--check=true"] if re.search(TOO_MANY, line) else []))
        assert shell.last not in shell.jobs, f"nothing was submitted: {line}"
        shell.jobs[shell.last] = what
        if "--max_iters=6000" in line:
            assert "resumed from step_" in shell.end_of(shell.last)
    elif what == "trains in an allocation":
        allocation = ("salloc", "-p", "pi_lab", "-N2", "--gres=gpu:1", "-c2", "--mem=4G", "-t10", "-Q")
        assert "2 ranks" in shell.type(line, *tiny, "--check=true", wrap=allocation).stdout
    elif what == "prepares":
        shell.type(line)
        shell.jobs[shell.last] = what
        shell.end_of(shell.last)
    elif what == "waits for ever":
        shell.type(line)
        job = shell.last
        shell.cluster.wait_until(lambda: shell.cluster.job(job)["Reason"].startswith("QOSMax"))
        assert shell.cluster.job(job)["Reason"] in ("QOSMaxGRESPerUser", "QOSMaxCpuPerUserLimit")
        assert "your own limit" in shell.type("engaging why JOBID").stdout
        said = shell.type("engaging doctor", check=False).stdout
        assert f"job {job} can never start: 8 GPUs in mit_normal_gpu: its limit" in said, said
    elif what == "needs the function":
        assert REFUSED in shell.type(line, check=False).stderr  # and with it: below
    elif what == "prints sbatch":
        before = shell.last
        assert shell.type(line).stdout.splitlines()[-1].startswith("sbatch --partition=mit_")
        assert shell.last == before
    elif what == "is refused":
        done = shell.type(line, check=False)
        (said,) = re.findall(r"`(error: NUM_GPUS=4 NODES=2: [^`]*)`", " ".join(GUIDES[0].read_text().split()))
        assert done.returncode == 2 and done.stderr.count("\n") == 1
        assert all(part in done.stderr for part in said.split("...")), done.stderr
    elif what == "works after the job":
        if shell.last in shell.jobs:
            shell.end_of(shell.last)
        assert shell.type(line).stdout.strip()
    elif what == "shows the log":
        (name,) = re.findall(r"logs/([a-z-]+)-JOBID", line)
        if shell.named[name] in shell.jobs:
            shell.end_of(shell.named[name])
        assert "attempt 1 on " in shell.type(line, check=False, wrap=("timeout", "1")).stdout
    elif what == "samples":
        assert shell.type(line, "--start=a", "--max_new_tokens=8", "--num_samples=1").stdout.strip()
    elif what == "works":
        if line.startswith(("export", "unset")):
            shell.exported.append(line)
        shell.type(line)
    else:
        done = shell.type(line, check=False)  # doctor says 1 when it has found something
        assert done.returncode in (0, 1) and "Traceback" not in done.stderr, done.stderr
        assert done.returncode == 0 or "doctor" in line, done.stderr


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh clone, the tiny set, and stand-ins for the large sets."""
    root = tmp_path_factory.mktemp("guide") / "engaging-nanogpt"
    copy_code(ROOT, root)
    (root / "logs").mkdir(exist_ok=True)
    write_tiny_set(root / "data" / "tiny")
    write_large_sets(root / "data")
    return root


def write_large_sets(data: Path) -> None:
    """FineWeb and OpenWebText in the real format, of 2,000 tokens: nothing here can download them."""
    import numpy as np

    from nanogpt.common.manifest import write_manifest
    from nanogpt.common.shards import write_shard

    for name, prefix in (("openwebtext", "openwebtext"), ("fineweb10B", "fineweb")):
        (data / name).mkdir()
        entries = []
        for number, split in enumerate(("val", "train")):
            tokens = np.random.default_rng(number).integers(0, 50256, 4000).astype(np.uint16)
            path = data / name / f"{prefix}_{split}_{number:06}.bin"
            entries.append({**write_shard(path, tokens), "split": split})
        write_manifest(data / name, name, "gpt2", 50257, 50256, entries)


@pytest.mark.campaign  # trains what the pages train; the lines that only ask are below
@pytest.mark.parametrize("page", cluster_pages.PAGES, ids=lambda page: page.stem)
def test_the_page_can_be_followed(cluster, clone, page):
    shell = Shell(cluster, clone)
    try:
        for line in cluster_pages.bash_lines(page):
            if cluster_pages.demanded(line):
                follow(shell, line)
        for log in shell.end_of_all().values():
            assert log.count(" attempt 1 on ") == 1, log
    finally:
        cluster.cancel(*shell.submitted)


def test_the_form_of_older_guides_fails_and_works_as_the_page_says(cluster, clone):
    page = (ROOT / "docs" / "guide-2-speedrun.md").read_text()
    (line,) = re.findall(r"^GPU_TYPE=\w+ NUM_GPUS=\d+ sbatch .*$", page, re.MULTILINE)
    shell = Shell(cluster, clone)
    done = shell.type(line, check=False)
    assert done.returncode == 1 and REFUSED in done.stderr
    assert f"`{REFUSED}`" in " ".join(page.split())
    done = shell.type(f"source activate_env.sh; {line}", "--check=true")
    try:
        assert "note: --gres=gpu:h100:1" in done.stderr
        assert "gres:gpu:h100:1" in cluster.job(shell.last)["TresPerNode"]
    finally:
        cluster.cancel(shell.last)


def test_a_missing_trainer_is_one_line_before_anything_is_queued(cluster, clone):
    shell = Shell(cluster, clone)
    shell.env["SPEEDRUN_TRAINER"] = "modded_nanogpt.nope"
    done = shell.type("GPU_TYPE=h100 NUM_GPUS=1 bash slurm/modded/train_speedrun.sh", check=False)
    assert done.returncode == 2 and not shell.last
    said = "this checkout has no such trainer yet; update it: git pull"
    assert done.stderr == f"error: modded_nanogpt.nope: {said}\n"
