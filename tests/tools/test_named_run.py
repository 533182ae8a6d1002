"""A run by its name: the same for `engaging runs` and `engaging watch`; a launch's name goes before a folder's."""

from pathlib import Path

import pytest

from nanogpt.common.errors import UserError
from tools.launch import book, presets
from tools.runs import named_run
from tools.site import watch


def a_run(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    return folder


def test_a_name_is_a_folder_from_here_or_from_the_checkout_or_in_out(tmp_path: Path, monkeypatch) -> None:
    clone, here = tmp_path / "clone", tmp_path / "here"
    inside, beside, own = a_run(clone / "out" / "one"), a_run(clone / "lab" / "one"), a_run(here / "two")
    monkeypatch.chdir(here)
    assert named_run(clone, "one") == inside
    assert named_run(clone, "lab/one") == named_run(clone, beside) == beside
    assert named_run(clone, "two") == Path("two") and own.samefile("two")
    assert named_run(clone, "three") is None and named_run(clone, "lab") is None


def test_a_launch_may_have_the_name_of_a_folder_of_the_clone(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "nanogpt").mkdir()
    (tmp_path / "lab").mkdir()
    monkeypatch.setattr(watch, "checkout", lambda: tmp_path)
    runs = {"runs": ["out/nanogpt"], "args": []}
    book.new_launch(
        tmp_path, "nanogpt", token="t", preset="gpt2", trainer="nanogpt.train", job_id="12", **runs
    )
    launched, folder = watch.View(), watch.View()
    watch.find_target(launched, "nanogpt")
    assert (launched.job, launched.run_path) == ("12", tmp_path / "out" / "nanogpt")
    watch.find_target(folder, "lab")
    assert (folder.job, folder.run_path) == ("", tmp_path / "lab")


def test_a_job_id_names_its_launch_and_a_placeholder_is_told_to_be_one(tmp_path: Path) -> None:
    runs = {"runs": ["out/first"], "args": []}
    made = book.new_launch(
        tmp_path, "first", token="t", preset="gpt2", trainer="nanogpt.train", job_id="12", **runs
    )
    assert book.find(tmp_path, "12").name == made.name == "first"
    with pytest.raises(UserError, match=r"^13: no launch here has this job id; .* scancel"):
        book.find(tmp_path, "13")
    with pytest.raises(UserError, match=r"^JOBID: stands for a job's number; squeue --me"):
        book.find(tmp_path, "JOBID")


def test_a_word_that_several_presets_have_names_them_all() -> None:
    root = Path(__file__).resolve().parents[2]
    with pytest.raises(UserError, match="did you mean 'finetune_shakespeare' or 'train_shakespeare_char'"):
        presets.resolve(root, "shakespeare")
    with pytest.raises(UserError, match="did you mean 'quickstart'"):
        presets.resolve(root, "quickstrat")
