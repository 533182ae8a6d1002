"""Honest submissions in all their variety are accepted: made-up runs, real trainings on the CPU, and foreign logs."""

import datetime
from collections.abc import Callable
from pathlib import Path

import board_kit as kit
import numpy as np
import pytest
from board_kit import Made

from nanogpt.data import small_sets
from tests.faults import tiny
from tests.modded import forked
from tests.tools import run_kit
from tools.leaderboard import command

Runs = list[Made]
HONEST: list = []


def honest(*notes: str, words: tuple[str, ...] = ()):
    """Registers a variant: a function that gives honest runs. `notes` must be printed beside the acceptance."""

    def register(make: Callable[[], Runs]) -> Callable[[], Runs]:
        HONEST.append(pytest.param(make, notes, words, id=make.__name__))
        return make

    return register


@pytest.fixture
def accepted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """`accepted(runs, *words)` verifies the runs and returns what was printed."""

    def check(runs: Runs, *words: str) -> str:
        paths, data = kit.write_all(runs, tmp_path)
        status = command.main(["verify", *map(str, paths), f"--data_root={data}", *words])
        said = capsys.readouterr().out
        assert status == 0, said
        return said

    return check


@pytest.mark.parametrize("count", [3, 4, 5, 10, 20])
def test_numbers_of_seeds(count: int, accepted: Callable[..., str]) -> None:
    assert f"of {count} runs: p = " in accepted(kit.seeds(count, final=None))


@pytest.mark.parametrize(
    "gpu, world_size, ms",
    [
        (kit.H100, 1, 640.0), (kit.H100, 2, 320.0), (kit.H100, 4, 160.0), ("NVIDIA H200", 8, 78.0),
        ("NVIDIA B200", 8, 45.0), ("NVIDIA A100-SXM4-80GB", 8, 260.0), ("NVIDIA GH200 480GB", 1, 640.0),
        ("NVIDIA L40S", 4, 500.0), ("NVIDIA GeForce RTX 4090", 2, 2000.0),
    ],
)  # fmt: skip
def test_hardware(gpu: str, world_size: int, ms: float, accepted: Callable[..., str]) -> None:
    assert f"on {world_size} x {gpu}" in accepted(kit.seeds(3, gpu=gpu, world_size=world_size, ms=ms))


@honest("the peak of NVIDIA X900 is not known here")
def hardware_of_tomorrow() -> Runs:
    return kit.seeds(3, gpu="NVIDIA X900")


@honest()
def as_long_as_the_record() -> Runs:
    return kit.seeds(3, steps=1285, ms=57.4, batch=263_675, shards=9)


@honest("seeds between the submitted ones are missing: 2, 4")
def seeds_with_gaps() -> Runs:
    return [kit.made(seed) for seed in (1, 3, 5)]


@honest()
def seeds_as_the_runner_gives_them() -> Runs:
    return [kit.made(seed) for seed in (42, 43, 44)]


@honest()
def one_run_above_the_target() -> Runs:
    runs = kit.seeds(10)
    runs[4].set_final(3.2803)
    runs[4].end.update(eligible=False, ineligible=["the loss 3.2803 is above the target 3.28"])
    return runs


@honest()
def with_wall_clock_stamps() -> Runs:
    runs = kit.seeds(3)
    for run in runs:
        start = datetime.datetime.fromisoformat(run.environment[0]["time"]).timestamp()
        for event in run.events:
            event["time"] = start + 1.05 * event.get("train_ms", 0) / 1000
    return runs


@honest()
def logged_every_ten_steps() -> Runs:
    runs = kit.seeds(3)
    for run in runs:
        run.config["config"]["log_interval"] = 10
        last = run.end["step"] - 1
        run.events = [
            e for e in run.events if e["event"] != "train" or e["step"] % 10 == 0 or e["step"] == last
        ]
    return runs


@honest()
def steps_without_a_running_clock() -> Runs:
    runs = kit.seeds(3)
    for run in runs:
        for event in run.events:
            event.pop("train_ms", None)
        run.end["seconds"] = sum(event["ms"] for event in run.of("train")) / 1000
    return runs


@honest()
def with_checkpoints() -> Runs:
    runs = kit.seeds(3)
    for run in runs:
        run.events.insert(30, {"event": "save", "step": 27, "seconds": 1.5, "attempt": 1})
        run.events.insert(-1, {"event": "save", "step": 60, "attempt": 1})
    return runs


@honest()
def with_figures_of_the_hardware() -> Runs:
    runs = kit.seeds(3)
    for run in runs:
        for event in run.of("train"):
            event.update(mfu=0.41, memory_gib=31.2, lr=0.9, tokens_per_s=round(393_216_000 / event["ms"]))
        run.config["plan"]["tokens_per_step"] = 393_216
        run.environment[0]["gpus"] = [{"name": kit.H100, "memory_gib": 80}] * 8
    return runs


@honest()
def hardware_named_in_the_log_alone() -> Runs:
    runs = kit.seeds(3)
    for run in runs:
        del run.environment[0]["gpus"]
        line = f"635.9 M parameters, bfloat16; FP8: head; {kit.H100}, 80 GiB, peak 989 TFLOP/s; torch 2.13.0"
        run.printed = [line, *run.printed_lines()]
    return runs


@honest("ran on 3 machines")
def on_several_machines() -> Runs:
    runs = kit.seeds(3)
    for number, run in enumerate(runs):
        run.environment[0].update(host=f"node{number}", time=runs[0].environment[0]["time"])
    return runs


@honest("started from a clone with 3 changed files")
def from_a_changed_clone() -> Runs:
    runs = kit.seeds(3)
    for run in runs:
        run.environment[0]["git"]["changed"] = 3
    return runs


@honest("the machine was not equally fast")
def with_one_slow_machine() -> Runs:
    runs = kit.seeds(3)
    runs[2].scale_time(1.3)
    return runs


@honest()
def nine_shards() -> Runs:
    return kit.seeds(3, shards=9)


@honest()
def all_shards() -> Runs:
    return kit.seeds(3, shards=103)


@honest()
def with_shards_added_since() -> Runs:
    runs = kit.seeds(3, shards=3)
    for run in runs:
        run.manifest = kit.fineweb(9)
    return runs


@honest()
def with_files_in_another_order() -> Runs:
    runs = kit.seeds(3)
    for run in runs:
        run.manifest["files"].reverse()
    return runs


@honest()
def fewest_steps() -> Runs:
    return kit.seeds(
        4, track="steps", steps=160, gpu="NVIDIA A100-SXM4-80GB", world_size=2, ms=3000, batch=524_288
    )


@honest()
def the_medium_track() -> Runs:
    return kit.seeds(3, track="medium", target=2.92, ms=250, batch=524_288)


@honest(words=("--kind=negative",))
def an_idea_that_did_not_help() -> Runs:
    runs = kit.seeds(2)
    for number, run in enumerate(runs):
        run.set_final(3.31 + number * 0.001)
        run.end.update(
            eligible=False, ineligible=[f"the loss {run.end['val_loss']:.4f} is above the target 3.28"]
        )
    return runs


@honest(words=("--kind=negative",))
def an_idea_that_did_not_help_tried_once() -> Runs:
    return kit.seeds(1, final=3.33)


@honest()
def printed_from_zero() -> Runs:
    runs = kit.seeds(3)
    for run in runs:
        run.printed = [
            f"step {e['step']}/60: loss {e['loss']:.4f}, lr 1.00e-03, norm 1.0, {e['ms']:.1f} ms, 1 tokens/s"
            if e["event"] == "train" else f"step {e['step']}: val loss {e['val_loss']:.4f} (best so far)"
            for e in run.events if e["event"] in ("train", "val")
        ]  # fmt: skip
    return runs


@pytest.mark.parametrize("make, notes, words", HONEST)
def test_accepted(
    make: Callable[[], Runs], notes: tuple[str, ...], words: tuple[str, ...], accepted: Callable[..., str]
) -> None:
    said = accepted(make(), *words)
    for note in notes:
        assert note in said


def test_a_speed_that_was_not_judged_is_not_ticked_off(accepted: Callable[..., str]) -> None:
    said = accepted(hardware_of_tomorrow())
    assert "ok       the hardware is named\n" in said and "could have done it" not in said


def test_a_track_of_ones_own_knows_the_small_trainers_arithmetic(tmp_path: Path, capsys) -> None:
    """Its baseline's: a variant may do less than its shape says, and is not judged."""
    (start,), data = kit.write_all(kit.seeds(1, track="steps", batch=524_288), tmp_path / "start")
    board = tmp_path / "board"
    new = ["--name=own", "--title=Our own", "--target=3.28", f"--data_root={data}"]
    assert command.main(["track", str(board), str(start), *new]) == 0
    for variant, ms, status, words in (
        ("baseline", 300.0, 0, "ok       the hardware is named, and could have done it in that time"),
        ("baseline", 30.0, 1, "times the peak of 8 x NVIDIA H100"),
        ("mine.py", 30.0, 0, "the arithmetic of a token on this track is not known here"),
    ):
        runs = kit.seeds(4, track="steps", ms=ms, batch=524_288, change=f"{variant} {ms}")
        for run in runs:
            shape = {"num_layers": 12, "model_dim": 768, "sequence_length": 1024}
            run.config["config"].update(shape, variant=variant)
        paths, data = kit.write_all(runs, tmp_path / f"{variant} {ms}")
        words_of = ["verify", *map(str, paths), f"--board={board}", "--track=own", f"--data_root={data}"]
        found = command.main(words_of)
        said = capsys.readouterr().out
        assert (found, words in said) == (status, True), said


def test_the_folder_of_an_experiment_stands_for_its_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    experiment = tmp_path / "nanogpt_idea_20261121_060000"
    for number in range(11):
        kit.made(42 + number).write(experiment / f"runs/run_{number}_seed_{42 + number}", tmp_path / "data")
    (experiment / "runs/run_11_seed_53").mkdir()
    (experiment / "config.json").write_text("{}")
    assert command.main(["verify", str(experiment), f"--data_root={tmp_path}/data"]) == 0
    said = capsys.readouterr().out
    assert "11 runs on 8 x" in said and f"1 of the 12 runs of {experiment.name} left no result" in said


# Foreign logs


@pytest.mark.parametrize(
    "options",
    [
        {}, {"year": 2024}, {"gpus": 1, "ms": 4600.0}, {"gpu": "NVIDIA H200"}, {"steps": 1770, "ms": 100.9},
        {"gpu": "NVIDIA A100-SXM4-80GB", "gpus": 4, "ms": 4000.0},
    ],
)  # fmt: skip
def test_logs_of_modded_nanogpt(options: dict, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = [tmp_path / f"{seed}.txt" for seed in range(1, 5)]
    for seed, path in enumerate(paths, 1):
        path.write_text(kit.modded_log(seed, final=3.2765 + seed * 2e-4, **options))
    assert command.main(["verify", *map(str, paths)]) == 0, capsys.readouterr().out
    said = capsys.readouterr().out
    assert "its validation data cannot be checked" in said
    assert ("were not timed" in said) == (options.get("year") == 2024)
    assert "the validation tokens are the track's" not in said  # what was not checked is not claimed


def test_logs_of_its_third_track(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = [tmp_path / f"{seed}.txt" for seed in range(1, 6)]
    for seed, (path, loss) in enumerate(zip(paths, (3.2779, 3.2768, 3.2788, 3.2775, 3.2771), strict=True), 1):
        path.write_text(kit.track3_log(seed, final=loss))
    assert command.main(["verify", *map(str, paths)]) == 0
    assert (
        "accepted: 3148 steps; (3.28 - 3.27762) * sqrt(5) = 0.0053, needed 0.004" in capsys.readouterr().out
    )


def test_logs_with_words_between_the_lines_and_windows_ends(tmp_path: Path) -> None:
    paths = [tmp_path / f"{seed}.txt" for seed in range(1, 5)]
    for seed, path in enumerate(paths, 1):
        text = kit.modded_log(seed).replace("\nstep:1/", "\nRegistering gradient hooks...\n\nstep:1/")
        path.write_bytes(text.replace("\n", "\r\n").encode())
    assert command.main(["verify", *map(str, paths)]) == 0


# Real trainings


@pytest.fixture(scope="module")
def trained(zygote, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with real CPU trainings: `start` (the template), and `long-1` to `long-4`, a seed each."""
    folder = tmp_path_factory.mktemp("real")
    for seed in range(5):
        name, flags = ("start", []) if seed == 0 else (f"long-{seed}", ["--max_iters=60"])
        child = zygote.run(
            [*tiny.FLAGS, f"--seed={seed}", "--log_interval=1", f"--data_root={tiny_data}", *flags,
             f"--out_dir={folder / name}"], cwd=folder,
        )  # fmt: skip
        assert child.status == 0, child.stderr
    return folder


def test_a_real_study_reaches_the_board_and_is_run_again(
    trained: Path, tiny_data: Path, tmp_path: Path, run_python: Callable, capsys: pytest.CaptureFixture[str]
) -> None:
    """Train, make a track, hand in, verify, build, fetch the evidence, run it again: every loss is equal."""
    board, data = str(tmp_path / "board"), f"--data_root={tiny_data}"
    runs = [str(trained / f"long-{seed}") for seed in range(1, 5)]
    new = ["--name=words", "--title=Random words on a CPU", "--target=2.6", data]
    assert command.main(["track", board, str(trained / "start"), *new]) == 0
    said = ["--description=Three times the steps, the same decay", "--contributors=Ada", data]
    assert command.main(["submit", board, *runs, *said]) == 0, capsys.readouterr().out
    assert "4 runs on 1 x CPU" in capsys.readouterr().out
    assert command.main(["verify", board]) == 0
    assert command.main(["build", board]) == 0
    assert "1 record on" in capsys.readouterr().out
    name = next((tmp_path / "board/records").iterdir()).stem
    again = tmp_path / "again"
    assert command.main(["fetch", board, name, str(again)]) == 0
    done = run_python(
        "-m", "tools", "repro", again / "run-2/log.txt", f"--out_dir={tmp_path}/new", "--yes", data
    )
    assert done.returncode == 0 and "losses agree exactly" in done.stdout, done.stdout + done.stderr

    capsys.readouterr()
    first = ["submit", board, str(trained / "start"), "--description=My first attempt at the board", data]
    assert command.main(first) == command.EXIT_REFUSED
    assert "it is the unedited template of the track words" in capsys.readouterr().out


def test_a_real_speedrun_of_the_tiny_preset(tmp_path: Path, zygote, capsys) -> None:
    """The speedrun's trainer on the CPU: its directory is read, and what its marks say of FineWeb is no matter here."""
    ids = {"train": np.arange(60_000) % 95, "val": np.arange(1200) % 95}
    small_sets.publish(
        "letters", tmp_path, {k: v.astype(np.uint16) for k, v in ids.items()}, "char", 96, run_kit.CHARS
    )
    flags = (
        "--dataset=letters", "--vocab_size=128", "--prefix=false", "--steps=4", "--extension_steps=1",
        "--eval_interval=4", "--eval_tokens=1024", "--eval_slice=1024", "--warmup=false", "--num_threads=1",
        "--device=cpu", f"--data_root={tmp_path}", f"--out_dir={tmp_path}/run",
    )  # fmt: skip
    forked.finished(forked.launch(zygote, "train_gpt", ["tiny", *flags], tmp_path))
    board, run, data = f"{tmp_path}/board", f"{tmp_path}/run", f"--data_root={tmp_path}"
    assert (
        command.main(["track", board, run, data, "--name=tiny", "--title=Tiny speedrun", "--target=3"]) == 0
    )
    status = command.main(["verify", run, data, f"--board={board}", "--kind=negative"])
    assert status == 0, capsys.readouterr().out
