"""Two jobs of one script train one run: a note when the second is submitted. And what a job waits for, by number."""

import pytest

from tests.slurm.branch_kit import bash, program
from tools.site import slurm
from tools.site.cluster import Cluster
from tools.site.why import explain

LIBRARIES = "set -euo pipefail; for part in common cluster data; do . slurm/lib/$part.sh; done"


@pytest.mark.parametrize(
    ("script", "queue", "command", "words", "noted"),
    [
        ("nanogpt/train_gpt2.sh", "41 41_N/A", "train_gpt2.sh", "", True),
        ("nanogpt/train_gpt2.sh", "41 41_N/A", "train_gpt2.sh --out_dir=out/a", "", False),
        ("nanogpt/train_gpt2.sh", "41 41_N/A", "train_gpt2.sh", "--out_dir=out/b", False),
        ("nanogpt/train_gpt2.sh", "41 41_3", "train_gpt2.sh", "", False),  # a task of an array
        ("nanogpt/train_gpt2.sh", "", "", "", False),
        (
            "modded/train_speedrun.sh",
            "41 41_N/A",
            "train_speedrun.sh",
            "",
            False,
        ),  # its runs have the jobs' numbers
    ],
)
def test_a_second_job_for_the_same_run_is_noted(tmp_path, script, queue, command, words, noted) -> None:
    program(tmp_path, "squeue", f"#!/bin/sh\necho '{queue}'\n")
    program(tmp_path, "scontrol", f"#!/bin/sh\necho 'JobId=41 Command=/x/{command} WorkDir=/x'\n")
    done = bash("-c", f"{LIBRARIES}; note_same_run slurm/{script} {words}", path=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert done.stderr.startswith("note: your job 41 trains out/nanogpt-gpt2 too") == noted
    assert noted or not done.stderr


def test_why_names_the_jobs_that_are_waited_for() -> None:
    row = "JobId=7 JobState=PENDING Reason=Dependency Dependency={} StdOut=/x UserId=x"
    one = explain(slurm.fields(row.format("afterany:60(unfulfilled)")), Cluster())
    assert one.text == "it waits for job 60 to end" and "JobId=7 Dependency=" in one.remedy
    two = explain(slurm.fields(row.format("afterok:60_*(unfulfilled),afterany:8(unfulfilled)")), Cluster())
    assert two.text == "it waits for jobs 60, 8 to end"
    assert explain(slurm.fields(row.format("(null)")), Cluster()).text == "it waits for another job to end"
