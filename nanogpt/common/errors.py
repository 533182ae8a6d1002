"""What can go wrong, as exit codes and one-line messages.

A user's mistake ends a command with one line on stderr that names the file, flag or field, its value and
the remedy. A fault of the program itself keeps its traceback: that is a bug, and hiding it helps nobody.
"""

import errno
import os
import signal
import sys
from collections.abc import Callable

EXIT_USAGE = 2  # bad input; nothing was changed
EXIT_NONFINITE = 70  # the loss or the gradient became NaN or infinite; the last good checkpoint stays
EXIT_STORAGE = 74  # disk full, quota, read-only, I/O error (EX_IOERR of sysexits.h)
# Asked to stop before the end; a checkpoint was saved and the run can go on (EX_TEMPFAIL)
EXIT_INTERRUPTED = 75
EXIT_FENCED = 76  # a newer attempt owns this run directory; this one stopped without touching it

GOES_ON = "the same command goes on where this one stopped"  # for commands of which that is true


LONGEST_WORD = (
    400  # characters of one word in a message; of a longer one the beginning and the end say enough
)


def _shown(word: str) -> str:
    """A word as it may stand in one line on a terminal: no control characters, not without end."""
    if len(word) > LONGEST_WORD:
        word = f"{word[: LONGEST_WORD // 2]}...{word[-LONGEST_WORD // 4 :]}"
    if word.isprintable():
        return word
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in word)


class CommandError(Exception):
    """An expected failure: `message` is one line that names what was wrong and what to do about it."""

    exit_code = 1

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(_shown(word) for word in str(message).split()))


class UserError(CommandError):
    """Bad input: a flag, a file or a combination of them."""

    exit_code = EXIT_USAGE


class StorageError(CommandError):
    """The file system refused a write: full, over quota, read-only, or broken."""

    exit_code = EXIT_STORAGE


class NonFiniteError(CommandError):
    """Training produced NaN or infinity."""

    exit_code = EXIT_NONFINITE


class FencedError(CommandError):
    """Another attempt has taken over the run directory."""

    exit_code = EXIT_FENCED


def run_command(main: Callable[[list[str]], int | None], again: str = "") -> None:
    """Run `main(argv)` as a command: turns expected failures into one line and an exit status.

    A reader that closes the pipe (`... | head`) ends the command quietly, Ctrl-C ends it with status 130. `again` says
    what typing an interrupted command again does; with it SIGTERM (a batch system) ends the command as Ctrl-C does.
    """
    if again:
        signal.signal(signal.SIGTERM, _interrupt)
    try:
        status = main(sys.argv[1:])
        sys.stdout.flush()
    except CommandError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        _leave_group(error.exit_code)
        raise SystemExit(error.exit_code) from None
    except SystemExit as end:
        if isinstance(end.code, int) and end.code:
            _leave_group(end.code)
        raise
    except KeyboardInterrupt:
        print("interrupted" + (f"; {again}" if again else ""), file=sys.stderr, flush=True)
        if (
            again
        ):  # libraries' threads (of pyarrow) may be at work, and abort when Python is taken down around them
            sys.stdout.flush()
            os._exit(130)
        raise SystemExit(130) from None
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(0) from None
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:  # all else about a file is said where it is read
            raise
        print(f"error: ...{str(error.filename)[-60:]!r}: this name is too long", file=sys.stderr, flush=True)
        _leave_group(EXIT_USAGE)
        raise SystemExit(EXIT_USAGE) from None
    raise SystemExit(status or 0)


def _interrupt(*_: object) -> None:
    """SIGTERM as Ctrl-C, once: a second one (SLURM tells a script and its children) would disturb the tidying up."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise KeyboardInterrupt


def _leave_group(status: int) -> None:
    """End at once when this process belongs to a group of ranks: see `ranks.leave`."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        sys.stdout.flush()
        os._exit(status)
