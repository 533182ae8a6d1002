"""The baseline's figures in one table: training in bfloat16 and with 8-bit products, the loss, sampling, and the goals.

    python benchmarks/baseline.py --data=/path/of/token/shards
    python benchmarks/baseline.py --data=data/shakespeare --tiny=true

One command on one GPU. Each row is a run of GPT-2 124M, 80 steps of 491,520 tokens with the whole validation set at the
end (benchmarks/gpt2_training.py), or of benchmarks/sampling.py. nanoGPT's figures are those of its own train.py for the
same steps, measured on the GPU named; `--nanogpt=CHECKOUT` measures it here. `--tiny=true` tries everything in a minute
on a CPU: its figures mean nothing. The last line is JSON for programs.
"""

import json
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)

from benchmarks import gpt2_training
from nanogpt.common.errors import CommandError, UserError, run_command
from nanogpt.common.flags import knob, parse

# nanoGPT's train.py at 3adf61e, batch 60, accumulation 8, torch 2.11.0+cu130: tokens a second, loss after the 80 steps.
NANOGPT = {"H100": (497_500, 6.788), "H200": (513_500, 6.803)}
GOALS = {
    "bfloat16": 1.15,
    "FP8": 1.3,
    "sampling": 5.0,
}  # times nanoGPT, times nanoGPT, times a loop without a cache
LOSS_GOAL = (
    6.79  # mean of three seeds, over the whole validation set of the corpus that NANOGPT was measured on
)
FP8_LOSS = 0.01  # most that 8-bit products may cost
TINY_MODEL = ("--n_layer=2", "--n_head=2", "--n_embd=32", "--block_size=32")
TINY = (
    *TINY_MODEL,
    "--batch_size=8",
    "--tokens_per_step=256",
    "--eval_tokens=512",
    "--device=cpu",
    "--num_threads=1",
)
TINY_SAMPLING = (*TINY_MODEL, "--vocab_size=512", "--new_tokens=24", "--rounds=1", "--device=cpu")


@dataclass(frozen=True)
class Options:
    """The command line."""

    data: str = knob(
        "", "folder with <name>_train_*.bin and <name>_val_*.bin: 39.4 M training tokens at least"
    )
    out_dir: str = knob("out/benchmark", "where the runs go; an existing one is moved aside")
    seeds: int = knob(
        3, "runs in bfloat16, with seeds 1337, 1338, ...; the loss is their mean", low=1, high=100
    )
    fp8_seeds: int = knob(1, "runs with 8-bit products; 0: none", low=0, high=100)
    steps: int = knob(80, "optimizer steps of a run", low=gpt2_training.SKIPPED_STEPS + 2)
    batch_size: int = knob(120, "sequences in one micro-step; 480 divided by it is the accumulation", low=1)
    nanogpt: str = knob("", "a nanoGPT checkout to run beside ours, instead of the figures on record")
    tiny: bool = knob(False, "a model of no use on a CPU: tries the command itself")


@dataclass(frozen=True)
class Row:
    """A line of the table. `ratio` to what it is compared with; `goal` the ratio that it must reach."""

    what: str
    tokens_per_s: float
    ratio: float | None = None
    goal: float | None = None
    mfu: float | None = None
    memory_gib: float | None = None
    val_loss: float | None = None
    note: str = ""


def main(argv: list[str]) -> int:
    """Run everything, then print the table."""
    options = parse(Options, argv, prog="python benchmarks/baseline.py", description=__doc__)
    if not options.data:
        raise UserError("--data=: name a folder of token shards, for example --data=data/openwebtext")
    import torch

    if not options.tiny and not torch.cuda.is_available():
        raise UserError(
            "this benchmark needs a GPU, and torch sees none; run it in a job that has one, or --tiny=true"
        )
    device = "CPU, tiny" if options.tiny else torch.cuda.get_device_name()
    rows = training_rows(options, *reference(options, device))
    rows.append(sampling_row(options))
    print(f"\n{device}, torch {torch.__version__}; `python benchmarks/baseline.py {' '.join(argv)}`\n")
    print("\n".join(table(rows)))
    print(json.dumps({"device": device, "torch": torch.__version__, "rows": [vars(row) for row in rows]}))
    return 0


def reference(options: Options, device: str) -> tuple[Row | None, float | None]:
    """nanoGPT's row and its tokens a second: measured when there is a checkout, on record for known GPUs, else None."""
    if options.nanogpt:
        speed = gpt2_training.theirs(training(options, fp8=False))["tokens_per_s"]
        return Row("nanoGPT's train.py", speed, note="measured here"), speed
    for name, (speed, loss) in NANOGPT.items():
        if name in device:
            return Row("nanoGPT's train.py", speed, val_loss=loss, note=f"on record, another {name}"), speed
    return None, None


def training(options: Options, fp8: bool) -> gpt2_training.Options:
    """The same wish, as gpt2_training says it."""
    return gpt2_training.Options(
        dataset=options.data, out_dir=f"{options.out_dir}/{'fp8' if fp8 else 'bf16'}", steps=options.steps,
        batch_size=options.batch_size, fp8=fp8, nanogpt=options.nanogpt,
    )  # fmt: skip


def training_rows(options: Options, theirs: Row | None, their_speed: float | None) -> list[Row]:
    """nanoGPT's row where there is one, and ours: the medians and the mean loss of the runs of each kind."""
    rows = [theirs] if theirs else []
    first_loss = float("nan")  # of the first seed in bfloat16, which 8-bit products are compared with
    for kind, seeds in (("bfloat16", options.seeds), ("FP8", 0 if options.tiny else options.fp8_seeds)):
        runs = [run_once(options, kind, seed) for seed in range(1337, 1337 + seeds)]
        if not runs:
            continue
        names = ("tokens_per_s", "mfu", "memory_gib")
        medians = {name: statistics.median(run[name] for run in runs) for name in names}
        middle = {
            name: value if value == value else None for name, value in medians.items()
        }  # NaN: not known
        loss, note = (
            statistics.mean(run["val_loss"] for run in runs),
            f"{seeds} seed{'s' if seeds > 1 else ''}",
        )
        if kind == "bfloat16":
            first_loss = runs[0]["val_loss"]
            if theirs and theirs.val_loss and options.steps == 80:
                note += f"; loss goal {LOSS_GOAL}: {'met' if loss <= LOSS_GOAL else 'missed'}"
        else:
            cost = runs[0]["val_loss"] - first_loss
            note += f"; {cost:+.4f} to bfloat16's loss, goal {FP8_LOSS}: {'met' if cost <= FP8_LOSS else 'missed'}"
        ratio = middle["tokens_per_s"] / their_speed if their_speed else None
        goal = GOALS[kind] if ratio else None
        rows.append(Row(f"ours, {kind}", ratio=ratio, goal=goal, val_loss=loss, note=note, **middle))
    return rows


def run_once(options: Options, kind: str, seed: int) -> dict[str, float]:
    """One training; says a line about it, because they take minutes."""
    run = gpt2_training.ours(training(options, kind == "FP8"), seed, *(TINY if options.tiny else ()))
    print(
        f"{kind}, seed {seed}: {run['tokens_per_s']:,.0f} tokens/s, val loss {run['val_loss']:.4f}, "
        f"{run['wall_s']:.0f} s in all",
        flush=True,
    )
    return run


def sampling_row(options: Options) -> Row:
    """124M, one sample of 1,000 tokens, beside our loop without a cache."""
    command = [sys.executable, "benchmarks/sampling.py", *(TINY_SAMPLING if options.tiny else ())]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise CommandError(f"benchmarks/sampling.py failed: {done.stderr.strip().splitlines()[-1:]}")
    found = json.loads(done.stdout.splitlines()[-1])
    rate = found["new_tokens"] / statistics.median(found["seconds"]["ours"])
    note = f"without the cache {found['new_tokens'] / statistics.median(found['seconds']['plain']):,.0f} tokens/s"
    return Row("ours, sampling, batch 1", rate, found["ratio"], GOALS["sampling"], note=note)


def table(rows: list[Row]) -> list[str]:
    """The rows in Markdown."""
    lines = [
        "| what | tokens/s | ratio | goal | MFU | memory | loss | |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        goal = (
            "-"
            if row.goal is None
            else f"{row.goal:g}: {'met' if (row.ratio or 0) >= row.goal else 'missed'}"
        )
        cells = [
            row.what,
            f"{row.tokens_per_s:,.0f}",
            "-" if row.ratio is None else f"{row.ratio:.2f}",
            goal,
            "-" if row.mfu is None else f"{100 * row.mfu:.1f} %",
            "-"
            if row.memory_gib is None or row.memory_gib != row.memory_gib
            else f"{row.memory_gib:.1f} GiB",
            "-" if row.val_loss is None else f"{row.val_loss:.4f}",
            row.note,
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


if __name__ == "__main__":
    run_command(main)
