"""GPT-2 124M on one GPU: tokens a second of the whole trainer, and the loss after 80 steps, beside nanoGPT's.

    python benchmarks/gpt2_training.py --dataset=/path/of/tokens --seeds=3 --fp8=true
    python benchmarks/gpt2_training.py --dataset=/path/of/tokens --nanogpt=/path/of/a/nanoGPT/checkout
    python benchmarks/gpt2_training.py --dataset=/path/of/tokens --steps=300 --tokens_per_step=122880 --seeds=3

The run: 491,520 tokens a step where --tokens_per_step says nothing else, warm-up 10, learning rate 6e-4 down a cosine
to 6e-5, validation over the whole validation set in blocks of 1,024. `--dataset` is a folder of shards with at least
39.4 M training tokens. With `--nanogpt`, nanoGPT's own train.py makes the same run on the same tokens first, and the
ratio is printed.
"""

import json
import re
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)

from nanogpt.common.errors import CommandError, UserError, run_command
from nanogpt.common.flags import knob, parse

NANOGPT_TOKENS = 491_520  # a step
SKIPPED_STEPS = 10  # compilation and the first touch of the data


@dataclass(frozen=True)
class Options:
    """The command line."""

    dataset: str = knob("", "folder with <name>_train_*.bin and <name>_val_*.bin")
    out_dir: str = knob("out/benchmark", "where the runs go; an existing one is moved aside")
    seeds: int = knob(1, "runs, with seeds 1337, 1338, ...", low=1, high=100)
    steps: int = knob(80, "optimizer steps", low=SKIPPED_STEPS + 2)
    tokens_per_step: int = knob(NANOGPT_TOKENS, "of 1,024 times the sequences of its micro-steps", low=1024)
    batch_size: int = knob(120, "sequences in one micro-step; the accumulation follows from it", low=1)
    fp8: bool = knob(False, "8-bit matrix products")
    nanogpt: str = knob("", "a nanoGPT checkout to run beside ours")


def ours(options: Options, seed: int, *more: str) -> dict[str, float]:
    """One run of our trainer: median milliseconds a step, tokens a second, MFU, final validation loss.

    `more` are flags of the trainer that override the run's.
    """
    folder = Path(options.out_dir) / f"seed-{seed}"
    command = [
        sys.executable, "-m", "nanogpt.train", "train_gpt2", f"--dataset={Path(options.dataset).resolve()}",
        f"--out_dir={folder}", f"--seed={seed}", f"--fp8={options.fp8}", f"--batch_size={options.batch_size}",
        f"--tokens_per_step={options.tokens_per_step}", f"--max_iters={options.steps}",
        f"--lr_decay_iters={options.steps}",
        "--warmup_iters=10", f"--eval_interval={options.steps}", "--eval_tokens=0", "--log_interval=1",
        "--save_minutes=0", "--overwrite=true", *more,
    ]  # fmt: skip
    began = time.perf_counter()
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True)
    if done.returncode:
        raise CommandError(f"the run of seed {seed} failed: {done.stderr.strip().splitlines()[-1:]}")
    events = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [event for event in events if event["event"] == "train" and event["step"] >= SKIPPED_STEPS]
    return {
        "ms": statistics.median(event["ms"] for event in steps),
        "tokens_per_s": statistics.median(event["tokens_per_s"] for event in steps),
        "mfu": statistics.median(event["mfu"] or float("nan") for event in steps),
        "memory_gib": steps[-1]["memory_gib"] or float("nan"),
        "val_loss": [event["val_loss"] for event in events if event["event"] == "val"][-1],
        "wall_s": time.perf_counter() - began,
    }


def theirs(options: Options) -> dict[str, float]:
    """The same run by nanoGPT's own train.py: median milliseconds a step, tokens a second.

    It reads raw uint16 files, so the shards are written once more without their headers.
    """
    import numpy as np

    from nanogpt.common.shards import open_token_set

    checkout, tokens = Path(options.nanogpt), open_token_set(options.dataset, Path())
    folder = checkout / "data" / "benchmark"
    folder.mkdir(parents=True, exist_ok=True)
    for split, shards in (("train", tokens.shards_train), ("val", tokens.shards_val)):
        np.concatenate([shard.tokens() for shard in shards]).tofile(folder / f"{split}.bin")
    command = [
        sys.executable, "train.py", "config/train_gpt2.py", "--dataset=benchmark", "--out_dir=out-benchmark",
        "--wandb_log=False", "--batch_size=60", "--gradient_accumulation_steps=8", f"--max_iters={options.steps}",
        f"--lr_decay_iters={options.steps}", "--warmup_iters=10", "--eval_interval=100000", "--eval_iters=1",
        "--log_interval=1",
    ]  # fmt: skip
    done = subprocess.run(command, cwd=checkout, text=True, capture_output=True)
    times = [float(found) for found in re.findall(r"iter \d+: loss [\d.]+, time ([\d.]+)ms", done.stdout)]
    if done.returncode or len(times) <= SKIPPED_STEPS:
        raise CommandError(f"nanoGPT's train.py failed: {done.stderr.strip().splitlines()[-1:]}")
    ms = statistics.median(times[SKIPPED_STEPS:])
    return {"ms": ms, "tokens_per_s": 1e3 * NANOGPT_TOKENS / ms}


def main(argv: list[str]) -> int:
    """Run, and print a line for each run and the summary."""
    options = parse(Options, argv, prog="python benchmarks/gpt2_training.py", description=__doc__)
    if not options.dataset:
        raise UserError("--dataset=: name a folder of token shards, for example --dataset=data/openwebtext")
    if options.nanogpt and options.tokens_per_step != NANOGPT_TOKENS:
        raise UserError(
            f"--tokens_per_step={options.tokens_per_step}: nanoGPT's run takes {NANOGPT_TOKENS}; leave out --nanogpt"
        )
    import torch

    if not torch.cuda.is_available():
        raise UserError("this benchmark needs a GPU, and torch sees none; run it in a job that has one")
    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, fp8={str(options.fp8).lower()}",
        flush=True,
    )
    baseline = theirs(options) if options.nanogpt else None
    if baseline:
        print(
            f"nanoGPT: {baseline['ms']:.1f} ms a step, {baseline['tokens_per_s']:,.0f} tokens/s", flush=True
        )
    runs = []
    for seed in range(1337, 1337 + options.seeds):
        run = ours(options, seed)
        runs.append(run)
        print(
            f"seed {seed}: {run['ms']:.1f} ms a step, {run['tokens_per_s']:,.0f} tokens/s, "
            f"MFU {100 * run['mfu']:.1f} %, {run['memory_gib']:.1f} GiB, "
            f"val loss {run['val_loss']:.4f}, {run['wall_s']:.0f} s in all",
            flush=True,
        )
    speed = statistics.median(run["tokens_per_s"] for run in runs)
    ratio = f", {speed / baseline['tokens_per_s']:.2f} x nanoGPT" if baseline else ""
    print(
        f"ours: {speed:,.0f} tokens/s{ratio}; val loss {statistics.mean(run['val_loss'] for run in runs):.4f} "
        f"(mean of {len(runs)})"
    )
    return 0


if __name__ == "__main__":
    run_command(main)
