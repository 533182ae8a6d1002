"""torchrun, whose end by a signal is a status and no traceback: the ranks have said what became of the run.

python torchrun.py [torchrun's arguments]
"""

import runpy
import sys


def main() -> int:
    """Run torch.distributed.run with this process's arguments; 128 + the signal's number when one ended it."""
    sys.path.pop(0)  # this folder: as with -m torch.distributed.run, nothing here may stand before a library
    try:
        runpy.run_module("torch.distributed.run", run_name="__main__", alter_sys=True)
    except Exception as error:
        if type(error).__name__ != "SignalException":
            raise
        return 128 + int(error.sigval)  # type: ignore[attr-defined]
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
