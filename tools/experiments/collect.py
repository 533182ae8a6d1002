"""From run directories to results.jsonl, metrics.jsonl and summary.json.

What counts, by rule. A run is `finished` when its trainer said so and left a finite validation loss. It is `failed`
when the trainer ended by its own doing without that: a loss that is not finite (status 70), a crash after its first
loss. A failed run is a result: it is counted, shown with its reason and left out of the means, and `resume` does not
repeat it, because repeating until it works is choosing. Everything else (interrupted, killed, out of time, a node
lost, refused input, a full disk) is `unfinished`, and `resume` goes on with it.
"""

import json
import math
import re
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from nanogpt.common.errors import EXIT_FENCED, EXIT_INTERRUPTED, EXIT_NONFINITE, EXIT_STORAGE, EXIT_USAGE
from nanogpt.common.storage import atomic_write_json
from tools.experiments import records
from tools.experiments.records import Experiment
from tools.runs import Run, metrics, read_run, tail

OUTCOME = ".outcome.json"  # in the run directory: how the trainer's last attempt ended, written by the runner
NOT_ITS_FAULT = {EXIT_USAGE, EXIT_STORAGE, EXIT_INTERRUPTED, EXIT_FENCED, 126, 127, 129, 130, 137, 138, 143}
OLD_LINE = re.compile(
    r"step:(\d+)/(\d+)\s+(train_loss|val_loss):([\d.naif]+)\s+train_time:(\d+)ms\s+step_avg:([\d.naif]+)ms"
)
RULE = "runs that failed by their own doing are counted and listed, and take no part in the means"


@dataclass(frozen=True)
class Verdict:
    """One run as it is now. `state`: new, unfinished, finished, failed or skipped (its stage was not reached)."""

    run_id: int
    seed: int
    state: str
    note: str = ""
    step: int | None = None
    val_loss: float | None = None


def verdicts(experiment: Experiment) -> list[Verdict]:
    """All runs of an experiment as they are now, in order; writes nothing."""
    done = records.results(experiment)
    return [
        _from_row(experiment, run_id, done[run_id]) if run_id in done else _look(experiment, run_id)[0]
        for run_id, _ in experiment.runs
    ]


def collect(experiment: Experiment) -> list[Verdict]:
    """Append what has ended since; rewrite summary.json when something has.

    The verdicts come from the same look at the runs: what is called finished here has its line in results.jsonl.
    """
    new, found = False, []
    with records.lock(experiment.folder):
        done = records.results(experiment)
        for run_id, _ in experiment.runs:
            if run_id in done:
                found.append(_from_row(experiment, run_id, done[run_id]))
                continue
            verdict, row = _look(experiment, run_id)
            found.append(verdict)
            if row is not None:
                _append_metrics(experiment, run_id)
                records.append_lines(experiment.folder / "results.jsonl", [row])
                done[run_id] = row
                new = True
        if new or (done and not (experiment.folder / "summary.json").is_file()):
            atomic_write_json(experiment.folder / "summary.json", summary(experiment, done))
    return found


def _look(experiment: Experiment, run_id: int) -> tuple[Verdict, dict | None]:
    """A run that has no line in results.jsonl yet: its verdict, and the line if it has ended meanwhile."""
    seed, folder = dict(experiment.runs)[run_id], experiment.run_folder(run_id)
    outcome, run = read_outcome(folder), read_run(folder)
    row = _result(experiment, run_id, run, outcome)
    if row is not None:
        return _from_row(experiment, run_id, row), row
    if outcome.get("skipped"):
        return Verdict(run_id, seed, "skipped", str(outcome["skipped"])), None
    if run.status == "empty" and "exit" not in outcome:  # of one process, whose later runs were never begun
        return Verdict(run_id, seed, "new"), None
    why = _why_unfinished(folder, run, outcome)
    return Verdict(run_id, seed, "unfinished", why, run.step, run.val_loss), None


def _from_row(experiment: Experiment, run_id: int, row: dict) -> Verdict:
    return Verdict(
        run_id,
        dict(experiment.runs)[run_id],
        "finished" if row.get("success") is True else "failed",
        str(row.get("reason") or ""),
        row.get("final_step"),
        row.get("final_val_loss"),
    )


def forget_failure(experiment: Experiment, run_id: int) -> None:
    """`resume --retry-failed`: the run is started anew; its folder and its old line stay, the new line counts."""
    folder = experiment.run_folder(run_id)
    number = 1
    while (aside := folder.with_name(f"{folder.name}.failed_{number}")).exists():
        number += 1
    if folder.exists():
        folder.rename(aside)
    row = {"run_id": run_id, "retried": True}
    with records.lock(experiment.folder):
        records.append_lines(experiment.folder / "retries.jsonl", [row])
    experiment.log(f"run {run_id}: failed, and is run again because --retry-failed asked for it")


def write_outcome(folder: Path, **values: object) -> None:
    """Note how the trainer ended, beside its run."""
    folder.mkdir(parents=True, exist_ok=True)
    atomic_write_json(folder / OUTCOME, {**values, "time": datetime.now().isoformat(timespec="seconds")})


def read_outcome(folder: Path) -> dict:
    """What `write_outcome` wrote, {} without."""
    try:
        value = json.loads((folder / OUTCOME).read_bytes())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


# ---- one run -------------------------------------------------------------------------------------------------------


def _result(experiment: Experiment, run_id: int, run: Run, outcome: dict) -> dict | None:
    """The line of results.jsonl, None while the run has not ended."""
    if not experiment.trainer.run_directory:
        return _old_result(experiment, run_id, outcome)
    end = next((e for e in reversed(run.events) if e.get("event") == "end"), {})
    status, exit_status = run.status, outcome.get("exit")
    loss = _finite(end.get("val_loss")) if _finite(end.get("val_loss")) is not None else run.val_loss
    reason = ""
    if status == "finished":
        reason = "" if loss is not None else "it finished without a finite validation loss"
    elif status in ("failed", "nonfinite") or exit_status == EXIT_NONFINITE:
        reason = f"the loss or a gradient was not finite at step {run.step}"
    elif (
        isinstance(exit_status, int) and exit_status > 0 and exit_status not in NOT_ITS_FAULT and _began(run)
    ):
        said = _last_words(experiment.run_folder(run_id))
        reason = f"the trainer broke (status {exit_status}){': ' + said if said else ''}"
    else:
        return None
    seconds = next(
        (_finite(end[k]) / s for k, s in (("train_ms", 1000), ("seconds", 1)) if _finite(end.get(k))), None
    )
    if seconds is None:
        rows = metric_rows(experiment.run_folder(run_id), run_id)
        seconds = rows[-1]["train_time_ms"] / 1000 if rows else 0.0
    return _row(experiment, run_id, None if reason else loss, run.loss, seconds, run.step, reason)


def _began(run: Run) -> bool:
    """Whether there is a loss at all: what broke before the first one says nothing about the variant."""
    return bool(run.train or run.val)


def _row(
    experiment: Experiment,
    run_id: int,
    val: float | None,
    train: float | None,
    seconds: float,
    step: int | None,
    reason: str,
) -> dict:
    row = {
        "run_id": run_id,
        "seed": dict(experiment.runs)[run_id],
        "final_val_loss": val,
        "final_train_loss": train,
        "time_seconds": round(seconds, 3),
        "final_step": step,
        "success": not reason,
    }
    return {**row, "reason": reason} if reason else row


def _old_result(experiment: Experiment, run_id: int, outcome: dict) -> dict | None:
    """Of a script that only prints: the last losses in stdout.log, once it has ended."""
    exit_status = outcome.get("exit")
    if not isinstance(exit_status, int) or exit_status < 0 or exit_status in NOT_ITS_FAULT:
        return None
    rows = old_rows(experiment.run_folder(run_id), run_id)
    val = next((row["val_loss"] for row in reversed(rows) if "val_loss" in row), None)
    train = next((row["train_loss"] for row in reversed(rows) if "train_loss" in row), None)
    reason = f"the script ended with status {exit_status}" if exit_status else ""
    if not reason and val is None:
        reason = "no validation loss in stdout.log (expected lines such as step:125/5100 val_loss:5.2340 ...)"
    seconds = rows[-1]["train_time_ms"] / 1000 if rows else 0.0
    step = rows[-1]["step"] if rows else None
    return _row(experiment, run_id, None if reason else val, train, seconds, step, reason)


def old_rows(folder: Path, run_id: int) -> list[dict]:
    """The lines of metrics.jsonl in the output of a script that only prints them."""
    rows = []
    try:
        with (folder / "stdout.log").open(encoding="utf-8", errors="replace") as file:
            for match in filter(None, (OLD_LINE.search(line[:4096]) for line in file)):
                loss, average = _finite(_number(match[4])), _finite(_number(match[6]))
                if loss is not None:
                    rows.append(_metric(run_id, int(match[1]), match[3], loss, int(match[5]), average))
    except OSError:
        return []
    return rows


def metric_rows(folder: Path, run_id: int) -> list[dict]:
    """A run's lines for metrics.jsonl: {"run_id", "step", "train_loss" or "val_loss", "train_time_ms", "step_avg_ms"}.

    `step` counts the optimizer steps before the loss was known, so the first training loss stands at step 1.
    """
    last: dict[tuple[int, str], dict] = {}
    for record in metrics(folder / "metrics.jsonl"):
        kind, step = record.get("event"), record.get("step")
        if kind in ("train", "val") and isinstance(step, int) and not isinstance(step, bool) and step >= 0:
            last[step + (kind == "train"), "train_loss" if kind == "train" else "val_loss"] = record
    rows, clock, before = [], 0.0, 0
    for step, name in sorted(last):
        record = last[step, name]
        loss = _finite(record.get("loss" if name == "train_loss" else "val_loss"))
        told, ms = _finite(record.get("train_ms")), _finite(record.get("ms"))
        if told is not None:
            clock = told
        elif name == "train_loss" and ms is not None:
            clock += ms * (step - before)  # where only every tenth step is logged, it stands for ten
        if name == "train_loss":
            before = step
        if loss is not None:
            rows.append(_metric(run_id, step, name, loss, clock))
    return rows


def _metric(
    run_id: int, step: int, name: str, loss: float, clock: float, average: float | None = None
) -> dict:
    if average is None:
        average = clock / step if step else 0.0
    return {
        "run_id": run_id,
        "step": step,
        name: loss,
        "train_time_ms": round(clock, 3),
        "step_avg_ms": round(average, 3),
    }


def _append_metrics(experiment: Experiment, run_id: int) -> None:
    """The run's lines, once: what a crash left of them before its line in results.jsonl is completed."""
    folder = experiment.run_folder(run_id)
    rows = metric_rows(folder, run_id) if experiment.trainer.run_directory else old_rows(folder, run_id)
    path = experiment.folder / "metrics.jsonl"
    mine = f'"run_id": {run_id},'.encode()
    there = {_key(row) for row in records.read_lines(path, mine) if row.get("run_id") == run_id}
    records.append_lines(path, [row for row in rows if _key(row) not in there])


def _key(row: dict) -> tuple:
    return row.get("step"), "val_loss" in row


def _why_unfinished(folder: Path, run: Run, outcome: dict) -> str:
    step = (
        "" if run.step is None else f" at step {run.step}" + (f" of {run.max_steps}" if run.max_steps else "")
    )
    exit_status = outcome.get("exit")
    if exit_status in (EXIT_USAGE, EXIT_STORAGE):
        return _last_words(folder) or f"the trainer refused to start (status {exit_status})"
    if run.status in ("interrupted", "stopped") or exit_status == EXIT_INTERRUPTED:
        return f"interrupted{step}, a checkpoint was saved"
    if isinstance(exit_status, int) and (exit_status < 0 or exit_status > 128):
        return f"killed{step}"
    if exit_status:
        return (
            f"broke before its first loss (status {exit_status}): {_last_words(folder) or 'see stdout.log'}"
        )
    return f"running or cut off{step}"


def _last_words(folder: Path) -> str:
    """The error line at the end of stdout.log, at most 200 characters."""
    lines = tail(folder / "stdout.log", 40)
    errors = [line for line in lines if re.search(r"(^error:|Error\b)", line)]
    return (errors or [""])[-1].removeprefix("error: ")[:200]


# ---- the summary ---------------------------------------------------------------------------------------------------


def summary(experiment: Experiment, done: dict[int, dict]) -> dict:
    """What summary.json holds."""
    from tools.analysis import statistics

    rows = [done[run_id] for run_id in sorted(done)]
    config = experiment.config
    retries = records.read_lines(experiment.folder / "retries.jsonl")
    return {
        "experiment_name": config.experiment_name,
        "description": config.description,
        "stage": config.stage,
        "variant": config.label,
        "end_time": datetime.now().isoformat(),
        "planned_runs": len(experiment.runs),
        "complete": len(done) == len(experiment.runs),
        "statistics": statistics.summary(rows),
        "excluded_by": RULE,
        "retried_runs": [row.get("run_id") for row in retries],
        "target_val_loss": config.target_val_loss,
        "git_info": records.code_info(experiment),
        "gpu_info": gpu_info(experiment),
    }


def gpu_info(experiment: Experiment) -> dict:
    """{"n_gpus", "gpus", "hosts", "torch"} as the runs, and the runner beside them, wrote them down."""
    found: dict[str, set[str]] = {"gpus": set(), "hosts": set(), "torch": set()}
    for run_id, _ in experiment.runs:
        noted = read_outcome(experiment.run_folder(run_id)).get("gpus")
        found["gpus"] |= set(map(str, noted)) if isinstance(noted, list) else set()
        for attempt in _read_environment(experiment.run_folder(run_id)):
            gpus = attempt.get("gpus") or attempt.get("gpu") or []
            found["gpus"] |= {str(gpu)[:80] for gpu in (gpus if isinstance(gpus, list) else [gpus])}
            packages = attempt.get("packages")
            torch = packages.get("torch") if isinstance(packages, dict) else attempt.get("torch")
            found["torch"] |= {str(torch)} if torch else set()
            found["hosts"] |= {str(attempt["host"])[:80]} if attempt.get("host") else set()
    return {"n_gpus": experiment.gpus, **{key: sorted(values) for key, values in found.items()}}


def _read_environment(folder: Path) -> list[dict]:
    try:
        value = json.loads((folder / "environment.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        return []
    attempts = value.get("attempts", [value]) if isinstance(value, dict) else []
    return [attempt for attempt in attempts if isinstance(attempt, dict)]


def summary_text(experiment: Experiment) -> str:
    """The summary as it is printed at the end; "" before any run has ended."""
    done = records.results(experiment)
    if not done:
        return ""
    found = summary(experiment, done)["statistics"]
    val, lines = found["val_loss"], ["Summary Statistics:"]
    lines.append(f"  Runs: {found['successful_runs']}/{len(experiment.runs)}")
    if val.get("mean") is not None:
        spread = f" ± {val['std']:.3f}" if val.get("std") is not None else " (one run: no spread)"
        lines.append(f"  Mean Validation Loss: {val['mean']:.3f}{spread}")
        if val.get("ci_95"):
            lines.append(f"  95% CI: [{val['ci_95'][0]:.3f}, {val['ci_95'][1]:.3f}]")
        lines.append(f"  Best Validation Loss: {val['min']:.3f}")
    for run_id in sorted(done):
        if done[run_id].get("success") is not True:
            row = done[run_id]
            lines.append(f"  Failed, left out: run {run_id} seed {row.get('seed')}: {row.get('reason')}")
    return "\n".join(lines)


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _finite(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if abs(value) < 1e300 and math.isfinite(value) else None
