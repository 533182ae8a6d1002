"""`engaging selfcheck speedrun`: does the speedrun do here what it does elsewhere? Five minutes on one GPU.

    engaging selfcheck speedrun                    # after `python modded_nanogpt/data/cached_fineweb10B.py 1`
    engaging selfcheck speedrun --out_dir=out/second-node

The first 500 steps of the preset record89 on FineWeb; the validation losses beside those that public runs of that model
had at the same steps, and a block of text to send to whoever asks how it went. Nothing is kept but log and metrics.
"""

import json
import subprocess
import sys
import time
from pathlib import Path

from nanogpt.common.errors import CommandError, UserError
from nanogpt.common.storage import atomic_write_bytes
from tools.args import Parser
from tools.place import checkout
from tools.runs import metrics

# Lowest and highest validation loss at these steps of the 118 public logs of records 85, 86 and 88 (KellerJordan/
# modded-nanogpt, May to July 2026, whole runs of 1,290 to 1,398 steps on 8 H100): the model is nearly the same.
BAND = {250: (4.4177, 4.5599), 500: (4.0504, 4.3461)}
TRAINER = (
    "-m",
    "modded_nanogpt.train_gpt",
    "record89",
    "--dataset=fineweb10B",
    "--eval_interval=250",
    "--data_passes=9",
)
LOOK_SECONDS = 0.5
FILE_NAME, METRICS = "selfcheck.txt", "metrics.jsonl"


def parser() -> Parser:
    """The command line."""
    read = Parser("selfcheck", __doc__)
    read.add_argument("what", choices=["speedrun"], help="what is checked")
    read.add_argument(
        "--out_dir", default="out/selfcheck-speedrun", help="the run directory; an old one is moved aside"
    )
    return read


def main(argv: list[str]) -> int:
    """Train, compare, print; 0 when all losses lie in the band, 1 when not."""
    options = parser().read(argv)
    folder = Path(options.out_dir).expanduser().absolute()
    train(folder)
    events = list(metrics(folder / METRICS))
    environment = json.loads((folder / "environment.json").read_text(encoding="utf-8"))["attempts"][-1]
    found = {event["step"]: event["val_loss"] for event in events if event.get("event") == "val"}
    lines = [*block(found, events, environment)]
    atomic_write_bytes(folder / FILE_NAME, "\n".join([*lines, ""]).encode())
    print("\n".join(["", *lines, "", f"This block is in {folder / FILE_NAME}, to send on."]))
    return 0 if all(inside(step, found[step]) for step in BAND) else 1


def train(folder: Path) -> None:
    """The run up to the last step of BAND; it is ended there, without a checkpoint. CommandError when it fails."""
    command = [sys.executable, *TRAINER, f"--out_dir={folder}", "--save_minutes=0"]
    command += ["--overwrite=true"] if (folder / "config.json").exists() else []
    began = time.time()
    child = subprocess.Popen(command, cwd=checkout())
    try:
        while child.poll() is None:
            time.sleep(LOOK_SECONDS)
            if reached(folder, began):
                return
        if not reached(folder, began):
            if child.returncode == UserError.exit_code:
                raise SystemExit(child.returncode)  # it has said why
            raise CommandError(
                f"{folder}: the trainer ended with status {child.returncode}; {folder}/log.txt says why"
            )
    finally:
        child.kill()
        child.wait()


def reached(folder: Path, began: float) -> bool:
    """Whether the run that was started at `began` has validated at the last step of BAND."""
    if not (folder / METRICS).exists():
        return False
    events = [
        event
        for event in metrics(folder / METRICS)
        if event.get("event") == "val" and event.get("time", 0) > began
    ]
    return any(event["step"] == max(BAND) for event in events)


def inside(step: int, loss: float) -> bool:
    """Whether the loss is one that public runs had."""
    low, high = BAND[step]
    return low <= loss <= high


def block(found: dict[int, float], events: list[dict], environment: dict) -> list[str]:
    """What to send back, line by line."""
    packages, git = environment.get("packages", {}), environment.get("git", {})
    gpus = ", ".join(environment.get("gpus", [])) or "no GPU"
    versions = ", ".join(f"{name} {packages[name]}" for name in ("torch", "triton") if name in packages)
    changed = f", {git['changed']} files changed" if git.get("changed") else ""
    lines = [
        f"selfcheck speedrun, {environment.get('time', '')}: {gpus}, driver "
        f"{environment.get('driver', 'none')}, {versions}, commit {str(git.get('commit', 'unknown'))[:12]}{changed}"
    ]
    for step, (low, high) in BAND.items():
        where = "within" if inside(step, found[step]) else "OUTSIDE"
        lines.append(
            f"step {step}: val loss {found[step]:.4f}, {where} {low:.4f} to {high:.4f} of public runs"
        )
    training = [event for event in events if event.get("event") == "train"]
    last = training[-1]
    lines.append(
        f"{last['step'] + 1} steps, {last['tokens'] / 1e6:,.1f} M tokens in {last['train_ms'] / 1e3:.1f} s, "
        f"{last['tokens_per_s']:,} tokens/s at the end, {last['memory_gib'] or 0:.1f} GiB"
    )
    good = all(inside(step, found[step]) for step in BAND)
    lines.append(
        "as it should be" if good else "NOT as it should be: engaging doctor, then ask with this block"
    )
    return lines
