"""Signals to a process that trains: noted while it runs, without effect when nothing is left to stop."""

import signal

import pytest

# A signal while Python shuts down: its modules go after its handlers have gone.
LATE = """
import os
from nanogpt.common.stop import StopRequest
class Late:
    def __init__(self, kill): self.kill = kill
    def __del__(self): self.kill(os.getpid(), {number})
stop = StopRequest()
os.kill(os.getpid(), {number})
assert stop.look() and stop.reason == {name!r}
{end}
late = Late(os.kill)
import sys; sys.modules["late"] = late
raise SystemExit(75)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_while_python_shuts_down_does_not_hide_the_status(run_python, number):
    code = LATE.format(number=int(number), name=number.name, end="stop.done()")
    assert run_python("-c", code).returncode == 75


def test_without_it_the_signal_would(run_python):
    code = LATE.format(number=int(signal.SIGTERM), name="SIGTERM", end="")
    assert run_python("-c", code).returncode == -signal.SIGTERM
