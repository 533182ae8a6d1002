"""Forged runs of ours: source, attempts, marks, steps, losses. Each is refused for its own reason (see forgery.py)."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import board_kit as kit
import pytest
from forgery import Change, Register, Runs, check, verify

from nanogpt.common import source
from nanogpt.common.errors import UserError
from tools.leaderboard import command

forged = Register()


# The source and the head of the log


@forged("config.json names another source")
def other_source_named(runs: Runs) -> None:
    runs[1].config["source_sha256"] = "0" * 64


@forged("config.json is not the config", also="belongs to")
def config_edited_afterwards(runs: Runs) -> None:
    one = runs[1]
    one.log_config = {**one.config, "source_sha256": source.digest(one.source), "plan": {"world_size": 8}}


@forged("environment.json is not the environment")
def environment_edited_afterwards(runs: Runs) -> None:
    runs[1].log_environment = {**runs[1].environment[0], "host": "elsewhere"}


@forged("no readable line 'config {...}'")
def head_without_a_config(runs: Runs) -> None:
    runs[1].log_config = "nothing"


@forged("does not hold the trainer")
def trainer_not_in_the_log(runs: Runs) -> None:
    for one in runs:
        del one.source["modded_nanogpt/train_gpt.py"]


@forged("other source than run 1")
def sources_differ(runs: Runs) -> None:
    runs[1].source["modded_nanogpt/model.py"] += b"SECRET = 1\n"


@forged("sets the compiler flag coordinate_descent_tuning")
def compiler_flag(runs: Runs) -> None:
    for one in runs:
        one.source["modded_nanogpt/model.py"] += b"torch._inductor.config.coordinate_descent_tuning = True\n"


@forged("sets the compiler flag triton.cudagraphs")
def compiler_flag_by_another_name(runs: Runs) -> None:
    for one in runs:
        one.source["modded_nanogpt/model.py"] += b"inductor_config.triton.cudagraphs = 1\n"


# Attempts


@forged("was resumed")
def resumed(runs: Runs) -> None:
    runs[1].events.insert(9, {"event": "resume", "step": 4, "world_size": 8, "attempt": 2})


@forged("was resumed")
def second_attempt_in_the_environment(runs: Runs) -> None:
    runs[1].environment.append(runs[1].environment[0])


@forged("was resumed")
def attempt_two_alone(runs: Runs) -> None:
    for event in runs[1].events:
        event["attempt"] = 2


@forged("holds a second attempt")
def second_attempt_in_the_log(runs: Runs) -> None:
    runs[1].printed = [*runs[1].printed_lines(), "environment " + json.dumps(runs[1].environment[0])]


@forged("was resumed")
def marked_as_a_resume(runs: Runs) -> None:
    runs[1].config["must_resume"] = True


@forged("does not begin with its one 'start' line")
def without_a_start(runs: Runs) -> None:
    del runs[1].events[0]


@forged("does not end with its one 'end' line")
def two_ends(runs: Runs) -> None:
    runs[1].events.append(dict(runs[1].end))


@forged("its end says 'interrupted'")
def interrupted(runs: Runs) -> None:
    runs[1].end["status"] = "interrupted"


@forged("did not start from scratch")
def fine_tuned(runs: Runs) -> None:
    for one in runs:
        one.config["config"]["init_from"] = "gpt2"


@forged("was started with --seed=99")
def seed_renamed(runs: Runs) -> None:
    runs[1].environment[0]["argv"] = ["record", "--seed=99"]


# The trainer's marks


@forged("marked it not eligible: data repeated")
def not_eligible(runs: Runs) -> None:
    runs[1].end.update(eligible=False, ineligible=["data repeated"])


@forged("carries no mark of the trainer")
def mark_removed(runs: Runs) -> None:
    del runs[1].end["eligible"]


@forged("is marked eligible, with reasons why it is not")
def mark_turned(runs: Runs) -> None:
    runs[1].end.update(eligible=True, ineligible=["untimed warm-up steps"])


@forged("is not a trainer of the track", words=["--track=track1"])
def other_trainer(runs: Runs) -> None:
    for one in runs:
        one.config["entry"] = "modded_nanogpt/train_gpt_simple.py"


@forged("was trained with --recipe=tiny", words=["--track=track1"])
def other_track(runs: Runs) -> None:
    for one in runs:
        one.config["config"]["recipe"] = "tiny"


@forged("its target was 3.5")
def easier_target(runs: Runs) -> None:
    for one in runs:
        one.end["target"] = 3.5


@forged("says target_met=True with a loss of 3.29", also="needed p < 0.01")
def target_met_by_word(runs: Runs) -> None:
    for one, loss in zip(runs, (3.2701, 3.291, 3.2702), strict=True):
        one.set_final(loss)
    runs[1].end["target_met"] = True


# Steps and tokens


@forged("training steps are missing, the first is 17")
def a_step_removed(runs: Runs) -> None:
    gone = runs[1].of("train")[17]
    runs[1].events.remove(gone)
    for event in runs[1].events:  # the clock closes the gap
        if event.get("train_ms", 0) > gone["train_ms"] - 1e-6:
            event["train_ms"] -= gone["ms"]


@forged("repeated or out of order", also=("do not grow", "ms for step 8"))
def a_step_twice(runs: Runs) -> None:
    eighth = runs[1].of("train")[8]
    runs[1].events.insert(runs[1].events.index(eighth) + 1, dict(eighth, ms=1e-9))


@forged("does not belong to a run of 60 steps")
def steps_beyond_the_end(runs: Runs) -> None:
    last = runs[1].of("train")[-1]
    more = dict(last, step=60, tokens=last["tokens"] + 393_216)
    runs[1].events.insert(-1, more)
    runs[1].end["train_ms"] += more["ms"]
    more["train_ms"] = runs[1].end["train_ms"]


@forged("80 steps were planned, it ended after 60")
def stopped_early_at_a_good_moment(runs: Runs) -> None:
    for one in runs:
        one.config["plan"]["total_steps"] = 80


@forged("its last validation is at step 40")
def without_the_last_validation(runs: Runs) -> None:
    for one in runs:
        one.events.remove(one.of("val")[-1])
        one.of("val")[-1]["val_loss"] = one.end["val_loss"]
        one.end["train_ms"] = one.of("train")[-1]["train_ms"]


@forged("a validation at step 33, one was due every 20")
def an_extra_validation(runs: Runs) -> None:
    one = runs[1]
    place = one.events.index(one.of("train")[33])
    before = one.of("train")[32]
    val = {
        "event": "val",
        "step": 33,
        "val_loss": 3.5,
        "tokens": before["tokens"],
        "train_ms": before["train_ms"],
    }
    one.events.insert(place, val)


@forged("the tokens trained on do not grow")
def tokens_that_shrink(runs: Runs) -> None:
    runs[1].of("train")[30]["tokens"] = 5


@forged("are not steps times 393,216")
def more_tokens_a_step_than_planned(runs: Runs) -> None:
    for one in runs:
        one.config["plan"]["tokens_per_step"] = 393_216
    for event in runs[1].events:
        if event.get("tokens"):
            event["tokens"] += 64


@forged("counts other tokens than the training")
def validation_counts_other_tokens(runs: Runs) -> None:
    runs[1].of("val")[2]["tokens"] += 1


@forged("logged every 500 steps")
def hardly_logged(runs: Runs) -> None:
    for one in runs:
        one.config["config"]["log_interval"] = 500


@forged("stopped after 70 steps, run 1 (seed 1) after 60")
def another_stop_step(runs: Runs) -> None:
    runs[1] = kit.made(2, steps=70)


# Losses


@forged("its end says val_loss 3.2")
def better_end_than_validation(runs: Runs) -> None:
    runs[1].end["val_loss"] = 3.2


@forged("a loss is not a finite number", also="the log printed train loss")
def a_loss_of_null(runs: Runs) -> None:
    runs[1].printed = runs[1].printed_lines()
    runs[1].of("train")[21]["loss"] = None


@forged("are no cross entropies")
def negative_losses(runs: Runs) -> None:
    runs[1].of("train")[21]["loss"] = -3.0


@forged("starts at a loss of 4.2")
def a_trained_start(runs: Runs) -> None:
    runs[1].of("val")[0]["val_loss"] = 4.2


@forged("is below what this text allows")
def validated_on_what_it_learned(runs: Runs) -> None:
    for number, one in enumerate(runs):
        one.set_final(1.1 + number * 1e-4)
        for event in one.of("train")[-5:]:
            event["loss"] = 1.2 + number * 1e-3


@forged("do not lead to its validation loss")
def only_the_validation_was_edited(runs: Runs) -> None:
    for event in runs[1].of("train")[-6:]:
        event["loss"] = 4.9


@forged("the log printed val loss")
def metrics_edited_and_not_the_log(runs: Runs) -> None:
    for one in runs:
        one.printed = one.printed_lines()
        one.set_final(one.end["val_loss"] - 0.003)


@forged("the log printed train loss")
def training_losses_edited(runs: Runs) -> None:
    runs[1].printed = runs[1].printed_lines()
    runs[1].of("train")[10]["loss"] += 0.01


@forged("ms for step 0, the metrics say")
def times_edited_and_not_the_log(runs: Runs) -> None:
    runs[1].printed = runs[1].printed_lines()
    runs[1].scale_time(0.97)


@forged("does not print the validation of step 60")
def log_cut_after_the_source(runs: Runs) -> None:
    runs[1].printed = [line for line in runs[1].printed_lines() if not line.startswith("step 60/60: val")]


@pytest.mark.parametrize("change, said, more", forged)
def test_forged(
    change: Change, said: str, more: dict, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    check(change, said, more, tmp_path, capsys)


@pytest.mark.parametrize(
    "edit, said",
    [
        (
            lambda data: data.replace(b"WIDTH = 768", b"WIDTH = 700"),
            "does not have the digest the log gives for it",
        ),
        (lambda data: data.replace(b"source 6 files", b"source 5 files"), "does not have the digest"),
        (lambda data: data[:700], "the log ends inside its source"),
        (lambda data: data.replace(b"end of source\n", b""), "does not have the digest"),
        (
            lambda data: data.replace(b"modded_nanogpt/model.py", b"../nanogpt/model.py", 1),
            "heading in the source",
        ),
        (lambda data: data.replace(b"engaging-nanogpt log 1", b"my log"), "not a run's log"),
    ],
)
def test_a_log_that_is_not_true_to_itself(
    edit: Callable[[bytes], bytes], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def damage(run: Path) -> None:
        log = run / "log.txt"
        log.write_bytes(edit(log.read_bytes()))

    assert verify(kit.seeds(3), tmp_path, after=damage) == command.EXIT_REFUSED
    assert said in capsys.readouterr().out


def test_the_copy_of_the_source_was_edited(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def keep(run: Path) -> None:
        source.write_folder(source.from_log(run / "log.txt")[0], run / "source")

    assert verify(kit.seeds(4), tmp_path / "honest", after=keep) == 0

    def edit(run: Path) -> None:
        keep(run)
        (run / "source/modded_nanogpt/model.py").write_text("WIDTH = 1\n")

    assert verify(kit.seeds(4), tmp_path / "forged", after=edit) == command.EXIT_REFUSED
    assert "its source/ folder is not the source in its log" in capsys.readouterr().out

    def link(run: Path) -> None:
        keep(run)
        (run / "source/modded_nanogpt/model.py").unlink()
        (run / "source/modded_nanogpt/model.py").symlink_to(run / "elsewhere.py")

    def pipe(run: Path) -> None:
        keep(run)
        os.mkfifo(run / "source/modded_nanogpt/waits.py")

    for number, change in enumerate((link, pipe)):
        assert verify(kit.seeds(4), tmp_path / str(number), after=change) == command.EXIT_REFUSED


def test_one_run_named_twice(tmp_path: Path) -> None:
    paths, data = kit.write_all(kit.seeds(2), tmp_path)
    with pytest.raises(UserError, match="named twice"):
        command.main(["verify", str(paths[0]), str(paths[0] / "../run-1"), f"--data_root={data}"])
