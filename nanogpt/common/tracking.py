"""--wandb_log: a process beside the run that sends its metrics.jsonl to Weights & Biases.

No trainer imports a tracker. The follower (`engaging wandb`, tools/wandb_follow.py) is started by its command line when
the run opens, reads what the run writes, and is given a moment to finish at the end; whatever becomes of it, the
training goes on, and `engaging wandb RUN` sends the rest later. Standard library only.
"""

import contextlib
import importlib.util
import netrc
import os
import subprocess
import sys
import time
import urllib.parse
from pathlib import Path

from nanogpt.common.errors import UserError

FOLLOWER = (
    "ENGAGING_WANDB_FOLLOWER"  # the follower's process number, kept through the start of the source copy
)
MODES = ("online", "offline", "disabled")
SPELLINGS = {"dryrun": "offline", "run": "online", "shared": "online"}
PATIENCE = {
    True: 60.0,
    False: 10.0,
}  # seconds given to the follower: at the end of a run, and when it is preempted


def mode(flag: str = "--wandb_log=true") -> str:
    """online, offline or disabled: WANDB_MODE, else online with a login and offline without one. Nobody is ever asked.

    UserError, named after `flag`, when wandb is not installed, or WANDB_MODE asks for what cannot be.
    """
    if importlib.util.find_spec("wandb") is None:
        raise UserError(f"{flag}: wandb is not installed; pip install wandb, or leave it away")
    wish = os.environ.get("WANDB_MODE", "").lower()
    wish = SPELLINGS.get(wish, wish)
    if wish not in (*MODES, ""):
        raise UserError(f"WANDB_MODE={wish[:40]}: expected one of {', '.join(MODES)}")
    if wish == "online" and not has_login():
        raise UserError(
            f"{flag}: WANDB_MODE=online, but there is no login; run wandb login, or set WANDB_API_KEY, or set "
            "WANDB_MODE=offline, or leave it away"
        )
    return wish or ("online" if has_login() else "offline")


def has_login() -> bool:
    """Whether there is a key where wandb looks for one: the environment, or the netrc file."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urllib.parse.urlsplit(os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai").hostname
    places = [os.environ["NETRC"]] if os.environ.get("NETRC") else ["~/.netrc", "~/_netrc"]
    for place in places:
        with contextlib.suppress(OSError, netrc.NetrcParseError, RuntimeError):
            found = netrc.netrc(Path(place).expanduser())
            if host in found.hosts and found.hosts[host][2]:
                return True
    return False


def start(folder: Path, root: Path) -> None:
    """Start the follower of the run in `folder`, from the repository `root`; it ends by itself after this process."""
    if not (root / "tools" / "wandb_follow.py").is_file():
        print(
            f"note: --wandb_log=true: {root} has no tools; afterwards: engaging wandb {folder}",
            file=sys.stderr,
        )
        return
    command = [sys.executable, "-m", "tools", "wandb", str(folder), f"--parent={os.getpid()}"]
    # A session of its own: Ctrl-C is for the trainer, and the follower sends what comes of it.
    child = subprocess.Popen(command, cwd=root, stdin=subprocess.DEVNULL, start_new_session=True)
    os.environ[FOLLOWER] = str(child.pid)


def finish(finished: bool) -> None:
    """Wait for the follower that this process has started, if any, but not for long."""
    number = os.environ.pop(FOLLOWER, "")
    if not number.isdecimal():
        return
    until = time.monotonic() + PATIENCE[finished]
    with contextlib.suppress(ChildProcessError):  # somebody else's: the variable was inherited
        while os.waitpid(int(number), os.WNOHANG)[0] == 0:
            if time.monotonic() > until:
                print(
                    "note: not everything has reached Weights & Biases; send it later: engaging wandb RUN",
                    flush=True,
                )
                return
            time.sleep(0.05)
