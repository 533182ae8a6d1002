"""What torch's profiler saw, summed by kind of work: attention, matrix products, loss, ... from the kernels' names."""

import collections
import typing

if typing.TYPE_CHECKING:
    from torch.profiler import profile

# The first pattern that a kernel's or operator's name holds decides; all are lower case. What inductor fused is called
# after every operation in it, so that those names would match anything.
INDUCTOR = "triton_"
KINDS = (
    ("heads composed", ("compose_", "mixed_gradient")),
    ("attention", ("flash", "attention", "forward_kernel", "query_gradient", "key_gradient", "fmha", "sdpa")),
    ("loss", ("_row_kernel", "cross_entropy", "loss_kernel", "nll_loss", "log_softmax")),
    ("MLP with ReLU^2", ("relu_square",)),
    ("Muon's symmetric products", ("gram", "symmetric")),
    ("optimizer", ("adam", "multi_tensor", "lpnorm", "foreach")),
    ("table of n-grams", ("look_up_kernel", "update_rows", "sum_entries")),
    ("copy pointer", ("shares_kernel", "shares_query_kernel", "shares_key_kernel")),
    ("rows gathered and scattered", ("add_rows", "sort", "radix", "index")),
    ("8-bit copies", ("quantise", "transpose")),
    (
        "matrix products",
        ("gemm", "nvjet", "cutlass", "cublas", "matmul", "mm_", "splitk", "::mm", "::addmm", "::bmm"),
    ),
    ("memory set and copied", ("memset", "memcpy", "fillfunctor", "copy_kernel", "::copy_", "::fill_")),
    ("communication", ("nccl", "c10d")),
)


def kind_of(name: str) -> str:
    """The kind of work that a kernel's name tells."""
    low = name.lower()
    if low.startswith(INDUCTOR):
        return "fused elementwise work"
    for kind, patterns in KINDS:
        if any(pattern in low for pattern in patterns):
            return kind
    return "other"


def time_by_name(profiler: "profile") -> collections.Counter:
    """Microseconds by name: of the GPU's kernels or, where none ran, of the CPU's operators, without their callees."""
    import torch

    spent: collections.Counter = collections.Counter()
    for event in profiler.events():
        # Annotations of regions, such as a whole compiled graph, are mirrored on the GPU: no kernels.
        if event.device_type == torch.autograd.DeviceType.CUDA and not event.is_user_annotation:
            spent[event.name] += event.time_range.elapsed_us()
    if not spent:
        for entry in profiler.key_averages():
            spent[entry.key] += entry.self_cpu_time_total
    return spent


def time_by_kind(by_name: collections.Counter) -> collections.Counter:
    """The same microseconds by kind of work."""
    spent: collections.Counter = collections.Counter()
    for name, microseconds in by_name.items():
        spent[kind_of(name)] += microseconds
    return spent


def table(spent: collections.Counter, count: int, divisor: float, width: int = 28) -> list[str]:
    """The `count` largest of `spent` (microseconds) as lines: ms each of `divisor` times, and the share of all."""
    total = sum(spent.values()) or 1.0
    return [
        f"{name[:width]:{width}} {microseconds / divisor / 1e3:9.3f} ms  {100 * microseconds / total:5.1f} %"
        for name, microseconds in spent.most_common(count)
    ]
