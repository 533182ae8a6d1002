"""doctor's checks of the GPUs: seen, fast enough, and (with --gpus) able to talk to each other."""

import json
import subprocess
from pathlib import Path

from tools.launch.environment import environment_python
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
SLOW_MATMUL, SLOW_COPY, SLOW_LINK = 0.45, 0.60, 5.0  # shares of the peak; GB/s of an all-reduce


def gpus(root: Path) -> list[Finding]:
    """Each GPU: bfloat16 matmul and memory bandwidth against its data sheet (about 3 s)."""
    if driver_version() is None:
        return [
            Finding(
                "gpu", "skip", "no GPU on this machine; inside a job: srun --gres=gpu:1 ... engaging doctor"
            )
        ]
    facts, error = _probe("speed")
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


def all_reduce(root: Path) -> list[Finding]:
    """An NCCL all-reduce over the GPUs of this allocation on this node: right, and how fast."""
    if driver_version() is None:
        return [Finding("nccl", "skip", "no GPU on this machine")]
    facts, error = _probe("nccl")
    if facts is None:
        return [
            Finding(
                "nccl", "fail", f"the all-reduce failed: {error}", "NCCL_DEBUG=INFO engaging doctor --gpus"
            )
        ]
    if facts["world"] < 2:
        return [Finding("nccl", "skip", "one GPU: nothing to talk to")]
    text = f"all-reduce over {facts['world']} GPUs right, {facts['bus_gb_per_s']:.0f} GB/s on the bus"
    if facts["bus_gb_per_s"] < SLOW_LINK:
        fix = "nvidia-smi topo -m shows the links; --exclude this node if it should have NVLink"
        return [Finding("nccl", "warn", text, fix)]
    return [Finding("nccl", "ok", text)]


def _probe(what: str) -> tuple[dict | None, str]:
    """gpu_probe.py in the trainer's Python: (its facts, "") or (None, its last line)."""
    python = environment_python()
    if python is None:
        return None, "no Python with torch (bash setup_env.sh)"
    try:
        done = subprocess.run([str(python), str(PROBE), what], capture_output=True, text=True, timeout=240)
    except subprocess.TimeoutExpired:
        return None, "no end within 240 s"
    for line in reversed(done.stdout.splitlines()):
        if line.startswith("{"):
            return json.loads(line), ""
    return None, (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1][:160]
