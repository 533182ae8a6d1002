"""setup_env.sh with a stand-in pip: repeated, changed, killed, two at once, bad settings; what it takes for complete.

Real conda is checked by users only; the real pip by the environment that these tests run in.
"""

import importlib.metadata
import os
import re
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
from env_kit import env_of, kill_session, pip_calls, refused, wait_for, works
from packaging.requirements import Requirement

from tools import environment
from tools.toml import tomllib

TOOLS = ("--extras", "tools")
NEEDED = "bash dirname cat sed grep df awk rm ls mkdir flock sleep uname"  # all that a refusal may start


def listing(folder: Path) -> list[str]:
    return sorted(str(path) for path in folder.rglob("*") if "__pycache__" not in str(path))


def test_new_then_again_then_from_another_clone(setup, clone, home, tmp_path):
    names = (".bashrc", ".bash_profile", ".profile", ".zshrc", ".zshenv")
    for name in names:
        (home / name).write_text("# mine\n")
    before = listing(clone)
    first = setup(*TOOLS)
    assert first.returncode == 0, first.stderr
    assert "no conda here, so a venv" in first.stdout
    assert "make quickstart" in first.stdout
    works(home, clone)
    (call,) = pip_calls(home)
    assert re.search(r"install --no-input -c \S*constraints.txt -r \S*requirements.txt", call)
    assert listing(clone) == before, "nothing is written into the clone"
    assert sorted(path.name for path in home.iterdir()) == sorted([*names, "conda_envs"])
    assert {(home / name).read_text() for name in names} == {"# mine\n"}

    moved = clone.rename(tmp_path / "moved")
    for words in ([*TOOLS, "--brief"], ["--extras", "none", "--brief"]):
        done = subprocess.run(
            ["bash", moved / "setup_env.sh", *words], env={**os.environ, "HOME": str(home)},
            capture_output=True, text=True,
        )  # fmt: skip
        assert done.stdout == f"setup_env: {env_of(home)} is complete\n", "it serves any clone"
    works(home, moved)
    assert pip_calls(home) == []


def test_what_it_was_made_from_is_remembered(setup, clone, home):
    """A changed pin or constraint is installed by the next set-up; a changed setting of a linter is nothing to it."""
    assert setup(*TOOLS).returncode == 0
    pip_calls(home)
    pyproject = clone / "pyproject.toml"
    pyproject.write_text(pyproject.read_text().replace("line-length = 110", "line-length = 99"))
    assert "is complete" in setup(*TOOLS, "--brief").stdout
    for old, new in (('"rich==15.0.0"', '"rich==15.0.1"'), ('"idna==', '"idna==0.')):
        pyproject.write_text(pyproject.read_text().replace(old, new))
        done = setup("--extras", "none")
        assert done.returncode == 0, done.stderr
        assert "the dependency lists of pyproject.toml are not those" in done.stdout
        assert "[1/3]" not in done.stdout and len(pip_calls(home)) == 1
    version = [env_of(home) / "bin/python", "-B", "-c", "import rich; print(rich.__version__)"]
    assert subprocess.run(version, capture_output=True, text=True).stdout == "15.0.1\n"

    (rich,) = (env_of(home) / "lib").glob("python3*/site-packages/rich-*")  # somebody takes one away
    shutil.rmtree(rich)
    assert "rich is absent, pinned: 15.0.1" in setup(*TOOLS).stdout


def test_an_environment_with_an_editable_clone_is_mended_without_a_rebuild(setup, clone, home):
    assert setup(*TOOLS).returncode == 0
    site = next((env_of(home) / "lib").glob("python3*/site-packages"))
    info = site / "engaging_nanogpt-0.1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: engaging-nanogpt\nVersion: 0.1.0\n")
    finder, command = site / "__editable__.engaging_nanogpt-0.1.0.pth", env_of(home) / "bin/engaging"
    finder.write_text(f"{clone}\n")
    command.touch()
    (info / "RECORD").write_text(f"{finder.name},,\n../../../bin/engaging,,\n")
    stamp = env_of(home) / ".engaging-nanogpt"
    stamp.write_text(f"pins=1\npython=3.1.1\npackages=tools\nroot={clone}\nextras=tools\ntorch_index=\n")
    pip_calls(home)
    done = setup("--extras", "none")
    assert done.returncode == 0, done.stderr
    assert "an earlier version installed its clone" in done.stdout
    assert "[1/3]" not in done.stdout
    assert pip_calls(home)[0] == "uninstall -qy engaging-nanogpt"
    assert not command.exists()
    works(home, clone)
    assert "is complete" in setup(*TOOLS, "--brief").stdout


@pytest.mark.parametrize("moment", ["VENV_WAITS", "PIP_WAITS"])
def test_killed_it_recovers(setup, clone, home, tmp_path, moment):
    """SIGKILL of the script and all it started, in the middle of each of its steps."""
    process = setup(*TOOLS, wait=False, **{moment: str(tmp_path / "waits")})
    wait_for(tmp_path / "waits", process)
    kill_session(process)
    done = setup(*TOOLS)
    assert done.returncode == 0, done.stderr
    works(home, clone)


def test_script_killed_under_a_running_pip_leaves_it_the_lock(setup, clone, home, tmp_path):
    """Only the script dies: the next one waits for the orphan instead of working on the same folder."""
    process = setup(*TOOLS, wait=False, PIP_WAITS=str(tmp_path / "waits"))
    wait_for(tmp_path / "waits", process)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    follower = setup(*TOOLS, wait=False)
    for line in follower.stdout:
        if "another setup_env.sh is at work" in line:
            break
    kill_session(process)  # the orphan
    said, _ = follower.communicate()
    assert follower.returncode == 0, said
    works(home, clone)


def test_ctrl_c_says_so_and_blames_nothing(setup, clone, home, tmp_path):
    process = setup(*TOOLS, wait=False, PIP_WAITS=str(tmp_path / "waits"))
    wait_for(tmp_path / "waits", process)
    os.killpg(process.pid, signal.SIGINT)
    said, _ = process.communicate()
    assert process.returncode == 130, said
    assert "stopped by Ctrl-C; what is done stays, and the same command goes on" in said
    for word in ("error", "Traceback", "network"):
        assert word not in said, said
    assert setup(*TOOLS).returncode == 0
    works(home, clone)


def test_a_failed_pip_is_one_line_and_the_next_run_goes_on(setup, clone, home, tmp_path):
    df = tmp_path / "df"  # where /tmp has no room, pip unpacks beside the environment
    df.write_text("#!/bin/sh\necho; case $2 in /tmp) echo x 1 1 5000000 ;; *) echo x 1 1 99000000 ;; esac\n")
    df.chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    failed = setup(*TOOLS, PIP_FAILS="yes", PATH=path, TMPDIR="/tmp")
    assert f"/tmp has less than 12 GB free, so pip unpacks in {env_of(home)}.tmp" in failed.stdout
    assert f"-c {env_of(home)}.tmp/constraints.txt" in pip_calls(home)[0]
    assert not env_of(home).with_suffix(".tmp").exists()
    assert failed.returncode == 2
    assert failed.stderr.splitlines()[-1].startswith("error: pip could not install everything")
    done = setup(*TOOLS)
    assert done.returncode == 0 and "[1/3]" not in done.stdout, done.stderr
    works(home, clone)

    python = env_of(home) / "bin/python"  # and now the machine's Python goes away, as after an upgrade
    python.unlink()
    python.symlink_to(home / "gone")
    done = setup(*TOOLS)
    assert done.returncode == 0 and "[1/3]" in done.stdout, done.stderr
    works(home, clone)


def test_half_written_packages_are_found(tmp_path):
    """What a killed pip leaves: files without their record, a record without its files, a renamed folder."""
    for name, record, size in (("whole", True, 5), ("short", True, 6), ("unrecorded", False, 5)):
        info = tmp_path / f"{name}-1.dist-info"
        info.mkdir()
        (info / "METADATA").touch()
        (tmp_path / f"{name}.py").write_text("12345")
        if record:
            (info / "RECORD").write_text(f"{name}.py,,{size}\n")
    (tmp_path / "~umpy").mkdir()
    assert environment.repair(tmp_path) == ["short-1", "unrecorded-1"]
    assert sorted(path.name for path in tmp_path.glob("*-*")) == ["whole-1.dist-info"]
    assert not (tmp_path / "~umpy").exists()


def test_two_at_once_make_one_environment(setup, clone, home):
    both = [setup(*TOOLS, wait=False) for _ in range(2)]
    outputs = [process.communicate(timeout=600)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    assert sum("[1/3]" in output for output in outputs) == 1, outputs
    works(home, clone)


@pytest.mark.parametrize(
    ("args", "env", "words"),
    [
        (["--dve"], {}, ["unknown option --dve", "--help"]),
        (["now"], {}, ["unknown option now"]),
        (["--extras"], {}, ["--extras", "list is missing"]),
        (["--extras="], {}, ["--extras"]),
        (["--extras", "train;rm"], {}, ["train;rm"]),
        (["--extras", "trian"], {}, ["trian", "no such extra"]),
        ([], {"ENV_PATH": "/"}, ["ENV_PATH", "folder of its own"]),
        ([], {"ENV_PATH": "/proc/nowhere/env"}, ["ENV_PATH", "cannot be written"]),
        ([], {"ENV_MIN_FREE_GB": "99999999"}, ["GB free, 99999999 GB needed"]),
        ([], {"ENV_MIN_FREE_GB": "much"}, ["ENV_MIN_FREE_GB", "much"]),
        ([], {"CONDA_SH": "/nowhere/conda.sh"}, ["CONDA_SH", "/nowhere/conda.sh"]),
        ([], {"ENV_PYTHON": "/nowhere/python"}, ["ENV_PYTHON", "/nowhere/python"]),
        ([], {"HOME": ""}, ["HOME"]),
    ],
)
def test_wrong_settings_are_one_line_and_change_nothing(setup, home, args, env, words):
    refused(setup(*args, **env), *words)
    assert not env_of(home).exists()


def test_home_and_folders_of_others_are_left_alone(setup, clone, home):
    refused(setup(ENV_PATH=str(home)), "folder of its own")
    refused(setup(ENV_PATH=f"{clone}/"), "folder of its own")
    theirs = home / "theirs"
    theirs.mkdir()
    (theirs / "thesis.tex").write_text("years of work")
    for args in ([], ["--rebuild"]):
        refused(setup("--extras", "none", *args, ENV_PATH=str(theirs)), "this script did not make it")
    assert (theirs / "thesis.tex").read_text() == "years of work"


def test_too_old_a_python_is_named(setup, tmp_path, python):
    """No conda, and only a Python that is too old: what it is, what is needed, what to do."""
    tools = tmp_path / "only"
    tools.mkdir()
    for name in NEEDED.split():
        (tools / name).symlink_to(shutil.which(name))
    commands = (
        "apt-get install python3-venv",
        "dnf install python3.12",
        "brew install",
        "--install-miniforge",
    )
    refused(setup(PATH=str(tools), ENV_PYTHON=""), "no Python", *commands)
    old = tools / "python3"
    old.write_text("#!/bin/sh\necho 'is Python 3.9, and 3.10 to 3.14 is needed' >&2\nexit 1\n")
    old.chmod(0o755)
    refused(setup(PATH=str(tools), ENV_PYTHON=""), "python3 is Python 3.9, and 3.10 to 3.14 is needed")
    (tools / "python3.12").symlink_to("/bin/false")  # a version manager's stand-in for one that is not there
    uv = tools / "uv"
    uv.write_text(f'#!/bin/sh\n[ "$1 $2 $3" = "python find --no-python-downloads" ] && echo "{python}"\n')
    uv.chmod(0o755)
    assert f"by {python} (no conda)" in setup("--plan", PATH=f"{tools}", ENV_PYTHON="").stdout


def test_what_kernels_need_is_said_in_one_line(tmp_path, monkeypatch):
    cc, include = tmp_path / "cc", tmp_path / "include"
    include.mkdir()
    (include / "Python.h").touch()
    monkeypatch.setattr(environment.sysconfig, "get_paths", lambda: {"include": str(include)})
    for script, said in (
        ("exit 0", []),
        (
            "echo 'stub.c:1: fatal: no' >&2; exit 1",
            ["note: ", "cannot compile C against Python.h", "fatal: no"],
        ),
    ):
        cc.write_text(f"#!/bin/sh\n{script}\n")
        cc.chmod(0o755)
        monkeypatch.setenv("CC", f"{cc} -O1")
        assert all(word in "".join(environment._compiler_note()) for word in said)
        assert len(environment._compiler_note()) == bool(said)
    (include / "Python.h").unlink()
    assert "has no Python.h" in environment._compiler_note()[0]
    monkeypatch.setenv("CC", str(tmp_path / "gone"))
    assert "does not run" in environment._compiler_note()[0]
    monkeypatch.delenv("CC")
    monkeypatch.setenv("PATH", str(tmp_path / "include"))
    assert "no C compiler on PATH" in environment._compiler_note()[0]


def test_each_python_has_its_pins():
    lines = [
        "a==1.0",
        "b==2.0; python_version >= '3.11'",
        "b==1.9; python_version < '3.11'",
        "c==3; python_version < '3.11'",
    ]
    assert environment.pinned(lines, 10) == {"a": "1.0", "b": "1.9", "c": "3"}
    assert environment.pinned(lines, 11) == environment.pinned(lines, 14) == {"a": "1.0", "b": "2.0"}


def test_the_lock_of_uv_agrees():
    """Every pin and constraint is what uv.lock has: `make uvlock` writes it anew."""
    versions: dict[str, set[str]] = {}
    for package in tomllib.loads((environment.ROOT / "uv.lock").read_text())["package"]:
        versions.setdefault(package["name"], set()).add(package["version"])
    whole = environment._pyproject()
    extras = [line for lines in whole["project"]["optional-dependencies"].values() for line in lines]
    pinned: dict[str, set[str]] = {}
    for line in [*extras, *whole["tool"]["uv"]["constraint-dependencies"]]:
        name, version = environment.REQUIREMENT.fullmatch(line).groups()[:2]
        pinned.setdefault(name, set()).add(version)
    wrong = {name: [*found] for name, found in versions.items() if name in pinned and found != pinned[name]}
    missing = {line.split("==")[0] for line in extras} - {*versions}
    assert (wrong, missing) == ({}, set()), "run: make uvlock"


def test_every_package_that_comes_along_is_pinned():
    """Walks from the pins of pyproject.toml through what this very environment has: nothing floats."""
    plain, present = environment.plain, environment.installed()
    project = environment._pyproject()["project"]["optional-dependencies"]
    pinned = {plain(name): version for name, version in environment.pins([*project]).items()}
    fixed = environment.constraints()
    assert [*fixed] == sorted(map(plain, fixed)), "in order, under their plain names"
    known, queue = {**fixed, **pinned}, [*pinned]
    seen: set[str] = set()
    while queue:
        name = queue.pop()
        if name in seen:
            continue
        seen.add(name)
        for line in importlib.metadata.requires(name) or []:
            needed = Requirement(line)
            if needed.marker and not needed.marker.evaluate({"extra": ""}):
                continue
            child = plain(needed.name)
            if plain(name) == "torch" and child not in known:
                continue  # torch fixes the version of its own CUDA libraries and Triton
            assert child in known, f"{name} needs {child}: a line for it in [tool.uv] constraint-dependencies"
            assert present[child].split("+")[0] == known[child], (name, child)
            queue.append(child)
