"""The speedrun in short: 105 + 6 steps of the whole schedule on a small corpus, beside the record code's figures.

    python benchmarks/speedrun.py --dataset=/path/of/tokens --seeds=3            # on one GPU; prints the table
    python benchmarks/speedrun.py --dataset=/path/of/tokens --gpus=8             # the same lanes on more of them
    python benchmarks/speedrun.py --dataset=/path/of/tokens --steps=150          # cheaper steps, and more
    python benchmarks/speedrun.py --dataset=/path/of/tokens --flags=record89     # another preset
    python benchmarks/speedrun.py --dataset=/path/of/tokens --leave_out="xsa=false mudd=false" # what each is worth
    python benchmarks/speedrun.py --dataset=/path/of/tokens --cold=true          # and how long starting takes

The record code (modded-nanogpt at record 89, adapted to torch 2.11) was measured on one H100 80GB HBM3: 242 / 441 /
650 ms a step in stages of 35 steps, 50.9 s in all, 4.0782 on the first 1,835,008 validation tokens, 39.4 GiB.

All seeds are trained by one process after one compilation (`--runs`). `start-up` in the table is the first one's time
from launch to the clock's start, with this node's compile caches as they are; `between` the time from one run's end to
the next one's start. `first 25 steps` are seconds on the clock. That a run compiles after its start is an error.
`--cold=true` first starts three times with folders of its own: `cold`, nothing compiled before; `another node`, only
the archive that the first one packed; `same node`, the second one's folders, which the runs then use as well. Each has
one step of each kind. A start that fails is named, and the others go on. Checkpoints go.

`--leave_out` also trains with each of the flags that it names, and prints what they change; start-up grows by a graph's
compilation for those that change the model.

`--dataset` is a folder of shards; with one training shard the run begins it again when it is used up, as the record's
did there. The preset's table of n-grams learns repeated text by heart: give two shards, or `--flags=--table_rows=0`.
"""

import json
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)

from nanogpt.common.errors import CommandError, UserError, run_command
from nanogpt.common.flags import knob, parse

VAL_TOKENS = 1_835_008
RECORD = {"stage 1": 242.0, "stage 2": 441.0, "stage 3": 650.0, "seconds": 50.9, "loss": 4.0782, "GiB": 39.4}
STAGES = {131_072: "stage 1", 262_144: "stage 2", 393_216: "stage 3", 327_680: "taper"}  # by tokens of a step
SHOWN_LINES = 60  # of a run that failed
FIRST_SEED, FIRST_STEPS = 1337, 25
SKIPPED = 3  # steps at the beginning of a stage, while the CPU is not yet ahead


@dataclass(frozen=True)
class Options:
    """The command line."""

    dataset: str = knob("", "folder with <name>_train_*.bin and <name>_val_*.bin")
    out_dir: str = knob("out/benchmark-speedrun", "where the runs go; existing ones are moved aside")
    seeds: int = knob(1, "runs, with seeds 1337, 1338, ...", low=1, high=100)
    gpus: int = knob(1, "GPUs of this machine", low=1, high=8)
    steps: int = knob(105, "scheduled steps; the record code was measured with 105", low=4, high=10_000)
    extension: int = knob(6, "steps after them", low=0, high=1000)
    flags: str = knob("", "further flags of the trainer, as a shell would split them")
    leave_out: str = knob(
        "", "NAME=VALUE flags, separated by spaces, each to be tried by itself beside the rest"
    )
    cold: bool = knob(False, "also measure starting with empty, with packed and with filled compile caches")
    plot: str = knob("", "write the loss curves of the runs to this PNG")


def command_of(options: Options, runs: int, folder: Path) -> list[str]:
    """The trainer's command line."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1",
                f"--nproc_per_node={options.gpus}"]  # fmt: skip
    return [
        sys.executable, *(launcher if options.gpus > 1 else []), "-m", "modded_nanogpt.train_gpt",
        f"--dataset={Path(options.dataset).resolve()}", f"--out_dir={folder}", f"--runs={runs}",
        f"--steps={options.steps}", f"--extension_steps={options.extension}", f"--eval_tokens={VAL_TOKENS}",
        "--data_passes=9", "--save_minutes=0", "--eval_interval=35", "--overwrite=true", *shlex.split(options.flags),
    ]  # fmt: skip


def print_start_ups(options: Options, disks: Path, failures: list[str]) -> dict[str, str]:
    """Seconds from launch to the clock's start: cold, on another node with the archive, on the same node again.

    Returns the environment variables that name the last one's folders: the runs after it find everything there.
    """
    for name, disk in (("cold", "one"), ("another node", "two"), ("same node", "two")):
        try:
            seconds, said = start_up(options, folders(disks / disk), disks / "archives")
        except CommandError as error:
            failures.append(f"start-up, {name}: {error}")
            print(failures[-1], flush=True)
            continue
        print(f"start-up, {name}: {seconds:.1f} s")
        print("".join(f"    {line}\n" for line in said), end="", flush=True)
    return folders(disks / "two")


def folders(disk: Path) -> dict[str, str]:
    """Environment variables for compile caches on a `disk` of one's own."""
    return {"TORCHINDUCTOR_CACHE_DIR": str(disk / "inductor"), "TRITON_CACHE_DIR": str(disk / "triton")}


def start_up(options: Options, variables: dict[str, str], archives: Path) -> tuple[float, list[str]]:
    """(seconds from launch to the clock's start, what the log says of them). The run has one step of each kind."""
    folder = Path(options.out_dir).absolute() / "start-up"
    command = [
        *command_of(options, 1, folder),
        f"--compile_cache={archives}",
        "--steps=4",
        "--extension_steps=1",
    ]
    began = time.time()
    launch(command, variables)
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    event = json.loads((folder / "metrics.jsonl").read_text().splitlines()[0])
    lines = (folder / "log.txt").read_text().rpartition("\nend of source\n")[2].splitlines()
    return event["time"] - began, [line for line in lines if line.startswith(("compile caches:", "warm-up"))]


def launch(command: list[str], variables: dict[str, str]) -> None:
    """Run the trainer to its end. CommandError with its own words when it fails."""
    with tempfile.TemporaryFile("w+") as errors:
        done = subprocess.run(
            command, cwd=ROOT, env={**os.environ, **variables}, stdout=subprocess.DEVNULL, stderr=errors
        )
        if done.returncode:
            raise CommandError(f"status {done.returncode}: {what_it_said(errors)}")


def what_it_said(errors: IO[str]) -> str:
    """A failed process's own words in one line; their last page goes to stderr."""
    errors.seek(0)
    lines = [line.rstrip() for line in errors.read().strip().splitlines()]
    print("\n".join(lines[-SHOWN_LINES:]), file=sys.stderr, flush=True)
    return " / ".join(([line for line in lines if "rror: " in line] or lines)[-3:])  # torchrun's come last


def run_all(options: Options, variables: dict[str, str]) -> list[dict[str, float]]:
    """Train the seeds; of each `numbers_of` it. CommandError when the process fails or a run compiled too late."""
    place = Path(options.out_dir).absolute()
    folders = [place / f"seed-{seed}" for seed in range(FIRST_SEED, FIRST_SEED + options.seeds)]
    command = command_of(options, options.seeds, place if options.seeds > 1 else folders[0])
    began = time.time()
    launch(command, variables)
    found, before = [], {"start-up": began}
    for folder in folders:
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)  # a GB or more that nobody goes on with
        events = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        found.append(numbers_of(options, events, before))
        before = {"between": events[-1]["time"]}
    return found


def print_ablations(options: Options, base: list[dict[str, float]], variables: dict[str, str]) -> list[str]:
    """For each flag of `--leave_out` a line with what it changes, by the means of all seeds; what failed."""
    failures, usual = [], means(base)
    for flag in options.leave_out.split():
        place = Path(options.out_dir) / "without" / flag.replace("=", "-")
        tried = replace(options, flags=f"{options.flags} --{flag}", out_dir=str(place))
        try:
            found = means(run_all(tried, variables))
        except CommandError as error:
            failures.append(f"--{flag}: {error}")
            print(failures[-1], flush=True)
            continue
        shown = (("loss", 4), ("seconds", 2), ("GiB", 1))
        changes = [f"{name} {found[name] - usual[name]:+.{digits}f}" for name, digits in shown]
        print(f"--{flag}: {', '.join(changes)}", flush=True)
    return failures


def numbers_of(options: Options, events: list[dict], before: dict[str, float]) -> dict[str, float]:
    """Loss, seconds on the clock, ms a step by stage, memory, and seconds from the time in `before` to the start."""
    steps = [event for event in events if event["event"] == "train"]
    (start,) = [event for event in events if event["event"] == "start"]
    (end,) = [event for event in events if event["event"] == "end"]
    if end["compiled"]:
        raise CommandError(f"{end['compiled']} graphs were compiled after the clock's start")
    found = {"loss": end["val_loss"], "seconds": end["train_ms"] / 1e3}
    found |= {name: start["time"] - since for name, since in before.items()}
    if len(steps) > FIRST_STEPS:
        found["first 25 steps"] = steps[FIRST_STEPS - 1]["train_ms"] / 1e3
    for name, of_stage in by_stage(steps[: options.steps]).items():
        ms = statistics.mean(event["ms"] for event in of_stage)
        found |= {name: ms, f"{name}, tokens/s": 1e3 * of_stage[0]["size"] / ms}
    found["GiB"] = max(event["memory_gib"] or 0.0 for event in steps)
    return found


def by_stage(steps: list[dict]) -> dict[str, list[dict]]:
    """The scheduled `steps` by stage, with their tokens as `size`; a stage's first ones are left out."""
    found: dict[str, list[dict]] = {}
    sizes = [
        event["tokens"] - before
        for event, before in zip(steps, [0, *(e["tokens"] for e in steps)], strict=False)
    ]
    for place, (event, size) in enumerate(zip(steps, sizes, strict=True)):
        if size in STAGES and place >= SKIPPED and len(set(sizes[place - SKIPPED : place + 1])) == 1:
            found.setdefault(STAGES[size], []).append({**event, "size": size})
    return found


def main(argv: list[str]) -> None:
    """Make the runs and print the table."""
    options = parse(Options, argv, prog="benchmarks/speedrun.py", description=__doc__)
    if not options.dataset:
        raise UserError(
            "--dataset=: name a folder of token shards, such as one that nanogpt/data/*/prepare.py wrote"
        )
    import torch

    if not torch.cuda.is_available():
        raise UserError("--gpus: this machine has no GPU that torch can use; run it where there is one")
    print(
        f"{torch.cuda.get_device_name()} x {options.gpus}, torch {torch.__version__}, flags: {options.flags or 'none'}",
        flush=True,
    )
    failures: list[str] = []
    with tempfile.TemporaryDirectory(prefix="nanogpt-cold-") as disks:
        variables = print_start_ups(options, Path(disks), failures) if options.cold else {}
        runs = run_all(options, variables)
        for seed, run in enumerate(runs, FIRST_SEED):
            print(f"seed {seed}: " + ", ".join(f"{name} {value:.4g}" for name, value in run.items()))
        print_table(options, runs)
        failures += print_ablations(options, runs, variables)
    if failures:
        raise CommandError(f"{len(failures)} failed: {failures[0]}")
    if options.plot:
        plot(options)


def means(runs: list[dict[str, float]]) -> dict[str, float]:
    """Of each number, over the runs that have it."""
    names = dict.fromkeys(name for run in runs for name in run)
    return {name: statistics.mean(run[name] for run in runs if name in run) for name in names}


def print_table(options: Options, runs: list[dict[str, float]]) -> None:
    """The runs' means beside the record code's figures."""
    print(f"\n{'':20} {'ours':>12} {'record':>10} {'ratio':>7}")
    for name, value in means(runs).items():
        theirs = RECORD.get(name)
        beside = f"{theirs:10.4f} {value / theirs:7.3f}" if theirs else ""
        print(f"{name:20} {value:12,.4f} {beside}".rstrip(), flush=True)


def plot(options: Options) -> None:
    """Loss curves of the runs, with the record code's final loss as a line."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    for seed in range(FIRST_SEED, FIRST_SEED + options.seeds):
        lines = (Path(options.out_dir) / f"seed-{seed}" / "metrics.jsonl").read_text().splitlines()
        events = [json.loads(line) for line in lines]
        training = [(event["step"], event["loss"]) for event in events if event["event"] == "train"]
        validation = [(event["step"], event["val_loss"]) for event in events if event["event"] == "val"]
        (line,) = axes.plot(*zip(*training, strict=True), linewidth=1, label=f"seed {seed}, training")
        axes.plot(*zip(*validation, strict=True), "o", color=line.get_color(), markersize=5)
    axes.axhline(RECORD["loss"], color="gray", linestyle="--", linewidth=1)
    axes.annotate(f"record code, final: {RECORD['loss']}", (0, RECORD["loss"]), xytext=(0, 4),
                  textcoords="offset points", fontsize=9)  # fmt: skip
    axes.set(xlabel="step", ylabel="loss (dots: validation)", title="The speedrun on a small corpus")
    axes.legend()
    figure.savefig(options.plot, dpi=130)


if __name__ == "__main__":
    run_command(main)
