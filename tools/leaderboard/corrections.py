"""Withdrawing and correcting: a second small file beside a record, because a record itself is never changed.

    retracted/<id>.json     {"format", "id", "reason", "by", "at", "description"}; the last but one correct a text

Who may: the account that handed the record in, and the board's manager (the owner of its folder). It is looked up again
when the board is read: a file that somebody else has put there counts for nothing.
"""

import datetime
import getpass
import json
import os
from dataclasses import dataclass
from pathlib import Path

from nanogpt.common.errors import UserError
from nanogpt.common.storage import atomic_write_json
from tools.leaderboard import text
from tools.leaderboard.board import FORMAT, Board, make_shared, share
from tools.leaderboard.strict import LARGEST, parse_object, read_bytes

NAME = "retracted"
KEYS = {"format", "id", "reason", "by", "at", "description"}


@dataclass(frozen=True)
class Correction:
    """What was said of a record afterwards: with a `description` it stays on the board under that, else it goes."""

    id: str
    reason: str
    by: str
    at: datetime.datetime
    description: str = ""

    @property
    def withdraws(self) -> bool:
        """Whether the record is gone from the board."""
        return not self.description


def write(board: Board, name: str, reason: str, description: str = "") -> Path:
    """Withdraw a record, or give it another description. UserError: no such record, or not yours."""
    record = board.record_named(name)
    if os.getuid() not in _allowed(board, record.id):
        raise UserError(f"{name}: only who handed it in and the board's manager may withdraw or correct it")
    made = {
        "format": FORMAT, "id": record.id, "reason": text.line_of(reason, "--reason", text.DESCRIPTION),
        "by": getpass.getuser()[:120], "at": datetime.datetime.now(datetime.timezone.utc).isoformat(),
    }  # fmt: skip
    if description:
        made["description"] = text.line_of(description, "--description", text.DESCRIPTION)
    path = board.folder / NAME / f"{record.id}.json"
    make_shared(path.parent, board.folder)
    atomic_write_json(path, made)
    share(path, board.folder)
    return path


def _allowed(board: Board, name: str) -> set[int]:
    return {(board.records / f"{name}.json").stat().st_uid, board.folder.stat().st_uid}


def read(board: Board) -> dict[str, Correction]:
    """Record's id -> what was said of it. UserError names the file and the field."""
    found = {}
    for path in sorted((board.folder / NAME).glob("*.json")):
        name = path.stem
        if not (board.records / f"{name}.json").is_file() or path.lstat().st_uid not in _allowed(board, name):
            continue
        values = parse_object(read_bytes(path, LARGEST), str(path))
        if values.get("format") != FORMAT or values.get("id") != name or values.keys() - KEYS:
            raise UserError(f"{path}: is not what `retract` writes; remove it, and retract again")
        try:
            at = datetime.datetime.fromisoformat(str(values.get("at")))
        except ValueError:
            raise UserError(f"{path}: at: {ascii(values.get('at'))[:40]}: expected a date and time") from None
        said = {
            key: text.line_of(values.get(key, ""), f"{path}: {key}", text.DESCRIPTION)
            for key in ("reason", "by")
        }
        new = values.get("description", "")
        said["description"] = text.line_of(new, f"{path}: description", text.DESCRIPTION) if new else ""
        found[name] = Correction(name, at=at, **said)
    return found


def init(folder: Path, title: str) -> Path:
    """Make a board that a group can write to and only owners can delete from. UserError when one is there."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder}: exists and is not empty; name a new folder")
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(
        0o3775
    )  # the group writes whatever anybody's umask is; nobody deletes what another has handed in
    for name in ("records", "evidence", NAME):
        make_shared(folder / name, folder)
    path = folder / "board.json"
    path.write_text(
        json.dumps({"format": FORMAT, "title": text.line_of(title, "--title", 80), "tracks": []}) + "\n"
    )
    path.chmod(0o644)
    return folder
