"""A submission: one small JSON record, and the evidence that it points to by digest.

The record is made from runs by one function, `make`; what it says of them is never typed. `verify` makes it again
from the evidence and compares.
"""

import datetime
import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from nanogpt.common.errors import UserError
from tools.analysis import changes
from tools.leaderboard import text
from tools.leaderboard.evidence import LARGEST_LOG, Run
from tools.leaderboard.group_checks import Result, recipe_digest
from tools.leaderboard.strict import is_whole, parse_object, read_bytes
from tools.leaderboard.tracks import Track

FORMAT = "engaging-nanogpt submission 1"
LARGEST_RECORD = 256 << 10
MOST_RUNS = 100
MOST_CHANGES, LONGEST_CHANGE = 40, 300
KINDS = ("record", "negative", "rerun")

_STRICT = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Seconds = Annotated[float, Field(ge=0, le=1e8)]
Loss = Annotated[float, Field(gt=0, le=100)]
Short = Annotated[str, Field(max_length=120)]
Id = Annotated[str, Field(pattern=r"^[0-9a-f]{16}$")]


class Blob(BaseModel):
    """A file of the evidence: its digest and size before compression."""

    model_config = _STRICT
    sha256: Digest
    bytes: Annotated[int, Field(ge=1, le=LARGEST_LOG)]


class RunEntry(BaseModel):
    """One run of a submission."""

    model_config = _STRICT
    seed: Annotated[int, Field(ge=0, le=2**63)] | None
    val_loss: Loss
    seconds: Seconds
    files: dict[Literal["log.txt", "metrics.jsonl", "config.json", "environment.json"], Blob]


class Record(BaseModel):
    """A submission as it lies on the board. `seconds` is the mean over the runs: the record time.

    `changed` is what differs from the record `against`, settings and files of source; None: there was none before it.
    """

    model_config = _STRICT
    format: Literal["engaging-nanogpt submission 1"]
    id: Id
    kind: Literal["record", "negative", "rerun"]
    track: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
    description: Annotated[str, Field(max_length=text.DESCRIPTION)]
    contributors: Annotated[list[Short], Field(min_length=1, max_length=text.CONTRIBUTORS)]
    log_url: Annotated[str, Field(max_length=text.URL)]
    submitted: datetime.datetime
    seconds: Seconds
    steps: Annotated[int, Field(ge=1, le=10**9)]
    mean_loss: Loss
    p_value: Annotated[float, Field(ge=0, le=1)] | None
    gpu: Short
    world_size: Annotated[int, Field(ge=1, le=4096)]
    source_sha256: Digest
    recipe_sha256: Digest
    runs: Annotated[list[RunEntry], Field(min_length=1, max_length=MOST_RUNS)]
    data: Blob | None
    against: Id | None = None
    changed: Annotated[
        list[Annotated[str, Field(max_length=LONGEST_CHANGE)]], Field(max_length=MOST_CHANGES + 1)
    ] = Field(default_factory=list)

    @property
    def hardware(self) -> str:
        """What it ran on, as the board's tabs say it."""
        return f"{self.world_size} x {self.gpu}"

    def to_json(self) -> bytes:
        """The record's file."""
        return (json.dumps(self.model_dump(mode="json"), indent=1, ensure_ascii=False) + "\n").encode()


DERIVED = (
    "id",
    "seconds",
    "steps",
    "mean_loss",
    "p_value",
    "gpu",
    "world_size",
    "source_sha256",
    "recipe_sha256",
    "runs",
)


def blob(data: bytes) -> Blob:
    """What a record says of a file of its evidence."""
    return Blob(sha256=hashlib.sha256(data).hexdigest(), bytes=len(data))


def make(
    runs: Sequence[Run], result: Result, track: Track, kind: str, said: dict[str, Any], manifest: bytes | None,
) -> Record:  # fmt: skip
    """The record of these runs. `said`: description, contributors, log_url and submitted; all else is computed."""
    entries = [
        RunEntry(
            seed=run.seed if is_whole(run.seed, 0, 2**63) else None,
            val_loss=run.val_loss, seconds=run.train_ms / 1000,
            files={name: blob(data) for name, data in run.files.items()},
        )
        for run in runs
    ]  # fmt: skip
    return Record(
        format=FORMAT, id=record_id(track.name, kind, [run.log_sha256 for run in runs]), kind=kind, track=track.name,
        seconds=result.mean_seconds, steps=result.steps, mean_loss=result.mean_loss, p_value=result.p_value,
        gpu=result.gpu[:120], world_size=max(1, result.world_size), source_sha256=runs[0].source_sha256,
        recipe_sha256=recipe_digest(runs[0]), runs=entries,
        data=blob(manifest) if manifest is not None else None, **said,
    )  # fmt: skip


def changed_since(before: Run, now: Run) -> list[str]:
    """What differs between two runs, a line each: knobs, and files of source with the lines added and taken away."""
    sources = [
        {name: changes.lines_of(data) for name, data in run.source_files.items()} for run in (before, now)
    ]
    lines = changes.brief(changes.between(before.recipe, now.recipe, *sources), MOST_CHANGES)
    return [line[:LONGEST_CHANGE] for line in lines]


def record_id(track: str, kind: str, logs: Sequence[str]) -> str:
    """The name of a submission: the same logs on the same track have the same one, whoever hands them in."""
    return hashlib.sha256(json.dumps([track, kind, sorted(logs)]).encode()).hexdigest()[:16]


def read_record(path: Path) -> Record:
    """The record in a file. UserError names the file and the field."""
    found = parse_object(read_bytes(path, LARGEST_RECORD), str(path))
    submitted = found.get("submitted")
    try:
        if isinstance(submitted, str):  # pydantic ends it with Z, which Python 3.10 does not read
            found["submitted"] = datetime.datetime.fromisoformat(re.sub("Z$", "+00:00", submitted))
        record = Record.model_validate(found)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])[:80]
        raise UserError(
            f"{path}: {ascii(where)[1:-1]}: {first['msg']}; records are made by `submit`"
        ) from None
    except ValueError:
        raise UserError(f"{path}: submitted: {ascii(submitted)[:40]}: expected a date and time") from None
    if record.submitted.tzinfo is None:
        raise UserError(f"{path}: submitted: has no time zone; records are made by `submit`")
    if path.name != f"{record.id}.json":
        raise UserError(f"{path}: id: the file's name is not the record's id, {record.id}; keep the name")
    text.line_of(record.description, f"{path}: description", text.DESCRIPTION)
    for name in record.contributors:
        text.line_of(name, f"{path}: contributors", text.CONTRIBUTOR)
    text.line_of(record.gpu or "?", f"{path}: gpu", 120)
    if record.log_url:
        text.url_of(record.log_url, f"{path}: log_url")
    return record
