"""activate_env.sh, sourced from the shells that people use."""

import os
import shutil
import subprocess

import pytest
from env_kit import activate, env_of


@pytest.fixture(scope="session")
def zsh() -> str:
    """zsh, installed where that is possible without asking anybody (root on Debian or Ubuntu: CI)."""
    if not shutil.which("zsh") and os.getuid() == 0 and shutil.which("apt-get"):
        subprocess.run(["apt-get", "update", "-qq"], capture_output=True)
        subprocess.run(
            ["apt-get", "install", "-y", "-qq", "zsh"], capture_output=True, stdin=subprocess.DEVNULL
        )
    if not shutil.which("zsh"):
        assert not os.environ.get("CI"), "zsh could not be installed on this CI machine"
        pytest.skip("zsh is not installed")
    return "zsh"


def test_activation_in_bash_and_zsh(setup, clone, home, zsh):
    missing = {shell: activate(shell, clone, home, "echo alive $?") for shell in ("bash", zsh, "sh")}
    assert setup("--extras", "none").returncode == 0
    python = f"{env_of(home)}/bin/python"
    for shell, without in missing.items():
        assert without.stdout == "alive 1\n", "the shell of the user must go on"
        assert without.stderr.count("\n") == 1
        assert "bash setup_env.sh" in without.stderr

        options = "set +o" if shell == "sh" else "set -o; setopt; shopt"
        same = f'{{ {options}; }} >after 2>/dev/null; command -v python; echo "$PYTHONNOUSERSITE"'
        before = subprocess.run([shell, "-c", options], capture_output=True, text=True)
        once = activate(shell, clone, home, same)
        assert once.stderr == ""
        assert once.stdout.splitlines()[-2:] == [python, "1"], once
        assert (home / "after").read_text() == before.stdout, f"{shell}: a shell option changed"

        twice = activate(shell, clone, home, f". '{clone}/activate_env.sh'; echo \"$PATH\"")
        assert "is active already" in twice.stdout
        assert twice.stdout.splitlines()[-1].count(f"{env_of(home)}/bin") == 1
        strict = subprocess.run(
            [shell, "-euc", f". '{clone}/activate_env.sh'; command -v python"],
            env={**os.environ, "HOME": str(home)},
            capture_output=True,
            text=True,
        )
        assert strict.stdout.splitlines()[-1:] == [python], strict

        ran = subprocess.run([shell, clone / "activate_env.sh"], capture_output=True, text=True)
        assert ran.returncode == 2
        assert "source activate_env.sh" in ran.stderr

    (env_of(home) / ".engaging-nanogpt").unlink()
    half = activate("bash", clone, home, "echo alive $?")
    assert half.stdout == "alive 1\n"
    assert "did not come to its end" in half.stderr
