"""torchrun, whose end is a status and at most one line, no traceback: the ranks have said what became of the run.

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
        if (
            type(error).__name__ == "ChildFailedError"
        ):  # its table of all ranks would bury the line that counts
            rank, first = error.get_first_failure()  # type: ignore[attr-defined]
            print(
                f"rank {rank} ended first, with status {first.exitcode}; what it said is above",
                file=sys.stderr,
            )
            return 1
        if type(error).__name__ != "SignalException":
            raise
        return 128 + int(error.sigval)  # type: ignore[attr-defined]
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
