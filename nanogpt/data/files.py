"""A person's own files as documents, and which of them are validation text.

A file is a document, and so is each line of a .jsonl file ({"text": ...}). The files are read twice: once to learn
which characters and how many documents there are, then to encode them.
"""

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from nanogpt.common.errors import UserError
from nanogpt.data.sources import Position, document_of

SUFFIXES = (".txt", ".md", ".jsonl")  # what is taken from a folder
FEWEST = 10  # documents that can be dealt nine to one; of fewer, each is cut
Place = tuple[int, int, int]  # file, byte, line


class TextFiles:
    """The documents of files and folders in the order given, a `sources.Source`. Empty ones are left out.

    With fewer than ten documents each counts as two: its first nine tenths, and the rest, which is validation text.
    """

    commit = ""

    def __init__(self, words: Sequence[str]) -> None:
        self.paths = expand(words)
        self.num_documents, self.chars = 0, ""  # the characters, sorted
        lengths, chars, digest = [], set("\n"), hashlib.sha256()
        for _, text in self._walk((0, 0, 0)):
            lengths.append(len(text))
            chars.update(text)
            digest.update(hashlib.sha256(text.encode("utf-8")).digest())
        if not lengths:
            raise UserError(f"{words[0]}: holds no text; name files with something in them")
        self.num_documents, self.chars, self._bytes = len(lengths), "".join(sorted(chars)), sum(lengths)
        self.cut = len(lengths) < FEWEST
        self._validates = np.tile([False, True], len(lengths)) if self.cut else one_in_ten(lengths)
        self.identity = {"text_sha256": digest.hexdigest()}

    def validates(self, number: int) -> bool:
        """Whether document (or, where they are cut, piece) `number` is validation text."""
        return bool(self._validates[number])

    def describe_split(self) -> str:
        """A few words on what the validation text is."""
        if self.cut:
            return f"the last tenth of {'each document' if self.num_documents > 1 else 'the document'}"
        return f"{int(self._validates.sum()):,} of {self.num_documents:,} documents"

    def open(self, position: Position) -> None:
        """Go to `position`."""
        place = position or {"file": 0, "byte": 0, "line": 0, "rest": False}
        self._next: Place = (int(place["file"]), int(place["byte"]), int(place["line"]))
        self._documents, self._rest = self._walk(self._next), None
        if place["rest"]:
            self.read()

    def read(self) -> str | None:
        """The next document or piece, or None at the end. UserError names a file that is not text."""
        if self._rest is not None:
            piece, self._rest = self._rest, None
            self._next = self._after
            return piece
        self._after, text = next(self._documents, (self._next, None))
        if text is None or not self.cut:
            self._next = self._after
            return text
        first, self._rest = cut_90_10(text)
        return first

    def position(self) -> Position:
        """Where the next `read` will be."""
        file, byte, line = self._next
        return {"file": file, "byte": byte, "line": line, "rest": self._rest is not None}

    def total_bytes(self) -> int | None:
        """How many characters there are."""
        return self._bytes

    def _walk(self, place: Place) -> Iterator[tuple[Place, str]]:
        """The documents from `place` on, each with the place after it."""
        first, byte, line = place
        for number in range(first, len(self.paths)):
            path = self.paths[number]
            try:
                if path.suffix == ".jsonl":
                    with path.open("rb") as file:
                        file.seek(byte)
                        for raw in file:
                            byte, line = byte + len(raw), line + 1
                            text = document_of(raw, path, line) if raw.strip() else ""
                            if text.strip():
                                # Half a surrogate pair, which JSON can spell, is no character.
                                whole = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
                                yield (number, byte, line), whole
                elif (text := read_text(path)).strip():
                    yield (number + 1, 0, 0), text
            except OSError as error:
                raise UserError(f"{path}: cannot be read: {error.strerror}; leave it away") from None
            byte = line = 0


def expand(words: Sequence[str]) -> list[Path]:
    """The files that the words name; of a folder, those with one of SUFFIXES, sorted. UserError for none, or twice."""
    paths: list[Path] = []
    for word in words:
        path = Path(word)
        if path.is_dir():
            found = sorted(item for item in path.rglob("*") if item.suffix in SUFFIXES and item.is_file())
            if not found:
                raise UserError(f"{word}: the folder holds no {' or '.join(SUFFIXES)} files; name the files")
            paths += found
        elif path.exists():
            paths.append(path)
        else:
            raise UserError(f"{word}: no such file; name text files, .jsonl files or folders of them")
    seen: set[Path] = set()
    for path in paths:
        if path.resolve() in seen:
            raise UserError(
                f"{path}: given twice, and could be training and validation text at once; name it once"
            )
        seen.add(path.resolve())
    return paths


def read_text(path: Path) -> str:
    """The text of a UTF-8 file, without a byte order mark. UserError for anything else."""
    data = path.read_bytes()
    try:
        text, wrong = data.decode("utf-8-sig"), data.find(b"\0")
    except UnicodeDecodeError as error:
        text, wrong = "", error.start
    if wrong >= 0:
        raise UserError(
            f"{path}: byte {wrong} ({data[wrong]:#04x}) is not UTF-8 text; convert the file (iconv -t utf-8), unpack "
            "it if it is compressed, or leave it away"
        )
    return text


def one_in_ten(lengths: Sequence[int]) -> np.ndarray:
    """bool [len(lengths)]: the validation documents, at most a tenth of the characters and taken all along."""
    chosen = np.zeros(len(lengths), bool)
    total = held = 0
    for number, length in enumerate(lengths):
        total += length
        if held + length <= total / 10:
            chosen[number] = True
            held += length
    if not held:  # one document is longer than all that came before ten times over
        chosen[int(np.argmin(lengths))] = True
    return chosen


def cut_90_10(text: str) -> tuple[str, str]:
    """The first nine tenths of `text`, up to a line break where there is one near, and the rest."""
    at = max(1, len(text) * 9 // 10)
    line = text.rfind("\n", len(text) * 8 // 10, at) + 1
    return text[: line or at], text[line or at :]
