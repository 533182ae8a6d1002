"""`engaging doctor`: is this machine, this account and this environment fit to train, and if not, what to do.

Every finding carries its fix. The checks run side by side, each with a limit on its time; one that hangs or
breaks is itself a finding. Exit status: 0, or 1 when something failed.
"""

import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from tools.args import Parser, counted, folded, whole
from tools.place import checkout

MARKS = {"ok": "ok  ", "warn": "warn", "fail": "FAIL", "skip": "--  "}


@dataclass(frozen=True)
class Finding:
    """One result: `level` is ok, warn, fail or skip; `fix` says what to do (empty when nothing)."""

    check: str
    level: str
    text: str
    fix: str = ""

    def line(self) -> str:
        """One line, and the fix below it."""
        below = f"\n                  -> {self.fix}" if self.fix else ""
        return f"{MARKS[self.level]}  {self.check:10}  {self.text}{below}"


Check = Callable[[Path], list[Finding]]


def run_checks(checks: dict[str, Check], root: Path) -> list[Finding]:
    """All findings, in the order of the checks."""
    with ThreadPoolExecutor(max(1, len(checks))) as pool:
        running = {name: pool.submit(check, root) for name, check in checks.items()}
        found: list[Finding] = []
        for name, future in running.items():
            try:
                found += future.result()
            except Exception as error:  # a broken check is a finding, and the others still count
                found.append(
                    Finding(name, "warn", f"the check itself failed: {type(error).__name__}: {error}")
                )
    return found


def main(argv: list[str]) -> int:
    """The command."""
    parser = Parser("doctor", "Check this machine, account and environment; each finding has its fix.")
    parser.add_argument("--json", action="store_true", help="the findings as JSON")
    parser.add_argument(
        "--gpus",
        nargs="?",
        const=0,
        metavar="N",
        type=whole("--gpus", 1, 64),
        help="also all-reduce with NCCL over N GPUs of this node (without N: all of them)",
    )
    parser.add_argument(
        "--seconds", type=whole("--seconds", 1, 86400), default=5, help="how long --gpus reduces (default 5)"
    )
    parser.add_argument(
        "--bundle",
        nargs="?",
        const="",
        metavar="FILE",
        help="also pack what a help desk asks for, secrets removed",
    )
    args = parser.read(argv)
    root = checkout()
    found = run_checks(_checks(args.gpus, args.seconds), root)
    failed = sum(finding.level == "fail" for finding in found)
    warned = sum(finding.level == "warn" for finding in found)
    if args.json:
        print(
            json.dumps({"failed": failed, "warned": warned, "findings": [asdict(f) for f in found]}, indent=1)
        )
    else:
        for finding in found:
            for line in finding.line().splitlines():
                print(folded(line, 18))
        print(f"\n{failed} failed, {counted(warned, 'warning')}" if failed or warned else "\nall is well")
    if args.bundle is not None:
        from tools.site import bundle

        bundle.write(root, Path(args.bundle or time.strftime("engaging-support-%m%d-%H%M%S.tar.gz")), found)
    return 1 if failed else 0


def _checks(reduce_over: int | None, seconds: int) -> dict[str, Check]:
    from tools.site import checks_account, checks_gpu, checks_machine

    checks: dict[str, Check] = {
        "python": checks_machine.environment,
        "checkout": checks_machine.folders,
        "disk": checks_machine.disk,
        "quota": checks_machine.quota,
        "scratch": checks_machine.scratch,
        "caches": checks_machine.caches,
        "hub": checks_machine.hub,
        "slurm": checks_account.controller,
        "account": checks_account.account,
        "preempt": checks_account.preemption,
        "gpu": checks_gpu.gpus,
    }
    if reduce_over is not None:  # after the speed of each, not beside it: both would come out slow
        checks["gpu"] = lambda root: [*checks_gpu.gpus(root), checks_gpu.all_reduce(reduce_over, seconds)]
    return checks
