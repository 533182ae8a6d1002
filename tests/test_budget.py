"""What the suite prints about its cost."""

import subprocess
import sys

import pytest

from tests.budget import AREAS, TorchStarts, area_of


def test_a_start_of_torch_is_counted_and_a_fork_is_not() -> None:
    starts = TorchStarts()
    before = starts.count()
    if before is None:
        pytest.skip("this system has no inotify to count with")
    code = "import torch, os\npid = os.fork()\nimport torch\nif pid: os.waitpid(pid, 0)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)
    assert starts.count() >= before + 1


def test_every_test_belongs_to_one_area() -> None:
    assert area_of("tests/test_model.py::test_x") == "nanogpt and common"
    assert area_of("tests/tools/test_plot.py::test_x") == "tools"
    assert area_of("tests/tools/leaderboard/test_pages.py::test_x") == "study and evidence"
    assert sum(seconds for seconds, _ in AREAS.values()) == 480
