"""Reading many files: in one process per CPU when there is enough to read, with its progress shown."""

import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

from nanogpt.common.progress import Progress

PARALLEL_FROM = 48 << 20  # bytes: less is read sooner than processes start
MOST_PROCESSES = 8


class Jobs:
    """`with Jobs(files) as jobs: jobs.map(...)`; `files` are what will be read in all."""

    def __init__(self, files: Iterable[Path]) -> None:
        self.total, self.done = sum(map(size, files)), 0
        cpus = min(MOST_PROCESSES, len(os.sched_getaffinity(0)))
        self._pool = None
        self._bar = Progress("reading")
        if self.total >= PARALLEL_FROM and cpus > 1:
            self._pool = ProcessPoolExecutor(cpus, mp_context=get_context("spawn"))

    def __enter__(self) -> "Jobs":
        if self._pool is not None:
            self._bar.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        if self._pool is not None:
            self._bar.__exit__(None, None, None)
            self._pool.shutdown(cancel_futures=True)

    def map(self, function: Callable, arguments: Sequence[tuple], sizes: Iterable[int]) -> list:
        """`[function(*each) for each in arguments]`; the first error, in that order, is raised.

        `sizes`: the bytes that each of them reads.
        """
        if self._pool is None or not arguments:
            return [function(*each) for each in arguments]
        found = []
        for result, number in zip(
            self._pool.map(function, *zip(*arguments, strict=True)), sizes, strict=True
        ):
            found.append(result)
            self.done += number
            self._bar.update(self.done, self.total)
        return found


def size(path: Path) -> int:
    """Bytes of a file; 0 when it is not there."""
    try:
        return path.stat().st_size
    except OSError:
        return 0
