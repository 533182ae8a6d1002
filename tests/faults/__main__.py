"""`make faults`: the whole campaign, and its table in docs/reliability.md.

python -m tests.faults
python -m tests.faults --seed=7 --kills=1000 --flips=20000
python -m tests.faults --report=            # print the table only
python -m tests.faults --slurm --runs=100   # the other campaign: disturbed runs on a real SLURM (slurm_runs.py)
"""

import datetime
import os
import platform
import random
import sys
import time
from collections import Counter
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from nanogpt.common.errors import UserError, run_command
from nanogpt.common.flags import knob, parse
from nanogpt.common.storage import atomic_write_text
from tests.faults.campaign import Tally, damages, flips, kills_at_calls, random_kills, refusals, rig

BEGIN, END = "<!-- faults: begin (written by `make faults`) -->", "<!-- faults: end -->"
SLURM_BEGIN = "<!-- slurm faults: begin (written by `python -m tests.faults --slurm`) -->"
SLURM_END = "<!-- slurm faults: end -->"
REPORT = Path(__file__).resolve().parents[2] / "docs" / "reliability.md"


@dataclass(frozen=True)
class Settings:
    """The command line."""

    seed: int = knob(2026, "of every moment and place", low=0, high=2**31)
    kills: int = knob(240, "SIGKILLs at random moments", low=0, high=10**6)
    calls: int = knob(
        10**6, "most system calls to kill at, of all that a run makes on its checkpoints", low=0
    )
    refusals: int = knob(80, "calls that the file system refuses", low=0, high=10**6)
    flips: int = knob(5000, "flipped bits", low=0, high=10**7)
    damages: int = knob(500, "cut, zeroed, removed, lengthened and swapped files", low=0, high=10**6)
    report: str = knob(str(REPORT), "file whose table is replaced; empty: none")
    slurm: bool = knob(
        False, "disturbed runs on a SLURM of its own (root, Debian or Ubuntu) instead of the above"
    )
    runs: int = knob(100, "with --slurm: disturbed runs", low=1, high=10**4)


def table(settings: Settings, tallies: list[Tally], seconds: float) -> str:
    """The report, in Markdown."""
    now = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d")
    lines = [
        f"Seed {settings.seed}, {now}, torch {metadata.version('torch')}, Python {platform.python_version()}, "
        f"{platform.system()}, {seconds:.0f} s. Repeat with `make faults ARGS=--seed={settings.seed}`.",
        "",
        "| fault | injected | demanded | failed | where it hit |",
        "| --- | ---: | --- | ---: | --- |",
    ]
    for tally in tallies:
        where = ", ".join(f"{place} {count}" for place, count in tally.where.most_common())
        lines.append(
            f"| {tally.what} | {tally.injected:,} | {tally.outcome} | {len(tally.failures)} | {where} |"
        )
    return "\n".join(lines)


def write_report(path: Path, text: str, begins: str = BEGIN, ends: str = END) -> None:
    """Replace what stands between the markers; the rest of the file stays."""
    old = path.read_text(encoding="utf-8") if path.exists() else f"# Reliability\n\n{begins}\n{ends}\n"
    before, begin, rest = old.partition(begins)
    _, end, after = rest.partition(ends)
    if not (begin and end):
        before, after = old.rstrip("\n") + "\n\n", "\n"
    atomic_write_text(path, f"{before}{begins}\n{text}\n{ends}{after}")


def slurm_table(settings: Settings, outcomes: list, version: str, seconds: float) -> str:
    """The report of the runs on SLURM, in Markdown."""
    from tests.faults.slurm_runs import KINDS, STEPS

    now = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d")
    hit = [outcome for outcome in outcomes if outcome.hit]
    lines = [
        f"Seed {settings.seed}, {now}, {version}, torch {metadata.version('torch')}, "
        f"{os.cpu_count()} CPU cores, {seconds:.0f} s: {len(hit)} disturbed runs of {STEPS} steps, "
        f"{sum(bool(outcome.problem) for outcome in outcomes)} failed. Repeat with "
        f"`python -m tests.faults --slurm --runs={settings.runs} --seed={settings.seed}`.",
        "",
        "| what happened to the run | runs | losses and weights equal | attempts | most steps computed twice |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for name, kind in KINDS.items():
        rows = [outcome for outcome in hit if outcome.kind == name]
        good, attempts = sum(not row.problem for row in rows), sum(row.attempts for row in rows)
        twice = max((row.twice for row in rows), default=0)
        lines.append(f"| {kind.what} | {len(rows)} | {good} | {attempts} | {twice} |")
    spared = Counter(outcome.kind for outcome in outcomes if not outcome.hit)
    if spared:
        lines += [
            "",
            f"{spared.total()} more runs had ended before they could be struck, and are not counted.",
        ]
    return "\n".join(lines)


def slurm_main(settings: Settings) -> int:
    """`--slurm`: run the other campaign; 1 when a run failed."""
    from tools.practice.packages import obstacle

    reason = obstacle()
    if reason:
        raise UserError(f"--slurm: no SLURM can run here: {reason}")
    from tests.faults.slurm_runs import campaign

    began = time.monotonic()
    outcomes, version = campaign(settings.seed, settings.runs, lambda text: print(text, flush=True))
    for outcome in outcomes:
        if outcome.problem:
            print(f"  FAILED: {outcome.kind} {outcome.run}: {outcome.problem}", flush=True)
    text = slurm_table(settings, outcomes, version, time.monotonic() - began)
    print(text)
    if settings.report:
        write_report(Path(settings.report), text, SLURM_BEGIN, SLURM_END)
    enough = sum(outcome.hit for outcome in outcomes) >= settings.runs
    return int(any(outcome.problem for outcome in outcomes) or not enough)


def main(argv: list[str]) -> int:
    """Run the campaign; 1 when a case failed."""
    settings = parse(Settings, argv, prog="python -m tests.faults", description=__doc__)
    if settings.slurm:
        return slurm_main(settings)
    began, tallies = time.monotonic(), []
    with rig() as bench:
        cases = [(random_kills, settings.kills), (flips, settings.flips), (damages, settings.damages)]
        if bench.shim:
            cases[1:1] = [(kills_at_calls, settings.calls), (refusals, settings.refusals)]
        else:
            print("note: no C compiler, so no system calls are made to fail", file=sys.stderr)
        for case, count in cases:
            print(f"{case.__name__}: up to {count} ...", flush=True)
            tally = case(bench, random.Random(f"{settings.seed} {case.__name__}"), count)
            tallies.append(tally)
            print(f"  {tally.injected} injected, {len(tally.failures)} failed", flush=True)
            for failure in tally.failures:
                print(f"  FAILED: {failure}", flush=True)
    text = table(settings, tallies, time.monotonic() - began)
    print(text)
    if settings.report:
        write_report(Path(settings.report), text)
    return int(any(tally.failures for tally in tallies))


if __name__ == "__main__":
    run_command(main)
