"""manifest.json: what vouches for a token set. It is written last, so a set that has one is complete."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from nanogpt.common.errors import UserError
from nanogpt.common.storage import atomic_write_json

HEADER_INT32 = 256  # the header of a shard
HEADER_BYTES = 4 * HEADER_INT32
MANIFEST = "manifest.json"
META = "meta.json"
REMAKE = "delete it and run prepare.py (or the download) again"
LARGEST_JSON = 64 * 2**20


@dataclass(frozen=True)
class Entry:
    """One shard as the manifest describes it."""

    name: str
    split: str  # "train" or "val"
    tokens: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """The facts of a token set; every field has been checked, the files themselves have not."""

    name: str
    tokenizer: str  # "gpt2" or "char"
    vocab_size: int
    eot: int | None
    files: tuple[Entry, ...]


def write_manifest(
    folder: Path,
    name: str,
    tokenizer: str,
    vocab_size: int,
    eot: int | None,
    files: Sequence[dict[str, object]],
    **extra: object,
) -> None:
    """Publish a set: from now on it can be opened. `files` are write_shard's entries, each with a "split"."""
    facts = {"name": name, "tokenizer": tokenizer, "vocab_size": vocab_size, "eot": eot}
    atomic_write_json(folder / MANIFEST, {**facts, **extra, "files": list(files)})


def read_manifest(folder: Path) -> Manifest:
    """The manifest of `folder`; UserError naming the field that is not as it must be."""
    path = folder / MANIFEST
    found = read_json(path)
    name, tokenizer, vocab_size, eot, files = (
        found.get(key) for key in ("name", "tokenizer", "vocab_size", "eot", "files")
    )
    _require(isinstance(name, str) and 0 < len(name) < 256, path, "name", name, "expected text")
    _require(tokenizer in ("gpt2", "char"), path, "tokenizer", tokenizer, "expected 'gpt2' or 'char'")
    in_range = _is_int(vocab_size) and 1 <= vocab_size <= 65536
    _require(in_range, path, "vocab_size", vocab_size, "expected 1 to 65536")
    an_id = eot is None or (_is_int(eot) and 0 <= eot < vocab_size)
    _require(an_id, path, "eot", eot, "expected null or a token id")
    if tokenizer == "char":
        chars = read_chars(folder)
        _require(len(chars) == vocab_size, path, "vocab_size", vocab_size, f"meta.json has {len(chars)}")
        stated = found.get("chars_sha256", chars_digest(chars))
        same = stated == chars_digest(chars)
        _require(same, path, "chars_sha256", stated, "meta.json holds other characters")
    _require(isinstance(files, list) and bool(files), path, "files", files, "expected a list of files")
    entries = tuple(_entry(path, index, entry) for index, entry in enumerate(files))
    seen: set[str] = set()
    for entry in entries:
        _require(entry.name not in seen, path, "files", entry.name, "is listed twice")
        seen.add(entry.name)
    return Manifest(name, tokenizer, vocab_size, eot, entries)


def read_chars(folder: Path) -> str:
    """The characters of a character set, from its meta.json; a character's place is its token id."""
    path = folder / META
    chars = read_json(path).get("chars")
    _require(isinstance(chars, str) and bool(chars), path, "chars", chars, "expected the characters as text")
    _require(len(set(chars)) == len(chars), path, "chars", chars, "a character stands there twice")
    return chars


def chars_digest(chars: str) -> str:
    """What the manifest says about meta.json."""
    return hashlib.sha256(chars.encode("utf-8", "surrogatepass")).hexdigest()


def read_json(path: Path) -> dict[str, object]:
    """The JSON object in the file `path`; UserError when it is anything else."""
    try:
        with path.open("rb") as file:
            data = file.read(LARGEST_JSON + 1)
        if len(data) > LARGEST_JSON:
            raise UserError(f"{path}: larger than {LARGEST_JSON // 2**20} MiB; {REMAKE}")
        found = json.loads(data.decode("utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}; {REMAKE}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON ({str(error)[:80]}); {REMAKE}") from None
    if not isinstance(found, dict):
        raise UserError(f"{path}: expected a JSON object, found {type(found).__name__}; {REMAKE}")
    return found


def digest_of(entries: Iterable[object]) -> str:
    """One SHA-256 over JSON-able facts."""
    return hashlib.sha256(json.dumps(list(entries)).encode()).hexdigest()


def _entry(path: Path, index: int, found: object) -> Entry:
    where = f"files[{index}]"
    _require(isinstance(found, dict), path, where, found, "expected an object")
    name, split, tokens, size, sha256 = (
        found.get(key) for key in ("name", "split", "tokens", "bytes", "sha256")
    )
    plain = isinstance(name, str) and name.isprintable() and "\\" not in name and Path(name).name == name
    plain = plain and name.endswith(".bin") and len(name) < 256
    _require(plain, path, f"{where}.name", name, "expected the plain name of a .bin file in this folder")
    _require(split in ("train", "val"), path, f"{where}.split", split, "expected 'train' or 'val'")
    _require(_is_int(tokens) and tokens > 0, path, f"{where}.tokens", tokens, "expected a count")
    expected = HEADER_BYTES + 2 * tokens
    _require(_is_int(size) and size == expected, path, f"{where}.bytes", size, f"expected {expected}")
    hexadecimal = isinstance(sha256, str) and len(sha256) == 64 and set(sha256) <= set("0123456789abcdef")
    _require(hexadecimal, path, f"{where}.sha256", sha256, "expected 64 hexadecimal digits")
    return Entry(name, split, tokens, size, sha256)


def _require(holds: bool, path: Path, field: str, value: object, problem: str) -> None:
    if not holds:
        raise UserError(f"{path}: {field}: {repr(value)[:60]}: {problem}; {REMAKE}")


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
