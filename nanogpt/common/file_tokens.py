"""Tokens of a file that its file system does not map into memory, read a piece at a time as they are asked for."""

import errno
import functools
import os
import sys
from pathlib import Path

import numpy as np

# What mmap says where it is not there at all (some network and FUSE mounts), rather than that a file is broken.
NOT_MAPPED = (errno.ENODEV, errno.ENOSYS, errno.EOPNOTSUPP)


class FileTokens:
    """`count` uint16 tokens from byte `offset` of a file: `len`, slices and numpy functions work as on a mapped file.

    OSError, and EOFError for a file that has shrunk, come from the reading itself.
    """

    dtype = np.dtype("<u2")
    ndim = 1

    def __init__(self, path: Path, offset: int, count: int) -> None:
        self.path, self.offset, self.shape = path, offset, (count,)
        self._file = path.open("rb", buffering=0)
        say_once(path.parent)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, place: slice | int) -> np.ndarray:
        """uint16 [n], read now; an index gives one token."""
        if not isinstance(place, slice):
            return self[place : place + 1 or None][0]
        start, stop, step = place.indices(len(self))
        if step != 1:
            raise ValueError("tokens of a file are read in one direction, all of them")
        data = np.empty(max(0, stop - start), self.dtype)
        view, done = memoryview(data).cast("B"), 0
        while done < len(view):  # one read may give less: 2 GiB at most, or what the server sends at once
            got = os.preadv(self._file.fileno(), [view[done:]], self.offset + 2 * start + done)
            if got == 0:
                raise EOFError(f"{self.path}: has become shorter while in use")
            done += got
        return data

    def __array__(self, dtype: np.dtype | None = None, copy: bool | None = None) -> np.ndarray:
        return self[:] if dtype is None else self[:].astype(dtype)


@functools.cache
def say_once(folder: Path) -> None:
    """Tell the person, on rank 0, that this is the slower way."""
    if os.environ.get("RANK", "0") == "0":
        print(
            f"note: {folder}: its file system does not map files into memory (mmap), so tokens are read as they are "
            "needed; a copy on a local disk is faster: --data_root",
            file=sys.stderr,
            flush=True,
        )
