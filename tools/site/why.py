"""`engaging why JOBID`: why a job waits (or ended), whose limit it is, and the exact flag that would change
it.

SLURM's reason is one word. Here it is joined with what was asked, the user's own limits and what the user
already holds: "the cluster is busy" and "your own quota" look alike in squeue.
"""

import contextlib
import os
import re
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from nanogpt.common.errors import UserError
from tools.args import Parser, clock, counted, folded, parse_minutes, words
from tools.site import slurm
from tools.site.cluster import Cluster, ask_cluster
from tools.site.limits import Request, effective_qos, gpu_cap, largest_node, refusals
from tools.site.reasons import ENDS, EXITS, REASONS
from tools.site.slurm import SlurmUnreachable

# No trainer ends with these; a shell adds 128 to them, and sacct takes it off again.
BY_SIGNAL = ("6", "9", "11", "15")
BEFORE_WINDOW_MIN, SHORTEST_MIN = 5, 10  # room before a reservation; less than that is no job


@dataclass(frozen=True)
class Explanation:
    """One job's state explained: `whose` limit, `text` in words, `remedy` the exact flag or command."""

    job: str
    state: str
    reason: str
    whose: str
    text: str
    remedy: str

    def lines(self) -> list[str]:
        """What is printed."""
        head = f"job {self.job}: {self.state}" + (
            f" ({self.reason})" if self.reason not in ("", "None") else ""
        )
        return [
            head,
            f"  {self.whose}: {self.text}" if self.whose else f"  {self.text}",
            f"  -> {self.remedy}",
        ]


def explain(row: dict[str, str], cluster: Cluster) -> Explanation:
    """A job of `scontrol show job -o`, explained with the cluster's limits.

    Unknown reasons are named as they are.
    """
    job = row.get("ArrayJobId", row.get("JobId", "?"))
    state, reason = slurm.state_of(row.get("JobState", "")), row.get("Reason", "None").split(",")[0]
    log = row.get("StdOut", "logs/")
    if state in ENDS:
        text, remedy = ENDS[state]
        exit_code = row.get("ExitCode", "")
        if state == "FAILED" and exit_code == "0:53":
            text, remedy = (
                "its log could not be opened, so it never ran",
                f"mkdir -p {Path(log).parent}",
            )
        elif state == "FAILED":
            text, remedy = _failed(exit_code, text, remedy)
        remedy = remedy.format(id=job, log=log, more_memory=_more_memory(row))
        return Explanation(job, state, reason, "", text, remedy)
    if state != "PENDING":
        return Explanation(job, state, reason, "", _running(row), f"engaging watch {job}")
    whose, text, remedy = _pending(reason)
    request = request_of(row)
    if reason == "Dependency" and (others := re.findall(r":([0-9]+)", row.get("Dependency", ""))):
        text = f"it waits for {'job' if len(others) == 1 else 'jobs'} {', '.join(others)} to end"
    values = {"id": job, "log": log, "more": "N"}
    if "{gpus}" in remedy or "{cpus}" in remedy or "{memory}" in remedy:
        text, remedy = _quota(row, request, cluster, text, remedy)
    elif "{time}" in remedy:
        remedy = _time_flag(row, request, cluster)
    elif "{group}" in remedy:
        text, remedy = _group(request, row, cluster, text)
    elif "{window}" in remedy:
        text, remedy = _before_the_window(row, cluster, text)
    elif "{fits}" in remedy:
        remedy = _fits(row, request, cluster)
    if "ArrayTaskThrottle" in row:
        values["more"] = str((slurm._int(row["ArrayTaskThrottle"]) or 1) * 2)
    remedy = remedy.format(**values)
    owner, _, uid = row.get("UserId", "").rstrip(")").partition("(")
    if uid.isdigit() and int(uid) != os.getuid():
        whose = whose.replace("your own", f"{owner}'s own")
        remedy = f"nothing for you to do: the job is {owner}'s (it could be: {remedy})"
    return Explanation(job, state, reason, whose, text, remedy)


def request_of(row: dict[str, str]) -> Request:
    """What a job of `scontrol show job` asks for."""
    nodes = int((re.match(r"[0-9]+", row.get("NumNodes", "1")) or ["1"])[0])
    found = slurm.gpus(row.get("TresPerNode")) or slurm.gpus(row.get("TresPerJob"))
    asked = slurm.tres(row.get("ReqTRES") or row.get("TRES"))
    kind = next((name for name in found if name), None)
    gpus = asked.get("gres/gpu", 0) // max(nodes, 1) or sum(found.values())
    cpus = (slurm._int(row.get("NumCPUs", "").split("-")[0]) or asked.get("cpu", 1)) // max(nodes, 1)
    # Until a job starts, NumCPUs counts no cores that it wants by the GPU, and the limits do.
    cpus = max(1, cpus, gpus * _cpus_per_gpu(row))
    minutes = parse_minutes(row.get("TimeLimit", "")) or 60
    return Request(gpus, kind, minutes, nodes, cpus, asked.get("mem"),
                   _known(row.get("Account")), _known(row.get("QOS")))  # fmt: skip


def _cpus_per_gpu(row: dict[str, str]) -> int:
    return slurm.gpus(row.get("CpusPerTres")).get("", 0)


def main(argv: list[str]) -> int:
    """The command."""
    parser = Parser(
        "why", "Why a job waits or ended: in words, whose limit it is, and the flag that would change it."
    )
    parser.add_argument("job", metavar="JOBID", help="a job id (12, 12_3) or the name of a launch")
    args = parser.read(argv)
    slurm.need_slurm("engaging why")
    job = _job_id(args.job)
    answer = slurm.ask(["scontrol", "show", "job", "-o", job])
    if answer.unreachable:
        raise SlurmUnreachable(f"scontrol: {slurm.refusal(answer)}; try again in a minute")
    rows = [slurm.fields(line) for line in answer.out.splitlines() if "JobId=" in line]
    if not rows:
        rows = _from_accounting(job)
    if not rows:
        raise UserError(f"job {job}: SLURM knows no such job; squeue --me lists yours, sacct the ended ones")
    cluster = ask_cluster()
    pending = [row for row in rows if row.get("JobState") == "PENDING"]
    for line in explain((pending or rows)[0], cluster).lines():
        print(line if line.startswith("  -> ") else folded(line, 4))
    if pending:
        _start_estimate(job)
    return 0


def _pending(reason: str) -> tuple[str, str, str]:
    lowered = reason.strip("()").lower()
    for prefix, whose, text, remedy in REASONS:
        if lowered.startswith(prefix):
            return whose, text, remedy
    return (
        "",
        f"SLURM says {reason!r}, which these tools do not know",
        "ask the cluster's staff what it means",
    )


def _quota(
    row: dict[str, str], request: Request, cluster: Cluster, text: str, remedy: str
) -> tuple[str, str]:
    """The figures of a per-user limit: asked, allowed, held now; and the flag that fits under it."""
    names = [name for name in row.get("Partition", "").split(",") if name in cluster.partitions]
    if not names:
        return text, "engaging plan shows your limits"
    # It may start in any of several partitions: that with the most room counts.
    caps = {name: gpu_cap(cluster, cluster.partitions[name], request)[0] for name in names}
    name = max(names, key=lambda name: caps[name] if caps[name] is not None else 10**6)
    partition = cluster.partitions[name]
    held = cluster.used(partition=name)
    cap, qos = gpu_cap(cluster, partition, request)
    if "{gpus}" not in remedy and cap is not None and request.all_gpus > cap:
        text, remedy = "the GPUs one user may hold", "{gpus}"  # SLURM names one limit; this one never passes
    if "{gpus}" in remedy:
        per_job = row.get("Reason", "").lower().endswith("perjob")
        if per_job:
            cap, qos = gpu_cap(cluster, partition, request, per_job)
        if cap is None:
            return text, "ask for fewer GPUs (engaging plan shows your limits)"
        text += f": it asks for {request.all_gpus}, {qos!r} allows {cap}"
        text += "" if per_job else f", you hold {held['gres/gpu']} there now"
        return text, _fewer_gpus(row, request, cluster, name, cap)
    key = "cpu" if "{cpus}" in remedy else "mem"
    for limits in effective_qos(cluster, partition, request):
        limit = limits.per_user.get(key) or limits.per_job.get(key)
        if not limit:
            continue
        asked = request.cpus * request.nodes if key == "cpu" else (request.memory_mb or 0)
        text += f": it asks for {asked} {'cores' if key == 'cpu' else 'MB'}, {limits.name!r} allows {limit}"
        text += f", you hold {held['cpu']} there now" if key == "cpu" else ""
        if asked <= limit:
            return text, "wait until your other jobs end, or cancel one"
        flag = f"--cpus {limit // request.nodes}" if key == "cpu" else f"--mem {limit // request.nodes}M"
        if key == "cpu" and _cpus_per_gpu(row):
            flag = f"--cpus-per-gpu={max(1, limit // request.all_gpus)}"
        return text, f"{flag} when you launch it"
    return text, "ask for less (engaging plan shows your limits)"


def _fewer_gpus(row: dict[str, str], request: Request, cluster: Cluster, name: str, cap: int) -> str:
    """What to type when a job asks for more GPUs than `cap`; patience when it does not."""
    if request.all_gpus <= cap:
        return "wait until your other jobs end, or cancel one"
    job, kind = row.get("JobId", ""), f"{request.gpu_type}:" if request.gpu_type else ""
    fits = max(1, cap // request.nodes)  # gres counts a node's
    flag = f"scontrol update JobId={job} Gres=gpu:{kind}{fits}  (or --gpus {fits} when you launch it)"
    if cap < request.nodes:
        flag = f"scancel {job}, then again with --nodes={cap} at most"
    elsewhere = _elsewhere(cluster, request, name)
    return flag + (f"; for {counted(request.all_gpus, 'GPU')}: {elsewhere}" if elsewhere else "")


def _elsewhere(cluster: Cluster, request: Request, but: str) -> str:
    for name in cluster.partitions:
        if name != but and request.gpus and not refusals(cluster, request, name):
            return f"--partition {name}"
    return ""


def _time_flag(row: dict[str, str], request: Request, cluster: Cluster) -> str:
    known = [cluster.partitions[p] for p in row.get("Partition", "").split(",") if p in cluster.partitions]
    limits = [p.max_minutes for p in known]
    limits += [qos.max_minutes for p in known for qos in effective_qos(cluster, p, request)]
    shortest = clock(min((limit for limit in limits if limit), default=0))
    if shortest == clock(0):
        return "a shorter --time"
    return f"scontrol update JobId={row.get('JobId', '?')} TimeLimit={shortest}  (or --time {shortest})"


def _before_the_window(row: dict[str, str], cluster: Cluster, text: str) -> tuple[str, str]:
    """Which reservation keeps the job's nodes, and the time limit that ends before it."""
    wanted = _expand(row.get("ReqNodeList", "")) or {
        node.name for name in row.get("Partition", "").split(",") for node in cluster.nodes_of(name)
    }
    coming = []
    for line in slurm.ask(["scontrol", "show", "reservation", "-o"]).out.splitlines():
        found = slurm.fields(line)
        with contextlib.suppress(ValueError):
            start, end = (datetime.fromisoformat(found.get(key, "")) for key in ("StartTime", "EndTime"))
            if end > datetime.now() and wanted & _expand(found.get("Nodes", "")):
                coming.append((start, end, found.get("ReservationName", "?")))
    if not coming:
        return text, "other nodes (leave out --nodelist), or wait: sinfo -R says why they are away"
    start, end, name = min(coming)
    text = f"its nodes are reserved from {start:%a %d %b %H:%M} to {end:%a %d %b %H:%M} ({name})"
    minutes = int((start - datetime.now()).total_seconds() / 60) - BEFORE_WINDOW_MIN
    if minutes < SHORTEST_MIN:
        return text, "wait: it starts after that"
    limit = clock(minutes)
    return text, (
        f"scontrol update JobId={row.get('JobId', '?')} TimeLimit={limit}  (or --time {limit}: it ends before, and a "
        "later job goes on)"
    )


def _expand(hosts: str) -> set[str]:
    """`node[1-3,7]` as names."""
    if hosts in ("", "(null)", "None"):
        return set()
    return set(slurm.ask(["scontrol", "show", "hostnames", hosts]).out.split())


def _group(request: Request, row: dict[str, str], cluster: Cluster, text: str) -> tuple[str, str]:
    """A shared limit that the job alone is over never lets it start, however long it waits."""
    name = row.get("Partition", "").split(",")[0]
    for refusal in refusals(cluster, request, name) if name in cluster.partitions else []:
        if "its whole group" in refusal.text:
            return refusal.text, refusal.remedy or "ask for less"
    return text, "wait"


def _fits(row: dict[str, str], request: Request, cluster: Cluster) -> str:
    name = row.get("Partition", "").split(",")[0]
    if name not in cluster.partitions:
        return "engaging plan shows what the partitions have"
    for refusal in refusals(cluster, request, name):
        return refusal.line()
    most = largest_node(cluster, name, request.gpu_type)
    return f"nodes of {name} have at most {counted(most, 'GPU')}; engaging plan shows the rest"


def _failed(exit_code: str, text: str, remedy: str) -> tuple[str, str]:
    """`2:0` is status 2; `0:9` is a program that signal 9 ended, which a shell calls 137; 125 is for its memory."""
    status, _, signal = exit_code.partition(":")
    if (status, signal) == ("0", "125"):
        return ENDS["OUT_OF_MEMORY"]
    if status == "0" and signal.isdigit():
        status = str(128 + int(signal))
    return EXITS.get(status, (text, remedy))


def _more_memory(row: dict[str, str]) -> str:
    """The flags that ask for twice the memory, for `engaging launch` and for sbatch."""
    request = request_of(row)
    if not request.memory_mb:
        return "--mem with twice of it"
    each = -(-2 * request.memory_mb // request.nodes)
    per_gpu = request.gpus if "gpu" in row.get("MemPerTres", "") else 0
    flag = f"--mem-per-gpu={slurm.amount(-(-each // per_gpu))}" if per_gpu else f"--mem={slurm.amount(each)}"
    return f"twice of it: --mem {slurm.amount(each)} when you launch it (sbatch: {flag})"


def _running(row: dict[str, str]) -> str:
    ran, limit = row.get("RunTime", "?"), row.get("TimeLimit", "?")
    restarts = slurm._int(row.get("Restarts")) or 0
    again = f", restarted {counted(restarts, 'time')}" if restarts else ""
    return f"it has run {ran} of {limit} on {row.get('NodeList') or '?'}{again}"


def _start_estimate(job: str) -> None:
    answer = slurm.ask(["squeue", "-h", "--start", f"--jobs={job}", "-o", "%S"])
    for line in answer.out.splitlines():
        try:
            start = datetime.fromisoformat(line.strip())
        except ValueError:
            continue
        wait = (start - datetime.now()).total_seconds() / 60
        print(
            f"  SLURM expects a start {'now' if wait < 1 else 'in ' + words(wait)} ({start:%a %d %b %H:%M})"
        )
        return
    print("  SLURM names no expected start")


def _from_accounting(job: str) -> list[dict[str, str]]:
    fields = {
        "JobID": "JobId",
        "State": "JobState",
        "ExitCode": "ExitCode",
        "ReqTRES": "TRES",
        "NNodes": "NumNodes",
    }
    answer = slurm.ask(["sacct", "-X", "--parsable2", "-j", job, "-o", ",".join(fields)])
    rows = [{ours: row.get(name, "") for name, ours in fields.items()} for row in slurm.table(answer.out)]
    for row in rows:
        status, _, signal = row["ExitCode"].partition(":")
        if status in BY_SIGNAL and signal == "0":  # sacct shows 137 as 9
            row["ExitCode"] = f"{128 + int(status)}:0"
    return rows


def _job_id(text: str) -> str:
    """A job id as it is, or the job of a launch by its name."""
    if slurm.JOB_ID.fullmatch(text):
        return text
    from tools.launch import book
    from tools.place import checkout

    launch = book.find(checkout(), text)
    if not launch.job_id:
        raise UserError(f"{text}: has no SLURM job ({launch.state}); engaging status {text}")
    return launch.job_id


def _known(text: str | None) -> str | None:
    return None if text in (None, "", "(null)", "N/A") else text
