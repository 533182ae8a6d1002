"""A stream of documents into shards of tokens: by all cores, in the documents' order, resumable at a shard.

Threads, not processes: tiktoken leaves Python's lock while it works, so threads use every core, share one
vocabulary and hand tokens over without copying. Each document is encoded by itself and stands behind an
end-of-text token, so the tokens do not depend on how many threads there are or where a run was interrupted.

What is needed to go on stands in progress.json, replaced after each shard: where the stream was (at the start
of a batch of documents), and how many tokens of that batch are in shards already.
"""

import hashlib
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from nanogpt.common.errors import UserError
from nanogpt.common.manifest import MANIFEST, META, chars_digest
from nanogpt.common.shards import GPT2_EOT, GPT2_VOCAB, PROGRESS, write_manifest, write_shard
from nanogpt.common.storage import atomic_write_bytes, atomic_write_json
from nanogpt.data.sources import Position, Source

if TYPE_CHECKING:
    import tiktoken

EOT_TEXT = "<|endoftext|>"
BATCH_CHARS = 1_000_000  # one task for a thread: some 30 ms
MASK64 = 2**64 - 1


@dataclass(frozen=True)
class Start:
    """A place in the stream: document number, where the source was, and what is done from there on."""

    document: int = 0
    position: Position = None
    skip: int = 0  # training tokens of this batch that are in shards already
    val_tokens: int = 0  # validation tokens before this batch
    chars: int = 0  # of text before this batch, for the progress line


@dataclass
class State:
    """How far a preparation has come: complete shards (each with its Start), and where to go on."""

    files: list[dict[str, object]] = field(default_factory=list)
    start: Start = Start()
    val: np.ndarray = field(default_factory=lambda: np.empty(0, np.uint16))
    commit: str = ""  # what the hub's revision meant when the work began


@dataclass(frozen=True)
class Vocabulary:
    """What the ids of a set mean, for its manifest. `chars`, for character sets: a character's place is its id."""

    tokenizer: str = "gpt2"
    size: int = GPT2_VOCAB
    eot: int | None = GPT2_EOT
    chars: str | None = None


@dataclass(frozen=True)
class Batch:
    """Documents that are encoded together, and where they began."""

    start: Start
    documents: list[str]


class AlreadyDone(Exception):
    """Another process has finished the same set meanwhile."""


def in_validation(document: int, every: int) -> bool:
    """Whether document number `document` is validation text: about one in `every`, by splitmix64; 0: none is.

    The first document always is, so that the smallest piece has validation text too.
    """
    if every == 0:
        return False
    mixed = (document + 0x9E3779B97F4A7C15) & MASK64
    mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & MASK64
    mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & MASK64
    return document == 0 or (mixed ^ (mixed >> 31)) % every == 0


def encode_documents(encoding: "tiktoken.Encoding", documents: list[str]) -> np.ndarray:
    """Tokens uint16 [n] of `documents`, end-of-text before each, in one call without Python's lock.

    A document that spells out "<|endoftext|>" gets the ordinary tokens of those characters.
    """
    if not documents:
        return np.empty(0, np.uint16)
    try:
        return _encode(encoding, documents)
    except (
        UnicodeEncodeError
    ):  # half a surrogate pair, which JSON can spell: as tiktoken's encode_ordinary does
        whole = [text.encode("utf-16", "surrogatepass").decode("utf-16", "replace") for text in documents]
        return _encode(encoding, whole)


def _encode(encoding: "tiktoken.Encoding", documents: list[str]) -> np.ndarray:
    if any(EOT_TEXT in document for document in documents):
        parts = []
        for document in documents:
            parts += [np.array([GPT2_EOT]), encoding.encode_to_numpy(document, disallowed_special=())]
        return np.concatenate(parts).astype(np.uint16)
    joined = EOT_TEXT + EOT_TEXT.join(documents)
    tokens = encoding.encode_to_numpy(joined, allowed_special={EOT_TEXT}, disallowed_special=())
    return tokens.astype(np.uint16)


def encode_batch(
    batch: Batch, encode: Callable[[list[str]], np.ndarray], validates: Callable[[int], bool]
) -> tuple[np.ndarray, np.ndarray]:
    """Training and validation tokens of a batch, each uint16 [n]; `validates` is told a document's number."""
    train, val = [], []
    for number, document in enumerate(batch.documents, batch.start.document):
        (val if validates(number) else train).append(document)
    return encode(train), encode(val)


def read_batches(source: Source, start: Start, max_documents: int) -> Iterator[Batch]:
    """Batches of about BATCH_CHARS from `start` on, up to document number `max_documents` (0: all)."""
    source.open(start.position)
    number, chars = start.document, start.chars
    position, documents, size = source.position(), [], 0
    while not max_documents or number + len(documents) < max_documents:
        text = source.read()
        if text is None:
            break
        documents.append(text)
        size += len(text)
        if size >= BATCH_CHARS:
            yield Batch(Start(number, position, chars=chars), documents)
            number, chars = number + len(documents), chars + size
            position, documents, size = source.position(), [], 0
    if documents:
        yield Batch(Start(number, position, chars=chars), documents)


class ShardWriter:
    """Collects tokens and writes a shard, then progress.json, whenever `shard_tokens` are together.

    With `val_first` the first so many training tokens go to validation, in the middle of a document too.
    """

    def __init__(
        self, name: str, folder: Path, shard_tokens: int, made_from: dict, state: State, val_first: int = 0,
        vocabulary: Vocabulary = Vocabulary(),
    ) -> None:  # fmt: skip
        self.name, self.folder, self.made_from, self.state = name, folder, made_from, state
        self.val_first, self.vocabulary = val_first, vocabulary
        self.buffer = np.empty(shard_tokens, np.uint16)
        self.filled = 0
        self.val = [state.val]
        self.val_tokens = self.val_saved = len(state.val)
        self.skip = state.start.skip
        self.began = state.start  # where the shard in the buffer begins
        self.train_tokens = sum(int(entry["tokens"]) for entry in state.files)

    def add(self, start: Start, train: np.ndarray, val: np.ndarray) -> None:
        """Append the tokens of the batch that began at `start`."""
        if missing := max(0, self.val_first - self.val_tokens):
            train, val = train[missing:], np.concatenate([val, train[:missing]])
        taken = min(self.skip, len(train))
        self.skip -= taken
        while taken < len(train):
            size = min(len(self.buffer) - self.filled, len(train) - taken)
            self.buffer[self.filled : self.filled + size] = train[taken : taken + size]
            self.filled += size
            taken += size
            if self.filled == len(self.buffer):
                self._write_train(Start(start.document, start.position, taken, self.val_tokens, start.chars))
        self.val.append(val)
        self.val_tokens += len(val)

    def finish(self) -> None:
        """Write the last shard, the validation shard and the manifest, and tidy up."""
        val = np.concatenate(self.val)
        if not (self.filled or self.state.files) or not len(val):
            few = (
                f"only {len(val):,} tokens"
                if self.val_first
                else "too few documents: two are needed at least"
            )
            raise UserError(f"{self.folder}: the source holds {few}; nothing is left for training")
        if self.filled:
            self._write_train(None)
        entry = write_shard(self.folder / f"{self.name}_val_000000.bin", val)
        files = [*self.state.files, {**entry, "split": "val"}]
        facts = {"made_from": self.made_from, "commit": self.state.commit}
        known = self.vocabulary
        if known.chars is not None:
            atomic_write_json(self.folder / META, {"chars": known.chars})
            facts["chars_sha256"] = chars_digest(known.chars)
        write_manifest(self.folder, self.name, known.tokenizer, known.size, known.eot, files, **facts)
        for path in [self.folder / PROGRESS, *self.folder.glob("val_part_*.u16")]:
            path.unlink(missing_ok=True)

    def _write_train(self, following: Start | None) -> None:
        """The buffer as a shard; `following` is where the next one begins (None after the last)."""
        if (self.folder / MANIFEST).exists():
            raise AlreadyDone
        number = len(self.state.files) + 1
        path = self.folder / f"{self.name}_train_{number:06d}.bin"
        entry = write_shard(path, self.buffer[: self.filled])
        self.train_tokens += self.filled
        self.filled = 0
        self.state.files.append({**entry, "split": "train", "start": vars(self.began)})
        if following is not None:
            self.began = following
            self._save(number, following)

    def _save(self, number: int, start: Start) -> None:
        """First the new validation tokens, then the progress file that counts on them."""
        val = np.concatenate(self.val)
        self.val = [val]
        part = val[self.val_saved :].astype("<u2").tobytes()
        if part:
            atomic_write_bytes(self.folder / f"val_part_{number:06d}.u16", part)
            self.val_saved = len(val)
        facts = {"made_from": self.made_from, "commit": self.state.commit, "start": vars(start)}
        digest = hashlib.sha256(val.astype("<u2").tobytes()).hexdigest()
        atomic_write_json(self.folder / PROGRESS, {**facts, "val_sha256": digest, "files": self.state.files})


def tokenize(
    source: Source,
    encode: Callable[[list[str]], np.ndarray],
    writer: ShardWriter,
    *,
    workers: int,
    validates: Callable[[int], bool],
    max_documents: int = 0,
    report: Callable[[int, int, int], None] | None = None,
) -> None:
    """Read `source` from where the writer's state says, encode on `workers` threads, and write everything.

    `encode(documents)` gives uint16 tokens [n], `validates(number)` says which documents are validation text;
    `report(characters, documents, tokens)` is called after each batch. Raises AlreadyDone, UserError,
    DownloadError, StorageError; whatever ends it, the next run goes on after the last complete shard.
    """
    waiting: deque[tuple[Batch, Future]] = deque()

    def consume() -> None:
        batch, future = waiting.popleft()
        writer.state.commit = source.commit
        train, val = future.result()
        writer.add(batch.start, train, val)
        if report is not None:
            chars = batch.start.chars + sum(map(len, batch.documents))
            documents = batch.start.document + len(batch.documents)
            report(chars, documents, writer.train_tokens + writer.filled + writer.val_tokens)

    with ThreadPoolExecutor(workers) as pool:
        try:
            for batch in read_batches(source, writer.state.start, max_documents):
                waiting.append((batch, pool.submit(encode_batch, batch, encode, validates)))
                if len(waiting) > 2 * workers:
                    consume()
            while waiting:
                consume()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    writer.finish()
