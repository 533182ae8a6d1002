"""What is known about GPUs by their names, and what is chosen for a device."""

import os

import pytest
import torch

from nanogpt.common import hardware, ranks
from nanogpt.common.errors import UserError
from nanogpt.common.machine import has_nvidia_driver, share_cores, usable_cores
from nanogpt.common.ranks import choose_device

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756), ("NVIDIA H100 NVL", 835),
        ("NVIDIA H200", 989), ("NVIDIA GH200 480GB", 989), ("NVIDIA B200", 2250),
        ("NVIDIA A100-SXM4-80GB", 312), ("NVIDIA A100-PCIE-40GB", 312), ("NVIDIA A10", 125), ("NVIDIA A10G", 70),
        ("NVIDIA A40", 149.7), ("NVIDIA L40S", 362), ("NVIDIA L40", 181), ("NVIDIA L4", 121),
        ("NVIDIA GeForce RTX 4090", 165.2), ("NVIDIA RTX PRO 6000 Blackwell Server Edition", 503.8),
    ],
)  # fmt: skip
def test_the_peak_of_gpus_that_a_cluster_has(name, tflops):
    assert hardware.peak_flops_of(name) == tflops * 1e12


def test_more_than_the_peak_is_a_wrong_peak_and_no_speed():
    peak = hardware.peak_flops_of("NVIDIA H200")
    assert hardware.utilisation(989e12, peak, 2) == 0.5
    assert hardware.utilisation_words(0.5) == "50.0 %"
    assert hardware.utilisation(989e12, None, 1) is None and hardware.utilisation_words(None) == "unknown"
    assert hardware.utilisation(1.04 * 989e12, peak, 1) == float("inf")
    assert "104" not in (words := hardware.utilisation_words(float("inf"))) and "peaks.py is wrong" in words


@pytest.mark.parametrize(
    "name", ["Foo 1", "Tesla V100-SXM2-32GB", "Quadro RTX 6000", "AMD Instinct MI300X", "", "NVIDIA L400"]
)
def test_an_unknown_gpu_has_no_peak_rather_than_a_wrong_one(name):
    assert hardware.peak_flops_of(name) is None


def test_a_cpu_has_no_peak_no_memory_figure_and_float32():
    assert hardware.peak_flops(CPU) is None
    assert hardware.memory_gib(CPU) is None
    assert hardware.choose_dtype("auto", CPU) == torch.float32
    assert hardware.choose_dtype("bfloat16", CPU) == torch.bfloat16
    assert hardware.describe(CPU).startswith("CPU")


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
@pytest.mark.parametrize("wanted", ["cuda", "cuda:0", "cuda:7"])
def test_a_gpu_that_is_not_there_is_refused(wanted):
    assert choose_device("auto", 0) == CPU
    with pytest.raises(UserError, match=f"--device={wanted}: .*--device=cpu"):
        choose_device(wanted, 0)


@pytest.mark.parametrize(("cuda", "remedy"), [(None, "bash setup_env.sh --cuda"), ("13.0", "nvidia-smi")])
def test_a_job_with_gpus_does_not_train_on_the_cpu(monkeypatch, cuda, remedy):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(ranks, "has_nvidia_driver", lambda: True)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    for name in ("SLURM_JOB_GPUS", "SLURM_STEP_GPUS", "SLURM_GPUS_ON_NODE"):
        monkeypatch.delenv(name, raising=False)
    assert choose_device("auto", 0) == CPU, "no job"
    monkeypatch.setenv("SLURM_JOB_GPUS", "0")
    with pytest.raises(UserError, match=remedy):
        choose_device("auto", 0)
    assert choose_device("cpu", 0) == CPU
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert choose_device("auto", 0) == CPU, "somebody hid them"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
def test_the_gpu_that_is_there():
    device = choose_device("auto", 0)
    assert device == torch.device("cuda", 0)
    assert torch.cuda.get_device_name(device) in hardware.describe(device)
    assert hardware.choose_dtype("auto", device) in (torch.bfloat16, torch.float16)
    assert hardware.memory_gib(device) >= 0
    with pytest.raises(UserError, match="--device=cuda:99"):
        choose_device("cuda:99", 0)


def test_threads_soon_sleep_while_they_wait_unless_the_user_says_otherwise():
    def chosen(**own: str) -> dict[str, str]:
        environment = dict(own)
        share_cores(environment)
        return environment

    assert chosen() == ({} if has_nvidia_driver() else {"GOMP_SPINCOUNT": "100000"})
    assert chosen(GOMP_SPINCOUNT="7") == {"GOMP_SPINCOUNT": "7"}
    assert chosen(OMP_WAIT_POLICY="ACTIVE") == {"OMP_WAIT_POLICY": "ACTIVE"}


def test_a_job_uses_no_more_cores_than_it_was_given(monkeypatch):
    mine = len(os.sched_getaffinity(0))
    for variable in ("SLURM_CPUS_PER_TASK", "SLURM_CPUS_ON_NODE"):
        monkeypatch.delenv(variable, raising=False)
    assert usable_cores() == mine
    monkeypatch.setenv("SLURM_CPUS_ON_NODE", "1")
    assert usable_cores() == 1
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "4096")
    assert usable_cores() == mine
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "none")
    assert usable_cores() == mine
