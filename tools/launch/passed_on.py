"""sbatch's options beyond those that `engaging launch` knows: checked, and refused where the launcher sets them."""

import argparse
import os
import re

from nanogpt.common.errors import UserError
from tools.site.settings import SETTINGS

MAIL_TYPES = "BEGIN,END,FAIL,REQUEUE"
OWN_FLAG = "launch has a flag of its own for it"
SET_BY_LAUNCH = {
    **dict.fromkeys(
        ("account", "partition", "qos", "reservation", "time", "nodes", "mem", "test-only"), OWN_FLAG
    ),
    "gres": "say --gpus and --gpu-type",
    "cpus-per-task": "say --cpus",
    "job-name": "say --name",
    "array": "say --seeds and --throttle",
    **dict.fromkeys(("output", "error"), "launch writes logs/NAME-JOBID.out"),
    "comment": "launch keeps the token there by which it finds the job",
    **dict.fromkeys(("wrap", "chdir", "export", "parsable"), "launch sets it itself"),
}


def passed_on(args: argparse.Namespace) -> dict[str, str | bool]:
    """sbatch's options of --sbatch and --mail, by name. Raises UserError for one that the launcher sets itself."""
    found: dict[str, str | bool] = {}
    for text in args.sbatch:
        name, equals, value = text.removeprefix("--").partition("=")
        if not re.fullmatch(r"[a-z][a-z-]{1,40}", name) or (equals and not value):
            raise UserError(
                f"--sbatch={text[:80]!r}: expected an option of sbatch by its long name, such as --sbatch nice=100 "
                "or --sbatch exclusive"
            )
        if (ours := SET_BY_LAUNCH.get(name)) is not None:
            raise UserError(f"--sbatch={name}: {ours}")
        found[name] = value if equals else True
    if args.mail is not None:
        address = args.mail or os.environ.get("ENGAGING_MAIL", "")
        if not address:
            raise UserError(
                "--mail: no address known; --mail you@mit.edu, or: engaging config set mail you@mit.edu"
            )
        found |= {"mail-user": SETTINGS["mail"].check(address), "mail-type": MAIL_TYPES}
    return found
