"""`engaging practice up|down|status [--dir=DIR]`: the practice cluster from a shell."""

import argparse
import os
import sys
import time
from pathlib import Path

from nanogpt.common.errors import UserError, run_command
from tools.args import Parser

DEFAULT_FOLDER = "/var/lib/engaging-practice"


def main(argv: list[str]) -> int:
    """The command; returns its exit status."""
    parser = Parser(
        "practice", "A real SLURM of eight nodes on this machine (root), with Engaging's partitions."
    )
    parser.add_argument("action", choices=["up", "down", "status"])
    parser.add_argument("--dir", default=DEFAULT_FOLDER, help=f"its folder (default {DEFAULT_FOLDER})")
    parser.add_argument(
        "--user", action="append", default=[], help="up: a user who may submit too (repeatable)"
    )
    parser.add_argument("--delete", action="store_true", help="down: remove the folder as well")
    args = parser.read(argv)
    return ACTIONS[args.action](args)


def _up(args: argparse.Namespace) -> int:
    from tools.practice.cluster import Options, up
    from tools.practice.commands import environment

    started = time.monotonic()
    folder = Path(args.dir)
    fresh = up(folder, Options(users=tuple(args.user or _invoker())))
    what = f"up in {time.monotonic() - started:.1f} s" if fresh else "already running"
    print(f"practice cluster: {what}. In each shell that uses it:\n")
    print(f"    export SLURM_CONF={environment(folder)['SLURM_CONF']}\n")
    print("then: sinfo, sbatch, squeue. `engaging practice down` ends it and every job.")
    return 0


def _down(args: argparse.Namespace) -> int:
    from tools.practice.cluster import down

    print(
        "practice cluster:", "stopped" if down(Path(args.dir), delete=args.delete) else "nothing was running"
    )
    return 0


def _status(args: argparse.Namespace) -> int:
    from tools.practice.cluster import status

    found = status(Path(args.dir))
    if found["running"]:
        print(f"practice cluster: running ({len(found['alive'])} daemons and nodes) in {args.dir}")
        return 0
    print(f"practice cluster: not running in {args.dir}; missing: {', '.join(found['missing'])}")
    return 1


def _invoker() -> list[str]:
    """The person behind sudo."""
    user = os.environ.get("SUDO_USER", "")
    if user.startswith("-") or "," in user:
        raise UserError(f"SUDO_USER={user!r}: not a user name")
    return [user] if user and user != "root" else []


ACTIONS = {"up": _up, "down": _down, "status": _status}

if __name__ == "__main__":
    sys.dont_write_bytecode = True
    run_command(main)
