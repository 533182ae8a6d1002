"""Forged logs of modded-nanogpt: refused, each for its own reason, as far as that format lets one see."""

import re
from collections.abc import Callable
from pathlib import Path

import board_kit as kit
import pytest

from tools.leaderboard import command

Change = Callable[[list[str]], None]


def sub(pattern: str, new: str, count: int = 0) -> Change:
    """A change of the second log's text."""

    def change(logs: list[str]) -> None:
        edited = re.sub(pattern, new, logs[1], count=count, flags=re.MULTILINE)
        assert edited != logs[1]
        logs[1] = edited

    return change


def every(change: Callable[[str], str]) -> Change:
    """A change of all logs."""

    def apply(logs: list[str]) -> None:
        logs[:] = [change(log) for log in logs]

    return apply


def times(factor: float) -> Change:
    """All logs faster by `factor`, averages and all."""

    def scale(found: re.Match) -> str:
        step, time = int(found[1]), float(found[3]) * factor
        return (
            f"{found[0].split(' train_time')[0]} train_time:{time:.0f}ms step_avg:{time / max(1, step):.2f}ms"
        )

    line = re.compile(r"^step:(\d+)/\d+( val_loss:\S+)? train_time:(\d+)ms step_avg:\S+ms$", re.M)
    return every(lambda log: line.sub(scale, log))


def copy_of_the_first(logs: list[str]) -> None:
    logs[1] = logs[0]


def cut(logs: list[str]) -> None:
    logs[1] = logs[1][: logs[1].index("step:40/50")]


FORGED = [
    ("cut", cut, "ends without the validation of its last step"),
    ("another loss at the start", sub(r"step:0/50 val_loss:\S+", "step:0/50 val_loss:4.1000"),
     "starts at a loss of 4.100"),
    ("too good", every(lambda log: re.sub(r"(step:50/50 val_loss:)3\.", r"\g<1>1.", log)),
     "is below what this text allows"),
    ("last time alone", sub(r"(step:50/50 val_loss:\S+) train_time:\d+", r"\1 train_time:9000"),
     "runs backwards at step 50"),
    ("last time, earlier ones too", sub(r"(step:50/50.*) train_time:(\d)\d+", r"\1 train_time:29999"),
     "do not average to"),
    ("one average", sub(r"(step:33/50.*step_avg:)\S+ms", r"\g<1>360.00ms"), "do not average to 360.00 ms"),
    ("a step removed", sub(r"^step:20/50 .*\n", ""), "missing, repeated or out of order"),
    ("a step twice", sub(r"^(step:20/50 .*\n)", r"\1\1"), "missing, repeated or out of order"),
    ("two steps swapped", sub(r"^(step:20/50 .*\n)(step:21/50 .*\n)", r"\2\1"), "out of order"),
    ("another number of steps in all", sub(r"step:50/50 val", "step:50/55 val"),
     "different numbers of steps in all"),
    ("faster than the hardware", times(0.1), "the peak of 8 x NVIDIA H100 80GB HBM3 needs"),
    ("no time", times(0.0), "states no training time"),
    ("fewer validation tokens", every(lambda log: log.replace("10485760", "1048576")),
     "validates on 1048576 tokens"),
    ("no source", every(lambda log: "print(1)\n" + log[log.index("=" * 100) :]),
     "does not begin with a trainer's source"),
    ("another source", sub(r"^x7 = 7$", "x7 = 8"), "other source than run 1"),
    ("another GPU in between", sub(r"\|   3  NVIDIA H100 80GB HBM3 ", "|   3  NVIDIA B200           "),
     "not all of one kind"),
    ("four GPUs", sub(r"^\|   [4-7]  NVIDIA.*\n", ""), "their times do not compare"),
    ("no hardware", every(lambda log: re.sub(r"^\|.*\n", "", log, flags=re.M)), "says what computed"),
    ("one log twice", copy_of_the_first, "two of the runs have one log"),
    ("from the future", sub(r" 2026$", " 2031"), "started after it was submitted"),
    ("another torch", sub(r"PyTorch 2\.10\.0", "PyTorch 2.9.0"), "another PyTorch"),
    ("above the target", every(lambda log: re.sub(r"(50/50 val_loss:3)\.\d", r"\1.3", log)), "needed p < 0.01"),
]  # fmt: skip


@pytest.mark.parametrize("change, said", [row[1:] for row in FORGED], ids=[row[0] for row in FORGED])
def test_forged(change: Change, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    logs = [kit.modded_log(seed, final=3.2765 + seed * 2e-4) for seed in range(1, 5)]
    change(logs)
    paths = [tmp_path / f"{number}.txt" for number in range(len(logs))]
    for path, log in zip(paths, logs, strict=True):
        path.write_text(log)
    assert command.main(["verify", *map(str, paths)]) == command.EXIT_REFUSED
    reasons = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  REFUSED")]
    assert any(said in line for line in reasons), reasons


def test_a_log_of_ours_among_foreign_ones(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Kinds cannot be mixed in one submission."""
    paths, data = kit.write_all(kit.seeds(3), tmp_path)
    foreign = tmp_path / "foreign.txt"
    foreign.write_text(kit.modded_log())
    assert (
        command.main(["verify", *map(str, paths), str(foreign), f"--data_root={data}"])
        == command.EXIT_REFUSED
    )
    assert "another kind of log than run 1" in capsys.readouterr().out


def test_nothing_of_a_log_is_executed(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    payload = (
        f"import os\nimport torch\nopen({str(canary)!r}, 'w')\n__import__('os').system('touch {canary}')\n"
    )
    for seed in (1, 2, 3):
        (tmp_path / f"{seed}.txt").write_text(payload + kit.modded_log(seed))
    command.main(["verify", *(str(tmp_path / f"{seed}.txt") for seed in (1, 2, 3))])
    assert not canary.exists()
