"""Going on where an earlier preparation stopped, and mending a finished set in which a shard is damaged."""

import contextlib
import dataclasses
import hashlib
import re
import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from nanogpt.common.download import ABANDONED_SECONDS, process_alive
from nanogpt.common.errors import UserError
from nanogpt.common.manifest import MANIFEST, read_json
from nanogpt.common.shards import HEADER_BYTES, PROGRESS
from nanogpt.common.storage import sha256_of
from nanogpt.data.token_stream import Start, State


def recover(folder: Path, made_from: dict[str, object], report: Callable[[str], None]) -> State | None:
    """The state to go on from in `folder`, or None when the set there is complete and every byte is right.

    UserError when `folder` holds something made from other documents or with other settings.
    Damage never stops the work: it goes on from the shard before; `report` gets a line that names the file.
    """
    remove_abandoned(folder)
    finished = (folder / MANIFEST).exists()
    try:
        found = read_json(folder / (MANIFEST if finished else PROGRESS))
    except UserError as error:
        if finished or (folder / PROGRESS).exists():
            report(f"{error}; starting again")
        (folder / MANIFEST).unlink(missing_ok=True)
        return State()
    if found.get("made_from") != made_from:
        raise UserError(
            f"{folder}: holds a set made otherwise ({_difference(found.get('made_from'), made_from)}); "
            "repeat the flags it was made with, choose another --name, or move the folder away"
        )
    try:
        return _whole(folder, found, report) if finished else _part(folder, found, report)
    except (KeyError, TypeError, ValueError, OSError) as error:
        report(f"{folder}: what was done cannot be used ({type(error).__name__}: {error}); starting again")
        return State()


def remove_abandoned(folder: Path) -> None:
    """Delete temporary files of this host's dead processes, and old ones: a killed run leaves a whole shard."""
    for path in folder.glob(".*.tmp"):
        host, _, pid = path.name.removesuffix(".tmp").rpartition(".")
        with contextlib.suppress(OSError):
            old = time.time() - path.stat().st_mtime > ABANDONED_SECONDS
            own = host.endswith(f".{socket.gethostname()}") and pid.isdigit()
            if old or (own and not process_alive(int(pid))):
                path.unlink()


def _part(folder: Path, found: dict, report: Callable[[str], None]) -> State:
    """From progress.json: its shards as far as they are right, the validation tokens that belong to them."""
    files, start = found["files"], _start(found["start"])
    parts = sorted(folder.glob("val_part_*.u16"))
    val = np.concatenate([np.empty(0, np.uint16), *(np.fromfile(path, "<u2") for path in parts)])
    # A part newer than the progress file is there when the run ended between the two.
    val = val[: start.val_tokens].astype(np.uint16)
    if hashlib.sha256(val.astype("<u2").tobytes()).hexdigest() != found["val_sha256"]:
        raise ValueError("the validation tokens so far are damaged")
    return _up_to_damage(folder, State(files, start, val, found["commit"]), report)


def _whole(folder: Path, found: dict, report: Callable[[str], None]) -> State | None:
    """From a manifest: None when all is right, else the state before the first damaged shard."""
    trains = [entry for entry in found["files"] if entry["split"] == "train"]
    (val_entry,) = (entry for entry in found["files"] if entry["split"] == "val")
    if not _right(folder, val_entry):
        report(f"{folder / val_entry['name']}: damaged; making the set again")
        (folder / MANIFEST).unlink()
        return State()
    val = np.fromfile(folder / val_entry["name"], "<u2", offset=HEADER_BYTES).astype(np.uint16)
    state = _up_to_damage(folder, State(trains, Start(), val, found["commit"]), report)
    if len(state.files) == len(trains):
        return None
    (folder / MANIFEST).unlink()  # it vouched for a file that is not there any more
    return state


def _up_to_damage(folder: Path, state: State, report: Callable[[str], None]) -> State:
    """`state`, or the one before its first damaged shard."""
    with ThreadPoolExecutor(4) as pool:
        right = list(pool.map(lambda entry: _right(folder, entry), state.files))
    if all(right):
        return state
    first = right.index(False)
    report(f"{folder / state.files[first]['name']}: damaged; going on from there")
    start = _start(state.files[first]["start"])
    return dataclasses.replace(
        state, files=state.files[:first], start=start, val=state.val[: start.val_tokens]
    )


def _right(folder: Path, entry: dict) -> bool:
    """Whether the file of a manifest entry has the content that the entry says."""
    if not re.fullmatch(r"[\w.-]+\.bin", entry["name"]):
        raise ValueError(f"{entry['name']!r} is no shard's name")
    try:
        with (folder / entry["name"]).open("rb") as file:
            return sha256_of(file) == entry["sha256"]
    except OSError:
        return False


def _start(found: dict) -> Start:
    start = Start(**found)
    counts = (start.document, start.skip, start.val_tokens, start.chars)
    if not all(isinstance(count, int) and count >= 0 for count in counts):
        raise ValueError("a count is not a number")
    return start


def _difference(found: object, wanted: dict[str, object]) -> str:
    found = found if isinstance(found, dict) else {}
    for key in sorted({*found, *wanted}):
        if found.get(key) != wanted.get(key):
            return f"{key} was {str(found.get(key))[:60]}, is {str(wanted.get(key))[:60]}"
    return "nothing says how"
