"""run.sh and requirements.txt, with stand-ins for python and torchrun that write down how they were called."""

import re
import subprocess
from pathlib import Path

import pytest

from tools.toml import tomllib

ROOT = Path(__file__).resolve().parents[2]
NOTE = '#!/bin/bash\nprintf "%s\\n" "${0##*/} $*" >>"$CALLS"\n'


def called(tmp_path: Path, *words: str, script: Path = ROOT / "modded_nanogpt" / "run.sh") -> list[str]:
    """The commands that run.sh starts, the repository's folder taken out."""
    folder = tmp_path / "bin"
    folder.mkdir(exist_ok=True)
    for name in ("python", "torchrun"):
        (folder / name).write_text(NOTE)
        (folder / name).chmod(0o755)
    calls = tmp_path / "calls"
    calls.unlink(missing_ok=True)
    environment = {
        "PATH": f"{folder}:/usr/bin:/bin",
        "CALLS": str(calls),
        "DATA_ROOT": str(tmp_path / "data"),
    }
    done = subprocess.run(
        [script, *words], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    return calls.read_text().replace(f"{ROOT}/modded_nanogpt/", "").splitlines()


def test_missing_tokens_are_downloaded_before_the_ranks_start(tmp_path):
    train = "torchrun --standalone --nproc_per_node=8 train_gpt.py"
    fetch = f"python data/cached_fineweb10B.py --data_root={tmp_path}/data"
    assert called(tmp_path) == [fetch, train]
    assert (
        called(tmp_path, "--data_root=elsewhere")[0]
        == "python data/cached_fineweb10B.py --data_root=elsewhere"
    )
    assert called(tmp_path, "tiny", "--dataset", "x y") == [f"{train} tiny --dataset x y"]
    assert called(tmp_path, "--help") == [f"{train} --help"]
    (tmp_path / "data" / "fineweb10B").mkdir(parents=True)
    (tmp_path / "data" / "fineweb10B" / "fineweb_train_000001.bin").touch()
    assert called(tmp_path, "snapshot") == [f"{train} snapshot"]


def test_the_number_of_gpus_is_edited_in_one_place(tmp_path):
    script = ROOT / "modded_nanogpt" / "run.sh"
    lines = [line for line in script.read_text().splitlines() if "--nproc_per_node=8" in line]
    assert len(lines) == 1 and script.stat().st_mode & 0o111


@pytest.mark.parametrize("name", ["torch", "numpy", "huggingface-hub"])
def test_requirements_are_the_environments(name):
    lines = (ROOT / "modded_nanogpt" / "requirements.txt").read_text().splitlines()
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["train"]
    assert [line for line in lines if not line.startswith("#")] == wanted
    assert any(re.match(rf"{name}[=<>]", line) for line in lines)
