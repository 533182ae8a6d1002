"""Several ranks, one of which ends badly: its own words are the log's end, not torchrun's table."""

import pytest

from tests.slurm.branch_kit import bash, program


@pytest.mark.parametrize(
    ("ends", "status", "said"),
    [
        ("print('error: --x=1: no', file=sys.stderr, flush=True); os._exit(2)", 2, "error: --x=1: no"),
        ("raise RuntimeError('broken')", 1, "RuntimeError: broken"),
    ],
)
def test_the_first_rank_to_end_is_named_in_one_line(tmp_path, ends, status, said) -> None:
    trainer = program(
        tmp_path,
        "trainer.py",
        f"import os, sys, time\nif os.environ['RANK'] == '1':\n    {ends}\ntime.sleep(600)\n",
    )
    done = bash("slurm/lib/run.sh", "--gpus=2", trainer)
    assert done.returncode == status, done.stderr
    lines = done.stderr.strip().splitlines()
    assert lines[-1] == f"rank 1 ended first, with status {status}; what it said is above"
    assert said in lines and "ChildFailedError" not in done.stderr
