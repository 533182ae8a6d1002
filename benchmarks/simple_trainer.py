"""The small trainer on one GPU: tokens a second, and Muon against Adam, seeds in turn, in one process and one compile.

    python benchmarks/simple_trainer.py --dataset=/path/of/tokens --seeds=3
    python benchmarks/simple_trainer.py --dataset=data/shakespeare_char --rehearse=true   # a tiny model on a CPU
    python benchmarks/simple_trainer.py --dataset=... --copy_to=$OUT/runs   # and a copy without weights, to take home
    engaging report runs/adam runs/muon --baseline=adam --title="Muon against Adam" --out=report.html       # at home

Steps of 524,288 tokens, the learning rates falling over the last 7 of 10; Adam's matrices warm up for --adam_warmup
steps. Both optimizers train on the same tokens in the same order and are validated on the whole validation text of the
set. 72 steps of six runs read 37.7 M tokens and take about 8 minutes on an H100. Killed and started again, it goes on:
finished runs are kept. The tokens a second are the median over all runs' steps but the first ten of each; the
baseline trainer, `benchmarks/gpt2_training.py`, made 558,045 on an H100 in bfloat16.
"""

import json
import shutil
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
from nanogpt.common.storage import atomic_write_json, make_folder

SKIPPED_STEPS = 10  # the first touch of the data, clocks
OPTIMIZERS = ("muon", "adam")
RECORDED = ("config.json", "environment.json", "log.txt", "metrics.jsonl")
BASELINE_TOKENS_PER_S = 558_045  # docs/performance.md


@dataclass(frozen=True)
class Options:
    """The command line."""

    dataset: str = knob("", "folder with <name>_train_*.bin and <name>_val_*.bin")
    out_dir: str = knob("out/benchmark-simple", "where the runs go: <out_dir>/<optimizer>/seed-<seed>")
    seeds: int = knob(3, "runs of each optimizer, with seeds 1, 2, ...", low=1, high=100)
    steps: int = knob(72, "optimizer steps of a run", low=SKIPPED_STEPS + 2, high=10**6)
    adam_warmup: int = knob(10, "steps in which Adam's rate of the matrices rises", low=0, high=10**6)
    device_batch_size: int = knob(64, "sequences in one micro-step", low=1, high=1 << 20)
    val_loss_every: int = knob(24, "steps between validations", low=0, high=10**6)
    copy_to: str = knob("", "a new folder for a copy of the runs without checkpoints: what the reports read")
    rehearse: bool = knob(False, "a tiny model on a CPU, to see that everything works")


def write_plan(options: Options) -> Path:
    """The plan: of each seed both optimizers, one after the other."""
    folder = Path(options.out_dir).expanduser().absolute()
    flags: dict[str, object] = {
        "num_iterations": options.steps, "adam_warmup": options.adam_warmup, "target_val_loss": 0, "save_minutes": 0,
        "val_tokens": 0, "val_loss_every": options.val_loss_every,
    }  # fmt: skip
    if not options.rehearse:
        flags["device_batch_size"] = options.device_batch_size
    plan = [
        {"out_dir": str(folder / name / f"seed-{seed}"), "seed": seed, "optimizer": name, "flags": flags}
        for seed in range(1, options.seeds + 1)
        for name in OPTIMIZERS
    ]
    make_folder(folder)
    atomic_write_json(folder / "plan.json", plan)
    return folder / "plan.json"


def events(folder: Path, kind: str) -> list[dict]:
    """The lines of one kind in a run's metrics."""
    path = folder / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    lines = (json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines())  # whole ones
    return [line for line in lines if line["event"] == kind]


def result(folder: Path) -> dict[str, object] | None:
    """What one run came to; None for one that is not finished."""
    ends = [event for event in events(folder, "end") if event["status"] == "finished"]
    if not ends:
        return None
    steps, end = [event for event in events(folder, "train") if event["step"] >= SKIPPED_STEPS], ends[-1]
    return {
        "run": f"{folder.parent.name}/{folder.name}",
        "val_loss": end["val_loss"],
        "ms": statistics.median(event["ms"] for event in steps),
        "tokens_per_s": statistics.median(event["tokens_per_s"] for event in steps),
        "mfu": statistics.median(event["mfu"] or 0.0 for event in steps),
        "memory_gib": steps[-1]["memory_gib"] or 0.0,
        "val_tokens": end["val_tokens"],
    }


def copy_runs(plan: list[dict], base: Path, target: Path) -> int:
    """Copy what reports and the board read of each run, some MB in all; the number of bytes."""
    size = 0
    for entry in plan:
        run = Path(entry["out_dir"])
        place = target / run.relative_to(base)
        make_folder(place)
        for name in RECORDED:
            shutil.copyfile(run / name, place / name)
            size += (place / name).stat().st_size
    return size


def spread(values: list[float]) -> str:
    """Mean, and the standard deviation where there are several."""
    deviation = f" (sd {statistics.stdev(values):.4f})" if len(values) > 1 else ""
    return f"{statistics.mean(values):.4f}{deviation}"


def main(argv: list[str]) -> int:
    """Train the plan, print a line for each run and the summary, and everything as one JSON line at the end."""
    options = parse(Options, argv, prog="python benchmarks/simple_trainer.py", description=__doc__)
    if not options.dataset:
        raise UserError("--dataset=: name a folder of token shards, for example --dataset=data/fineweb10B")
    import torch

    if not options.rehearse and not torch.cuda.is_available():
        raise UserError(
            "this benchmark needs a GPU, and torch sees none; run it in a job that has one, or rehearse it with "
            "--rehearse=true"
        )
    where = torch.cuda.get_device_name() if not options.rehearse else "CPU"
    print(f"{where}, torch {torch.__version__}", flush=True)
    target = Path(options.copy_to).expanduser().absolute()
    if options.copy_to and target.exists():
        raise UserError(f"--copy_to={options.copy_to}: exists already; name a new folder")
    plan = write_plan(options)
    preset = "tiny" if options.rehearse else "simple"
    command = [
        sys.executable, "-m", "modded_nanogpt.train_gpt_simple", preset, f"--plan={plan}",
        f"--dataset={Path(options.dataset).expanduser().resolve()}",
    ]  # fmt: skip
    began = time.perf_counter()
    done = subprocess.run(command, cwd=ROOT, stdout=sys.stderr)
    wall = time.perf_counter() - began
    runs = []
    for entry in json.loads(plan.read_text()):
        if (run := result(Path(entry["out_dir"]))) is not None:
            runs.append(run)
            print(
                f"{run['run']:16} val loss {run['val_loss']:.4f}, {run['ms']:.1f} ms a step, "
                f"{run['tokens_per_s']:,.0f} tokens/s, MFU {100 * run['mfu']:.1f} %, {run['memory_gib']:.1f} GiB",
                flush=True,
            )
    if done.returncode:
        raise CommandError(f"the trainer ended with status {done.returncode}; started again, this goes on")
    if options.copy_to:
        size = copy_runs(json.loads(plan.read_text()), plan.parent, target)
        print(f"{options.copy_to}: the runs without their weights, {size / 1e6:.1f} MB")
    speed = statistics.median(run["tokens_per_s"] for run in runs)
    for name in OPTIMIZERS:
        final = [run["val_loss"] for run in runs if run["run"].startswith(name)]
        print(f"{name}: {spread(final)} after {options.steps} steps")
    if not options.rehearse:
        ratio = f"{speed / BASELINE_TOKENS_PER_S:.3f} times"
        print(
            f"{speed:,.0f} tokens/s: {ratio} the baseline's {BASELINE_TOKENS_PER_S:,} on an H100 in bfloat16"
        )
    print(f"compared: engaging compare {plan.parent}/adam {plan.parent}/muon; all of it took {wall:.0f} s")
    print(
        json.dumps(
            {"device": where, "torch": torch.__version__, "tokens_per_s": speed, "wall_s": wall, "runs": runs}
        )
    )
    return 0


if __name__ == "__main__":
    run_command(main)
