"""Experiments that never ran, in the runner's format: curves that fall like real ones, seeds that scatter."""

import json
import math
import random
from pathlib import Path

H100 = {"gpus": ["NVIDIA H100 80GB HBM3"] * 8}


def loss_at(step: int, steps: int, final: float) -> float:
    """A curve from 10.8 down to `final`."""
    share = step / steps
    return final + (10.8 - final) * math.exp(-14 * share) + 0.9 * (1 - share) * math.exp(-3 * share)


def write_experiment(
    shelf: Path,
    name: str,
    losses: list[float],
    *,
    steps: int = 400,
    every: int = 25,
    seconds: float = 420.0,
    stamp: str = "20261121_060000",
    gpu: dict | None = None,
    config: dict | None = None,
    failed: tuple[int, ...] = (),
    seed: int = 42,
    starts: list[int] | None = None,
) -> Path:
    """An experiment folder with these final losses. `starts`: minutes at which the runs began, on one machine."""
    folder = shelf / f"{name}_{stamp}"
    (folder / "runs").mkdir(parents=True)
    noise = random.Random(name)
    results, metrics = [], []
    for run_id, final in enumerate(losses):
        took = seconds * (1 + noise.gauss(0, 0.002))
        for step in range(0, steps + 1, 5):
            clock = round(took * 1000 * step / steps, 1)
            row = {
                "run_id": run_id,
                "step": step,
                "train_time_ms": clock,
                "step_avg_ms": round(took * 1000 / steps, 2),
            }
            value = loss_at(step, steps, final)
            if step % every == 0:
                wobble = noise.gauss(0, 0.004) if step < steps else 0.0
                metrics.append({**row, "val_loss": round(value + wobble, 6)})
            metrics.append({**row, "train_loss": round(value - 0.02 + noise.gauss(0, 0.05), 6)})
        good = run_id not in failed
        results.append(
            {
                "run_id": run_id, "seed": seed + run_id, "final_val_loss": final if good else None,
                "final_train_loss": round(final - 0.02, 4), "time_seconds": round(took, 2), "final_step": steps,
                "success": good, **({} if good else {"reason": "exit status 70: the loss was not finite"}),
            }
        )  # fmt: skip
        if starts:
            run = folder / "runs" / f"run_{run_id}_seed_{seed + run_id}"
            run.mkdir()
            attempt = {
                "time": f"2026-11-21T06:{starts[run_id]:02}:00+00:00",
                "host": "node1",
                **(gpu or H100),
            }
            (run / "environment.json").write_text(json.dumps({"attempts": [attempt]}))
    lines(folder / "results.jsonl", results)
    lines(folder / "metrics.jsonl", metrics)
    said = {"experiment_name": name, "script": "train.py", "n_runs": len(losses), "target_val_loss": 3.28,
            "modification_type": "none" if "baseline" in name else "architecture", **(config or {})}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(said))
    summary = {
        "experiment_name": name,
        "statistics": {},
        "git_info": {},
        "gpu_info": H100 if gpu is None else gpu,
    }
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def lines(path: Path, rows: list[dict]) -> None:
    """A file of JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_run(
    folder: Path, final: float, *, seed: int = 1, steps: int = 100, status: str = "finished", **extra
) -> Path:
    """A run directory as the trainers write it; `extra` goes into its config."""
    folder.mkdir(parents=True)
    config = {"config": {"seed": seed, "out_dir": str(folder), "device": "cpu", **extra}, "source_sha256": "ab" * 32,
              "entry": "nanogpt/train.py", "data": "cd" * 32}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    attempt = {
        "time": f"2026-11-21T06:00:{seed:02}+00:00",
        "host": "node1",
        "packages": {"torch": "2.13.0+cpu"},
    }
    (folder / "environment.json").write_text(json.dumps({"attempts": [attempt]}))
    rows: list[dict] = [{"event": "start", "step": 0, "world_size": 1, "attempt": 1}]
    for step in range(steps):
        value = loss_at(step, steps, final)
        if step % 20 == 0:
            rows.append(
                {"event": "val", "step": step, "val_loss": value, "tokens": step * 1000, "attempt": 1}
            )
        rows.append({"event": "train", "step": step, "loss": value, "ms": 10.0, "lr": 0.001, "mfu": None,
                     "tokens": (step + 1) * 1000, "attempt": 1})  # fmt: skip
    rows.append({"event": "val", "step": steps, "val_loss": final, "tokens": steps * 1000, "attempt": 1})
    if status:
        rows.append(
            {"event": "end", "step": steps, "status": status, "val_loss": final, "seconds": steps / 100}
        )
    lines(folder / "metrics.jsonl", rows)
    return folder


def write_study(shelf: Path, interleaved: bool = False) -> Path:
    """Four variants at one stage: one helps, one hurts, one shows nothing, and the baseline."""
    starts = [list(range(k, 40, 4)) for k in range(4)] if interleaved else [None] * 4
    made = [
        ("nanogpt_baseline_full", [3.2801, 3.2814, 3.2795, 3.2822, 3.2808], 420.0),
        ("nanogpt_palm_parallel_full", [3.2762, 3.2771, 3.2754, 3.2769, 3.2760], 401.0),
        ("nanogpt_curriculum_full", [3.2799, 3.2818, 3.2790, 3.2811, 3.2829], 396.0),
        ("nanogpt_depth_warm_full", [3.2901, 3.2912, 3.2899, 3.2920, 3.2914], 431.0),
    ]
    for (name, losses, seconds), at in zip(made, starts, strict=True):
        write_experiment(shelf, name, losses, seconds=seconds, starts=at, config={"stage": "C_full"},
                         failed=(4,) if "depth" in name else ())  # fmt: skip
    return shelf
