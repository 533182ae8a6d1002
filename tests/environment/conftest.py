"""A copied clone, an empty home, and a stand-in for conda, for the tests of setup_env.sh."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CONDA = """#!/bin/bash
# A stand-in for conda: `create` makes a venv that looks like its environment, `info --base` says where it is.
base=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
echo "$*" >>"$base/calls"
case $1 in
    info) echo "$base" ;;
    create)
        while [ "$1" != -p ]; do shift; done
        "@PYTHON@" -m venv "$2" && rm "$2"/bin/activate* && mkdir "$2/conda-meta"
        ;;
    *) exit 1 ;;
esac
"""
CONDA_SH = """
conda() {
    if [ "$1" = activate ]; then
        PATH=$2/bin:$PATH; export CONDA_PREFIX=$2
    else
        "@BASE@/bin/conda" "$@"
    fi
}
"""


@pytest.fixture(autouse=True)
def nobodys_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of the environment that these tests run in reaches them: `make test` exports its own ENV_PATH."""
    for name in [*os.environ]:
        if name.startswith(("ENV_", "CONDA", "VIRTUAL_ENV", "TORCH_INDEX", "MINIFORGE", "PYTHON")):
            monkeypatch.delenv(name)


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A copy of what set-up needs of the repository, in a folder with a space."""
    folder = tmp_path / "the clone"
    for name in ("nanogpt/common", "tools"):
        for path in (ROOT / name).glob("*.py"):
            target = folder / name / path.name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target)
    shutil.copy(ROOT / "nanogpt/__init__.py", folder / "nanogpt")
    (folder / "slurm/lib").mkdir(parents=True)
    shutil.copy(ROOT / "slurm/lib/env.sh", folder / "slurm/lib")
    (folder / "README.md").write_text("a clone\n")
    for name in ("setup_env.sh", "activate_env.sh", "pyproject.toml", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    return folder


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """An empty home folder with a space in its name."""
    folder = tmp_path / "my home"
    folder.mkdir()
    return folder


@pytest.fixture
def setup(clone: Path, home: Path):
    """Runs `bash setup_env.sh ARGS` with that home, as a new user on a machine without conda would."""
    dropped = ("CONDA", "ENV_", "TORCH_INDEX", "MINIFORGE", "VIRTUAL_ENV", "BASH_FUNC_module", "PYTHON")

    def run(*args: str, wrap: tuple[str, ...] = (), wait: bool = True, **env: str):
        clean = {key: value for key, value in os.environ.items() if not key.startswith(dropped)}
        command = [*wrap, "bash", str(clone / "setup_env.sh"), *args]
        full = {**clean, "HOME": str(home), "ENV_PYTHON": sys.executable, **env}
        options = {"env": full, "cwd": home, "text": True, "stdin": subprocess.DEVNULL}
        if wait:
            return subprocess.run(command, capture_output=True, timeout=600, **options)
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        return subprocess.Popen(command, start_new_session=True, **pipes, **options)

    return run


@pytest.fixture
def conda(tmp_path: Path) -> Path:
    """The stand-in's folder."""
    base = tmp_path / "stand in"
    (base / "etc/profile.d").mkdir(parents=True)
    (base / "bin").mkdir()
    (base / "bin/conda").write_text(CONDA.replace("@PYTHON@", sys.executable))
    (base / "bin/conda").chmod(0o755)
    (base / "etc/profile.d/conda.sh").write_text(CONDA_SH.replace("@BASE@", str(base)))
    return base
