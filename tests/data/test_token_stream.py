"""Documents into shards: the same bytes for any number of threads, any interruption and any damage on the way."""

import json
import os
import random
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import tiktoken

from nanogpt.common.errors import UserError
from nanogpt.common.shards import GPT2_EOT, open_token_set, verify
from nanogpt.data import token_stream
from nanogpt.data.resume import recover
from nanogpt.data.sources import JsonLines
from nanogpt.data.token_stream import (
    AlreadyDone,
    ShardWriter,
    encode_documents,
    in_validation,
    tokenize,
)

EVERY = 10
SHARD = 1024


class Stopped(Exception):
    """Stands for whatever ends a process."""


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_stream, "BATCH_CHARS", 700)
    monkeypatch.setattr(os, "fsync", lambda _: None)  # thousands of small files: what is tested is the order


@pytest.fixture
def texts(tmp_path: Path) -> list[str]:
    """90 documents in two files, with everything that is awkward in a text."""
    rng = random.Random(3)
    odd = ["", "<|endoftext|>", "a<|endoftext|>b", "λ漢字🙂" * 30, "x" * 5000, " \n\n ", "\ud800 alone", "\0"]
    plain = ["".join(rng.choices("abc de.\n", k=rng.randint(1, 300))) for _ in range(82)]
    documents = [*plain, *odd]
    rng.shuffle(documents)
    for number, part in enumerate((documents[:50], documents[50:])):
        lines = "".join(json.dumps({"text": text}) + "\n" for text in part)
        (tmp_path / f"t{number}.jsonl").write_text(lines + "\n")
    return documents


def run(
    folder: Path, encoding: tiktoken.Encoding, *, workers: int = 2, stop_after: int = 0, shard: int = SHARD
) -> list[str]:
    """One attempt, as prepare.py makes it; `stop_after` so many documents it is ended. Returns the messages."""
    said: list[str] = []
    source = JsonLines(str(folder.parent / "*.jsonl"))
    made_from = {**source.identity, "shard_tokens": shard}
    folder.mkdir(exist_ok=True)
    state = recover(folder, made_from, said.append)
    if state is None:
        return [*said, "complete"]
    left = stop_after
    read = source.read

    def counted() -> str | None:
        nonlocal left
        left -= 1
        if left == 0:
            raise Stopped
        return read()

    source.read = counted
    writer = ShardWriter(folder.name, folder, shard, made_from, state)
    tokenize(
        source,
        partial(encode_documents, encoding),
        writer,
        workers=workers,
        validates=partial(in_validation, every=EVERY),
    )
    return said


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def reference(documents: list[str], encoding: tiktoken.Encoding) -> dict[str, np.ndarray]:
    """The tokens, one document after the other, the slow and clear way."""
    tokens: dict[str, list[int]] = {"train": [], "val": []}
    for number, text in enumerate(documents):
        split = "val" if in_validation(number, EVERY) else "train"
        tokens[split] += [GPT2_EOT, *encoding.encode_ordinary(text)]
    return {split: np.array(ids, np.uint16) for split, ids in tokens.items()}


def test_tokens_are_those_of_each_document_alone(tmp_path, texts, byte_encoding) -> None:
    run(tmp_path / "s", byte_encoding)
    found = open_token_set("s", tmp_path)
    verify(found)
    expected = reference(texts, byte_encoding)
    for split, shards in (("train", found.shards_train), ("val", found.shards_val)):
        assert np.array_equal(np.concatenate([shard.tokens() for shard in shards]), expected[split])
    assert len(found.shards_train) > 10
    assert all(shard.num_tokens == SHARD for shard in found.shards_train[:-1])
    assert not list((tmp_path / "s").glob("val_part*")) and not (tmp_path / "s" / "progress.json").exists()
    assert run(tmp_path / "s", byte_encoding) == ["complete"]


def test_one_call_a_batch_equals_one_call_a_document(byte_encoding) -> None:
    rng = random.Random(11)
    for _ in range(300):
        texts = [
            "".join(rng.choices("ab \n\t'.é🙂<|>", k=rng.randint(0, 12))) for _ in range(rng.randint(0, 6))
        ]
        expected = [token for text in texts for token in (GPT2_EOT, *byte_encoding.encode_ordinary(text))]
        assert encode_documents(byte_encoding, texts).tolist() == expected


@pytest.mark.parametrize("workers", [1, 3, 8])
def test_same_bytes_for_any_number_of_threads(tmp_path, texts, byte_encoding, workers: int) -> None:
    run(tmp_path / "s", byte_encoding, workers=2)
    first = contents(tmp_path / "s")
    shutil.rmtree(tmp_path / "s")
    run(tmp_path / "s", byte_encoding, workers=workers)
    assert contents(tmp_path / "s") == first


@pytest.mark.parametrize("seed", range(12))
def test_interrupted_again_and_again(tmp_path, texts, byte_encoding, seed: int) -> None:
    shard = (SHARD, 2000, 5003)[seed % 3]
    run(tmp_path / "s", byte_encoding, shard=shard)
    undisturbed = contents(tmp_path / "s")
    shutil.rmtree(tmp_path / "s")
    rng = random.Random(seed)
    attempts = 0
    while True:
        attempts += 1
        try:
            run(tmp_path / "s", byte_encoding, stop_after=rng.randint(30, 91 + attempts), shard=shard)
            break
        except Stopped:
            with pytest.raises(UserError, match=r"not finished|no token shards"):
                open_token_set("s", tmp_path)
    assert contents(tmp_path / "s") == undisturbed


@pytest.mark.parametrize("call", [1, 2, 3, 7])
@pytest.mark.parametrize(
    "writing", ["write_shard", "atomic_write_bytes", "atomic_write_json", "write_manifest"]
)
@pytest.mark.parametrize("after", [False, True])
def test_ended_at_each_write(
    tmp_path, texts, byte_encoding, monkeypatch, writing: str, call: int, after: bool
) -> None:
    run(tmp_path / "s", byte_encoding)
    undisturbed = contents(tmp_path / "s")
    shutil.rmtree(tmp_path / "s")
    really, calls = getattr(token_stream, writing), 0

    def ends(*args: object, **named: object) -> object:
        nonlocal calls
        calls += 1
        result = really(*args, **named) if after or calls != call else None
        if calls == call:
            raise Stopped
        return result

    with monkeypatch.context() as patch:
        patch.setattr(token_stream, writing, ends)
        if writing == "write_manifest" and call > 1:
            run(tmp_path / "s", byte_encoding)  # it is called once
        else:
            with pytest.raises(Stopped):
                run(tmp_path / "s", byte_encoding)
    run(tmp_path / "s", byte_encoding)
    left = {name: data for name, data in contents(tmp_path / "s").items() if name in undisturbed}
    assert left == undisturbed


def damage(path: Path, how: str) -> None:
    data = bytearray(path.read_bytes())
    if how == "gone":
        path.unlink()
    elif how == "cut":
        path.write_bytes(data[: len(data) // 2])
    else:
        data[len(data) // 2] ^= 1
        path.write_bytes(data)


@pytest.mark.parametrize("how", ["gone", "cut", "flipped"])
@pytest.mark.parametrize(
    "name", ["s_train_000001.bin", "s_train_000007.bin", "s_val_000000.bin", "manifest.json"]
)
def test_finished_set_is_mended(tmp_path, texts, byte_encoding, name: str, how: str) -> None:
    run(tmp_path / "s", byte_encoding)
    sound = contents(tmp_path / "s")
    damage(tmp_path / "s" / name, how)
    try:
        said = run(tmp_path / "s", byte_encoding)
    except UserError as error:  # a flipped bit in the manifest can make it another set's
        assert name == "manifest.json" and "made otherwise" in str(error)
        return
    assert contents(tmp_path / "s") == sound
    if name.startswith("s_"):
        assert name in said[0] and "damaged" in said[0]


@pytest.mark.parametrize("how", ["gone", "cut", "flipped"])
@pytest.mark.parametrize("name", ["s_train_000001.bin", "s_train_000003.bin", "progress.json", "val_part"])
def test_damage_while_it_was_interrupted(tmp_path, texts, byte_encoding, name: str, how: str) -> None:
    run(tmp_path / "s", byte_encoding)
    undisturbed = contents(tmp_path / "s")
    shutil.rmtree(tmp_path / "s")
    with pytest.raises(Stopped):
        run(tmp_path / "s", byte_encoding, stop_after=60)
    target = next(iter(sorted((tmp_path / "s").glob(f"{name}*"))))
    damage(target, how)
    try:
        run(tmp_path / "s", byte_encoding)
    except UserError as error:
        assert name == "progress.json" and "made otherwise" in str(error)
        return
    assert contents(tmp_path / "s") == undisturbed


def test_other_settings_are_refused(tmp_path, texts, byte_encoding) -> None:
    run(tmp_path / "s", byte_encoding)
    with pytest.raises(UserError, match="shard_tokens was 1024, is 2048"):
        run(tmp_path / "s", byte_encoding, shard=2048)
    with (tmp_path / "t1.jsonl").open("a") as file:
        file.write('{"text": "more"}\n')
    with pytest.raises(UserError, match="made otherwise"):
        run(tmp_path / "s", byte_encoding)


def test_the_slower_of_two_stops(tmp_path, texts, byte_encoding) -> None:
    with pytest.raises(Stopped):
        run(tmp_path / "s", byte_encoding, stop_after=40)
    source = JsonLines(str(tmp_path / "*.jsonl"))
    made_from = {**source.identity, "shard_tokens": SHARD}
    state = recover(tmp_path / "s", made_from, print)
    slower = ShardWriter("s", tmp_path / "s", SHARD, made_from, state)
    run(tmp_path / "s", byte_encoding)
    done = contents(tmp_path / "s")
    with pytest.raises(AlreadyDone):
        tokenize(
            source,
            partial(encode_documents, byte_encoding),
            slower,
            workers=1,
            validates=partial(in_validation, every=EVERY),
        )
    assert contents(tmp_path / "s") == done


def test_validation_documents_are_fixed() -> None:
    assert [number for number in range(9000) if in_validation(number, 2000)] == [0, 29, 5793]
    share = sum(in_validation(number, 2000) for number in range(500_000)) / 500_000
    assert 0.0004 < share < 0.0006


BAD_LINES = {
    "not JSON": b"hello\n",
    "no text": b'{"id": 1}\n',
    "text a number": b'{"text": 5}\n',
    "a list": b'["text"]\n',
    "compressed": b"\xfd7zXZ\x00\x00\n",
    "not UTF-8": b'{"text": "\xff"}\n',
    "deep": b"[" * 100_000 + b"\n",
}


@pytest.mark.parametrize("what", BAD_LINES)
def test_bad_line_is_named(tmp_path: Path, what: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "fine"}\n\n' + BAD_LINES[what])
    source = JsonLines(str(tmp_path / "a.jsonl"))
    source.open(None)
    assert source.read() == "fine"
    with pytest.raises(UserError, match=r"a\.jsonl:3: "):
        source.read()
    with pytest.raises(UserError, match="no such file"):
        JsonLines(str(tmp_path / "*.nothing"))


def test_too_few_documents(tmp_path, byte_encoding) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "only one"}\n')
    with pytest.raises(UserError, match="too few documents"):
        run(tmp_path / "s", byte_encoding)
