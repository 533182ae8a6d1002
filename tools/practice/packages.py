"""The Debian and Ubuntu packages that the practice cluster is made of."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from nanogpt.common.errors import CommandError, UserError

PACKAGES = [
    *("slurmctld", "slurmd", "slurmdbd", "slurm-client", "slurm-wlm-basic-plugins", "slurm-wlm-mysql-plugin"),
    *("munge", "mariadb-server"),
]
PROGRAMS = [
    *("munged", "mariadbd", "mariadb-install-db", "mariadb-admin", "slurmdbd", "slurmctld", "slurmd"),
    *("sacctmgr", "squeue", "unshare", "nsenter"),
]
SEARCH_PATH = f"{os.defpath}:/usr/local/sbin:/usr/sbin:/sbin"


def search_path() -> str:
    """PATH with the folders of system programs, which not every shell has."""
    return f"{os.environ.get('PATH', '')}:{SEARCH_PATH}"


def obstacle() -> str:
    """Why no practice cluster can run here, in one line, or "" when one can."""
    if os.geteuid() != 0:
        return "a practice cluster needs root (its nodes are namespaces); run it as root or with sudo"
    if not missing():
        return ""
    if not shutil.which("apt-get", path=search_path()):
        return f"a practice cluster needs Debian or Ubuntu: no apt-get here, and no {missing()[0]}"
    return ""


def missing() -> list[str]:
    """The programs that are not installed."""
    return [name for name in PROGRAMS if not shutil.which(name, path=search_path())]


def install(log: Path) -> None:
    """Install what is missing (root, apt-get); says so in one line. Raises an error that names the log."""
    reason = obstacle()
    if reason:
        raise UserError(reason)
    if not missing():
        return
    print(f"installing with apt-get: {' '.join(PACKAGES)}", file=sys.stderr, flush=True)
    env = {**os.environ, "PATH": search_path(), "DEBIAN_FRONTEND": "noninteractive"}
    with log.open("ab") as out:
        subprocess.run(["apt-get", "update", "-qq"], env=env, stdout=out, stderr=out, check=False)
        done = subprocess.run(
            ["apt-get", "install", "-y", "-qq", "--no-install-recommends", *PACKAGES],
            env=env,
            stdout=out,
            stderr=out,
            check=False,
        )
    if done.returncode or missing():
        raise CommandError(f"apt-get could not install {', '.join(missing()) or 'the packages'}; see {log}")
