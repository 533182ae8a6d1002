"""What the speedrun's optimizer costs on one GPU: milliseconds a step, and its matrix kernels beside cuBLAS's.

    python benchmarks/speedrun_optimizer.py

All parameters of track 1 (635,887,015) with random bfloat16 gradients. Steps: without Adam, with Adam while the
embedding is tied, with Adam after. For each, the milliseconds on the GPU and the time until the CPU is free again; then
the update of each bank and table alone, with the bytes that it has to move. Kernels: X X^T, X^T X and the polynomial at
the shapes of all banks, whole and as one of 8 ranks has them, with tiles of 64 and 128, and with torch.bmm and
torch.baddbmm; then Polar Express as a whole, on our kernels and on cuBLAS in its literal form. About a minute.
"""

import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)

from nanogpt.common.errors import UserError, run_command
from nanogpt.common.flags import knob, parse

SHAPES = ((60, 256, 768), (20, 768, 768), (22, 3072, 768), (8, 256, 768), (3, 768, 768), (3, 3072, 768))
# A number: momentum, squares of rows, update; without the products of the iteration.
MATRIX_BYTES = 18 + 2 + 10


@dataclass(frozen=True)
class Options:
    """The command line."""

    repeats: int = knob(20, "timed calls of each thing; the median counts", low=3, high=1000)
    compile: str = knob("auto", "torch.compile of the elementwise parts", choices=("auto", "false"))


def milliseconds(
    call: Callable[[], object], repeats: int, prepare: Callable[[], object] = lambda: None
) -> float:
    """Median time of `call` on the GPU; `prepare` comes before each, outside of the timing."""
    import torch

    times = []
    for k in range(repeats + 3):
        prepare()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        end.synchronize()
        if k >= 3:
            times.append(start.elapsed_time(end))
    return statistics.median(times)


class Set:
    """The parameters of track 1 on the GPU, their optimizer, and gradients for them."""

    def __init__(self, options: Options) -> None:
        import torch

        from modded_nanogpt import schedule
        from modded_nanogpt.config import Config
        from modded_nanogpt.model import SpeedrunModel
        from modded_nanogpt.optim.sharded import Optimizer
        from nanogpt.common.ranks import Ranks

        config, device = Config(compile=options.compile), torch.device("cuda", 0)
        shapes = SpeedrunModel(config, None, torch.device("meta"), torch.bfloat16).named_parameters()
        self.parameters = {
            name: torch.nn.Parameter(torch.empty(p.shape, dtype=p.dtype, device=device).normal_(0, 0.02))
            for name, p in shapes
        }
        self.optimizer = Optimizer(self.parameters, config, Ranks(0, 0, 1, device), device)
        self.plan = schedule.at(config, 1)

    def fill(self, tied: bool) -> None:
        """Gradients as the backward passes leave them; the tied embedding's are in the head's."""
        for name, parameter in self.parameters.items():
            if tied and name == "embed":
                parameter.grad = None
                continue
            if parameter.grad is None:
                parameter.grad = parameter.data.clone()
            parameter.grad.fill_(1e-3)

    def steps(self, repeats: int) -> dict[str, dict[str, float]]:
        """Milliseconds of each kind of step: on the GPU, and until `step` returns."""
        import torch

        kinds = {
            "without Adam": {"adam": False, "tied": True, "untie": False},
            "Adam, tied": {"adam": True, "tied": True, "untie": False},
            "Adam, untied": {"adam": True, "tied": False, "untie": False},
        }
        found = {}
        for label, changes in kinds.items():
            plan = dataclasses.replace(self.plan, **changes)
            began = time.perf_counter()
            self.fill(plan.tied)
            self.optimizer.step(plan)
            torch.cuda.synchronize()
            first = time.perf_counter() - began
            on_cpu: list[float] = []

            def step(plan=plan, on_cpu=on_cpu) -> None:
                began = time.perf_counter()
                self.optimizer.step(plan)
                on_cpu.append(1e3 * (time.perf_counter() - began))

            gpu = milliseconds(step, repeats, lambda plan=plan: self.fill(plan.tied))
            found[label] = {"gpu_ms": gpu, "cpu_ms": statistics.median(on_cpu), "first_s": first}
        return found

    def units(self, repeats: int) -> dict[str, dict[str, float]]:
        """Milliseconds of each unit's update, and the rate at which it moves the bytes that it must."""
        import torch

        found = {}
        for name, unit in self.optimizer.units.items():
            lasting = getattr(unit.exchange, "lasting", False)
            count = sum(self.parameters[part].numel() for part in unit.names)
            self.fill(tied=False)

            def update(unit=unit, lasting=lasting) -> None:
                gradients = [self.parameters[part].grad for part in unit.names]
                if unit.is_adam:
                    unit.maths.update(gradients, 1.0, 1.0, clear=lasting)
                else:
                    unit.maths.update(gradients[0].view(unit.exchange.view), 1.0, 0.95, 1.0)

            with torch.no_grad():  # as in a step: else everything is compiled once more
                gpu = milliseconds(update, repeats)
            bytes_ = count * ((24 if lasting else 22) if unit.is_adam else MATRIX_BYTES)
            found[name] = {"gpu_ms": gpu, "gb_per_s": bytes_ / gpu / 1e6}
        return found


def kernels(repeats: int) -> Iterator[dict[str, object]]:
    """Milliseconds of the symmetric products, ours and cuBLAS's, and TFLOP/s counting the full product."""
    import torch

    from modded_nanogpt.kernels import symmetric_matmul as ours

    for shape in SHAPES:
        x = torch.randn(shape, device="cuda", dtype=torch.bfloat16) / shape[2] ** 0.5
        tall = shape[1] > shape[2]
        gram = ours.gram(x, tall)
        flops = 2 * gram.numel() * max(shape[1:])
        calls = {
            f"ours {b}": lambda b=b, x=x, tall=tall: ours._launch(x, tall, False, block=b) for b in (64, 128)
        }
        calls["bmm"] = lambda x=x, tall=tall: torch.bmm(x.mT, x) if tall else torch.bmm(x, x.mT)
        yield timed("X^T X" if tall else "X X^T", shape, flops, calls, repeats)
        calls = {
            f"ours {b}": lambda b=b, g=gram: ours._launch(g, False, True, 2.0, -1.0, 0.5, b)
            for b in (64, 128)
        }
        calls["baddbmm"] = lambda g=gram: torch.baddbmm(g, g, g, beta=-1.0, alpha=0.5)
        yield timed("polynomial", shape, 2 * gram.numel() * gram.shape[1], calls, repeats)
        calls = {"ours": lambda x=x: iterate(x), "cuBLAS": lambda x=x: literal(x)}
        yield timed("Polar Express", shape, 0, calls, repeats)


def timed(
    name: str, shape: tuple[int, ...], flops: int, calls: dict[str, Callable[[], object]], repeats: int
) -> dict[str, object]:
    """One row of the table of kernels."""
    times = {label: milliseconds(call, repeats) for label, call in calls.items()}
    rates = {label: flops / ms / 1e9 for label, ms in times.items()} if flops else {}
    return {"name": name, "shape": shape, "ms": times, "tflops": rates}


def iterate(x: "torch.Tensor") -> "torch.Tensor":
    """Polar Express as the optimizer does it."""
    from modded_nanogpt.optim.orthogonalize import orthogonalize

    return orthogonalize(x)


def literal(x: "torch.Tensor") -> "torch.Tensor":
    """Polar Express in its literal form on cuBLAS: a X + (b A + c A A) X."""
    import torch

    from modded_nanogpt.optim.orthogonalize import POLAR_EXPRESS

    tall = x.shape[1] > x.shape[2]
    for a, b, c in POLAR_EXPRESS:
        gram = torch.bmm(x.mT, x) if tall else torch.bmm(x, x.mT)
        factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, x, factor, beta=a) if tall else torch.baddbmm(x, factor, x, beta=a)
    return x


def main(argv: list[str]) -> int:
    """Print the tables, and everything as one JSON line at the end."""
    options = parse(Options, argv, prog="python benchmarks/speedrun_optimizer.py", description=__doc__)
    import torch

    if not torch.cuda.is_available():
        raise UserError("this benchmark needs a GPU, and torch sees none; run it in a job that has one")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}", flush=True)
    everything = Set(options)
    steps = everything.steps(options.repeats)
    state = sum(everything.optimizer.sizes.values()) / 2**30
    peak = torch.cuda.max_memory_allocated() / 2**30
    for label, row in steps.items():
        print(f"step {label:14} {row['gpu_ms']:8.3f} ms on the GPU, CPU free after {row['cpu_ms']:.3f} ms, "
              f"first one {row['first_s']:.1f} s", flush=True)  # fmt: skip
    units = everything.units(options.repeats)
    for label, row in units.items():
        print(f"update {label:12} {row['gpu_ms']:8.3f} ms, {row['gb_per_s']:7.0f} GB/s")
    print(f"optimizer state {state:.2f} GiB, peak with weights and gradients {peak:.2f} GiB", flush=True)
    del everything
    rows = []
    for row in kernels(options.repeats):
        rows.append(row)
        times = ", ".join(
            f"{label} {ms:.4f} ms" + (f" ({row['tflops'][label]:.0f} TFLOP/s)" if row["tflops"] else "")
            for label, ms in row["ms"].items()
        )
        print(f"{row['name']:14} {' x '.join(map(str, row['shape'])):16} {times}", flush=True)
    print(json.dumps({"steps": steps, "units": units, "state_gib": state, "peak_gib": peak, "kernels": rows}))
    return 0


if __name__ == "__main__":
    run_command(main)
