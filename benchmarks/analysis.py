"""How long `engaging analyze` takes over 10,000 runs of 1,500 points, and how much memory.

    python benchmarks/analysis.py                       # 10 experiments of 1,000 runs, then 10,000 run directories
    python benchmarks/analysis.py --runs=1000 --kind=runs

Writes the runs to a temporary folder first (about 2 GB an experiment shelf, 3 GB the run directories; --folder says
where), then runs the command as a user does and watches it: wall time, and the memory of it and its helpers together
(proportional set size, sampled every 50 ms). The data comes from the page cache, as it does after a study.
"""

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PATTERNS = 40  # different curves; the runs take turns
TARGET_S, TARGET_GIB = 20.0, 1.0


def points(number: int, count: int) -> list[tuple[int, float, float]]:
    """(step, loss, ms so far) of one of the curves."""
    noise = random.Random(number)
    clock, found = 0.0, []
    for step in range(count):
        clock += 120 + noise.random()
        found.append((step, 3.2 + 7 / (1 + step / 20) + noise.gauss(0, 0.03), clock))
    return found


def experiment_lines(number: int, count: int) -> bytes:
    """metrics.jsonl of one run; its run_id is @@."""
    lines = []
    for step, loss, clock in points(number, count):
        kind = "val_loss" if step % 50 == 49 else "train_loss"
        row = {
            "step": step,
            kind: loss,
            "train_time_ms": round(clock, 1),
            "step_avg_ms": round(clock / (step + 1), 3),
        }
        lines.append('{"run_id": @@, ' + json.dumps(row)[1:])
    return ("\n".join(lines) + "\n").encode()


def run_lines(number: int, count: int) -> bytes:
    """metrics.jsonl of a run directory, with all the fields that the trainer writes."""
    rows: list[dict] = [{"event": "start", "step": 0, "world_size": 8, "attempt": 1}]
    curve = points(number, count)
    for step, loss, _ in curve:
        if step % 50 == 49:
            rows.append(
                {"event": "val", "step": step, "val_loss": loss, "tokens": step * 524288, "attempt": 1}
            )
            continue
        rows.append({"event": "train", "step": step, "loss": loss, "lr": 0.0006 / (1 + step), "grad_norm": loss / 3,
                     "ms": 120.123, "tokens_per_s": 4364500, "mfu": 0.3123, "memory_gib": 31.4,
                     "tokens": (step + 1) * 524288, "attempt": 1})  # fmt: skip
    end = {"event": "end", "step": count, "status": "finished", "val_loss": curve[-1][1]}
    rows.append({**end, "seconds": curve[-1][2] / 1000})
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def write_experiments(folder: Path, runs: int, count: int) -> None:
    """Ten experiments with a tenth of the runs each."""
    texts = [experiment_lines(number, count) for number in range(PATTERNS)]
    each = max(1, runs // 10)
    for number in range(10):
        name = "study_baseline" if number == 0 else f"study_variant_{number}"
        here = folder / f"{name}_20261121_060000"
        here.mkdir(parents=True)
        config = {
            "experiment_name": name,
            "script": "train.py",
            "modification_type": "none" if number == 0 else "x",
        }
        (here / "config.json").write_text(json.dumps(config))
        (here / "summary.json").write_text(json.dumps({"gpu_info": {"name": "NVIDIA H100", "count": 8}}))
        with (here / "metrics.jsonl").open("wb") as metrics, (here / "results.jsonl").open("w") as results:
            for run_id in range(each):
                metrics.write(texts[run_id % PATTERNS].replace(b"@@", b"%d" % run_id))
                loss = 3.27 + 1e-5 * (run_id * 7 % 997) + number / 1e3
                row = {"run_id": run_id, "seed": run_id, "final_val_loss": loss,
                       "time_seconds": 180.0 + run_id % 7, "final_step": count, "success": True}  # fmt: skip
                results.write(json.dumps(row) + "\n")


def write_runs(folder: Path, runs: int, count: int) -> None:
    """Run directories of ten variants."""
    texts = [run_lines(number, count) for number in range(PATTERNS)]
    environment = {
        "attempts": [{"time": "2026-11-21T06:00:00+00:00", "host": "n1", "gpus": ["NVIDIA H100"] * 8}]
    }
    for number in range(runs):
        here = folder / f"v{number % 10}-seed{number // 10}"
        here.mkdir(parents=True)
        config = {
            "config": {"seed": number // 10, "learning_rate": number % 10},
            "source_sha256": "ab",
            "data": "cd",
        }
        (here / "config.json").write_text(json.dumps(config))
        (here / "environment.json").write_text(json.dumps(environment))
        (here / "metrics.jsonl").write_bytes(texts[number % PATTERNS])


def memory(pid: int) -> int:
    """Bytes of a process and its descendants, shared pages counted once."""
    total = 0
    for entry in [pid, *_descendants(pid)]:
        try:
            text = Path(f"/proc/{entry}/smaps_rollup").read_text()
        except OSError:
            continue
        total += sum(int(line.split()[1]) for line in text.splitlines() if line.startswith("Pss:")) << 10
    return total


def _descendants(pid: int) -> list[int]:
    try:
        children = [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []
    return children + [one for child in children for one in _descendants(child)]


def measure(folder: Path, plots: bool) -> tuple[float, float]:
    """(seconds, GiB) of `engaging analyze` over the folder."""
    words = [sys.executable, "-m", "tools", "analyze", str(folder), "--json"]
    words += [f"--out={folder / 'pictures'}"] if plots else ["--no-plots"]
    start, peak = time.perf_counter(), 0
    child = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.DEVNULL)
    ended: list[float] = []
    watcher = threading.Thread(target=lambda: ended.append((child.wait(), time.perf_counter())[1]))
    watcher.start()
    while not ended:
        peak = max(peak, memory(child.pid))
        watcher.join(0.05)
    if child.returncode:
        raise SystemExit(f"engaging analyze ended with status {child.returncode}")
    return ended[0] - start, peak / 2**30


def main() -> None:
    """Write, measure, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=10_000)
    parser.add_argument("--points", type=int, default=1_500)
    parser.add_argument("--kind", choices=("experiments", "runs", "both"), default="both")
    parser.add_argument(
        "--folder", type=Path, help="where the runs are written (default: a temporary folder)"
    )
    args = parser.parse_args()
    writers = {"experiments": write_experiments, "runs": write_runs}
    for kind in writers if args.kind == "both" else [args.kind]:
        folder = Path(tempfile.mkdtemp(prefix="analysis-", dir=args.folder))
        try:
            writers[kind](folder, args.runs, args.points)
            size = sum(path.stat().st_size for path in folder.rglob("metrics.jsonl")) / 2**30
            seconds, gib = measure(folder, plots=True)
            verdict = "within" if seconds < TARGET_S and gib < TARGET_GIB else "NOT within"
            cpus = len(os.sched_getaffinity(0))
            print(
                f"{kind}: {args.runs:,} runs x {args.points:,} points, {size:.2f} GiB, {cpus} CPUs: "
                f"{seconds:.1f} s, {gib:.2f} GiB with plots ({verdict} {TARGET_S:g} s and {TARGET_GIB:g} GiB)",
                flush=True,
            )
        finally:
            shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
