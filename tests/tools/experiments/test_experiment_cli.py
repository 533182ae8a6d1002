"""The command line: quick help, and one line and status 2 for whatever is written wrongly."""

import os
import subprocess
import sys

import kit
import pytest

from nanogpt.common.errors import UserError
from tools.cli import main

LOCAL = ("--executor", "local")


@pytest.mark.parametrize("words", [[], ["run"], ["plan"], ["status"], ["resume"], ["promote"]], ids=str)
def test_help_imports_nothing_heavy(words):
    code = (
        "import sys\nfrom tools.cli import main\n"
        f"try:\n    main(['experiment', *{words!r}, '--help'])\nexcept SystemExit as end:\n    assert not end.code\n"
        "print([name for name in ('torch', 'scipy', 'matplotlib') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=kit.ROOT, capture_output=True, text=True, env=kit.environment()
    )
    assert done.returncode == 0 and "usage: engaging experiment" in done.stdout, done.stderr
    assert done.stdout.rstrip().endswith("[]"), done.stdout


@pytest.fixture(scope="module")
def bad(clone, tmp_path_factory):
    """Configurations whose mistake shows only beside the checkout."""
    folder = tmp_path_factory.mktemp("bad")
    kit.configuration(folder, experiment_name="no_script", script="train_gpt_nowhere.py")
    kit.configuration(folder, experiment_name="outside", script="../../etc/passwd.py")
    kit.configuration(folder, experiment_name="absolute", script="/etc/passwd.py")
    kit.configuration(folder, experiment_name="flag", hyperparameters={"varient": "palm_parallel"})
    kit.configuration(folder, experiment_name="secret", hyperparameters={"wandb_api_key": "x"})
    kit.configuration(folder, experiment_name="gpus", n_gpus=64)
    kit.configuration(folder, experiment_name="plain", script="plain.py")
    kit.configuration(folder / "twice" / "a", experiment_name="twice")
    kit.configuration(folder / "twice" / "b", experiment_name="twice")
    kit.configuration(folder, experiment_name="good")
    for name, flags in (("base_1", {}), ("base_2", {"optimizer": "adam"})):
        kit.configuration(folder / "bases", experiment_name=name, stage="A", hyperparameters=flags)
    (folder / "empty").mkdir()
    (clone / "modded_nanogpt" / "plain.py").write_text(
        "print('step:1/1 val_loss:3.0 train_time:1ms step_avg:1.0ms')\n"
    )
    return folder


MISTAKES = [
    (["runn"], "did you mean 'run'"),
    (["run"], "required: --config"),
    (["run", "--config", "nowhere.json"], "no such configuration"),
    (["run", "--config", "palm_screning.json"], "did you mean 'palm_screening.json'"),
    (["run", "--config", "{bad}/empty"], "holds no configuration"),
    (["run", "--config", "{bad}/twice"], "has the same; name one of them otherwise"),
    (["run", "--config", "{bad}/bases"], "base_1 is stage A's baseline already"),
    (
        ["run", "--config", "{bad}/no_script.json"],
        "has no such script; there are: modded_nanogpt/train_gpt_simple.py, nanogpt/train.py",
    ),
    (["run", "--config", "{bad}/outside.json"], "expected a path inside the checkout"),
    (["run", "--config", "{bad}/absolute.json"], "expected a path inside the checkout"),
    (["run", "--config", "{bad}/flag.json"], "has no flag --varient; did you mean 'variant'"),
    (["run", "--config", "{bad}/flag.json", "--dry-run"], "has no flag --varient; did you mean 'variant'"),
    (["run", "--config", "{bad}/secret.json"], "a secret on a command line"),
    (["run", "--config", "{bad}/gpus.json"], "n_gpus=64: this machine has"),
    (["run", "--config", "{bad}/plain.json", "--one-job"], "has no --plan"),
    (["run", "--config", "{bad}/good.json", "--n-runs", "0"], "--n-runs='0'"),
    (["run", "--config", "{bad}/good.json", "--n_run", "2"], "did you mean '--n-runs'"),
    (["run", "--config", "{bad}/good.json", "--n-gpus", "-1"], "--n-gpus"),
    (["run", "--config", "{bad}/good.json", "--study", "../x"], "--study"),
    (["run", "--config", "{bad}/good.json", "--mem", "lots"], "--mem='lots'"),
    (["run", "--config", "{bad}/good.json", "--time", "soon"], "--time='soon'"),
    (["run", "--config", "{bad}/good.json", "--executor", "cloud"], "invalid choice: 'cloud'"),
    (["run", "--config", "{bad}/good.json", "--", "--seed=3"], "--seed: the runner sets it"),
    (
        ["run", "--config", "{bad}/good.json", "--", "--out_dir=x"],
        "--out_dir: the runner sets it: each run has",
    ),
    (["run", "--config", "{bad}/good.json", "--", "--check"], "--check: the runner sets it"),
    (["run", "--config", "{bad}/good.json", "--", "--num_iterations=many"], "expected a whole number"),
    (["run", "--config", "{bad}/good.json", "--", "lr=3"], "only flags of the trainer"),
    (["status"], "required: STUDY"),
    (["status", "nothing-of-this-name"], "no study, experiment or configuration"),
    (["status", "{bad}/good.json"], "none of its experiments was run here yet"),
    (["resume", "nothing-of-this-name"], "no study, experiment or configuration"),
    (["promote"], "name a STUDY"),
    (["promote", "nothing-of-this-name"], "no study, experiment or configuration"),
    (["plan", "nothing-of-this-name"], "no study, experiment or configuration"),
    (["plan", "{bad}/good.json", "--price", "cheap"], "--price='cheap'"),
    (["plan", "{bad}/good.json", "--price", "nan"], "--price='nan'"),
    (["plan", "{bad}/good.json", "--price", "h100=1,h100=2"], "--price="),
    (["plan", "{bad}/good.json", "--price", "-3"], "--price"),
]


@pytest.mark.parametrize(("words", "said"), MISTAKES, ids=lambda value: " ".join(value)[:60])
def test_a_mistake_is_one_line_and_status_2(clone, bad, monkeypatch, words, said):
    before = kit.experiments(clone)
    cut = words.index("--") if "--" in words else len(words)
    full = [word.format(bad=bad) for word in words]
    if words[0] in ("run", "plan") and "--executor" not in words:
        full[cut:cut] = LOCAL
    monkeypatch.chdir(clone)
    monkeypatch.setenv("ENV_PATH", sys.prefix)
    with pytest.raises(UserError) as caught:
        main(["experiment", *full])
    assert said in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 500
    assert kit.experiments(clone) == before


def test_the_line_goes_to_stderr(clone):
    done = kit.engaging(clone, "run", "--config", "nowhere.json", check=False)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


def test_rules_are_printed(clone):
    assert "one pivot" in kit.engaging(clone, "promote", "--rules").stdout


@pytest.mark.parametrize(
    ("said", "conf", "status"),
    [
        ("sinfo: fatal: Could not establish a configuration source", "", 0),
        ("sinfo: fatal: Could not establish a configuration source", "/mistyped/slurm.conf", 2),
        ("slurm_load_partitions: Unable to contact slurm controller", "", 75),
    ],
)
def test_slurms_commands_without_a_cluster_are_no_cluster(clone, tmp_path, said, conf, status):
    """As on a workstation that has its packages; a controller that is away, or a wrong path, is not that."""
    for name in ("sbatch", "squeue", "sinfo", "scontrol", "sacct", "sacctmgr"):
        (tmp_path / name).write_text(f"#!/bin/sh\necho '{said}' >&2\nexit 1\n")
        (tmp_path / name).chmod(0o755)
    path = kit.configuration(tmp_path / "configs", experiment_name="where")
    env = {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", "SLURM_CONF": conf}
    for words in (("run", "--config", path, "--dry-run"), ("plan", path)):
        done = kit.engaging(clone, *words, "--n-runs", 1, check=False, **env)
        assert done.returncode == status, done.stdout + done.stderr
        here = "no cluster is configured for them: this machine runs it" in done.stderr
        assert here is (status == 0)
