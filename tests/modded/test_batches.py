"""The batches against a slow and literal reading of the record's rules, on random texts and on a real one."""

import dataclasses
import lzma
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from modded_nanogpt import batches as batches_module
from modded_nanogpt.batches import (
    TrainBatches,
    ValBatches,
    bigram_rows,
    boundaries,
    piece_ends,
    sign_rows,
    tokens_needed,
)
from modded_nanogpt.config import PRESETS, Config
from modded_nanogpt.data_plan import check_targets, find_documents, plan_data
from modded_nanogpt.kernels.embedding import Runs
from modded_nanogpt.schedule import at, stages, total_steps
from nanogpt.common.errors import UserError
from nanogpt.common.flags import parse
from nanogpt.common.manifest import write_manifest
from nanogpt.common.shards import TokenSet, open_token_set, write_shard

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
EOT = 50_256


def record89(*flags: str) -> Config:
    return parse(Config, ["record89", *flags], prog="t", description="t", presets=PRESETS)


SMALL = record89(
    "--recipe=tiny_record89", "--steps=12", "--extension_steps=2", "--dataset=random", "--eval_tokens=900",
    "--eval_slice=256",
)  # fmt: skip


def random_text(rng: np.random.Generator, tokens: int) -> np.ndarray:
    """Documents of 1 to 400 tokens; the first may have begun in an earlier shard."""
    text = rng.integers(0, EOT, tokens).astype(np.uint16)
    places = np.cumsum(rng.choice([1, 2, 20, 60, 150, 399], size=tokens, p=[0.02, 0.03, 0.3, 0.3, 0.3, 0.05]))
    text[places[places < tokens]] = EOT
    return text


def make_set(
    root: Path, train: list[np.ndarray], val: np.ndarray, eot: int | None = EOT, vocab: int = 50_257,
    name: str = "random",
) -> TokenSet:  # fmt: skip
    """A set of these training shards and this validation shard, in the folder `name` of `root`."""
    folder = root / name
    folder.mkdir(parents=True)
    files = [
        {**write_shard(folder / f"random_{split}_{number:06d}.bin", tokens), "split": split}
        for split, shards in (("train", train), ("val", [val]))
        for number, tokens in enumerate(shards, split == "train")
    ]
    write_manifest(folder, name, "gpt2", vocab, eot, files)
    return open_token_set(name, root)


@pytest.fixture(params=range(4))
def token_set(request, tmp_path) -> TokenSet:
    """Four shards, some of them shorter than a step, so that every kind of shard end occurs."""
    rng = np.random.default_rng(request.param)
    sizes = rng.integers(3_000, 70_000, 4)
    sizes[request.param] = 90_000
    return make_set(tmp_path, [random_text(rng, size) for size in sizes], random_text(rng, 1500))


def literal_step(shards, state, lanes, size, limit, repeat=False):
    """One step's buffers, token by token as the rules say, and the state after it: [shard, index into its BOS]."""
    shard, index = state
    for _ in range(len(shards) + 2):
        tokens = shards[shard]
        bos = [place for place, token in enumerate(tokens) if token == EOT]
        buffers, documents = [], []
        try:
            for _ in range(lanes):
                buffer, ends = [], []
                while len(buffer) < size + 1:
                    start = bos[index]
                    following = bos[index + 1] if index + 1 < len(bos) else len(tokens)
                    index += 1
                    end = min(following, start + limit, start + size + 1 - len(buffer))
                    buffer += list(tokens[start:end])
                    ends.append(len(buffer))
                buffers.append(buffer)
                documents.append(ends)
        except IndexError:  # the shard has no more documents: the unfinished step is dropped
            shard, index = (shard + 1) % len(shards), 0
            if shard == 0 and not repeat:
                return None, None, (shard, index)
            continue
        return buffers, documents, (shard, index)
    return None, None, (shard, index)


def test_every_step_is_what_the_rules_say(token_set):
    config = dataclasses.replace(SMALL, data_passes=9)
    shards = [shard.tokens().tolist() for shard in token_set.shards_train]
    ours, state, lanes = TrainBatches(token_set, config, 0, 1, CPU), (0, 0), 8
    for step in range(total_steps(config)):
        plan = at(config, step)
        size = plan.batch_tokens // lanes
        buffers, documents, state = literal_step(shards, state, lanes, size, plan.max_document, repeat=True)
        for lane in range(lanes):
            batch = ours.get(step, lane)
            assert batch.inputs.tolist() == buffers[lane][:-1]
            assert batch.targets.tolist() == buffers[lane][1:]
            ends = [0, *(min(end, size) for end in documents[lane])]
            filled = batch.cu_seqlens.tolist()
            assert filled[: len(ends)] == ends and set(filled[len(ends) :]) <= {size}
            assert batch.max_document == 256 >= int(batch.cu_seqlens.diff().max())
            assert batch.inputs[
                batch.cu_seqlens[:-1][batch.cu_seqlens.diff() > 0].long()
            ].unique().tolist() == [EOT]
    assert ours.state() == {"step": step + 1, "shard": state[0], "document": state[1]}


def test_attention_keeps_pieces_of_long_documents_apart(token_set):
    """Record 92's cap, here 192 tokens: further borders in cu_seqlens, and nothing else is changed."""
    assert piece_ends(np.array([5, 4, 13]), 4).tolist() == [4, 5, 9, 13, 17, 21, 22]
    assert piece_ends(np.array([5, 4]), 0).tolist() == [5, 9]
    kept = Config(recipe="tiny", steps=12, extension_steps=2, dataset="random", data_passes=9, eval_tokens=900,
                  eval_slice=256, sampled_softmax=False)  # fmt: skip
    capped, plain = (
        TrainBatches(token_set, dataclasses.replace(kept, attention_cap=on), 0, 1, CPU)
        for on in (True, False)
    )
    for step in (0, 5, 13):
        with_cap, without = capped.get(step, 3), plain.get(step, 3)
        assert torch.equal(with_cap.inputs, without.inputs) and torch.equal(with_cap.targets, without.targets)
        lengths = without.cu_seqlens.diff()
        ends = [0, *piece_ends(lengths[lengths > 0].numpy(), 192).tolist()]
        assert with_cap.cu_seqlens.unique().tolist() == ends
        assert with_cap.cu_seqlens.diff().max() <= with_cap.max_document <= 192


def test_a_step_that_does_not_fit_is_dropped_whole(tmp_path):
    """The rest of a shard that does not hold a whole step is left out, however much of it there is."""
    config = dataclasses.replace(SMALL, steps=3, extension_steps=0)
    rng = np.random.default_rng(5)
    step_one = 8 * (256 + 1)
    first = rng.integers(0, EOT, step_one + 3000).astype(np.uint16)
    first[::60] = EOT  # room for the first step and for a part of the second
    second = rng.integers(0, EOT, 80_000).astype(np.uint16)
    second[:7], second[7::40] = 1, EOT  # begins in the middle of a document
    found = plan_data(make_set(tmp_path, [first, second], first[:2000]), config)
    assert found.shard.tolist() == [0, 1, 1]
    assert found.first[1, 0] == 0 and found.documents[1].starts[0] == 7
    assert found.first[2, 0] == found.first[1, -1]
    assert found.source_tokens == len(first) + found.documents[1].starts[found.first[2, -1]]


@pytest.mark.parametrize("seed", range(3))
def test_all_world_sizes_see_the_same_lanes(seed, tmp_path):
    rng = np.random.default_rng(seed)
    token_set = make_set(tmp_path, [random_text(rng, 60_000) for _ in range(3)], random_text(rng, 2000))
    config = dataclasses.replace(SMALL, data_passes=9)
    alone = TrainBatches(token_set, config, 0, 1, CPU)
    expected = {(step, lane): alone.get(step, lane) for step in range(14) for lane in range(8)}
    for world_size in (2, 4, 8):
        for rank in range(world_size):
            ours = TrainBatches(token_set, config, rank, world_size, CPU)
            for step in range(14):
                for micro_step in range(8 // world_size):
                    same(ours.get(step, micro_step), expected[step, micro_step * world_size + rank])


def parts(batch: batches_module.Batch) -> dict[str, object]:
    """Every tensor of a batch by name, on the CPU, and what is no tensor."""
    found: dict[str, object] = {}
    for field in dataclasses.fields(batch):
        value = getattr(batch, field.name)
        pieces = value._asdict() if isinstance(value, Runs) else {"": value}
        for name, piece in pieces.items():
            found[f"{field.name} {name}".strip()] = piece.cpu() if isinstance(piece, torch.Tensor) else piece
    return found


def same(one: batches_module.Batch, other: batches_module.Batch) -> None:
    left, right = parts(one), parts(other)
    assert left.keys() == right.keys()
    for name, value in left.items():
        equal = torch.equal(value, right[name]) if isinstance(value, torch.Tensor) else value == right[name]
        assert equal, name


@pytest.mark.parametrize(("before", "after"), [(1, 1), (1, 8), (2, 4), (8, 2), (4, 4)])
def test_resume_is_exact(token_set, before, after):
    """Stopped after any step and started again on another number of ranks: the same lanes follow."""
    config = dataclasses.replace(SMALL, data_passes=9)
    undisturbed = TrainBatches(token_set, config, 0, 1, CPU)
    for stop in (1, 5, 11, 13):
        first = TrainBatches(token_set, config, 0, before, CPU)
        for step in range(stop):
            for micro_step in range(8 // before):
                first.get(step, micro_step)
        second = TrainBatches(token_set, config, after - 1, after, CPU)
        assert second.restore(first.state()) == ""
        assert second.state() == first.state() and first.state()["step"] == stop
        same(second.get(stop, 0), undisturbed.get(stop, after - 1))


def test_a_half_taken_step_is_not_counted(token_set):
    ours = TrainBatches(token_set, dataclasses.replace(SMALL, data_passes=9), 0, 2, CPU)
    for micro_step in range(4):
        ours.get(0, micro_step)
    ours.get(1, 0)
    assert ours.state()["step"] == 1


def test_changed_data_is_said_at_a_resume(token_set):
    ours = TrainBatches(token_set, dataclasses.replace(SMALL, data_passes=9), 0, 1, CPU)
    said = ours.restore({"step": 5, "shard": 0, "document": 1})
    assert "the data has changed: step 5" in said


def test_narrow_lanes(token_set):
    config = dataclasses.replace(SMALL, data_passes=9, lanes=16)
    ours = TrainBatches(token_set, config, 3, 4, CPU)
    shards = [shard.tokens().tolist() for shard in token_set.shards_train]
    buffers, _, _ = literal_step(shards, (0, 0), 16, 128, 96, repeat=True)
    assert ours.layout.micro_steps == 4
    assert ours.get(0, 2).inputs.tolist() == buffers[2 * 4 + 3][:-1]


def test_too_little_data_is_refused_before_training(tmp_path):
    rng = np.random.default_rng(0)
    token_set = make_set(tmp_path, [random_text(rng, 30_000)], random_text(rng, 2000))
    with pytest.raises(UserError) as caught:
        TrainBatches(token_set, SMALL, 0, 1, CPU)
    words = str(caught.value)
    assert "1 training file (random_train_000001.bin) with 30,000 tokens" in words
    passes = re.search(r"or pass --data_passes=(\d+)$", words)
    assert "of 14 steps" in words and passes
    needed = int(words.split("about ")[1].split(" ")[0].replace(",", ""))
    trained = sum((stage.end - stage.start) * stage.batch_tokens for stage in stages(SMALL))
    assert trained < needed < 5 * trained
    enough = dataclasses.replace(SMALL, data_passes=int(passes[1]))
    repeating = plan_data(token_set, enough)
    assert repeating.first.shape == (14, 9)
    again = repeating.repeats_from()
    assert again and repeating.first[again, 0] == 0 < repeating.first[again - 1, 0]
    once = plan_data(make_set(tmp_path / "once", [random_text(rng, 300_000)], random_text(rng, 2000)), SMALL)
    assert once.repeats_from() is None
    with pytest.raises(UserError, match="1 training file"):  # a pass fewer than that would not do
        plan_data(token_set, dataclasses.replace(SMALL, data_passes=2))
    published = make_set(tmp_path, [random_text(rng, 30_000)], random_text(rng, 2000), name="fineweb10B")
    with pytest.raises(UserError, match=r"cached_fineweb10B.py \d+ --set=fineweb10B, or train fewer"):
        plan_data(published, dataclasses.replace(SMALL, dataset="fineweb10B", steps=50))
    tiny = make_set(tmp_path / "tiny", [random_text(rng, 900)], random_text(rng, 2000))
    for passes in (1, 9):  # not even one step: repeating would go on forever
        with pytest.raises(UserError, match="last for 0 of 14 steps"):
            plan_data(tiny, dataclasses.replace(SMALL, data_passes=passes))


def test_bad_sets_are_refused(tmp_path):
    rng = np.random.default_rng(0)
    plain = rng.integers(0, 300, 90_000).astype(np.uint16)
    for number, (eot, vocab, words) in enumerate(
        [(300, 60_000, "say --vocab_size=60000"), (299, 50_257, "no token 299")]
    ):
        text = np.minimum(plain, 298) if eot == 299 else plain
        with pytest.raises(UserError, match=words):
            plan_data(make_set(tmp_path / str(number), [text], plain[:2000], eot, vocab), SMALL)


def test_a_set_without_documents_is_cut_into_pieces(tmp_path):
    """One token a character, no end of text: the longest document of any stage is the piece."""
    text = np.random.default_rng(0).integers(0, 97, 90_000).astype(np.uint16)
    token_set = make_set(tmp_path, [text], text[:2000], None, 97)
    config = dataclasses.replace(SMALL, steps=3, extension_steps=0)
    ours = TrainBatches(token_set, config, 0, 1, CPU)
    first, second = ours.get(0, 0), ours.get(1, 0)
    assert np.array_equal(first.inputs[:192], np.concatenate([text[:96], text[256 : 256 + 96]]))
    assert np.array_equal(second.inputs[:256], text[(begun := 256 * ours.plan.first[1, 0]) : begun + 256])
    assert "no end-of-text tokens" in ours.plan.describe(token_set, config)
    ((batch, _), *_) = ValBatches(token_set, config, 0, 1, CPU)
    assert batch.cu_seqlens.unique().tolist() == [0, 256]


def test_other_vocabularies(tmp_path):
    rng = np.random.default_rng(0)
    text = rng.integers(0, 300, 90_000).astype(np.uint16)
    token_set = make_set(tmp_path, [text, text], text[:2000], 7, 300)
    config = dataclasses.replace(SMALL, vocab_size=300)
    batch = TrainBatches(token_set, config, 0, 1, CPU).get(0, 0)
    assert int(batch.inputs[0]) == 7 and int(batch.inputs.max()) < 300


def test_hashes_by_their_formulas():
    tokens = np.random.default_rng(3).integers(0, 50_257, 5000).astype(np.uint16)
    rows, signs = bigram_rows(tokens, 377_280), sign_rows(tokens, 8192)
    assert (rows[0], signs[0]) == (377_279, 0)
    for place in range(1, 5000):
        now, before = int(tokens[place]), int(tokens[place - 1])
        assert rows[place] == ((36313 * now) ^ (27191 * before)) % 377_279
        assert signs[place] == (before ^ now) % 8192
    assert 36313 * 50_256 < 2**31  # so that 32-bit arithmetic on a GPU would give the same
    assert rows.min() >= 0 and rows[1:].max() < 377_279


def test_batches_have_what_the_techniques_need(token_set):
    config = dataclasses.replace(SMALL, data_passes=9)
    batch = TrainBatches(token_set, config, 0, 1, CPU).get(3, 1)
    kinds = {name: value.dtype for name, value in parts(batch).items() if isinstance(value, torch.Tensor)}
    assert kinds.pop("targets") == torch.int64 and set(kinds.values()) == {torch.int32}
    for ids, runs in ((batch.inputs, batch.token_runs), (batch.bigram_rows, batch.bigram_runs)):
        again = torch.empty_like(ids)
        again[runs.order] = runs.ids.repeat_interleave(runs.starts.diff())
        assert torch.equal(again, ids) and bool((runs.ids.diff() > 0).all())
    assert np.array_equal(batch.bigram_rows, bigram_rows(batch.inputs.numpy(), 4096))
    assert np.array_equal(batch.sign_rows, sign_rows(batch.inputs.numpy(), 64))
    unsigned = TrainBatches(token_set, dataclasses.replace(config, bigram_signs=False), 0, 1, CPU).get(0, 0)
    assert unsigned.sign_rows is None and unsigned.bigram_rows is not None
    without = TrainBatches(token_set, dataclasses.replace(config, bigram=False), 0, 1, CPU).get(0, 0)
    assert without.sign_rows is None and without.bigram_rows is None and without.bigram_rows_cpu is None


def test_more_different_tokens_than_a_sampled_step_scores_are_refused_before_training(tmp_path):
    text, config = random_text(np.random.default_rng(8), 2_000_000), Config(steps=4, extension_steps=1)
    many = make_set(tmp_path, [text], text[:1000])
    with pytest.raises(
        UserError, match=r"a lane of step 0 has 1\d,\d{3} different .* 10,240 are scored; pass --lanes=16"
    ):
        check_targets(plan_data(many, config), many, config)
    check_targets(plan_data(many, config), many, dataclasses.replace(config, sampled_softmax=False))
    few = make_set(
        tmp_path, [np.where(text == EOT, EOT, text % 9000).astype(np.uint16)], text[:1000], name="few"
    )
    check_targets(plan_data(few, config), few, config)
    fineweb = make_set(
        tmp_path, [text], text[:1000], name="fineweb10B"
    )  # known to have fewer: not read for it
    check_targets(plan_data(fineweb, config), fineweb, config)


def test_length_of_cu_seqlens():
    usual = {16_384: 64, 32_768: 96, 49_152: 128, 262_144: 896, 65_536: 256}
    assert {size: boundaries(size, 10) for size in usual} == usual
    assert [boundaries(49_152, most) for most in (127, 128, 159, 160)] == [128, 160, 160, 192]


def test_shapes_stay_the_same_when_documents_are_many(tmp_path):
    """A text of tiny documents: cu_seqlens is longer, as long for every batch of a size, and holds them all."""
    rng = np.random.default_rng(1)
    text = rng.integers(0, EOT, 200_000).astype(np.uint16)
    text[np.flatnonzero(rng.random(200_000) < 0.6)] = EOT
    ours = TrainBatches(make_set(tmp_path, [text], text[:5000]), SMALL, 0, 1, CPU)
    lengths: dict[int, set[int]] = {}
    for step in range(14):
        for lane in range(8):
            batch = ours.get(step, lane)
            lengths.setdefault(len(batch.inputs), set()).add(len(batch.cu_seqlens))
            assert int((batch.inputs == EOT).sum()) == int((batch.cu_seqlens.diff() > 0).sum())
    assert all(len(found) == 1 and min(found) > 150 for found in lengths.values())


@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
def test_validation_slices(token_set, world_size):
    """Slices in turn, each token predicted once, documents split at every end-of-text token and nowhere else."""
    tokens = token_set.shards_val[0].tokens()
    predicted = {}
    for rank in range(world_size):
        ours = ValBatches(token_set, SMALL, rank, world_size, CPU)
        found = list(ours)
        assert len(found) == len(ours) and ours.num_tokens == 900
        for place, (batch, count) in enumerate(found):
            start = 256 * (rank + place * world_size)
            assert count == min(256, 900 - start) == len(batch.inputs)
            assert np.array_equal(batch.inputs, tokens[start : start + count])
            assert np.array_equal(batch.targets, tokens[start + 1 : start + count + 1])
            ends = [k for k in range(1, count) if tokens[start + k] == EOT]
            assert batch.cu_seqlens.unique().tolist() == [0, *ends, count]
            assert len(batch.cu_seqlens) == ours.boundaries
            predicted[start] = count
    assert predicted == {0: 256, 256: 256, 512: 256, 768: 132}


def test_validation_that_is_too_short_is_refused(token_set):
    with pytest.raises(
        UserError, match=r"has 1,500 tokens \(random_val_000000.bin\).*pass --eval_tokens=1408"
    ):
        ValBatches(token_set, dataclasses.replace(SMALL, eval_tokens=1500), 0, 1, CPU)
    assert len(ValBatches(token_set, dataclasses.replace(SMALL, eval_tokens=1499), 0, 1, CPU)) == 6


def test_estimate_of_the_tokens_needed():
    assert 415e6 < tokens_needed(record89()) < 435e6  # it goes through some 420 to 430 M
    assert 390e6 < tokens_needed(Config()) < 410e6  # four shards are enough for record 92


def test_documents_are_found_across_the_pieces_of_a_shard(tmp_path, monkeypatch):
    text = random_text(np.random.default_rng(2), 30_000)
    shard = make_set(tmp_path, [text], text[:1000]).shards_train[0]
    monkeypatch.setattr("modded_nanogpt.data_plan.CHUNK", 1000)
    assert np.array_equal(find_documents(shard, EOT, 1).starts, np.flatnonzero(text == EOT))


@pytest.mark.gpu
def test_batches_on_a_gpu(token_set):
    """Read ahead in page-locked memory and copied without waiting: the same as on the CPU. Needs a GPU."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA GPU on this machine")
    config = dataclasses.replace(SMALL, data_passes=9)
    gpu = TrainBatches(token_set, config, 1, 2, torch.device("cuda", 0))
    cpu = TrainBatches(token_set, config, 1, 2, CPU)
    for step in range(14):
        for micro_step in range(4):
            same(gpu.get(step, micro_step), cpu.get(step, micro_step))


CORPUS = ROOT.parent / "shared" / "data" / "corpus_val_000000.bin.xz"


@pytest.mark.skipif(not CORPUS.is_file(), reason="the measured corpus is not on this machine")
def test_a_real_text(tmp_path):
    """The record's own stages on real documents (Wikipedia, novels, news), against the literal reading."""
    with lzma.open(CORPUS) as file:
        text = np.frombuffer(file.read(), "<u2", offset=1024).copy()
    token_set = make_set(tmp_path, [text], text[:5000])
    config = record89("--steps=3", "--extension_steps=0", "--dataset=random", "--data_passes=9")
    ours, state, shards = TrainBatches(token_set, config, 0, 1, CPU), (0, 0), [text.tolist()]
    for step in range(3):
        plan = at(config, step)
        size = plan.batch_tokens // 8
        buffers, _, state = literal_step(shards, state, 8, size, plan.max_document, repeat=True)
        for lane in range(8):
            batch = ours.get(step, lane)
            assert np.array_equal(batch.inputs, buffers[lane][:-1])
            assert len(batch.cu_seqlens) == {16_384: 64, 32_768: 96, 49_152: 128}[size]
