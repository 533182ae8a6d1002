"""activate_env.sh, sourced from the shells that people use, and tools/bin/engaging, called from anywhere."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from env_kit import activate, env_of, refused

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def zsh() -> str:
    """zsh, installed where that is possible without asking anybody (root on Debian or Ubuntu: CI)."""
    if not shutil.which("zsh") and os.getuid() == 0 and shutil.which("apt-get") and os.environ.get("CI"):
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
        same = f"{{ {options}; }} >after 2>/dev/null; command -v python; command -v engaging"
        before = subprocess.run([shell, "-c", options], capture_output=True, text=True)
        once = activate(shell, clone, home, f'{same}; echo "$PYTHONNOUSERSITE"')
        assert once.stderr == ""
        assert once.stdout.splitlines()[-3:] == [python, f"{clone}/tools/bin/engaging", "1"], once
        assert (clone / "after").read_text() == before.stdout, f"{shell}: a shell option changed"

        twice = activate(shell, clone, home, f". '{clone}/activate_env.sh'; echo \"$PATH\"")
        assert "is active already" in twice.stdout
        path = twice.stdout.splitlines()[-1]
        assert (path.count(f"{env_of(home)}/bin"), path.count(f"{clone}/tools/bin")) == (1, 1)
        strict = f"set -eu; . '{clone}/activate_env.sh'; command -v python; echo $-"
        plain = subprocess.run([shell, "-euc", "echo $-"], capture_output=True, text=True)
        shown = subprocess.run(
            [shell, "-euc", strict], env={**os.environ, "HOME": str(home)}, capture_output=True, text=True
        )
        assert shown.stdout.splitlines()[-2:] == [python, plain.stdout.strip()], shown

        ran = subprocess.run([shell, clone / "activate_env.sh"], capture_output=True, text=True)
        assert ran.returncode == 2
        assert "source activate_env.sh" in ran.stderr

    (env_of(home) / ".engaging-nanogpt").unlink()
    half = activate("bash", clone, home, "set -eu; . ./activate_env.sh || echo alive $? $-")
    assert half.stdout == "alive 1 ehuBc\n"
    assert "did not come to its end" in half.stderr


def test_engaging_is_its_own_clones(clone, home, tmp_path):
    """By its path or a link, from any folder; with the environment's Python; no PYTHONPATH for what it starts."""
    engaging = clone / "tools/bin/engaging"
    own = {**os.environ, "HOME": str(home), "PATH": "/usr/bin:/bin"}

    def run(command: object = engaging, **env: str) -> subprocess.CompletedProcess:
        return subprocess.run([command, "where"], env={**own, **env}, cwd="/", capture_output=True, text=True)

    refused(run(), f"ENV_PATH: {home}/conda_envs/nanogpt_env", f"bash {clone}/setup_env.sh")
    (clone / "tools/cli.py").write_text(
        "import os, sys\n"
        "def entry(): print(__file__, sys.argv[1:], sys.prefix, os.environ.get('PYTHONPATH'), '' in sys.path)\n"
    )
    link = tmp_path / "bin" / "engaging"
    link.parent.mkdir()
    link.symlink_to(engaging)
    expected = f"{clone}/tools/cli.py ['where'] {sys.prefix} None False\n"
    assert run(VIRTUAL_ENV=sys.prefix).stdout == expected
    assert run(link, ENV_PATH=sys.prefix).stdout == expected


def test_packages_in_the_users_own_folder_stay_out(clone, home, tmp_path):
    """A stray module in ~/.local is not imported: after activation, by `engaging`, or in a job."""
    env_path = tmp_path / "like conda"  # a venv ignores ~/.local by itself, an environment of conda does not
    (env_path / "bin").mkdir(parents=True)
    (env_path / ".engaging-nanogpt").touch()
    base = getattr(sys, "_base_executable", sys.executable)
    (env_path / "bin/python").symlink_to(base)
    settings = {**os.environ, "HOME": str(home), "ENV_PATH": str(env_path), "ROOT": str(clone)}
    where = [base, "-c", "import site; print(site.getusersitepackages())"]
    folder = Path(subprocess.run(where, env=settings, capture_output=True, text=True).stdout.strip())
    folder.mkdir(parents=True)
    (folder / "usercustomize.py").write_text("print('stray')\n")
    shutil.copy(ROOT / "slurm/lib/common.sh", clone / "slurm/lib")
    for command, seen in (
        ('"$ENV_PATH/bin/python" -c ""', True),
        ("tools/bin/engaging --help", False),
        (". ./activate_env.sh; python -c ''", False),
        (". slurm/lib/common.sh; activate_environment; python -c ''", False),
    ):
        done = subprocess.run(
            ["bash", "-c", command], env=settings, cwd=clone, capture_output=True, text=True
        )  # fmt: skip
        assert done.returncode == 0, (command, done.stderr)
        assert ("stray" in done.stdout) is seen, (command, done)
