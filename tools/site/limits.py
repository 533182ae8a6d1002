"""Would this cluster take this job from this user? Every refusal names whose limit it is and what would pass.

SLURM accepts a job over a QOS limit and lets it wait for ever; `sbatch --test-only` even names a start for
it. So the limits are compared here, from the cluster's own answers.
"""

from dataclasses import dataclass, replace

from nanogpt.common.errors import UserError
from nanogpt.common.flags import nearest
from tools.args import clock, counted, parse_minutes, words
from tools.site.cluster import Cluster
from tools.site.slurm import Node, Partition, Qos


@dataclass(frozen=True)
class Request:
    """What one job asks for: `gpus` a node, `cpus` and `memory_mb` a node, `minutes`."""

    gpus: int
    gpu_type: str | None
    minutes: int
    nodes: int = 1
    cpus: int = 1
    memory_mb: int | None = None
    account: str | None = None
    qos: str | None = None

    @property
    def all_gpus(self) -> int:
        """GPUs over all nodes."""
        return self.gpus * self.nodes


@dataclass(frozen=True)
class Refusal:
    """Why a partition would not start a job. `short` fits a table, `remedy` is a flag or a sentence."""

    short: str
    text: str
    remedy: str = ""

    def line(self) -> str:
        """The one line of an error."""
        return f"{self.text}; {self.remedy}" if self.remedy else self.text


def refusals(cluster: Cluster, request: Request, name: str) -> list[Refusal]:
    """Everything that keeps `request` from ever starting in partition `name`, as far as is known."""
    partition = cluster.partition(name)
    found = _partition_refuses(partition, request)
    found += _hardware_refuses(cluster, partition, request)
    for qos in effective_qos(cluster, partition, request):
        found += _qos_refuses(cluster, qos, partition, request)
    found += _account_refuses(cluster, request)
    return found


def effective_qos(cluster: Cluster, partition: Partition, request: Request) -> list[Qos]:
    """The QOS whose limits count: the partition's own, then the job's for what the partition leaves open."""
    found = []
    names = [partition.qos, request.qos or default_qos(cluster, request.account)]
    for name in dict.fromkeys(name for name in names if name):
        if name in cluster.qos:
            found.append(cluster.qos[name])
    if len(found) == 2:
        inner, outer = found
        if "OverPartQOS" in outer.flags:
            inner, outer = outer, inner
        found = [inner, replace(outer, per_user=_without(outer.per_user, inner.per_user),
                                per_job=_without(outer.per_job, inner.per_job))]  # fmt: skip
    return found


def default_qos(cluster: Cluster, account: str | None) -> str | None:
    """The QOS that a job gets when it names none."""
    rows = [row for row in cluster.associations if account is None or row.account == account]
    for row in rows:
        if row.default_qos:
            return row.default_qos
    return "normal" if any("normal" in row.qos for row in rows) else None


def gpu_cap(
    cluster: Cluster, partition: Partition, request: Request, per_job: bool = False
) -> tuple[int | None, str]:
    """The most GPUs of the request's type that one user (one job) may hold there, and the QOS that says so."""
    caps: list[tuple[int, str]] = []
    for qos in effective_qos(cluster, partition, request):
        limits = qos.per_job if per_job else qos.per_user
        caps += [(limits[name], qos.name) for name in _gpu_names(request.gpu_type) if name in limits]
    return min(caps, default=(None, ""), key=lambda cap: cap[0])


def own_wait(cluster: Cluster, partition: Partition, request: Request) -> int:
    """Minutes until enough of the user's own running jobs have ended, at their limits, for the GPUs and cores asked for
    to fit under the user's limit; 0 for now. `sbatch --test-only` knows nothing of it."""
    wait = 0
    for qos in effective_qos(cluster, partition, request):
        sharing = {other.name for other in cluster.partitions.values() if other.qos == qos.name}
        for name in (*_gpu_names(request.gpu_type), "cpu"):
            cap, kind = qos.per_user.get(name), name.partition(":")[2]
            asked = request.cpus * request.nodes if name == "cpu" else request.all_gpus
            held = []
            for job in cluster.my_jobs:
                count = (job.gpus.get(kind, 0) if kind else sum(job.gpus.values())) * job.nodes
                count = job.cpus if name == "cpu" else count
                if count and job.state == "RUNNING" and (job.partition in sharing or job.qos == qos.name):
                    held.append((max(0, (job.limit_minutes or 0) - (parse_minutes(job.elapsed) or 0)), count))
            free = (cap or 0) - sum(count for _, count in held)
            for left, count in sorted(held):
                if cap is not None and free < asked:
                    wait, free = max(wait, left), free + count
    return wait


def largest_node(cluster: Cluster, partition: str, kind: str | None) -> int:
    """The most GPUs of a type (or of any one type) in one usable node of the partition."""
    return max((gpus_in(node, kind) for node in cluster.nodes_of(partition) if node.usable), default=0)


def gpus_in(node: Node, kind: str | None) -> int:
    """GPUs of a type in a node; of its largest type when none is named."""
    return node.gpus.get(kind, 0) if kind else max(node.gpus.values(), default=0)


def room(cluster: Cluster, partition: str, request: Request) -> int:
    """Jobs that the partition's usable nodes hold side by side when nobody else is there; at least 1."""
    held = 0
    for node in cluster.nodes_of(partition):
        fits = [node.cpus // max(1, request.cpus)]
        fits += [gpus_in(node, request.gpu_type) // request.gpus] if request.gpus else []
        held += min(fits) if node.usable else 0
    return max(1, held // request.nodes)


def check_gpu_type(cluster: Cluster, kind: str | None) -> None:
    """UserError when no node of the cluster has this type."""
    known = cluster.gpu_types()
    if kind and kind not in known:
        there = ", ".join(known) or "no GPUs at all"
        raise UserError(
            f"--gpu-type={kind}: this cluster has no such GPU{nearest(kind, known)} (there are: {there})"
        )


def check_account(cluster: Cluster, request: Request) -> None:
    """UserError when the account or the QOS is not the user's."""
    for refusal in _account_refuses(cluster, request):
        raise UserError(refusal.line())


def _partition_refuses(partition: Partition, request: Request) -> list[Refusal]:
    found = []
    if not partition.up:
        found.append(Refusal("down", f"partition {partition.name} takes no jobs now"))
    if partition.max_minutes is not None and request.minutes > partition.max_minutes:
        limit = clock(partition.max_minutes)
        found.append(
            Refusal(
                f"time limit {words(partition.max_minutes)}",
                f"--time={clock(request.minutes)}: {partition.name} allows {limit}",
                f"--time={limit} (the run goes on by itself in a further job, see --max-restarts)",
            )
        )
    if partition.max_nodes is not None and request.nodes > partition.max_nodes:
        found.append(
            Refusal(
                f"at most {counted(partition.max_nodes, 'node')}",
                f"--nodes={request.nodes}: {partition.name} allows {partition.max_nodes}",
                f"--nodes={partition.max_nodes}",
            )
        )
    account = request.account
    if account and (
        (partition.allow_accounts and account not in partition.allow_accounts)
        or account in partition.deny_accounts
    ):
        found.append(
            Refusal("account not allowed", f"--account={account}: {partition.name} does not take it")
        )
    if request.qos and partition.allow_qos and request.qos not in partition.allow_qos:
        found.append(
            Refusal(
                "QOS not allowed",
                f"--qos={request.qos}: {partition.name} takes {', '.join(partition.allow_qos)}",
                f"--qos={partition.allow_qos[0]}",
            )
        )
    return found


def _hardware_refuses(cluster: Cluster, partition: Partition, request: Request) -> list[Refusal]:
    kind, what = request.gpu_type, f"{request.gpu_type} GPU" if request.gpu_type else "GPU"
    nodes = [node for node in cluster.nodes_of(partition.name) if node.usable]
    if not request.gpus:
        return [] if nodes else [Refusal("no node up", f"partition {partition.name} has no node that is up")]
    most = largest_node(cluster, partition.name, kind)
    if not most:
        others = ", ".join(cluster.gpu_types(partition.name)) or "no GPUs"
        return [
            Refusal(f"no {kind or 'GPU'}", f"partition {partition.name} has no {what}s (it has: {others})")
        ]
    if request.gpus > most:
        return [
            Refusal(
                f"nodes have {most}",
                f"--gpus={request.gpus}: a node of {partition.name} has at most {counted(most, what)}",
                f"--gpus={most}, or --nodes={-(-request.gpus // most)} --gpus={most} (counted a node)",
            )
        ]
    fitting = [
        node for node in nodes
        if gpus_in(node, kind) >= request.gpus and node.cpus >= request.cpus
        and (request.memory_mb or 0) <= node.memory_mb
    ]  # fmt: skip
    if len(fitting) < request.nodes:
        return [
            Refusal(
                f"{len(fitting)} such node{'s' * (len(fitting) != 1)}",
                f"--nodes={request.nodes}: {partition.name} has {counted(len(fitting), 'node')} with "
                f"{counted(request.gpus, what)}, {counted(request.cpus, 'CPU')} and the memory asked for",
                "fewer nodes, GPUs or CPUs",
            )
        ]
    return []


def _qos_refuses(cluster: Cluster, qos: Qos, partition: Partition, request: Request) -> list[Refusal]:
    found = []
    asked = {"cpu": request.cpus * request.nodes, "node": request.nodes}
    if request.memory_mb:
        asked["mem"] = request.memory_mb * request.nodes
    for name in _gpu_names(request.gpu_type):
        asked[name] = request.all_gpus
    for whose, limits in (("a user", qos.per_user), ("a job", qos.per_job), ("its whole group", qos.group)):
        for name, value in asked.items():
            limit = limits.get(name)
            if limit is None or value <= limit:
                continue
            gpus, kind = name.startswith("gres/gpu"), name.partition(":")[2]
            thing = f"{kind} GPU".strip() if gpus else {"cpu": "CPU", "mem": "MB of memory"}.get(name, name)

            def much(number: int, thing: str = thing) -> str:
                return f"{number} {thing}" if "memory" in thing else counted(number, thing)

            found.append(
                Refusal(
                    f"{much(limit)} {whose.replace('its whole', 'a')}",
                    f"{much(value)} in {partition.name}: its limit {qos.name!r} allows {much(limit)} "
                    f"for {whose}, so the job would wait for ever",
                    f"--gpus={limit // request.nodes}" if gpus and limit >= request.nodes else "",
                )
            )
    if qos.max_minutes is not None and request.minutes > qos.max_minutes:
        found.append(
            Refusal(
                f"time limit {words(qos.max_minutes)}",
                f"--time={clock(request.minutes)}: the limit {qos.name!r} allows {clock(qos.max_minutes)}",
                f"--time={clock(qos.max_minutes)}",
            )
        )
    return _once(found)


def _account_refuses(cluster: Cluster, request: Request) -> list[Refusal]:
    if not cluster.associations:
        return []
    accounts = cluster.accounts()
    if request.account and request.account not in accounts:
        return [
            Refusal(
                "account",
                f"--account={request.account}: not one of your accounts{nearest(request.account, accounts)}",
                f"yours: {', '.join(accounts)} (a new account takes about 15 minutes to be known)",
            )
        ]
    rows = [row for row in cluster.associations if not request.account or row.account == request.account]
    allowed = sorted({name for row in rows for name in row.qos})
    if request.qos and allowed and request.qos not in allowed:
        where = f" with --account={request.account}" if request.account else ""
        return [
            Refusal(
                "qos",
                f"--qos={request.qos}: not open to you{where}{nearest(request.qos, allowed)}",
                f"yours: {', '.join(allowed)}",
            )
        ]
    return []


def _gpu_names(kind: str | None) -> list[str]:
    return ["gres/gpu", f"gres/gpu:{kind}"] if kind else ["gres/gpu"]


def _without(limits: dict[str, int], others: dict[str, int]) -> dict[str, int]:
    return {name: value for name, value in limits.items() if name not in others}


def _once(found: list[Refusal]) -> list[Refusal]:
    return list({refusal.short: refusal for refusal in found}.values())
