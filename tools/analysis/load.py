"""Reads experiment folders, run directories, and folders of them. What is damaged is refused, never skipped.

    study = load([Path("experiment_logs")])

experiment_logs/<name>_<timestamp>/ holds results.jsonl, metrics.jsonl, summary.json, config.json and the run
directories runs/run_0_seed_42/; a run directory is described in docs/run-directory.md. Runs that failed, are missing
or still run stay in the list with their reason: they are shown and counted, and enter no mean.
"""

import dataclasses
import glob
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nanogpt.common.errors import UserError
from nanogpt.common.flags import nearest
from tools.analysis import curves, statistics, strict
from tools.analysis.jobs import Jobs, size
from tools.analysis.lines import EXPERIMENT_KEYS
from tools.analysis.records import Group, Hardware, Run, Study, hardware_of
from tools.analysis.run_directories import device_of, read_environment, read_runs
from tools.runs import printable

DEEPEST = 3  # folders below the one that was named
PART = 32 << 20  # bytes of an experiment's metrics.jsonl that one process takes at a time
RUNS_AT_A_TIME = 50
MOST_REMARKS = 5  # of one group's runs
SAME_LOSS = 1e-6  # results.jsonl and metrics.jsonl may differ by a rounding


def load(paths: Sequence[Path], with_curves: bool = True) -> Study:
    """Everything under `paths`, which may hold wildcards.

    UserError names the first file that is damaged, or says that nothing was found.
    """
    experiments, runs = [], []
    for path in _expanded(paths):
        found = _find(path, DEEPEST)
        if not any(found):
            found = _named(path), []
        if not any(found):
            raise UserError(f"{path}: {_nothing(path)}")
        experiments += [one for one in found[0] if one not in experiments]
        runs += [one for one in found[1] if one not in runs]
    jobs = Jobs([one / "metrics.jsonl" for one in [*experiments, *runs]] if with_curves else [])
    with jobs:
        groups = [_experiment(folder, jobs, with_curves) for folder in experiments]
        batches = [
            (runs[at : at + RUNS_AT_A_TIME], with_curves) for at in range(0, len(runs), RUNS_AT_A_TIME)
        ]
        sizes = [sum(size(run / "metrics.jsonl") for run in batch) for batch, _ in batches]
        plain = [run for batch in jobs.map(read_runs, batches, sizes) for run in batch]
    groups += _grouped(plain)
    return Study(_with_own_names(groups))


def _expanded(paths: Sequence[Path]) -> list[Path]:
    """The paths, those with wildcards (quoted, so that the shell left them) as what they match."""
    found = []
    for path in paths:
        matches = [] if path.exists() else sorted(glob.glob(str(path)))  # noqa: PTH207 (Path.glob takes no absolute pattern)
        found += [Path(match) for match in matches] or [path]
    return found


def _named(path: Path) -> list[Path]:
    """The folders of the experiment or the study of this name, as `engaging experiment status` knows it."""
    from tools.experiments import study
    from tools.place import checkout

    if len(path.parts) != 1:
        return []
    try:
        folders = [one.folder for one in study.experiments(checkout(), [path.name])]
    except UserError:
        return []
    here = Path.cwd()
    return [one.relative_to(here) if one.is_relative_to(here) else one for one in folders]


def home(path: Path) -> Path:
    """Where what is made of `path` goes: into the folder itself, for a study's name beside its experiments."""
    folders = [] if any(_find(path, DEEPEST)) else _named(path)
    if not folders:
        return path
    return folders[0] if len(folders) == 1 else folders[0].parent


def _nothing(path: Path) -> str:
    if not path.exists():
        near = [one.name for one in path.parent.iterdir()] if path.parent.is_dir() else []
        return f"does not exist{nearest(path.name, near)}; name an experiment, a study, a run or a folder of them"
    if not path.is_dir():
        return "expected a folder: an experiment, a run, or a folder of them"
    return "no experiment (results.jsonl) and no run (config.json, metrics.jsonl) in it"


def is_experiment(folder: Path) -> bool:
    """Whether `folder` is an experiment's, by the files that only those have."""
    return any((folder / name).is_file() for name in ("results.jsonl", "summary.json", "experiment.json"))


def _find(path: Path, depth: int) -> tuple[list[Path], list[Path]]:
    """(experiments, run directories) at or below `path`, in the order of their names."""
    try:
        if is_experiment(path):
            return [path], []
        if (path / "config.json").is_file() or (path / "metrics.jsonl").is_file():
            return [], [path]
        if depth == 0 or not path.is_dir():
            return [], []
        inside = sorted(one for one in path.iterdir() if one.name[:1] != "." and one.is_dir())
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from None
    found = [_find(one, depth - 1) for one in inside]
    return [one for pair in found for one in pair[0]], [one for pair in found for one in pair[1]]


# ---- experiments ---------------------------------------------------------------------------------------------------


def _experiment(folder: Path, jobs: Jobs, with_curves: bool) -> Group:
    summary = strict.read_object(folder / "summary.json") if (folder / "summary.json").is_file() else {}
    config = strict.read_object(folder / "config.json") if (folder / "config.json").is_file() else {}
    where = str(folder / "config.json")
    strict.number(config, "target_val_loss", where, low=0)
    name = strict.text(config, "experiment_name", where) or printable(folder.name)
    planned = strict.whole(summary, "planned_runs", str(folder / "summary.json"))  # --n-runs changes it
    group = Group(name, folder, config=config, planned=planned or strict.whole(config, "n_runs", where))
    finished = bool(summary) and summary.get("complete") is not False  # the runner writes it after every run
    rows = _results(folder, finished)
    measured: dict[int, curves.Metrics] = {}
    if with_curves and (folder / "metrics.jsonl").is_file():
        last = max((row["final_step"] or 0 for row in rows.values()), default=0)
        measured = _experiment_curves(folder / "metrics.jsonl", last, jobs, not finished)
    where = str(folder / "summary.json")
    common = hardware_of(strict.section(summary, "gpu_info", where), where)
    for run_id, row in rows.items():
        group.runs.append(_from_row(folder, run_id, row, common, measured.get(run_id)))
    strangers = sorted(set(measured) - set(rows))
    for run_id in strangers:
        run = Run(f"run {run_id}", folder / "metrics.jsonl", reason="no result yet: it runs, or was cut off")
        run.metrics = measured[run_id]
        group.runs.append(run)
    if group.planned and len(group.runs) < group.planned:
        group.notes.append(
            f"{group.planned - len(group.runs)} of {group.planned} planned runs have no result yet"
        )
    first = _first_plan(folder)
    if group.planned and len(group.runs) > max(group.planned, first):
        group.notes.append(
            f"{len(group.runs)} runs where {group.planned} were planned: were some added for their result?"
        )
    elif first and len(group.runs) > first:
        group.notes.append(
            f"{len(group.runs) - first} runs were added to the {first} that were planned first: a second look at the "
            "result, unless it was planned (engaging seeds)"
        )
    _check_summary(group, summary, rows, where)
    return group


def _first_plan(folder: Path) -> int:
    """How many runs were planned before `resume --n-runs` added some; 0 when it did not."""
    path = folder / "experiment.json"
    options = strict.section(strict.read_object(path), "options", str(path)) if path.is_file() else {}
    return strict.whole(options, "planned_first", f"{path}: options") or 0


def _results(folder: Path, finished: bool) -> dict[int, dict[str, Any]]:
    """The rows of results.jsonl by run_id; a run's last line counts, but two different successes are refused."""
    path = folder / "results.jsonl"
    if not path.is_file() and not finished:
        return {}
    rows: dict[int, dict[str, Any]] = {}
    for where, row in strict.lines(path):
        run_id = strict.whole(row, "run_id", where, needed=True)
        strict.whole(row, "seed", where, low=None)
        for key in ("final_val_loss", "final_train_loss"):
            strict.number(row, key, where)
        strict.number(row, "time_seconds", where, low=0)
        row["final_step"] = strict.whole(row, "final_step", where)
        if not isinstance(row.get("success"), bool):
            raise UserError(f"{where}: success: {strict.shown(row.get('success'))}: expected true or false")
        if row["success"]:
            strict.number(row, "final_val_loss", where, needed=True)
        before = rows.get(run_id)
        if (
            before
            and before["success"]
            and row["success"]
            and before["final_val_loss"] != row["final_val_loss"]
        ):
            raise UserError(
                f"{where}: run_id: {run_id}: this run has a result already, and another one; remove one of them"
            )
        rows[run_id] = row
    if finished and not rows:
        raise UserError(
            f"{path}: empty, but summary.json is there; restore it from the runs, or run it again"
        )
    return rows


def _experiment_curves(path: Path, last: int, jobs: Jobs, cut_off_allowed: bool) -> dict[int, curves.Metrics]:
    end, width = size(path), curves.width_for(last or curves.last_step(path))
    places = [*range(0, end, PART), end]
    arguments = [
        (path, EXPERIMENT_KEYS, width, cut_off_allowed, low, high) for low, high in itertools.pairwise(places)
    ]
    sizes = [high - low for low, high in itertools.pairwise(places)]
    return curves.by_run(curves.merged(jobs.map(curves.read_part, arguments, sizes), width))


def _from_row(
    folder: Path, run_id: int, row: dict[str, Any], common: Hardware, metrics: curves.Metrics | None
) -> Run:
    seed, seconds = row.get("seed"), row.get("time_seconds")
    run = Run(f"run {run_id}", folder / "runs" / f"run_{run_id}_seed_{seed}", seed, metrics=metrics)
    run.reason = printable(statistics.why_excluded(row))[:200]
    run.val_loss = None if row.get("final_val_loss") is None else float(row["final_val_loss"])
    run.train_loss = None if row.get("final_train_loss") is None else float(row["final_train_loss"])
    run.seconds, run.step = None if seconds is None else float(seconds), row["final_step"]
    run.hardware = common
    if run.path.is_dir():
        cpu, _ = device_of(run.path)
        read_environment(run, cpu)
        own = run.hardware
        if not own.gpu:  # the trainer did not say; the runner did, for all runs together
            run.hardware = dataclasses.replace(own, gpu=common.gpu, count=common.count)
    return run


def _check_summary(group: Group, summary: dict[str, Any], rows: dict[int, dict], where: str) -> None:
    """summary.json must agree with results.jsonl; where it does not, the results count and a note says so."""
    if not summary:
        return
    said = strict.section(summary, "statistics", where)
    loss = strict.section(said, "val_loss", where)
    stated = strict.number(loss, "mean", f"{where}: statistics: val_loss")
    found = statistics.summary(list(rows.values()))
    mean = found["val_loss"]["mean"]
    if stated is not None and (mean is None or abs(stated - mean) > 5e-4):
        rows_say = "none" if mean is None else f"{mean:.4f}"
        group.notes.append(
            f"summary.json gives a mean loss of {stated:.4f}, results.jsonl {rows_say}; the results count"
        )
    runs = strict.whole(said, "n_runs", f"{where}: statistics")
    if runs is not None and runs != len(rows):
        group.notes.append(f"summary.json counts {runs} runs, results.jsonl {len(rows)}; the results count")
    for run in group.counted:
        curve = run.metrics.val if run.metrics else curves.EMPTY
        if len(curve) and run.val_loss is not None and run.step == int(curve.step[-1]):
            logged = float(curve.loss[-1])
            if abs(logged - run.val_loss) > max(SAME_LOSS, 5e-5):
                group.notes.append(
                    f"{run.name}: results.jsonl says {run.val_loss:.4f}, its last validation in metrics.jsonl "
                    f"{logged:.4f}"
                )


def _grouped(runs: list[Run]) -> list[Group]:
    """Plain runs as groups: those that differ in nothing but the seed, and lie in one folder, belong together."""
    groups: dict[tuple, Group] = {}
    for run in runs:
        parent = run.path.absolute().parent
        key = (parent, run.variant) if run.variant != "[{}, null, null]" else (run.path,)
        if key not in groups:
            groups[key] = Group(run.name, parent)
        groups[key].runs.append(run)
        run.variant = ""
        if run.remark and len(groups[key].notes) < MOST_REMARKS:
            groups[key].notes.append(f"{run.name} is {run.remark}")
    for group in groups.values():
        if len(group.runs) > 1:
            first, last = min(run.name for run in group.runs), max(run.name for run in group.runs)
            same = next(
                (i for i, pair in enumerate(zip(first, last, strict=False)) if pair[0] != pair[1]), len(first)
            )
            shared = first[:same].rstrip("0123456789").rstrip("-_. ")
            group.name = shared.removesuffix("seed").rstrip("-_. ") or printable(group.path.name)
        else:
            group.path = group.runs[0].path
    return list(groups.values())


def _with_own_names(groups: list[Group]) -> list[Group]:
    """Two groups of one name get their folder's name; should that be the same too, a number."""
    names = [group.name for group in groups]
    for group in groups:
        if names.count(group.name) > 1:
            group.name = printable(group.path.absolute().name)
    seen: dict[str, int] = {}
    for group in groups:
        seen[group.name] = seen.get(group.name, 0) + 1
        if seen[group.name] > 1:
            group.name = f"{group.name} ({seen[group.name]})"
    return groups
