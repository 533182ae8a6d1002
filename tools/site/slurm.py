"""SLURM's commands and their answers, read by field name and never by line position.

Every function takes text that another program wrote: lines it cannot read are skipped, unknown states stay
as they are, and an absent accounting database means "unknown", not an error. The tests feed recorded
answers and noise.
"""

import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from nanogpt.common.errors import CommandError, UserError

TIMEOUT_S = 20.0
ACTIVE = {
    "PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "SUSPENDED", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED",
    "RESIZING", "RESV_DEL_HOLD", "SIGNALING", "SPECIAL_EXIT", "STAGE_OUT", "STOPPED",
}  # fmt: skip
ENDED = {
    "BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "LAUNCH_FAILED", "NODE_FAIL",
    "OUT_OF_MEMORY",
    "PREEMPTED", "RECONFIG_FAIL", "REVOKED", "TIMEOUT",
}  # fmt: skip
JOB_ID = re.compile(r"[1-9][0-9]{0,9}(_[0-9]{1,7})?")
UNREACHABLE = (
    "unable to contact slurm controller", "socket timed out", "connection refused", "connection timed out",
    "communication connection failure", "zero bytes were transmitted",
    "could not establish a configuration source",
    "unexpected message received", "slurm backup controller in standby", "transport endpoint",
    "resource temporarily",
)  # fmt: skip


class SlurmUnreachable(CommandError):
    """The controller did not answer. What was asked may or may not have been done."""

    exit_code = 75


@dataclass(frozen=True)
class Answer:
    """One command's end: exit status and texts. `rc` is -1 when it did not end in time, and below 0 when a signal ended
    it: of a busy controller that hangs up, commands die by SIGPIPE."""

    rc: int
    out: str
    err: str

    @property
    def unreachable(self) -> bool:
        """Whether the controller did not answer, so that nothing is known about what was asked."""
        text = (self.err + self.out).lower()
        return self.rc < 0 or (self.rc != 0 and any(word in text for word in UNREACHABLE))


@dataclass(frozen=True)
class Partition:
    """One partition. Minutes; None means without limit."""

    name: str
    up: bool = True
    default: bool = False
    max_minutes: int | None = None
    default_minutes: int | None = None
    max_nodes: int | None = None
    qos: str | None = None
    preempt_mode: str = "OFF"
    grace_s: int = 0
    tier: int = 1
    allow_accounts: tuple[str, ...] = ()  # empty: all
    deny_accounts: tuple[str, ...] = ()
    allow_qos: tuple[str, ...] = ()
    allow_groups: tuple[str, ...] = ()

    @property
    def preemptable(self) -> bool:
        """Whether jobs here are stopped for others."""
        return self.preempt_mode not in ("OFF", "GANG", "")


@dataclass(frozen=True)
class Node:
    """One node: its GPUs by type, in all and in use."""

    name: str
    state: str
    partitions: tuple[str, ...]
    cpus: int
    cpus_used: int
    memory_mb: int
    memory_used_mb: int
    gpus: dict[str, int]
    gpus_used: dict[str, int]

    @property
    def usable(self) -> bool:
        """Whether new jobs start here (now or later)."""
        return not any(
            word in self.state for word in ("DOWN", "DRAIN", "FAIL", "MAINT", "INVAL", "NOT_RESPONDING")
        )

    def free_gpus(self, kind: str) -> int:
        """GPUs of a type that nobody holds.

        Counts without a type (old versions) are taken off the first type.
        """
        used = self.gpus_used.get(kind)
        if used is None:
            used = self.gpus_used.get("", 0) if len(self.gpus) == 1 else 0
        return max(0, self.gpus.get(kind, 0) - used) if self.usable else 0


@dataclass(frozen=True)
class Qos:
    """The limits of one QOS: TRES by name (`cpu`, `gres/gpu`, `gres/gpu:h200`, `mem` in MB)."""

    name: str
    per_user: dict[str, int] = field(default_factory=dict)
    per_job: dict[str, int] = field(default_factory=dict)
    group: dict[str, int] = field(default_factory=dict)
    max_jobs: int | None = None
    max_submit: int | None = None
    max_minutes: int | None = None
    flags: tuple[str, ...] = ()


@dataclass(frozen=True)
class Association:
    """A user's right to charge an account: its QOS list and own limits."""

    account: str
    qos: tuple[str, ...]
    partition: str = ""
    default_qos: str = ""
    per_job: dict[str, int] = field(default_factory=dict)
    max_jobs: int | None = None
    max_submit: int | None = None


@dataclass(frozen=True)
class Job:
    """One row of squeue.

    `key` is what scancel and scontrol take: `12` or `12_3` (`12_[2-9]` while an array waits).
    """

    key: str
    base: str
    state: str
    reason: str
    partition: str
    name: str
    gpus: dict[str, int]
    nodes: int = 1
    limit_minutes: int | None = None
    elapsed: str = ""
    start: str = ""
    node_list: str = ""
    qos: str = ""
    account: str = ""
    comment: str = ""
    cpus: int = 0

    @property
    def tasks(self) -> int:
        """How many jobs the row stands for: an array that waits is one row."""
        return count_tasks(self.key)


def available() -> bool:
    """Whether SLURM's commands are here."""
    return shutil.which("sbatch") is not None and shutil.which("squeue") is not None


def sign_of_cluster() -> str:
    """What says that this machine belongs to a cluster whose sbatch is not on PATH; "" for nothing."""
    if os.environ.get("SLURM_CONF"):
        return "SLURM_CONF is set"
    found = next((name for name in ("srun", "squeue", "sinfo", "scontrol") if shutil.which(name)), "")
    if found:
        return f"{found} is there"
    return "there is /etc/slurm/slurm.conf" if Path("/etc/slurm/slurm.conf").is_file() else ""


def cluster_here() -> bool:
    """Whether there is a cluster to submit to: SLURM's commands, and a configuration for them.

    A controller that does not answer is one; commands that somebody installed on a workstation are none.
    """
    if not available() or os.environ.get("SLURM_CONF"):
        return available()
    return "configuration source" not in ask(["sinfo", "-h", "-o", "%P"]).err


def need_slurm(what: str) -> None:
    """UserError unless SLURM's commands are here."""
    if not available():
        raise UserError(
            f"{what}: no SLURM here (no sbatch on PATH); log in to the cluster, or run it here: "
            "engaging launch --local, engaging experiment run --executor local"
        )


def ask(
    command: Sequence[str],
    *,
    timeout: float = TIMEOUT_S,
    env: dict[str, str] | None = None,
    cwd: os.PathLike | str | None = None,
    script: str | None = None,
) -> Answer:
    """Run one SLURM command (no shell, English) and return its answer; never raises for its failure.

    `script` is given to it on stdin.
    """
    stdin = {"stdin": subprocess.DEVNULL} if script is None else {"input": script.encode()}
    full = dict(os.environ if env is None else env)
    full.update(LC_ALL="C", SLURM_TIME_FORMAT="standard")
    try:
        done = subprocess.run(list(command), env=full, cwd=cwd, capture_output=True, timeout=timeout, **stdin)
    except subprocess.TimeoutExpired:
        return Answer(-1, "", f"{command[0]}: no answer within {timeout:.0f} s")
    except OSError as error:
        return Answer(127, "", f"{command[0]}: {error.strerror}")
    return Answer(
        done.returncode, done.stdout.decode("utf-8", "replace"), done.stderr.decode("utf-8", "replace")
    )


def nodes_to_report() -> list[str]:
    """Nodes that count as up, yet have not reported since the controller started."""
    rows = map(fields, ask(["scontrol", "show", "node", "-o"]).out.splitlines())
    gone = ("DOWN", "DRAIN", "FAIL", "POWER", "FUTURE", "PLANNED")
    return [
        row["NodeName"]
        for row in rows
        if "NodeName" in row
        and row.get("SlurmdStartTime") in ("None", "Unknown")
        and not any(word in row.get("State", "").upper() for word in gone)
    ]


def fields(line: str) -> dict[str, str]:
    """`Key=Value Key=Value` of `scontrol ... -o`. Values may hold spaces; the first of a repeated key wins,
    so that a comment which says `JobState=RUNNING` changes nothing that stands before it."""
    found: dict[str, str] = {}
    for part in re.split(r"\s+(?=[A-Za-z][A-Za-z0-9_:/.()*-]*=)", line.strip()):
        key, equals, value = part.partition("=")
        if equals and key not in found:
            found[key] = value.strip()
    return found


def table(text: str) -> list[dict[str, str]]:
    """Rows of `--parsable2` output with a header line. The last column may hold the separator."""
    lines = [line for line in text.splitlines() if "|" in line]
    if not lines:
        return []
    names = lines[0].split("|")
    return [dict(zip(names, line.split("|", len(names) - 1), strict=False)) for line in lines[1:]]


def tres(text: str | None) -> dict[str, int]:
    """`cpu=4,mem=8G,gres/gpu:h200=2` as numbers (memory in MB). What is no number is left out."""
    found = {}
    for part in (text or "").split(","):
        name, equals, value = part.strip().rpartition("=")
        number = memory_mb(value) if name == "mem" else _int(value)
        if equals and number is not None:
            found[name] = number
    return found


def gpus(text: str | None) -> dict[str, int]:
    """GPUs by type from a gres text: `gpu:h200:8(S:0-1),gpu:l40s:4`, `gres/gpu:h100:2`, `gres:gpu:2`, `gpu`.

    The type is "" where none is named.
    """
    found: dict[str, int] = {}
    for part in re.sub(r"\([^)]*\)", "", text or "").split(","):
        part = part.strip().removeprefix("gres/").removeprefix("gres:")
        match = re.fullmatch(r"gpu(?::([A-Za-z][A-Za-z0-9_.-]*))?(?:[:=]([0-9]{1,6}))?", part)
        if match:
            kind = (match[1] or "").lower()
            found[kind] = found.get(kind, 0) + int(match[2] or 1)
    return found


def largest_array() -> int | None:
    """Tasks that one array may have (MaxArraySize is the first index refused); None where SLURM does not say."""
    found = re.search(
        r"^MaxArraySize\s*=\s*([0-9]{1,8})\s*$", ask(["scontrol", "show", "config"]).out, re.MULTILINE
    )
    return max(1, int(found[1]) - 1) if found else None


def memory_mb(text: str) -> int | None:
    """`386000`, `8G`, `1.5T`, `512M` in MB."""
    match = re.fullmatch(r"([0-9]{1,12}(?:\.[0-9]+)?)([KMGTP]?)(?:B|n|c)?", text.strip())
    if not match:
        return None
    factor = {"": 1, "K": 1 / 1024, "M": 1, "G": 1024, "T": 1024**2, "P": 1024**3}[match[2]]
    return int(float(match[1]) * factor)


def amount(megabytes: int) -> str:
    """A number of MB as `--mem` takes it: 64G where that is the same, else 386000M."""
    return f"{megabytes // 1024}G" if megabytes % 1024 == 0 else f"{megabytes}M"


def count_tasks(key: str) -> int:
    """`12_[0-3,7%2]` -> 5; anything else is one job."""
    match = re.search(r"\[([0-9,\-:]+)(%[0-9]+)?\]", key)
    total = 0
    for part in match[1].split(",") if match else []:
        low, _, high = part.partition(":")[0].partition("-")
        step = _int(part.partition(":")[2]) or 1
        if low.isdigit():
            total += max(1, ((_int(high) or int(low)) - int(low)) // step + 1)
    return total or 1


def state_of(text: str) -> str:
    """`CANCELLED by 1000` -> CANCELLED, `COMPLETED+` -> COMPLETED; unknown words stay (upper case)."""
    return re.split(r"[\s+]", text.strip().upper() or "UNKNOWN")[0] or "UNKNOWN"


def refusal(answer: Answer) -> str:
    """The reason in sbatch's own words, without the prefixes."""
    for line in reversed((answer.err or answer.out).splitlines()):
        text = re.sub(r"^(sbatch|srun|scontrol|allocation failure|error|fatal)\s*:\s*", "", line.strip())
        text = re.sub(r"^(error|fatal|Batch job submission failed|allocation failure)\s*:\s*", "", text)
        text = re.sub(r"^(error|Batch job submission failed)\s*:\s*", "", text)
        if text:
            return text
    return f"exit status {answer.rc}"


def _int(text: str | None) -> int | None:
    text = (text or "").strip()
    return int(text) if re.fullmatch(r"[0-9]{1,18}", text) else None
