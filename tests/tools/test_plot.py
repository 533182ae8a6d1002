"""`engaging plot`: the points it takes from a run, the drawing in characters, the PNG, and what it refuses."""

import json
import struct
from pathlib import Path

import pytest

from nanogpt.common.errors import UserError
from tools import plot
from tools.runs import read_run

PNG_START = b"\x89PNG\r\n\x1a\n"


def make_run(folder: Path, losses: list[float], val_every: int = 5) -> Path:
    """A run directory whose training losses are `losses`, one a step."""
    folder.mkdir(parents=True)
    lines = []
    for step, loss in enumerate(losses):
        lines.append({"event": "train", "step": step, "loss": loss, "tokens": (step + 1) * 10**6})
        if step % val_every == 0:
            lines.append({"event": "val", "step": step, "val_loss": loss + 0.1, "tokens": step * 10**6})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_run(tmp_path / "falling", [4.0 - step * 0.1 for step in range(21)])


def test_the_points_are_the_runs_own(folder: Path) -> None:
    found = plot.curves(read_run(folder), "falling")
    assert found.train[0] == (0, 4.0) and len(found.train) == 21
    assert [at for at, _ in found.val] == [0, 5, 10, 15, 20]
    assert [loss for _, loss in found.val] == pytest.approx([4.1, 3.6, 3.1, 2.6, 2.1])


def test_lines_that_cannot_be_read_are_said_once(folder: Path, capsys) -> None:
    """Case J2. Half a line at the very end is what a growing file has."""
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(
            '{"event": "train", "step": 2, "lo\n{"event": "train", "step": 21, "loss": 1.9}\n{"event": "tr'
        )
    assert plot.read(folder).train[-1].step == 21
    assert (
        capsys.readouterr().err == f"note: {folder}/metrics.jsonl: 1 line cannot be read and is passed over\n"
    )


def test_over_tokens_and_without_the_first_steps(folder: Path) -> None:
    found = plot.curves(read_run(folder), "falling", x="tokens", skip=10)
    assert found.train[0] == (11.0, pytest.approx(3.0)) and len(found.train) == 11
    assert [at for at, _ in found.val] == [10.0, 15.0, 20.0]


def test_the_drawing_falls_from_the_upper_left_to_the_lower_right() -> None:
    line = plot.Curves("x", [(step, 4.0 - step) for step in range(4)], [])
    drawn = plot.draw([line], width=7, height=4)
    assert drawn == [
        "4.00 |.",
        "     |  .",
        "2.00 |    .",
        "1.00 |      .",
        "     +-------",
        "      03 steps",
        "      loss:  . training   o validation",
    ]


def test_the_drawing_fits_eighty_columns_of_ascii(folder: Path) -> None:
    drawn = plot.draw([plot.curves(read_run(folder), "falling")])
    assert all(len(line) <= 80 and line.isascii() for line in drawn)
    assert drawn[0].lstrip().startswith("4.10 |o") and drawn[13].rstrip().endswith(".")


@pytest.mark.parametrize("losses", [[2.0], [2.0, 2.0, 2.0], [1e-9, 1e9], [-1.0, 1.0]])
def test_flat_short_and_wild_curves_are_drawn(tmp_path: Path, losses: list[float]) -> None:
    one = plot.curves(read_run(make_run(tmp_path / "odd", losses)), "odd")
    assert sum("." in line or "o" in line for line in plot.draw([one])) >= 2
    assert plot.png([one]).startswith(PNG_START)


def test_a_run_without_losses_is_said_so() -> None:
    assert plot.draw([plot.Curves("empty", [], [])]) == ["no loss has been written yet"]


def test_the_command_writes_a_readable_png_into_the_run(folder: Path, capsys) -> None:
    assert plot.main([str(folder)]) == 0
    data = (folder / "loss.png").read_bytes()
    assert data.startswith(PNG_START)
    width, height = struct.unpack(">II", data[16:24])
    assert (width, height) == (1080, 660)
    said = capsys.readouterr().out
    assert (
        "falling: running at step 20, training loss 2.0000, lowest validation loss 2.1000 at step 20" in said
    )
    assert str(folder / "loss.png") in said


def test_several_runs_go_into_one_picture(folder: Path, tmp_path: Path, capsys) -> None:
    other = make_run(tmp_path / "other" / "falling", [3.0] * 21)
    out = tmp_path / "both.png"
    assert plot.main([str(folder), str(other), f"--out={out}", "--x=tokens"]) == 0
    said = capsys.readouterr().out
    assert f"a {tmp_path.name}/falling   b other/falling" in said
    assert "20 M tokens" in said
    drawing = said.split("validation:")[0]
    assert drawing.count("a") == 4 and drawing.count("b") == 5  # they meet once, and b lies on top
    alone = plot.png([plot.curves(read_run(folder), "falling", "tokens")], "tokens")
    assert out.read_bytes() != alone


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["{run}/nowhere"], "not the directory of a run"),
        (["{run}", "--out=x.jpg"], "ending .png"),
        (["{run}", "--out={run}/no/x.png"], "does not exist"),
        (["{run}", "--skip=999"], "the last step is 20"),
        (["{run}", "--skip=-1"], "expected a whole number"),
        (["{run}", "--x=time"], "invalid choice"),
        (["{run}", "--ouput=x.png"], "did you mean '--out'"),
        ([], "required"),
        (["{run}"] * 27, "at most 26"),
    ],
)
def test_what_it_refuses(folder: Path, words: list[str], told: str) -> None:
    with pytest.raises(UserError, match=told) as refused:
        plot.main([word.format(run=folder) for word in words])
    assert "\n" not in str(refused.value)


def test_an_empty_run_and_a_misspelled_one_are_refused_by_name(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "young").mkdir()
    (tmp_path / "young" / "config.json").write_text("{}")
    with pytest.raises(UserError, match="no loss yet"):
        plot.main([str(tmp_path / "young")])
    with pytest.raises(UserError, match=f"did you mean '{folder}'"):
        plot.main([str(tmp_path / "faling")])


def test_a_png_that_cannot_be_written_leaves_nothing_behind(folder: Path) -> None:
    (folder / "loss.png").mkdir()
    with pytest.raises(Exception, match="cannot be written"):
        plot.main([str(folder)])
    assert sorted(path.name for path in folder.iterdir()) == ["loss.png", "metrics.jsonl"]


def test_help_costs_no_matplotlib(run_python) -> None:
    done = run_python("-X", "importtime", "-m", "tools", "plot", "--help")
    assert done.returncode == 0 and "RUN" in done.stdout.upper()
    assert "matplotlib" not in done.stderr and "torch" not in done.stderr
