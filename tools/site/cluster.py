"""The live cluster, in one round of questions: partitions, nodes, the user's own limits and jobs.

    cluster = ask_cluster()
    cluster.gpu_types(), cluster.partition("mit_normal_gpu"), cluster.my_jobs

Five commands run side by side. What cannot be answered (no accounting, an old version) is left empty and
noted in `cluster.notes`: the tools then say "unknown" instead of inventing a limit.
"""

import getpass
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from nanogpt.common.errors import CommandError, UserError
from nanogpt.common.flags import nearest
from tools.args import parse_minutes
from tools.site import slurm
from tools.site.slurm import Answer, Association, Job, Node, Partition, Qos, SlurmUnreachable

QOS_FIELDS = "Name,MaxTRESPU,MaxTRES,GrpTRES,MaxJobsPU,MaxSubmitPU,MaxWall,Flags"
ASSOC_FIELDS = "Account,Partition,QOS,DefaultQOS,MaxTRES,MaxJobs,MaxSubmit"
SQUEUE_FIELDS = "%i|%F|%T|%r|%P|%b|%D|%C|%l|%M|%S|%N|%q|%a|%k|%j"
COLUMNS = (
    "key", "base", "state", "reason", "partition", "gres", "nodes", "cpus", "limit", "elapsed", "start",
    "node_list", "qos", "account", "comment", "name",
)  # fmt: skip
# Rough order of speed for a GPT: used only to break ties and to print the better type first.
GPU_RANK = ("b200", "h200", "h100", "rtx_pro_6000", "a100", "l40s", "a40", "v100", "l4")


@dataclass
class Cluster:
    """What the cluster said at one moment."""

    partitions: dict[str, Partition] = field(default_factory=dict)
    nodes: list[Node] = field(default_factory=list)
    qos: dict[str, Qos] = field(default_factory=dict)
    associations: list[Association] = field(default_factory=list)
    my_jobs: list[Job] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def partition(self, name: str) -> Partition:
        """The partition, or UserError with the nearest name."""
        if name not in self.partitions:
            known = sorted(self.partitions)
            raise UserError(
                f"--partition={name}: no such partition{nearest(name, known)} (there are: {', '.join(known)})"
            )
        return self.partitions[name]

    def nodes_of(self, partition: str) -> list[Node]:
        """The nodes of a partition, down ones as well."""
        return [node for node in self.nodes if partition in node.partitions]

    def gpu_types(self, partition: str | None = None) -> list[str]:
        """The types of GPU, the fastest first."""
        nodes = self.nodes_of(partition) if partition else self.nodes
        found = {kind for node in nodes for kind, count in node.gpus.items() if kind and count}
        return sorted(found, key=lambda kind: (gpu_rank(kind), kind))

    def accounts(self) -> list[str]:
        """The accounts that the user may charge."""
        return sorted({row.account for row in self.associations if row.account})

    def used(self, partition: str | None = None, qos: str | None = None) -> dict[str, int]:
        """GPUs (by `gres/gpu` and `gres/gpu:TYPE`), cores and jobs that the user's running jobs hold."""
        total: dict[str, int] = {"jobs": 0, "cpu": 0, "gres/gpu": 0}
        for job in self.my_jobs:
            if job.state not in ("RUNNING", "COMPLETING", "CONFIGURING", "SUSPENDED"):
                continue
            if (partition and job.partition != partition) or (qos and job.qos != qos):
                continue
            total["jobs"] += 1
            total["cpu"] += job.cpus
            for kind, count in job.gpus.items():
                total["gres/gpu"] += count * job.nodes
                if kind:
                    name = f"gres/gpu:{kind}"
                    total[name] = total.get(name, 0) + count * job.nodes
        return total


def gpu_rank(kind: str) -> int:
    """The place of a GPU type in GPU_RANK; unknown types come last."""
    return next((i for i, known in enumerate(GPU_RANK) if kind.startswith(known)), len(GPU_RANK))


def user_name() -> str:
    """The user's name as SLURM knows it."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return str(os.getuid())


def ask_cluster() -> Cluster:
    """Ask SLURM everything once (about the time of its slowest answer).

    Raises SlurmUnreachable when the controller does not answer.
    """
    user = user_name()
    questions = {
        "partitions": ["scontrol", "show", "partition", "-o"],
        "nodes": ["scontrol", "show", "node", "-o"],
        "jobs": ["squeue", "-h", "--me", "-o", SQUEUE_FIELDS],
        "qos": ["sacctmgr", "--parsable2", "show", "qos", f"format={QOS_FIELDS}"],
        "associations": [
            "sacctmgr", "--parsable2", "show", "assoc", "where", f"user={user}", f"format={ASSOC_FIELDS}",
        ],
    }  # fmt: skip
    with ThreadPoolExecutor(len(questions)) as pool:
        answers = dict(zip(questions, pool.map(slurm.ask, questions.values()), strict=True))
    if answers["partitions"].rc != 0:
        raise no_answer(answers["partitions"])
    cluster = Cluster()
    read_partitions(answers["partitions"].out, cluster)
    cluster.nodes = read_nodes(answers["nodes"].out)
    cluster.my_jobs = read_jobs(answers["jobs"].out)
    _read_limits(answers, cluster)
    return cluster


def no_answer(answer: Answer) -> CommandError:
    """Why nothing can be known: commands without a cluster, which no waiting helps, or a controller that is away."""
    if "configuration source" in answer.err:
        return UserError(
            "SLURM's commands are installed here, but no cluster is configured (no slurm.conf, no SLURM_CONF); log in "
            "to a cluster's login node, or: engaging practice up, or run it here: engaging launch --local, "
            "engaging experiment run --executor local"
        )
    return SlurmUnreachable(
        f"the SLURM controller does not answer ({slurm.refusal(answer)}); try again in a minute: "
        "running jobs are not affected"
    )


def my_jobs(ids: list[str] | None = None) -> list[Job]:
    """The user's jobs in the queue (one squeue). Raises SlurmUnreachable."""
    which = ["--jobs=" + ",".join(ids)] if ids else ["--me"]
    answer = slurm.ask(["squeue", "-h", *which, "-o", SQUEUE_FIELDS])
    if answer.rc != 0 and "invalid job id" in answer.err.lower():
        return []
    if answer.rc != 0:
        raise SlurmUnreachable(f"squeue: {slurm.refusal(answer)}; try again in a minute")
    return read_jobs(answer.out)


def _read_limits(answers: dict[str, Answer], cluster: Cluster) -> None:
    if answers["qos"].rc or answers["associations"].rc:
        cluster.notes.append("no accounting here: the limits of your account are unknown, SLURM will say")
    cluster.qos = {row.name: row for row in read_qos(answers["qos"].out)}
    cluster.associations = read_associations(answers["associations"].out)


def read_partitions(text: str, cluster: Cluster) -> None:
    """`scontrol show partition -o` into `cluster.partitions`."""
    for line in text.splitlines():
        row = slurm.fields(line)
        name = row.get("PartitionName")
        if not name:
            continue
        cluster.partitions[name] = Partition(
            name,
            up=row.get("State", "UP") == "UP",
            default=row.get("Default") == "YES",
            max_minutes=parse_minutes(row.get("MaxTime", "")),
            default_minutes=parse_minutes(row.get("DefaultTime", "")),
            max_nodes=slurm._int(row.get("MaxNodes")),
            qos=None if row.get("QoS", "N/A") in ("N/A", "") else row["QoS"],
            preempt_mode=row.get("PreemptMode", "OFF").upper(),
            grace_s=slurm._int(row.get("GraceTime")) or 0,
            tier=slurm._int(row.get("PriorityTier")) or 1,
            allow_accounts=_names(row.get("AllowAccounts")),
            deny_accounts=_names(row.get("DenyAccounts")),
            allow_qos=_names(row.get("AllowQos")),
            allow_groups=_names(row.get("AllowGroups")),
        )


def read_nodes(text: str) -> list[Node]:
    """`scontrol show node -o`, one node a line."""
    nodes = []
    for line in text.splitlines():
        row = slurm.fields(line)
        if not row.get("NodeName"):
            continue
        used = {
            name.removeprefix("gres/gpu").removeprefix(":"): count
            for name, count in slurm.tres(row.get("AllocTRES")).items()
            if name.startswith("gres/gpu")
        }
        nodes.append(
            Node(
                row["NodeName"],
                row.get("State", "UNKNOWN").upper(),
                _names(row.get("Partitions")),
                cpus=slurm._int(row.get("CPUEfctv") or row.get("CPUTot")) or 0,
                cpus_used=slurm._int(row.get("CPUAlloc")) or 0,
                memory_mb=slurm._int(row.get("RealMemory")) or 0,
                memory_used_mb=slurm._int(row.get("AllocMem")) or 0,
                gpus=slurm.gpus(row.get("Gres")),
                gpus_used=used,
            )
        )
    return nodes


def read_jobs(text: str) -> list[Job]:
    """Lines of `squeue -o SQUEUE_FIELDS`. The name stands last: it may hold the separator."""
    jobs = []
    for line in text.splitlines():
        parts = line.split("|", len(COLUMNS) - 1)
        if len(parts) != len(COLUMNS):
            continue
        row = dict(zip(COLUMNS, (part.strip() for part in parts), strict=True))
        if not row["base"].isdigit():
            continue
        jobs.append(
            Job(
                row["key"], row["base"], slurm.state_of(row["state"]), row["reason"], row["partition"],
                row["name"], slurm.gpus(row["gres"]), nodes=slurm._int(row["nodes"]) or 1,
                limit_minutes=parse_minutes(row["limit"]), elapsed=row["elapsed"], start=row["start"],
                node_list=row["node_list"], qos=row["qos"], account=row["account"], comment=row["comment"],
                cpus=slurm._int(row["cpus"]) or 0,
            )
        )  # fmt: skip
    return jobs


def read_qos(text: str) -> list[Qos]:
    """`sacctmgr --parsable2 show qos`, by the names in its header."""
    return [
        Qos(
            row["Name"],
            per_user=slurm.tres(row.get("MaxTRESPU")),
            per_job=slurm.tres(row.get("MaxTRES")),
            group=slurm.tres(row.get("GrpTRES")),
            max_jobs=slurm._int(row.get("MaxJobsPU")),
            max_submit=slurm._int(row.get("MaxSubmitPU")),
            max_minutes=parse_minutes(row.get("MaxWall", "")),
            flags=_names(row.get("Flags")),
        )
        for row in slurm.table(text)
        if row.get("Name")
    ]


def read_associations(text: str) -> list[Association]:
    """`sacctmgr --parsable2 show assoc`, by the names in its header."""
    return [
        Association(
            row["Account"],
            qos=_names(row.get("QOS")),
            partition=row.get("Partition", ""),
            default_qos=row.get("Def QOS", row.get("DefaultQOS", "")),
            per_job=slurm.tres(row.get("MaxTRES")),
            max_jobs=slurm._int(row.get("MaxJobs")),
            max_submit=slurm._int(row.get("MaxSubmit")),
        )
        for row in slurm.table(text)
        if row.get("Account")
    ]


def _names(text: str | None) -> tuple[str, ...]:
    if not text or text.upper() in ("ALL", "N/A", "(NULL)", "NONE"):
        return ()
    return tuple(part for part in text.split(",") if part)
