"""`engaging why` on a real SLURM: one function submits a job for each reason, then reads them all at once."""

import os

import pytest

from tools.site import slurm
from tools.site.cluster import ask_cluster
from tools.site.why import explain

YOURS, BUSY, JOB, STAFF = "your own limit", "the cluster is busy", "the job itself", "the cluster's staff"
# a QOS with one limit, and what runs into it: (limit, sbatch's words, SLURM's reason, what `why` must say)
QOS = {
    "jobs": ("MaxJobsPerUser=0", [], "QOSMaxJobsPerUserLimit", "one of yours to end"),
    "grpjobs": ("GrpJobs=0", [], "QOSGrpJobsLimit", "whole group"),
    "wall": ("MaxWall=10", ["-t20"], "QOSMaxWallDurationPerJobLimit", "TimeLimit=00:10:00"),
    "cpujob": ("MaxTRESPerJob=cpu=1", ["-c4"], "QOSMaxCpuPerJobLimit", "--cpus 1 "),
    "gpujob": ("MaxTRESPerJob=gres/gpu=1", ["--gres=gpu:2"], "QOSMaxGRESPerJob", "Gres=gpu:1 "),
    "mem": ("MaxTRESPerUser=mem=1G", ["--mem=2G"], "QOSMaxMemoryPerUser", "--mem 1024M"),
    "node": ("MaxTRESPerJob=node=1", ["-N2"], "QOSMaxNodePerJobLimit", "NumNodes=1"),
    "grpgpu": ("GrpTRES=gres/gpu=1", ["--gres=gpu:2"], "QOSGrpGRES", "--gpus=1"),
    "min": ("MinTRESPerJob=gres/gpu=2", ["--gres=gpu:1"], "QOSMinGRES", "more GPUs"),
}
# sbatch's words, SLURM's reason, whose it is, what `why` must say
OTHERS = {
    "gpuuser": (["-pmit_normal_gpu", "--gres=gpu:h200:4"], "QOSMaxGRESPerUser", YOURS, "Gres=gpu:h200:2"),
    "cpuuser": (["-pmit_normal_gpu", "--gres=gpu:1", "-c33"], "QOSMaxCpuPerUserLimit", YOURS, "--cpus 32"),
    "account": (["-Awhy-account"], "AssocGrpJobsLimit", YOURS, "another --account"),
    "hold": (["--hold"], "JobHeldUser", JOB, "scontrol release "),
    "begin": (["--begin=now+1hour"], "BeginTime", JOB, "wait"),
    "dependency": (["-dafterok:HELD"], "Dependency", JOB, "Dependency= "),
    "never": (["-dafterok:GONE"], "DependencyNeverSatisfied", JOB, "submit both again"),
    "reservation": (["--reservation=why"], "Reservation", JOB, "without --reservation"),
    "window": (["-wnode8", "-t180"], "ReqNodeNotAvail", BUSY, "TimeLimit=01:5"),
    "array": (["--array=0-1%1"], "JobArrayTaskLimit", JOB, "ArrayTaskThrottle=2"),
    "closed": (["-pmit_quicktest", "-t5"], "PartitionDown", STAFF, "another --partition"),
}


@pytest.fixture
def limits(cluster):
    """A QOS for each row of QOS, an account that may run nothing, a reservation in two hours, a closed partition.

    Yields a dict for the jobs that are to be cancelled at the end.
    """
    user = ["user", "root", "set"]
    qos = ",".join(f"why-{name}" for name in QOS)
    for name, (limit, *_) in QOS.items():
        cluster.run("sacctmgr", "-i", "add", "qos", f"why-{name}", "set", limit)
    cluster.run("sacctmgr", "-i", "modify", *user, f"qos+={qos}")
    cluster.run("sacctmgr", "-i", "add", "account", "why-account", "set", "GrpJobs=0")
    cluster.run("sacctmgr", "-i", "add", "user", "root", "account=why-account")
    window = ["reservationname=why", "starttime=now+2hours", "duration=30", "users=root", "nodes=node8"]
    cluster.scontrol("create", "reservation", *window)
    cluster.scontrol("update", "partition=mit_quicktest", "state=down")
    jobs: dict[str, str] = {}
    yield jobs
    cluster.cancel(*jobs.values())
    cluster.scontrol("update", "partition=mit_quicktest", "state=up")
    cluster.wait_until(lambda: not cluster.squeue("--reservation=why"), 60)
    cluster.scontrol("delete", "reservation=why")
    cluster.run("sacctmgr", "-i", "delete", "account", "why-account", check=False)
    cluster.run("sacctmgr", "-i", "modify", *user, f"qos-={qos}")
    cluster.run("sacctmgr", "-i", "delete", "qos", f"name={qos}", check=False)


def test_why_names_twenty_reasons_whose_they_are_and_what_to_type(cluster, limits, monkeypatch):
    wanted = {f"why-{name}": (reason, YOURS, said) for name, (_, _, reason, said) in QOS.items()}
    wanted |= {f"why-{name}": rest for name, (_, *rest) in OTHERS.items()}
    words = {f"why-{name}": [f"--qos=why-{name}", *row[1]] for name, row in QOS.items()}
    words |= {f"why-{name}": row[0] for name, row in OTHERS.items()}
    jobs = limits
    gone = cluster.sbatch("-pmit_normal", "--hold", "-o/dev/null", "--wrap", "true")
    cluster.cancel(gone)
    for name in sorted(words, key=lambda name: name != "why-hold"):  # what is held is waited for
        given = [word.replace("GONE", gone).replace("HELD", jobs.get("why-hold", "")) for word in words[name]]
        jobs[name] = cluster.sbatch(
            "-ppi_lab", "-t5", *given, f"-J{name}", "-o/dev/null", "--wrap", "sleep 300"
        )

    def rows() -> dict[str, dict[str, str]]:
        found = {}
        for line in cluster.scontrol("show", "job", "-o").splitlines():
            row = slurm.fields(line)
            if row.get("JobName") in jobs and row.get("JobState") == "PENDING":
                found[row["JobName"]] = row
        return found

    def missing() -> dict[str, str]:
        now = {name: row["Reason"].split(",")[0] for name, row in rows().items()}
        return {name: now.get(name, "") for name, row in wanted.items() if now.get(name) != row[0]}

    cluster.wait_until(lambda: not missing(), 60, missing)
    monkeypatch.setattr(os, "environ", {**os.environ, **cluster.env})
    facts, explained = ask_cluster(), rows()
    for name, (reason, whose, said) in wanted.items():
        found = explain(explained[name], facts)
        assert (found.reason, found.whose) == (reason, whose), found
        assert said in f"{found.text} {found.remedy} ", found
