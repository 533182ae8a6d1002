"""Good token sets are read: with and without a manifest, in both formats, on file systems that refuse to map files."""

import errno
import os
import pickle
import random
from pathlib import Path

import numpy as np
import pytest
from shard_kit import TRAIN1, TRAIN2, VAL, edit_bytes, flip, make_set, with_manifest_again

from nanogpt.common.errors import UserError
from nanogpt.common.shards import (
    HEADER_BYTES,
    HEADER_INT32,
    MAGIC,
    data_root,
    open_token_set,
    read_header,
    verify,
    write_shard,
)
from nanogpt.common.storage import atomic_write_json


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
