"""What environment.json says of the GPUs: as the driver's own tool prints them, here a program of its name."""

import pytest

from nanogpt.common import rundir


@pytest.fixture
def driver(tmp_path, monkeypatch):
    """`driver(lines)` puts an nvidia-smi on PATH that prints `lines`, and its arguments into a file."""

    def put(*lines: str, status: int = 0):
        tool = tmp_path / "nvidia-smi"
        text = "".join(f"printf '%s\\n' '{line}'\n" for line in lines)
        tool.write_text(f'#!/bin/sh\necho "$@" >"{tmp_path}/asked"\n{text}exit {status}\n')
        tool.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
        return tmp_path / "asked"

    for name in ("CUDA_VISIBLE_DEVICES", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    return put


H100 = "NVIDIA H100 80GB HBM3, 580.159.03"


def test_one_rank_uses_one_gpu(driver):
    driver(H100, H100)
    assert rundir.gpus([]) == {"gpus": ["NVIDIA H100 80GB HBM3"], "driver": "580.159.03"}
    assert rundir.gpus(["--device=cpu"]) == {"gpus": []}


def test_ranks_of_two_nodes(driver, monkeypatch):
    asked = driver(H100, H100, H100, H100)
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")
    assert len(rundir.gpus([])["gpus"]) == 8
    assert asked.read_text().split()[-1] == "--id=0,1,2,3"


def test_no_gpu_no_driver_or_one_that_fails(driver, monkeypatch, tmp_path):
    driver("No devices were found")
    assert rundir.gpus([]) == {"gpus": []}
    driver(H100, status=9)
    assert rundir.gpus([]) == {"gpus": []}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert rundir.gpus([]) == {"gpus": []}
    (tmp_path / "nvidia-smi").unlink()
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert rundir.gpus([]) == {"gpus": []} or rundir.shutil.which("nvidia-smi")
