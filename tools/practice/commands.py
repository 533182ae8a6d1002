"""The programs of one folder's practice cluster: their environment, and how one is called, started and found."""

import os
import subprocess
from pathlib import Path

from nanogpt.common.errors import CommandError
from tools.practice import packages
from tools.practice.processes import has_environment, read_pid, wait_until, with_environment

MARK = "PRACTICE_CLUSTER_DAEMON_OF"
# What an enclosing job or another cluster has set would confuse this cluster's daemons and commands.
FOREIGN = ("SLURM", "SBATCH_", "SALLOC_", "SINFO_", "SQUEUE_", "SACCT", "SCONTROL_", "MYSQL_", "MARIADB_")


def environment(folder: Path) -> dict[str, str]:
    """What a program needs in its environment to talk to the cluster of that folder."""
    return {"SLURM_CONF": str(Path(folder).resolve() / "etc" / "slurm.conf"), "PATH": packages.search_path()}


def daemon(folder: Path, name: str) -> int | None:
    """The live process of a PID file, if it is this cluster's: numbers are used again."""
    pid = read_pid(folder / "run" / f"{name}.pid")
    return pid if pid and has_environment(pid, f"{MARK}={folder}") else None


def everything(folder: Path) -> list[int]:
    """All daemons and nodes of this cluster: they carry its mark, which neither users' shells nor jobs do."""
    return with_environment(f"{MARK}={folder}")


def manager(folder: Path, *words: str, check: bool = True) -> None:
    """Tell the accounting database something."""
    call(folder, ["sacctmgr", "-i", *words], check=check)


def wait_for_command(folder: Path, what: str, command: list[str]) -> None:
    """Wait until a command succeeds; `what` says in an error what it would have shown."""
    wait_until(what, lambda: call(folder, command, check=False).returncode == 0, 120, folder / "log")


def _environment(folder: Path) -> dict[str, str]:
    """A clean one. TMPDIR: a starting MariaDB deletes the temporary tables of every other that shares it."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(FOREIGN)}
    return {**kept, **environment(folder), MARK: str(folder), "TMPDIR": f"{folder}/tmp", "LC_ALL": "C"}


def call(
    folder: Path, command: list[str], *, check: bool = True, timeout: float = 30, **variables: str
) -> subprocess.CompletedProcess:
    """Run one command of the cluster; a failure is an error with the command's own last words."""
    env = {**_environment(folder), **variables}
    log = folder / "log" / "commands.log"
    # Output goes through a file: a daemon that keeps a pipe open would keep us waiting.
    with log.open("ab+") as out:
        start = out.seek(0, os.SEEK_END)
        try:
            code = subprocess.run(
                command,
                env=env,
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                timeout=timeout,
            ).returncode
        except subprocess.TimeoutExpired:
            code = 124
        out.seek(start)
        text = out.read().decode(errors="replace")
    if check and code:
        last = text.strip().splitlines()[-1:] or ["no output"]
        raise CommandError(f"{command[0]} failed with status {code}: {last[0]}; see {folder}/log")
    return subprocess.CompletedProcess(command, code, stdout=text)


def background(folder: Path, name: str, command: list[str]) -> subprocess.Popen:
    """Start one of the cluster's daemons, whose output goes to its own file."""
    with (folder / "log" / f"{name}.out").open("ab") as out:
        return subprocess.Popen(
            command,
            env=_environment(folder),
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            start_new_session=True,
        )
