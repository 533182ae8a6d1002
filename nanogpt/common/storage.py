"""Writes that survive a crash: a reader sees the old file or the new one, never half of one.

Each write goes to a temporary file in the same folder, is flushed to the disk, takes the final name in one step,
and the folder is flushed too (the rename itself lives there). Errors of the file system become StorageError.
"""

import contextlib
import errno
import hashlib
import json
import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from nanogpt.common.errors import StorageError

_REMEDIES = {
    errno.ENOSPC: "the disk is full: free space, or choose a folder on another file system",
    errno.EDQUOT: "your quota is used up: delete something, or choose a folder on another file system",
    errno.EROFS: "the file system is read-only: choose another folder",
    errno.EACCES: "permission denied: choose a folder that you may write to",
    errno.EPERM: "permission denied: choose a folder that you may write to",
    errno.EFBIG: "the file-size limit was reached (ulimit -f, or a quota)",
    errno.EIO: "the device reports an I/O error: choose another file system and tell its administrator",
    errno.ENOENT: "the folder has vanished",
    errno.ENOTDIR: "a file is in the place of the folder: choose another path",
}


@contextlib.contextmanager
def storage_errors(path: Path | str) -> Iterator[None]:
    """Turns an OSError inside the block into a StorageError that names `path` and the remedy."""
    try:
        yield
    except OSError as error:
        remedy = _REMEDIES.get(error.errno or 0, error.strerror or str(error))
        raise StorageError(f"{path}: cannot be written: {remedy}") from error


def sha256_of(file: BinaryIO) -> str:
    """The SHA-256, in hex digits, of what follows in an open file (Python has its own from 3.11 on)."""
    total, buffer = hashlib.sha256(), bytearray(1 << 18)
    room = memoryview(buffer)
    while size := file.readinto(buffer):
        total.update(room[:size])
    return total.hexdigest()


def temporary_name(path: Path) -> Path:
    """A name beside `path` that no other process, on this host or another, uses."""
    return path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.tmp")


def fsync_folder(folder: Path) -> None:
    """Make the names in `folder` durable. File systems that cannot do that for a folder say EINVAL: no loss there."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def atomic_write_bytes(path: Path, *data: bytes | memoryview) -> None:
    """Replace `path` by `data` (pieces are joined), or leave it as it was. StorageError: full, quota, permission."""
    path = Path(path)
    temporary = temporary_name(path)
    with storage_errors(path):
        try:
            with temporary.open("wb") as file:
                file.writelines(data)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
            fsync_folder(path.parent)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise


def atomic_write_text(path: Path, text: str) -> None:
    """`atomic_write_bytes` of UTF-8 text."""
    atomic_write_bytes(path, text.encode("utf-8"))


def atomic_write_json(path: Path, value: object) -> None:
    """`atomic_write_bytes` of JSON: indented, no NaN or Infinity (they are not JSON)."""
    atomic_write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def make_folder(path: Path) -> None:
    """Create a folder and its parents; StorageError when that is not possible."""
    with storage_errors(path):
        path.mkdir(parents=True, exist_ok=True)


def check_room(folder: Path, num_bytes: int) -> None:
    """StorageError unless the file system of `folder` has `num_bytes` to spare. (Quotas show only on writing.)"""
    with storage_errors(folder):
        free = shutil.disk_usage(folder).free
    if free < num_bytes:
        raise StorageError(
            f"{folder}: needs {num_bytes / 1e9:.2f} GB, the disk has {free / 1e9:.2f} GB free: free space, "
            "or choose a folder on another file system"
        ) from OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
