"""doctor's checks of SLURM: the controller, your accounts and limits, what a preempted job is sent."""

import re
from pathlib import Path

from nanogpt.common.errors import CommandError
from tools.site import grace, slurm
from tools.site.cluster import Cluster, ask_cluster, user_name
from tools.site.doctor import Finding
from tools.site.limits import Request, refusals
from tools.site.slurm import Job


def controller(root: Path) -> list[Finding]:
    """Whether SLURM is here and answers, and its version."""
    if not slurm.available():
        return [Finding("slurm", "skip", "no SLURM here: launch runs on this machine")]
    answer = slurm.ask(["sinfo", "--version"])
    version = answer.out.strip() or "unknown version"
    ping = slurm.ask(["scontrol", "ping"])
    if ping.rc != 0 or "UP" not in ping.out:
        return [
            Finding(
                "slurm", "fail", f"{version}: the controller does not answer", "try again in some minutes"
            )
        ]
    return [Finding("slurm", "ok", f"{version}, the controller answers")]


def account(root: Path) -> list[Finding]:
    """Your accounts, QOS and the limits that count for you in each partition."""
    if not slurm.available():
        return []
    try:
        cluster = ask_cluster()
    except CommandError as error:
        return [Finding("account", "fail", str(error), "try again in some minutes")]
    found = [Finding("account", "warn", note) for note in cluster.notes]
    if not cluster.notes and not cluster.associations:
        fix = "a new account takes about 15 minutes after the first log-in; then ask the cluster's staff"
        return [Finding("account", "fail", f"SLURM knows no account of {user_name()}", fix)]
    for name in cluster.accounts():
        qos = sorted({q for row in cluster.associations if row.account == name for q in row.qos})
        found.append(Finding("account", "ok", f"{name}; QOS: {', '.join(qos) or 'none named'}"))
    for partition in cluster.partitions.values():
        limits = cluster.qos[partition.qos].per_user if partition.qos in cluster.qos else {}
        if limits and cluster.gpu_types(partition.name):
            text = ", ".join(
                f"{value} {name.removeprefix('gres/')}" for name, value in sorted(limits.items())
            )
            found.append(Finding("limits", "ok", f"{partition.name}: at most {text} at once for you"))
    return found + [finding for job in cluster.my_jobs if (finding := never_starts(cluster, job))]


def never_starts(cluster: Cluster, job: Job) -> Finding | None:
    """A job of the queue that waits for ever: `sbatch` takes what is over a limit, and squeue shows it like others."""
    if job.state != "PENDING" or job.partition not in cluster.partitions:
        return None
    kind = next((name for name in job.gpus if name), None)
    nodes = max(1, job.nodes)
    asked = Request(sum(job.gpus.values()), kind, job.limit_minutes or 1, nodes, max(1, job.cpus // nodes))
    for refusal in refusals(cluster, asked, job.partition):
        return Finding(
            "queue", "warn", f"job {job.key} can never start: {refusal.text}", f"engaging why {job.base}"
        )
    return None


def preemption(root: Path) -> list[Finding]:
    """What SLURM does to a preempted job here: our jobs stand all of it, but --requeue must mean something."""
    if not slurm.available():
        return []
    answer = slurm.ask(["scontrol", "show", "config"])
    config = dict(
        (part.strip() for part in line.split("=", 1)) for line in answer.out.splitlines() if "=" in line
    )
    if not config:
        return []  # the controller does not answer; its own check says so
    modes = {
        row.get("PartitionName", "?"): (row.get("PreemptMode", "OFF"), row.get("GraceTime", "0"))
        for line in slurm.ask(["scontrol", "show", "partition", "-o"]).out.splitlines()
        if (row := slurm.fields(line))
    }
    wait = re.match(r"[0-9]+", config.get("KillWait", ""))
    cost = grace.costliest(root)
    found = []
    for name, (mode, seconds) in modes.items():
        if mode == "CANCEL":
            fix = "launch the name again after a preemption: it goes on from the last checkpoint"
            found.append(
                Finding("preempt", "warn", f"{name}: a preempted job is cancelled, not requeued", fix)
            )
        elif mode == "REQUEUE":
            given = int(seconds) if seconds.isdigit() else 0
            enough, text = grace.judge(cost, given, int(wait[0]) if wait else None)
            text = f"{name}: preempted jobs are requeued; {text}"
            found.append(Finding("preempt", "ok" if enough else "warn", text, "" if enough else grace.FIX))
    if flag := grace.too_long_for_the_time_limit(cost):
        text = f"{cost.run} needs {cost.total_s:.0f} s to save, and is told {grace.LEAD_S} s before its time limit"
        found.append(Finding("preempt", "warn", text, f"sbatch {flag} SCRIPT"))
    if config.get("JobRequeue") == "0":
        found.append(Finding("preempt", "ok", "JobRequeue=0 here: our jobs ask for --requeue themselves"))
    early = "preempt_send_user_signal" in config.get("SlurmctldParameters", "")
    signal = "its --signal" if early else "SIGTERM"
    found.append(Finding("preempt", "ok", f"what a preempted job gets first: {signal}"))
    return found
