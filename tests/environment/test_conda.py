"""setup_env.sh and activate_env.sh with conda: a stand-in for it, and an installer of Miniforge that we serve."""

import functools
import hashlib
import http.server
import os
import shutil
import subprocess
import threading
from pathlib import Path

import pytest
from env_kit import activate, env_of, refused, works


def test_conda_makes_and_activates_it(setup, clone, home, conda):
    """By CONDA_SH, on PATH, by a module, in the usual folder: each finds the stand-in."""
    conda_sh = str(conda / "etc/profile.d/conda.sh")
    path = f"{conda / 'bin'}:{os.environ['PATH']}"
    module = f'() {{ [ "$*" = "load miniforge" ] && PATH="{conda}/bin:$PATH"; }}'
    for settings in ({"CONDA_SH": conda_sh}, {"PATH": path}, {"BASH_FUNC_module%%": module}):
        plan = setup("--plan", **settings)
        assert f"Python 3.12, by {conda_sh}" in plan.stdout, (settings, plan)
    assert "venv" in setup("--plan", "--no-conda", CONDA_SH=conda_sh).stdout
    shutil.copytree(conda / "etc", home / "miniforge3/etc")
    assert f"by {home}/miniforge3/etc/profile.d/conda.sh" in setup("--plan").stdout
    shutil.rmtree(home / "miniforge3")

    done = setup("--extras", "none", CONDA_SH=conda_sh)
    assert done.returncode == 0, done.stderr
    assert "conda environment with Python 3.12" in done.stdout
    call = next(line for line in (conda / "calls").read_text().splitlines() if line.startswith("create"))
    assert call == f"create -y -p {env_of(home)} --override-channels -c conda-forge python=3.12 pip"
    works(home, clone)
    for shell in ("bash", "zsh", "sh"):
        if not shutil.which(shell):
            continue
        strict = f"set -eu; . '{clone}/activate_env.sh' >/dev/null; echo $-$CONDA_PREFIX; command -v python"
        plain = subprocess.run([shell, "-euc", "echo $-"], capture_output=True, text=True).stdout.strip()
        shown = activate(shell, clone, home, strict, PATH="/usr/bin:/bin")
        assert shown.stdout.splitlines()[-2:] == [f"{plain}{env_of(home)}", f"{env_of(home)}/bin/python"], (
            shown
        )

    shutil.rmtree(conda)  # its module went away: the environment still works, and the user is told
    shown = activate("bash", clone, home, "command -v python")
    assert "only put first on PATH" in shown.stdout
    assert shown.stdout.splitlines()[-1] == f"{env_of(home)}/bin/python"
    gone = activate("bash", clone, home, "command -v python", CONDA_SH="/nowhere/conda.sh")
    assert gone.stdout.splitlines()[-1] == f"{env_of(home)}/bin/python", "a note, not an error"
    assert "note: CONDA_SH: /nowhere/conda.sh" in gone.stdout and gone.stderr == ""
    assert setup("--extras", "none", "--brief").returncode == 0


INSTALLER = """#!/bin/sh
[ "$1 $2" = "-b -p" ] || exit 9
mkdir -p "$3/etc/profile.d" "$3/bin" && cp "@CONDA@/bin/conda" "$3/bin/"
sed "s|@CONDA@|$3|" "@CONDA@/etc/profile.d/conda.sh" >"$3/etc/profile.d/conda.sh"
"""


@pytest.fixture
def miniforge(tmp_path: Path, conda: Path):
    """A local server with an installer that installs the stand-in; (its URL, its SHA-256)."""
    folder = tmp_path / "served"
    folder.mkdir()
    machine = os.uname()
    text = INSTALLER.replace("@CONDA@", str(conda))
    (folder / f"Miniforge3-26.3.2-3-{machine.sysname}-{machine.machine}.sh").write_text(text)
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(folder))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", hashlib.sha256(text.encode()).hexdigest()
    server.shutdown()
    server.server_close()


def test_miniforge_is_installed_when_asked_and_only_if_its_digest_is_right(setup, clone, tmp_path, miniforge):
    url, digest = miniforge
    plain = tmp_path / "plain"  # Miniforge's installer takes no folder with a space
    plain.mkdir()
    settings = {"HOME": str(plain), "MINIFORGE_URL": url}
    refused(
        setup("--install-miniforge", "--extras=none", **settings), "SHA-256 is", "848194851a98", "not run"
    )
    assert not (plain / "miniforge3").exists()
    missing = {**settings, "MINIFORGE_URL": f"{url}/nothing"}
    done = setup("--install-miniforge", "--extras=none", **missing)
    assert done.returncode == 2
    assert "could not be downloaded" in done.stderr.splitlines()[-1]

    (plain / "miniforge3").mkdir()  # half installed by a run that was killed
    (plain / "miniforge3.setup").touch()
    done = setup("--install-miniforge", "--extras=none", **settings, MINIFORGE_SHA256=digest)
    assert done.returncode == 0, done.stderr
    assert "conda environment with Python 3.12" in done.stdout
    assert not list(plain.glob(".miniforge*"))
    assert not (plain / "miniforge3.setup").exists()
    works(plain, clone)


def test_miniforge_is_refused_where_its_installer_would_fail(setup, home):
    refused(setup("--install-miniforge", "--extras=none"), "no space in a path")
    assert not (home / "miniforge3").exists()
    assert not env_of(home).exists()
