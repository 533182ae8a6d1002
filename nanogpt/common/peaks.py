"""Peak arithmetic of GPUs by name. Standard library only: tools that judge a run need no torch."""

import math
import re

# Dense bfloat16 tensor-core peak in TFLOP/s, from NVIDIA's data sheets (without sparsity). The name is that of
# torch.cuda.get_device_name(); the first pattern that matches counts.
_PEAK_TFLOPS = (
    (r"H100 PCIe", 756.0),
    (r"H100 NVL", 835.0),
    (r"H100|H200|H800|GH200", 989.0),
    (r"B200|GB200", 2250.0),
    (r"RTX PRO 6000", 503.8),
    (r"A100|A800", 312.0),
    (r"A40\b", 149.7),
    (r"A30\b", 165.0),
    (r"A10G", 70.0),
    (r"A10\b", 125.0),
    (r"L40S", 362.0),
    (r"L40\b", 181.0),
    (r"L4\b", 121.0),
    (r"RTX 5090", 209.5),
    (r"RTX 4090", 165.2),
    (r"RTX 3090", 71.0),
)


def peak_flops_of(name: str) -> float | None:
    """The GPU's peak in FLOP/s at bfloat16 by its name; None for one that the table does not know."""
    for pattern, tflops in _PEAK_TFLOPS:
        if re.search(pattern, name):
            return tflops * 1e12
    return None


def utilisation(flops_per_s: float, peak: float | None, gpus: int) -> float | None:
    """Share of what `gpus` GPUs could do (MFU), 0 to 1. None: the peak is unknown. Infinite: it must be wrong."""
    if not peak:
        return None
    share = flops_per_s / (peak * gpus)
    return share if share <= 1 else math.inf  # which metrics.jsonl has as null


def utilisation_words(share: float | None) -> str:
    """`utilisation`, for a line that people read."""
    if share == math.inf:
        return "unknown (above 100 %: the peak in nanogpt/common/peaks.py is wrong for this GPU)"
    return "unknown" if share is None else f"{100 * share:.1f} %"
