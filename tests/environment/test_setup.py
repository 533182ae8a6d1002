"""setup_env.sh and activate_env.sh: real venvs, a stand-in conda, kills, two at once, no network, errors.

The extras stay out here (`--extras none`): installing torch takes minutes, and `make test` did it already.
Real conda is checked by users only; the stand-in builds a real venv where conda would build its environment.
"""

import os
import random
import shutil
import signal
import subprocess
import time

import pytest
from env_kit import env_of, kill_session, refused, without_network, works


def test_new_then_again_without_a_network_then_from_another_clone(setup, clone, home, tmp_path):
    start_up = [
        home / name for name in (".bashrc", ".bash_profile", ".profile", ".zshrc", ".zshenv", ".condarc")
    ]
    for path in start_up[:-1]:
        path.write_text("# mine\n")
    first = setup("--extras", "none")
    assert first.returncode == 0, first.stderr
    assert "no conda here, so a venv" in first.stdout
    assert "make quickstart" in first.stdout
    works(home, clone)
    assert [path.read_text() for path in start_up[:-1]] == ["# mine\n"] * 5
    assert not start_up[-1].exists()

    offline = without_network()
    begin = time.monotonic()
    again = setup("--extras", "none", wrap=offline)
    assert again.returncode == 0, again.stderr
    assert "[3/3]" not in again.stdout
    assert time.monotonic() - begin < 10  # 0.1 s on a machine with nothing else to do
    brief = setup("--extras", "none", "--brief", wrap=offline)
    assert brief.stdout == f"setup_env: {env_of(home)} is complete\n"

    moved = clone.rename(tmp_path / "moved")
    done = subprocess.run(
        [*offline, "bash", moved / "setup_env.sh", "--extras=none"],
        env={**os.environ, "HOME": str(home)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "another clone" in done.stdout
    works(home, moved)


def test_killed_at_any_moment_it_recovers(setup, clone, home):
    """SIGKILL of the script and all it started, at seeded moments from the first tenth to after the end."""
    moments = random.Random(2).sample([0.05, 0.2, 0.4, 0.8, 1.2, 1.6, 2.0, 2.4, 2.8], 5)
    states = set()
    for moment in moments:
        process = setup("--extras", "none", wait=False)
        time.sleep(moment)
        states.add(process.poll())
        kill_session(process)
        process.communicate()
    assert None in states, "every run had ended before it was killed"
    done = setup("--extras", "none")
    assert done.returncode == 0, done.stderr
    works(home, clone)


def test_script_killed_under_a_running_pip_leaves_it_the_lock(setup, clone, home):
    """Only the script dies: the next one waits for the orphan instead of working on the same folder."""
    process = setup("--extras", "none", wait=False)
    deadline = time.monotonic() + 600
    while not env_of(home).with_suffix(".setup").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.3)
    os.kill(process.pid, signal.SIGKILL)
    done = setup("--extras", "none")
    process.communicate()
    assert done.returncode == 0, done.stderr
    works(home, clone)


def test_ctrl_c_says_so_and_blames_nothing(setup, clone, home):
    process = setup("--extras", "none", wait=False)
    marker, deadline = env_of(home).with_suffix(".setup"), time.monotonic() + 600
    while not (marker.exists() and "installing" in marker.read_text()) and time.monotonic() < deadline:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)
    said, _ = process.communicate()
    assert process.returncode == 130, said
    assert "stopped by Ctrl-C; what is done stays, and the same command goes on" in said
    for word in ("error", "Traceback", "network"):  # of ours, of a Python that was just starting
        assert word not in said, said
    done = setup("--extras", "none")
    assert done.returncode == 0, done.stderr
    works(home, clone)


def test_half_written_packages_and_a_lost_python_are_mended(setup, clone, home):
    """What a killed pip leaves: files without their record, a record without its files, a renamed folder."""
    assert setup("--extras", "none").returncode == 0
    site = next((env_of(home) / "lib").glob("python3*/site-packages"))
    (site / "setuptools/__init__.py").unlink()
    (site / "~etuptools").mkdir()
    (env_of(home) / ".engaging-nanogpt").unlink()
    env_of(home).with_suffix(".setup").write_text("installing\n")
    done = setup("--extras", "none")
    assert done.returncode == 0, done.stderr
    assert "half written, to be installed again: setuptools" in done.stdout
    assert not (site / "~etuptools").exists()
    works(home, clone)

    python = env_of(home) / "bin/python"  # and now the machine's Python goes away, as after an upgrade
    python.unlink()
    python.symlink_to(home / "gone")
    done = setup("--extras", "none")
    assert done.returncode == 0, done.stderr
    assert "[1/3]" in done.stdout
    works(home, clone)


def test_two_at_once_make_one_environment(setup, clone, home):
    both = [setup("--extras", "none", wait=False) for _ in range(2)]
    outputs = [process.communicate(timeout=600)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    assert sum("[1/3]" in output for output in outputs) == 1, outputs
    assert any("another setup_env.sh is at work" in output for output in outputs)
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


def test_too_old_a_python_is_named(setup, tmp_path):
    """No conda, and only a Python that is too old: what it is, what is needed, what to do."""
    tools = tmp_path / "only"
    tools.mkdir()
    for name in ("bash", "dirname", "cat", "sed", "grep", "df", "awk", "rm", "ls", "mkdir", "flock", "sleep"):
        (tools / name).symlink_to(shutil.which(name))
    refused(setup(PATH=str(tools), ENV_PYTHON=""), "no Python", "--install-miniforge")
    old = tools / "python3"
    old.write_text("#!/bin/sh\necho 'is Python 3.9, and 3.11 to 3.14 is needed' >&2\nexit 1\n")
    old.chmod(0o755)
    refused(setup(PATH=str(tools), ENV_PYTHON=""), "python3 is Python 3.9", "3.11 or newer")


def test_pip_failure_is_one_line_and_the_next_run_goes_on(setup, clone, home):
    offline = without_network()
    failed = setup("--extras", "none", wrap=offline, PIP_RETRIES="0", PIP_FIND_LINKS="")
    if failed.returncode == 0:
        pytest.skip("this machine installs setuptools without a network")
    assert failed.returncode == 2
    assert failed.stderr.splitlines()[-1].startswith("error: pip could not install everything")
    done = setup("--extras", "none")
    assert done.returncode == 0, done.stderr
    works(home, clone)
