"""Where things are: the checkout these tools act on, and how a file gets from here to a laptop."""

import getpass
import os
import shlex
import socket
from pathlib import Path

from nanogpt.common.errors import UserError

MARKS = ("slurm/lib", "nanogpt/common", "pyproject.toml")


def checkout() -> Path:
    """The root of the checkout: the one around the current folder, else the one these tools are in.

    Raises UserError when neither is one.
    """
    try:
        here = Path.cwd()
    except OSError:
        raise UserError(
            "the current folder no longer exists; cd into the checkout of engaging-nanogpt"
        ) from None
    for folder in (here, *here.parents, Path(__file__).resolve().parents[1]):
        if all((folder / mark).exists() for mark in MARKS):
            return folder
    raise UserError(
        f"{here}: not inside a checkout of engaging-nanogpt; cd into your clone of the repository"
    )


def fetch_line(path: Path) -> str:
    """The line, typed on a laptop, that fetches a file from this machine; "" where nobody is logged in from afar."""
    connection = os.environ.get("SSH_CONNECTION", "").split()
    if len(connection) == 4:
        name = socket.getfqdn()
        host = name if "." in name and not name.startswith("localhost") else connection[2]
    elif os.environ.get("SLURM_JOB_ID"):  # a compute node: the login node sees the same files
        host = os.environ.get("SLURM_SUBMIT_HOST", "")
    else:
        host = ""
    if not host:
        return ""
    place = shlex.quote(f"{getpass.getuser()}@{host}:{path.resolve()}")
    return f"to see it on your laptop, type there: scp -r {place} ."


def print_fetch_line(path: Path) -> None:
    """What stands below the name of a page or a picture that was written."""
    if line := fetch_line(path):
        print(f"  {line}")
