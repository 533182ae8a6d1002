"""A flag that the trainer would refuse is refused before the job queues, in the trainer's own words."""

import pytest

from tests.slurm.branch_kit import bash

SUBMIT = ". slurm/lib/submit.sh; check_flags"


@pytest.mark.parametrize(
    ("script", "words", "said"),
    [
        ("nanogpt/train_gpt2.sh", ["--max_iter=10"], "unknown flag --max_iter; did you mean '--max_iters'?"),
        ("nanogpt/train_gpt2.sh", ["--", "--max_iters=ten"], "--max_iters=ten: expected a whole number"),
        ("nanogpt/train_shakespeare.sh", ["no_such_preset"], "preset 'no_such_preset' does not exist"),
        ("modded/train_speedrun.sh", ["--lanes=7"], "--lanes=8, 16 or 32 do"),
        ("modded/train_speedrun.sh", ["snapshot", "--dc=true"], "--recipe=snapshot has no place for it"),
        ("nanogpt/train_gpt2.sh", ["--max_iters=10", "quickstart", "--out_dir=out/$(touch pwned)"], ""),
        ("modded/train_speedrun.sh", ["--", "--runs=8", "--seed=2"], ""),
        ("modded/train_speedrun.sh", ["tiny", "--smoke"], ""),
    ],
)
def test_flags_are_checked_at_submission(script, words, said) -> None:
    done = bash("-c", f'{SUBMIT} "$@"', "x", f"slurm/{script}", *words)
    assert (done.returncode, done.stdout) == (2 if said else 0, "")
    assert len(done.stderr.splitlines()) == bool(said) and said in done.stderr


@pytest.mark.parametrize(
    "settings", [{"SPEEDRUN_TRAINER": "tests/slurm/standin.py"}, {"ENV_PATH": "/nowhere"}]
)
def test_what_cannot_be_checked_is_left_to_the_job(settings) -> None:
    done = bash("-c", f"{SUBMIT} slurm/modded/train_speedrun.sh --stepz=3", env=settings)
    assert done.returncode == 0 and not done.stderr, done.stderr
