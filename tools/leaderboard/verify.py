"""All checks over one submission: accepted, or refused with every reason that was found."""

import datetime
import itertools
import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nanogpt.common.errors import UserError
from tools.leaderboard import group_checks, text
from tools.leaderboard.clock_checks import NOT_JUDGED
from tools.leaderboard.data_manifest import read_data_manifest
from tools.leaderboard.evidence import Refused, Run, read_run_directory
from tools.leaderboard.group_checks import Others, Result
from tools.leaderboard.modded_logs import LEFT_OUT, check_modded, read_modded_log
from tools.leaderboard.run_checks import TITLES, check_run
from tools.leaderboard.strict import is_whole
from tools.leaderboard.submission import DERIVED, Record, changed_since, make
from tools.leaderboard.tracks import Track


@dataclass
class Verdict:
    """What came of a submission. `problems` are (check, reason); none means accepted."""

    name: str
    track: Track
    kind: str
    problems: list[tuple[str, str]]
    runs: list[Run] = field(default_factory=list)
    result: Result | None = None
    record: Record | None = None
    notes: list[str] = field(default_factory=list)
    waived: set[str] = field(default_factory=set)  # checks that a mere look at a log does without

    @property
    def accepted(self) -> bool:
        """Whether nothing was found."""
        return not self.problems

    def look_only(self) -> None:
        """Judge foreign logs as logs, not as a record: what a single one cannot have is a note, not a refusal."""
        if not self.runs or self.runs[0].kind != "modded":
            return
        lenient = {LEFT_OUT, "statistics"} if len(self.runs) == 1 else {LEFT_OUT}
        self.waived = {check for check, _ in self.problems if check in lenient}
        self.notes += [reason for check, reason in self.problems if check in lenient]
        self.problems = [row for row in self.problems if row[0] not in lenient]

    @property
    def passed(self) -> list[str]:
        """The checks that were made and hold, in words. A foreign log allows fewer of them."""
        left_out = (
            {check for check, _ in self.problems}
            | self.waived
            | ({"source"} if LEFT_OUT in self.waived else set())
        )
        left_out |= set() if self.record else {"evidence", "claim"}
        if self.runs and self.runs[0].kind == "modded":
            left_out |= {"marks", "log", "data"}
        if self.kind != "record":
            left_out.add("statistics")
        found = [title for check, title in TITLES.items() if check not in left_out]
        if any(NOT_JUDGED in note for note in self.notes):
            found = [title.partition(", and could have")[0] for title in found]
        return found


def expand(paths: Sequence[Path]) -> tuple[list[Path], list[str]]:
    """(runs, notes): the folder of an experiment (`engaging experiment`) stands for all its runs."""
    found, notes = [], []
    for path in paths:
        shelf = path / "runs"
        if not shelf.is_dir() or (path / "log.txt").exists():
            found.append(path)
            continue
        inside = sorted(one for one in shelf.iterdir() if one.is_dir() and one.name[0] != ".")
        runs = [one for one in inside if (one / "config.json").is_file()]
        found += sorted(runs, key=lambda one: (len(one.name), one.name))
        if len(runs) < len(inside):
            notes.append(f"{len(inside) - len(runs)} of the {len(inside)} runs of {path.name} left no result")
    return found, notes


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """The runs of one submission: run directories or modded-nanogpt's logs. UserError or Refused."""
    runs = []
    for number, path in enumerate(paths, 1):
        label = f"run {number}"
        if not path.exists() and not path.is_symlink():
            raise UserError(
                f"{path}: there is none; name run directories, an experiment's folder, or logs of modded-nanogpt"
            )
        if path.is_dir():
            run = read_run_directory(path, label)
        else:
            run = read_modded_log(path, label)
        if run.seed is not None:
            run.label = f"{label} (seed {str(run.seed)[:20]})"
        runs.append(run)
    return runs


def judge(
    runs: list[Run], track: Track, kind: str, description: str, submitted: datetime.datetime,
    manifest: dict[str, Any] | None, others: Others, name: str,
) -> Verdict:  # fmt: skip
    """Every check over these runs."""
    problems: list[tuple[str, str]] = []
    for run in runs:
        if run.kind == "modded":
            if track.metric == "steps":
                run.steps = run.val[-1].step  # track 3 stops where it likes
            problems += check_modded(run, track, submitted)
        else:
            problems += check_run(run, track, submitted, manifest)
    problems += group_checks.check_group(runs, track)
    result = None
    if all(math.isfinite(run.val_loss) for run in runs):
        result = group_checks.result_of(runs, track)
        problems += group_checks.check_statistics(result, track, kind)
    problems += group_checks.check_others(runs, track, kind, others)
    problems += group_checks.check_template(runs, track, kind)
    if text.is_placeholder(description):
        problems.append(
            ("text", "its description is the unedited template: say in a few words what was changed")
        )
    notes = list(dict.fromkeys(note for run in runs for note in run.notes)) + _notes(runs)
    return Verdict(name, track, kind, problems, runs, result, None, notes)


def _notes(runs: Sequence[Run]) -> list[str]:
    """What a reader should know and no rule forbids."""
    notes = []
    seeds = sorted(run.seed for run in runs if isinstance(run.seed, int))
    if len(seeds) > 1 and seeds[-1] - seeds[0] >= len(seeds):
        missing = list(itertools.islice((n for n in range(seeds[0], seeds[-1]) if n not in seeds), 5))
        notes.append(f"seeds between the submitted ones are missing: {', '.join(map(str, missing))}")
    states = [run.attempts[0].get("git") for run in runs if run.attempts]
    counts = [state.get("changed") for state in states if isinstance(state, dict)]
    changed = max((count for count in counts if is_whole(count)), default=0)
    if changed:
        notes.append(f"started from a clone with {changed} changed files; the log has them as they were")
    times = [run.train_ms for run in runs]
    if len(times) > 1 and max(times) > 1.1 * min(times):
        notes.append(
            f"times from {min(times) / 1000:.1f} to {max(times) / 1000:.1f} s: the machine was not equally fast"
        )
    hosts = {run.host for run in runs if run.host}
    if len(hosts) > 1:
        notes.append(f"ran on {len(hosts)} machines")
    return notes


Unpack = Callable[[Record, Path], tuple[list[Path], Path | None]]


def verify_record(
    record: Record, unpack: Unpack, tracks: dict[str, Track], others: Others, earlier: Callable[[Record], Run]
) -> Verdict:
    """A record of a board, from its evidence alone: everything it says is computed again. UserError: malformed.

    `unpack(record, folder)` writes the evidence: (the runs, the folder of their data's manifest); `earlier(record)`
    is a run of the record that it is held against.
    """
    track = tracks.get(record.track)
    if track is None:
        raise UserError(f"{record.id}: track: {record.track}: this board has no such track")
    with tempfile.TemporaryDirectory(prefix="engaging-board-") as folder:
        try:
            paths, manifest = unpack(record, Path(folder))
            facts = read_data_manifest(manifest)[1] if manifest else None
            runs = read_runs(paths)
        except Refused as refusal:
            return Verdict(record.id, track, record.kind, [(refusal.check, str(refusal))], record=record)
    found = judge(runs, track, record.kind, record.description, record.submitted, facts, others, record.id)
    found.record = record
    found.problems += _claims(record, found)
    found.problems += _change_claims(record, runs[0], earlier)
    return found


def _change_claims(record: Record, run: Run, earlier: Callable[[Record], Run]) -> Iterator[tuple[str, str]]:
    """What the record says has changed against what the two sources and settings say."""
    try:
        found = changed_since(earlier(record), run) if record.against else []
    except (UserError, Refused):
        yield (
            "claim",
            f"it says what changed since {record.against}, no earlier record of its track and hardware",
        )
        return
    if found != record.changed:
        wrong = next(
            (line for line in [*record.changed, *found] if (line in found) != (line in record.changed)), ""
        )
        yield "claim", f"what it says has changed is not what its source and settings say ({wrong[:80]!r})"


def _claims(record: Record, verdict: Verdict) -> list[tuple[str, str]]:
    """What the record says of its evidence against what the evidence says."""
    now = datetime.datetime.now(datetime.timezone.utc)
    problems = []
    if record.submitted > now + datetime.timedelta(days=1):
        problems.append(
            ("claim", f"it says that it was submitted on {record.submitted:%Y-%m-%d}, which is to come")
        )
    if verdict.result is None:
        return problems
    said = {name: getattr(record, name) for name in ("description", "contributors", "log_url", "submitted")}
    try:
        again = make(verdict.runs, verdict.result, verdict.track, record.kind, said, None)
    except ValueError:
        return [*problems, ("claim", "its evidence cannot be written as a record")]
    for name in DERIVED:
        claimed, found = getattr(record, name), getattr(again, name)
        if name == "runs":
            problems += _run_claims(claimed, found)
        elif isinstance(claimed, float) and isinstance(found, float):
            if not math.isclose(claimed, found, rel_tol=1e-9, abs_tol=1e-12):
                problems.append(("claim", f"it claims {name} = {claimed:.6g}; its evidence says {found:.6g}"))
        elif claimed != found:
            problems.append(
                ("claim", f"it claims {name} = {str(claimed)[:40]}; its evidence says {str(found)[:40]}")
            )
    return problems


def _run_claims(claimed: list, found: list) -> list[tuple[str, str]]:
    for number, (ours, theirs) in enumerate(zip(found, claimed, strict=True), 1):
        for name in ("seed", "val_loss", "seconds"):
            if getattr(ours, name) != getattr(theirs, name):
                said = f"{name} = {getattr(theirs, name)}; its evidence says {getattr(ours, name)}"
                return [("claim", f"of run {number} it claims {said}")]
    return []


def remember(others: Others, record: Record) -> None:
    """Add a record to what later ones are compared with."""
    for entry in record.runs:
        others.logs.setdefault(entry.files["log.txt"].sha256, record.id)
        if "metrics.jsonl" in entry.files:
            others.run_losses.setdefault(entry.val_loss, record.id)
    others.losses.setdefault(tuple(sorted(entry.val_loss for entry in record.runs)), record.id)
    key = (record.source_sha256, record.recipe_sha256, record.gpu, record.world_size, record.track)
    others.recipes.setdefault(key, record.id)
