"""What the hardware can do: peak arithmetic by name, free memory, one line for the log."""

import platform

import torch

from nanogpt.common.peaks import peak_flops_of, utilisation, utilisation_words

__all__ = [
    "choose_dtype",
    "describe",
    "memory_gib",
    "peak_flops",
    "peak_flops_of",
    "utilisation",
    "utilisation_words",
]


def peak_flops(device: torch.device) -> float | None:
    """The device's peak in FLOP/s at bfloat16; None for a CPU and for GPUs that the table does not know."""
    return None if device.type != "cuda" else peak_flops_of(torch.cuda.get_device_name(device))


def describe(device: torch.device) -> str:
    """One line: what computes, how much memory it has, what it could do."""
    if device.type == "cpu":
        return f"CPU ({platform.processor() or platform.machine()}), {torch.get_num_threads()} threads a rank"
    properties = torch.cuda.get_device_properties(device)
    peak = peak_flops(device)
    known = f"peak {peak / 1e12:.0f} TFLOP/s in bfloat16" if peak else "peak unknown, so MFU is unknown"
    return f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, {known}"


def choose_dtype(wanted: str, device: torch.device) -> torch.dtype:
    """The dtype `--dtype` means: auto is bfloat16 on a GPU that has it in hardware, float16 on an older one."""
    if wanted != "auto":
        return getattr(torch, wanted)
    if device.type == "cpu":
        return torch.float32
    return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16


def memory_gib(device: torch.device) -> float | None:
    """Largest memory allocated on the GPU so far, in GiB; None on a CPU."""
    return torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None
