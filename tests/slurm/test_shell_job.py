"""`engaging shell` on a real SLURM: typed into on a terminal that `script` makes."""

import shlex
import shutil
import subprocess
import sys

import pytest


@pytest.mark.skipif(shutil.which("script") is None, reason="script (bsdutils) is not here to make a terminal")
def test_a_shell_has_the_gpus_the_environment_and_steps_of_its_own(cluster, root):
    words = ["--time", "5m", "--gpus", "2", "--gpu-type", "h200", "--partition", "pi_lab"]
    command = shlex.join([sys.executable, "-m", "tools", "shell", *words])
    typed = [
        'echo "J=$SLURM_JOB_ID G=$CUDA_VISIBLE_DEVICES P=$PWD"',
        "type -P python",
        'srun bash -c "echo step=$((6*7))" </dev/null',  # srun would swallow what is typed ahead
        "exit\n",
    ]
    done = subprocess.run(
        ["script", "-qec", command, "/dev/null"], input="; ".join(typed), cwd=root, capture_output=True, text=True,
        env={**cluster.env, "ENV_PATH": sys.prefix}, timeout=120,
    )  # fmt: skip
    assert f"G=0,1 P={root}" in done.stdout and f"{sys.prefix}/bin/python" in done.stdout, done.stdout
    assert "step=42" in done.stdout and "Relinquishing job allocation" in done.stdout, done.stdout
