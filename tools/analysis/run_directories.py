"""One run directory: its result, its settings, what it ran on. What is damaged is refused, never skipped."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nanogpt.common.errors import UserError
from tools.analysis import curves, strict
from tools.analysis.records import Hardware, Run, hardware_of
from tools.runs import printable

OUTCOME = ".outcome.json"  # of the experiments' runner, in the run directory: {"gpus": [names], ...}
# Settings in which runs of one variant may differ.
INCIDENTAL = {
    *(
        "seed",
        "out_dir",
        "data_root",
        "auto_resume",
        "overwrite",
        "accept_changed",
        "new_source",
        "check",
        "init_from",
        "plan",
    ),
    *("save_interval", "save_minutes", "keep_checkpoints", "log_interval", "num_threads"),
    *("wandb_log", "wandb_project", "wandb_run_name"),
}


def read_runs(folders: Sequence[Path], with_curves: bool) -> list[Run]:
    """`read_run` of each, in their order."""
    return [read_run(folder, with_curves) for folder in folders]


def read_run(folder: Path, with_curves: bool = True) -> Run:
    """A run directory. UserError for a damaged file; a run that has not ended well carries its reason."""
    run = Run(printable(folder.absolute().name), folder)
    cpu, config = device_of(folder)
    where = str(folder / "config.json")
    settings = strict.section(config, "config", where)
    run.seed = strict.whole(settings, "seed", where, low=None)
    data = config.get("data")  # a digest, or an object that holds some
    run.data = "" if data is None else data if isinstance(data, str) else json.dumps(data, sort_keys=True)
    kept = {key: value for key, value in settings.items() if key not in INCIDENTAL}
    run.variant = json.dumps([kept, config.get("source_sha256"), config.get("entry")], sort_keys=True)
    target = strict.number(settings, "target_val_loss", where) or strict.number(
        settings, "target_loss", where
    )
    run.target = target or None
    read_environment(run, cpu)
    path = folder / "metrics.jsonl"
    if not path.is_file():
        run.reason = "it has not logged anything"
        return run
    metrics = curves.read_run(path)
    _judge(run, metrics)
    if with_curves:
        metrics.events = []
        run.metrics = metrics
    return run


def _judge(run: Run, metrics: curves.Metrics) -> None:
    """Fill in the run's result from its log, or the reason why it has none."""
    last = next((e for e in reversed(metrics.events) if e["event"] in ("start", "resume", "end")), {})
    if len(metrics.val):
        run.val_loss, run.step = float(metrics.val.loss[-1]), int(metrics.val.step[-1])
    if len(metrics.train):
        run.train_loss = float(metrics.train.loss[-1])
        clock = float(metrics.train.clock[-1])
        run.seconds = clock / 1000 if clock == clock else None
    if last.get("event") != "end":
        tail = "; its last line is half-written" if metrics.cut_off else ""
        run.reason = f"it has not ended: it still runs, or was cut off{tail}"
        return
    run.step = last.get("step") if isinstance(last.get("step"), int) else run.step
    run.target = run.target or strict.number(last, "target", f"{run.path / 'metrics.jsonl'}: end")
    if last.get("eligible") is False:
        against = last.get("ineligible")
        reasons = "; ".join(map(str, against)) if isinstance(against, list) else ""
        run.remark = printable(f"not eligible for a record: {reasons or 'the trainer does not say why'}")[
            :300
        ]
    if last.get("train_ms") is not None:
        run.seconds = float(last["train_ms"]) / 1000
    elif last.get("seconds") is not None:
        run.seconds = float(last["seconds"])
    if metrics.cut_off:
        raise UserError(
            f"{run.path / 'metrics.jsonl'}: the run has ended, but the last line is cut off; remove it"
        )
    status = last.get("status", "finished")
    if status != "finished":
        run.reason = f"it ended as {printable(str(status))[:40]!r}, not finished"
    elif last.get("val_loss") is not None:
        run.val_loss = float(last["val_loss"])
    if not run.reason and run.val_loss is None:
        run.reason = "no finite validation loss"


def read_environment(run: Run, cpu: bool) -> None:
    """Fill in when and on what the run was made, from environment.json and what the runner noted beside it."""
    path = run.path / "environment.json"
    found = []
    if path.is_file():
        attempts = strict.read_object(path).get("attempts")
        if (
            not isinstance(attempts, list)
            or not all(isinstance(one, dict) for one in attempts)
            or not attempts
        ):
            raise UserError(f"{path}: attempts: {strict.shown(attempts)}: expected a list of objects")
        found = [hardware_of(one, str(path), cpu) for one in attempts]
        run.started = strict.text(attempts[0], "time", str(path))
        run.hardware = found[0]
    kinds = {(one.gpu, one.count) for one in found}
    if len(kinds) > 1:  # resumed on other hardware: its time is nobody's
        run.hardware = Hardware(" and ".join(sorted(one.words() for one in set(found))), 0, found[0].host)
    note = run.path / OUTCOME
    if not run.hardware.gpu and note.is_file():
        noted = hardware_of(strict.read_object(note), str(note))
        run.hardware = dataclasses.replace(run.hardware, gpu=noted.gpu, count=noted.count)


def device_of(folder: Path) -> tuple[bool, dict[str, Any]]:
    """(it ran on the CPU, the whole config.json) of a run directory; {} when it has none."""
    if not (folder / "config.json").is_file():
        return False, {}
    config = strict.read_object(folder / "config.json")
    return strict.section(config, "config", str(folder / "config.json")).get("device") == "cpu", config
