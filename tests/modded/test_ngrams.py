"""Rows and signs of n-grams: the specification's formulas in Python's own integers, wrapped as int32 products wrap."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from modded_nanogpt.batches import _Packer
from modded_nanogpt.config import Config
from modded_nanogpt.ngrams import gram_rows, gram_signs
from modded_nanogpt.vocabulary import gpt2_classes

RECORD = 84_602_880


def wrapped(product: int) -> int:
    return (product + 2**31) % 2**32 - 2**31


def test_worked_examples():
    """By hand: 50256 x 60961 = 3063656016, which wraps to -1231311280, and a remainder is never negative."""
    assert wrapped(50_256 * 60_961) == -1_231_311_280
    rows, signs = gram_rows(np.array([50_256, 11, 50_256], np.uint16), RECORD), gram_signs(
        np.array([50_256, 11, 50_256], np.uint16), 8192
    )  # fmt: skip
    half = RECORD // 2
    assert rows[:, 0].tolist() == [half - 1, RECORD - 1] and rows[1, 1] == RECORD - 1
    assert rows[0, 1] == (36_313 * 11 ^ 27_191 * 50_256) % (half - 1)
    mixed = 17_351 * 50_256 ^ 60_961 * 11 ^ wrapped(45_259 * 50_256)
    assert mixed < 0 and rows[1, 2] == half + mixed % (half - 1) and half <= rows[1, 2] < RECORD - 1
    assert signs[:, 0].tolist() == [0, 0] and signs[1, 1] == 0
    assert wrapped(48_271 * 50_256) < 0
    assert signs[0, 2] == (wrapped(48_271 * 50_256) ^ 30_011 * 11) & 8191


@pytest.mark.parametrize("rows", [RECORD, 8192, 64])
def test_the_formulas(rows):
    tokens = np.random.default_rng(3).integers(0, 50_257, 3000).astype(np.uint16)
    found, signs, half = gram_rows(tokens, rows), gram_signs(tokens, 8192), rows // 2
    assert found.dtype == signs.dtype == np.int32 and found.shape == signs.shape == (2, 3000)
    negative = 0
    for t in range(2, 3000):
        a, b, c = (int(tokens[t - k]) for k in range(3))
        pair = wrapped(36_313 * a) ^ wrapped(27_191 * b)
        triple = wrapped(17_351 * a) ^ wrapped(60_961 * b) ^ wrapped(45_259 * c)
        assert found[:, t].tolist() == [pair % (half - 1), half + triple % (half - 1)]
        assert signs[0, t] == (wrapped(48_271 * a) ^ wrapped(30_011 * b)) & 8191
        assert signs[1, t] == (wrapped(58_699 * a) ^ wrapped(39_779 * b) ^ wrapped(26_801 * c)) & 8191
        negative += triple < 0
    assert 500 < negative < 2500


@pytest.mark.parametrize("length", [1, 2, 3])
def test_texts_without_tokens_before(length):
    tokens = np.arange(length, dtype=np.uint16)
    rows = gram_rows(tokens, 64)
    assert rows[0, 0] == 31 and rows[1, : min(2, length)].tolist() == [63] * min(2, length)
    assert gram_signs(tokens, 64)[:, 0].tolist() == [0, 0]


def test_texts_that_are_alike_share_their_rows(mirror, monkeypatch):
    """Of " The cat" and "THE Cat" the pairs and triples are one with --normalised_grams, signs too, and not without."""
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(mirror / "tiktoken_cache"))
    config = Config(recipe="tiny", prefix=False, sampled_softmax=False, device="cpu", normalised_grams=True)
    one, other = [50_256, 383, 3797, 13, 0], [50_256, 10_970, 5181, 13, 0]

    def batch(of: Config, tokens: list[int]):
        return _Packer(of, False).pack(np.array(tokens, np.uint16), np.array([4]), 2, 4)

    first, second = batch(config, one), batch(config, other)
    assert torch.equal(first.gram_rows, second.gram_rows) and torch.equal(first.gram_signs, second.gram_signs)
    assert not torch.equal(first.inputs, second.inputs)
    classes = gpt2_classes(Path("unread"), 50_304)[one[:-1]]
    assert torch.equal(first.gram_rows, torch.from_numpy(gram_rows(classes, 8192)))
    plain = dataclasses.replace(config, normalised_grams=False)
    assert not torch.equal(batch(plain, one).gram_rows[:, 1:3], batch(plain, other).gram_rows[:, 1:3])
    older = dataclasses.replace(config, table_rows="0")  # the bigram table knows tokens
    assert not torch.equal(batch(older, one).bigram_rows[1:3], batch(older, other).bigram_rows[1:3])


def test_batches_have_them_and_several_ranks_what_they_want():
    config = Config(recipe="tiny", vocab_size=512, prefix=False, sampled_softmax=False, device="cpu")
    tokens = np.random.default_rng(1).integers(0, 512, 257).astype(np.uint16)

    def batch(of: Config, world_size: int):
        return _Packer(of, False, world_size).pack(tokens, np.array([257]), 4, 256)

    one, two = batch(config, 1), batch(config, 2)
    assert torch.equal(one.gram_rows, torch.from_numpy(gram_rows(tokens[:-1], 8192)))
    assert one.bigram_rows is None and one.gram_wanted is None and one.gram_places is None
    assert torch.equal(two.gram_wanted[two.gram_places.long()], two.gram_rows)
    assert bool((two.gram_wanted.diff() > 0).all())
    older = batch(dataclasses.replace(config, table_rows="0"), 2)
    assert older.gram_rows is None and older.bigram_rows is not None and older.sign_rows is not None
