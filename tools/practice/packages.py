"""The Debian and Ubuntu packages that the practice cluster is made of."""

import contextlib
import fcntl
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
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
LOCK = Path("/var/lock/engaging-practice-packages")
POLICY = Path("/usr/sbin/policy-rc.d")
SEARCH_PATH = f"{os.defpath}:/usr/local/sbin:/usr/sbin:/sbin"


def search_path() -> str:
    """PATH with the folders of system programs, which not every shell has."""
    return f"{os.environ.get('PATH', '')}:{SEARCH_PATH}"


def obstacle() -> str:
    """Why no practice cluster can run here, in one line, or "" when one can."""
    if os.geteuid() != 0:
        return "a practice cluster needs root (its nodes are namespaces); run it as root or with sudo"
    if lacking := missing():
        listed = f"missing: {', '.join(lacking)} (Debian's packages {' '.join(PACKAGES)})"
        if not shutil.which("apt-get", path=search_path()):
            return f"a practice cluster needs Debian or Ubuntu: no apt-get here, and {listed}"
        if Path("/run/systemd/system").is_dir():
            return f"this machine has a service manager, so nothing is installed by itself; {listed}"
        if shutil.which("sbatch", path=search_path()):
            return f"there is a SLURM on this machine, so nothing is installed beside it; {listed}"
    namespaces = ["unshare", "--pid", "--fork", "--mount-proc", "--uts", "--mount", "true"]
    if shutil.which("unshare") and subprocess.run(namespaces, capture_output=True).returncode:
        return "a practice cluster needs namespaces (CAP_SYS_ADMIN), which this container does not give"
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
    with LOCK.open("a") as lock, _no_services():
        fcntl.flock(lock, fcntl.LOCK_EX)  # two test runs on one machine
        if missing():
            _install(log)


def _install(log: Path) -> None:
    print(f"installing with apt-get: {' '.join(PACKAGES)}", file=sys.stderr, flush=True)
    env = {**os.environ, "PATH": search_path(), "DEBIAN_FRONTEND": "noninteractive"}
    apt = ["apt-get", "-qq", "-o", "DPkg::Lock::Timeout=300"]
    with log.open("ab") as out:
        subprocess.run([*apt, "update"], env=env, stdout=out, stderr=out, check=False)
        command = [*apt, "install", "-y", "--no-install-recommends", *PACKAGES]
        done = subprocess.run(command, env=env, stdout=out, stderr=out, check=False)
    if done.returncode or missing():
        raise CommandError(f"apt-get could not install {', '.join(missing()) or 'the packages'}; see {log}")


@contextlib.contextmanager
def _no_services() -> Iterator[None]:
    """Debian's own switch: while this file answers 101, an installation starts no service."""
    ours = not POLICY.exists()
    if ours:
        POLICY.write_text("#!/bin/sh\nexit 101\n")
        POLICY.chmod(0o755)
    try:
        yield
    finally:
        if ours:
            POLICY.unlink(missing_ok=True)
