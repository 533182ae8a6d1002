"""A stand-in for modded_nanogpt/train_gpt_simple.py without torch: its flags, variables and run directory.

The loss is a function of variant, seed and step. --plan trains several runs in one process. Asked to stop it saves its
step and ends with 75; --break_seed ends with 1, --nan_seed with 70, --pause sleeps at each step. --gate is a folder:
the first run that comes to it passes, the others wait until it holds a file `open`.
"""

import argparse
import contextlib
import json
import math
import os
import signal
import sys
import time
from pathlib import Path

STAGE = ("num_iterations", "warmdown_iters", "batch_size", "device_batch_size", "val_loss_every")
GAIN = {"palm_parallel": 0.05, "curriculum": 0.02, "depth_warm": -0.03}
asked = []


def parse(argv):
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("preset", nargs="*")
    for name, default in (
        ("out_dir", ""), ("variant", "baseline"), ("optimizer", "muon"), ("plan", ""), ("gate", ""),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", default=default)
    parser.add_argument("--auto_resume", default="false")
    parser.add_argument("--check", default="false")
    for name in ("seed", *STAGE, "break_seed", "nan_seed", "break_from"):
        parser.add_argument(f"--{name}", type=int, default=-1)
    for name in ("pause", "target_val_loss", "sequence_length", "val_tokens", "adam_lr", "muon_lr"):
        parser.add_argument(f"--{name}", type=float, default=0.0)
    return parser.parse_args(argv)


def with_stage(args):
    for name in STAGE:
        value = os.environ.get(f"STAGE_{name.upper()}")
        if value is not None:
            setattr(args, name, int(value))
    return args


def main():
    args = with_stage(parse(sys.argv[1:]))
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda number, _: asked.append(number))
    if args.check == "true":
        return 0
    if not args.plan:
        return train(args)
    print("compiled once")
    for entry in json.loads(Path(args.plan).read_text()):
        words = [f"--{k}={v}" for k, v in {**entry.pop("flags"), **entry}.items()]
        status = train(parse([*words, "--auto_resume=true"]))
        if status:
            return status
    return 0


def train(args):
    folder = Path(args.out_dir)
    folder.mkdir(parents=True, exist_ok=True)
    state = folder / ".step"
    step = int(state.read_text()) if state.exists() else 0
    (folder / "config.json").write_text(json.dumps({"config": vars(args)}))
    (folder / "environment.json").write_text(
        json.dumps({"attempts": [{"host": "here", "gpus": ["Toy GPU"]}]})
    )
    last, every = args.num_iterations if args.num_iterations > 0 else 8, max(1, args.val_loss_every)
    with (folder / "metrics.jsonl").open("a") as file:

        def write(**row):
            file.write(json.dumps(row) + "\n")
            file.flush()

        write(event="resume" if step else "start", step=step)
        while True:
            val = loss_of(args, step)
            if step % every == 0 or step == last:
                write(event="val", step=step, val_loss=val, tokens=step * 10, train_ms=step * 10.0)
            if step == last:
                write(event="end", step=step, status="finished", val_loss=val, train_ms=step * 10.0)
                print(f"finished with {val}")
                return 0
            if asked or (folder / "stop").exists():
                state.write_text(str(step))
                write(event="end", step=step, status="interrupted", val_loss=val, train_ms=step * 10.0)
                return 75
            if args.seed == args.break_seed:
                print("Traceback (most recent call last):\nRuntimeError: it broke", file=sys.stderr)
                return 1
            if args.seed == args.nan_seed:
                return 70
            time.sleep(args.pause)
            wait_at(args.gate)
            write(
                event="train",
                step=step,
                loss=val + 0.1,
                ms=10.0,
                tokens=step * 10,
                train_ms=(step + 1) * 10.0,
            )
            step += 1


def wait_at(gate):
    if not gate:
        return
    with contextlib.suppress(FileExistsError):
        (Path(gate) / "first").symlink_to(str(os.getpid()))
    first = str((Path(gate) / "first").readlink()) == str(os.getpid())
    while not first and not asked and not (Path(gate) / "open").exists():
        time.sleep(0.05)


def loss_of(args, step):
    if args.variant == "fades":  # best in a short run, worst in a long one
        GAIN["fades"] = 0.1 if args.num_iterations <= 8 else -0.1
    tuned = 10 * (args.muon_lr - 0.025) ** 2 if args.muon_lr else 0.0
    noise = math.sin(args.seed * 12.9898 + 4.1) * 0.004
    return 3.3 + 4 * math.exp(-step / 3) - GAIN.get(args.variant, 0) * step / (step + 1) + noise + tuned


if __name__ == "__main__":
    raise SystemExit(main())
