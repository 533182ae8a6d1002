"""The board: a folder that many write to at once, in the lab's shared pool or a git repository.

    board.json              title and the board's own tracks (not needed for the built-in ones)
    records/<id>.json       one submission each, written once and never changed
    evidence/<ab>/<sha>.xz  its logs, metrics and configurations, by digest: a shared file is stored once

There is no index and no lock: a record appears by one hard link of a finished file, under a name that its content
determines. Two submissions never write one file, and one handed in twice finds itself there.
"""

import contextlib
import datetime
import hashlib
import json
import lzma
import os
import stat
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from nanogpt.common.errors import CommandError, UserError
from nanogpt.common.flags import nearest
from nanogpt.common.manifest import MANIFEST
from nanogpt.common.storage import (
    atomic_write_bytes,
    atomic_write_json,
    fsync_folder,
    make_folder,
    storage_errors,
    temporary_name,
)  # fmt: skip
from tools.leaderboard import text
from tools.leaderboard.evidence import Refused, Run
from tools.leaderboard.group_checks import Others
from tools.leaderboard.strict import LARGEST, is_number, is_whole, parse_object, read_bytes
from tools.leaderboard.submission import Blob, Record, changed_since, read_record
from tools.leaderboard.tracks import BUILT_IN, Track
from tools.leaderboard.verify import Verdict, read_runs, remember, verify_record

FORMAT = "engaging-nanogpt board 1"
MOST_RECORDS, MOST_TRACKS = 10_000, 50
PACKED_MEMORY = 256 << 20  # bytes that unpacking a file may use


@dataclass(frozen=True)
class Term:
    """A term of a course: what was handed in from its first day to the next term's."""

    name: str
    first: datetime.date


@dataclass(frozen=True)
class Board:
    """An existing board. `terms` are in the order of their days."""

    folder: Path
    title: str
    tracks: dict[str, Track]
    terms: tuple[Term, ...] = ()

    @property
    def records(self) -> Path:
        """The folder of the records."""
        return self.folder / "records"

    def _blob(self, digest: str) -> Path:
        return self.folder / "evidence" / digest[:2] / f"{digest}.xz"

    def add(self, record: Record, blobs: Sequence[bytes]) -> Path:
        """Publish a record with its evidence. UserError when it is there already."""
        path = self.records / f"{record.id}.json"
        if path.exists():
            raise UserError(f"{path}: these runs are on the board already; submit other runs")
        make_shared(
            self.records, self.folder
        )  # first: by it the folder is known as a board to all who come now
        for data in blobs:
            target = self._blob(hashlib.sha256(data).hexdigest())
            if not target.exists():
                make_shared(target.parent.parent, self.folder)
                make_shared(target.parent, self.folder)
                atomic_write_bytes(target, lzma.compress(data, preset=4))
                share(target, self.folder)
        publish_once(path, record.to_json())
        share(path, self.folder)
        return path

    def unpack(self, record: Record, folder: Path) -> tuple[list[Path], Path | None]:
        """Write a record's evidence under `folder`: (one run directory a run, the folder of the data's manifest)."""
        paths = []
        for number, entry in enumerate(record.runs, 1):
            place = folder / f"run-{number}"
            place.mkdir(parents=True)
            for name, known in entry.files.items():
                (place / name).write_bytes(self._read(known, f"run {number}: {name}"))
            modded = set(entry.files) == {"log.txt"}
            paths.append(place / "log.txt" if modded else place)
        if record.data is None:
            return paths, None
        (folder / "data").mkdir()
        (folder / "data" / MANIFEST).write_bytes(self._read(record.data, "the data's manifest"))
        return paths, folder / "data"

    def beside(self, record: Record, run: Run) -> Record:
        """`record`, whose first run is `run`, with what it changed: against the best of its track and hardware that
        was not withdrawn. Where there is none, or none of its kind of log, as it was."""
        gone = {path.stem for path in (self.folder / "retracted").glob("*.json")}
        metric = "steps" if self.tracks[record.track].metric == "steps" else "seconds"
        others = [
            other
            for _, other in self.read_records()
            if isinstance(other, Record) and _peers(other, record) and other.id not in gone
        ]
        for other in sorted(others, key=lambda other: getattr(other, metric))[:1]:
            with contextlib.suppress(UserError, Refused):  # damaged: `verify` of the board says so
                before = self.first_run(other)
                if before.kind == run.kind:
                    changed = changed_since(before, run)
                    return record.model_copy(update={"against": other.id, "changed": changed})
        return record

    def first_run(self, record: Record) -> Run:
        """The first run of a record, from its evidence. UserError or Refused when that is not there."""
        alone = record.model_copy(update={"runs": record.runs[:1], "data": None})
        with tempfile.TemporaryDirectory(prefix="engaging-board-") as folder:
            return read_runs(self.unpack(alone, Path(folder))[0])[0]

    def earlier(self, record: Record) -> Run:
        """The first run of what a record says it is held `against`. UserError when that is not earlier, or no peer."""
        other = read_record(self.records / f"{record.against}.json")
        if not _peers(other, record) or other.submitted >= record.submitted:
            raise UserError(f"{record.against}: is no earlier record of this track and hardware")
        return self.first_run(other)

    def _read(self, known: Blob, what: str) -> bytes:
        """A file of the evidence. Refused when it is missing, damaged, or not what its digest says."""
        path = self._blob(known.sha256)
        try:
            packed = read_bytes(path, known.bytes + (1 << 20))
            worker = lzma.LZMADecompressor(format=lzma.FORMAT_XZ, memlimit=PACKED_MEMORY)
            data = worker.decompress(packed, max_length=known.bytes + 1)
        except UserError:
            raise Refused("evidence", f"{what}: is not among the board's evidence") from None
        except (lzma.LZMAError, EOFError):
            raise Refused("evidence", f"{what}: its evidence is damaged") from None
        if len(data) != known.bytes or hashlib.sha256(data).hexdigest() != known.sha256:
            raise Refused("evidence", f"{what}: its evidence is not what the record's digest says")
        if not worker.eof or worker.unused_data:
            raise Refused(
                "evidence", f"{what}: its evidence is damaged: its end is missing, or is not its end"
            )
        return data

    def record_named(self, name: str) -> Record:
        """The record of that id. UserError when there is none, or it is damaged."""
        path = self.records / f"{name}.json"
        if not path.exists() and not path.is_symlink():
            known = sorted(one.stem for one in self.records.glob("*.json"))
            there = f"there are {', '.join(known[:4])}" + (", ..." if len(known) > 4 else "")
            raise UserError(
                f"{name}: {self.folder} has no record of this id{nearest(name, known)} "
                f"({there if known else 'there is none yet'})"
            )
        return read_record(path)

    def read_records(self) -> Iterator[tuple[Path, Record | CommandError]]:
        """Every record by its date, those that cannot be read with the reason."""
        if not self.records.is_dir():
            return
        paths = sorted(
            path for path in self.records.iterdir() if path.suffix == ".json" and path.name[0] != "."
        )
        if len(paths) > MOST_RECORDS:
            raise UserError(f"{self.records}: {len(paths):,} records; at most {MOST_RECORDS:,} are read")
        found: list[tuple[Path, Record | CommandError]] = []
        for path in paths:
            try:
                found.append((path, read_record(path)))
            except CommandError as error:
                found.append((path, error))
        last = datetime.datetime.max.replace(tzinfo=datetime.timezone.utc)
        found.sort(key=lambda row: (row[1].submitted if isinstance(row[1], Record) else last, row[0].name))
        yield from found

    def verdicts(self) -> Iterator[tuple[Path, Verdict | CommandError]]:
        """Every record verified, the earlier ones first: of two that are one, the second is refused."""
        others = Others.none()
        for path, record in self.read_records():
            if isinstance(record, CommandError):
                yield path, record
                continue
            try:
                verdict = verify_record(record, self.unpack, self.tracks, others, self.earlier)
            except CommandError as error:
                yield path, error
                continue
            if verdict.accepted:
                remember(others, record)
            yield path, verdict

    def others(self) -> Others:
        """What the board has, by what its records say: quick, for the checks of a new submission."""
        others = Others.none()
        for _, record in self.read_records():
            if isinstance(record, Record):
                remember(others, record)
        return others


def _peers(other: Record, record: Record) -> bool:
    """Whether `other` is a record that `record` can be held beside."""
    return (other.track, other.hardware, other.kind) == (record.track, record.hardware, "record")


def shared(folder: Path) -> bool:
    """Whether a board is a group's: then its files are too, whatever the umask of who writes them."""
    return bool(folder.stat().st_mode & stat.S_IWGRP)


def share(path: Path, folder: Path) -> None:
    """Let all read a file, and the group add to a folder, of the board in `folder` when that is a group's."""
    if shared(folder):
        with contextlib.suppress(OSError):  # somebody else's: its owner has done it
            path.chmod(0o3775 if path.is_dir() else 0o644)


def make_shared(path: Path, folder: Path) -> None:
    """`make_folder`, for a folder of the board in `folder`."""
    new = not path.is_dir()
    make_folder(path)
    if new:
        share(path, folder)


def publish_once(path: Path, data: bytes) -> None:
    """Write `path`, whole, unless it exists: UserError then. Safe against any number of others doing the same."""
    temporary = temporary_name(path)
    with storage_errors(path):
        try:
            with temporary.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.link(temporary, path)
            fsync_folder(path.parent)
        except FileExistsError:
            raise UserError(f"{path}: is there already; a record is written once") from None
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)


def is_board(folder: Path) -> bool:
    """Whether `folder` holds a board."""
    return (folder / "board.json").is_file() or (folder / "records").is_dir()


def open_board(folder: Path) -> Board:
    """The board in `folder`. UserError when there is none, or its board.json is not as it must be."""
    if not folder.is_dir():
        raise UserError(f"{folder}: is not a folder; a new board: engaging leaderboard init {folder}")
    path, title, tracks = folder / "board.json", "Leaderboard", dict(BUILT_IN)
    if not is_board(folder) and any(name.name[0] != "." for name in folder.iterdir()):
        raise UserError(
            f"{folder}: is no board (it has no board.json and no records/); name the board's folder first"
        )
    if not path.exists():
        return Board(folder, title, tracks)
    found = parse_object(read_bytes(path, LARGEST), str(path))
    unknown = sorted(found.keys() - {"format", "title", "tracks", "terms"})
    if found.get("format") != FORMAT or unknown:
        shown = ascii(unknown[0] if unknown else found.get("format"))[:60]
        raise UserError(
            f"{path}: {'format' if not unknown else 'key'}: {shown}: expected a board's {FORMAT!r}"
        )
    title = text.line_of(found.get("title", title), f"{path}: title", 80)
    rows = found.get("tracks", [])
    if not isinstance(rows, list) or len(rows) > MOST_TRACKS:
        raise UserError(f"{path}: tracks: expected a list of at most {MOST_TRACKS}")
    for number, row in enumerate(rows):
        track = _track(row, f"{path}: tracks[{number}]")
        tracks[track.name] = track
    return Board(folder, title, tracks, _terms(found.get("terms", []), f"{path}: terms"))


def _terms(rows: object, where: str) -> tuple[Term, ...]:
    """A board's terms; UserError names the field."""
    if not isinstance(rows, list) or len(rows) > MOST_TRACKS:
        raise UserError(f"{where}: expected a list of at most {MOST_TRACKS}")
    found = []
    for number, row in enumerate(rows):
        if not isinstance(row, dict) or row.keys() != {"name", "from"}:
            raise UserError(
                f"{where}[{number}]: expected name and from; terms are made by: engaging leaderboard term"
            )
        found.append(
            Term(text.line_of(row["name"], f"{where}[{number}].name", 40), day_of(row["from"], where))
        )
    if len({term.name for term in found}) < len(found) or len({term.first for term in found}) < len(found):
        raise UserError(f"{where}: two have one name, or begin on one day")
    return tuple(sorted(found, key=lambda term: term.first))


def day_of(said: object, where: str) -> datetime.date:
    """A date as 2026-09-01. UserError for anything else."""
    try:
        return datetime.datetime.strptime(said if isinstance(said, str) else "", "%Y-%m-%d").date()
    except ValueError:
        raise UserError(f"{where}: {ascii(said)[:40]}: expected a day such as 2026-09-01") from None


def _track(row: object, where: str) -> Track:
    """A board's own track; UserError names the field."""
    fields = Track.__dataclass_fields__
    if not isinstance(row, dict) or (unknown := sorted(row.keys() - fields.keys())):
        raise UserError(
            f"{where}: {ascii(unknown[0])[:40] if isinstance(row, dict) else 'expected an object'}: no field"
        )
    needed = ("name", "title", "target", "metric", "test", "val_sha256", "val_tokens", "vocab_size")
    if missing := [name for name in needed if name not in row]:
        raise UserError(f"{where}: {missing[0]}: missing; tracks are made by: engaging leaderboard track")
    checks = {
        "name": lambda v: isinstance(v, str) and v.isascii() and v.replace("-", "").replace("_", "").isalnum(),
        "target": lambda v: is_number(v, 0, 100), "alpha": lambda v: is_number(v, 1e-9, 0.5),
        "metric": lambda v: v in ("seconds", "steps"), "test": lambda v: v in ("t", "z", "mean"),
        "val_sha256": lambda v: isinstance(v, str) and len(v) == 64 and set(v) <= set("0123456789abcdef"),
        "val_tokens": lambda v: is_whole(v, 1), "vocab_size": lambda v: is_whole(v, 2, 10**6),
        "min_runs": lambda v: is_whole(v, 1, 100), "loss_floor": lambda v: is_number(v, 0, 100),
        "flops_per_token": lambda v: is_number(v, 0, 1e15), "marks": lambda v: isinstance(v, bool),
        "entries": lambda v: isinstance(v, list) and all(isinstance(one, str) for one in v),
        "recipes": lambda v: isinstance(v, list) and all(isinstance(one, str) for one in v),
        "template": lambda v: isinstance(v, list) and len(v) == 2 and all(isinstance(one, str) for one in v),
        "pinned": lambda v: isinstance(v, dict) and all(isinstance(one, str) for one in v.values()),
    }  # fmt: skip
    for name, good in checks.items():
        if name in row and not good(row[name]):
            raise UserError(f"{where}: {name}: {ascii(row[name])[:60]}: not a value that it may have")
    if row["name"] in BUILT_IN:
        raise UserError(f"{where}: name: {row['name']}: is a built-in track; choose another name")
    text.line_of(row["title"], f"{where}: title", 80)
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in row.items()}
    return Track(**values)


def add_track(folder: Path, title: str | None, track: Track) -> Board:
    """Add a track to the board in `folder`, which is made when it is not there. UserError: the name is taken."""
    make_folder(folder / "records")
    board = open_board(folder)
    if track.name in board.tracks:
        raise UserError(f"--name={track.name}: the board has a track of that name; choose another")
    _track(json.loads(json.dumps(asdict(track))), "--name")
    tracks = {**board.tracks, track.name: track}
    return _save(replace(board, title=title or board.title, tracks=tracks))


def add_term(folder: Path, term: Term) -> Board:
    """Add a term to the board in `folder`, or move its first day. UserError: another one begins on that day."""
    board = open_board(folder)
    terms = (*(one for one in board.terms if one.name != term.name), term)
    _terms([_term_row(one) for one in terms], "--from")
    return _save(replace(board, terms=terms))


def _term_row(term: Term) -> dict[str, str]:
    return {"name": term.name, "from": term.first.isoformat()}


def _save(board: Board) -> Board:
    """Write board.json. UserError on a group's board that is somebody else's: its manager does that."""
    path = board.folder / "board.json"
    if path.exists() and path.stat().st_uid != os.getuid() and shared(board.folder):
        raise UserError(f"{path}: belongs to the board's manager, who alone changes it")
    tracks = [asdict(one) for name, one in board.tracks.items() if name not in BUILT_IN]
    said = {"format": FORMAT, "title": board.title, "tracks": tracks}
    if board.terms:
        said["terms"] = [_term_row(term) for term in board.terms]
    atomic_write_json(path, said)
    if shared(board.folder):
        path.chmod(0o644)
    return open_board(board.folder)
