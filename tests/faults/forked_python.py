"""`python WORDS...` in a process that tests/faults/zygote.py has forked: no start of torch.

    zygote.run(["-m", "nanogpt.sample", *flags], module="tests.faults.forked_python", cwd=clone)
    zygote.run(["train.py", *flags], module="tests.faults.forked_python", cwd=clone / "nanogpt")

WORDS are a script or `-m` and a module, and its flags. The folder that they name decides whose code runs, as it does
for Python; a trainer that executes itself again from the run's copy of the source does so in the same process. The
commands' own tests start real ones besides.
"""

import os
import runpy
import sys
from pathlib import Path

PACKAGES = ("nanogpt", "modded_nanogpt", "tools")


class _Executed(BaseException):
    """os.execv was called with these words."""

    def __init__(self, program: str, words: list[str]) -> None:
        assert program == sys.executable, program
        self.words = words[1:]


def _execv(program: str, words: list[str]) -> None:
    raise _Executed(program, words)


def main(words: list[str]) -> int:
    """What Python does with `words`, however often they execute Python again; leaves by SystemExit as that does."""
    os.execv, before = _execv, sys.path[1:]
    while True:
        for name in [name for name in sys.modules if name.split(".")[0] in PACKAGES]:
            del sys.modules[name]
        try:
            if words[0] == "-m":
                sys.path[:] = [os.getcwd(), *before]  # noqa: PTH109 (as Python itself does it)
                sys.argv = words[1:]
                runpy.run_module(words[1], run_name="__main__", alter_sys=True)
            else:
                sys.path[:] = [str(Path(words[0]).resolve().parent), *before]
                sys.argv = words
                runpy.run_path(words[0], run_name="__main__")
            return 0
        except _Executed as again:
            words = again.words
