"""Runs of experiments on the machine this is: one after the other, or many in one process and one compile.

Each goes through slurm/lib/run.sh of the experiment's own copy of the code, its output to runs/<run>/stdout.log.
Used by `engaging experiment run --executor local` and, inside a SLURM job, by task.py. SIGTERM, SIGHUP and Ctrl-C
become the trainer's SIGTERM: it saves, and what is left is said to be missing.
"""

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from nanogpt.common.errors import EXIT_INTERRUPTED, EXIT_NONFINITE, EXIT_STORAGE, EXIT_USAGE, StorageError
from nanogpt.common.storage import atomic_write_json, make_folder, storage_errors
from tools.experiments import collect, trainer
from tools.experiments.records import Experiment
from tools.runs import tail

POLL_S = 0.2
PR_SET_PDEATHSIG = 1
LIBC = ctypes.CDLL(None)
Pair = tuple[Experiment, int]  # an experiment and a run_id


@dataclass
class Executor:
    """Runs pairs. `environment` is what run.sh gets; `in_job`: GPUs come from SLURM's allocation, not from the config.

    `stopped` is set once a signal has asked for an end: no further run begins.
    """

    root: Path
    environment: Mapping[str, str]
    in_job: bool = False
    say: Callable[[str], None] = print
    stopped: str = ""
    _child: subprocess.Popen | None = field(default=None, repr=False)

    def listen(self) -> None:
        """Take the signals from here on."""
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        again, self.stopped = bool(self.stopped), signal.Signals(number).name
        child = self._child
        if child is None:
            return
        with contextlib.suppress(ProcessLookupError):
            if number == signal.SIGUSR1:
                child.send_signal(signal.SIGUSR1)
            elif again and number == signal.SIGINT:
                os.killpg(child.pid, signal.SIGKILL)
            else:
                child.send_signal(signal.SIGTERM)

    def run_each(self, pairs: list[Pair]) -> int:
        """One process a run. The last status that is not 0, or 0.

        A trainer that refuses its input refuses it for every seed, and a full disk is full for every run.
        """
        status, refused = 0, set()
        for number, (experiment, run_id) in enumerate(pairs, 1):
            if self.stopped:
                break
            if experiment.name in refused:
                continue
            last = self._run_one(experiment, run_id, f"[{number}/{len(pairs)}]")
            status = last or status
            if last == EXIT_USAGE:
                refused.add(experiment.name)
            elif last == EXIT_STORAGE:
                self.say("the disk is full or failed: no further run begins")
                break
        return EXIT_INTERRUPTED if self.stopped else status

    def run_together(self, pairs: list[Pair], plan: Path) -> int:
        """All in one process: one compile, and the runs follow each other in the order of `pairs`.

        A run that breaks the process is marked failed, and the rest starts again without it.
        """
        status = 0
        while pairs and not self.stopped:
            first = pairs[0][0]
            words, entries = together(pairs, plan)
            make_folder(plan.parent)
            atomic_write_json(plan, entries)
            for experiment, run in pairs:
                make_folder(experiment.run_folder(run))
            log = plan.with_suffix(".log")
            self.say(f"{len(pairs)} runs in one process: {', '.join(_name(*pair) for pair in pairs)}")
            status = self._start(first, words, log, {}, "", [e.run_folder(run) for e, run in pairs])
            for experiment, run in pairs:
                collect.write_outcome(experiment.run_folder(run), gpus=gpu_names(experiment.gpus))
            left = [pair for pair in pairs if not self._ended(*pair)]
            self._note_output(pairs, log)
            if not left or status == 0 or self.stopped or status in collect.NOT_ITS_FAULT:
                break
            broke = next((p for p in left if (p[0].run_folder(p[1]) / "metrics.jsonl").is_file()), left[0])
            collect.write_outcome(broke[0].run_folder(broke[1]), exit=status, gpus=gpu_names(first.gpus))
            self._collect(broke[0], broke[1], status)
            pairs = [pair for pair in left if pair is not broke]
        return EXIT_INTERRUPTED if self.stopped else status

    def _run_one(self, experiment: Experiment, run_id: int, count: str) -> int:
        folder, seed = experiment.run_folder(run_id), seed_of(experiment, run_id)
        make_folder(folder)
        words = trainer.words(experiment.config, experiment.trainer, list(experiment.overrides), seed, folder)
        extra = trainer.variables(experiment.config, experiment.trainer, seed)
        experiment.log(f"run {run_id} seed {seed}: started")
        label = f"{count} {_name(experiment, run_id)}"
        self.say(label)
        status = self._start(experiment, words, folder / "stdout.log", extra, label, [folder])
        collect.write_outcome(folder, exit=status, gpus=gpu_names(experiment.gpus))
        return self._collect(experiment, run_id, status)

    def _collect(self, experiment: Experiment, run_id: int, status: int) -> int:
        """Append what ended, say it, and return the status that counts: a finished run is 0."""
        found = next(v for v in collect.collect(experiment) if v.run_id == run_id)
        text = f"run {run_id} seed {found.seed}: {found.state}"
        if found.state == "finished":
            text += f", val_loss {found.val_loss:.4f} at step {found.step}"
            status = 0
        elif found.note:
            text += f": {found.note}"
        experiment.log(text)
        self.say(f"      {experiment.config.label} {text}")
        return status or (EXIT_NONFINITE if found.state == "failed" else 0)

    def _ended(self, experiment: Experiment, run_id: int) -> bool:
        found = collect.collect(experiment)
        return any(v.run_id == run_id and v.state in ("finished", "failed") for v in found)

    def _note_output(self, pairs: list[Pair], log: Path) -> None:
        """Each run's stdout.log says where the output of the common process is."""
        for experiment, run_id in pairs:
            path = experiment.run_folder(run_id) / "stdout.log"
            with contextlib.suppress(OSError):
                if not path.exists():
                    path.write_text(f"run together with others in one process; its output: {log}\n")

    def _start(
        self,
        experiment: Experiment,
        words: list[str],
        log: Path,
        extra: dict[str, str],
        label: str,
        folders: list[Path],
    ) -> int:
        """Start run.sh, wait for it; its exit status. Its output is appended to `log`."""
        command, environment = run_command(experiment, words, self.in_job)
        environment = {**self.environment, **extra, **environment}
        with storage_errors(log), log.open("ab") as out:
            if self.stopped:
                return EXIT_INTERRUPTED
            self._child = subprocess.Popen(
                command, cwd=self.root, env=environment, stdin=subprocess.DEVNULL, stdout=out, stderr=out,
                preexec_fn=_end_with_parent,
            )  # fmt: skip
        try:
            with _progress(label, folders) as show:
                while (status := _wait(self._child)) is None:
                    show()
        finally:
            self._child = None
        if status:
            for line in tail(log, 3):
                self.say(f"      | {line[:400]}")
        return status


def _wait(child: subprocess.Popen) -> int | None:
    """Its exit status as soon as it has ended; None after POLL_S."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        return child.wait(POLL_S)
    return None


def together(pairs: list[Pair], plan: Path) -> tuple[list[str], list[dict[str, object]]]:
    """(words for run.sh, what the file `plan` holds) that train all `pairs` in one process."""
    first = pairs[0][0]
    entries = [
        trainer.plan_entry(e.config, e.trainer, list(e.overrides), seed_of(e, run), e.run_folder(run))
        for e, run in pairs
    ]
    return [first.trainer.script, *_preset(first), f"--plan={plan}"], entries


def run_command(experiment: Experiment, words: list[str], in_job: bool) -> tuple[list[str], dict[str, str]]:
    """(command, variables) that run `words` on the experiment's GPUs."""
    command = ["bash", str(experiment.code / "slurm" / "lib" / "run.sh")]
    if in_job:
        return [*command, *words], {}
    if experiment.gpus:
        return [*command, f"--gpus={experiment.gpus}", *words], {}
    return [*command, *words], {"CUDA_VISIBLE_DEVICES": ""}


def _end_with_parent() -> None:
    """In the child, before run.sh: when this runner is killed, run.sh is told to stop, and the trainer saves.

    Its process group is its own: the terminal's Ctrl-C is the runner's to pass on.
    """
    os.setpgrp()
    LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def gpu_names(count: int) -> list[str]:
    """The names of this machine's first `count` GPUs, as nvidia-smi has them (in a job: of its own)."""
    if not count:
        return []
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [line.strip()[:80] for line in done.stdout.splitlines() if line.strip()][:count]


def seed_of(experiment: Experiment, run_id: int) -> int:
    """The seed of a run."""
    return experiment.config.base_seed + run_id


def _preset(experiment: Experiment) -> list[str]:
    preset = experiment.config.hyperparameters.get("preset")
    return [str(preset)] if preset else []


def _name(experiment: Experiment, run_id: int) -> str:
    return f"{experiment.config.experiment_name} run {run_id} seed {seed_of(experiment, run_id)}"


@contextlib.contextmanager
def _progress(label: str, folders: list[Path]):
    """A line that follows step and loss, at a terminal; nothing in a log. Yields what redraws it."""
    if not sys.stderr.isatty():
        yield lambda: None
        return
    from rich.console import Console
    from rich.markup import escape

    with Console(stderr=True).status(escape(label or "training")) as line:
        looked = [0.0]

        def show() -> None:
            if time.monotonic() - looked[0] < 1:
                return
            looked[0] = time.monotonic()
            line.update(escape(f"{label or 'training'}  {_last_step(folders)}"))

        yield show


def _last_step(folders: list[Path]) -> str:
    """Step and loss of the run that was written to last."""
    paths = [folder / "metrics.jsonl" for folder in folders if (folder / "metrics.jsonl").is_file()]
    if not paths:
        return "starting"
    newest = max(paths, key=lambda path: path.stat().st_mtime)
    for text in reversed(tail(newest, 5)):
        with contextlib.suppress(ValueError):
            row = json.loads(text)
            if isinstance(row, dict) and row.get("event") in ("train", "val"):
                loss = row.get("loss", row.get("val_loss"))
                return f"step {row.get('step')}  loss {loss:.4f}" if isinstance(loss, float) else ""
    return "starting"


def need_room(folder: Path) -> None:
    """StorageError when not even a small file can be written: an hour of training would end in nothing."""
    probe = folder / f".probe-{os.getpid()}"
    try:
        with storage_errors(folder):
            probe.write_bytes(b"\0" * 65536)
    except StorageError:
        raise
    finally:
        probe.unlink(missing_ok=True)
