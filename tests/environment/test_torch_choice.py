"""Which torch setup_env.sh installs, when it replaces it, and which index it refuses."""

import http.server
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from env_kit import env_of, pip_calls, refused

from nanogpt.common.errors import UserError
from tools import environment, torch_index
from tools.toml import tomllib

TRAIN = ("--extras", "train")
WHL = "https://download.pytorch.org/whl"
PLAIN = {"PIP_CONFIG_FILE": os.devnull}  # a pip that knows of PyPI only
GRES = "(null)\\ngpu:h200:8(S:0-1)\\n"


@pytest.fixture
def machine(tmp_path: Path):
    """`machine(driver, gres)`: the PATH of a machine with that driver and SLURM; None: without."""

    def path(driver: str | None = None, gres: str | None = None) -> str:
        folder = tmp_path / "programs"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        for name, answer in (("nvidia-smi", driver), ("sinfo", gres)):
            text = "exit 9" if answer is None else f"printf '{answer}'"
            (folder / name).write_text(f"#!/bin/sh\n{text}\n")
            (folder / name).chmod(0o755)
        return f"{folder}:{os.environ['PATH']}"

    return path


@pytest.mark.parametrize(
    ("driver", "gres", "args", "env", "words"),
    [
        ("590.48.01\\n590.48.01\\n", "", [], {}, "pip's default index, whose build is for CUDA 13.0, and driver 590"),
        ("580.65.06\\n", "", [], {}, "driver 580 runs it"),
        ("579.1\\n", "", [], {}, f"{WHL}/cu126: driver 579"),
        ("525.60.13\\n", "", ["--cuda"], {}, f"{WHL}/cu126: driver 525"),
        (None, GRES, [], {}, "for CUDA 13.0: no GPU here, but in partitions"),
        (None, None, [], {}, "for CUDA 13.0: no GPU here, and SLURM does not say"),
        (None, "(null)\\n", [], {}, f"{WHL}/cpu: no GPU here or in SLURM"),
        (None, "shard:4,gpu_mem:80\\n", [], {}, f"{WHL}/cpu: no GPU here or in SLURM"),
        (None, "(null)\\n", [], {"PIP_INDEX_URL": "file:///mirror"}, "pip's own index (no GPU here"),
        (None, "(null)\\n", ["--cuda"], {}, f"{WHL}/cu130: --cuda"),
        ("590.1\\n", GRES, ["--cpu"], {}, f"{WHL}/cpu: --cpu"),
        ("470.1\\n", GRES, ["--cpu"], {}, f"{WHL}/cpu: --cpu"),
        ("590.1\\n", GRES, [], {"TORCH_INDEX_URL": "file:///x"}, "TORCH_INDEX_URL=file:///x"),
    ],
)  # fmt: skip
@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere there are CPU builds only")
def test_build_follows_the_driver_and_the_cluster(setup, home, machine, driver, gres, args, env, words):
    plan = setup("--plan", *args, PATH=machine(driver, gres), **{**PLAIN, **env})
    assert words in plan.stdout.partition("torch from ")[2], plan
    assert not (home / "conda_envs").exists(), "a plan changes nothing"


def test_what_contradicts_is_refused(setup, machine):
    path = machine("470.82\\n", "")
    refused(setup("--plan", PATH=path), "driver 470", "525", "bash setup_env.sh --cpu")
    refused(setup("--plan", "--cpu", "--cuda"), "--cuda: contradicts --cpu")
    refused(setup("--plan", "--cpu", TORCH_INDEX_URL="file:///x"), "--cpu: TORCH_INDEX_URL")


def test_an_index_is_asked_before_pip(tmp_path, monkeypatch):
    """With the version: nothing; without: who has it; without an answer: pip may try."""
    builds = f"{WHL}/cu130=580 {WHL}/cpu="
    for name, wheels in (
        ("cu126", ["torch-2.13.0%2Bcu126-cp312-cp312-linux_x86_64.whl"]),
        ("cu124", ["torch-2.6.0%2Bcu124-cp312-x.whl", "torch-2.5.1%2Bcu124-cp312-x.whl"]),
    ):
        (tmp_path / name / "torch").mkdir(parents=True)
        links = "".join(f'<a href="/whl/{wheel}">{wheel}</a>\n' for wheel in wheels)
        (tmp_path / name / "torch/index.html").write_text(links)

    class Server(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=str(tmp_path))

        def do_GET(self):
            if "slow" in self.path:
                hold.wait()
            super().do_GET()

        def log_message(self, *args):
            pass

    hold = threading.Event()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        url = f"http://127.0.0.1:{server.server_port}"
        assert torch_index.check(f"{url}/cu126/", "2.13.0", builds) == ""
        assert torch_index.check(f"file://{tmp_path}/cu126", "2.13.0", builds) == ""
        for index, has in ((f"{url}/cu124", "newest is 2.6.0"), (f"{url}/nothing", "has none at all")):
            with pytest.raises(UserError) as error:
                torch_index.check(index, "2.13.0", builds)
            assert has in str(error.value)
            assert f"{WHL}/cu130 (NVIDIA driver 580 or newer), {WHL}/cpu (CPU)" in str(error.value)
        monkeypatch.setattr(torch_index, "PATIENCE_S", 0.2)
        for index in (f"{url}/slow", "http://127.0.0.1:9", "not a place"):
            assert torch_index.answer(index, 0.2) is None
        assert "pip asks it again" in torch_index.check(f"{url}/slow", "2.13.0", builds)
    finally:
        hold.set()
        server.shutdown()
        server.server_close()


def have(home: Path, module: str = "torch") -> str:
    """The version of the module in the environment, with torch's build; "" without it."""
    code = (
        f"import {module} as it; print(it.__version__, getattr(it, 'version', it).__dict__.get('cuda', ''))"
    )
    done = subprocess.run([env_of(home) / "bin/python", "-B", "-c", code], capture_output=True, text=True)
    return done.stdout.strip()


@pytest.fixture
def pytorch(clone, tmp_path) -> Path:
    """The clone takes a folder for PyTorch's site; the indices there have the pinned torch, cu124 an old one."""
    folder = tmp_path / "whl"
    for name, version in (("cu130", "2.13.0"), ("cu126", "2.13.0"), ("cpu", "2.13.0"), ("cu124", "2.6.0")):
        (folder / name / "torch").mkdir(parents=True)
        (folder / name / "torch" / f"torch-{version}+{name}-py3-none-any.whl").touch()
    script = clone / "slurm/lib/env.sh"
    script.write_text(script.read_text().replace(WHL, f"file://{folder}"))
    return folder


def test_torch_is_replaced_when_asked_and_only_then(setup, home, machine, pytorch):
    """What a home folder shared by a login node and GPU nodes meets."""

    def done(*args: str, driver: str | None = None, gres: str | None = "", **env: str) -> str:
        result = setup(*TRAIN, *args, PATH=machine(driver, gres), **{**PLAIN, **env})
        assert result.returncode == 0, result.stderr
        return result.stdout

    first = done(gres=GRES, PIP_DEFAULT_BUILD="cu130")
    assert have(home) == "2.13.0 13.0"
    assert first.splitlines()[-1].endswith("is checked in the first GPU job")
    assert "torch is replaced" in done("--cpu")
    assert have(home) == "2.13.0 None"
    assert "is complete" in done("--brief", driver="550.1\\n"), "what was asked for stays"
    assert "its torch is of another build" in done("--cuda", driver="590.1\\n")
    assert have(home) == "2.13.0 13.0"
    named = {"TORCH_INDEX_URL": f"file://{pytorch}/cu126"}
    assert f"torch is replaced: it came from file://{pytorch}/cu130" in done(**named)
    assert have(home) == "2.13.0 12.6"
    pip_calls(home)
    refused(setup(*TRAIN, TORCH_INDEX_URL=f"file://{pytorch}/cu124"), "no torch 2.13.0 (its newest is 2.6.0)")
    assert pip_calls(home) == [] and "is complete" in done("--brief"), "nothing was touched"
    lost = setup(*TRAIN, "--cpu", PATH=machine(None, ""), PIP_FAILS="at once", **PLAIN)
    assert lost.returncode and "check the network and run this again" in lost.stderr
    assert have(home) == "2.13.0 12.6", "without a network the old one stays"
    done("--cpu")
    assert have(home) == "2.13.0 None"


def test_an_old_driver_replaces_the_default_build(setup, home, machine, pytorch):
    assert setup(*TRAIN, PATH=machine("590.1\\n"), PIP_DEFAULT_BUILD="cu130").returncode == 0
    done = setup(*TRAIN, PATH=machine("550.1\\n"))
    assert "its torch is of another build" in done.stdout, done
    assert have(home) == "2.13.0 12.6"


@pytest.mark.skipif(sys.platform != "linux", reason="there is Triton for Linux only")
def test_the_tests_get_triton_where_torch_brings_none(setup, clone, home, machine, pytorch):
    """Beside a CPU build the pinned one, with --dev only; a build for CUDA keeps its own."""
    groups = tomllib.loads((clone / "pyproject.toml").read_text())["dependency-groups"]
    pinned = environment.pinned(groups["interpreter"])["triton"]
    settings = {**PLAIN, "PATH": machine(None, "")}
    assert setup(*TRAIN, **settings).returncode == 0
    assert have(home, "triton") == "", "training on a CPU needs none"
    done = setup(*TRAIN, "--dev", **settings)
    assert done.returncode == 0, done.stderr
    assert f"triton=={pinned}: this torch (a CPU build) brings none" in done.stdout
    assert have(home, "triton") == pinned
    (info,) = (env_of(home) / "lib").glob("python3*/site-packages/triton-*")  # taken away by somebody
    shutil.rmtree(info)
    assert f"triton is absent, pinned: {pinned}" in setup(*TRAIN, "--dev", **settings).stdout
    done = setup(*TRAIN, "--cuda", **settings)
    assert done.returncode == 0 and "torch is replaced" in done.stdout, done.stderr
    assert "brings none" not in done.stdout
    assert have(home, "triton") == "", "torch's own one comes with it"
