"""The trainer's source as evidence: collected, hashed, copied beside the run, written into the log, and got back.

A log opens like this, and holds enough to rebuild the folder that ran, byte for byte:

    engaging-nanogpt log 1
    source <files> files sha256 <digest>
    file <bytes> <sha256> <path>
    <the file's bytes>
    ...
    end of source
"""

import difflib
import hashlib
import os
import re
import shutil
from pathlib import Path

from nanogpt.common.errors import UserError
from nanogpt.common.storage import fsync_folder, make_folder, storage_errors

FIRST_LINE = "engaging-nanogpt log 1"
LAST_LINE = "end of source"
NEW_SOURCE = "new source "  # begins the line after which an attempt ran other source
LARGEST_FILE, MOST_FILES = 1 << 20, 1000  # a log is a stranger's text: limits before work
_PATH = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*(/[A-Za-z0-9_][A-Za-z0-9_.-]*)*")


def collect(root: Path, folders: tuple[str, ...]) -> dict[str, bytes]:
    """The Python files under `root`/<folder> for each folder, as {path relative to root: bytes}, sorted.

    Run directories are left out: one made with a relative --out_dir may lie in the trainer's own folder.
    """
    found = {}
    for folder in folders:
        for path, subfolders, names in os.walk(root / folder):
            if "log.txt" in names:
                subfolders.clear()
                continue
            for name in names:
                relative = (Path(path) / name).relative_to(root).as_posix()
                if name.endswith(".py") and _PATH.fullmatch(relative):
                    found[relative] = (root / relative).read_bytes()
    return dict(sorted(found.items()))


def digest(files: dict[str, bytes]) -> str:
    """One SHA-256 over all paths and contents (hex)."""
    total = hashlib.sha256()
    for path, data in sorted(files.items()):
        total.update(f"{path}\0{hashlib.sha256(data).hexdigest()}\n".encode())
    return total.hexdigest()


def write_folder(files: dict[str, bytes], folder: Path) -> None:
    """Write the files under `folder`, which appears complete or not at all."""
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    with storage_errors(folder):
        for path, data in files.items():
            target = temporary / path
            make_folder(target.parent)
            target.write_bytes(data)
        temporary.rename(folder)
        fsync_folder(folder.parent)


def replace_folder(files: dict[str, bytes], folder: Path) -> None:
    """As `write_folder`, in the place of a folder that is there, which is deleted."""
    old = folder.with_name(f".{folder.name}.{os.getpid()}.old")
    with storage_errors(folder):
        if folder.exists():
            folder.rename(old)
        write_folder(files, folder)
        shutil.rmtree(old, ignore_errors=True)


def changed(old: dict[str, bytes], new: dict[str, bytes]) -> list[str]:
    """The paths whose contents differ."""
    return sorted(path for path in old.keys() | new.keys() if old.get(path) != new.get(path))


def change_to_log(old: dict[str, bytes], new: dict[str, bytes], attempt: int) -> bytes:
    """What a log says of an attempt that goes on with other source: a line with the digests, the difference."""
    lines = [f"{NEW_SOURCE}from attempt {attempt} on sha256 {digest(new)} in place of {digest(old)}"]
    for path in changed(old, new):
        texts = [files.get(path, b"").decode("utf-8", "replace").splitlines() for files in (old, new)]
        lines += difflib.unified_diff(*texts, f"a/{path}", f"b/{path}", lineterm="")
    return "".join(f"{line}\n" for line in [*lines, "end of new source"]).encode()


def to_log(files: dict[str, bytes]) -> bytes:
    """The head of a log."""
    parts = [f"{FIRST_LINE}\nsource {len(files)} files sha256 {digest(files)}\n".encode()]
    for path, data in sorted(files.items()):
        parts.append(f"file {len(data)} {hashlib.sha256(data).hexdigest()} {path}\n".encode())
        parts += [data, b"\n"]
    return b"".join([*parts, f"{LAST_LINE}\n".encode()])


def from_log(path: Path) -> tuple[dict[str, bytes], str]:
    """(files, text after the source) of a log. UserError when the log is not whole, or its digests do not agree.

    Nothing in the log is executed, and no path in it can point outside the folder it is written to.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}; expected the log.txt of a run") from None
    position = 0

    def line() -> str:
        nonlocal position
        end = data.find(b"\n", position, position + 4096)
        if end < 0:
            raise UserError(f"{path}: the log ends inside its source; it was cut, and cannot be reproduced")
        text, position = data[position:end].decode("utf-8", "replace"), end + 1
        return text

    if not data.startswith(FIRST_LINE.encode() + b"\n"):
        raise UserError(f"{path}: not a run's log (its first line is not {FIRST_LINE!r})")
    line()
    head = re.fullmatch(r"source (\d{1,4}) files sha256 ([0-9a-f]{64})", line())
    if not head or int(head[1]) > MOST_FILES:
        raise UserError(f"{path}:2: expected 'source N files sha256 DIGEST'; the log was changed")
    files: dict[str, bytes] = {}
    for _ in range(int(head[1])):
        entry = re.fullmatch(r"file (\d{1,8}) ([0-9a-f]{64}) (\S+)", line())
        if not entry or int(entry[1]) > LARGEST_FILE or not _PATH.fullmatch(entry[3]) or entry[3] in files:
            raise UserError(f"{path}: a file's heading in the source is damaged; the log was changed")
        content = data[position : position + int(entry[1])]
        position += int(entry[1]) + 1
        if hashlib.sha256(content).hexdigest() != entry[2]:
            raise UserError(
                f"{path}: {entry[3]} does not have the digest the log gives for it; the log was changed"
            )
        files[entry[3]] = content
    if line() != LAST_LINE or digest(files) != head[2]:
        raise UserError(
            f"{path}: the source does not have the digest the log gives for it; the log was changed"
        )
    return files, data[position:].decode("utf-8", "replace")
