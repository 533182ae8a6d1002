"""`engaging shell`: a shell on a compute node, in the repository, with the environment on.

    engaging shell                                       one GPU for an hour
    engaging shell --gpus 2 --gpu-type l40s --time 3h
    bash slurm/nanogpt/train_shakespeare.sh              in there: it runs in the foreground

It warns five minutes before its end, and gives the GPUs back when it has stood idle for twenty.
"""

import argparse
import os
import shlex
import sys
from pathlib import Path

from nanogpt.common.errors import UserError
from tools.args import Parser, add_request, clock
from tools.launch import environment
from tools.launch.presets import Target
from tools.launch.request import choose
from tools.place import checkout
from tools.site import profile, settings, slurm
from tools.site.cluster import ask_cluster
from tools.site.plan import Option

INSIDE = Path("tools") / "launch" / "shell_inside.py"
WARN_S, IDLE_S = 300, 1200
TARGET = Target("shell", "", (), minutes=60)


def main(argv: list[str]) -> int:
    """The command. Does not return when it starts the shell: salloc takes this process's place."""
    args = _parser().read(argv)
    root = checkout()
    slurm.need_slurm("engaging shell")
    if job := os.environ.get("SLURM_JOB_ID"):
        raise UserError(f"engaging shell: this is job {job} already; exit ends it")
    site = profile.current_site(root)
    settings.fill(args, site.path)
    python = environment.need_environment()
    words = allocation(args, choose(args, ask_cluster(), site, TARGET), root, python)
    if args.dry_run:
        print(shlex.join(words))
        return 0
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise UserError(
            "engaging shell: no terminal here; engaging launch submits a job, --dry-run prints salloc's line"
        )
    os.execvpe(words[0], words, {**os.environ, **environment.for_run(root, python, 0)})
    return 0  # for the checkers: the process is salloc's by now


def allocation(args: argparse.Namespace, option: Option, root: Path, python: Path) -> list[str]:
    """salloc's words, and what it runs: a shell on the first node (an interactive step, which leaves the job's GPUs to
    further steps)."""
    request = option.request
    words = [
        "salloc",
        "--job-name=shell",
        f"--partition={option.partition}",
        f"--time={clock(request.minutes)}",
    ]
    words += [f"--nodes={request.nodes}", "--ntasks-per-node=1", f"--cpus-per-task={request.cpus}"]
    words += [f"--mem={request.memory_mb}M"] if request.memory_mb else []
    if request.gpus:
        words.append(f"--gres=gpu:{request.gpu_type + ':' if request.gpu_type else ''}{request.gpus}")
    words += [
        f"--{name}={value}" for name in ("account", "qos", "reservation") if (value := getattr(args, name))
    ]
    step = ["srun", "--interactive", "--pty", "--preserve-env", f"--chdir={root}"]
    return [*words, *step, str(python), "-I", str(root / INSIDE), str(root), str(WARN_S), str(IDLE_S)]


def _parser() -> Parser:
    parser = Parser("shell", __doc__ or "")
    add_request(parser, time="default 1h")
    parser.add_argument("--dry-run", action="store_true", help="print salloc's line and stop")
    parser.set_defaults(seeds=1, throttle=None, preset="gpt2")  # choose() compares options as for one run
    return parser
