"""The speedrun's head and MLP on one GPU: our kernels beside their plain twins compiled by inductor.

    python benchmarks/speedrun_kernels.py
    python benchmarks/speedrun_kernels.py --tokens=49152 --sweep=true

Sizes are track 1's: width 768, hidden 3,072, vocabulary 50,304, of an n-gram table 4 M rows; tokens are those of one
lane in the three stages. Times are the GPU's alone, medians of both, measured in turns. TFLOP/s count the matrix
products, GB/s what has to be read and written at least once. `--sweep` also times other tiles, to choose
from. What fails is named in its row and the others go on. The last line is JSON for programs.
"""

import json
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.speedrun_mlp import WIDTH, Case, mlp_cases, mlp_pieces, tile_sweep
from nanogpt.common.errors import UserError, run_command
from nanogpt.common.flags import knob, parse

VOCABULARY, GRAM_ROWS = 50_304, 4_000_000
SOFTCAP = (23.0, 5.0, 7.5)
QUEUE = 20_000_000  # cycles, about 11 ms: the GPU sleeps so long before what is timed, while it is launched


@dataclass(frozen=True)
class Settings:
    """The command line."""

    tokens: str = knob("16384,32768,49152", "tokens of a lane, separated by commas")
    rounds: int = knob(10, "measure each so many times", low=1)
    sweep: bool = knob(False, "also time other tiles, at the last number of tokens")
    device: str = knob("auto", "auto, cuda or cuda:N")

    def counts(self) -> list[int]:
        """Numbers of tokens. UserError for what is none, or fits no FP8 product."""
        words = self.tokens.split(",")
        if not all(word.strip().isdecimal() and int(word) > 0 and int(word) % 16 == 0 for word in words):
            raise UserError(f"--tokens={self.tokens}: expected multiples of 16, separated by commas")
        return [int(word) for word in words]


def main(argv: list[str]) -> None:
    """Measure and print."""
    settings = parse(Settings, argv, prog="benchmarks/speedrun_kernels.py", description=__doc__)
    counts = settings.counts()
    import torch

    from modded_nanogpt.kernels import fp8
    from nanogpt.common import hardware
    from nanogpt.common.ranks import choose_device

    device = choose_device(settings.device, 0)
    if device.type != "cuda":
        raise UserError(
            f"--device={settings.device}: these kernels need a CUDA GPU, and torch sees none here"
        )
    torch.cuda.set_device(device)
    torch.manual_seed(0)
    choice = fp8.choose("auto", device)
    print(f"{hardware.describe(device)}; torch {torch.__version__}; FP8: {choice.why}")
    titles = f"{'ours':>9} {'twin':>9} {'ratio':>6} {'TFLOP/s':>8} {'GB/s':>6}"
    print(f"{'':44} {'tokens':>7} {titles}", flush=True)
    rows = []
    for tokens in counts:
        for make in (head_cases, head_pieces, pointer_cases, table_cases, gram_cases, mlp_cases, mlp_pieces):
            rows += table_rows(make, tokens, device, choice, settings.rounds)
    if settings.sweep:
        for make in (row_kernel_sweep, tile_sweep):
            rows += table_rows(make, counts[-1], device, choice, settings.rounds)
    print(json.dumps({"device": hardware.describe(device), "torch": torch.__version__, "rows": rows}))


def table_rows(
    make: Callable[..., Iterator[Case]], tokens: int, device: object, choice: object, rounds: int
) -> list[dict[str, object]]:
    """The rows of the cases that `make` yields one after the other; when it fails, those that it had yielded."""
    import torch

    rows = []
    try:
        for case in make(tokens, device, choice):
            rows.append(measured(case, tokens, rounds))
    except Exception as error:  # memory for a case's inputs: other cases need less
        faults = [fault_of("inputs", error)]
        rows.append({"name": make.__name__, "tokens": tokens, "ms": {}, "faults": faults})
        print(f"{make.__name__:44} {tokens:7,}", *faults, flush=True)
    torch.cuda.empty_cache()
    return rows


def fault_of(what: str, error: Exception) -> str:
    """An error in one line."""
    return f"{what}: {type(error).__name__}: {' '.join(str(error).split())[:80]}"


def measured(case: Case, tokens: int, rounds: int) -> dict[str, object]:
    """One row of the table, printed. What does not fit in memory or in a multiprocessor has no time."""
    import torch

    calls = {"ours": case.ours, "twin": case.twin}
    times: dict[str, list[float]] = {}
    faults = []
    for name, call in calls.items():
        try:
            if call is not None:
                for _ in range(3):
                    call()
                torch.cuda.synchronize()  # so that a kernel that fails, fails here
                times[name] = []
        except Exception as error:  # memory, or a tile that no multiprocessor holds: the others go on
            faults.append(fault_of(name, error))
    for _ in range(rounds):
        for name, found in times.items():
            found.append(milliseconds(calls[name]))
    median = {name: statistics.median(found) for name, found in times.items()}
    row = {"name": case.name, "tokens": tokens, "ms": median, "faults": faults}
    ours, twin = median.get("ours"), median.get("twin")
    text = f"{case.name:44} {tokens:7,}"
    text += "".join(f" {'-' if ms is None else f'{ms:.3f}':>9}" for ms in (ours, twin))
    text += f" {twin / ours:6.2f}" if ours and twin else f" {'-':>6}"
    for key, amount, unit, columns in (("tflops", case.flops, 1e9, 8), ("gb_s", case.bytes, 1e6, 6)):
        row[key] = amount / ours / unit if ours and amount else None
        text += f" {f'{row[key]:.0f}' if row[key] else '-':>{columns}}"
    print(text, *faults, flush=True)
    return row


def milliseconds(call: Callable[[], object]) -> float:
    """The GPU's time for a call, its launches queued while the GPU sleeps."""
    import torch

    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(QUEUE)
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def head_inputs(tokens: int, device: object) -> dict:
    """A lane of stage 1: two further targets, a prefix for half of the tokens."""
    import torch

    x = torch.nn.functional.rms_norm(torch.randn(tokens, WIDTH, device=device), (WIDTH,)).bfloat16()
    head = (0.05 * torch.randn(VOCABULARY, WIDTH, device=device)).bfloat16()
    targets, prefix = (torch.randint(VOCABULARY, (tokens,), device=device) for _ in range(2))
    return {
        "x": x.requires_grad_(),
        "head": head.requires_grad_(),
        "targets": targets,
        "prefix_targets": torch.where(prefix % 2 == 0, prefix, -1),
        "mtp": torch.tensor([1.0, 0.5, 0.25], device=device),
        "prefix_weight": torch.tensor([0.25], device=device),
    }


def head_cases(tokens: int, device: object, choice: object) -> Iterator[Case]:
    """The head with its loss, forward and backward, in both precisions."""
    import torch

    from modded_nanogpt.kernels import cross_entropy
    from modded_nanogpt.kernels.reference import cross_entropy as reference

    given = head_inputs(tokens, device)
    compiled = torch.compile(reference.head_loss, fullgraph=True, dynamic=False)

    def backward(loss: torch.Tensor) -> None:
        given["x"].grad = given["head"].grad = None
        loss.backward()

    flops = 6 * tokens * WIDTH * VOCABULARY
    fixed = {"softcap": SOFTCAP, "loss_scale": 1.0}
    for name, low in (("head loss, bfloat16", False), ("head loss, FP8", True)):
        if low and not choice.head:
            continue
        yield Case(
            name,
            lambda low=low: backward(cross_entropy.head_loss(**given, **fixed, fp8=low)),
            lambda: backward(compiled(**given, softcap=SOFTCAP)),
            flops,
        )


def head_pieces(tokens: int, device: object, choice: object) -> Iterator[Case]:
    """What of the head is bound by memory."""
    import torch

    from modded_nanogpt.kernels import fp8

    yield row_kernel_case(tokens, device, "  loss and gradient of the logits", choice.head)
    if not choice.head:
        return
    grad = torch.empty(tokens, VOCABULARY, dtype=fp8.E5M2, device=device)
    yield Case(
        "  transposed copy of the gradient", lambda: fp8.transpose_bytes(grad),
        lambda: grad.view(torch.uint8).T.contiguous(), bytes=2 * grad.numel(),
    )  # fmt: skip
    head = torch.randn(VOCABULARY, WIDTH, device=device).bfloat16()
    rows = torch.empty(VOCABULARY, WIDTH, dtype=fp8.E4M3, device=device)
    columns, scale = (
        torch.empty(WIDTH, VOCABULARY, dtype=fp8.E4M3, device=device),
        fp8.scales(1, 0.01, device),
    )
    yield Case(
        "  head to e4m3, by row and by column", lambda: fp8.quantise(head[None], scale, rows, columns), None,
        bytes=4 * head.numel(),
    )  # fmt: skip


def row_kernel_case(tokens: int, device: object, name: str, low: bool) -> Case:
    """The kernel alone, over logits that were there before."""
    import torch

    from modded_nanogpt.kernels import cross_entropy, fp8

    given = head_inputs(tokens, device)
    z = torch.randn(tokens, VOCABULARY, dtype=torch.bfloat16, device=device)
    grad = torch.empty_like(z, dtype=fp8.E5M2) if low else z
    losses = torch.empty(tokens, device=device)
    others = {key: given[key] for key in ("targets", "prefix_targets", "mtp", "prefix_weight")}
    return Case(
        name, lambda: cross_entropy._launch(z, losses, SOFTCAP, grad=grad, scale=1.0, **others), None,
        bytes=z.numel() * (2 + grad.element_size()),
    )  # fmt: skip


def pointer_cases(tokens: int, device: object, choice: object) -> Iterator[Case]:
    """The copy pointer's masses, documents of 700 tokens; and the head's loss with them, in the head's precision."""
    import torch

    from modded_nanogpt import attention_backends
    from modded_nanogpt.kernels import pointer, pointer_loss
    from modded_nanogpt.kernels.cross_entropy import CopyRows

    q, k = (torch.randn(tokens, 128, device=device).bfloat16().requires_grad_() for _ in range(2))
    sink, ids = torch.zeros(tokens, device=device), torch.randint(VOCABULARY, (tokens + 1,), device=device)
    ends = torch.tensor([*range(0, tokens, 700), tokens], dtype=torch.int32, device=device)
    rows = (ids[:-1].int(), ids[1:], *attention_backends.documents(ends, tokens), 2048)
    grad = torch.randn(2, tokens, device=device)

    def masses() -> tuple[torch.Tensor, torch.Tensor]:
        return pointer.copy_shares(q / 12, k, sink, *rows)

    yield Case("copy pointer, forward", masses, None)
    yield Case("copy pointer, both", lambda: torch.autograd.backward(masses(), tuple(grad)), None)
    given, place = head_inputs(tokens, device), torch.tensor([VOCABULARY - 1], device=device)
    copied, of_sink = (torch.full((tokens,), 0.2, device=device) for _ in range(2))
    fixed = {"softcap": SOFTCAP, "loss_scale": 1.0, "fp8": bool(choice and choice.head)}

    def with_pointer() -> None:
        pointer_loss.head_loss(**given, **fixed, copy=CopyRows(place, copied, of_sink)).backward()

    yield Case("head loss with a copy pointer", with_pointer, None, 6 * tokens * WIDTH * VOCABULARY)


def table_cases(tokens: int, device: object, choice: object) -> Iterator[Case]:
    """The gradient of an embedding table, of tokens as frequent as in text; the twin adds by atomic operations."""
    import numpy as np
    import torch

    from modded_nanogpt.kernels import embedding

    share = 1.0 / (np.arange(VOCABULARY) + 2.7)  # Zipf's law, as Mandelbrot wrote it
    ids = np.random.default_rng(0).choice(VOCABULARY, tokens, p=share / share.sum())
    runs = embedding.Runs(*(torch.from_numpy(part).int().to(device) for part in embedding.runs_of(ids)))
    rows = torch.randn(tokens, WIDTH, device=device).bfloat16()
    table = torch.zeros(VOCABULARY, WIDTH, dtype=torch.bfloat16, device=device)
    places = torch.from_numpy(ids).to(device)
    yield Case(
        "gradient of an embedding table", lambda: embedding.add_rows_(table, rows, runs),
        lambda: table.index_add_(0, places, rows), bytes=2 * (rows.numel() + 2 * runs.ids.numel() * WIDTH),
    )  # fmt: skip


def gram_cases(tokens: int, device: object, choice: object) -> Iterator[Case]:
    """What the n-gram table does to a lane, and to the eight lanes of each of four steps."""
    import numpy as np
    import torch

    from modded_nanogpt import ngrams
    from modded_nanogpt.kernels import row_table

    rows, cycle = GRAM_ROWS, 32 * tokens
    share = 1.0 / (np.arange(VOCABULARY) + 2.7)
    text = np.random.default_rng(0).choice(VOCABULARY, cycle, p=share / share.sum()).astype(np.uint16)
    places = torch.from_numpy(ngrams.gram_rows(text, rows)).to(device)
    signs = torch.from_numpy(ngrams.gram_signs(text, 8192)).to(device)
    table = torch.zeros(rows, WIDTH, dtype=torch.bfloat16, device=device)
    pool = torch.ones(8192, WIDTH, dtype=torch.int8, device=device)
    one = [part[:, :tokens].contiguous() for part in (places, signs)]
    yield Case(
        "n-grams looked up",
        lambda: row_table.look_up(table, one[0], pool, one[1]),
        None,
        bytes=tokens * 6 * WIDTH,
    )
    gradients = 1e-3 * torch.randn(cycle, WIDTH, dtype=torch.bfloat16, device=device)
    flat = places.flatten()
    yield Case("  a cycle's entries sorted", lambda: torch.sort(flat, stable=True), None)
    entries = row_table.Entries(*torch.sort(flat, stable=True), gradients, signs.flatten(), pool)
    second, last = torch.zeros(rows, device=device), torch.zeros(rows, dtype=torch.int32, device=device)
    log_kept = torch.zeros(9, dtype=torch.float64, device=device)
    rates = row_table.Rates(3, 0.95, 0.1, 0.01, 1.0, 1e-10, True)
    touched = torch.unique(flat).numel()
    for block, warps in ((1, 2), (1, 1), (2, 1), (2, 2), (4, 2), (8, 2), (4, 4)):

        def update(block: int = block, warps: int = warps) -> None:
            kept = row_table.BLOCK_ENTRIES, row_table.ENTRY_WARPS
            row_table.BLOCK_ENTRIES, row_table.ENTRY_WARPS = block, warps
            try:
                row_table.update_rows_(table, second, last, log_kept, entries, rates)
            finally:
                row_table.BLOCK_ENTRIES, row_table.ENTRY_WARPS = kept

        name = f"  a cycle's update, {block} entries, {warps} warps"
        yield Case(name, update, None, bytes=2 * WIDTH * (entries.ids.numel() + 2 * touched))


def row_kernel_sweep(tokens: int, device: object, choice: object) -> Iterator[Case]:
    """The loss kernel with other blocks."""
    from modded_nanogpt.kernels import cross_entropy

    case = row_kernel_case(tokens, device, "", choice.head)
    for block, warps in ((2048, 8), (4096, 8), (4096, 16), (8192, 8), (8192, 16), (8192, 32), (16_384, 32)):

        def call(block: int = block, warps: int = warps) -> None:
            kept = cross_entropy.BLOCK, cross_entropy.WARPS
            cross_entropy.BLOCK, cross_entropy.WARPS = block, warps
            try:
                case.ours()
            finally:
                cross_entropy.BLOCK, cross_entropy.WARPS = kept

        yield Case(f"  sweep: row blocks of {block}, {warps} warps", call, None, bytes=case.bytes)


if __name__ == "__main__":
    run_command(main)
