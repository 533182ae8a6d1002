"""Every file that an analysis reads, damaged in every way: one line that names it, status 2, nothing written."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import study_kit

RESULT = {
    "run_id": 0,
    "seed": 42,
    "final_val_loss": 3.28,
    "time_seconds": 1.0,
    "final_step": 400,
    "success": True,
}


def ways(text: str) -> dict[str, bytes]:
    """What can happen to a file of JSON, or of JSON lines, with this content."""
    first = text.splitlines()[0]
    return {
        "empty": b"",
        "blank": b"  \n\n",
        "not JSON": b"step 1, loss 3.2\n",
        "a list": b"[1, 2]\n",
        "a number": b"3.28\n",
        "null": b"null\n",
        "NaN": first.replace("}", ', "x": NaN}', 1).encode() + b"\n",
        "1e400": first.replace("}", ', "x": 1e400}', 1).encode() + b"\n",
        "duplicate keys": first.replace("{", '{"x": 1, "x": 2, ', 1).encode() + b"\n",
        "a line of 1 MB": first.encode() + b" " * (1 << 20) + b"\n" if "\n" in text else b"x" * (17 << 20),
        "truncated": text.rstrip("\n")[:-9].encode(),
        "not UTF-8": b'{"a": "\xff"}\n',
        "NUL": b"\0" * 500,
        "deep": b'{"a":' * 40_000 + b"\n",
        "a huge number": first.replace("{", '{"x": ' + "9" * 2000 + ", ", 1).encode() + b"\n",
    }


FILES = ("results.jsonl", "metrics.jsonl", "summary.json", "config.json")
KINDS = list(ways('{"a": 1}\n'))
FINE = {("metrics.jsonl", "empty"), ("metrics.jsonl", "blank")}  # nothing logged: then there are no curves
RUN_FILES = ("metrics.jsonl", "config.json", "environment.json")


def refused(done, name: str) -> None:
    """One line on stderr that names the file, status 2, nothing on stdout."""
    assert done.status == 2, done
    assert done.out == "" and done.err.startswith("error: ") and done.err.count("\n") == 1
    assert name in done.err and len(done.err) < 700 and done.err.rstrip("\n").isprintable()


@pytest.fixture(scope="module")
def experiment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return study_kit.write_experiment(tmp_path_factory.mktemp("whole"), "palm", [3.28, 3.29], steps=50)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", FILES)
def test_an_experiments_files(
    engaging: Callable, experiment: Path, tmp_path: Path, name: str, kind: str
) -> None:
    folder = shutil.copytree(experiment, tmp_path / "damaged")
    (folder / name).write_bytes(ways((folder / name).read_text())[kind])
    done = engaging("analyze", folder)
    if (name, kind) in FINE:
        assert done.status == 0
        return
    refused(done, name)
    assert not (folder / "analysis").exists()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", RUN_FILES)
def test_a_run_directorys_files(engaging: Callable, tmp_path: Path, name: str, kind: str) -> None:
    folder = study_kit.write_run(tmp_path / "run", 3.3, steps=40)
    (folder / name).write_bytes(ways((folder / name).read_text())[kind])
    done = engaging("report", folder)
    # a run whose metrics end in a half line is one that still writes them: it does not count, and that is said
    if (name, kind) in FINE or (name, kind) == ("metrics.jsonl", "truncated"):
        assert done.status == 0 and "not counted" in (folder / "report.html").read_text()
        return
    refused(done, name)
    assert not (folder / "report.html").exists()


@pytest.mark.parametrize(
    "field, value",
    [
        ("run_id", None), ("run_id", "0"), ("run_id", -1), ("run_id", True), ("run_id", 0.5), ("run_id", 2**70),
        ("seed", "42"), ("final_val_loss", "3.28"), ("final_val_loss", None), ("final_val_loss", [3.28]),
        ("final_val_loss", True), ("final_val_loss", 10**400), ("final_train_loss", "x"), ("time_seconds", -1),
        ("time_seconds", "420"), ("final_step", 1.5), ("final_step", -3), ("success", "true"), ("success", 1),
        ("success", None),
    ],
)  # fmt: skip
def test_a_result_with_a_wrong_value(
    engaging: Callable, experiment: Path, tmp_path: Path, field: str, value: object
) -> None:
    folder = shutil.copytree(experiment, tmp_path / "damaged")
    study_kit.lines(folder / "results.jsonl", [{**RESULT, "run_id": 7}, {**RESULT, field: value}])
    done = engaging("compare", folder, experiment)
    refused(done, "results.jsonl")
    assert "line 2" in done.err and (field in done.err or "number" in done.err)


@pytest.mark.parametrize(
    "name, content",
    [
        ("summary.json", {"statistics": []}), ("summary.json", {"statistics": {"val_loss": 3.2}}),
        ("summary.json", {"statistics": {"val_loss": {"mean": "3.2"}}}), ("summary.json", {"gpu_info": "H100"}),
        ("summary.json", {"statistics": {"n_runs": 2.5}}),
        ("config.json", {"experiment_name": 5}), ("config.json", {"target_val_loss": "3.28"}),
        ("config.json", {"target_val_loss": -1}), ("config.json", {"n_runs": "five"}),
    ],
)  # fmt: skip
def test_a_wrong_type_in_an_object(
    engaging: Callable, experiment: Path, tmp_path: Path, name: str, content: dict
) -> None:
    folder = shutil.copytree(experiment, tmp_path / "damaged")
    (folder / name).write_text(json.dumps(content))
    refused(engaging("analyze", folder, "--no-plots"), name)


def test_missing_files(engaging: Callable, experiment: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(experiment, tmp_path / "damaged")
    (folder / "metrics.jsonl").unlink()
    (folder / "config.json").unlink()
    done = engaging("analyze", folder, "--no-plots")  # results alone make a table
    assert done.status == 0 and "3.2850" in done.out
    (folder / "results.jsonl").unlink()  # but a summary of nothing is no experiment
    refused(engaging("analyze", folder), "results.jsonl")
    (folder / "summary.json").unlink()
    refused(engaging("analyze", folder), "no experiment (results.jsonl) and no run")
    refused(engaging("analyze", tmp_path / "nowhere"), "does not exist")
    refused(engaging("analyze", __file__), "expected a folder")


def test_values_on_the_command_line(engaging: Callable, shelf: Path, tmp_path: Path) -> None:
    for words in (
        ("analyze",), ("analyze", shelf, "--target=nan"), ("analyze", shelf, "--target=0"),
        ("analyze", shelf, "--tagret=3"),
        ("analyze", shelf, "--baseline=nobody"), ("report", shelf, f"--out={tmp_path}/x.pdf"),
        ("report", shelf, f"--out={tmp_path}/no/x.html"), ("compare", shelf), ("compare", shelf, shelf, "--pairing=x"),
    ):  # fmt: skip
        refused(engaging(*words), "")


def test_hostile_names_reach_no_terminal(engaging: Callable, tmp_path: Path) -> None:
    name = "\x1b[2J\u202ereversed\nline =cmd()"
    folder = study_kit.write_experiment(
        tmp_path, "e", [3.2, 3.3], config={"experiment_name": name}, failed=(1,)
    )
    rows = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    rows[1]["reason"] = "\x1b]0;title\x07 \ud800 broken"
    study_kit.lines(folder / "results.jsonl", rows)
    done = engaging("analyze", folder, "--no-plots")
    assert done.status == 0 and "[2Jreversedline =cmd()" in done.out and "]0;title" in done.out
    assert all(line.isprintable() for line in done.out.splitlines())
