"""Start, stop and ask the practice cluster of one folder.

Order: munge (own key and socket) -> MariaDB (own data, own socket, no network) -> slurmdbd -> accounts
-> slurmctld -> one slurmd a node, each in namespaces of its own -> limits. `down` goes back the same way and
then looks for whatever is left. Requests are signed with the cluster's own munge key, so the ports are of no
use to strangers.
"""

import contextlib
import fcntl
import os
import random
import shutil
import signal
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

from nanogpt.common.errors import CommandError, UserError
from tools.practice import conf, packages
from tools.practice.commands import (
    background,
    call,
    daemon,
    everything,
    manager,
    wait_for_command,
)
from tools.practice.conf import Options
from tools.practice.processes import (
    alive,
    children,
    command_name,
    descendants,
    end,
    poll,
    wait_until,
)
from tools.practice.shape import ACCOUNT, CLUSTER, NODES, PARTITIONS

LONGEST_FOLDER = 60  # a unix socket's path must stay under 108 characters
DAEMONS = ("munged", "mariadbd", "slurmdbd", "slurmctld")
LOCK_SECONDS = 180
HERE = Path(__file__).resolve().parent


def up(folder: Path, options: Options | None = None) -> bool:
    """Start the cluster in `folder`; False when it was running already. A half-dead one is started afresh."""
    options = options or Options()
    folder = _prepare_folder(Path(folder))
    packages.install(folder / "log" / "apt.log")
    with _lock(folder):
        if status(folder)["running"]:
            return False
        if everything(folder):
            print(f"practice cluster in {folder}: half of it is dead; starting it again", file=sys.stderr)
            _stop(folder)
        for last in (False, False, True):
            try:
                _start(folder, options)
                return True
            except BaseException as error:
                _stop(folder)
                if last or not (isinstance(error, CommandError) and _a_port_was_taken(folder)):
                    raise
                (folder / "etc" / "port").unlink(missing_ok=True)  # by another program, since it was free
    raise AssertionError("unreachable")


def _a_port_was_taken(folder: Path) -> bool:
    logs = [path.read_text(errors="replace") for path in (folder / "log").glob("slurm*.log")]
    return any(said in text for text in logs for said in ("Address already in use", "Unable to bind"))


def down(folder: Path, *, delete: bool = False) -> bool:
    """Stop the cluster and everything it started; False when nothing ran. `delete` removes its folder too."""
    folder = Path(folder).resolve()
    if not (folder / "etc").is_dir():
        return False
    with _lock(folder):
        found = bool(everything(folder))
        _stop(folder)
    if delete:
        shutil.rmtree(folder, ignore_errors=True)
    return found


def status(folder: Path) -> dict[str, object]:
    """{"running": bool, "alive": {daemon or node: process id}, "missing": [names]} of a folder's cluster."""
    folder = Path(folder).resolve()
    pids = {name: daemon(folder, name) for name in DAEMONS}
    pids |= {node.name: node_init(folder, node.name) for node in NODES}
    missing = [name for name, pid in pids.items() if pid is None]
    ping = not missing and call(folder, ["scontrol", "ping"], check=False).returncode == 0
    return {"running": ping, "alive": {k: v for k, v in pids.items() if v}, "missing": missing}


def node_init(folder: Path, name: str) -> int | None:
    """The first process of a node (as this machine counts), below which all of the node's processes live."""
    outer = daemon(folder, f"node-{name}")
    below = children(outer) if outer else []
    return below[0] if below else None


def start_node(folder: Path, name: str) -> None:
    """Switch a node on. Its slurmd registers with the controller within a second or two."""
    folder = Path(folder).resolve()
    (folder / "spool" / name).mkdir(exist_ok=True)
    (folder / "run" / f"slurmd-{name}.pid").unlink(
        missing_ok=True
    )  # its number means nothing in a new namespace
    command = ["unshare", "--pid", "--fork", "--kill-child=KILL", "--mount-proc", "--uts", "--mount"]
    command += ["bash", str(HERE / "node.sh"), name, str(folder / "etc" / "hosts")]
    process = background(folder, f"node-{name}", command)
    (folder / "run" / f"node-{name}.pid").write_text(f"{process.pid}\n")


def stop_node(folder: Path, name: str) -> None:
    """Pull the node's plug: all of its processes die at once, and nobody is told."""
    folder = Path(folder).resolve()
    outer, first = daemon(folder, f"node-{name}"), node_init(folder, name)
    inner = descendants(first) if first else []
    end([pid for pid in (first, outer) if pid], 10, signal.SIGKILL)
    poll(lambda: not any(map(alive, inner)), 10)
    (folder / "run" / f"node-{name}.pid").unlink(missing_ok=True)


def kill_slurmd(folder: Path, name: str) -> None:
    """Kill the node's slurmd only: to the controller the node is lost, while its jobs go on running."""
    first = node_init(Path(folder).resolve(), name)
    end([pid for pid in children(first or 0) if command_name(pid) == "slurmd"], 5, signal.SIGKILL)


def start_slurmd(folder: Path, name: str) -> None:
    """Start slurmd again on a node that runs without one."""
    folder = Path(folder).resolve()
    first = node_init(folder, name)
    if first is None:
        raise UserError(f"node {name!r} is off; start the node")
    (folder / "run" / f"slurmd-{name}.pid").unlink(missing_ok=True)
    call(folder, ["nsenter", f"--target={first}", "--pid", "--mount", "--uts", "slurmd", "-N", name])


def kill_controller(folder: Path) -> None:
    """Kill slurmctld without a word, as a crash does."""
    pid = daemon(Path(folder).resolve(), "slurmctld")
    if pid:
        end([pid], 5, signal.SIGKILL)


def start_controller(folder: Path) -> None:
    """Start slurmctld and wait until it answers."""
    folder = Path(folder).resolve()
    (folder / "run" / "slurmctld.pid").unlink(missing_ok=True)
    call(folder, ["slurmctld"])
    wait_for_command(folder, "slurmctld", ["scontrol", "ping"])


def wait_for_registration(folder: Path) -> None:
    """Wait until every node that is on has reported to the controller since that started.

    Until then a restarted controller gives out GPUs that no step can use ("Invalid generic resource").
    """
    folder = Path(folder).resolve()
    on = [node.name for node in NODES if node_init(folder, node.name)]

    def reported() -> bool:
        text = call(folder, ["scontrol", "show", "node", "-o"], check=False).stdout
        rows = {
            row.split()[0].partition("=")[2]: row for row in text.splitlines() if row.startswith("NodeName=")
        }
        return all(name in rows and "SlurmdStartTime=None" not in rows[name] for name in on)

    wait_until("the nodes' reports", reported, 60, folder / "log")


def _prepare_folder(folder: Path) -> Path:
    folder = folder.absolute()
    if len(str(folder.resolve())) > LONGEST_FOLDER:
        raise UserError(
            f"--dir={folder}: longer than {LONGEST_FOLDER} characters; unix sockets need a shorter one"
        )
    if any(char.isspace() or char in "\"'\\#,;%" for char in str(folder)):
        raise UserError(
            f"--dir={str(folder)!r}: SLURM's files take no spaces or quotes there; choose a plain path"
        )
    if folder.exists() and (not folder.is_dir() or folder.stat().st_uid != os.geteuid()):
        raise UserError(f"--dir={folder}: not a folder of yours; choose another")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / ".practice").exists():
        raise UserError(f"--dir={folder}: not empty and not a practice cluster's folder; choose another")
    for name, mode in (("", 0o755), ("etc", 0o755), ("run", 0o755), ("log", 0o755), ("dev", 0o755)):
        (folder / name).mkdir(parents=True, exist_ok=True)
        (folder / name).chmod(mode)
    for name in ("state", "spool", "tmp", "sql"):
        (folder / name).mkdir(exist_ok=True)
        (folder / name).chmod(0o755 if name == "spool" else 0o700)  # jobs' scripts run from spool
    (folder / ".practice").touch()
    return folder.resolve()


@contextlib.contextmanager
def _lock(folder: Path) -> Iterator[None]:
    def free() -> bool:
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        return False

    with (folder / ".practice").open("a") as file:
        if not poll(free, LOCK_SECONDS):
            raise CommandError(f"{folder}: another start or stop has been at work there for {LOCK_SECONDS} s")
        yield


def _start(folder: Path, options: Options) -> None:
    for file in (folder / "run").iterdir():
        file.unlink()
    _write_files(folder, options)
    _start_munge(folder)
    _start_database(folder)
    call(folder, ["slurmdbd"], MYSQL_UNIX_PORT=str(folder / "sql" / "my.sock"))
    wait_for_command(folder, "slurmdbd", ["sacctmgr", "-n", "show", "cluster"])
    fresh = not (folder / "state" / ".accounts").exists()
    if fresh:
        _add_accounts(folder)
    _add_users(folder, options.users)
    start_controller(folder)
    for node in NODES:
        start_node(folder, node.name)
    if fresh:
        _set_limits(folder)  # only now: slurmdbd knows gres/gpu from slurmctld's first start on
        (folder / "state" / ".accounts").touch()
    wait_until("the nodes", lambda: _nodes_ready(folder), 120, folder / "log")


def _write_files(folder: Path, options: Options) -> None:
    etc = folder / "etc"
    port = _free_ports(etc / "port")
    (etc / "port").write_text(f"{port}\n")
    (etc / "slurm.conf").write_text(conf.slurm_conf(folder, port, options))
    (etc / "gres.conf").write_text(conf.gres_conf(folder))
    (etc / "hosts").write_text(conf.hosts(socket.gethostname()))
    (etc / "slurmdbd.conf").touch(mode=0o600)
    (etc / "slurmdbd.conf").chmod(0o600)
    (etc / "slurmdbd.conf").write_text(conf.slurmdbd_conf(folder, port))
    for index in range(max(node.gpus for node in NODES)):
        device = folder / "dev" / f"nvidia{index}"
        if not device.is_char_device():
            os.mknod(device, 0o020666, os.makedev(1, 3))  # the null device under another name


def _free_ports(remembered: Path) -> int:
    """The first of 20 free ports: last time's if they still are, else some block from 20000 on."""
    bases = list(range(20000, 32000, 20))
    random.shuffle(bases)  # two starts at once seldom meet
    with contextlib.suppress(OSError, ValueError):
        bases.insert(0, int(remembered.read_text()))
    for base in bases:
        if all(_port_is_free(base + offset) for offset in range(20)):
            return base
    raise CommandError("no block of 20 free ports between 20000 and 32000 on this machine")


def _port_is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("0.0.0.0", port))
        except OSError:
            return False
    return True


def _start_munge(folder: Path) -> None:
    key, run = folder / "etc" / "munge.key", folder / "run"
    if not key.exists():
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(128))
    # --force: else it refuses a folder below one that others cannot enter, or may write to
    command = [
        "munged",
        "--force",
        f"--key-file={key}",
        f"--socket={run}/munge.sock",
        f"--pid-file={run}/munged.pid",
    ]
    call(folder, [*command, f"--log-file={folder}/log/munged.log", f"--seed-file={folder}/state/munged.seed"])


def _start_database(folder: Path) -> None:
    data, sock = (
        folder / "db",
        folder / "sql" / "my.sock",
    )  # the socket's folder is closed: it takes no password
    # No fsync: it survives the death of every process, and a busy disk hardly delays the start.
    small = ["--innodb-log-file-size=8M", "--innodb-flush-method=nosync", "--debug-no-sync"]
    small += ["--innodb-flush-log-at-trx-commit=2"]
    common = ["--no-defaults", "--user=root", *small]
    if not (data / "mysql").is_dir():  # made aside and moved: a start killed in the middle leaves no half one
        fresh = folder / "db.new"
        shutil.rmtree(fresh, ignore_errors=True)
        install = ["mariadb-install-db", *common, f"--datadir={fresh}", "--force", "--skip-test-db"]
        call(folder, [*install, "--auth-root-authentication-method=normal"], timeout=120)
        shutil.rmtree(data, ignore_errors=True)
        fresh.rename(data)
    server = [
        "mariadbd",
        *common,
        f"--datadir={data}",
        f"--socket={sock}",
        f"--pid-file={folder}/run/mariadbd.pid",
        "--skip-networking",
    ]
    server += [f"--tmpdir={folder}/tmp", "--innodb-buffer-pool-size=64M", "--innodb-lock-wait-timeout=900"]
    background(folder, "mariadbd", [*server, "--performance-schema=off", "--skip-log-bin"])
    ping = ["mariadb-admin", "--no-defaults", f"--socket={sock}", "-u", "root", "ping"]
    wait_for_command(folder, "mariadbd", ping)


def _add_accounts(folder: Path) -> None:
    """Each may be there already, from a start that was killed: what counts is what is there afterwards."""
    limited = [part.name for part in PARTITIONS if part.limits]
    manager(folder, "add", "cluster", CLUSTER, check=False)
    manager(folder, "add", "account", ACCOUNT, "Description=practice", "Organization=practice", check=False)
    manager(folder, "add", "qos", ",".join(limited), check=False)
    shown = call(folder, ["sacctmgr", "-nP", "show", "qos", "format=Name"]).stdout.split()
    shown += call(folder, ["sacctmgr", "-nP", "show", "account", "format=Account"]).stdout.split()
    lacking = {ACCOUNT, *limited} - set(shown)
    if lacking:
        raise CommandError(f"sacctmgr could not make {', '.join(sorted(lacking))}; see {folder}/log")


def _add_users(folder: Path, users: tuple[str, ...]) -> None:
    for user in ("root", *users):
        manager(folder, "add", "user", user, f"Account={ACCOUNT}", check=False)  # fails when there already
        manager(folder, "modify", "user", user, "set", f"DefaultAccount={ACCOUNT}", check=False)


def _set_limits(folder: Path) -> None:
    for part in PARTITIONS:
        if part.limits:
            limits = [f"MaxTRESPerUser={part.limits}", f"MaxSubmitJobsPerUser={part.max_jobs}"]
            manager(folder, "modify", "qos", part.name, "set", *limits)


def _nodes_ready(folder: Path) -> bool:
    lines = call(folder, ["sinfo", "-h", "-N", "-o", "%N %T"], check=False).stdout.split("\n")
    states = dict(line.split() for line in lines if line.strip())
    bad = [name for name, word in states.items() if word.startswith(("drain", "down"))]
    if bad:  # a leftover of an earlier life, such as "Duplicate jobid" after a killed controller
        call(folder, ["scontrol", "update", f"NodeName={','.join(bad)}", "State=RESUME"], check=False)
    return len(states) == len(NODES) and all(w in ("idle", "mixed", "allocated") for w in states.values())


def _stop(folder: Path) -> None:
    if daemon(folder, "slurmctld"):
        _cancel_jobs(folder)
    for node in NODES:
        stop_node(folder, node.name)
    for name in reversed(DAEMONS):
        pid = daemon(folder, name)
        if pid:
            end([pid], 20)
    end(everything(folder), 3)  # whatever lost its PID file
    for file in (folder / "run").glob("*"):
        file.unlink(missing_ok=True)


def _cancel_jobs(folder: Path) -> None:
    """Cancel with notice, so that the accounting has an end for each job. The nodes' end does the rest."""
    jobs = call(folder, ["squeue", "-h", "-o", "%A"], check=False).stdout.split()
    if jobs:
        call(folder, ["scancel", "--full", *sorted(set(jobs))], check=False)
        running = ["squeue", "-h", "-t", "R,CG", "-o", "%A"]
        poll(lambda: not call(folder, running, check=False).stdout.strip(), 3)
