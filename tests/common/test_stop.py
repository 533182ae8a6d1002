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


# Triton compiles for an H100 without having one; its LLVM then takes the signals.
COMPILE = """
import os
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from nanogpt.common.stop import StopRequest

@triton.jit
def add_one(x, SIZE: tl.constexpr):
    places = x + tl.arange(0, SIZE)
    tl.store(places, tl.load(places) + 1)

stop = StopRequest()
source = ASTSource(add_one, {"x": "*fp32", "SIZE": "constexpr"}, {(1,): 128})
triton.compile(source, target=GPUTarget("cuda", 90, 32))
"""
TWICE = """
assert not stop.look()
os.kill(os.getpid(), number)
os.kill(os.getpid(), number)
assert stop.look() and stop.reason == name, stop.reason
raise SystemExit(75)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_signals_are_heard_after_a_kernel_was_compiled(run_python, tmp_path, number):
    pytest.importorskip("triton")
    path = tmp_path / "compile_then_stop.py"  # Triton reads a kernel's source from its file
    path.write_text(f"number, name = {int(number)}, {number.name!r}\n{COMPILE}{TWICE}")
    env = {"PYTHONPATH": ".", "TRITON_CACHE_DIR": str(tmp_path / "cache")}
    assert run_python(path, env=env).returncode == 75
