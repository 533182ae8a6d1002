"""Token shards: the files that tokens live in, and the checks they pass before they are used.

A token set is a folder `$DATA_ROOT/<set>/`:

    <set>_train_000001.bin ...  <set>_val_000000.bin
                     256 little-endian int32 [20240520, 1, tokens, 0 ...], then uint16 tokens
    manifest.json    tokenizer, vocabulary size, and size and SHA-256 of every shard (manifest.py)
    meta.json        {"chars": "..."} for character sets: a character's place is its token id

The format is the speedrun's, so its published files work as they are (without a manifest: nothing vouches
for them). nanoGPT's `train.bin`/`val.bin` (uint16 without a header) are read too; its meta.pkl is never
opened, because unpickling runs whatever code the file holds.
"""

import filecmp
import hashlib
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nanogpt.common.errors import UserError
from nanogpt.common.file_tokens import NOT_MAPPED, FileTokens
from nanogpt.common.flags import nearest
from nanogpt.common.manifest import (
    HEADER_BYTES,
    HEADER_INT32,
    MANIFEST,
    META,
    REMAKE,
    Entry,
    digest_of,
    read_chars,
    read_manifest,
    write_manifest,
)
from nanogpt.common.storage import atomic_write_bytes

__all__ = [
    "GPT2_EOT",
    "GPT2_VOCAB",
    "HEADER_BYTES",
    "HEADER_INT32",
    "MAGIC",
    "PROGRESS",
    "Shard",
    "TokenSet",
    "data_root",
    "open_token_set",
    "read_chars",
    "read_header",
    "verify",
    "write_manifest",
    "write_shard",
]

MAGIC = 20240520
LOOKS_LIKE = {  # what lies in a shard's place when a download or a checkout went wrong, by its first bytes
    b"version https://git-lfs": "a pointer of git-lfs, which stands for the file (git lfs pull fetches it)",
    b"<!doctype": "a web page, such as a log-in form",
    b"<html": "a web page, such as a log-in form",
}
VERSION = 1
GPT2_VOCAB = 50257
GPT2_EOT = 50256
PROGRESS = "progress.json"  # an unfinished prepare; gone once the manifest is there
REPOSITORY = Path(__file__).resolve().parents[2]
READ_BYTES = 2**20  # stays in the cache between hashing and looking for the largest id


@dataclass(frozen=True)
class Shard:
    """One file of tokens whose size agrees with its header (and its manifest)."""

    path: Path
    split: str  # "train" or "val"
    num_tokens: int
    offset_bytes: int  # HEADER_BYTES, or 0 for nanoGPT's raw files
    sha256: str | None = None

    def tokens(self) -> np.memmap | FileTokens:
        """The tokens as a read-only uint16 map [num_tokens]; UserError when the file has gone or shrunk.

        Where the file system refuses to map files, they are read as they are asked for, and a note says so.
        """
        try:
            return np.memmap(
                self.path, dtype="<u2", mode="r", offset=self.offset_bytes, shape=(self.num_tokens,)
            )
        except (OSError, ValueError) as error:
            if isinstance(error, OSError) and error.errno in NOT_MAPPED:
                return FileTokens(self.path, self.offset_bytes, self.num_tokens)
            raise UserError(f"{self.path}: changed or went away while in use ({error}); {REMAKE}") from None

    @property
    def bytes(self) -> int:
        """Size of the file in bytes, header included."""
        return self.offset_bytes + 2 * self.num_tokens


@dataclass(frozen=True)
class TokenSet:
    """A folder of shards that passed the cheap checks; `verify` makes the expensive ones."""

    name: str
    folder: Path
    vocab_size: int | None  # every id is below it; None when nothing says how large it is
    tokenizer: str  # "gpt2", "char" or "unknown"
    eot: int | None  # the id that stands before each document, if any does
    shards_train: tuple[Shard, ...]
    shards_val: tuple[Shard, ...]
    manifest_sha256: str  # over the manifest's entries, or over names and sizes where there is no manifest
    has_manifest: bool
    notes: tuple[str, ...] = ()  # what a person should be told about this set, one line each

    @property
    def shards(self) -> tuple[Shard, ...]:
        """All shards, train first."""
        return self.shards_train + self.shards_val

    def num_tokens(self, split: str) -> int:
        """Tokens in "train" or "val"."""
        return sum(shard.num_tokens for shard in self.shards if shard.split == split)

    def fingerprint(self) -> str:
        """Equal for equal data wherever its folder is: checkpoints keep it and refuse other data."""
        return digest_of([self.tokenizer, self.vocab_size, self.eot, self.manifest_sha256])


def data_root(flag: str = "") -> Path:
    """Where token sets live: the flag, else $DATA_ROOT, else `data/` in the repository."""
    chosen = flag or os.environ.get("DATA_ROOT", "")
    try:
        return Path(chosen).expanduser().absolute() if chosen else REPOSITORY / "data"
    except RuntimeError:
        raise UserError(f"DATA_ROOT={chosen}: there is no such user; write the path out") from None


def write_shard(path: Path, tokens: np.ndarray) -> dict[str, object]:
    """Write uint16 `tokens` [n] as a shard, atomically; returns its manifest entry without the split.

    Raises StorageError when the disk refuses, ValueError for tokens that are not a non-empty uint16 vector.
    """
    if tokens.dtype != np.uint16 or tokens.ndim != 1 or not 0 < len(tokens) < 2**31:
        raise ValueError(f"tokens must be a uint16 vector, not {tokens.dtype} {tokens.shape}")
    header = np.zeros(HEADER_INT32, dtype="<i4")
    header[:3] = [MAGIC, VERSION, len(tokens)]
    body = memoryview(np.ascontiguousarray(tokens, dtype="<u2")).cast("B")  # no copy: a shard is 200 MB
    atomic_write_bytes(path, header.tobytes(), body)
    digest = hashlib.sha256(header)
    digest.update(body)
    return {
        "name": path.name,
        "tokens": len(tokens),
        "bytes": HEADER_BYTES + len(body),
        "sha256": digest.hexdigest(),
    }


def open_token_set(dataset: str, root: Path) -> TokenSet:
    """The set `root/dataset`, or the folder `dataset` when that contains a slash, after every cheap check.

    Reads the manifest and each shard's header, not whole shards. Raises UserError: one line, file and remedy.
    """
    if "\0" in dataset or dataset in ("", ".", ".."):
        raise UserError(f"--dataset={dataset!r}: not the name of a token set; {_how_to_make(dataset, root)}")
    try:
        folder = Path(dataset).expanduser() if "/" in dataset else root / dataset
        is_folder = folder.is_dir()
    except (OSError, RuntimeError) as error:  # a name that is too long, the home of nobody
        why = getattr(error, "strerror", None) or error
        # Of a long name the end is what somebody typed.
        place = str(root) if len(str(root)) <= 80 else f"...{str(root)[-77:]}"
        raise UserError(f"--dataset={dataset[:80]} in {place}: {why}; give another folder") from None
    if not is_folder:
        problem = "is not a folder" if folder.exists() else "does not exist"
        raise UserError(
            f"--dataset={dataset}: {folder} {problem}; {_how_to_make(folder.name, folder.parent)}"
        )
    if (folder / MANIFEST).exists():
        found = _from_manifest(folder)
    elif (folder / PROGRESS).exists():
        raise UserError(f"{folder}: its preparation is not finished; {_how_to_make(folder.name)}")
    else:
        found = _without_manifest(folder)
    _refuse_same_content(found)
    return found


def verify(
    token_set: TokenSet,
    *,
    part: int = 0,
    parts: int = 1,
    threads: int = 4,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Read every `parts`-th shard from `part` on: SHA-256 as in the manifest, ids legal, not all 0.

    `progress(bytes_done, bytes_to_do)` is called as it goes, from one thread at a time.
    Raises UserError that names the first bad shard in order.
    """
    chosen = token_set.shards[part::parts]
    total, done, lock = sum(shard.bytes for shard in chosen), 0, threading.Lock()

    def count(read: int) -> None:
        nonlocal done
        with lock:
            done += read
            if progress is not None:
                progress(done, total)

    with ThreadPoolExecutor(max(1, threads)) as pool:
        checks = [pool.submit(_verify_shard, shard, token_set.vocab_size, count) for shard in chosen]
        try:
            for check in checks:
                check.result()
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def read_header(path: Path) -> int:
    """The number of tokens in the shard `path`; UserError unless its header and its exact size agree."""
    try:
        with path.open("rb") as file:
            head = file.read(HEADER_BYTES)
            size = os.fstat(file.fileno()).st_size
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}; {REMAKE}") from None
    for beginning, what in LOOKS_LIKE.items():
        if head.lstrip()[: len(beginning)].lower() == beginning:
            raise UserError(f"{path}: not a token shard but {what}; {REMAKE}")
    if len(head) < HEADER_BYTES:
        raise UserError(f"{path}: {size} bytes, shorter than a shard's header of {HEADER_BYTES}; {REMAKE}")
    magic, version, count = (int(number) for number in np.frombuffer(head, "<i4")[:3])
    if magic != MAGIC:
        raise UserError(f"{path}: starts with {magic}, not with a token shard's {MAGIC}; {REMAKE}")
    if version != VERSION:
        raise UserError(f"{path}: shard version {version}, only {VERSION} is known; {REMAKE}")
    if count < 1 or size != HEADER_BYTES + 2 * count:
        raise UserError(
            f"{path}: its header says {count:,} tokens ({HEADER_BYTES + 2 * count:,} bytes), "
            f"the file has {size:,} bytes; {REMAKE}"
        )
    return count


def _verify_shard(shard: Shard, vocab_size: int | None, count: Callable[[int], None]) -> None:
    digest, largest = hashlib.sha256(), 0
    buffer = bytearray(READ_BYTES)
    try:
        with shard.path.open("rb", buffering=0) as file:
            header = file.read(shard.offset_bytes)
            digest.update(header)
            read = len(header)
            count(read)
            while size := file.readinto(buffer):
                chunk = memoryview(buffer)[:size]
                digest.update(chunk)
                largest = max(largest, int(np.frombuffer(chunk[: size // 2 * 2], "<u2").max(initial=0)))
                read += size
                count(size)
    except OSError as error:
        raise UserError(f"{shard.path}: cannot be read: {error.strerror}; {REMAKE}") from None
    if read != shard.bytes:
        raise UserError(f"{shard.path}: {read:,} bytes, expected {shard.bytes:,}; {REMAKE}")
    if shard.sha256 is not None and digest.hexdigest() != shard.sha256:
        raise UserError(
            f"{shard.path}: its content has changed: SHA-256 {digest.hexdigest()[:16]}..., "
            f"{shard.sha256[:16]}... in the manifest; {REMAKE}"
        )
    if vocab_size is not None and largest >= vocab_size:
        raise UserError(f"{shard.path}: token id {largest} is past the vocabulary of {vocab_size}; {REMAKE}")
    if largest == 0:
        raise UserError(f"{shard.path}: every token is 0, which is not text; {REMAKE}")


def _from_manifest(folder: Path) -> TokenSet:
    manifest = read_manifest(folder)
    shards = [_listed_shard(folder, entry) for entry in manifest.files]
    train, val = _splits(folder, shards)
    identity = digest_of([s.path.name, s.split, s.num_tokens, s.bytes, s.sha256] for s in train + val)
    return TokenSet(
        manifest.name,
        folder,
        manifest.vocab_size,
        manifest.tokenizer,
        manifest.eot,
        train,
        val,
        identity,
        True,
    )


def _listed_shard(folder: Path, entry: Entry) -> Shard:
    path = folder / entry.name
    if not path.resolve().is_relative_to(folder.resolve()):
        raise UserError(
            f"{path}: is a link out of the set's folder; put the file itself there, or link the whole folder"
        )
    count = read_header(path)
    if count != entry.tokens:
        raise UserError(f"{path}: its header says {count:,} tokens, the manifest {entry.tokens:,}; {REMAKE}")
    return Shard(path, entry.split, count, HEADER_BYTES, entry.sha256)


def _without_manifest(folder: Path) -> TokenSet:
    """The speedrun's published shards, or nanoGPT's raw files: sizes and ids can be checked, not content."""
    notes = [f"{folder}: no manifest.json, so checksums cannot be checked (sizes and token ids are)"]
    paths = {split: sorted(folder.glob(f"*_{split}_*.bin")) for split in ("train", "val")}
    if any(paths.values()):
        shards = [
            Shard(path, split, read_header(path), HEADER_BYTES)
            for split, found in paths.items()
            for path in found
        ]
        tokenizer, vocab_size, eot = "gpt2", GPT2_VOCAB, GPT2_EOT
    elif any((folder / f"{split}.bin").exists() for split in paths):
        shards = [_raw_shard(folder / f"{split}.bin", split) for split in paths]
        tokenizer, vocab_size, eot = "gpt2", GPT2_VOCAB, None
    else:
        raise UserError(f"{folder}: holds no token shards; {_how_to_make(folder.name)}")
    if (folder / META).exists():
        tokenizer, vocab_size, eot = "char", len(read_chars(folder)), None
    elif (folder / "meta.pkl").exists():
        tokenizer, vocab_size, eot = "unknown", None, None
        notes.append(
            f"{folder}/meta.pkl: not opened, a pickle can run code; "
            'write meta.json {"chars": "..."} beside it to check ids and to sample text'
        )
    train, val = _splits(folder, shards)
    identity = digest_of([shard.path.name, shard.bytes] for shard in train + val)
    return TokenSet(
        folder.name, folder, vocab_size, tokenizer, eot, train, val, identity, False, tuple(notes)
    )


def _raw_shard(path: Path, split: str) -> Shard:
    """nanoGPT's file of uint16 tokens without a header."""
    try:
        size = path.stat().st_size
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}; {REMAKE}") from None
    if not path.is_file() or size == 0 or size % 2:
        raise UserError(f"{path}: {size} bytes are no sequence of 2-byte tokens; {REMAKE}")
    return Shard(path, split, size // 2, 0)


def _splits(folder: Path, shards: Sequence[Shard]) -> tuple[tuple[Shard, ...], tuple[Shard, ...]]:
    """Train and validation shards in the order of their names; both must be there."""
    by_name = sorted(shards, key=lambda shard: shard.path.name)
    train, val = (tuple(s for s in by_name if s.split == split) for split in ("train", "val"))
    for split, found in (("train", train), ("val", val)):
        if not found:
            raise UserError(f"{folder}: no {split} shard among its files; {_how_to_make(folder.name)}")
    return train, val


def _refuse_same_content(found: TokenSet) -> None:
    """A validation shard that is also a training shard makes every validation loss a lie."""
    for val in found.shards_val:
        for train in found.shards_train:
            if val.bytes != train.bytes:
                continue
            listed = val.sha256 is not None and val.sha256 == train.sha256
            if listed or (_head(val) == _head(train) and filecmp.cmp(val.path, train.path, shallow=False)):
                raise UserError(
                    f"{val.path}: the same content as {train.path.name}, but validation text must not be "
                    f"trained on; {REMAKE}"
                )


def _head(shard: Shard) -> bytes:
    with shard.path.open("rb") as file:
        return file.read(65536)


def _how_to_make(name: str, root: Path | None = None) -> str:
    """The command that makes the set `name`; for a set nobody knows, those that are there or can be made."""
    commands = {
        path.parent.name: f"python nanogpt/data/{path.parent.name}/prepare.py"
        for path in sorted(REPOSITORY.glob("nanogpt/data/*/prepare.py"))
    }
    for path in sorted(REPOSITORY.glob("modded_nanogpt/data/cached_*.py")):
        commands[path.stem.removeprefix("cached_")] = f"python modded_nanogpt/data/{path.name}"
    if name in commands:
        return f"make it with: {commands[name]}"
    try:
        present = sorted({path.parent.name for path in root.glob("*/*.bin")}) if root else []
    except OSError:
        present = []
    there = f"there are {', '.join(present)}" if present else "there is no set yet"
    makeable = ", ".join(commands) or "none"
    close = nearest(name, sorted({*commands, *present}))
    return f"{there}; python nanogpt/data/<set>/prepare.py makes {makeable}{close}"
