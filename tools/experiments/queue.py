"""Runs as SLURM jobs: one array for the runs of a stage, or one job for all of them, and what became of them.

The launches lie on the shelf of `engaging launch` (out/.launch), so that status, logs, why and cancel find them by
their names. Which task of which launch is which run stands in each experiment's launches.jsonl.
"""

import argparse
import contextlib
import re
import secrets
from dataclasses import dataclass
from pathlib import Path

from nanogpt.common.storage import atomic_write_json
from tools.args import counted
from tools.experiments import records
from tools.experiments.execute import Pair
from tools.experiments.records import CODE, SHELF, Experiment
from tools.launch import book, environment, snapshot
from tools.launch.book import Launch
from tools.launch.presets import Target
from tools.launch.request import choose, fitting_throttle
from tools.launch.submit import batch_script, find_by_token, submit
from tools.site import profile, slurm
from tools.site.cluster import Cluster, ask_cluster
from tools.site.limits import Request
from tools.site.plan import Option
from tools.site.reasons import ENDS, JOB, REASONS
from tools.site.slurm import SlurmUnreachable

LARGEST_ARRAY = 1000  # tasks, where the cluster does not say; SLURM's own MaxArraySize is 1001
DEFAULT_MINUTES = 120  # of a run: a limit, not an estimate. A job that reaches it saves, requeues and goes on
MOST_MINUTES = 360  # of a job with several
OPTIONS = ("gpu_type", "time", "cpus", "mem", "partition", "account", "qos", "reservation", "throttle")


@dataclass(frozen=True)
class Queued:
    """A run's place in the queue: `state` as SLURM words it, `why` in words."""

    job: str
    state: str
    why: str = ""

    @property
    def active(self) -> bool:
        """Whether the run is on its way: nothing else may start it."""
        return self.state in slurm.ACTIVE or self.state == "UNKNOWN"


def arguments(experiment: Experiment, together: int = 1) -> argparse.Namespace:
    """The flags of `engaging launch` that one of its jobs has; `together`: how many runs one job does."""
    options = {name: experiment.options.get(name) for name in OPTIONS}
    minutes = options["time"] or min(DEFAULT_MINUTES * together, MOST_MINUTES)
    return argparse.Namespace(
        **{**options, "time": minutes},
        gpus=experiment.gpus,
        nodes=1,
        seeds=1,
        preset=experiment.config.experiment_name,
        max_restarts=experiment.options.get("max_restarts") or 20,
    )


def option_for(experiment: Experiment, cluster: Cluster, root: Path, runs: int, together: bool) -> Option:
    """The partition and GPU type its jobs go to; UserError when nothing takes them."""
    args = arguments(experiment, runs if together else 1)
    args.seeds = 1 if together else runs
    target = Target(experiment.config.experiment_name, experiment.trainer.script, (), minutes=args.time)
    return choose(args, cluster, profile.current_site(root), target)


def submit_runs(
    root: Path,
    name: str,
    pairs: list[Pair],
    *,
    together: bool = False,
    after: list[str] | None = None,
) -> list[str]:
    """Queue `pairs` as arrays of as many tasks as the cluster takes (or as one job); the job ids.

    `after`: jobs that must end well first.
    """
    first = pairs[0][0]
    python = environment.need_environment()
    environment.need_log_folder(root)
    cluster = ask_cluster()
    ids = []
    size = len(pairs) if together else largest_array()
    for start in range(0, len(pairs), size):
        part = pairs[start : start + size]
        tasks = [part] if together else [[pair] for pair in part]
        option = option_for(first, cluster, root, len(part), together)
        args = arguments(first, len(part) if together else 1)
        args.seeds = len(tasks)
        throttle = fitting_throttle(args, cluster, option)
        launch = _launch(root, name, tasks, option, first)
        try:
            orders = [[[str(e.folder), run] for e, run in task] for task in tasks]
            atomic_write_json(launch.folder(root) / "tasks.json", {"tasks": orders, "together": together})
            script = script_for(launch, option, tasks=len(tasks), throttle=throttle, after=after, first=first)
            launch.save(root)
            _note(launch, tasks, option.request.gpu_type)
            ids.append(submit(launch, root, script, environment.for_run(root, python, args.max_restarts)))
        except SlurmUnreachable:
            _say_submitted(ids)
            launch.state = "unknown"
            launch.save(root)
            raise
        except BaseException:
            _say_submitted(ids)
            snapshot.remove(launch.folder(root))
            raise
        where = f"{option.partition}, {_hardware(first.gpus, option.request.gpu_type)}"
        many = f", {throttle} at once" if len(tasks) > 1 else ""
        waits = f", after {', '.join(after)}" if after else ""
        print(f"{launch.name}: job {ids[-1]}, {counted(len(part), 'run')} ({where}{many}{waits})")
        for experiment in {id(e): e for e, _ in part}.values():
            experiment.log(f"submitted as job {ids[-1]} ({launch.name}, {where}{many}{waits})")
    return ids


def largest_array() -> int:
    """Tasks that one array may have."""
    return min(LARGEST_ARRAY, slurm.largest_array() or LARGEST_ARRAY)


def _say_submitted(ids: list[str]) -> None:
    """Before an error ends a submission of several jobs: which of them are in the queue all the same."""
    if ids:
        print(
            f"in the queue already: job {', '.join(ids)}; to take them back: scancel {' '.join(ids)}",
            flush=True,
        )


def _hardware(gpus: int, kind: str | None) -> str:
    return f"{gpus}x {kind or 'GPU'}" if gpus else "on the CPU"


def script_for(
    launch: Launch, option: Option, *, tasks: int, throttle: int, after: list[str] | None, first: Experiment
) -> str:
    """The batch script."""
    return batch_script(
        launch,
        option.request,
        partition=option.partition,
        tasks=tasks,
        throttle=throttle,
        reservation=first.options.get("reservation"),
        after=":".join(after or []),
        command=_command(launch, first),
    )


def dry_script(root: Path, name: str, pairs: list[Pair], together: bool, after: list[str]) -> str:
    """The batch script that `submit_runs` would hand over; nothing is written."""
    first, cluster = pairs[0][0], ask_cluster()
    tasks = 1 if together else len(pairs)
    option = option_for(first, cluster, root, len(pairs), together)
    args = arguments(first, len(pairs) if together else 1)
    args.seeds = tasks
    launch = Launch(name, 1, **_fixed([[pair] for pair in pairs], option, first, tasks))
    throttle = fitting_throttle(args, cluster, option)
    return script_for(launch, option, tasks=tasks, throttle=throttle, after=after, first=first)


def _launch(root: Path, name: str, tasks: list[list[Pair]], option: Option, first: Experiment) -> Launch:
    launch = book.new_launch(root, name, **_fixed(tasks, option, first, len(tasks)))
    launch.code = records.code_info(first)
    return launch


def _fixed(tasks: list[list[Pair]], option: Option, first: Experiment, count: int) -> dict:
    runs = [f"{SHELF}/{e.name}/runs/{e.run_folder(run).name}" for task in tasks for e, run in task]
    request: Request = option.request
    return {
        "token": secrets.token_hex(12),
        "preset": first.config.experiment_name,
        "trainer": first.trainer.script,
        "runs": runs,
        "args": list(first.overrides),
        "log": "logs/%x-%A_%a.out" if count > 1 else "logs/%x-%j.out",
        "request": {**vars(request), "partition": option.partition, "seeds": count},
    }


def _command(launch: Launch, first: Experiment) -> str:
    """The last lines of the script: fixed but for two folders of strict names."""
    folder = f"{book.SHELF}/{launch.name}/{launch.number:03}"
    return (
        f'code="$SLURM_SUBMIT_DIR/{SHELF}/{CODE}/{first.code.name}"\n'
        'exec "$ENV_PATH/bin/python" -I "$code/tools/experiments/task.py" '
        f'"$SLURM_SUBMIT_DIR/{folder}" "${{SLURM_ARRAY_TASK_ID:-0}}"'
    )


def _note(launch: Launch, tasks: list[list[Pair]], gpu_type: str | None) -> None:
    """Write down in each experiment which of its runs are which tasks: before sbatch, so that none is lost."""
    mine: dict[str, tuple[Experiment, dict[str, int]]] = {}
    for index, task in enumerate(tasks):
        for experiment, run in task:
            mine.setdefault(experiment.name, (experiment, {}))[1][str(run)] = index
    for experiment, runs in mine.values():
        row = {"launch": launch.name, "number": launch.number, "array": len(tasks) > 1, "runs": runs}
        row |= {"gpu_type": gpu_type} if gpu_type else {}
        with records.lock(experiment.folder):
            records.append_lines(experiment.folder / "launches.jsonl", [row])


# ---- what became of them -------------------------------------------------------------------------------------------


def places(root: Path, experiments: list[Experiment]) -> dict[tuple[str, int], Queued]:
    """(experiment's name, run_id) -> its newest job, for every run that was submitted. Asks SLURM twice at most.

    Raises SlurmUnreachable when the queue cannot be seen: then nobody may start anything.
    """
    where: dict[tuple[str, int], tuple[str, int, bool]] = {}
    for experiment in experiments:
        for row in records.read_lines(experiment.folder / "launches.jsonl"):
            job = _job_id(root, str(row.get("launch")), row.get("number"))
            runs = row.get("runs") if isinstance(row.get("runs"), dict) else {}
            for run, index in runs.items():
                if job and run.isdigit() and isinstance(index, int):
                    where[experiment.name, int(run)] = (job, index, row.get("array") is True)
    if not where:
        return {}
    tasks = {key: f"{job}_{index}" if array else job for key, (job, index, array) in where.items()}
    states = _states(sorted({job for job, _, _ in where.values()}), set(tasks.values()))
    return {
        key: states.get(task, Queued(task, "GONE", "no longer in the queue")) for key, task in tasks.items()
    }


def _job_id(root: Path, name: str, number: object) -> str:
    """The job of a launch; one whose answer was lost is looked up by its token."""
    if not isinstance(number, int):
        return ""
    launch = book.read(root / book.SHELF / name / f"{number:03}" / "job.json")
    if launch is None:
        return ""
    if not launch.job_id and launch.state in ("prepared", "unknown"):
        launch.job_id = find_by_token(launch.token)
        if launch.job_id:
            launch.state = "submitted"
            launch.save(root)
    return launch.job_id


def _states(jobs: list[str], wanted: set[str]) -> dict[str, Queued]:
    """Task (`12_3`, or `12`) -> its state: from accounting for what has ended, then from the queue.

    Accounting may be absent, and is late by some seconds: what it does not know of `wanted`, the controller may.
    """
    found: dict[str, Queued] = {}
    answer = slurm.ask(["sacct", "-X", "--parsable2", "-j", ",".join(jobs), "-o", "JobID,State"])
    for row in slurm.table(answer.out):
        _ended(found, row.get("JobID", ""), row.get("State", ""))
    for job in {task.partition("_")[0] for task in wanted - found.keys()}:
        for line in slurm.ask(["scontrol", "show", "job", "-o", job]).out.splitlines():
            row = slurm.fields(line)
            index = row.get("ArrayTaskId", "")
            key = row.get("ArrayJobId", row.get("JobId", "")) + (f"_[{index}]" if index else "")
            _ended(found, key, row.get("JobState", ""))
    from tools.site.cluster import my_jobs

    for job in my_jobs():
        if job.base in jobs:
            why = _words(job.reason) if job.state == "PENDING" else ""
            for task in _tasks(job.key):
                found[task] = Queued(task, job.state, why)
    return found


def _ended(found: dict[str, Queued], key: str, text: str) -> None:
    state = slurm.state_of(text)
    if state in slurm.ENDED:
        for task in _tasks(key):
            found[task] = Queued(task, state, ENDS.get(state, (state.lower(), ""))[0])


def _tasks(key: str) -> list[str]:
    """`12_[2-4,7%2]` -> 12_2 12_3 12_4 12_7; anything else is one."""
    match = re.fullmatch(r"([0-9]+)_\[([0-9,\-]+)(%[0-9]+)?\]", key)
    if not match:
        return [key]
    found = []
    for part in match[2].split(","):
        low, _, high = part.partition("-")
        with contextlib.suppress(ValueError):
            found += [f"{match[1]}_{index}" for index in range(int(low), int(high or low) + 1)]
    return found


def _words(reason: str) -> str:
    lowered = reason.strip("()").lower()
    for prefix, whose, text, _ in REASONS:
        if lowered.startswith(prefix):
            return text if whose == JOB else f"{text} ({whose})"
    return reason
