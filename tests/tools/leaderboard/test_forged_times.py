"""Forged times, hardware, data, seeds and statistics. Each is refused for its own reason (see forgery.py)."""

import datetime
import random
from pathlib import Path

import board_kit as kit
import pytest
import test_forged_runs
from forgery import Change, Register, Runs, check

forged = Register()


# The clock


@forged("its step times add up to")
def claimed_time_alone(runs: Runs) -> None:
    for event in runs[1].events:
        event.pop("train_ms", None)
    runs[1].end["train_ms"] = 3000.0


@forged("its clock stands at")
def claimed_time_beside_its_clock(runs: Runs) -> None:
    runs[1].end["train_ms"] -= 40.0


@forged("its clock runs backwards")
def clock_runs_backwards(runs: Runs) -> None:
    runs[1].of("train")[31]["train_ms"] -= 200


@forged("its clock moved by")
def clock_stood_still_for_a_while(runs: Runs) -> None:
    one, late = runs[1], 0.0
    for event in one.events:
        if event["event"] == "train" and event["step"] < 30:
            late += 0.5 * event["ms"]
        if "train_ms" in event and event.get("step", 99) < 60 and event["event"] != "end":
            event["train_ms"] -= min(late, event["train_ms"])
    total = one.of("train")[-1]["train_ms"]
    for event in one.events:
        if event["event"] == "end" or (event["event"] == "val" and event["step"] == 60):
            event["train_ms"] = total + late


@forged("without a time, or with one that is not positive")
def a_step_of_no_time(runs: Runs) -> None:
    runs[1].of("train")[40]["ms"] = 0.0


@forged("without a time, or with one that is not positive")
def a_step_of_negative_time(runs: Runs) -> None:
    runs[1].of("train")[40]["ms"] = -900.0


@forged("states no training time")
def no_time_at_all(runs: Runs) -> None:
    runs[1].end["train_ms"] = 0.0


@forged("tokens a second and its milliseconds disagree")
def tokens_a_second_from_elsewhere(runs: Runs) -> None:
    for one in runs:
        one.config["plan"]["tokens_per_step"] = 393_216
        for event in one.of("train"):
            event["tokens_per_s"] = 393_216 / event["ms"] * 1000
    runs[1].of("train")[50]["tokens_per_s"] *= 2


@forged("would have ended after it was submitted")
def from_the_future(runs: Runs) -> None:
    soon = datetime.datetime.now(datetime.timezone.utc) + datetime.timedelta(hours=1)
    runs[1].environment[0]["time"] = soon.isoformat()


@forged("says that it started in 1970")
def from_the_past(runs: Runs) -> None:
    runs[1].environment[0]["time"] = "1970-01-01T00:00:00+00:00"


@forged("does not say when it started")
def without_a_start_time(runs: Runs) -> None:
    runs[1].environment[0]["time"] = "yesterday"


@forged("its wall-clock stamps run backwards")
def stamps_backwards(runs: Runs) -> None:
    for number, event in enumerate(runs[1].events):
        event["time"] = 1.79e9 + number
    runs[1].of("train")[20]["time"] -= 60


@forged("by its wall-clock stamps it was shorter")
def stamps_too_close(runs: Runs) -> None:
    runs[1].scale_time(4)
    runs[1].events[0]["time"], runs[1].end["time"] = 1.79e9, 1.79e9 + 3


# The hardware


@forged("times the peak of 8 x NVIDIA H100")
def faster_than_the_hardware(runs: Runs) -> None:
    for one in runs:
        one.scale_time(0.1)


@forged("are faster than the hardware's peak")
def half_of_it_faster_than_the_hardware(runs: Runs) -> None:
    runs[:] = kit.seeds(3, steps=200, ms=120)
    one, total = runs[1], 0.0
    for event in one.events:
        if event["event"] == "train" and event["step"] >= 100:
            event["ms"] = round(event["ms"] / 12, 3)
        total += event.get("ms", 0.0)
        if "train_ms" in event:
            event["train_ms"] = round(total, 3)


@forged("neither log nor environment says what computed")
def hardware_not_named(runs: Runs) -> None:
    for one in runs:
        del one.environment[0]["gpus"]


@forged("8 ranks on 2 GPUs")
def fewer_gpus_than_ranks(runs: Runs) -> None:
    for one in runs:
        one.environment[0]["gpus"] = [kit.H100] * 2


@forged("its GPUs are not all of one kind")
def mixed_gpus(runs: Runs) -> None:
    for one in runs:
        one.environment[0]["gpus"][5] = "NVIDIA B200"


@forged("its log names NVIDIA B200, its environment NVIDIA H100")
def slower_hardware_than_it_had(runs: Runs) -> None:
    for one in runs:
        line = "635.9 M parameters, bfloat16; FP8: head; NVIDIA B200, 180 GiB, peak 2250 TFLOP/s in bfloat16"
        one.printed = [line, *one.printed_lines()]


@forged("the plan says 8 ranks, its environment 1")
def ranks_hidden_in_the_environment(runs: Runs) -> None:
    for one in runs:
        one.environment[0]["world_size"] = 1
        one.events[0]["world_size"] = one.end["world_size"] = 1
        one.scale_time(8)


@forged("the start says 4 ranks")
def ranks_at_the_start(runs: Runs) -> None:
    runs[1].events[0]["world_size"] = 4


@forged("the end says 16 ranks")
def ranks_at_the_end(runs: Runs) -> None:
    runs[1].end["world_size"] = 16


@forged("their times do not compare")
def one_run_on_other_hardware(runs: Runs) -> None:
    runs[1] = kit.made(2, gpu="NVIDIA H200")


@forged("their times do not compare")
def one_run_on_more_of_it(runs: Runs) -> None:
    runs[1] = kit.made(2, world_size=4, ms=160)


# The data


@forged("was trained on other data than the submission's manifest lists")
def other_data_than_the_manifest(runs: Runs) -> None:
    for one in runs:
        one.config["data"] = "1" * 64


@forged("its validation file is not the track's", words=["--track=track1"])
def an_easier_validation_file(runs: Runs) -> None:
    for one in runs:
        one.manifest["files"][0] = kit.entry("fineweb_val_000000.bin", "e" * 64)
        one.config["data"] = kit.fingerprint(one.manifest)


@forged("its validation file is not the track's")
def two_validation_files(runs: Runs) -> None:
    for one in runs:
        one.manifest["files"].append(kit.entry("fineweb_val_000001.bin", "e" * 64))
        one.config["data"] = kit.fingerprint(one.manifest)


@forged("trains on the validation file")
def the_validation_file_among_the_training_files(runs: Runs) -> None:
    for one in runs:
        one.manifest["files"].append(kit.entry("fineweb_train_000009.bin", kit.FINEWEB_VAL))
        one.config["data"] = kit.fingerprint(one.manifest)


@forged("its validation file holds 5,000,000 tokens")
def a_shorter_validation_file(runs: Runs) -> None:
    for one in runs:
        one.manifest["files"][0] = kit.entry("fineweb_val_000000.bin", kit.FINEWEB_VAL, 5_000_000)
        one.config["data"] = kit.fingerprint(one.manifest)


@forged("fineweb_train_000001.bin is not the published file")
def another_first_shard(runs: Runs) -> None:
    for one in runs:
        one.manifest["files"][1] = kit.entry("fineweb_train_000001.bin", "a" * 64)
        one.config["data"] = kit.fingerprint(one.manifest)


@forged("some were read twice")
def more_tokens_than_there_are(runs: Runs) -> None:
    runs[:] = kit.seeds(3, batch=4_000_000, ms=820)


@forged("validates on 1,048,576 tokens")
def fewer_validation_tokens(runs: Runs) -> None:
    for one in runs:
        one.end["val_tokens"] = 1_048_576


@forged("was trained on other data than")
def one_run_on_other_data(runs: Runs) -> None:
    runs[1].config["data"] = "1" * 64


# Seeds, duplicates, statistics


@forged("2 runs have the seed 1")
def one_seed_twice(runs: Runs) -> None:
    runs[1].config["config"]["seed"] = 1
    runs[1].environment[0]["argv"] = []


@forged("they are one run", also="the same final loss")
def one_run_under_two_seeds(runs: Runs) -> None:
    copy = kit.clone(runs[0])
    copy.config["config"]["seed"], copy.config["run_id"] = 2, "another"
    copy.environment = runs[1].environment
    noise = random.Random(1)
    copy.scale_time(1.001)
    for event in copy.of("train"):
        event["ms"] *= noise.uniform(0.999, 1.001)
    runs[1] = copy


@forged("they are one run")
def one_run_moved_by_a_constant(runs: Runs) -> None:
    one_run_under_two_seeds(runs)
    for event in runs[1].events:
        for name in ("loss", "val_loss"):
            if name in event:
                event[name] += 0.0005


@forged("they are one run")
def most_losses_of_another_run(runs: Runs) -> None:
    for ours, theirs in zip(runs[1].of("train")[20:], runs[0].of("train")[20:], strict=True):
        ours["loss"] = theirs["loss"]


@forged("the same final loss to its last digit")
def the_final_loss_of_another_seed(runs: Runs) -> None:
    runs[1].set_final(runs[0].end["val_loss"])


@forged("they are one clock")
def the_clock_of_another_run(runs: Runs) -> None:
    for ours, theirs in zip(runs[1].events, runs[0].events, strict=True):
        for name in ("ms", "train_ms"):
            if name in theirs:
                ours[name] = theirs[name]


@forged("two of the runs have one run_id")
def one_run_id(runs: Runs) -> None:
    runs[1].config["run_id"] = runs[0].config["run_id"]


@forged("both used 8 ranks of node1234 at one time")
def two_runs_at_one_time(runs: Runs) -> None:
    runs[1].environment[0]["time"] = runs[0].environment[0]["time"]


@forged("another recipe than run 1 (seed 1) (muon_lr)")
def tuned_by_seed(runs: Runs) -> None:
    runs[1].config["config"]["muon_lr"] = 0.03


@forged("ran with another PyTorch")
def another_torch(runs: Runs) -> None:
    runs[1].environment[0]["packages"] = {"torch": "2.9.0"}


@forged("needed p < 0.01")
def not_significant(runs: Runs) -> None:
    for one, loss in zip(runs, (3.279, 3.2798, 3.2812), strict=True):
        one.set_final(loss)


@forged("needed p < 0.01")
def above_the_target(runs: Runs) -> None:
    for one, loss in zip(runs, (3.2901, 3.2902, 3.2904), strict=True):
        one.set_final(loss)


@forged("one run is a claim, not evidence")
def one_seed(runs: Runs) -> None:
    del runs[1:]


@pytest.mark.parametrize("change, said, more", forged)
def test_forged(
    change: Change, said: str, more: dict, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    check(change, said, more, tmp_path, capsys)


def test_there_are_many_of_them() -> None:
    assert len(forged) + len(test_forged_runs.forged) >= 75
