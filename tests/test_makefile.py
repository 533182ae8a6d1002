"""The Makefile: each target runs what it says, from any folder, with the environment's own Python."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TARGETS = ["help", "quickstart", "test", "environment", "uv", "uvlock", "venv", "lint", "faults"]
TARGETS += ["ddp-train", "gpu-status", "gpu-hot", "kill-gpu"]
RECORDER = """#!/bin/sh
# Stands in for a command: writes down how it was called, and fails when told to.
printf '%s|' "$(basename "$0")" "$PWD" "$PYTHONNOUSERSITE" "${PYTHONPATH-unset}" "$@" >>"$CALLS"
echo >>"$CALLS"
case "$*" in *"${FAILING:-no such words}"*) exit 1 ;; esac
"""


@pytest.fixture
def make(tmp_path: Path):
    """Runs `make -C CLONE` with an environment whose commands only write down how they were called.

    Returns (process, calls): a call is (command, folder, PYTHONNOUSERSITE, PYTHONPATH, argument...).
    """
    clone = tmp_path / "clone"
    env_path = tmp_path / "an env" / "with space"
    (env_path / "bin").mkdir(parents=True)
    (env_path / ".engaging-nanogpt").touch()
    clone.mkdir()
    shutil.copy(ROOT / "Makefile", clone)
    calls = tmp_path / "calls"
    for folder in (clone / ".venv/bin", tmp_path / "bin"):
        folder.mkdir(parents=True)
    programs = [env_path / "bin/python", env_path / "bin/shellcheck", clone / "setup_env.sh"]
    for command in (*programs, clone / ".venv/bin/python", tmp_path / "bin/uv"):
        command.write_text(RECORDER)
        command.chmod(0o755)
    subprocess.run(["git", "init", "-q", clone], check=True)
    subprocess.run(["git", "-C", clone, "add", "."], check=True)
    shutil.copytree(ROOT / "slurm", clone / "slurm")  # a login node is told from another machine by it

    def run(*words: str, env: dict[str, str] | None = None) -> tuple[subprocess.CompletedProcess, list]:
        calls.write_text("")
        clean = {key: value for key, value in os.environ.items() if not key.startswith("MAKE")}
        full = {
            **clean,
            "ENV_PATH": str(env_path),
            "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
            "CALLS": str(calls),
            "PYTHONPATH": "/other",
            **(env or {}),
        }
        command = ["make", "-C", str(clone), *words]
        done = subprocess.run(command, cwd="/", env=full, capture_output=True, text=True, timeout=600)
        return done, [line.split("|")[:-1] for line in calls.read_text().splitlines()]

    run.clone = clone
    return run


def ran(calls: list) -> list[str]:
    """Each call as one line: the command and its arguments."""
    return [" ".join([call[0], *call[4:]]) for call in calls]


def test_default_target_lists_every_target(make):
    done, calls = make()
    listed = [line.split()[1] for line in done.stdout.splitlines() if line.startswith("make ")]
    assert listed == TARGETS
    assert all(len(line.split()) > 3 for line in done.stdout.splitlines() if line.startswith("make "))
    assert calls == []


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["environment"], ["setup_env.sh"]),
        (["environment", "ARGS=--plan --dev"], ["setup_env.sh --plan --dev"]),
        (
            ["quickstart", "ARGS=--max_iters=5"],
            ["setup_env.sh --brief", "python -m tools.quickstart --max_iters=5"],
        ),
        (
            ["faults", "ARGS=--seed=3"],
            [
                "setup_env.sh --dev --brief",
                "python -m tests.faults --seed=3",
                "python -m pytest -m campaign",
            ],
        ),
        (["uv"], []),
        (["uvlock", "ARGS=--upgrade"], ["uv lock --upgrade"]),
        (
            ["venv", "ARGS=--extra dev"],
            [
                "uv sync --locked --extra train --extra tools --extra dev",
                "python -m tools.environment stamp",
            ],
        ),
        (["gpu-status"], ["python -m tools.gpu status"]),
        (["gpu-hot", "GPUS=0,1,2"], ["python -m tools.gpu hot 0,1,2"]),
        (["gpu-hot"], ["python -m tools.gpu hot "]),
        (["kill-gpu", "ARGS=--yes"], ["python -m tools.gpu kill  --yes"]),
        (
            ["ddp-train", "NGPUS=4", "ARGS=--max_iters=9"],
            [
                "python -m torch.distributed.run --standalone --nproc_per_node=4"
                " -m nanogpt.train train_gpt2_epoch --max_iters=9"
            ],
        ),
        (
            ["lint"],
            ["python -m ruff check .", "python -m ruff format --check .", "shellcheck -x setup_env.sh"],
        ),
        (
            ["test", "ARGS=-k shards"],
            [
                "setup_env.sh --dev --brief",
                "python -m ruff check .",
                "python -m ruff format --check .",
                "shellcheck -x setup_env.sh",
                "python -m pytest -n 3 --dist loadscope --no-loadscope-reorder"
                " --reruns 2 -raR --rerun-show-tracebacks -k shards",
            ],
        ),
    ],
)
def test_target_runs_what_it_says(make, words, expected):
    done, calls = make(*words)
    assert done.returncode == 0, done.stderr
    assert ran(calls) == expected
    for _, folder, no_user_site, path, *_ in calls:
        assert folder == str(make.clone)
        assert no_user_site == "1", "packages in ~/.local would take the place of the pinned ones"
        assert path == "unset", "the PYTHONPATH of a user would do so too"


@pytest.mark.parametrize("failing", ["--dev --brief", "ruff check", "--check", "-x setup_env.sh", "pytest"])
def test_failure_of_any_step_fails_the_tests(make, failing):
    done, calls = make("test", env={"FAILING": failing})
    assert done.returncode != 0
    assert failing in ran(calls)[-1], "nothing runs after a failed step"


@pytest.mark.parametrize("target", ["lint", "ddp-train", "gpu-status", "gpu-hot", "kill-gpu"])
def test_without_an_environment_the_remedy_is_named(make, target, tmp_path):
    done, calls = make(target, env={"ENV_PATH": str(tmp_path / "none")})
    assert done.returncode == 2
    assert "make environment" in done.stderr.splitlines()[0]
    assert calls == []


def test_documented_targets_exist():
    """Every `make TARGET` that the documents print is a target."""
    documents = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    for document in documents:
        text = document.read_text(encoding="utf-8") if document.exists() else ""
        for block in text.split("```")[1::2]:
            for line in block.splitlines():
                words = line.strip().removeprefix("$ ").split()
                if words[:1] == ["make"] and len(words) > 1 and not words[1].startswith("-"):
                    assert words[1] in TARGETS, f"{document.name}: {line.strip()}"


def test_ci_runs_the_readme_test_command():
    assert os.access(ROOT / ".ci/run", os.X_OK)
    script = (ROOT / ".ci/run").read_text(encoding="utf-8")
    assert "make test" in script.splitlines()[-1]


@pytest.mark.parametrize(("ci", "status"), [("", 0), ("true", 1)])
@pytest.mark.parametrize("where", ["test", "fixture"])
def test_a_skipped_slurm_test_fails_on_a_ci_machine_only(tmp_path, ci, status, where):
    (tmp_path / "tests").mkdir()
    shutil.copy(ROOT / "tests/conftest.py", tmp_path)
    shutil.copy(ROOT / "tests/suite_cost.py", tmp_path / "tests")
    skip = {"test": ("pass", "pytest.skip('none')"), "fixture": ("pytest.skip('none')", "pass")}[where]
    (tmp_path / "test_it.py").write_text(
        "import pytest\n@pytest.fixture\ndef cluster():\n    {}\n"
        "@pytest.mark.slurm\ndef test_job(cluster):\n    {}\ndef test_other():\n    pass\n".format(*skip)
    )
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-o", "markers=slurm", "."]
    done = subprocess.run(command, cwd=tmp_path, env={**os.environ, "CI": ci}, capture_output=True, text=True)
    assert done.returncode == status, done.stdout
    assert ("SLURM tests were skipped" in done.stdout) is bool(status)
