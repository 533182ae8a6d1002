"""Several ranks, one of which ends badly: its own words are the log's end, not torchrun's table."""

from tests.slurm.branch_kit import bash, program

TRAINER = """import os, sys, time
if os.environ["RANK"] == "1":
    print("error: --x=1: no", file=sys.stderr, flush=True)
    os._exit(2)
time.sleep(600)
"""


def test_the_first_rank_to_end_is_named_in_one_line(tmp_path) -> None:
    done = bash("slurm/lib/run.sh", "--gpus=2", program(tmp_path, "trainer.py", TRAINER))
    assert done.returncode == 2, done.stderr
    lines = done.stderr.strip().splitlines()
    assert lines[-1] == "rank 1 ended first, with status 2; what it said is above"
    assert "error: --x=1: no" in lines and "ChildFailedError" not in done.stderr
