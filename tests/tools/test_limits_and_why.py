"""Whose limit it is: refusals before queueing, waves, and reasons in words."""

import os
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import pytest

from nanogpt.common.errors import UserError
from tools.launch import presets
from tools.launch.presets import NAMED
from tools.site import plan, slurm
from tools.site.cluster import Cluster, read_jobs, read_nodes, read_partitions, read_qos
from tools.site.limits import (
    Request,
    check_account,
    check_gpu_type,
    effective_qos,
    gpu_cap,
    own_wait,
    refusals,
)
from tools.site.plan import Option, best, launch_line, options
from tools.site.profile import Site
from tools.site.reasons import ENDS, REASONS
from tools.site.slurm import Association, Qos
from tools.site.why import explain

ROOT = Path(__file__).resolve().parents[2]
RECORDED = Path(__file__).parent / "recorded"
SITE = Site("test")


@pytest.fixture
def cluster() -> Cluster:
    """The recorded cluster: free-tier limits, nobody's jobs."""
    found = Cluster(associations=[Association("mit_general", ("normal", "mit_amf"))])
    read_partitions((RECORDED / "partition-22.05.txt").read_text(), found)
    found.nodes = read_nodes((RECORDED / "node-22.05.txt").read_text())
    found.qos = {row.name: row for row in read_qos((RECORDED / "qos-22.05.txt").read_text())}
    return found


def request(gpus=1, kind="h200", minutes=60, nodes=1, cpus=8, **more) -> Request:
    return Request(gpus, kind, minutes, nodes, cpus, 64_000, **more)


@pytest.mark.parametrize(
    ("partition", "asked", "said"),
    [
        ("mit_normal_gpu", request(2), ""),
        ("mit_normal_gpu", request(4), "2 GPUs a user"),
        ("mit_preemptable", request(4), ""),
        ("mit_preemptable", request(8), "4 GPUs a user"),
        ("mit_preemptable", request(2, nodes=3), "2 such nodes"),
        ("mit_preemptable", request(2, nodes=2), ""),
        ("mit_normal_gpu", request(1, minutes=361), "time limit 6 h"),
        ("mit_normal_gpu", request(1, "a100"), "no a100"),
        ("mit_normal", request(1), "no h200"),
        ("mit_preemptable", request(8, "h100"), "nodes have 4"),
        ("mit_normal_gpu", request(1, cpus=121), "0 such nodes"),
        ("mit_normal_gpu", request(1, account="other"), "account"),
        ("mit_normal_gpu", request(1, qos="fast"), "qos"),
        ("mit_normal", request(0, None, cpus=4), ""),
    ],
)
def test_refusals(cluster, partition, asked, said):
    shorts = [refusal.short for refusal in refusals(cluster, asked, partition)]
    assert shorts == [] if not said else said in shorts, shorts


def test_every_refusal_is_one_line_with_a_remedy(cluster):
    for asked in (request(8), request(1, minutes=9999), request(1, account="mit_generl")):
        for refusal in refusals(cluster, asked, "mit_preemptable"):
            assert refusal.remedy and "\n" not in refusal.line()


def test_unknown_names_get_the_nearest(cluster):
    with pytest.raises(UserError, match="did you mean 'h200'"):
        check_gpu_type(cluster, "h20")
    with pytest.raises(UserError, match="did you mean 'mit_normal_gpu'"):
        cluster.partition("mit_normal_gpuu")
    with pytest.raises(UserError, match="did you mean 'mit_general'"):
        check_account(cluster, request(account="mit_genral"))


def test_the_partitions_qos_goes_before_the_jobs(cluster):
    cluster.qos["normal"] = Qos("normal", per_user={"gres/gpu": 1, "cpu": 4})
    partition = cluster.partitions["mit_normal_gpu"]
    rows = effective_qos(cluster, partition, request())
    assert [(row.name, row.per_user) for row in rows] == [
        ("mit_normal_gpu", {"gres/gpu": 2}),
        ("normal", {"cpu": 4}),
    ]
    assert gpu_cap(cluster, partition, request()) == (2, "mit_normal_gpu")
    cluster.qos["normal"] = Qos("normal", per_user={"gres/gpu": 1}, flags=("OverPartQOS",))
    assert gpu_cap(cluster, partition, request()) == (1, "normal")


def test_a_limit_by_type(cluster):
    cluster.qos["mit_preemptable"] = Qos("mit_preemptable", per_user={"gres/gpu": 4, "gres/gpu:h200": 1})
    assert gpu_cap(cluster, cluster.partitions["mit_preemptable"], request(2))[0] == 1
    assert refusals(cluster, request(2), "mit_preemptable")[0].remedy == "--gpus=1"
    assert refusals(cluster, request(2, "h100"), "mit_preemptable") == []
    assert refusals(cluster, request(2), "mit_preemptable")[0].short == "1 h200 GPU a user"


def test_an_8_gpu_speedrun_cannot_start_on_the_free_tier(cluster):
    found = options(cluster, SITE, Request(8, None, 60, 1, 0), NAMED["speedrun"])
    assert found and not any(option.ok for option in found) and best(found) is None
    smaller = options(cluster, SITE, Request(4, None, 60, 1, 0), NAMED["speedrun"])
    taken = {(option.partition, option.request.gpu_type) for option in smaller if option.ok}
    assert taken == {("mit_preemptable", kind) for kind in ("h200", "h100", "l40s")}


NODE = "NodeName={} State=IDLE Partitions={} CPUTot={} RealMemory={} Gres={} AllocTRES= CPUAlloc=0 AllocMem=0"
UNTYPED = [NODE.format(f"g{n}", "gpu,short", 32, 256_000, "gpu:2") for n in range(2)]
NO_GPUS = [NODE.format("c1", "batch", 64, 512_000, "(null)")]


@pytest.mark.parametrize(
    ("partitions", "nodes", "gpus", "recommended", "instead"),
    [
        # a cluster with untyped GPUs and without accounting: the shortest partition that takes it
        (["gpu 2-00:00:00", "short 00:30:00"], UNTYPED, 2, "gpu", None),
        # more GPUs than a node has: fewer of them, and no --nodes that was not asked for
        (["gpu 2-00:00:00", "short 00:30:00"], UNTYPED, 4, None, ("gpu", 2)),
        (["batch 1-00:00:00"], NO_GPUS, 1, None, None),
    ],
)
def test_plan_on_clusters_of_other_makes(monkeypatch, partitions, nodes, gpus, recommended, instead):
    monkeypatch.setattr(plan, "ask_starts", lambda found: None)
    other = Cluster(notes=["no accounting here"], nodes=read_nodes("\n".join(nodes)))
    rows = [line.split() for line in partitions]
    text = "\n".join(f"PartitionName={name} State=UP MaxTime={limit} QoS=N/A" for name, limit in rows)
    read_partitions(text, other)
    asked = request(gpus, None, minutes=60, cpus=0)
    chosen = best(options(other, SITE, asked, NAMED["gpt2"]))
    assert (chosen.partition if chosen else None) == recommended
    less = None if chosen else plan.smaller(other, SITE, asked, NAMED["gpt2"])
    assert ((less.partition, less.request.gpus) if less else None) == instead


def test_what_is_small_leaves_the_fast_gpus_to_others(cluster):
    asked = Request(1, None, 60, 1, 0)
    types = [
        best(options(cluster, SITE, asked, NAMED[name])).request.gpu_type for name in ("nanogpt", "gpt2")
    ]
    assert types == ["l40s", "h200"]
    assert best(options(cluster, SITE, asked, presets.resolve(ROOT, "quickstart"))).request.gpu_type == "l40s"


def test_waves_and_gpu_hours():
    option = Option("p", request(1, minutes=360), at_once=4)
    assert (option.waves(12), option.waves(3), option.gpu_hours(12)) == (3, 1, 72.0)
    assert Option("p", request(1)).waves(100) == 1
    assert Option("p", request(1), at_once=9, room=2).waves(100) == 50
    line = launch_line("gpt2", option, 12)
    assert line == (
        "engaging launch gpt2 --gpus 1 --gpu-type h200 --time 06:00:00 --partition p --seeds 12 --throttle 4"
    )


def pending(reason: str, **more: str) -> dict[str, str]:
    row = {
        "JobId": "7", "JobState": "PENDING", "Reason": reason, "Partition": "mit_normal_gpu", "NumNodes": "1",
        "NumCPUs": "8",
        "TresPerNode": "gres:gpu:h200:4", "TimeLimit": "01:00:00", "Account": "mit_general", "QOS": "normal",
    }  # fmt: skip
    return {**row, **more}


def test_your_own_quota_is_told_from_a_busy_cluster(cluster):
    over = explain(pending("QOSMaxGRESPerUser"), cluster)
    assert (
        over.whose == "your own limit" and "it asks for 4, 'mit_normal_gpu' allows 2, you hold 0" in over.text
    )
    assert "Gres=gpu:h200:2" in over.remedy and "--partition mit_preemptable" in over.remedy
    wide = {"Partition": "mit_preemptable", "TresPerNode": "gres:gpu:4"}
    two = explain(pending("QOSMaxGRESPerUser", NumNodes="2", **wide), cluster)
    assert "it asks for 8" in two.text and "Gres=gpu:2 " in two.remedy, "gres counts a node's GPUs"
    either = explain(pending("QOSMaxGRESPerUser", Partition="mit_normal_gpu,mit_preemptable"), cluster)
    assert "'mit_preemptable' allows 4" in either.text and "your other jobs end" in either.remedy
    six = explain(pending("QOSMaxGRESPerUser", NumNodes="6", **wide), cluster)
    assert "--nodes=4 at most" in six.remedy
    cluster.my_jobs = read_jobs((RECORDED / "squeue-22.05.txt").read_text())
    held = explain(pending("QOSMaxGRESPerUser", TresPerNode="gres/gpu:h200:1"), cluster)
    assert "you hold 2 there now" in held.text and "your other jobs end" in held.remedy
    busy = explain(pending("Resources"), cluster)
    assert busy.whose == "the cluster is busy"


def test_a_start_waits_for_your_own_jobs_under_your_limit(cluster, monkeypatch):
    """SLURM's --test-only names a start that the user's own limit does not allow yet."""
    cluster.my_jobs = read_jobs((RECORDED / "squeue-22.05.txt").read_text())
    place = cluster.partitions
    assert own_wait(cluster, place["mit_normal_gpu"], request(1)) == 59, "2 of 2 are held, for an hour"
    assert own_wait(cluster, place["mit_preemptable"], request(2)) == 0, "2 of 4 are held"
    assert own_wait(cluster, place["mit_preemptable"], request(3)) == 89
    limits = {"mit_normal_gpu": Qos("mit_normal_gpu", per_user={"gres/gpu": 2, "cpu": 32})}
    cores = replace(cluster, qos=limits, my_jobs=[replace(cluster.my_jobs[1], gpus={"h200": 1}, cpus=20)])
    assert [own_wait(cores, place["mit_normal_gpu"], request(1, cpus=n)) for n in (12, 13)] == [0, 59], (
        "of 32"
    )
    said = f"Job 9 to start at {datetime.now():%Y-%m-%dT%H:%M:%S} using"
    monkeypatch.setattr(plan, "_probe", lambda option: slurm.Answer(0, "", said))
    monkeypatch.setattr(slurm, "nodes_to_report", lambda: False)
    found = options(cluster, SITE, request(1), partitions="mit_normal_gpu,mit_preemptable")
    plan.ask_starts(found)
    assert best(found).partition == "mit_preemptable" and not best(found).own_wait
    waits = next(option for option in found if option.partition == "mit_normal_gpu")
    assert 58 <= (waits.start - datetime.now()).total_seconds() / 60 <= 59
    assert "when your own jobs there end" in plan._answer(waits, 1)


@pytest.mark.parametrize(
    ("reason", "said"),
    [
        ("PartitionTimeLimit", "TimeLimit=06:00:00"),
        ("JobHeldUser", "scontrol release 7"),
        ("DependencyNeverSatisfied", "scancel 7"),
        ("(ReqNodeNotAvail, UnavailableNodes:node1)", "sinfo -R"),
        ("QOSMaxWallDurationPerJobLimit", "TimeLimit="),
        ("JobArrayTaskLimit", "ArrayTaskThrottle=8"),
        ("BadConstraints", "2 GPUs"),
        ("SomethingNewIn2030", "ask the cluster's staff"),
    ],
)
def test_reasons(cluster, reason, said):
    found = explain(pending(reason, ArrayTaskThrottle="4"), cluster)
    assert said in found.remedy or said in found.text, found.lines()


def test_somebody_elses_job_is_not_yours_to_change(cluster):
    found = explain(pending("QOSMaxGRESPerUser", UserId="ada(1815)"), cluster)
    assert found.whose == "ada's own limit"
    assert found.remedy.startswith(
        "nothing for you to do: the job is ada's (it could be: scontrol update JobId=7"
    )
    mine = explain(pending("QOSMaxGRESPerUser", UserId=f"ada({os.getuid()})"), cluster)
    assert mine.whose == "your own limit" and mine.remedy.startswith("scontrol update")


def test_every_reason_and_end_formats(cluster):
    for prefix, *_ in REASONS:
        lines = explain(pending(prefix), cluster).lines()
        assert len(lines) == 3 and "{" not in "".join(lines)
    for state in ENDS:
        assert "{" not in "".join(explain(pending("None", JobState=state), cluster).lines())


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("0:53", "mkdir -p"),
        ("2:0", "refused"),
        ("70:0", "NaN"),
        ("74:0", "quota"),
        ("76:0", "newer attempt"),
        ("1:0", "log"),
        ("0:9", "it was killed, often for its memory"),
        ("0:11", "segmentation fault"),
        ("0:125", "more host memory than it asked for"),
    ],
)
def test_failures_by_exit_status(cluster, code, said):
    row = pending("None", JobState="FAILED", ExitCode=code, StdOut="/home/u/repo/logs/x-7.out")
    assert said in "".join(explain(row, cluster).lines())


def test_recorded_jobs_are_explained(cluster):
    for line in (RECORDED / "job-22.05.txt").read_text().splitlines():
        found = explain(slurm.fields(line), cluster)
        assert found.state in slurm.ACTIVE | slurm.ENDED and found.remedy


def test_without_accounting_limits_are_unknown_and_not_invented(cluster):
    from tools.site.cluster import _read_limits

    silent = slurm.Answer(1, "", "Slurm accounting storage is disabled")
    answers = dict.fromkeys(("qos", "associations"), silent)
    _read_limits(answers, cluster)
    assert (
        cluster.qos == {}
        and cluster.associations == []
        and "limits of your account are unknown" in cluster.notes[0]
    )
    assert refusals(cluster, request(8, account="whatever"), "mit_preemptable") == []
