"""Good token sets are read; every damaged one is refused in one line that names the file and the remedy."""

import errno
import json
import os
import pickle
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from nanogpt.common.errors import UserError
from nanogpt.common.manifest import chars_digest
from nanogpt.common.shards import (
    HEADER_BYTES,
    HEADER_INT32,
    MAGIC,
    data_root,
    open_token_set,
    read_header,
    verify,
    write_manifest,
    write_shard,
)
from nanogpt.common.storage import atomic_write_json

TRAIN1, TRAIN2, VAL = "s_train_000001.bin", "s_train_000002.bin", "s_val_000000.bin"


def make_set(root: Path, name: str = "s", tokenizer: str = "gpt2", vocab_size: int = 50257) -> Path:
    """A sound set: two training shards of 600 tokens, one validation shard of 100."""
    folder = root / name
    folder.mkdir(parents=True)
    rng = np.random.default_rng(7)
    files = []
    for file, count in ((TRAIN1, 600), (TRAIN2, 600), (VAL, 100)):
        tokens = rng.integers(0, vocab_size, count).astype(np.uint16)
        files.append({**write_shard(folder / file, tokens), "split": "val" if "val" in file else "train"})
    if tokenizer == "char":
        atomic_write_json(folder / "meta.json", {"chars": "".join(map(chr, range(32, 32 + vocab_size)))})
    write_manifest(folder, name, tokenizer, vocab_size, 50256 if tokenizer == "gpt2" else None, files)
    return folder


def edit_bytes(name: str, change: Callable[[bytearray], object]) -> Callable[[Path], None]:
    """A mutation of a file's bytes; `change` works in place, or returns the new content."""

    def mutate(folder: Path) -> None:
        data = bytearray((folder / name).read_bytes())
        changed = change(data)
        (folder / name).write_bytes(data if changed is None else bytes(changed))

    return mutate


def header(index: int, value: int, name: str = TRAIN1) -> Callable[[Path], None]:
    """A mutation of one int32 of a shard's header."""

    def change(data: bytearray) -> None:
        data[4 * index : 4 * index + 4] = np.array([value], "<i4").tobytes()

    return edit_bytes(name, change)


def flip(offset: int, name: str = TRAIN1) -> Callable[[Path], None]:
    """A flipped bit."""

    def change(data: bytearray) -> None:
        data[offset] ^= 1

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


def with_manifest_again(change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Path], None]:
    """Other tokens in the first shard, and a manifest that vouches for them: only the content is wrong."""

    def mutate(folder: Path) -> None:
        found = json.loads((folder / "manifest.json").read_text())
        tokens = change(np.fromfile(folder / TRAIN1, "<u2", offset=HEADER_BYTES))
        found["files"][0] = {**write_shard(folder / TRAIN1, tokens.astype(np.uint16)), "split": "train"}
        (folder / "manifest.json").write_text(json.dumps(found))

    return mutate


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


@pytest.mark.parametrize("name, vocab_size", [("gpt2", 50257), ("char", 65)])
def test_sound_set_is_accepted(tmp_path: Path, name: str, vocab_size: int) -> None:
    make_set(tmp_path, "s", name, vocab_size)
    found = open_token_set("s", tmp_path)
    seen = []
    verify(found, progress=lambda done, total: seen.append((done, total)))
    assert (found.num_tokens("train"), found.num_tokens("val")) == (1200, 100)
    assert (found.vocab_size, found.tokenizer, found.has_manifest) == (vocab_size, name, True)
    assert [shard.path.name for shard in found.shards] == [TRAIN1, TRAIN2, VAL]
    tokens = found.shards_train[1].tokens()
    assert tokens.dtype == np.uint16 and tokens.shape == (600,)
    assert np.array_equal(tokens, np.fromfile(found.shards_train[1].path, "<u2", offset=HEADER_BYTES))
    assert seen[-1] == (3 * HEADER_BYTES + 2 * 1300,) * 2


def test_parts_cover_every_shard_once(tmp_path: Path) -> None:
    folder = make_set(tmp_path)
    found = open_token_set("s", tmp_path)
    for index, name in enumerate((TRAIN1, TRAIN2, VAL)):
        original = (folder / name).read_bytes()
        flip(HEADER_BYTES + 4, name)(folder)
        for part in range(3):
            if part == index:
                with pytest.raises(UserError, match=name):
                    verify(found, part=part, parts=3)
            else:
                verify(found, part=part, parts=3)
        (folder / name).write_bytes(original)


def test_layout_is_the_speedruns(tmp_path: Path) -> None:
    tokens = np.array([50256, 1, 65535], np.uint16)
    facts = write_shard(tmp_path / "x_train_000001.bin", tokens)
    data = (tmp_path / "x_train_000001.bin").read_bytes()
    head = np.frombuffer(data, "<i4", HEADER_INT32)
    assert [*head[:3]] == [MAGIC, 1, 3] and not head[3:].any()
    assert data[HEADER_BYTES:] == b"\x50\xc4\x01\x00\xff\xff"
    assert (facts["bytes"], facts["tokens"]) == (len(data), 3)
    assert [path.name for path in tmp_path.iterdir()] == ["x_train_000001.bin"]


@pytest.mark.parametrize(
    "tokens", [np.zeros(0, np.uint16), np.zeros(3, np.int32), np.zeros((2, 2), np.uint16)]
)
def test_only_uint16_vectors_are_written(tmp_path: Path, tokens: np.ndarray) -> None:
    with pytest.raises(ValueError):
        write_shard(tmp_path / "x.bin", tokens)


def test_published_speedrun_shards_without_manifest(tmp_path: Path) -> None:
    folder = make_set(tmp_path)
    (folder / "manifest.json").unlink()
    found = open_token_set("s", tmp_path)
    verify(found)
    assert not found.has_manifest and found.vocab_size == 50257 and found.eot == 50256
    assert len(found.notes) == 1 and "checksums cannot be checked" in found.notes[0]
    with_id = np.full(600, 50257, np.uint16)
    write_shard(folder / TRAIN1, with_id)
    with pytest.raises(UserError, match=TRAIN1):
        verify(open_token_set("s", tmp_path))
    (folder / VAL).write_bytes((folder / TRAIN2).read_bytes())
    with pytest.raises(UserError, match="same content"):
        open_token_set("s", tmp_path)
    (folder / VAL).unlink()
    with pytest.raises(UserError, match="no val shard"):
        open_token_set("s", tmp_path)


def test_raw_files_of_nanogpt(tmp_path: Path) -> None:
    folder = tmp_path / "raw"
    folder.mkdir()
    np.arange(500, dtype="<u2").tofile(folder / "train.bin")
    with pytest.raises(UserError, match=r"val\.bin"):
        open_token_set("raw", tmp_path)
    np.arange(3, 60, dtype="<u2").tofile(folder / "val.bin")
    found = open_token_set("raw", tmp_path)
    verify(found)
    assert (found.num_tokens("train"), found.num_tokens("val"), found.vocab_size) == (500, 57, 50257)
    assert found.shards_val[0].offset_bytes == 0 and found.shards_val[0].tokens()[0] == 3
    atomic_write_json(folder / "meta.json", {"chars": "".join(map(chr, range(40, 540)))})
    assert open_token_set("raw", tmp_path).vocab_size == 500
    atomic_write_json(folder / "meta.json", {"chars": "abc"})
    with pytest.raises(UserError, match="past the vocabulary of 3"):
        verify(open_token_set("raw", tmp_path))
    with (folder / "val.bin").open("ab") as file:
        file.write(b"x")
    with pytest.raises(UserError, match=r"val\.bin: 115 bytes"):
        open_token_set("raw", tmp_path)
    (folder / "val.bin").write_bytes(b"")
    with pytest.raises(UserError, match=r"val\.bin: 0 bytes"):
        open_token_set("raw", tmp_path)


class _Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.path),)


def test_pickle_is_never_opened(tmp_path: Path) -> None:
    folder = tmp_path / "raw"
    folder.mkdir()
    for name in ("train.bin", "val.bin"):
        np.arange(len(name), dtype="<u2").tofile(folder / name)
    (folder / "meta.pkl").write_bytes(pickle.dumps(_Bomb(tmp_path / "exploded")))
    found = open_token_set("raw", tmp_path)
    verify(found)
    assert found.vocab_size is None and found.tokenizer == "unknown"
    assert any("meta.pkl" in note for note in found.notes)
    assert not (tmp_path / "exploded").exists()


def test_missing_sets_name_the_command(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"python nanogpt/data/shakespeare_char/prepare\.py"):
        open_token_set("shakespeare_char", tmp_path)
    make_set(tmp_path, "mine")
    with pytest.raises(UserError, match=r"there are mine;.*did you mean 'mine'"):
        open_token_set("mime", tmp_path)
    for name in ("", ".", "..", "a\0b"):
        with pytest.raises(UserError, match="not the name"):
            open_token_set(name, tmp_path)
    (tmp_path / "openwebtext").mkdir()
    with pytest.raises(UserError, match=r"holds no token shards; make it with: python nanogpt/data/openweb"):
        open_token_set("openwebtext", tmp_path)
    (tmp_path / "openwebtext" / "progress.json").write_text("{}")
    with pytest.raises(UserError, match=r"not finished; make it with"):
        open_token_set("openwebtext", tmp_path)


def test_a_path_and_a_linked_folder(tmp_path: Path) -> None:
    folder = make_set(tmp_path / "deep")
    (tmp_path / "link").symlink_to(folder)
    by_path = open_token_set(str(folder), tmp_path / "nowhere")
    by_link = open_token_set("link", tmp_path)
    verify(by_link)
    assert by_path.fingerprint() == by_link.fingerprint()


def test_fingerprint_follows_the_content(tmp_path: Path) -> None:
    first = make_set(tmp_path, "a")
    before = open_token_set("a", tmp_path).fingerprint()
    assert open_token_set(str(make_set(tmp_path / "b")), tmp_path).fingerprint() == before
    with_manifest_again(lambda tokens: tokens[::-1])(first)
    assert open_token_set("a", tmp_path).fingerprint() != before


def test_shard_that_vanishes_or_shrinks_under_us(tmp_path: Path) -> None:
    folder = make_set(tmp_path)
    found = open_token_set("s", tmp_path)
    edit_bytes(TRAIN1, lambda data: data[:1500])(folder)
    with pytest.raises(UserError, match=TRAIN1):
        found.shards_train[0].tokens()
    with pytest.raises(UserError, match=TRAIN1):
        verify(found)
    (folder / TRAIN1).unlink()
    with pytest.raises(UserError, match=TRAIN1):
        found.shards_train[0].tokens()


def test_a_file_system_without_mmap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """ENODEV is what some network and FUSE mounts say: tokens are read as they are needed, and a note says so once."""
    import torch

    from nanogpt.batches import TrainBatches

    found = open_token_set(str(make_set(tmp_path)), tmp_path)
    place = {"rank": 0, "world_size": 1, "seed": 1, "device": torch.device("cpu")}

    def batch() -> tuple:
        return TrainBatches(found, block_size=8, batch_size=40, micro_steps=3, **place).get(1, 2)

    mapped, expected = np.array(found.shards[0].tokens()), batch()

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.ENODEV, os.strerror(errno.ENODEV))

    monkeypatch.setattr(np, "memmap", refuse)
    tokens = found.shards[0].tokens()
    assert len(tokens) == 600 and tokens.dtype == np.uint16
    assert np.array_equal(np.asarray(tokens), mapped) and np.array_equal(tokens[590:700], mapped[590:])
    assert tokens[7] == mapped[7] and tokens[-1] == mapped[-1] and len(tokens[9:3]) == 0
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(batch(), expected, strict=True))
    assert capsys.readouterr().err.count("does not map files") == 1
    found.shards[0].path.write_bytes(b"short")
    with pytest.raises(EOFError):
        tokens[100:200]


def test_any_header_is_judged_without_a_crash(tmp_path: Path) -> None:
    rng = random.Random(5)
    path = tmp_path / "x_train_000001.bin"
    write_shard(path, np.arange(1, 40, dtype=np.uint16))
    sound = path.read_bytes()
    accepted = 0
    for _ in range(2000):
        data = bytearray(sound)
        for _ in range(rng.randint(0, 3)):
            data[rng.randrange(12)] = rng.randrange(256)
        path.unlink()  # a new file: rewriting one in place waits for the disk
        path.write_bytes(data[: rng.choice([len(data), len(data), rng.randrange(len(data))])])
        try:
            assert read_header(path) == 39
            accepted += 1
        except UserError as error:
            assert path.name in str(error)
    assert 0 < accepted < 2000


def test_data_root(monkeypatch: pytest.MonkeyPatch, root: Path) -> None:
    monkeypatch.delenv("DATA_ROOT", raising=False)
    assert data_root() == root / "data"
    monkeypatch.setenv("DATA_ROOT", "/some/where")
    assert data_root() == Path("/some/where")
    assert data_root("/flag") == Path("/flag")
