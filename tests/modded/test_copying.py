"""What a text may be about to repeat: as a plain search finds it, never from ahead, and in all batches."""

import dataclasses

import numpy as np
import pytest
import torch

from modded_nanogpt.batches import Batch, TrainBatches, ValBatches, _Packer
from modded_nanogpt.config import Config
from modded_nanogpt.copying import BUCKETS, LENGTHS, find_copies
from modded_nanogpt.vocabulary import gpt2_classes
from tests.modded.test_batches import CPU, EOT, make_set

CONFIG = Config(
    recipe="tiny", prefix=False, sampled_softmax=False, device="cpu", vocab_size=512, copy_input=True
)


def literal(tokens: list[int], classes: list[int], ends: list[int]) -> list[tuple[int, int]]:
    """(candidate, bucket) of every token, by looking at all earlier places."""
    found = []
    for now in range(len(tokens)):
        start, best = max([end for end in ends if end <= now], default=0), (0, 0)
        for which, length in enumerate(LENGTHS):
            last = classes[now - length + 1 : now + 1]
            places = [
                place
                for place in range(start + length - 1, now)
                if classes[place - length + 1 : place + 1] == last
            ]
            if now - length + 1 < start or not places:
                break
            best = tokens[places[-1] + 1], 3 * which + min(3, len(places))
        found.append(best)
    return found


def found(tokens: np.ndarray, classes: np.ndarray, ends: list[int]) -> list[tuple[int, int]]:
    """The same by `find_copies`."""
    documents = np.repeat(np.arange(len(ends)), np.diff([0, *ends]))[: len(tokens)]
    ids = torch.from_numpy(documents * 2**16 + classes)
    candidates, buckets = find_copies(torch.from_numpy(tokens).int(), ids)
    assert candidates.dtype == buckets.dtype == torch.int32 and candidates.shape == buckets.shape == (
        len(tokens),
    )
    return list(zip(candidates.tolist(), buckets.tolist(), strict=True))


def text(seed: int, size: int, symbols: int) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """Tokens of few kinds, their classes (two tokens each), and where documents end; parts are repeated."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, symbols, size)
    for _ in range(3):
        length = int(rng.integers(1, size // 2 + 2))
        begin, to = rng.integers(0, size - length + 1, 2)
        tokens[to : to + length] = tokens[begin : begin + length].copy()
    ends = sorted({*rng.integers(1, size + 1, 3).tolist(), size})
    return tokens, tokens // 2, ends


def test_lengths_are_sums_of_their_halves():
    assert BUCKETS == 31 and LENGTHS == (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
    assert all(length // 2 in LENGTHS and length - length // 2 in LENGTHS for length in LENGTHS[1:])


@pytest.mark.parametrize("symbols", [1, 2, 5, 40])
def test_it_finds_what_a_plain_search_finds(symbols):
    seen = set()
    for seed, size in enumerate((1, 2, 3, 31, 33, 64, 127, 200)):
        given = text(seed, size, symbols)
        expected = literal(given[0].tolist(), given[1].tolist(), given[2])
        assert found(*given) == expected, (seed, size)
        seen |= {bucket for _, bucket in expected}
    assert len(seen) > 10 and (symbols > 2 or {28, 29, 30} <= seen)  # of 32 tokens and more


def test_by_hand():
    """Two documents: the second does not know the first; the latest of three places counts."""
    tokens = np.array([9, 1, 5, 1, 6, 1, 7, 1, 9, 1, 5])
    assert found(tokens, tokens, [8, 11]) == [
        (0, 0), (0, 0), (0, 0), (5, 1), (0, 0), (6, 2), (0, 0), (7, 3), (0, 0), (0, 0), (0, 0)
    ]  # fmt: skip
    assert found(tokens, tokens, [11])[8:] == [(1, 1), (5, 4), (1, 7)]
    assert found(tokens, tokens // 8, [11])[7] == (1, 13)  # six of one class, as one place before


@pytest.mark.parametrize("seed", range(6))
def test_nothing_looks_ahead(seed):
    """Whatever follows a token, its own candidate and bucket stay."""
    tokens, classes, ends = text(seed, 150, 3)
    before = found(tokens, classes, ends)
    rng = np.random.default_rng(seed)
    for now in rng.integers(0, 149, 12):
        other = tokens.copy()
        other[now + 1 :] = rng.integers(0, 3, len(other) - now - 1)
        later = [end for end in ends if end <= now]
        assert found(other, other // 2, [*later, 150])[: now + 1] == before[: now + 1]


@pytest.mark.gpu
def test_a_gpu_finds_the_same():
    if not torch.cuda.is_available():
        pytest.skip("no NVIDIA driver on this machine")
    tokens, classes, _ = text(1, 49_152, 300)
    given = torch.from_numpy(tokens).int(), torch.from_numpy(classes + (np.arange(49_152) // 700 << 16))
    for here, there in zip(find_copies(*given), find_copies(*(part.cuda() for part in given)), strict=True):
        assert torch.equal(here, there.cpu())


def pairs(batch: Batch) -> list[tuple[int, int]]:
    return list(zip(batch.copy_tokens.tolist(), batch.copy_buckets.tolist(), strict=True))


def test_lanes_and_validation_have_them_by_document(tmp_path):
    """Where attention is cut within a document, in training, what is copied is not."""
    rng = np.random.default_rng(2)
    tokens = rng.integers(0, 6, 40_000).astype(np.uint16)
    tokens[np.cumsum(rng.integers(2, 300, 200))] = 511
    token_set = make_set(tmp_path, [tokens], tokens[:3000], eot=511, vocab=512)
    config = dataclasses.replace(
        CONFIG, steps=6, extension_steps=1, data_passes=9, eval_tokens=900, eval_slice=512
    )
    plain = dataclasses.replace(config, copy_input=False)
    for step, lane in ((0, 0), (5, 3)):
        batch, without = (TrainBatches(token_set, of, 0, 1, CPU).get(step, lane) for of in (config, plain))
        assert without.copy_tokens is None and torch.equal(batch.cu_seqlens, without.cu_seqlens)
        inputs = batch.inputs.tolist()
        ends = [place for place, token in enumerate(inputs) if token == 511][1:]
        assert pairs(batch) == literal(inputs, inputs, [*ends, len(inputs)])
    assert set(ends) < set(batch.cu_seqlens.tolist()[1:-1]) - {len(inputs)}  # attention has further borders
    for batch, _ in ValBatches(token_set, config, 0, 1, CPU):
        inputs = batch.inputs.tolist()
        ends = [place for place, token in enumerate(inputs) if token == 511 and place]
        assert pairs(batch) == literal(inputs, inputs, [*ends, len(inputs)])


def test_gpt2s_tokens_are_compared_by_class(mirror, monkeypatch, tmp_path):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(mirror / "tiktoken_cache"))
    tokens = np.array([EOT, 383, 3797, 13, 10_970, 5181, 13], np.uint16)  # " The cat." "THE Cat."
    batch = (
        _Packer(dataclasses.replace(CONFIG, vocab_size=0), False).pack(tokens, np.array([6]), 2, 6).to(CPU)
    )
    assert pairs(batch) == [(0, 0), (0, 0), (0, 0), (0, 0), (3797, 1), (13, 4)]
    classes = gpt2_classes(tmp_path, 50_304)
    assert (
        classes[383] == classes[10_970] and batch.gram_rows[0, 2] != batch.gram_rows[0, 5]
    )  # a switch of its own
