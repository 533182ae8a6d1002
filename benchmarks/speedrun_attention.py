"""How fast attention over packed documents is at the speedrun's sizes: every backend that loads, and our tiles.

    python benchmarks/speedrun_attention.py
    python benchmarks/speedrun_attention.py --sweep=true     # tries tiles of our kernel, window by window

Needs a CUDA GPU. First every backend, and dynamic composition, must agree with float64 on the first documents, forward
and backward; one that does not is not timed. `paired` is the layout of the paired-head layers: half the heads, twice
the places. Times are of the GPU alone, medians over rounds. What fails is named in its row and the others go on; tiles
whose results differ from those of the chosen ones are not listed. The last line is JSON for programs.
"""

import json
import random
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from nanogpt.common.errors import UserError, run_command
from nanogpt.common.flags import knob, parse

TOLERANCE = 2e-2  # of the largest entry: bfloat16 operands, float32 sums
SHORTEST = 32


@dataclass(frozen=True)
class Settings:
    """The command line."""

    tokens: int = knob(49_152, "tokens packed together", low=1024)
    documents: int = knob(74, "documents among them", low=1)
    max_document: int = knob(2048, "longest document", low=SHORTEST)
    n_head: int = knob(6, "attention heads", low=2)
    head_dim: int = knob(128, "dimensions of a head", low=16)
    value_dim: int = knob(0, "dimensions of its values; 0: as many", low=0)
    windows: str = knob("128,640,1408,1664", "how far back a query sees, with commas")
    backends: str = knob(
        "varlen,triton,fa3", "what to measure, with commas; the first is what ratios refer to"
    )
    slice: int = knob(2048, "tokens of the comparison with float64", low=1)
    rounds: int = knob(5, "measure so many times", low=1)
    sweep: bool = knob(False, "also try tiles of our kernel")


@dataclass(frozen=True)
class Problem:
    """Packed documents and q, k, v, and the output's gradient, (T, H, D) bfloat16 on the GPU."""

    lengths: list[int]
    cu_seqlens: object
    doc_start: object
    doc_end: object
    tensors: list  # q, k, v, gradient

    @property
    def longest(self) -> int:
        """Tokens of the longest document."""
        return max(self.lengths)

    def pairs(self, window: int) -> int:
        """Visible pairs of a query and a key, for one head."""
        return sum(min(place, window) + 1 for length in self.lengths for place in range(length))


def main(argv: list[str]) -> None:
    """Check, measure and print."""
    settings = parse(Settings, argv, prog="benchmarks/speedrun_attention.py", description=__doc__)
    windows = _numbers(settings.windows)
    import torch

    if not torch.cuda.is_available():
        raise UserError("speedrun_attention: no CUDA GPU on this machine; run it on a node that has one")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, CUDA {torch.version.cuda}", flush=True)
    lengths = document_lengths(settings.documents, settings.tokens, settings.max_document)
    heads, sizes = settings.n_head, (settings.head_dim, settings.value_dim or settings.head_dim)
    forms = {
        "single": make_problem(lengths, heads, *sizes),
        "paired": make_problem([2 * length for length in lengths], heads // 2, *sizes),
    }
    rows = measure_backends(forms, windows, settings)
    composition = {}
    if sizes[0] == sizes[1]:
        composition = or_fault(measure_composition, forms["single"], settings)
    tiles = {}
    if settings.sweep:
        for form, problem in forms.items():
            tiles[form] = {window: or_fault(sweep, problem, window, settings.rounds) for window in windows}
    print(json.dumps({"attention": rows, "dynamic_composition": composition, "tiles": tiles}))


def or_fault(call: Callable[..., dict], *arguments: object) -> dict:
    """What `call` returns; when it raises, its error in one line under `fault`, printed too."""
    try:
        return call(*arguments)
    except Exception as error:  # a kernel that does not compile, or fit: the others go on
        fault = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        print(f"{call.__name__}: {fault}", flush=True)
        return {"fault": fault}


def document_lengths(documents: int, tokens: int, longest: int) -> list[int]:
    """Lengths like FineWeb's (log-normal, median 403, mean 690), cut at `longest`, that sum to `tokens`."""
    if not documents * SHORTEST <= tokens <= documents * longest:
        raise UserError(
            f"--documents={documents}: cannot hold --tokens={tokens} with {SHORTEST} to {longest} tokens each; "
            f"try --documents={max(1, round(tokens / min(664, longest)))}"
        )
    draw = random.Random(1)
    shape = [draw.lognormvariate(0.0, 1.04) for _ in range(documents)]
    low, high = 0.0, 1e9
    for _ in range(100):  # the scale at which the cut lengths sum to just below `tokens`
        middle = (low + high) / 2
        total = sum(min(max(int(middle * x), SHORTEST), longest) for x in shape)
        low, high = (middle, high) if total <= tokens else (low, middle)
    lengths = [min(max(int(low * x), SHORTEST), longest) for x in shape]
    for place in range(documents):  # the few tokens that rounding left
        extra = min(tokens - sum(lengths), longest - lengths[place])
        lengths[place] += extra
    return lengths


def make_problem(lengths: list[int], heads: int, size: int, value_size: int) -> Problem:
    """Random q (scaled as the trainer scales it), k, v and gradient for these documents."""
    import torch

    from modded_nanogpt.attention_backends import documents

    generator = torch.Generator("cuda").manual_seed(1)
    ends = torch.tensor([0, *lengths]).cumsum(0)
    tokens = int(ends[-1])
    cu_seqlens = torch.cat([ends, ends[-1:].expand(53)]).to(
        "cuda", torch.int32
    )  # 128 entries, as the loader's
    shapes = [(tokens, heads, width) for width in (size, size, value_size, value_size)]
    tensors = [torch.randn(shape, device="cuda", generator=generator).bfloat16() for shape in shapes]
    tensors[0] *= 0.12
    return Problem(lengths, cu_seqlens, *documents(cu_seqlens, tokens), tensors)


def first_documents(problem: Problem, tokens: int) -> Problem:
    """The first `tokens` of a problem, its last document cut."""
    tokens = min(tokens, sum(problem.lengths))
    lengths: list[int] = []
    for length in problem.lengths:
        if sum(lengths) < tokens:
            lengths.append(min(length, tokens - sum(lengths)))
    return replace(
        problem,
        lengths=lengths,
        cu_seqlens=problem.cu_seqlens.clamp(max=tokens),
        doc_start=problem.doc_start[:tokens],
        doc_end=problem.doc_end[:tokens].clamp(max=tokens),
        tensors=[x[:tokens] for x in problem.tensors],
    )


def measure_backends(forms: dict[str, Problem], windows: list[int], settings: Settings) -> list[dict]:
    """Every backend that loads, on every form and window; prints a line for each."""
    import torch

    from modded_nanogpt import attention_backends

    rows: list[dict] = []
    print("form    window  backend    forward  forward+backward   ratio  TFLOP/s of the pairs that are seen")
    for name in settings.backends.split(","):
        try:
            attend = attention_backends.choose(name, torch.device("cuda"), torch.bfloat16).attend
        except UserError as error:
            print(f"{name}: left out: {error}")
            continue
        for form, problem in forms.items():
            for window in windows:
                row = {"form": form, "window": window, "backend": name}
                rows.append(row | or_fault(_measure_one, attend, problem, window, settings))
                _print_row(rows)
    return rows


def _measure_one(attend: Callable, problem: Problem, window: int, settings: Settings) -> dict:
    import torch

    width = torch.tensor(window, dtype=torch.int32)
    error = worst_error(attend, first_documents(problem, settings.slice), width)
    row = {"error": error}
    if not error <= TOLERANCE:
        return row
    q, k, v, grad = problem.tensors
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    others = (problem.cu_seqlens, problem.doc_start, problem.doc_end, problem.longest, width)

    def forward() -> None:
        with torch.no_grad():
            attend(q, k, v, *others)

    def both() -> None:
        torch.autograd.grad(attend(*leaves, *others), leaves, grad)

    row["forward_ms"] = milliseconds(forward, settings.rounds)
    row["both_ms"] = milliseconds(both, settings.rounds)
    # Of 2 products forward and 5 backward 4 sum over the keys' dimensions and 3 over the values'; 2 operations each.
    sizes = 4 * q.shape[2] + 3 * v.shape[2]
    row["tflops"] = 2e-9 * problem.pairs(window) * q.shape[1] * sizes / row["both_ms"]
    return row


def _print_row(rows: list[dict]) -> None:
    row = rows[-1]
    start = f"{row['form']:6} {row['window']:7}  {row['backend']:9}"
    if "both_ms" not in row:
        wrong = "failed" if "fault" in row else f"WRONG: off by {row['error']:.3g} of the largest entry"
        print(f"{start}  {wrong}", flush=True)
        return
    same = (
        other["both_ms"]
        for other in rows
        if (other["form"], other["window"]) == (row["form"], row["window"]) and "both_ms" in other
    )
    ratio = row["both_ms"] / next(same)
    print(
        f"{start} {row['forward_ms']:8.3f} {row['both_ms']:17.3f} {ratio:7.2f} {row['tflops']:8.0f}",
        flush=True,
    )


def worst_error(attend: Callable, problem: Problem, window: object) -> float:
    """The largest error of output and gradients against float64, as a share of the largest entry."""
    import torch

    from modded_nanogpt.kernels.reference.attention import attention

    *inputs, grad = problem.tensors
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = attend(*leaves, problem.cu_seqlens, problem.doc_start, problem.doc_end, problem.longest, window)
    ours = [out.detach(), *torch.autograd.grad(out, leaves, grad)]
    exact_leaves = [x.detach().double().requires_grad_() for x in inputs]
    exact = attention(*exact_leaves, problem.doc_start, int(window))
    return compared(ours, [exact.detach(), *torch.autograd.grad(exact, exact_leaves, grad.double())])


def compared(ours: list, exact: list) -> float:
    """The largest error as a share of each tensor's largest entry; infinite when something is not finite."""
    errors = [((a.double() - b).abs().max() / b.abs().max()).item() for a, b in zip(ours, exact, strict=True)]
    return max(error if error == error else float("inf") for error in errors)


def milliseconds(call: Callable[[], object], rounds: int, calls: int = 20) -> float:
    """GPU time of one call: the median over rounds of `calls` in a row, queued while the GPU sleeps."""
    import torch

    for _ in range(3):
        call()
    times = []
    for _ in range(rounds):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        torch.cuda._sleep(60_000_000)  # about 35 ms, so that no launch is waited for
        start.record()
        for _ in range(calls):
            call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / calls)
    return statistics.median(times)


def measure_composition(problem: Problem, settings: Settings) -> dict:
    """Dynamic composition on the single form: its error on the first documents, and its times."""
    import torch

    from modded_nanogpt.kernels.dynamic_composition import dynamic_composition
    from modded_nanogpt.kernels.reference.dynamic_composition import dynamic_composition as plain

    def calls(function: Callable, problem: Problem, dtype: torch.dtype) -> tuple[Callable, Callable]:
        q, k, v, grad = (x.to(dtype) for x in problem.tensors)
        y, w = v.flip(0), k[:, :, 0]
        leaves = [x.detach().clone().requires_grad_() for x in (y, q, k, v, w, w.flip(0))]

        def both() -> list:
            out = function(*leaves, problem.doc_start)
            return [out.detach(), *torch.autograd.grad(out, leaves, grad)]

        return lambda: function(*(x.detach() for x in leaves), problem.doc_start), both

    part = first_documents(problem, settings.slice)
    ours, exact = calls(dynamic_composition, part, torch.bfloat16)[1], calls(plain, part, torch.float64)[1]
    error = compared(ours(), exact())
    found = {"error": error}
    if error <= TOLERANCE:
        forward, both = calls(dynamic_composition, problem, torch.bfloat16)
        found["forward_ms"] = milliseconds(forward, settings.rounds)
        found["both_ms"] = milliseconds(both, settings.rounds)
    figures = ", ".join(f"{name} {value:.4g}" for name, value in found.items())
    print("dynamic composition:", figures, flush=True)
    return found


def sweep(problem: Problem, window: int, rounds: int) -> dict[str, list]:
    """Tiles of each kernel by time, the best first: [milliseconds, [rows, step, warps, stages]]; prints three."""
    from modded_nanogpt.kernels import attention as packed

    q, k, v, grad = problem.tensors
    base = packed.plan_for(q, window)
    out, lse = packed.forward(q, k, v, problem.doc_start, window, base.forward)
    shapes = [(128, 128, 8), (128, 64, 8), (128, 32, 8), (128, 64, 4), (64, 128, 4), (64, 64, 4), (64, 32, 4)]
    candidates = [packed.Tiles(*shape, stages) for shape in shapes for stages in (2, 3)]
    bounds = (problem.doc_start, problem.doc_end, window)
    calls = {
        "forward": lambda plan: packed.forward(q, k, v, problem.doc_start, window, plan.forward),
        "query_gradient": lambda plan: packed.backward(grad, q, k, v, out, lse, *bounds, plan),
        "key_gradient": lambda plan: packed.backward(grad, q, k, v, out, lse, *bounds, plan),
    }
    found = {}
    for kernel, call in calls.items():
        times = []
        expected = [x.double() for x in call(base)]
        for tiles in candidates:
            plan = replace(base, **{kernel: tiles})
            try:
                error = compared(call(plan), expected)
                spent = milliseconds(lambda call=call, plan=plan: call(plan), min(rounds, 3), 10)
                fault = None if error <= TOLERANCE else f"WRONG: off by {error:.3g} of the largest entry"
            except Exception as failure:  # more shared memory or registers than there are
                fault = type(failure).__name__
            if fault:
                print(f"  {kernel} {_listed(tiles)}: {fault}", flush=True)
            else:
                times.append([spent, _listed(tiles)])
        found[kernel] = sorted(times)
        best = ", ".join(f"{spent:.3f} ms {tiles}" for spent, tiles in found[kernel][:3])
        print(f"window {window}, {problem.tensors[0].shape[1]} heads, {kernel}: {best}", flush=True)
    return found


def _listed(tiles: object) -> list[int]:
    return [tiles.rows, tiles.step, tiles.warps, tiles.stages]


def _numbers(text: str) -> list[int]:
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 0:
        raise UserError(f"--windows={text}: expected whole numbers with commas, such as 128,640")
    return numbers


if __name__ == "__main__":
    run_command(main)
