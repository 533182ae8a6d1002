"""Runs a trainer as one rank and notes its exit status, which torchrun would hide.

    python rank.py FOLDER SCRIPT [ARGS...]      writes FOLDER/rank-<RANK>

torchrun answers 1 whatever its workers answered. Whether a run was interrupted with a checkpoint saved (75),
was given something impossible (2) or broke decides what happens to the job, so each rank's status is
noted here.
To torchrun an interruption is a good end: it must not shoot the other ranks while they are closing files.

RUN_STORE="ADDRESS PORT" (rendezvous.py) becomes the store of the process group, so that no rank opens another
one, which would be on a port that may be taken by now and on all of the machine's addresses.
"""

import contextlib
import ctypes
import os
import signal
import sys

INTERRUPTED = 75
PASSED_ON = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
PR_SET_PDEATHSIG = 1


def main() -> int:
    """Run the script as a child that dies with this process; returns what torchrun is to see."""
    folder, words = sys.argv[1], sys.argv[2:]
    if os.environ.get("RUN_STORE"):
        os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = os.environ["RUN_STORE"].split()
        os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"
    status = run([sys.executable, *words])
    note = f"{folder}/rank-{int(os.environ.get('RANK', '0'))}"  # no pathlib, whose import takes a node 10 ms
    try:
        with open(f"{note}.new", "w") as file:  # noqa: PTH123
            file.write(f"{status}\n")
        os.replace(f"{note}.new", note)  # noqa: PTH105
    except OSError as error:  # a full disk must not hide the trainer's own outcome
        print(f"warning: {note}: {error.strerror}", file=sys.stderr)
    under_torchrun = "TORCHELASTIC_RUN_ID" in os.environ
    return 0 if status == INTERRUPTED and under_torchrun else status


def run(command: list[str]) -> int:
    """The command's exit status as a shell counts it (128 + signal). Signals that come here reach it too."""
    library, parent = ctypes.CDLL(None), os.getpid()
    signal.pthread_sigmask(signal.SIG_BLOCK, PASSED_ON)
    child = os.fork()
    if child == 0:
        library.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, PASSED_ON)
        os.execv(command[0], command)

    def pass_on(number: int, _: object) -> None:
        with contextlib.suppress(ProcessLookupError):  # it has just ended
            os.kill(child, number)

    for number in PASSED_ON:
        signal.signal(number, pass_on)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, PASSED_ON)
    _, ended = os.waitpid(child, 0)
    for number in PASSED_ON:  # Python's own end puts the defaults back: a late signal would hide the status
        signal.signal(number, signal.SIG_IGN)
    code = os.waitstatus_to_exitcode(ended)
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    raise SystemExit(main())
