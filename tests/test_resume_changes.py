"""A resume with another setting, data, code or torch: refused in one line, or taken where asked for, and noted."""

import json
import shutil
from pathlib import Path

import pytest

from tests.faults import tiny
from tests.resume_kit import refused, snapshot

REFUSED = {
    "learning rate": (["--learning_rate=0.02"], "--learning_rate=0.02"),
    "seed": (["--seed=5"], "--seed=5"),
    "width": (["--n_embd=32"], "--n_embd=32"),
    "tokens per step": (["--tokens_per_step=128"], "--tokens_per_step=128"),
    "batch that does not divide": (["--batch_size=3"], "--batch_size"),
    "published weights": (["--init_from=gpt2"], "--init_from=gpt2"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_change_that_is_not_exact_is_refused(name, trainer, tmp_path):
    assert trainer("--max_iters=2").status == 0
    before = snapshot(tmp_path / "run")
    flags, word = REFUSED[name]
    refused(trainer("--auto_resume=true", *flags), word)
    assert snapshot(tmp_path / "run") == before
    assert trainer("--auto_resume=true", "--max_iters=3").status == 0


def test_an_accepted_change_is_noted_and_remembered(trainer, tmp_path):
    assert trainer("--max_iters=2").status == 0
    accepted = trainer(
        "--auto_resume=true", "--learning_rate=0.02", "--max_iters=4", "--accept_changed=config"
    )
    assert accepted.status == 0, accepted.stderr
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["config"]["learning_rate"] == config["asked"]["learning_rate"] == 0.02
    assert trainer("--auto_resume=true", "--learning_rate=0.02", "--max_iters=6").status == 0


def test_other_data_are_refused(zygote, tmp_path):
    tiny.make_data(tmp_path / "a")
    tiny.make_data(tmp_path / "b", seed=2)
    flags = [*tiny.FLAGS, f"--out_dir={tmp_path}/run", "--max_iters=2", "--auto_resume=true"]
    assert zygote.run([*flags, f"--data_root={tmp_path}/a"]).status == 0
    longer = [*flags, "--max_iters=4"]
    done = zygote.run([*longer, f"--data_root={tmp_path}/b"])
    refused(done, "data set", "--accept_changed=data")
    shutil.copytree(tmp_path / "a", tmp_path / "c")  # equal data elsewhere are the same data
    assert zygote.run([*longer, f"--data_root={tmp_path}/c"]).status == 0
    accepted = zygote.run([*flags, "--max_iters=6", f"--data_root={tmp_path}/b", "--accept_changed=data"])
    assert accepted.status == 0
    assert "accepted" in accepted.stderr


def older_source(folder: Path) -> None:
    """As if the run in `folder` had been started before the repository's model.py was edited."""
    from nanogpt.common import source

    model, record = folder / "source/nanogpt/model.py", folder / "config.json"
    model.write_text("# as it was\n" + model.read_text())
    digest = source.digest(source.collect(folder / "source", (".",)))
    record.write_text(json.dumps({**json.loads(record.read_text()), "source_sha256": digest}))


def test_a_resume_by_hand_from_edited_source_is_refused_unless_it_is_wanted(trainer, tmp_path):
    assert trainer("--max_iters=2").status == 0
    folder = tmp_path / "run"
    older_source(folder)
    before = snapshot(folder)
    refused(
        trainer("--init_from=resume"),
        "nanogpt/model.py changed since",
        "--new_source=true",
        "--auto_resume=true",
    )
    assert snapshot(folder) == before
    unwatched = trainer("--auto_resume=true", "--max_iters=3")
    assert (
        unwatched.status == 0
        and "nanogpt/model.py changed since; this run goes on with its own copy" in unwatched.stderr
    )
    in_a_job = {
        "SLURM_JOB_ID": "7",
        "SLURM_RESTART_COUNT": "1",
    }  # requeued with the words of the first attempt
    requeued = trainer("--auto_resume=true", "--new_source", "--max_iters=4", env=in_a_job)
    assert requeued.status == 0 and "its own copy" in requeued.stderr
    wanted = trainer("--init_from=resume", "--new_source", "--max_iters=5")
    assert wanted.status == 0, wanted.stderr
    log = (folder / "log.txt").read_text()
    assert "\nnew source from attempt 4 on sha256 " in log and "\n-# as it was\n" in log
    assert not (folder / "source/nanogpt/model.py").read_text().startswith("# as it was")
    assert trainer("--init_from=resume").status == 0  # nothing has changed since
    assert sorted(tiny.losses(folder)) == list(range(20))


def test_an_edited_copy_and_another_torch_are_refused(trainer, tmp_path):
    assert trainer("--max_iters=2").status == 0
    folder = tmp_path / "run"
    model = folder / "source/nanogpt/model.py"
    text = model.read_text()
    model.write_text(text + "\n")
    refused(trainer("--auto_resume=true"), "source copy was edited", "--new_source=true")
    model.write_text(text)
    path = folder / "environment.json"
    environment = path.read_text()
    path.write_text(environment.replace('"torch": "', '"torch": "1.'))
    refused(trainer("--auto_resume=true"), "torch was 1.", "--accept_changed=torch")
    path.write_text(environment)
    assert trainer("--auto_resume=true", "--max_iters=3").status == 0


def test_a_momentary_flag_is_not_inherited(trainer, tmp_path):
    assert trainer("--max_iters=2").status == 0
    evaluated = trainer("--init_from=resume", "--eval_only=true")
    assert evaluated.status == 0
    assert trainer("--init_from=resume").status == 0  # trains on: --max_iters=20 is on the command line
    assert sorted(tiny.losses(tmp_path / "run")) == list(range(20))
