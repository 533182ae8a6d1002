"""The report as Markdown, as LaTeX and as a record's folder: the numbers, and text that stays text."""

import json
import re
import statistics
from collections.abc import Callable
from pathlib import Path

import pytest
import study_kit


@pytest.mark.parametrize(("form", "ending"), [("md", ".md"), ("latex", ".tex")])
def test_the_report_in_other_forms(
    form: str, ending: str, shelf: Path, engaging: Callable, tmp_path: Path
) -> None:
    done = engaging("report", shelf, f"--format={form}", f"--out={tmp_path / ('r' + ending)}")
    assert (done.status, done.err) == (0, "")
    text = (tmp_path / f"r{ending}").read_text()
    for words in ("3.2763", "It helped.", "It hurt.", "the loss was not finite", "Holm"):
        assert words in text
    cells = [line for line in text.splitlines() if "palm" in line and ("|" in line or "&" in line)]
    assert len(cells) == 1
    wrong = engaging("report", shelf, f"--format={form}", f"--out={tmp_path / 'page.html'}")
    assert wrong.status == 2 and ending in wrong.err


def test_hostile_names_stay_text(engaging: Callable, tmp_path: Path) -> None:
    evil = "a | b](http://x) <b> # \\input{/etc/passwd} $x$ %_^~"
    study_kit.write_experiment(tmp_path / "s", "nanogpt_baseline", [3.28, 3.281])
    folder = study_kit.write_experiment(tmp_path / "s", "other", [3.27, 3.271])
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "experiment_name": evil}))
    for form, ending in (("md", "md"), ("latex", "tex")):
        assert (
            engaging("report", tmp_path / "s", f"--format={form}", f"--out={tmp_path}/r.{ending}").status == 0
        )
    text = (tmp_path / "r.md").read_text()
    assert "](http" not in text.replace("\\](http", "") and "<b>" not in text.replace("\\<b\\>", "")
    row = next(line for line in text.splitlines() if line.startswith("| a"))
    assert len(re.findall(r"(?<!\\)\|", row)) == 11
    tex = (tmp_path / "r.tex").read_text()
    assert "\\input" not in tex and r"\textbackslash{}input\{" in tex and "$x$" not in tex


def test_the_folder_of_a_record(engaging: Callable, tmp_path: Path) -> None:
    losses = [3.2762, 3.2771, 3.2754, 3.2769, 3.2760]
    study_kit.write_experiment(tmp_path, "nanogpt_baseline", [3.2801, 3.2814, 3.2795, 3.2822, 3.2808])
    palm = study_kit.write_experiment(tmp_path, "palm", losses, starts=[0, 9, 18, 27, 36])
    missing = engaging("report", tmp_path, f"--record={tmp_path / 'r'}")
    assert missing.status == 2 and "no log.txt" in missing.err and not (tmp_path / "r").exists()
    for run in sorted((palm / "runs").iterdir()):
        (run / "log.txt").write_text(f"source of {run.name}")
    done = engaging("report", tmp_path, f"--record={tmp_path / 'r'}", "--title=Parallel blocks")
    assert (done.status, done.err) == (0, "") and "5 logs" in done.out
    names = sorted(path.name for path in (tmp_path / "r").iterdir())
    assert names == [*(f"{n:02}-seed-{41 + n}.txt" for n in range(1, 6)), "README.md", "statistics.md"]
    assert (tmp_path / "r" / "03-seed-44.txt").read_text() == "source of run_2_seed_44"
    said = (tmp_path / "r" / "statistics.md").read_text()
    assert f"losses = {losses}" in said and f"mean = {statistics.mean(losses):.6f}" in said
    assert "p = 0.00014" in said and "baseline = [3.2801" in said and "Welch" in said and "median" in said
    assert engaging("report", tmp_path, f"--record={tmp_path / 'r'}").status == 2  # exists already
    study_kit.write_experiment(tmp_path, "third", losses)
    several = engaging("report", tmp_path, f"--record={tmp_path / 'q'}")
    assert several.status == 2 and "one variant" in several.err and several.err.count("\n") == 1
