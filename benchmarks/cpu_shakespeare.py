"""The quickstart's training on a CPU beside nanoGPT's documented CPU run: seconds, and the loss they end at.

    python benchmarks/cpu_shakespeare.py
    python benchmarks/cpu_shakespeare.py --nanogpt=/path/of/a/nanoGPT/checkout      # its data prepared

Both train 128 wide on blocks of 64 characters of Shakespeare for 2,000 iterations. nanoGPT's run is the one its README
gives for CPUs: 4 layers, batch 12. Ours is the preset `quickstart`: 2 layers, batch 8. Nothing else should run on the
machine.
"""

import json
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)

from nanogpt.common.errors import CommandError, run_command
from nanogpt.common.flags import knob, parse

NANOGPT_LOSS = 1.886  # where nanoGPT's run ends, as measured with its own 20 random validation batches
NANOGPT_SECONDS = 120.0  # of its run, on the two cores of docs/performance.md
NANOGPT_FLAGS = (
    "--device=cpu --compile=False --eval_iters=20 --log_interval=1 --block_size=64 --batch_size=12 --n_layer=4 "
    "--n_head=4 --n_embd=128 --max_iters=2000 --lr_decay_iters=2000 --dropout=0.0"
)


@dataclass(frozen=True)
class Options:
    """The command line."""

    out_dir: str = knob("out/benchmark-cpu", "where the run goes; an existing one is moved aside")
    data_root: str = knob("", "folder of the data sets; default: $DATA_ROOT, else data/ of the repository")
    dtype: str = knob("bfloat16", "what `make quickstart` takes on CPUs that have it, or float32",
                      choices=("bfloat16", "float32"))  # fmt: skip
    nanogpt: str = knob("", "a nanoGPT checkout to run beside ours")


def timed(command: list[str], folder: Path) -> tuple[float, str]:
    """(seconds, standard output) of a command that must succeed."""
    began = time.perf_counter()
    done = subprocess.run(command, cwd=folder, text=True, capture_output=True)
    if done.returncode:
        raise CommandError(
            f"{' '.join(command[:4])} failed: {(done.stderr.strip().splitlines() or [''])[-1]}"
        )
    return time.perf_counter() - began, done.stdout


def main(argv: list[str]) -> int:
    """Run ours, then theirs where it is there, and print the ratio."""
    options = parse(Options, argv, prog="python benchmarks/cpu_shakespeare.py", description=__doc__)
    flags = [f"--out_dir={options.out_dir}", "--device=cpu", f"--dtype={options.dtype}", "--overwrite=true"]
    flags += [f"--data_root={options.data_root}"] if options.data_root else []
    seconds, _ = timed([sys.executable, "-m", "nanogpt.train", "quickstart", *flags], ROOT)
    events = [
        json.loads(line) for line in (ROOT / options.out_dir / "metrics.jsonl").read_text().splitlines()
    ]
    end = next(event for event in events if event["event"] == "end")
    print(
        f"ours, {options.dtype}: {end['seconds']:.1f} s of training, {seconds:.1f} s in all with start "
        "and validations, "
        f"val loss {end['val_loss']:.4f} over the whole validation text",
        flush=True,
    )
    their_seconds, loss, where = (
        NANOGPT_SECONDS,
        str(NANOGPT_LOSS),
        "as measured once; --nanogpt runs it here",
    )
    if options.nanogpt:
        command = [sys.executable, "train.py", "config/train_shakespeare_char.py", *NANOGPT_FLAGS.split()]
        their_seconds, text = timed(command, Path(options.nanogpt))
        loss, where = ([None, *re.findall(r"val loss ([\d.]+)", text)])[-1] or "unknown", "run here"
    print(f"nanoGPT: {their_seconds:.1f} s in all, val loss {loss} ({where})")
    print(f"ratio: {their_seconds / seconds:.2f}")
    return 0


if __name__ == "__main__":
    run_command(main)
