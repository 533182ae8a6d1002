"""Run directories as an honest trainer leaves them, made up in milliseconds; and logs as modded-nanogpt prints them.

`Made` holds everything that one run writes, before it is written. A forger's test changes a field and writes it: the
source's digests, the log's head and config.json are computed at the end, as a careful forger would do.
"""

import copy
import datetime
import json
import math
import random
from dataclasses import dataclass, field
from pathlib import Path

from nanogpt.common import source
from nanogpt.common.manifest import digest_of
from tools.leaderboard.tracks import FINEWEB_TRAIN_1, FINEWEB_VAL, SPEEDRUN_VAL_TOKENS

SHARD = 100_000_000
SOURCE = {
    "modded_nanogpt/__init__.py": b"",
    "modded_nanogpt/train_gpt.py": b'"""The trainer."""\nimport torch\n',
    "modded_nanogpt/train_gpt_simple.py": b'"""The small one."""\nimport torch\n',
    "modded_nanogpt/train_gpt_medium.py": b'"""The larger one."""\nimport torch\n',
    "modded_nanogpt/model.py": b"WIDTH = 768\n",
    "nanogpt/common/shards.py": b"MAGIC = 20240520\n",
}
H100 = "NVIDIA H100 80GB HBM3"


def entry(name: str, sha256: str, tokens: int = SHARD) -> dict:
    """A file of a data set's manifest."""
    return {
        "name": name, "split": "val" if "_val_" in name else "train", "tokens": tokens,
        "bytes": 1024 + 2 * tokens, "sha256": sha256,
    }  # fmt: skip


def fineweb(shards: int = 2) -> dict:
    """The manifest of FineWeb's first shards."""
    files = [entry("fineweb_val_000000.bin", FINEWEB_VAL), entry("fineweb_train_000001.bin", FINEWEB_TRAIN_1)]
    files += [entry(f"fineweb_train_{number:06d}.bin", f"{number:064x}") for number in range(2, shards + 1)]
    return {"name": "fineweb10B", "tokenizer": "gpt2", "vocab_size": 50257, "eot": 50256, "files": files}


def fingerprint(manifest: dict) -> str:
    """What a run on this data writes into config.json, as `TokenSet.fingerprint` computes it."""
    by_name = sorted(manifest["files"], key=lambda one: one["name"])
    rows = [
        [one[key] for key in ("name", "split", "tokens", "bytes", "sha256")]
        for split in ("train", "val") for one in by_name if one["split"] == split
    ]  # fmt: skip
    return digest_of([manifest["tokenizer"], manifest["vocab_size"], manifest["eot"], digest_of(rows)])


@dataclass
class Made:
    """One run before it is written."""

    source: dict[str, bytes]
    config: dict  # config.json, without source_sha256
    environment: list[dict]
    events: list[dict]
    manifest: dict
    printed: list[str] | None = None  # None: what the trainer would print of these events
    log_config: dict | None = None  # None: the same as config.json
    log_environment: dict | None = None
    notes: dict = field(default_factory=dict)

    def of(self, kind: str) -> list[dict]:
        """The events of one kind."""
        return [event for event in self.events if event["event"] == kind]

    @property
    def end(self) -> dict:
        """The end line."""
        return self.of("end")[-1]

    def set_final(self, loss: float) -> None:
        """Another final loss, everywhere."""
        self.of("val")[-1]["val_loss"] = self.end["val_loss"] = loss
        self.end["target_met"] = loss <= self.end["target"]

    def scale_time(self, factor: float) -> None:
        """Another speed, everywhere: ms, clock, tokens a second."""
        for event in self.events:
            for name in ("ms", "train_ms"):
                if name in event:
                    event[name] *= factor
            if event.get("tokens_per_s"):
                event["tokens_per_s"] /= factor

    def printed_lines(self) -> list[str]:
        """The speedrun's lines."""
        total = self.end["step"] if self.of("end") else 0
        lines = [f"fineweb10B: {self.notes.get('val_tokens', SPEEDRUN_VAL_TOKENS):,} validation tokens"]
        lines.append("635.9 M parameters, bfloat16; FP8: head, up, down; torch 2.13.0; compiled: true")
        for event in self.events:
            if event["event"] == "train":
                lines.append(
                    f"step {event['step'] + 1}/{total}: loss {event['loss']:.4f}, "
                    f"{event.get('train_ms', 0) / 1e3:.2f} s, {event['ms']:.1f} ms, "
                    "4,000,000 tokens/s, MFU 40.1 %, ETA 0:00:10"
                )
            if event["event"] == "val":
                lines.append(f"step {event['step']}/{total}: val loss {event['val_loss']:.4f}, 1.00 s")
        return lines

    def write(self, folder: Path, data_root: Path | None = None) -> Path:
        """Write the run directory, and its data set's manifest under `data_root`."""
        folder.mkdir(parents=True)
        record = {
            **self.config,
            "source_sha256": self.config.get("source_sha256") or source.digest(self.source),
        }
        printed = self.printed_lines() if self.printed is None else self.printed
        head = [
            "config " + json.dumps(self.log_config or record),
            "environment " + json.dumps(self.log_environment or self.environment[0]),
        ]
        (folder / "log.txt").write_bytes(
            source.to_log(self.source) + "\n".join([*head, *printed, ""]).encode("utf-8")
        )
        (folder / "config.json").write_text(json.dumps(record, indent=1))
        (folder / "environment.json").write_text(json.dumps({"attempts": self.environment}))
        (folder / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in self.events))
        if data_root is not None:
            place = data_root / str(self.config["config"].get("dataset", "x"))
            place.mkdir(parents=True, exist_ok=True)
            (place / "manifest.json").write_text(json.dumps(self.manifest))
        return folder


def made(
    seed: int = 1, *, steps: int = 60, final: float | None = None, ms: float = 80.0, gpu: str = H100,
    world_size: int = 8, track: str = "track1", start_day: int = 1, change: str = "one", batch: int = 393_216,
    target: float = 3.28, shards: int = 2,
) -> Made:  # fmt: skip
    """An honest speedrun: `final` loss (default: near 3.2775), `ms` a step, started `seed` hours into `start_day`."""
    noise = random.Random(f"{seed} {track} {change} {gpu} {world_size} {steps}")
    final = target - 0.004 + noise.uniform(-0.0007, 0.0007) if final is None else final
    trainer = {"track1": "train_gpt.py", "steps": "train_gpt_simple.py", "medium": "train_gpt_medium.py"}[
        track
    ]
    code = {**SOURCE, "modded_nanogpt/model.py": f"WIDTH = 768\nCHANGE = {change!r}\n".encode()}
    manifest = fineweb(shards)
    config = {
        "config": {
            "out_dir": f"out/run-{seed}", "data_root": "/scratch/data", "dataset": "fineweb10B", "seed": seed,
            "init_from": "scratch", "steps": 0, "log_interval": 1, "eval_interval": 20, "muon_lr": 0.023,
            **({"recipe": {"track1": "record"}.get(track, track)} if track != "steps" else {}),
        },
        "plan": {"world_size": world_size, "total_steps": steps},
        "data": fingerprint(manifest), "entry": f"modded_nanogpt/{trainer}", "run_id": f"{noise.getrandbits(64):016x}",
    }  # fmt: skip
    started = datetime.datetime(2026, 11, start_day, 0, tzinfo=datetime.timezone.utc) + datetime.timedelta(
        hours=seed % 20
    )
    environment = {
        "time": started.isoformat(), "host": "node1234", "python": "3.12.3", "packages": {"torch": "2.13.0"},
        "git": {"commit": "0" * 40, "changed": 0}, "argv": ["record", f"--seed={seed}"], "world_size": world_size,
        "gpus": [gpu] * world_size, "slurm": {"SLURM_JOB_ID": str(1000 + seed)},
    }  # fmt: skip
    events: list[dict] = [{"event": "start", "step": 0, "world_size": world_size, "attempt": 1}]
    clock, start = 0.0, math.log(50304)
    for step in range(steps + 1):
        share = 1 - math.exp(-4 * step / steps) if step < steps else 1.0
        curve = start + (final - start) * share
        if step % 20 == 0 or step == steps:
            clock += 150.0 if step else 0.0  # what the GPU had still to do
            loss = curve + noise.gauss(0, 0.01) if step < steps else final
            events.append({
                "event": "val", "step": step, "val_loss": loss, "tokens": step * batch, "train_ms": round(clock, 3),
                "attempt": 1,
            })  # fmt: skip
        if step < steps:
            took = round(ms * noise.uniform(0.98, 1.03), 3)
            clock += took
            events.append({
                "event": "train", "step": step, "loss": curve + noise.gauss(0, 0.02), "ms": took,
                "tokens": (step + 1) * batch, "train_ms": round(clock, 3), "attempt": 1,
            })  # fmt: skip
    events.append({
        "event": "end", "step": steps, "status": "finished", "val_loss": final, "train_ms": round(clock, 3),
        "target": target, "target_met": final <= target, "eligible": True, "ineligible": [],
        "val_tokens": SPEEDRUN_VAL_TOKENS, "world_size": world_size, "attempt": 1,
    })  # fmt: skip
    return Made(code, config, [environment], events, manifest)


def seeds(count: int = 4, **options) -> list[Made]:
    """Honest runs of one recipe."""
    return [made(seed, **options) for seed in range(1, count + 1)]


def write_all(runs: list[Made], folder: Path) -> tuple[list[Path], Path]:
    """(run directories, data root)."""
    return [run.write(folder / f"run-{n}", folder / "data") for n, run in enumerate(runs, 1)], folder / "data"


def clone(run: Made) -> Made:
    """A copy to forge."""
    return copy.deepcopy(run)


GPU_LINE = "|   {index}  {gpu:<27} On  |   00000000:1{index}:00.0 Off |                    0 |"


def modded_log(
    seed: int = 1, *, steps: int = 50, final: float | None = None, ms: float = 400.0, gpus: int = 8, gpu: str = H100,
    year: int = 2026,
) -> str:  # fmt: skip
    """A log as modded-nanogpt's trainers print it; `year` 2024: clock restarted after ten steps, training losses."""
    noise = random.Random(f"modded {seed} {year} {steps}")
    final = noise.gauss(3.2775, 0.0008) if final is None else final
    code = (
        "import os\nimport torch\n"
        + "".join(f"x{n} = {n}\n" for n in range(300))
        + "    val_tokens: int = 10485760\n"
    )
    code += "print(f'step:{step}/{total} val_loss:{loss}')\n" + "# " + "=" * 99 + "\n"
    rule = "=" * 100
    old = year == 2024
    head = [
        "Running Python 3.12.7",
        "Running PyTorch 2.10.0+cu128 compiled for CUDA 12.8",
        f"Sun May  3 21:52:{seed % 60:02} {year}",
    ]
    head += [GPU_LINE.format(index=index, gpu=gpu) for index in range(gpus)]
    lines, clock = [], 0.0
    for step in range(steps + 1):
        curve = 10.826 + (final - 10.826) * (1 - math.exp(-4 * step / steps) if step < steps else 1.0)
        counted = step - 10 if old else step
        if step % 25 == 0 or step == steps:
            average = "nan" if counted <= 0 else f"{clock / counted:.2f}"
            lines.append(
                f"step:{step}/{steps} val_loss:{curve:.4f} train_time:{clock:.0f}ms step_avg:{average}ms"
            )
        if step < steps:
            if old and step == 10:
                clock = 0.0
            clock += ms * noise.uniform(0.98, 1.02)
            counted = step + 1 - 10 if old else step + 1
            average = "nan" if counted <= 1 and old else f"{clock / counted:.2f}"
            loss = f" train_loss:{curve + noise.gauss(0, 0.02):.4f}" if old else ""
            lines.append(f"step:{step + 1}/{steps}{loss} train_time:{clock:.0f}ms step_avg:{average}ms")
    return "\n".join(
        [code + rule, *head, rule, *lines, "peak memory allocated: 30724 MiB reserved: 46472 MiB", ""]
    )


def track3_log(seed: int = 1, *, steps: int = 3148, final: float = 3.27888) -> str:
    """A log of modded-nanogpt's track 3: five decimals, seconds, validations only."""
    noise = random.Random(seed)
    code = "import torch\n" + "".join(f"y{n} = {n}\n" for n in range(300))
    head = [
        "Running PyTorch 2.11.0+cu130 compiled for CUDA 13.0",
        "Running on device_name=NVIDIA H200 with world_size=8",
        f"Using seed={seed}",
    ]
    lines = []
    for step in [*range(125, steps, 125), steps]:
        time, share = 105.0 + 0.1634 * step, 1 - math.exp(-4 * step / steps) if step < steps else 1.0
        loss = 10.8 + (final - 10.8) * share + (noise.gauss(0, 0.001) if step < steps else 0)
        lines.append(
            f"step:{step}/{steps} val_loss:{loss:.5f} train_time:{time:.3f}s step_avg:{1000 * time / step:.2f}ms"
        )
    return "\n".join([code, "=" * 100, *head, "=" * 100, *lines, ""])
