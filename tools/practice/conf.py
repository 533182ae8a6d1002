"""The texts of slurm.conf, gres.conf, slurmdbd.conf and hosts. Each odd line says why it is there."""

from dataclasses import dataclass
from pathlib import Path

from tools.practice.shape import CLUSTER, NODES, PARTITIONS, Partition


@dataclass(frozen=True)
class Options:
    """Times in seconds, `extra` slurm.conf lines `Key=Value` that replace ours, `users` besides root."""

    kill_wait: int = 5  # between SIGTERM and SIGKILL; SLURM's own default is 30
    requeue_delay: int = 5  # before a requeued job starts again; at least 5, SLURM's own default is 120
    node_timeout: int = 30  # silence after which a node counts as lost; SLURM's own default is 300
    grace: int = 5  # between the warning of a preemption and its end
    extra: tuple[str, ...] = ()
    users: tuple[str, ...] = ()


def slurm_conf(folder: Path, port: int, options: Options) -> str:
    """slurm.conf for the cluster in `folder`, its daemons on the 20 ports from `port`."""
    run = folder / "run"
    lines = [
        f"ClusterName={CLUSTER}",
        "SlurmctldHost=localhost(127.0.0.1)",
        "SlurmUser=root",
        "SlurmdUser=root",
        "AuthType=auth/munge",
        # cred_expire is also what a requeued job waits before it may start again.
        f"AuthInfo=socket={run}/munge.sock,cred_expire={max(5, options.requeue_delay)}",
        f"SlurmctldPort={port}",
        f"StateSaveLocation={folder}/state",
        f"SlurmdSpoolDir={folder}/spool/%n",
        f"SlurmctldPidFile={run}/slurmctld.pid",
        f"SlurmdPidFile={run}/slurmd-%n.pid",
        f"SlurmctldLogFile={folder}/log/slurmctld.log",
        f"SlurmdLogFile={folder}/log/slurmd-%n.log",
        "SlurmctldDebug=info",
        "SlurmdDebug=info",
        "MailProg=/bin/true",
        "MpiDefault=none",
        "ProctrackType=proctrack/linuxproc",
        "TaskPlugin=task/none",
        "JobAcctGatherType=jobacct_gather/linux",
        "JobAcctGatherFrequency=5",
        "PrologFlags=Contain",
        "SlurmdParameters=config_overrides",  # 120 CPUs and 2 TB on whatever this machine is
        "ReturnToService=2",
        "SlurmctldTimeout=30",
        f"SlurmdTimeout={options.node_timeout}",
        f"KillWait={options.kill_wait}",
        "MinJobAge=3600",  # finished jobs stay visible to `scontrol show job`
        "JobRequeue=1",
        "JobFileAppend=0",
        "EnforcePartLimits=ALL",  # refuse at submission what can never run
        "SelectType=select/cons_tres",
        "SelectTypeParameters=CR_Core_Memory",
        "DefMemPerCPU=2000",
        "GresTypes=gpu",
        "SchedulerType=sched/backfill",
        "SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0,sched_min_interval=0",
        "PriorityType=priority/basic",
        "PreemptType=preempt/partition_prio",
        "PreemptMode=REQUEUE",
        "AccountingStorageType=accounting_storage/slurmdbd",
        "AccountingStorageHost=127.0.0.1",
        # Without it connections to slurmdbd use the system's munge socket, whatever AuthInfo says.
        f"AccountingStoragePass={run}/munge.sock",
        f"AccountingStoragePort={port + 1}",
        "AccountingStorageTRES=" + ",".join(["gres/gpu", *(f"gres/gpu:{kind}" for kind in gpu_types())]),
        "AccountingStorageEnforce=associations,limits,qos",
    ]
    replaced = {line.split("=", 1)[0].lower() for line in options.extra}
    lines = [line for line in lines if line.split("=", 1)[0].lower() not in replaced]
    lines += list(options.extra)
    lines += [_node_line(index, port) for index in range(len(NODES))]
    lines.append("PartitionName=DEFAULT State=UP PreemptMode=OFF DefaultTime=01:00:00")
    lines += [_partition_line(part, options.grace) for part in PARTITIONS]
    return "\n".join(lines) + "\n"


def gpu_types() -> list[str]:
    """The GPU types of the cluster, each once."""
    return sorted({node.gpu_type for node in NODES if node.gpu_type})


def node_address(index: int) -> str:
    """The loopback address of the node with that index."""
    return f"127.0.1.{index + 1}"


def gres_conf(folder: Path) -> str:
    """gres.conf: the device files must be character devices, or slurmd sets no CUDA_VISIBLE_DEVICES."""
    lines = ["AutoDetect=off"]
    for node in NODES:
        if node.gpus:
            files = f"{folder}/dev/nvidia[0-{node.gpus - 1}]"
            lines.append(f"NodeName={node.name} Name=gpu Type={node.gpu_type} File={files}")
    return "\n".join(lines) + "\n"


def slurmdbd_conf(folder: Path, port: int) -> str:
    """slurmdbd.conf, of mode 600 or slurmdbd refuses it. MYSQL_UNIX_PORT names the database's socket."""
    return f"""AuthType=auth/munge
AuthInfo=socket={folder}/run/munge.sock
DbdHost=localhost
DbdAddr=127.0.0.1
DbdPort={port + 1}
SlurmUser=root
PidFile={folder}/run/slurmdbd.pid
LogFile={folder}/log/slurmdbd.log
DebugLevel=info
StorageType=accounting_storage/mysql
StorageHost=localhost
StorageUser=root
StorageLoc=slurm_acct_db
"""


def hosts(own_name: str) -> str:
    """/etc/hosts as the nodes see it."""
    lines = [f"127.0.0.1 localhost {own_name}"]
    lines += [f"{node_address(index)} {node.name}" for index, node in enumerate(NODES)]
    return "\n".join(lines) + "\n"


def _node_line(index: int, port: int) -> str:
    node = NODES[index]
    gres = f" Gres=gpu:{node.gpu_type}:{node.gpus}" if node.gpus else ""
    return (
        f"NodeName={node.name} NodeHostname={node.name} NodeAddr={node_address(index)}"
        f" Port={port + 2 + index}"
        f" CPUs={node.cpus} Sockets=2 CoresPerSocket={node.cpus // 2} ThreadsPerCore=1"
        f" RealMemory={node.memory_mb} State=UNKNOWN Weight={node.weight}{gres}"
    )


def _partition_line(part: Partition, grace: int) -> str:
    line = f"PartitionName={part.name} Nodes={part.nodes} MaxTime={part.max_time} PriorityTier={part.tier}"
    if part.max_time < "01:00:00":
        line += f" DefaultTime={part.max_time}"
    if part.preemptable:
        line += f" PreemptMode=REQUEUE GraceTime={grace}"
    if part.default:
        line += " Default=YES"
    if part.limits:
        line += f" QOS={part.name}"
    return line
