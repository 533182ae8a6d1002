"""The vocabulary tables against slow definitions and against what the tokenizer really does."""

import functools
import lzma
import random
from pathlib import Path

import numpy as np
import pytest
import tiktoken

from modded_nanogpt.vocabulary import (
    _normal_form,
    canonical_table,
    class_table,
    gpt2_tokens,
    may_follow,
    prefix_table,
)
from nanogpt.common.gpt2_encoding import gpt2_encoding

ROOT = Path(__file__).resolve().parents[2]
SHARED = ROOT.parent / "shared" / "data"


@pytest.fixture(scope="module")
def encoding(mirror: Path, tmp_path_factory: pytest.TempPathFactory) -> tiktoken.Encoding:
    """GPT-2's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIKTOKEN_CACHE_DIR", str(mirror / "tiktoken_cache"))
        return gpt2_encoding(tmp_path_factory.mktemp("vocabulary"))


@functools.cache
def tables(encoding: tiktoken.Encoding):
    """The tokens' bytes, and both tables."""
    tokens = [encoding.decode_single_token_bytes(token) for token in range(50_256)]
    return tokens, prefix_table(tokens, 50_304), canonical_table(tokens, 50_304)


def test_prefixes(encoding):
    tokens, table, _ = tables(encoding)
    ids = {text: token for token, text in enumerate(tokens)}
    assert table.dtype == np.int64 and len(table) == 50_304
    for token in random.Random(0).sample(range(50_256), 3000):
        shorter = [ids[text] for k in range(1, len(tokens[token])) if (text := tokens[token][:k]) in ids]
        assert table[token] == (shorter[-1] if shorter else -1)
    assert encoding.decode([table[encoding.encode(" the")[0]]]) == " th"
    assert set(table[50_256:]) == {-1} == set(table[:256])  # end of text, padding, single bytes


def test_prefixes_of_a_small_vocabulary():
    tokens = [bytes([byte]) for byte in range(256)] + [b"ab", b"abc", b"abcde", b"bc"]
    table = prefix_table(tokens, 384)
    assert table[256:260].tolist() == [ord("a"), 256, 257, ord("b")]
    assert set(table[260:]) == {-1}
    assert prefix_table(tokens, 258).tolist() == table[:258].tolist()


def test_classes_are_as_many_as_the_proposal_counts(encoding):
    """32,980 classes, 17,277 tokens with another one's number, 9 of which nothing is left."""
    tokens = [encoding.decode_single_token_bytes(token) for token in range(50_256)]
    table, own = class_table(tokens, 50_304), np.arange(50_304)
    assert table.dtype == np.uint16 and len(table) == 50_304
    moved = np.flatnonzero(table != own)
    assert len(moved) == 17_277 and len(np.unique(table[:50_257])) == 32_980
    assert np.array_equal(table[table], table) and bool((table[moved] < moved).all())  # a class's first token
    ids = {text: token for token, text in enumerate(tokens)}
    words, blanks = ("the", " the", "The", " The", "THE", " THE"), ("\t", " ", "\n", "\n\n", "\xa0")
    for same in (words, blanks, ("E", " é", "e", " E", "É")):
        assert {table[ids[text.encode()]] for text in same} == {min(ids[text.encode()] for text in same)}
    empty = {
        text for text in tokens if text.decode(errors="ignore").encode() == text and not _normal_form(text.decode())
    }  # fmt: skip
    assert len(empty) == 9 and b"\x0b" in empty
    for alone in (*empty, b"\xc3", b"\xe2\x80"):
        assert table[ids[alone]] == ids[alone]
    assert np.array_equal(table[50_256:], own[50_256:])  # end of text, padding


def test_classes_of_a_small_vocabulary():
    more = " A", " \u00c5", "\ufb01", "fi", "  "
    tokens = [*(bytes([byte]) for byte in range(256)), *(text.encode() for text in more)]
    table = class_table(tokens, 384)
    assert table[ord("A")] == table[ord("a")] == table[256] == table[257] == ord("A")
    assert table[258] == table[259] == 258  # a ligature is its letters
    assert table[ord(" ")] == table[260] == table[ord("\n")] == ord("\t")
    assert table[128:256].tolist() == list(range(128, 256))  # no characters by themselves
    assert class_table(tokens, 258).tolist() == table[:258].tolist()


def odd_texts(count: int) -> list[str]:
    """Short texts of what is awkward for a tokenizer: blanks, contractions, signs, scripts, emoji, words."""
    rng = random.Random(7)
    pieces = [
        " ", "  ", "\n", "\t", "\r\n", "\xa0", "\u3000", "'s", "'S", "'ll", "'", "!", "...", "?!", "--", "1", "23",
        "007", "½", "the", "The", "ing", "é", "ñandú", "привет", "漢字", "ひらがな", "🙂", "👩‍👩", "ﷺ", "e\u0301",
        "http://", "#include", "a", "b", "ab", "x86", "\u200b", "\x00", "_", "__init__", "<|endoftext|>", "aaa",
    ]  # fmt: skip
    return ["".join(rng.choices(pieces, k=rng.randint(2, 12))) for _ in range(count)]


def test_what_the_tokenizer_writes_is_never_forbidden(encoding):
    *_, table = tables(encoding)
    for text in odd_texts(20_000):
        ids = np.array(encoding.encode_ordinary(text))
        wrong = ~may_follow(table, ids[:-1], ids[1:])
        assert not wrong.any(), (text, ids[:-1][wrong], ids[1:][wrong])


@pytest.mark.skipif(not SHARED.is_dir(), reason="the measured corpus is not on this machine")
def test_nothing_in_a_real_text_is_forbidden(encoding):
    """1.97 million tokens of Wikipedia, novels and news, documents one after the other."""
    *_, table = tables(encoding)
    with lzma.open(SHARED / "corpus_val_000000.bin.xz") as file:
        ids = np.frombuffer(file.read(), "<u2", offset=1024).astype(np.int64)
    assert may_follow(table, ids[:-1], ids[1:]).all()


def test_almost_all_that_never_occurs_is_forbidden(encoding):
    """Of two random tokens that the tokenizer would have written otherwise, few are not recognized."""
    tokens, _, table = tables(encoding)
    rng = np.random.default_rng(4)
    before, after = rng.integers(0, 50_256, (2, 30_000))
    forbidden, missed, other = ~may_follow(table, before, after), 0, 0
    for place, (a, b) in enumerate(zip(before, after, strict=True)):
        try:
            text = (tokens[a] + tokens[b]).decode()
        except UnicodeDecodeError:
            continue
        if encoding.encode_ordinary(text) != [a, b]:
            other += 1
            missed += not forbidden[place]
        else:
            assert not forbidden[place], (tokens[a], tokens[b])
    assert other > 500 and missed < 0.03 * other


def test_examples(encoding):
    *_, table = tables(encoding)

    def forbids(left: str, right: str) -> bool:
        (a,), (b,) = encoding.encode(left), encoding.encode(right)
        return not may_follow(table, np.array(a), np.array(b))

    assert forbids("th", "e") and forbids("a", "aa") and forbids(" ", "the") and forbids("1", "2")
    assert not forbids("th", " e") and not forbids("the", "\n") and not forbids("'s", "th")
    assert not forbids("\n", "\n") and not forbids(".", "The")


def test_end_of_text_may_stand_anywhere_and_padding_nowhere(encoding):
    *_, table = tables(encoding)
    everything = np.arange(50_257)
    assert may_follow(table, np.array(50_256), everything).all()
    assert may_follow(table, everything, np.array(50_256)).all()
    for padding in (50_257, 50_303):
        assert not may_follow(table, np.arange(50_304), np.array(padding)).any()


def test_bits_are_as_documented(encoding):
    *_, table = tables(encoding)
    assert (table.dtype, table.shape) == (np.uint8, (50_304, 6288))
    rows = np.array([11, 262, 50_256])
    bits = np.unpackbits(table[rows], axis=1, bitorder="little") == 1
    assert np.array_equal(bits, may_follow(table, rows[:, None], np.arange(50_304)[None]))
    by_hand = [(int(table[262, token // 8]) >> (token % 8)) & 1 for token in range(50_304)]
    assert bits[1].tolist() == by_hand and 40_000 < sum(by_hand) < 50_257


def test_tokens_come_from_the_vocabulary_on_disk(encoding, tmp_path, monkeypatch):
    monkeypatch.delenv("TIKTOKEN_CACHE_DIR", raising=False)  # set by the call, put back afterwards
    if SHARED.is_dir():
        monkeypatch.setenv("DATA_MIRROR", str(SHARED))
    assert gpt2_tokens(tmp_path) == tables(encoding)[0]
