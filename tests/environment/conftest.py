"""A copied clone, an empty home, and stand-ins for Python's venv module, pip and conda, for the tests of setup_env.sh.

The environments are real venvs, made without pip in a tenth of a second; the pip in them installs modules of one
line (stand_in/pip_main.py). The environment that runs these tests is the suite's one real installation.
"""

import os
import shutil
import subprocess
import sys
from importlib import util
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).parent
FOREIGN = ("ENV_", "CONDA", "VIRTUAL_ENV", "TORCH_INDEX", "MINIFORGE", "PYTHON", "PIP_", "BASH_FUNC_module")
PYTHON = """#!/bin/sh
# A stand-in for Python: `-m venv` makes a real venv with a stand-in for pip; $VENV_WAITS=FILE makes it wait half-way.
case "$1 $2" in
    "-m venv")
        "@PYTHON@" -m venv --without-pip "$3" || exit 1
        if [ -n "${VENV_WAITS:-}" ]; then touch "$VENV_WAITS"; exec sleep 600; fi
        for site in "$3"/lib/python3*/site-packages; do
            mkdir "$site/pip" && touch "$site/pip/__init__.py" && cp "@PIP@" "$site/pip/__main__.py"
            if [ -n "@TOMLI@" ]; then mkdir "$site/pip/_vendor" && cp -R "@TOMLI@" "$site/pip/_vendor/tomli"; fi
        done
        ;;
    "-c "*ensurepip*) "@PYTHON@" "$@" >/dev/null && echo "$0" ;;
    *) exec "@PYTHON@" "$@" ;;
esac
"""
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
        echo "$A_VARIABLE_THAT_IS_NOT_SET" >/dev/null # as the activation scripts of real packages do
        PATH=$2/bin:$PATH; export CONDA_PREFIX=$2
    else
        "@BASE@/bin/conda" "$@"
    fi
}
"""


@pytest.fixture(autouse=True)
def nobodys_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing of the environment that these tests run in reaches them, neither its ENV_PATH nor its GPUs."""
    programs = tmp_path / "no GPU"
    programs.mkdir()
    for name, text in (("nvidia-smi", "exit 9"), ("sinfo", "echo '(null)'")):
        (programs / name).write_text(f"#!/bin/sh\n{text}\n")
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    for name in [*os.environ]:
        if name.startswith(FOREIGN):
            monkeypatch.delenv(name)


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A copy of what set-up needs of the repository, in a folder with a space."""
    folder = tmp_path / "the clone"
    for name in ("nanogpt/common", "tools", "tools/site"):
        for path in (ROOT / name).glob("*.py"):
            target = folder / name / path.name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target)
    shutil.copy(ROOT / "nanogpt/__init__.py", folder / "nanogpt")
    (folder / "slurm/lib").mkdir(parents=True)
    for name in ("env.sh", "settings.sh"):
        shutil.copy(ROOT / "slurm/lib" / name, folder / "slurm/lib")
    (folder / "tools/bin").mkdir()
    shutil.copy(ROOT / "tools/bin/engaging", folder / "tools/bin")
    for name in ("setup_env.sh", "activate_env.sh", "pyproject.toml"):
        shutil.copy(ROOT / name, folder)
    return folder


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """An empty home folder with a space in its name."""
    folder = tmp_path / "my home"
    folder.mkdir()
    return folder


@pytest.fixture
def python(tmp_path: Path) -> Path:
    """The stand-in for Python."""
    path = tmp_path / "stand in python"
    tomli = util.find_spec("pip._vendor.tomli") if sys.version_info < (3, 11) else None
    script = PYTHON.replace("@PYTHON@", sys.executable).replace("@PIP@", f"{HERE}/stand_in/pip_main.py")
    path.write_text(script.replace("@TOMLI@", tomli.submodule_search_locations[0] if tomli else ""))
    path.chmod(0o755)
    return path


@pytest.fixture
def setup(clone: Path, home: Path, python: Path):
    """Runs `bash setup_env.sh ARGS` with that home, as a new user on a machine without conda would."""

    def run(*args: str, wait: bool = True, **env: str):
        command = ["bash", str(clone / "setup_env.sh"), *args]
        full = {**os.environ, "HOME": str(home), "ENV_PYTHON": str(python), "ENV_MIN_FREE_GB": "1", **env}
        # Stand-ins of one size are replaced within one second, which is all that a .pyc tells its source by.
        full.setdefault("PYTHONDONTWRITEBYTECODE", "1")
        options = {"env": full, "cwd": home, "text": True, "stdin": subprocess.DEVNULL}
        if wait:
            return subprocess.run(command, capture_output=True, timeout=600, **options)
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        return subprocess.Popen(command, start_new_session=True, **pipes, **options)

    return run


@pytest.fixture
def conda(tmp_path: Path, python: Path) -> Path:
    """The folder of the stand-in for conda."""
    base = tmp_path / "stand in"
    (base / "etc/profile.d").mkdir(parents=True)
    (base / "bin").mkdir()
    (base / "bin/conda").write_text(CONDA.replace("@PYTHON@", str(python)))
    (base / "bin/conda").chmod(0o755)
    (base / "etc/profile.d/conda.sh").write_text(CONDA_SH.replace("@BASE@", str(base)))
    return base
