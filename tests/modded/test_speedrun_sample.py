"""Text from a run of the speedrun: the logits of sampling are those of the validation."""

import dataclasses
import shutil

import numpy as np
import pytest
import torch

from modded_nanogpt import lanes, sample, schedule, setup
from modded_nanogpt.batches import text_batch
from modded_nanogpt.config import Config
from nanogpt.common import checkpoints
from nanogpt.common.errors import UserError
from nanogpt.common.ranks import Ranks
from nanogpt.data import small_sets
from tests.modded.forked import finished, launch
from tests.modded.test_train_gpt import FLAGS
from tools import cli

CHARS = "abcdefghijklmnop"


@pytest.fixture(scope="module")
def trained(zygote, tmp_path_factory):
    """A finished run on characters, whose data set has gone."""
    folder = tmp_path_factory.mktemp("sampled")
    text = np.tile(np.arange(len(CHARS), dtype=np.uint16), 4000)
    splits = {"train": text[:40_000], "val": text[-5000:]}
    small_sets.publish("letters", folder / "data", splits, "char", len(CHARS), CHARS)
    flags = (
        "--dataset=letters",
        "--vocab_size=16",
        "--smoke",  # few tokens a step: enough for these texts
        "--steps=14",
        "--muon_lr=0.06",
        "--adam_lr=0.024",
        "--data_passes=9",
        f"--out_dir={folder}/run",
    )
    finished(launch(zygote, "train_gpt", [*FLAGS, *flags], folder / "data"))
    shutil.rmtree(folder / "data")
    return folder / "run"


def test_a_run_continues_what_it_has_learned(trained, monkeypatch, capfd):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert cli.main(["sample", str(trained), "--device=cpu", "--start=abcdefghijklmnopabc", "--num_samples=2",
                     "--max_new_tokens=9", "--temperature=0"]) == 0  # fmt: skip
    out, err = capfd.readouterr()
    first, second, rest = out.split(f"\n{sample.RULE}\n")
    assert first == second and rest == "" and len(first) == 19 + 9
    assert "checkpoint of step 15, validation loss " in err
    assert first[19:27] == "defghijk"  # the alphabet is all that there was to learn


@pytest.mark.parametrize("flag", [None, "copy_input", "copy_pointer"])
def test_logits_are_those_of_the_validation(flag):
    config = Config(
        recipe="tiny", vocab_size=512, prefix=False, sampled_softmax=False, device="cpu", compile="false",
        **({flag: True} if flag else {}),
    )  # fmt: skip
    state = setup.build(config, Ranks(0, 0, 1, torch.device("cpu")), compile_with="eager")
    setup.randomize(state, 1)
    tokens = torch.randint(0, 511, (150,), generator=torch.Generator().manual_seed(3)).tolist()
    tokens[60:100] = tokens[20:60]  # something that repeats
    windows = schedule.final_window(config)
    batch = text_batch(config, tokens, torch.device("cpu"))
    assert batch.inputs.numel() == 256 and batch.cu_seqlens.tolist() == [0, 150, 256]
    losses = lanes.eval_lane(state, batch, False, windows)
    for place in (0, 70, 148):
        logits = lanes.next_logits(state, batch, place, False, windows)
        expected = -logits.log_softmax(-1)[tokens[place + 1]]
        torch.testing.assert_close(losses[place], expected, rtol=1e-5, atol=1e-5)
        alone = text_batch(config, tokens[: place + 1], torch.device("cpu"))
        torch.testing.assert_close(
            lanes.next_logits(state, alone, place, False, windows), logits, rtol=1e-4, atol=1e-4
        )


def test_a_checkpoint_without_its_table_cannot_speak(tmp_path):
    config = Config(recipe="tiny", vocab_size=512, prefix=False, sampled_softmax=False, device="cpu")
    checkpoint = checkpoints.Checkpoint(tmp_path, 3, {})
    with pytest.raises(
        UserError, match=r"leaves out the table of 8,192 hashed n-grams, .* --save_table=true"
    ):
        sample.read_table(checkpoint, config)
    assert sample.read_table(checkpoint, dataclasses.replace(config, table_rows="0")) == {}


def test_choosing():
    logits = torch.tensor([0.0, 3.0, 1.0, 2.9])
    greedy = sample.Config(temperature=0.0)
    assert sample.choose(logits, greedy, None) == 1
    two = dataclasses.replace(greedy, temperature=1.0, top_k=2)
    drawn = {sample.choose(logits, two, torch.Generator().manual_seed(seed)) for seed in range(40)}
    assert drawn == {1, 3}


def test_what_cannot_be_sampled(trained, tmp_path):
    for folder, why in ((tmp_path, "holds no run"),):
        with pytest.raises(UserError, match=why):
            sample.main([f"--out_dir={folder}"])
        with pytest.raises(UserError, match=why):
            cli.main(["sample", str(folder)])
    with pytest.raises(UserError, match="name a run first"):
        cli.main(["sample"])
    with pytest.raises(UserError, match="--checkpoint=first"):
        sample.main([f"--out_dir={trained}", "--checkpoint=first"])
