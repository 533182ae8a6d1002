"""Where documents come from: JSON-lines or Parquet files, or a data set on the Hugging Face hub, streamed.

A source is opened at a position and read document by document; its position, a small JSON value, can be asked
for at any time and opened again later, by another process, to go on with the very next document.
"""

import contextlib
import glob
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

from nanogpt.common.download import DownloadError
from nanogpt.common.errors import UserError

Position = dict[str, object] | None  # None is the beginning
Row = dict[str, object] | None

RETRIES = 6  # failures in a row, without one document between them, before giving up
ALL_PARQUET = "**/*.parquet"
FIRST_WAIT = 1.0  # seconds before the first retry; doubled each time
# The hub's client has changed its HTTP library more than once; whose exceptions mean a bad connection:
HTTP_PACKAGES = {"httpx", "httpx2", "httpcore", "httpcore2", "requests", "urllib3", "aiohttp"}


class Source(Protocol):
    """Documents in a fixed order."""

    identity: dict[str, object]  # equal for equal documents: a resume with another one is refused
    commit: str  # the version that `open` found behind a name that can move, or nothing

    def open(self, position: Position) -> None:
        """Go to `position`."""

    def read(self) -> str | None:
        """The next document, or None at the end."""

    def position(self) -> Position:
        """Where the next `read` will be."""

    def total_bytes(self) -> int | None:
        """About how many bytes of text there are, when that is known."""


class JsonLines:
    """Files with one JSON object a line, the document under "text"; taken in the order of their names."""

    commit = ""

    def __init__(self, pattern: str) -> None:
        self.paths, self.identity = _local_files(pattern)
        self.sizes = [size for _, size in self.identity["text_files"]]
        self._lines: Iterator[bytes] = iter(())
        self._handle: contextlib.closing | None = None

    def open(self, position: Position) -> None:
        """Go to `position`: the file, the byte in it, and the line's number for messages."""
        place = position or {"file": 0, "byte": 0, "line": 0}
        self._file, self._byte, self._line = (int(place[key]) for key in ("file", "byte", "line"))
        self._open_file()

    def read(self) -> str | None:
        """The next document, or None at the end. UserError names the file and the line that is not right."""
        while self._file < len(self.paths):
            for line in self._lines:
                self._byte += len(line)
                self._line += 1
                if line.strip():
                    return document_of(line, self.paths[self._file], self._line)
            self._file, self._byte, self._line = self._file + 1, 0, 0
            self._open_file()
        return None

    def position(self) -> Position:
        """Where the next `read` will be."""
        return {"file": self._file, "byte": self._byte, "line": self._line}

    def total_bytes(self) -> int | None:
        """The size of the files, a little more than the text in them."""
        return sum(self.sizes)

    def _open_file(self) -> None:
        if self._handle is not None:
            self._handle.close()
        if self._file >= len(self.paths):
            return
        path = self.paths[self._file]
        try:
            self._handle = path.open("rb", buffering=2**20)
            self._handle.seek(self._byte)
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error.strerror}") from None
        self._lines = iter(self._handle)


def document_of(line: bytes, path: Path, number: int) -> str:
    """The document of line `number` of a JSON-lines file; UserError names file and line when there is none."""
    try:
        text = json.loads(line)["text"]
    except (ValueError, KeyError, TypeError, RecursionError):
        text = None
    if not isinstance(text, str):
        raise UserError(
            f"{path}:{number}: {line[:40]!r}: expected a JSON object with its document under "
            '"text"; a compressed file must be unpacked first'
        )
    return text


class Hub:
    """A data set of the hub that is kept as Parquet files with a "text" column, read over the network.

    `revision` may be a branch; it is resolved to a commit once, and a resumed run passes that `commit` in.
    """

    def __init__(
        self, repository: str, revision: str, commit: str = "", text_bytes: int | None = None,
        files: str = ALL_PARQUET,
    ) -> None:  # fmt: skip
        self.repository, self.revision, self.commit, self.files = repository, revision, commit, files
        self.identity = {"repository": repository, "revision": revision}
        if files != ALL_PARQUET:
            self.identity["files"] = files
        self._text_bytes = text_bytes
        self._dataset = self._documents = None

    def open(self, position: Position) -> None:
        """Go to `position`, asking the hub for the commit and the files. DownloadError when it is silent."""
        self._retry(lambda: self._connect(position))

    def read(self) -> str | None:
        """The next document, or None at the end; goes on by itself after a broken connection."""
        try:
            row = next(self._documents, None)
        except Exception as error:  # judged in _retry
            self._again = self._dataset.state_dict()
            row = self._retry(self._reconnect_and_read, error)
        if row is None:
            return None
        if not isinstance(row.get("text"), str):
            raise UserError(
                f"{self.repository}: a row without text; expected a column of strings called text"
            )
        return row["text"]

    def position(self) -> Position:
        """Where the next `read` will be."""
        return self._dataset.state_dict()

    def total_bytes(self) -> int | None:
        """What the caller knew."""
        return self._text_bytes

    def _connect(self, position: Position) -> None:
        os.environ.setdefault("USE_TORCH", "0")  # datasets would import torch, 200 MB that nobody uses here
        import datasets
        import huggingface_hub
        import pyarrow.dataset

        datasets.disable_progress_bars()
        datasets.logging.set_verbosity(datasets.logging.CRITICAL)
        huggingface_hub.logging.set_verbosity(huggingface_hub.logging.CRITICAL)
        # Quick failures: the retries that count are ours, they know the position and end in one line.
        datasets.config.STREAMING_READ_MAX_RETRIES = 1
        datasets.config.STREAMING_READ_RETRY_INTERVAL = 1
        builder, place = self._place()
        self._dataset = datasets.load_dataset(
            builder,
            **place,
            split="train",
            streaming=True,
            columns=["text"],
            batch_size=256,  # rows decoded at once; and no row groups read ahead: both bound the memory
            fragment_scan_options=pyarrow.dataset.ParquetFragmentScanOptions(pre_buffer=False),
        )
        if position is not None:
            self._dataset.load_state_dict(position)
        self._documents = iter(self._dataset)

    def _place(self) -> tuple[str, dict[str, object]]:
        """What `load_dataset` is asked for: the builder or repository, and which files."""
        import huggingface_hub

        if not self.commit:
            self.commit = huggingface_hub.HfApi().dataset_info(self.repository, revision=self.revision).sha
        return self.repository, {"revision": self.commit, "data_files": {"train": self.files}}

    def _reconnect_and_read(self) -> dict[str, object] | None:
        self._connect(self._again)
        return next(self._documents, None)

    def _retry(self, action: Callable[[], Row], first_error: Exception | None = None) -> Row:
        """`action()`, again and again with longer waits while it fails for reasons that may pass."""
        error, wait = first_error, FIRST_WAIT
        for attempt in range(RETRIES):
            if error is not None:
                self._give_up_on(error, attempt)
                if attempt == RETRIES - 1:
                    break
                time.sleep(wait)
                wait *= 2
            try:
                return action()
            except Exception as failure:  # judged by _give_up_on: what cannot pass is raised there
                error = failure
        raise DownloadError(
            f"{self.repository}: reading from the hub failed {RETRIES} times: {_in_short(error)}; check the "
            "network, then run this again: it goes on after the last complete shard"
        )

    def _give_up_on(self, error: Exception, attempt: int) -> None:
        """Raise what no retry can mend; return for a broken connection or a server in trouble."""
        import huggingface_hub.errors as hub
        import pyarrow

        remedy = f"{self.repository} at {self.revision}: {_in_short(error)}"
        if os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on"):
            raise UserError(f"{remedy}; HF_HUB_OFFLINE is set: unset it, or give --text_files") from None
        missing = (hub.RepositoryNotFoundError, hub.RevisionNotFoundError, hub.EntryNotFoundError)
        if isinstance(error, (*missing, hub.HFValidationError, FileNotFoundError)):
            raise DownloadError(f"{remedy}; check --repository and --revision") from None
        if isinstance(error, pyarrow.ArrowException) and attempt > 1:  # twice broken is not the connection
            raise DownloadError(f"{remedy}; the file on the hub is damaged, or not Parquet") from None
        passing = (OSError, hub.HfHubHTTPError, pyarrow.ArrowException, EOFError, json.JSONDecodeError)
        packages = {base.__module__.partition(".")[0] for base in type(error).__mro__}
        if not isinstance(error, passing) and not packages & HTTP_PACKAGES:
            raise error


class ParquetFiles(Hub):
    """Parquet files on this machine, the document in the column "text"; taken in the order of their names."""

    def __init__(self, pattern: str) -> None:
        self.paths, identity = _local_files(pattern)
        super().__init__(pattern, "")  # no revision, no commit; how much text packed files hold nobody knows
        self.identity = identity

    def _place(self) -> tuple[str, dict[str, object]]:
        return "parquet", {"data_files": {"train": [str(path) for path in self.paths]}}

    def _retry(self, action: Callable[[], Row], first_error: Exception | None = None) -> Row:
        """`action()`, once: what a disk cannot give now it will not give later."""
        import datasets
        import pyarrow

        try:
            if first_error is not None:
                raise first_error
            return action()
        except (
            OSError,
            pyarrow.ArrowException,
            datasets.exceptions.DatasetsError,
            ValueError,
            KeyError,
        ) as error:
            raise UserError(
                f"--text_files={self.repository}: {_in_short(error)}; expected Parquet files with a column of strings "
                "called text"
            ) from None


def _local_files(pattern: str) -> tuple[list[Path], dict[str, object]]:
    """The files that `pattern` means, sorted, and what identifies them: names and sizes. UserError for none."""
    paths = sorted(Path(name) for name in glob.glob(pattern))  # noqa: PTH207 the pattern may be absolute
    if not paths:
        raise UserError(f"--text_files={pattern}: no such file")
    try:
        return paths, {"text_files": [[path.name, path.stat().st_size] for path in paths]}
    except OSError as error:
        raise UserError(f"--text_files={pattern}: cannot be read: {error.strerror}") from None


def local_source(pattern: str) -> JsonLines | ParquetFiles:
    """The documents in the files that `pattern` means: Parquet when it ends so, else JSON lines."""
    return (ParquetFiles if pattern.endswith(".parquet") else JsonLines)(pattern)


def _in_short(error: Exception | None) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
