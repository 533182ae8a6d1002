"""`engaging drill`: does a preempted run really go on here? Two small runs of the same thing, one of them
disturbed.

The disturbed one is (1) told to save as it is before its time limit (USR1 to the batch script), so that it
requeues itself, and (2) requeued by SLURM as after a preemption (SIGTERM, then SIGKILL). Then both must
agree in every loss. It takes the compute of a two-minute job; on a cluster with SLURM's usual delays each
requeue adds about two minutes of waiting. Nothing else is touched; the two runs are removed at the end
unless --keep.
"""

import argparse
import os
import shutil
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

from nanogpt.common.errors import CommandError, UserError
from tools.args import Parser, counted, list_of_names, name_of, whole
from tools.launch import book, command
from tools.launch.book import Launch
from tools.launch.environment import need_environment
from tools.launch.manage import ended_states
from tools.place import checkout
from tools.runs import Run, read_run
from tools.site import slurm
from tools.site.cluster import my_jobs

DATA_SET = "python_source"  # made from Python's own library: needs no network
POLL_S = 2.0
SAVE_EVERY = 50  # steps


@dataclass(frozen=True)
class Verdict:
    """One line of the report."""

    passed: bool
    text: str


def main(argv: list[str]) -> int:
    """The command. Exit status 0: the run survived and agrees; 1: it did not."""
    args = _parser().read(argv)
    slurm.need_slurm("engaging drill")
    root = checkout()
    _prepare(root)
    stamp = time.strftime("%m%d-%H%M%S")
    names = [f"drill-{stamp}-straight", f"drill-{stamp}-disturbed"]
    try:
        straight, disturbed = (_launch(args, root, name) for name in names)
        sent = _disturb(args, root, disturbed)
        runs = [_wait(args, root, launch) for launch in (straight, disturbed)]
        verdicts = judge(runs[0], runs[1], sent)
    finally:
        _stop(root, names)
    for verdict in verdicts:
        print(f"  {'pass' if verdict.passed else 'FAIL'}  {verdict.text}")
    passed = all(verdict.passed for verdict in verdicts)
    if passed and not args.keep:
        for launch in (straight, disturbed):
            shutil.rmtree(root / launch.runs[0], ignore_errors=True)
            shutil.rmtree(launch.folder(root).parent, ignore_errors=True)
        print("drill passed: a preempted run goes on here, and ends where an undisturbed one ends")
    else:
        kept = f"{straight.runs[0]} and {disturbed.runs[0]}"
        print(f"drill {'passed' if passed else 'FAILED'}; the runs are kept: {kept}, logs/drill-{stamp}-*")
    return 0 if passed else 1


def judge(straight: Run, disturbed: Run, sent: list[str]) -> list[Verdict]:
    """Compare an undisturbed run with one that was disturbed as `sent` says."""
    found = [
        Verdict(
            straight.status == "finished",
            f"the undisturbed run ended: {straight.status}, step {straight.step}",
        ),
        Verdict(
            disturbed.status == "finished",
            f"the disturbed run ended: {disturbed.status}, step {disturbed.step}",
        ),
        Verdict(
            len(sent) == 2, f"disturbances: {', '.join(sent) or 'none: it was too quick; --steps with more'}"
        ),
        Verdict(disturbed.attempts >= 1 + len(sent), f"it was started {counted(disturbed.attempts, 'time')}"),
    ]
    one = {point.step: point.loss for point in straight.train}
    two = {point.step: point.loss for point in disturbed.train}
    differ = sorted(step for step in one.keys() | two.keys() if one.get(step) != two.get(step))
    text = (
        f"{len(one)} training losses are equal"
        if not differ
        else f"training losses differ from step {differ[0]}"
    )
    found.append(Verdict(bool(one) and not differ, text))
    pairs = [{point.step: point.val_loss for point in run.val} for run in (straight, disturbed)]
    equal = pairs[0] == pairs[1] and bool(pairs[0])
    found.append(
        Verdict(equal, f"validation losses {'are equal' if equal else 'differ'}: final {straight.val_loss}")
    )
    ends = sum(
        event.get("event") == "end" and event.get("status") == "finished" for event in disturbed.events
    )
    found.append(Verdict(ends == 1, f"it ended {ends} time{'s' if ends != 1 else ''}"))
    return found


def _prepare(root: Path) -> None:
    data = Path(os.environ.get("DATA_ROOT") or root / "data")
    if (data / DATA_SET / "manifest.json").is_file():
        return
    print(f"preparing {DATA_SET} (once, some seconds, no network) ...", flush=True)
    script = root / "nanogpt" / "data" / DATA_SET / "prepare.py"
    done = subprocess.run([str(need_environment()), str(script)], cwd=root, capture_output=True, text=True)
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        raise UserError(f"{script.relative_to(root)}: {last.removeprefix('error: ')}")


def _launch(args: argparse.Namespace, root: Path, name: str) -> Launch:
    words = ["quickstart", "--name", name, "--gpus", str(args.gpus), "--time", "15m", "--max-restarts", "20"]
    for flag in ("partition", "account", "qos", "gpu_type"):
        if getattr(args, flag):
            words += [f"--{flag.replace('_', '-')}", getattr(args, flag)]
    device = "cuda" if args.gpus else "cpu"
    run = [
        f"--dataset={DATA_SET}",
        f"--device={device}",
        f"--max_iters={args.steps}",
        f"--lr_decay_iters={args.steps}",
    ]
    run += [
        "--dropout=0.1",
        "--eval_tokens=20000",
        f"--eval_interval={max(50, args.steps // 4)}",
        "--log_interval=1",
    ]
    run += [f"--save_interval={SAVE_EVERY}", "--compile=false"]
    # Losses are equal for an equal number of threads only, and several on busy cores wait for each other.
    run += ["--deterministic=true"] if args.gpus else ["--num_threads=1"]
    command.main([*words, "--", *run])
    return book.find(root, name)


def _disturb(args: argparse.Namespace, root: Path, launch: Launch) -> list[str]:
    """Send the two disturbances, each when the run has gone on a good piece; returns those that were sent."""
    sent = []
    blows = [
        ("told to save and requeue (USR1)", ["scancel", "--batch", "--signal=USR1", launch.job_id]),
        ("requeued by SLURM (TERM, KILL)", ["scontrol", "requeue", launch.job_id]),
    ]
    for index, (text, blow) in enumerate(blows):
        goal = args.steps * (index + 1) // 4
        print(f"waiting for step {goal} of {launch.name}, then: {text} ...", flush=True)
        if not _reach(args, root, launch, goal, attempts=index + 1):
            break
        answer = slurm.ask(blow)
        if answer.rc != 0:
            raise CommandError(f"{' '.join(blow[:2])}: {slurm.refusal(answer)}; the drill stops here")
        sent.append(text)
    return sent


def _reach(args: argparse.Namespace, root: Path, launch: Launch, goal: int, attempts: int) -> bool:
    """Wait until the run has passed `goal` in its attempt number `attempts`; False when it has ended before."""
    limit = time.monotonic() + args.wait * 60
    while time.monotonic() < limit:
        run = read_run(root / launch.runs[0])
        if run.status == "finished":
            return False
        fresh = [point.step for point in run.train if (point.attempt or 1) >= attempts]
        if run.attempts >= attempts and max(fresh, default=-1) >= goal and run.status == "running":
            return True
        if run.status == "empty" and _ended(launch):
            raise UserError(
                f"{launch.name}: its job ended before the first step; engaging why {launch.job_id}"
            )
        time.sleep(POLL_S if args.wait > 5 else 0.3)
    raise UserError(f"{launch.name}: not at step {goal} within {args.wait} min; engaging why {launch.job_id}")


def _wait(args: argparse.Namespace, root: Path, launch: Launch) -> Run:
    print(f"waiting for {launch.name} to end ...", flush=True)
    limit, asked = time.monotonic() + args.wait * 60, 0.0
    while time.monotonic() < limit:
        run = read_run(root / launch.runs[0])
        if run.status == "finished":
            return run
        if time.monotonic() - asked > 10:
            asked = time.monotonic()
            if _ended(launch):
                return read_run(root / launch.runs[0])
        time.sleep(POLL_S)
    raise UserError(f"{launch.name}: did not end within {args.wait} min; engaging why {launch.job_id}")


def _ended(launch: Launch) -> bool:
    if any(job.base == launch.job_id for job in my_jobs()):
        return False
    return bool(ended_states([launch.job_id]))


def _stop(root: Path, names: list[str]) -> None:
    """Leave no job behind, whatever happened."""
    for name in names:
        launch = book.latest(root, name)
        if launch is not None and launch.job_id:
            slurm.ask(["scancel", "--quiet", launch.job_id])


def _parser() -> Parser:
    parser = Parser("drill", "Preempt a small run on this cluster and see whether it goes on exactly.")
    parser.add_argument(
        "--gpus", type=whole("--gpus", 0, 8), default=0, help="GPUs of each run (default: CPU)"
    )
    parser.add_argument("--gpu-type", type=name_of("--gpu-type"))
    parser.add_argument("--partition", type=list_of_names("--partition"))
    parser.add_argument("--account", type=name_of("--account"))
    parser.add_argument("--qos", type=name_of("--qos"))
    parser.add_argument("--steps", type=whole("--steps", 100, 100_000), default=2000, help="default 2000")
    parser.add_argument(
        "--wait", type=whole("--wait", 1, 1440), default=60, help="minutes to wait for each part"
    )
    parser.add_argument("--keep", action="store_true", help="keep the two runs")
    return parser
