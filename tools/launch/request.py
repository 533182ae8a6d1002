"""What was asked for against what the cluster has: the partition, the GPU type, how many seeds at once."""

import argparse

from nanogpt.common.errors import UserError
from tools.launch.presets import Target
from tools.site import limits, profile
from tools.site.cluster import Cluster
from tools.site.limits import Request
from tools.site.plan import Option, ask_starts, asked_for, best, options


def choose(args: argparse.Namespace, cluster: Cluster, site: profile.Site, target: Target) -> Option:
    """The partition and GPU type for the flags given; UserError when nothing takes them."""
    asked = asked_for(args, target)
    limits.check_gpu_type(cluster, asked.gpu_type)
    limits.check_account(cluster, asked)
    if cluster.associations == [] and not cluster.notes:
        raise UserError(
            "SLURM knows no account of yours; a new one takes about 15 minutes after the first log-in, "
            "then ask the cluster's staff"
        )
    if (why := target.refuse_gpus(asked.all_gpus)) is not None:
        raise UserError(why)
    if args.partition and "," in args.partition:
        return _first_that_starts(args, cluster, site, target, asked)
    found = options(cluster, site, asked, target, args.partition)
    taken = [option for option in found if option.ok]
    if len(taken) > 1 and not args.partition:
        ask_starts(found)
    chosen = best(found, args.seeds, args.throttle)
    if chosen is None:
        raise UserError(_why_none(found, args))
    return chosen


def _first_that_starts(
    args: argparse.Namespace, cluster: Cluster, site: profile.Site, target: Target, asked: Request
) -> Option:
    """A list of partitions goes to SLURM as it is (the first free one starts it); each must take the job."""
    found = options(cluster, site, asked, target, args.partition)
    names = [option.partition for option in found if option.ok]
    missing = [name for name in args.partition.split(",") if name not in names]
    if missing:
        raise UserError(_why_none([option for option in found if option.partition in missing], args))
    chosen = min(
        (option for option in found if option.ok), key=lambda o: (o.request.cpus, o.request.memory_mb or 0)
    )
    chosen.partition = args.partition
    return chosen


def _why_none(found: list[Option], args: argparse.Namespace) -> str:
    first = next((refusal for option in found for refusal in option.refusals), None)
    plan = f"engaging plan {args.preset} --gpus {args.gpus}"
    if len({option.partition for option in found}) == 1 and first is not None:
        return first.line() + ("" if first.remedy else f"; {plan} shows what can start")
    reasons = dict.fromkeys(f"{o.partition}: {o.refusals[0].short}" for o in found if o.refusals)
    return f"no partition takes this ({'; '.join(reasons) or 'none has GPUs'}); {plan} shows what can start"


def fitting_throttle(args: argparse.Namespace, cluster: Cluster, option: Option) -> int:
    """How many seeds run at once: as asked, else what the user's own limits allow.

    Refuses what never fits.
    """
    partition = cluster.partition(option.partition.split(",")[0])
    rows = limits.effective_qos(cluster, partition, option.request)
    for row in rows:
        sharing = {p.name for p in cluster.partitions.values() if p.qos == row.name}
        queued = sum(job.tasks for job in cluster.my_jobs if job.partition in sharing or job.qos == row.name)
        if row.max_submit is not None and queued + args.seeds > row.max_submit:
            raise UserError(
                f"--seeds={args.seeds}: {row.name!r} allows {row.max_submit} jobs in the queue and you have "
                f"{queued}; --seeds={max(0, row.max_submit - queued)}"
            )
    caps = [row.max_jobs for row in rows if row.max_jobs] + ([option.at_once] if option.at_once else [])
    return max(1, min([args.throttle or args.seeds, args.seeds, *caps]))
