"""Which torch setup_env.sh installs, and when it replaces it."""

import os
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from env_kit import env_of, refused, without_network


def test_torch_build_follows_the_driver(setup, home, tmp_path):
    """No driver or a new one: the index of pip. An older one: CUDA 12.6. A setting overrides both."""
    smi = tmp_path / "bin/nvidia-smi"
    smi.parent.mkdir()

    def plan(answer: str, status: int = 0, **env: str) -> subprocess.CompletedProcess:
        smi.write_text(f"#!/bin/sh\nprintf '{answer}'\nexit {status}\n")
        smi.chmod(0o755)
        return setup("--plan", PATH=f"{smi.parent}:{os.environ['PATH']}", **env)

    assert "no NVIDIA driver here" in setup("--plan").stdout
    assert "no NVIDIA driver here" in plan("NVIDIA-SMI has failed", 9).stdout
    assert "driver 590 runs it" in plan("590.48.01\\n590.48.01\\n").stdout
    assert "driver 580 runs it" in plan("580.65.06\\n").stdout
    for driver in ("579.1", "550.54.15", "525.60.13"):
        assert "torch from https://download.pytorch.org/whl/cu126" in plan(f"{driver}\\n").stdout
    refused(plan("470.82\\n"), "driver 470", "525", "TORCH_INDEX_URL")
    assert "torch from TORCH_INDEX_URL=file:///x" in plan("590.1\\n", TORCH_INDEX_URL="file:///x").stdout
    assert not (home / "conda_envs").exists(), "a plan changes nothing"


TORCH = """__version__ = "{version}"
class version: cuda = None
class cuda:
    @staticmethod
    def is_available(): return False
"""


def wheel(folder: Path, name: str, version: str, requires: str = "") -> None:
    """A torch or triton of a few lines, as pip takes it."""
    info = f"{name}-{version}.dist-info"
    needed = f"Requires-Dist: {requires}\n" if requires else ""
    files = {
        f"{name}.py": TORCH.format(version=version),
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{needed}",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: us\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(f"{path},,\n" for path in files) + f"{info}/RECORD,,\n"
    folder = folder / name
    folder.mkdir(parents=True, exist_ok=True)
    file = f"{name}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(folder / file, "w") as archive:
        for path, text in {**files, f"{info}/RECORD": record}.items():
            archive.writestr(path, text)
    links = folder / "index.html"
    had = links.read_text() if links.exists() else ""
    links.write_text(f'{had}<a href="{file.replace("+", "%2B")}">{name}</a>\n')


@pytest.fixture
def small_extras(setup, clone, tmp_path) -> dict[str, str]:
    """Settings under which pip finds these torches only; `train` is torch alone, `dev` nothing."""
    pyproject = clone / "pyproject.toml"
    text = pyproject.read_text()
    for extra, content in (("train", '"torch==2.13.0"'), ("dev", "")):
        start = text.index(f"\n{extra} = [")
        text = f"{text[:start]}\n{extra} = [{content}]{text[text.index(']', start) + 1 :]}"
    pyproject.write_text(text)
    assert setup("--extras", "none").returncode == 0  # setuptools comes from the real index
    wheel(tmp_path / "default", "torch", "2.13.0")
    clean = {"PIP_FIND_LINKS": "", "PIP_CONFIG_FILE": os.devnull, "PIP_EXTRA_INDEX_URL": ""}
    return {**clean, "ENV_MIN_FREE_GB": "1", "PIP_INDEX_URL": f"file://{tmp_path / 'default'}"}


def have(home: Path, module: str = "torch") -> str:
    """The version of the module in the environment; "" without it."""
    code = f"import {module} as it; print(it.__version__)"
    done = subprocess.run([env_of(home) / "bin/python", "-c", code], capture_output=True, text=True)
    return done.stdout.strip()


def test_torch_is_replaced_when_another_index_is_named_and_only_then(setup, home, tmp_path, small_extras):
    """What a home folder shared by a login node and GPU nodes meets, with a torch of a few lines."""
    older = tmp_path / "older"
    wheel(older, "torch", "2.13.0+cu126")
    smi = tmp_path / "bin/nvidia-smi"
    smi.parent.mkdir()
    smi.write_text("#!/bin/sh\necho 550.54.15\n")
    smi.chmod(0o755)
    first = setup("--extras", "train", **small_extras)
    assert first.returncode == 0, first.stderr
    assert have(home) == "2.13.0"
    named = {**small_extras, "TORCH_INDEX_URL": f"file://{older}"}
    second = setup("--extras", "train", **named)
    assert second.returncode == 0, second.stderr
    assert "torch is replaced: it came from the default index" in second.stdout
    assert have(home) == "2.13.0+cu126"
    for settings in (small_extras, named, {**small_extras, "PATH": f"{smi.parent}:{os.environ['PATH']}"}):
        again = setup("--extras", "train", "--brief", **settings)
        assert again.stdout == f"setup_env: {env_of(home)} is complete\n", "an explicit choice stays"
    assert have(home) == "2.13.0+cu126"


@pytest.mark.skipif(sys.platform != "linux", reason="there is Triton for Linux only")
def test_the_tests_get_triton_where_torch_brings_none(setup, clone, home, tmp_path, small_extras):
    """Beside a CPU build the pinned one, with --dev only; a build for CUDA keeps its own."""
    pins = tomllib.loads((clone / "pyproject.toml").read_text())["dependency-groups"]["interpreter"]
    (pinned,) = (line.removeprefix("triton==") for line in pins if line.startswith("triton=="))
    wheel(tmp_path / "default", "triton", pinned)
    wheel(tmp_path / "default", "triton", "3.1.4")
    wheel(tmp_path / "cuda", "torch", "2.13.0+cu126", "triton==3.1.4; platform_system == 'Linux'")
    wheel(tmp_path / "cuda", "triton", "3.1.4")
    assert setup("--extras", "train", **small_extras).returncode == 0
    assert have(home, "triton") == "", "training on a CPU needs none"
    dev = ("--extras", "train", "--dev", "--brief")
    for gone in (False, True):  # new; and taken away again by somebody
        done = setup(*dev, **small_extras)
        assert done.returncode == 0, done.stderr
        assert f"triton=={pinned}: this torch (a CPU build) brings none" in done.stdout
        assert have(home, "triton") == pinned
        again = setup(*dev, wrap=without_network(), **small_extras)
        assert again.stdout == f"setup_env: {env_of(home)} is complete\n"
        if not gone:
            subprocess.run(
                [env_of(home) / "bin/python", "-m", "pip", "uninstall", "-qy", "triton"], check=True
            )
    named = {**small_extras, "TORCH_INDEX_URL": f"file://{tmp_path / 'cuda'}"}
    for said in ("torch is replaced", "is complete"):
        done = setup(*dev, **named)
        assert done.returncode == 0 and said in done.stdout, done.stderr
        assert "brings none" not in done.stdout
        assert (have(home), have(home, "triton")) == ("2.13.0+cu126", "3.1.4")
