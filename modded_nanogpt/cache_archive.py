"""One packed compile cache and the manifest beside it: whom it belongs to, what it may hold, how a file gets its place.

Whoever can write an archive can run code here: one that others own or may write is Unusable, and so is a name that
leads out of the folders.
"""

import contextlib
import hashlib
import json
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from nanogpt.common.compiler import FOLDERS

LARGEST = 2 << 30  # bytes of one archive's files
MOST_FILES, LARGEST_MANIFEST = 100_000, 32 << 20


class Unusable(Exception):
    """An archive that is left alone; the message says why."""


@dataclass(frozen=True)
class Manifest:
    """What stands beside an archive."""

    path: Path  # of the manifest
    sha256: str  # of the archive
    files: dict[str, int]  # "inductor/..." or "triton/...": bytes

    @property
    def archive(self) -> Path:
        """The archive's path."""
        return self.path.with_suffix(".tar.gz")


def read_manifest(path: Path) -> Manifest:
    """The manifest at `path`. Unusable when it is another user's, or not what `keep` writes; OSError, ValueError."""
    with trusted(path) as file:
        text = file.read(LARGEST_MANIFEST + 1)
    if len(text) > LARGEST_MANIFEST:
        raise Unusable("its manifest is too large")
    value = json.loads(text)
    sha256, files = value["sha256"], value["files"]
    if len(files) > MOST_FILES or sum(files.values()) > LARGEST:
        raise Unusable("it is larger than what is packed here")
    if not isinstance(sha256, str) or not all(check_name(name) and size >= 0 for name, size in files.items()):
        raise Unusable("its manifest is damaged")
    return Manifest(path, sha256, files)


def check_name(name: str) -> bool:
    """True for a path inside of one of the folders; Unusable for any other."""
    parts = PurePosixPath(name).parts
    plain = len(parts) > 1 and parts[0] in FOLDERS and "/".join(parts) == name and len(name) < 1000
    if not plain or ".." in parts or not name.isprintable() or "\\" in name:
        raise Unusable(f"its manifest names {name[:100]!r}, which is no path inside of a cache")
    return True


@contextlib.contextmanager
def trusted(path: Path) -> Iterator[BinaryIO]:
    """The file at `path`, open for reading, when it is this user's and nobody else may write it. Unusable, OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(descriptor, "rb") as file:
        state = os.fstat(descriptor)
        if not stat.S_ISREG(state.st_mode):
            raise Unusable("is not a file")
        if state.st_uid != os.getuid():
            raise Unusable(f"belongs to another user ({state.st_uid})")
        if state.st_mode & 0o022:
            raise Unusable(f"others may write it (mode {stat.S_IMODE(state.st_mode):o})")
        yield file


def private(path: Path) -> BinaryIO:
    """A new file that only this user may read and write, whatever the umask."""
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "wb")


class Hashing:
    """Passes bytes on to a file, and hashes them."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.digest = file, hashlib.sha256()

    def write(self, data: bytes) -> int:
        """Write and hash."""
        self.digest.update(data)
        return self.file.write(data)

    def flush(self) -> None:
        """For gzip."""
        self.file.flush()


def move_in(source: Path, target: Path) -> None:
    """Give an unpacked file its place, unless another process has been quicker."""
    if target.exists():
        return
    if target.name.startswith("__grp__"):
        children = json.loads(source.read_text())["child_paths"]
        moved = {name: str(target.parent / Path(path).name) for name, path in children.items()}
        source.write_text(json.dumps({"child_paths": moved}))
    target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    source.replace(target)
