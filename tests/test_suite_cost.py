"""The two lines at the end of `make test`: what they count."""

import os
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from tests import suite_cost


@pytest.mark.skipif(sys.platform != "linux", reason="inotify is Linux's")
def test_openings_of_a_file_are_counted_in_every_process_and_forks_are_not(tmp_path):
    path = tmp_path / "module.so"
    path.touch()
    openings = suite_cost.Openings(str(path))
    assert openings.count == 0
    descriptor = os.open(path, os.O_RDONLY)
    subprocess.run([sys.executable, "-S", "-c", "pass"], pass_fds=[descriptor], check=True)
    os.close(descriptor)
    for expected in (2, 3):
        subprocess.run([sys.executable, "-S", "-c", "open(__import__('sys').argv[1])", path], check=True)
        while openings.count < expected:  # the reader is a thread
            time.sleep(0.001)
    assert openings.count == 3
    assert "torch/_C" in suite_cost.torchs_extension()
    assert suite_cost.Openings(None).count == -1


def test_the_summary_adds_up_by_folder():
    cost, lines = suite_cost.SuiteCost(), []
    for name, seconds in (
        ("tests/a/test_x.py::one", 2.0),
        ("tests/a/test_y.py::two", 1.0),
        ("tests/test_z.py::three", 4.0),
    ):
        cost.pytest_runtest_logreport(SimpleNamespace(nodeid=name, duration=seconds))
    cost.torch.count = 7
    cost.pytest_terminal_summary(SimpleNamespace(write_line=lines.append))
    assert lines == ["seconds of all processes: 7 (tests 4, tests/a 3)", "torch was started: 7 times"]
