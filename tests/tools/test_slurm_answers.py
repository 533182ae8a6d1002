"""What SLURM answers, read: recorded answers of 22.05, the shapes of six other versions, and noise."""

import random
from datetime import date
from pathlib import Path

import pytest

from tools.args import clock, parse_minutes, words
from tools.launch import book, manage
from tools.site import cluster as cluster_module
from tools.site import slurm
from tools.site.cluster import Cluster, read_associations, read_jobs, read_nodes, read_partitions, read_qos
from tools.site.profile import Site, default_cpus, site_text
from tools.site.slurm import Answer, Job
from tools.site.usage import FIELDS, advice, read_usage, show

RECORDED = Path(__file__).parent / "recorded"

# One node a version, in the order and with the fields that version prints (values are made up).
NODES = dict(line.split("\t") for line in (RECORDED / "node-shapes.txt").read_text().splitlines())


def test_recorded_partitions_and_nodes():
    cluster = Cluster()
    read_partitions((RECORDED / "partition-22.05.txt").read_text(), cluster)
    cluster.nodes = read_nodes((RECORDED / "node-22.05.txt").read_text())
    assert set(cluster.partitions) == {"mit_normal", "mit_normal_gpu", "mit_quicktest", "mit_preemptable"}
    gpu, preemptable = cluster.partitions["mit_normal_gpu"], cluster.partitions["mit_preemptable"]
    assert (gpu.max_minutes, gpu.qos, gpu.preemptable, gpu.up, gpu.max_nodes) == (
        360,
        "mit_normal_gpu",
        False,
        True,
        None,
    )
    assert (preemptable.max_minutes, preemptable.preemptable, preemptable.grace_s) == (2880, True, 5)
    assert cluster.partitions["mit_normal"].default and not gpu.default
    assert cluster.gpu_types() == ["h200", "h100", "l40s"] and cluster.gpu_types("mit_normal") == []
    first = cluster.nodes[0]
    assert (first.gpus, first.gpus_used["h200"], first.free_gpus("h200"), first.cpus) == (
        {"h200": 8},
        4,
        4,
        120,
    )
    assert (
        default_cpus(
            Site("x"),
            cluster,
            "mit_normal_gpu",
            2,
            "h200",
        )
        == 16
    )
    assert "[gpu_types.h200]\ngpus_per_node = 8" in site_text("x", "x", cluster, date(2026, 1, 1))


def test_recorded_queue_limits_and_accounts():
    jobs = read_jobs((RECORDED / "squeue-22.05.txt").read_text())
    assert [job.key for job in jobs] == ["72", "71", "70_[2-5%2]", "70_0", "70_1"]
    waiting, array = jobs[0], jobs[2]
    assert (waiting.state, waiting.reason, waiting.gpus) == ("PENDING", "QOSMaxGRESPerUser", {"h200": 2})
    assert (array.tasks, array.name, array.limit_minutes) == (4, "a|b c", 90)
    assert array.comment == "x JobState=RUNNING" and array.state == "PENDING"
    cluster = Cluster(my_jobs=jobs)
    assert cluster.used() == {"jobs": 3, "cpu": 3, "gres/gpu": 4, "gres/gpu:h200": 4}
    assert cluster.used(partition="mit_preemptable")["gres/gpu"] == 2
    limits = {row.name: row for row in read_qos((RECORDED / "qos-22.05.txt").read_text())}
    assert limits["mit_preemptable"].per_user == {"gres/gpu": 4} and limits["normal"].max_jobs is None
    rows = read_associations((RECORDED / "assoc-22.05.txt").read_text())
    assert [(row.account, row.qos) for row in rows] == [("mit_general", ("normal",)), ("root", ("normal",))]


@pytest.mark.parametrize("version", NODES)
def test_nodes_of_other_versions(version):
    (node,) = read_nodes(NODES[version])
    expected = {
        "16.05": ({}, {}, True, 24),
        "20.02": ({}, {}, False, 48),
        "20.11": ({"v100": 4}, {"v100": 1}, True, 16),
        "23.11": ({"a40": 1}, {"a40": 1}, True, 32),
        "24.11": ({"nvidia_b200": 4, "nvidia_b200_2g.45gb": 8}, {"nvidia_b200": 1}, True, 192),
        "25.05": ({"h100": 8}, {"h100": 0}, False, 20),
    }[version]
    gpus, free, usable, cpus = expected
    assert (node.gpus, node.usable, node.cpus) == (gpus, usable, cpus)
    assert {kind: node.free_gpus(kind) for kind in free} == free


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("gpu:h200:8", {"h200": 8}),
        ("gres:gpu:h200:2", {"h200": 2}),
        ("gres/gpu:H100:4", {"h100": 4}),
        ("gres/gpu:2", {"": 2}),
        ("gpu", {"": 1}),
        ("gpu:a100", {"a100": 1}),
        ("gpu:l40s:4(S:0-1),gpu:h100:2(IDX:0,1),nvme:1", {"l40s": 4, "h100": 2}),
        ("gpu:4(S:0-1)", {"": 4}),
        ("(null)", {}),
        ("N/A", {}),
        ("", {}),
        ("gpumem:80G", {}),
        ("gres/gpu:h100=4", {"h100": 4}),
    ],
)
def test_gpus_of_a_gres_text(text, expected):
    assert slurm.gpus(text) == expected


@pytest.mark.parametrize(
    ("text", "minutes"),
    [
        ("90", 90), ("06:00:00", 360), ("2-00:00:00", 2880), ("1-12", 2160), ("15:00", 15), ("00:30", 1),
        ("1-00:00:01", 1441),
        ("6h", 360), ("1d12h", 2160), ("45m", 45), ("90s", 2), ("1.5h", 90), ("UNLIMITED", None), ("", None),
        ("INVALID", None),
        ("-5", None), ("1:2:3:4", None), ("6 h", None), ("h", None), ("Partition_Limit", None),
    ],
)  # fmt: skip
def test_times(text, minutes):
    assert parse_minutes(text) == minutes


def test_times_there_and_back():
    for minutes in (1, 59, 60, 61, 1439, 1440, 2880, 100_000):
        assert parse_minutes(clock(minutes)) == minutes
    assert [words(m) for m in (0.2, 45, 360, 2160)] == ["< 1 min", "45 min", "6 h", "1 d 12 h"]


@pytest.mark.parametrize(
    ("text", "state"),
    [("CANCELLED by 1000", "CANCELLED"), ("COMPLETED+", "COMPLETED"), ("out_of_memory", "OUT_OF_MEMORY"),
     ("", "UNKNOWN"),
     ("BRAND_NEW_STATE", "BRAND_NEW_STATE")],
)  # fmt: skip
def test_states(text, state):
    assert slurm.state_of(text) == state


@pytest.mark.parametrize(
    ("key", "count"),
    [("12", 1), ("12_3", 1), ("12_[0-99%4]", 100), ("12_[1,3,5-7]", 5), ("1_[0-8:4]", 3), ("1_[x]", 1)],
)
def test_array_sizes(key, count):
    assert slurm.count_tasks(key) == count


@pytest.mark.parametrize(
    ("err", "text"),
    [
        ("sbatch: error: Batch job submission failed: Invalid qos specification", "Invalid qos specification"),
        ("allocation failure: Invalid feature specification", "Invalid feature specification"),
        ("sbatch: error: invalid partition specified: nope\n"
         "sbatch: error: Batch job submission failed: Invalid partition name specified",
         "Invalid partition name specified"),
        ("", "exit status 1"),
    ],
)  # fmt: skip
def test_refusals_in_sbatchs_own_words(err, text):
    assert slurm.refusal(slurm.Answer(1, "", err)) == text


def test_a_comment_cannot_change_the_state():
    line = "JobId=7 JobName=x JobState=PENDING Reason=Priority Comment=JobState=RUNNING Reason=None JobId=1"
    row = slurm.fields(line)
    assert (row["JobState"], row["Reason"], row["JobId"]) == ("PENDING", "Priority", "7")


def test_usage_of_recorded_jobs():
    found = {usage.job: usage for usage in read_usage((RECORDED / "sacct-22.05.txt").read_text())}
    first = found["43"]
    assert (first.name, first.gpus, first.cpus, first.limit_minutes, first.memory_mb) == (
        "first",
        1,
        8,
        360,
        64_000,
    )
    assert found["70_0"].name == "a|b c" and found["70_0"].peak_mb == 4 and found["70_0"].state == "COMPLETED"
    assert "too short to say" in "\n".join(show(first))


def test_usage_says_what_to_ask_next_time():
    header = FIELDS.replace(",", "|") + "\n"
    row = "9|COMPLETED|gpu|01:00:00|06:00:00|cpu=32,gres/gpu=4,mem=256G|||1|32|||x|train\n"
    step = "9.0|COMPLETED||01:00:00||||||32|{cpu}|{rss}|gres/gpuutil={util}|bash\n"
    idle = read_usage(header + row + step.format(cpu="02:00:00", rss="10240000K", util="20"))[0]
    text = " ".join(advice(idle))
    assert "--time 01:19:00" in text and "--mem 13G" in text and "--cpus 4" in text and "20 %" in text
    tight = read_usage(header + row + step.format(cpu="1-06:00:00", rss="250G", util="97"))[0]
    assert advice(tight) == [
        "--time 01:19:00: a shorter job starts sooner",
        "--mem 333G: it was close to its limit",
    ]


def test_usage_of_two_nodes_counts_a_node():
    row = "9|COMPLETED|gpu|01:00:00|01:10:00|cpu=32,gres/gpu=4,mem=256G|||2|32|1-00:00:00|||train\n"
    step = "9.0|COMPLETED||01:00:00|||||2|32|1-00:00:00|10240000K||bash\n"
    usage = read_usage(FIELDS.replace(",", "|") + "\n" + row + step)[0]
    assert advice(usage) == ["--mem 13G: the rest lay idle"] and "of 131.1 GB on each node" in "\n".join(
        show(usage)
    )


def test_noise_never_raises():
    """10,000 lines: recorded ones with bytes changed, cut and joined, through every reader."""
    rng = random.Random(7)
    lines = [
        line for path in sorted(RECORDED.glob("*.txt")) for line in path.read_text().splitlines()
    ] + list(NODES.values())
    alphabet = "|=, :/[]%-_\t\x00\x1b()0123456789abcXYZé\U0001f600"
    for _ in range(10_000):
        text = list(rng.choice(lines))
        for _ in range(rng.randrange(12)):
            text[rng.randrange(len(text))] = rng.choice(alphabet)
        line = "".join(text[: rng.randrange(len(text)) + 1])
        cluster = Cluster()
        read_partitions(line, cluster)
        nodes, jobs = read_nodes(line), read_jobs(line)
        read_qos(lines[-1] + "\n" + line)
        read_associations(line + "\n" + line)
        read_usage(line + "\n" + line)
        slurm.gpus(line), slurm.tres(line), slurm.state_of(line), slurm.count_tasks(line)
        assert all(isinstance(node.free_gpus(""), int) for node in nodes)
        assert all(job.base.isdigit() for job in jobs)


@pytest.mark.parametrize("accounting", [True, False])
def test_a_task_that_completes_is_counted_once(monkeypatch, tmp_path, accounting):
    """squeue still lists what the accounting, or without it the controller, knows to have ended."""
    said = {
        "sacct": Answer(0, "JobID|State\n12_0|COMPLETED\n12_1|CANCELLED by 0\n12_[3-4]|CANCELLED by 0\n", ""),
        "scontrol": Answer(
            0,
            "JobId=13 ArrayJobId=12 ArrayTaskId=0 JobState=COMPLETED\n"
            "JobId=14 ArrayJobId=12 ArrayTaskId=1 JobState=CANCELLED\n"
            "JobId=12 ArrayJobId=12 ArrayTaskId=3-4%1 JobState=CANCELLED\n",
            "",
        ),
    }
    if not accounting:
        said["sacct"] = Answer(1, "", "Slurm accounting storage is disabled")
    monkeypatch.setattr(slurm, "ask", lambda words, **_: said[words[0]])
    monkeypatch.setattr(slurm, "available", lambda: True)
    queue = [
        Job("12_1", "12", "COMPLETING", "None", "p", "x", {}),
        Job("12_2", "12", "RUNNING", "None", "p", "x", {}),
    ]
    monkeypatch.setattr(cluster_module, "my_jobs", lambda: queue)
    launch = book.Launch("x", 1, token="t", preset="p", trainer="t", runs=["out/x"], args=[], job_id="12")
    assert manage._states(tmp_path, [launch]) == {"x": {"RUNNING": 1, "COMPLETED": 1, "CANCELLED": 3}}
