"""`make faults`: the campaign, section by section, and its table in docs/reliability.md.

python -m tests.faults                            # what is missing of the default seed's campaign
python -m tests.faults --section=kills,shards --seed=7
python -m tests.faults --section=slurm --count=60 # more or fewer than the section's own number
python -m tests.faults --section=none             # the table only

It can be interrupted, and goes on with the first piece that is missing; `--again=true` begins a section anew.
"""

import contextlib
import functools
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from nanogpt.common.errors import UserError, run_command
from nanogpt.common.flags import knob, nearest, parse
from nanogpt.common.storage import atomic_write_text
from tests.faults import broken_ranks, canaries, damage, hangs, inputs
from tests.faults.campaign import Rig, kills_at_calls, random_kills, refusals, rig
from tests.faults.outcomes import Outcome, Tally, go_on, read

BEGIN, END = "<!-- faults: begin (written by `make faults`) -->", "<!-- faults: end -->"
REPORT = Path(__file__).resolve().parents[2] / "docs" / "reliability.md"


@dataclass(frozen=True)
class Section:
    """`count` injections in pieces of `piece`; `obstacle` says why they cannot be made here, "" where they can."""

    run: Callable[[Rig, random.Random, int], Tally]
    count: int
    piece: int
    obstacle: Callable[[Rig], str] = lambda _: ""


def slurm(bench: Rig, rng: random.Random, count: int) -> Tally:
    """slurm_runs.py, which needs what tests/slurm needs."""
    from tests.faults import slurm_runs

    return slurm_runs.slurm(bench, rng, count)


def no_slurm(_: Rig) -> str:
    """Why no SLURM can be started here."""
    from tools.practice.packages import obstacle

    return obstacle()


def no_compiler(bench: Rig) -> str:
    """System calls are made to fail by a small library in C."""
    return "" if bench.shim else "no C compiler"


ALL = 10**6  # of what there is: all in one piece
SECTIONS = {
    "kills": Section(random_kills, 840, 40),
    "calls": Section(kills_at_calls, ALL, ALL, no_compiler),
    "refusals": Section(refusals, 400, 40, no_compiler),
    "flips": Section(damage.flips, 3000, 1000),
    "damages": Section(damage.damages, 900, 300),
    "shards": Section(damage.shards, 1200, 300),
    "archives": Section(damage.archives, 600, 300),
    "records": Section(damage.records, 1200, 300),
    "inputs": Section(inputs.generated, 10_000, 500),
    "secrets": Section(canaries.canaries, ALL, ALL),
    "ranks": Section(broken_ranks.broken_ranks, 60, 5),
    "hangs": Section(hangs.hangs, 100, 4),
    "slurm": Section(slurm, 300, 60, no_slurm),
}


@dataclass(frozen=True)
class Settings:
    """The command line."""

    seed: int = knob(2026, "of every moment and place", low=0, high=2**31)
    section: str = knob("all", "which sections, separated by commas: " + ", ".join(SECTIONS) + "; or none")
    count: int = knob(0, "injections in each of them; 0: as many as the section has", low=0, high=10**7)
    again: bool = knob(False, "begin anew what was done with this seed")
    report: str = knob(str(REPORT), "file whose table is replaced; empty: none")


def chosen(text: str) -> list[str]:
    """The sections that --section names. UserError for one that does not exist."""
    names = list(SECTIONS) if text == "all" else [] if text == "none" else text.split(",")
    for name in names:
        if name not in SECTIONS:
            raise UserError(
                f"--section={name}: no such section{nearest(name, list(SECTIONS))}; {', '.join(SECTIONS)}"
            )
    return names


def row(name: str, outcome: Outcome | None) -> str:
    """One line of the table; of a section that nobody has run, that it was not run."""
    if outcome is None or not outcome.pieces:
        return f"| `{name}` | | | | not run | | |"
    where = ", ".join(f"{place} {count:,}" for place, count in outcome.where.items())
    clean = f"{outcome.clean:,}" if outcome.clean else ""
    return (
        f"| `{name}` | {outcome.what}: {where} | {outcome.injected:,} | {clean} | {outcome.outcome} | "
        f"{len(outcome.failures)} | {outcome.seed}, {outcome.date}, {outcome.seconds:,.0f} s |"
    )


def table(outcomes: dict[str, Outcome | None]) -> str:
    """The report, in Markdown."""
    known = [outcome for outcome in outcomes.values() if outcome]
    lines = [f"{machine}." for machine in dict.fromkeys(outcome.machine for outcome in known)]
    lines += [
        "",
        "| section | fault, and where it hit | injected | clean | demanded | failed | seed, date, time |",
    ]
    lines += ["| --- | --- | ---: | ---: | --- | ---: | --- |"]
    return "\n".join([*lines, *(row(name, outcome) for name, outcome in outcomes.items())])


def write_report(path: Path, text: str) -> None:
    """Replace what stands between the markers; the rest of the file stays."""
    old = path.read_text(encoding="utf-8") if path.exists() else f"# Reliability\n\n{BEGIN}\n{END}\n"
    before, begin, rest = old.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        before, after = old.rstrip("\n") + "\n\n", "\n"
    atomic_write_text(path, f"{before}{BEGIN}\n{text}\n{END}{after}")


def main(argv: list[str]) -> int:
    """Run the sections; 1 when a case failed, now or in the pieces that were done before."""
    settings = parse(Settings, argv, prog="python -m tests.faults", description=__doc__)
    names, failed = chosen(settings.section), False
    say = functools.partial(print, flush=True)
    with contextlib.ExitStack() as stack:
        bench = stack.enter_context(rig()) if names else None
        for name in names:
            section = SECTIONS[name]
            if reason := section.obstacle(bench):
                say(f"{name}: not run: {reason}")
                continue
            piece = min(section.piece, settings.count or section.count)
            one = functools.partial(lambda run, size, rng: run(bench, rng, size), section.run, piece)
            pieces = -(-(settings.count or section.count) // piece)
            outcome = go_on(name, settings.seed, pieces, settings.again, one, say)
            failed |= bool(outcome.failures)
            if settings.report:
                write_report(Path(settings.report), table({name: read(name) for name in SECTIONS}))
    text = table({name: read(name) for name in SECTIONS})
    say(text)
    if settings.report:
        write_report(Path(settings.report), text)
    return int(failed)


if __name__ == "__main__":
    run_command(main)
