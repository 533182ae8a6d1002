"""The copy pointer in the trainer: what it reads, which classes are scored, that it copies, and resumes exactly.

Its kernels and losses are in `kernels/test_pointer`; a lane of it as a graph in `test_lanes`, `test_capture`.
"""

import dataclasses
import math
import signal

import numpy as np
import pytest
import torch

from modded_nanogpt import lanes, losses, pointer, schedule, setup
from modded_nanogpt.attention import Documents
from modded_nanogpt.attention_backends import documents
from modded_nanogpt.batches import _Packer
from modded_nanogpt.config import Config
from modded_nanogpt.optim.table import table
from nanogpt.common.ranks import Ranks
from nanogpt.data import small_sets
from tests.modded.forked import finished, launch
from tests.modded.test_lanes import VOCAB, gradients, lane, small
from tests.modded.test_train_gpt import losses as losses_of
from tests.modded.test_train_gpt import records

ALONE = Ranks(0, 0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def state() -> lanes.State:
    torch.set_num_threads(1)
    made = setup.build(small("--copy_pointer=true"), ALONE)
    setup.randomize(made, 7)
    return made


def test_queries_keys_and_the_size_of_the_pointer(state):
    model, d = state.model, 16
    shapes = pointer.parameter_shapes(768, 128)
    assert sum(math.prod(shape) for shape, _ in shapes.values()) == 196_737
    rows = table(model.config, shapes).values()
    assert len(rows) == 3 and {row.betas for row in rows} == {(0.9, 0.99)}
    assert model.head.shape[0] == 640 and model.size.vocab == VOCAB  # a row behind the vocabulary is the slot

    x = torch.randn(5, 96)
    found = pointer.keys(model, x)
    w_q, w_k = model.pointer_qk[:d], model.pointer_qk[d:]
    q, k = (y / y.square().mean(-1, keepdim=True).sqrt() for y in (x @ w_q.T, x @ w_k.T))
    torch.testing.assert_close(found.q, model.pointer_gain * q * d**-0.5)
    torch.testing.assert_close(found.k, k)
    torch.testing.assert_close(found.sink, model.pointer_gain * (q @ model.pointer_sink) * d**-0.5)
    assert pointer.keys(setup.build(small(), ALONE).model, x) is None


def test_other_weights_start_as_without_it():
    found = [
        setup.build(small(f"--copy_pointer={on}", "--vocab_size=500"), ALONE).model
        for on in ("false", "true")
    ]
    for model in found:
        model.init_weights(3)
    with_it = dict(found[1].named_parameters())
    for name, expected in found[0].named_parameters():
        assert torch.equal(with_it[name], expected), name


def test_the_slot_is_always_scored(state):
    config = Config(recipe="tiny", device="cpu", prefix=False, copy_pointer=True)
    tokens, ends = np.arange(257).astype(np.uint16), np.array([256])
    for on, expected in ((True, 1), (False, 0)):
        packer = _Packer(dataclasses.replace(config, copy_pointer=on), False)
        batch = packer.pack(tokens, ends, 4, 256, (256 + 1, 0))
        assert (batch.candidates == 50_257).sum() == expected and len(batch.candidates) == 257


def test_the_sampled_loss_is_that_of_the_scored_classes_alone(state):
    """Classes that are not scored have no probability, and the slot is found where it has gone."""
    model, batch = state.model, lane(2)
    x = torch.randn(batch.inputs.numel(), 96)
    start, end = documents(batch.cu_seqlens, x.shape[0])
    pieces = Documents(batch.cu_seqlens, start, end, 96)
    copy = pointer.copy_rows(model, pointer.keys(model, x), batch.inputs, batch.targets, pieces, 2048)
    chosen = torch.unique(torch.cat([batch.targets, torch.tensor([3, VOCAB, VOCAB + 9])]))
    weights = (torch.tensor([1.0, 0.5]), torch.zeros(1), losses.SOFTCAP, 1.0, False, 640)
    loss = losses.train_loss(x, model.head[chosen], batch.targets, chosen, None, *weights, copy)

    log_p = 23 * torch.sigmoid((x @ model.head.T + 5) / 7.5)
    left_out = torch.ones(640, dtype=torch.bool)
    left_out[chosen] = False
    p = log_p.masked_fill(left_out, -torch.inf).softmax(-1)
    rows, targets = torch.arange(len(x)), batch.targets
    alpha = p[:, VOCAB]
    real = p[rows, targets] / (1 - alpha)
    mixed = real * (1 - alpha * (1 - copy.of_sink)) + alpha * copy.copied
    expected = -mixed.log().sum() - 0.5 * p[rows[:-1], targets[1:]].log().sum()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_blocks_limit_what_is_seen(state, monkeypatch):
    """Other blocks in training than in validation, and each matters where documents are longer."""
    batch, plan = lane(4), schedule.at(state.model.config, 0)
    train, validation = gradients(state, batch, plan)[0], lanes.eval_lane(state, batch, True, (16, 32)).sum()
    monkeypatch.setattr(pointer, "TRAIN_BLOCK", 1)
    assert gradients(state, batch, plan)[0] != train
    assert lanes.eval_lane(state, batch, True, (16, 32)).sum() == validation
    monkeypatch.setattr(pointer, "EVAL_BLOCK", 1)
    assert lanes.eval_lane(state, batch, True, (16, 32)).sum() != validation


def test_validation_compiles_whole(state):
    torch._dynamo.reset()
    compiled = torch.compile(lanes.lane_losses, fullgraph=True, backend="aot_eager")
    for batch in (lane(5), lane(6)):
        expected = lanes.eval_lane(state, batch, True, (16, 32))
        found = lanes.eval_lane(dataclasses.replace(state, eval_graph=compiled), batch, True, (16, 32))
        torch.testing.assert_close(found, expected)


def test_it_learns_to_copy():
    """Where the residual says what stands here and what comes next, the pointer finds where that stood before."""
    config = small("--copy_pointer=true")
    model, generator = setup.build(config, ALONE).model, torch.Generator().manual_seed(1)
    model.init_weights(1)
    tokens = torch.randint(0, 40, (257,), generator=generator)
    codes = torch.randn(2, 40, 48, generator=generator)
    x = torch.cat([codes[0][tokens[:-1]], codes[1][tokens[1:]]], dim=1)
    cu_seqlens = torch.tensor([0, 128, 256], dtype=torch.int32)
    pieces = Documents(cu_seqlens, *documents(cu_seqlens, 256), 128)
    head = torch.zeros(640, 96)  # the head knows nothing: all classes are alike, and so is the slot
    learned = [model.pointer_qk, model.pointer_sink, model.pointer_gain]
    optimizer = torch.optim.Adam(learned, lr=0.03)
    for _ in range(100):
        copy = pointer.copy_rows(model, pointer.keys(model, x), tokens[:-1].int(), tokens[1:], pieces, 64)
        weights = (torch.ones(1), torch.zeros(1), losses.SOFTCAP, 1.0, False, 640)
        optimizer.zero_grad()
        losses.train_loss(x, head, tokens[1:], None, None, *weights, copy).backward()
        optimizer.step()
    first_keys = [max(i // 128 * 128, (i // 64 - 1) * 64) for i in range(256)]
    seen = torch.tensor([int(tokens[i + 1]) in tokens[low:i].tolist() for i, low in enumerate(first_keys)])
    assert 0.4 < seen.double().mean() < 0.9
    assert copy.copied[seen].mean() > 0.9 and not copy.copied[~seen].any()


FLAGS = (
    "tiny", "--dataset=small", "--vocab_size=100", "--prefix=false", "--steps=8", "--extension_steps=1",
    "--eval_interval=100", "--eval_tokens=2048", "--eval_slice=1024", "--warmup=false", "--num_threads=1",
    "--device=cpu", "--data_passes=9", "--sampled_softmax=false", "--save_minutes=0", "--copy_pointer=true",
)  # fmt: skip


def test_two_ranks_and_a_resumed_run_train_as_one(zygote, tmp_path):
    rng = np.random.default_rng(5)
    pieces = [np.append(99, np.tile(rng.integers(0, 99, 40), 5)) for _ in range(400)]
    tokens, chars = np.concatenate(pieces).astype(np.uint16), "".join(chr(200 + k) for k in range(100))
    splits = {"train": tokens[:-3000], "val": tokens[-3000:]}
    small_sets.publish("small", tmp_path / "data", splits, "char", 100, chars)

    def start(name: str, *flags: str, ranks: int = 1, **variables: str) -> list:
        words = [*FLAGS, f"--out_dir={tmp_path}/{name}", *flags]
        return launch(zygote, "train_gpt", words, tmp_path / "data", ranks, **variables)

    few = "--smoke", "--lanes=4"  # a sixteenth of the tokens; without --smoke a run goes on
    finished(start("alone", *few))
    alone = losses_of(tmp_path / "alone")
    finished(start("two", *few, ranks=2))
    together = losses_of(tmp_path / "two")
    assert max(abs(together[step] - alone[step]) for step in alone) < 1e-4
    finished(start("killed", *few, "--save_interval=2", KILLED_AT_SAVE="2"), status=-signal.SIGKILL)
    finished(start("killed", "--auto_resume=true"))
    assert losses_of(tmp_path / "killed") == alone and len(records(tmp_path / "killed", "resume")) == 1
    last = [records(tmp_path / name, "val")[-1]["val_loss"] for name in ("alone", "killed")]
    assert last[0] == last[1]
