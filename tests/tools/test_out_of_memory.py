"""A job that was killed for its memory (cases G8, F72): never "done", and the figure to ask for next."""

import pytest

from tests.slurm.branch_kit import ROOT, bash, program
from tools.site import slurm, why
from tools.site.cluster import Cluster
from tools.site.usage import FIELDS, advice, read_usage, show

TRES = "TRES=cpu=8,mem=64G,node=1,billing=8,gres/gpu=2"


@pytest.mark.parametrize(
    ("row", "remedy"),
    [
        (
            f"JobState=OUT_OF_MEMORY ExitCode=0:125 {TRES}",
            "--mem 128G when you launch it (sbatch: --mem=128G)",
        ),
        (
            f"JobState=FAILED ExitCode=0:125 {TRES} NumNodes=2",
            "--mem 64G when you launch it (sbatch: --mem=64G)",
        ),
        (f"JobState=FAILED ExitCode=137:0 {TRES} MemPerTres=gres:gpu:32768", "(sbatch: --mem-per-gpu=64G)"),
        ("JobState=OUT_OF_MEMORY ExitCode=0:125", "--mem with twice of it"),
    ],
)
def test_why_names_the_memory_to_ask_for(row, remedy) -> None:
    said = why.explain(slurm.fields(f"JobId=7 {row} StdOut=/x/7.out"), Cluster())
    assert remedy in said.remedy and "memory" in said.text


def test_why_reads_the_accountings_way_to_write_a_signal(monkeypatch) -> None:
    """sacct takes 128 off a status above it: 137 is shown as 9, which is nobody's own status."""
    answer = "JobID|State|ExitCode|ReqTRES|NNodes\n7|FAILED|9:0|cpu=1,mem=150M|1\n8|FAILED|2:0|cpu=1|1\n"
    monkeypatch.setattr(slurm, "ask", lambda words, **_: slurm.Answer(0, answer, ""))
    killed, refused = why._from_accounting("7,8")
    assert "--mem 300M" in why.explain(killed, Cluster()).remedy
    assert "refused a flag" in why.explain(refused, Cluster()).text


@pytest.mark.parametrize(
    ("state", "peak"), [("OUT_OF_MEMORY", ""), ("OUT_OF_MEMORY", "9G"), ("FAILED", "148M")]
)
def test_usage_advises_even_a_short_job(state, peak) -> None:
    row = f"9|{state}|gpu|00:00:21|06:00:00|cpu=1,mem=150M|||1|1||||train\n"
    step = f"9.0|CANCELLED||00:00:07||||||1||{peak}||bash\n"
    (usage,) = read_usage(FIELDS.replace(",", "|") + "\n" + row + step)
    assert advice(usage) == ["--mem 300M: its memory was used up"]
    assert "of 0.15 GB" in "\n".join(show(usage))


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"SLURM_MEM_PER_GPU": "32768"}, ": --mem-per-gpu=65536M asks for twice as much"),
        ({"SLURM_MEM_PER_NODE": "2097152"}, ": --mem=4194304M asks for twice as much"),
        ({"SLURM_MEM_PER_CPU": "2000"}, ": --mem-per-cpu=4000M asks for twice as much"),
        ({}, "what it said is above\n"),
    ],
)
def test_the_log_says_what_to_ask_for_and_the_job_ends(tmp_path, asked, said) -> None:
    """Three attempts, then it is over: no job loops on too little memory. Stand-ins for srun, scontrol and sleep."""
    program(tmp_path / "bin", "srun", '#!/bin/sh\n: >"$RUN_FOLDER/began"\necho srun >>calls\nexit 137\n')
    program(tmp_path / "bin", "scontrol", '#!/bin/sh\necho "scontrol $*" >>calls\n')
    program(tmp_path / "bin", "sleep", "#!/bin/sh\n")
    job = {"SLURM_JOB_ID": "7", "SLURM_MEM_PER_GPU": "", **asked}
    done = bash(ROOT / "slurm/lib/run.sh", "nanogpt.train", env=job, cwd=tmp_path, path=str(tmp_path / "bin"))
    assert done.returncode == 137 and "giving up" in done.stdout and said in done.stdout, done
    calls = (tmp_path / "calls").read_text()
    assert calls.count("srun") == 3 and "requeue" not in calls
