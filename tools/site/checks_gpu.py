"""doctor's checks of the GPUs: seen, fast enough, and (with --gpus) able to talk to each other."""

import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from socket import gethostname
from typing import TextIO

from tools.args import counted
from tools.launch.environment import environment_python
from tools.launch.local import local_gpus
from tools.site.checks_machine import driver_version
from tools.site.doctor import Finding

PROBE = Path(__file__).with_name("gpu_probe.py")
# (name contains, dense bfloat16 TFLOPS, GB/s of memory), data sheets; the first match counts
PEAKS = (
    ("H200 NVL", 835, 4800), ("H200", 989, 4800), ("H100 PCIe", 756, 2000), ("H100 NVL", 835, 3900),
    ("H100", 989, 3350),
    ("B200", 2250, 8000), ("RTX PRO 6000", 500, 1790), ("A100-PCIE", 312, 1935), ("A100", 312, 2039),
    ("L40S", 362, 864),
    ("A40", 150, 696), ("L4", 121, 300),
)  # fmt: skip
SLOW_MATMUL, SLOW_COPY = 0.45, 0.60  # shares of the peak
NVLINK, NVLINK_BUS = (
    ("H200", "H100 80GB HBM3", "A100-SXM", "B200"),
    60.0,
)  # GB/s of an all-reduce; half a healthy one
PCIE_BUS = 5.0


def gpus(root: Path) -> list[Finding]:
    """Each GPU: bfloat16 matmul and memory bandwidth against its data sheet (about 3 s)."""
    if driver_version() is None:
        return [
            Finding(
                "gpu", "skip", "no GPU on this machine; inside a job: srun --gres=gpu:1 ... engaging doctor"
            )
        ]
    facts, error = _probe(["speed"], 240)
    if facts is None:
        return [
            Finding("gpu", "fail", f"torch cannot use the GPU: {error}", "bash setup_env.sh; then nvidia-smi")
        ]
    return [judge(index, row) for index, row in enumerate(facts["gpus"])]


def judge(index: int, row: dict) -> Finding:
    """One GPU's measurements as a finding. `row`: {"name", "tflops", "gb_per_s"}."""
    name, flops, copy = row["name"], row["tflops"], row["gb_per_s"]
    text = f"{index}: {name}, {flops:.0f} TFLOPS, {copy:.0f} GB/s"
    peak = next(((f, b) for part, f, b in PEAKS if part in name), None)
    if peak is None:
        return Finding("gpu", "ok", text + " (no figures to compare with)")
    if flops < SLOW_MATMUL * peak[0] or copy < SLOW_COPY * peak[1]:
        fix = (
            "somebody else may use it, or it is throttled: nvidia-smi -q -d PERFORMANCE; --exclude this node"
        )
        return Finding("gpu", "warn", f"{text}: slow (data sheet {peak[0]} TFLOPS, {peak[1]} GB/s)", fix)
    return Finding("gpu", "ok", text)


def visible_gpus() -> int:
    """GPUs that a program started here would see: the job's, or this machine's."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    here = local_gpus()
    return here if chosen is None else min(here, sum(bool(part.strip()) for part in chosen.split(",")))


def all_reduce(asked: int, seconds: float) -> Finding:
    """All-reduces with NCCL over `asked` GPUs of this node (0: all): right, and how fast; who broke it, when not."""
    here = visible_gpus()
    count = asked or here
    if count > here:
        fix = f"with SLURM: srun --gres=gpu:{asked} --pty engaging doctor --gpus {asked}"
        return Finding("nccl", "fail", f"--gpus={count}: {counted(here, 'GPU')} can be seen here", fix)
    if count < 2:
        return Finding("nccl", "skip", f"{counted(count, 'GPU')}: nothing to talk to")
    words = ["reduce", "nccl", str(count), str(seconds)]
    facts, error = _probe(words, 240 + seconds, sys.stderr)
    if facts is None:
        fix = (
            f"the same once more; if it fails again, NCCL_DEBUG=INFO before it, and --exclude={gethostname()}"
        )
        return Finding("nccl", "fail", f"the all-reduce over {count} GPUs failed: {error}", fix)
    return judge_reduce(facts)


def judge_reduce(facts: dict) -> Finding:
    """`facts`: {"world", "bus_gb_per_s" (of 256 MB float32), "rounds", "name"} as a finding."""
    bus = facts["bus_gb_per_s"]
    text = (
        f"{facts['rounds']} all-reduces over {facts['world']} GPUs, all sums right, {bus:.0f} GB/s on the bus"
    )
    if bus < (NVLINK_BUS if any(part in facts["name"] for part in NVLINK) else PCIE_BUS):
        fix = f"nvidia-smi topo -m shows the links (NV: NVLink); --exclude={gethostname()} if it should be faster"
        return Finding("nccl", "warn", f"{text}: slow", fix)
    return Finding("nccl", "ok", text)


def _probe(words: list[str], limit: float, echo: TextIO | None = None) -> tuple[dict | None, str]:
    """gpu_probe.py in the trainer's Python: (its facts, "") or (None, its last line). `echo` gets its lines."""
    python = environment_python()
    if python is None:
        return None, "no Python with torch (bash setup_env.sh)"
    command = [str(python), str(PROBE), *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as probe:
        timer = threading.Timer(limit, probe.terminate)
        timer.start()
        said = []
        for line in probe.stderr or ():
            said.append(line.strip())
            if echo is not None:
                print(line, end="", file=echo, flush=True)
        answer = probe.stdout.read() if probe.stdout else ""
        timer.cancel()
    for line in reversed(answer.splitlines()):
        if line.startswith("{"):
            return json.loads(line), ""
    return None, next((line for line in reversed(said) if line), f"exit status {probe.returncode}")[:200]
