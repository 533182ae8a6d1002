"""The speedrun's public logs, in all their forms: plausible, or refused by the name of what is odd about them."""

import lzma
from pathlib import Path

import board_kit as kit
import pytest

from tools.leaderboard import command

PUBLIC = Path(__file__).resolve().parents[4] / "shared" / "data" / "public_logs"
ODD = {"AdamW": "a log of llm.c", "optimization__r.log": "two runs in one file: after step 3350"}


def verify(capsys: pytest.CaptureFixture[str], *paths: Path) -> tuple[int, str]:
    status = command.main(["verify", *map(str, paths)])
    return status, capsys.readouterr().out


@pytest.mark.skipif(
    not PUBLIC.is_dir(), reason="the ten public logs are not beside this checkout (../shared)"
)
def test_the_ten_public_logs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = sorted(PUBLIC.glob("*.xz"))
    assert len(found) == 10
    for packed in found:
        path = tmp_path / packed.stem
        path.write_bytes(lzma.decompress(packed.read_bytes()))
        status, said = verify(capsys, path)
        odd = next((why for name, why in ODD.items() if name in packed.name), "")
        if odd:
            assert status == 1 and f"refused: run 1: {odd}" in said, said
        else:
            assert status == 0 and "\nplausible: " in said and "source was left out" in said, said
            assert "the log carries its source" not in said
            assert (": medium," in said) == packed.name.startswith("t2"), said


def one(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "log.txt"
    path.write_text(text)
    return path


def test_forms_that_came_and_went(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    usual = kit.modded_log()
    status, said = verify(
        capsys, one(tmp_path, "=" * 100 + "\n" + usual)
    )  # 2024: a separator before the source
    assert status == 0 and "the log carries its source" in said
    third = kit.track3_log(1, final=3.2775)
    averaged = third.replace(" train_time", " val_avg_loss:3.30000 val_ema_loss:3.40000 train_time")
    status, said = verify(capsys, one(tmp_path, averaged))
    assert status == 0 and "3.27750" in said.replace("3.2775)", "3.27750)") and "3.4" not in said
    named = third.replace(
        "Running on device_name=NVIDIA H200 with world_size=8",
        "Running PyTorch 2.11 on NVIDIA H200 with world_size 8",
    )
    assert named != third
    status, said = verify(capsys, one(tmp_path, named))
    assert status == 0 and "8 x NVIDIA H200" in said
    lines = third.splitlines()
    stopped = "\n".join(lines[: max(i for i, line in enumerate(lines) if line.startswith("step:"))]) + "\n"
    status, said = verify(
        capsys, one(tmp_path, stopped)
    )  # on purpose: the step at which it stopped is what counts
    assert status == 0 and "plausible: " in said and "plausible: 3148 steps" not in said


def test_copies_of_what_a_run_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Real ones have one separator, or none and begin with the first step or with what came before it."""
    usual, third = kit.modded_log(), kit.track3_log(1, final=3.2775)
    bare = usual[usual.index("step:0/") :]
    status, said = verify(capsys, one(tmp_path, bare))
    assert status == 1 and "refused: run 1: neither log nor environment says what computed" in said, said
    _, head, body = usual.split("=" * 100 + "\n")
    status, said = verify(capsys, one(tmp_path, head + body))
    assert status == 0 and "copy of what the run printed, without its source" in said, said
    assert "the log carries its source" not in said and "8 x NVIDIA H100" in said
    source, *rest = third.split("=" * 100 + "\n")
    status, said = verify(capsys, one(tmp_path, source + "=" * 100 + "\n" + "".join(rest)))
    assert status == 0 and "8 x NVIDIA H200" in said and "the log carries its source" in said, said


def test_what_is_odd_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    usual = kit.modded_log()
    metrics = usual[usual.index("step:0/") :]
    status, said = verify(capsys, one(tmp_path, usual + metrics))
    assert status == 1 and "two runs in one file" in said
    cut = usual[: usual.rindex("step:")]
    status, said = verify(capsys, one(tmp_path, cut))
    assert status == 1 and "cut or not finished" in said
    first, second = tmp_path / "a.txt", tmp_path / "b.txt"
    first.write_text(usual)
    second.write_text(usual + "a copy\n")
    status, said = verify(capsys, first, second)
    assert status == 1 and "they are one run" in said


def test_a_record_still_needs_its_source_and_its_seeds(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "board").mkdir()
    text = kit.modded_log()
    bare = "<source: 9 lines, left out here>\n" + text[text.index("=" * 100) :]
    words = [
        "submit",
        str(tmp_path / "board"),
        str(one(tmp_path, bare)),
        "--description=smear gate",
        "--contributors=Ada",
    ]
    assert command.main(words) == 1
    said = capsys.readouterr().out
    assert "its source was left out" in said and "one run is a claim" in said
