"""Every damaged token set is refused in one line that names the file and the remedy."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from shard_kit import TRAIN1, TRAIN2, VAL, edit_bytes, flip, make_set, with_manifest_again

from nanogpt.common.errors import UserError
from nanogpt.common.manifest import chars_digest
from nanogpt.common.shards import (
    HEADER_BYTES,
    open_token_set,
    verify,
)
from nanogpt.common.storage import atomic_write_json


def header(index: int, value: int, name: str = TRAIN1) -> Callable[[Path], None]:
    """A mutation of one int32 of a shard's header."""

    def change(data: bytearray) -> None:
        data[4 * index : 4 * index + 4] = np.array([value], "<i4").tobytes()

    return edit_bytes(name, change)


def edit_manifest(change: Callable[[dict], object]) -> Callable[[Path], None]:
    """A mutation of the manifest; `change` works in place, or returns the new value."""

    def mutate(folder: Path) -> None:
        path = folder / "manifest.json"
        found = json.loads(path.read_text())
        changed = change(found)
        path.write_text(json.dumps(found if changed is None else changed))

    return mutate


def entry(key: str, value: object, index: int = 0) -> Callable[[Path], None]:
    """A mutation of one field of the manifest's first (or another) file."""
    return edit_manifest(lambda found: found["files"][index].__setitem__(key, value))


def field(key: str, value: object) -> Callable[[Path], None]:
    """A mutation of one field of the manifest."""
    return edit_manifest(lambda found: found.__setitem__(key, value))


def swap(folder: Path) -> None:
    (folder / TRAIN1).rename(folder / "x")
    (folder / TRAIN2).rename(folder / TRAIN1)
    (folder / "x").rename(folder / TRAIN2)


def link_out(folder: Path) -> None:
    (folder / TRAIN1).rename(folder.parent / "elsewhere.bin")
    (folder / TRAIN1).symlink_to(folder.parent / "elsewhere.bin")


def val_is_train(folder: Path) -> None:
    found = json.loads((folder / "manifest.json").read_text())
    (folder / VAL).write_bytes((folder / TRAIN1).read_bytes())
    found["files"][2] = {**found["files"][0], "name": VAL, "split": "val"}
    (folder / "manifest.json").write_text(json.dumps(found))


def directory_for_shard(folder: Path) -> None:
    (folder / TRAIN1).unlink()
    (folder / TRAIN1).mkdir()


# name -> (mutation, what the message must name). All against a set with a manifest.
MUTATIONS: dict[str, tuple[Callable[[Path], None], str]] = {
    "magic": (header(0, 20240521), TRAIN1),
    "magic zero": (header(0, 0), TRAIN1),
    "magic of other byte order": (
        edit_bytes(TRAIN1, lambda d: np.frombuffer(bytes(d[:4]), ">i4").astype("<i4").tobytes() + d[4:]),
        TRAIN1,
    ),
    "version 0": (header(1, 0), TRAIN1),
    "version 2": (header(1, 2), TRAIN1),
    "count half": (header(2, 300), TRAIN1),
    "count one more": (header(2, 601), TRAIN1),
    "count zero": (header(2, 0), TRAIN1),
    "count negative": (header(2, -600), TRAIN1),
    "count largest": (header(2, 2**31 - 1), TRAIN1),
    "rest of the header": (header(9, 1), TRAIN1),
    "truncated by a token": (edit_bytes(TRAIN1, lambda d: d[:-2]), TRAIN1),
    "truncated by a byte": (edit_bytes(TRAIN1, lambda d: d[:-1]), TRAIN1),
    "truncated to half": (edit_bytes(TRAIN1, lambda d: d[: len(d) // 2]), TRAIN1),
    "truncated in the header": (edit_bytes(TRAIN1, lambda d: d[:1000]), TRAIN1),
    "header only": (edit_bytes(TRAIN1, lambda d: d[:HEADER_BYTES]), TRAIN1),
    "empty file": (edit_bytes(TRAIN1, lambda d: b""), TRAIN1),
    "longer by a token": (edit_bytes(TRAIN1, lambda d: d + b"ab"), TRAIN1),
    "longer by a byte": (edit_bytes(TRAIN1, lambda d: d + b"a"), TRAIN1),
    "twice": (edit_bytes(TRAIN1, lambda d: d + d), TRAIN1),
    "an HTML page": (
        edit_bytes(TRAIN1, lambda d: b"\n<HTML>" + b" " * 2000),
        "not a token shard but a web page",
    ),
    "a pointer": (
        edit_bytes(TRAIN1, lambda d: b"version https://git-lfs.github.com/spec/v1\n"),
        "git lfs pull",
    ),
    "flipped bit, first token": (flip(HEADER_BYTES), TRAIN1),
    "flipped bit, last byte": (flip(HEADER_BYTES + 1199), TRAIN1),
    "flipped bit in val": (flip(HEADER_BYTES + 50, VAL), VAL),
    "zeroed tokens": (edit_bytes(TRAIN1, lambda d: d[:HEADER_BYTES] + bytes(1200)), TRAIN1),
    "all zeros, vouched for": (with_manifest_again(np.zeros_like), TRAIN1),
    "id past the vocabulary": (with_manifest_again(lambda t: np.append(t[:-1], 50257)), TRAIN1),
    "id 65535": (with_manifest_again(lambda t: np.append(65535, t[1:])), TRAIN1),
    "swapped files": (swap, TRAIN1),
    "shard missing": (lambda folder: (folder / TRAIN2).unlink(), TRAIN2),
    "val shard missing": (lambda folder: (folder / VAL).unlink(), VAL),
    "folder in a shard's place": (directory_for_shard, TRAIN1),
    "symlink out": (link_out, TRAIN1),
    "dangling symlink": (
        lambda f: ((f / TRAIN1).unlink(), (f / TRAIN1).symlink_to(f / "gone"))[1],
        TRAIN1,
    ),
    "val equals train": (val_is_train, VAL),
    "manifest not JSON": (edit_bytes("manifest.json", lambda d: d[:-20]), "manifest.json"),
    "manifest empty": (edit_bytes("manifest.json", lambda d: b""), "manifest.json"),
    "manifest not UTF-8": (edit_bytes("manifest.json", lambda d: b"\xff\xfe" + d), "manifest.json"),
    "manifest a list": (edit_manifest(lambda found: [found]), "manifest.json"),
    "manifest nested deeply": (edit_bytes("manifest.json", lambda d: b"[" * 200_000), "manifest.json"),
    "manifest null": (edit_bytes("manifest.json", lambda d: b"null"), "manifest.json"),
    "no files": (edit_manifest(lambda found: found.pop("files") and None), "files"),
    "files empty": (field("files", []), "files"),
    "files an object": (field("files", {}), "files"),
    "file not an object": (field("files", ["a.bin"]), "files[0]"),
    "no name": (edit_manifest(lambda found: found["files"][0].pop("name") and None), "files[0].name"),
    "name twice": (entry("name", TRAIN2), TRAIN2),
    "name with a folder": (entry("name", "sub/" + TRAIN1), "files[0].name"),
    "name climbs": (entry("name", "../elsewhere.bin"), "files[0].name"),
    "name absolute": (entry("name", "/etc/passwd.bin"), "files[0].name"),
    "name with a backslash": (entry("name", "..\\a.bin"), "files[0].name"),
    "name with NUL": (entry("name", "a\0.bin"), "files[0].name"),
    "name with a newline": (entry("name", "a\nb.bin"), "files[0].name"),
    "name a number": (entry("name", 7), "files[0].name"),
    "name of another kind": (entry("name", "manifest.json"), "files[0].name"),
    "split unknown": (entry("split", "test"), "files[0].split"),
    "split missing": (entry("split", None), "files[0].split"),
    "no val shard": (entry("split", "train", 2), "no val shard"),
    "tokens text": (entry("tokens", "600"), "files[0].tokens"),
    "tokens true": (entry("tokens", True), "files[0].tokens"),
    "tokens negative": (entry("tokens", -1), "files[0].tokens"),
    "tokens other": (edit_manifest(lambda f: f["files"][0].update(tokens=599, bytes=2222)), TRAIN1),
    "bytes other": (entry("bytes", 2223), "files[0].bytes"),
    "bytes missing": (entry("bytes", None), "files[0].bytes"),
    "hash other": (entry("sha256", "0" * 64), TRAIN1),
    "hash short": (entry("sha256", "0" * 63), "files[0].sha256"),
    "hash not hexadecimal": (entry("sha256", "z" * 64), "files[0].sha256"),
    "hash missing": (entry("sha256", None), "files[0].sha256"),
    "vocabulary text": (field("vocab_size", "50257"), "vocab_size"),
    "vocabulary zero": (field("vocab_size", 0), "vocab_size"),
    "vocabulary past uint16": (field("vocab_size", 65537), "vocab_size"),
    "vocabulary smaller": (edit_manifest(lambda f: f.update(vocab_size=100, eot=None)), TRAIN1),
    "vocabulary a float": (field("vocab_size", 50257.5), "vocab_size"),
    "eot past the vocabulary": (field("eot", 50257), "eot"),
    "eot text": (field("eot", "<|endoftext|>"), "eot"),
    "tokenizer unknown": (field("tokenizer", "llama"), "tokenizer"),
    "tokenizer a list": (field("tokenizer", ["gpt2"]), "tokenizer"),
    "tokenizer char without meta.json": (field("tokenizer", "char"), "meta.json"),
    "name of the set missing": (field("name", None), "name"),
    "name of the set empty": (field("name", ""), "name"),
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_damaged_set_is_refused(tmp_path: Path, mutation: str) -> None:
    folder = make_set(tmp_path)
    change, named = MUTATIONS[mutation]
    change(folder)
    with pytest.raises(UserError) as caught:
        verify(open_token_set("s", tmp_path))
    message = str(caught.value)
    assert named in message and str(folder) in message
    assert "\n" not in message and "; " in message, "one line with a remedy"


def test_enough_mutations() -> None:
    assert len(MUTATIONS) >= 40


def test_other_characters_are_refused(tmp_path: Path) -> None:
    folder = make_set(tmp_path, "s", "char", 65)
    field("chars_sha256", chars_digest("".join(map(chr, range(32, 97)))))(folder)
    open_token_set("s", tmp_path)
    for chars in ("".join(map(chr, range(33, 98))), "ab", "a" * 65, "", 5, None):
        atomic_write_json(folder / "meta.json", {"chars": chars})
        with pytest.raises(UserError, match=r"chars|vocab_size"):
            open_token_set("s", tmp_path)
