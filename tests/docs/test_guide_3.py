"""The commands of docs/guide-3-experiments.md, in order, as they are printed: one study, with a stand-in trainer.

What trains is made small by appended flags. The stand-in is tests/tools/experiments/standin_trainer.py.
"""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests" / "tools" / "experiments"), str(ROOT / "tests" / "docs")]

import cluster_pages
import kit

GUIDE = ROOT / "docs" / "guide-3-experiments.md"
LINES = cluster_pages.bash_lines(GUIDE)
HERE = " --executor local --n-gpus 0"
SMALL = " -- --num_iterations=6 --val_loss_every=2"


def write_own_configurations(folder: Path) -> None:
    """The configuration that the guide prints, and the other one as it describes it."""
    (printed,) = re.findall(r"```json\n(.*?)```", GUIDE.read_text(), re.DOTALL)
    config = json.loads(printed)
    folder.mkdir()
    (folder / "adam.json").write_text(printed)
    rest = {
        key: value for key, value in config["hyperparameters"].items() if key not in ("optimizer", "adam_lr")
    }
    config |= {
        "experiment_name": "small_muon",
        "modification_type": "optimizer",
        "modification_details": "Muon",
    }
    config["hyperparameters"] = {**rest, "optimizer": "muon", "muon_lr": 0.025}
    (folder / "muon.json").write_text(json.dumps(config))


def made_small(line: str) -> str:
    """The line with what makes it small."""
    if line.startswith(("engaging experiment run", "engaging experiment plan")):
        training = " run " in line and "--dry-run" not in line
        return line + HERE + (SMALL if training else "")
    return line + HERE if line.endswith("--run") else line


@pytest.fixture(scope="module")
def executed(tmp_path_factory) -> tuple[Path, dict[str, subprocess.CompletedProcess]]:
    """(clone, result of each line), in the order of reading."""
    clone = kit.make_clone(tmp_path_factory.mktemp("guide") / "clone")
    write_own_configurations(clone / "mine")
    env = kit.environment()
    env["PATH"] = f"{clone}/tools/bin:{env['PATH']}"
    results = {}
    for line in LINES:
        results[line] = type_in(clone, made_small(line), env)
    return clone, results


def type_in(clone: Path, line: str, env: dict[str, str]) -> subprocess.CompletedProcess:
    """The line as a user types it; plain words after `engaging` in this process, which has imported everything."""
    words = shlex.split(line)
    if words[0] == "engaging" and not re.search(r"[*?$;|&<>`~]", line):
        return kit.in_process(clone, words[1:], env)
    return subprocess.run(
        ["bash", "-c", line],
        cwd=clone,
        env=env,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=600,
    )


@pytest.mark.parametrize("line", LINES)
def test_the_command_works(executed, line: str) -> None:
    done = executed[1][line]
    assert done.returncode == 0, f"{made_small(line)}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"


def test_the_study_went_as_the_guide_says(executed) -> None:
    clone, results = executed
    assert "goes on to stage B" in results["engaging experiment promote palm --price 2.50"].stdout
    assert results["engaging experiment resume palm"].stdout.count("nothing was started") == 1
    (folder,) = [
        path for path in kit.experiments(clone, "nanogpt_palm_validation") if "palm" in study_of(path)
    ]
    assert [row["seed"] for row in kit.lines(folder / "results.jsonl")] == [42, 43, 44, 45]
    assert "helped" in results[next(line for line in LINES if line.startswith("engaging compare"))].stdout
    assert (clone / "report.html").stat().st_size > 10_000


def study_of(folder: Path) -> str:
    return json.loads((folder / "experiment.json").read_text())["study"]


def test_the_keys_in_the_guide_are_those_of_the_files(executed) -> None:
    clone, _ = executed
    folder = kit.experiments(clone, "nanogpt_palm_screening")[0]
    text = GUIDE.read_text()
    for name in ("results.jsonl", "metrics.jsonl"):
        (shown,) = [line for line in text.splitlines() if line.strip().startswith(name) and "{" in line]
        keys = {key for row in kit.lines(folder / name) for key in row}
        assert keys == set(re.findall(r'"(\w+)"', shown)), name
    made = {entry.name for entry in folder.iterdir()}
    assert {"experiment.log", "config.json", "summary.json"} <= made


def test_the_example_report_stands_alone_and_says_what_it_is() -> None:
    text = (ROOT / "docs" / "example-report.html").read_text()
    assert len(text) < 1_000_000 and "](example-report.html)" in GUIDE.read_text()
    assert "paired, 3 pairs" in text and "muon" in text
    assert "no result of a GPU" in text or re.search(r"NVIDIA [A-Z0-9]+", text)
    assert not re.search(
        r"""(src|href)=["'](?!#|data:)|url\((?!#|data:)|<script|/(tmp|home|root|work)/""", text
    )
