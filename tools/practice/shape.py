"""What the practice cluster looks like: nodes, partitions, limits, after MIT Engaging's documents of 2026-08.

Counts are small, shapes are real: an H200 node there has 120 cores and 8 GPUs. `pi_lab` stands for a group's
own partition: no limits, and its jobs push those of mit_preemptable off the nodes, as owners' jobs do there.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Node:
    """One node: `gpu_type` is empty on a CPU node; `weight` makes untyped GPU requests go to the lightest."""

    name: str
    cpus: int
    memory_mb: int
    gpu_type: str = ""
    gpus: int = 0
    weight: int = 1


@dataclass(frozen=True)
class Partition:
    """One partition: `tier` decides who preempts whom, `limits` are per user in SLURM's TRES words."""

    name: str
    nodes: str
    max_time: str
    tier: int = 10
    preemptable: bool = False
    default: bool = False
    limits: str = ""
    max_jobs: int = 500


NODES = (
    Node("node1", 120, 2063000, "h200", 8, weight=30),
    Node("node2", 120, 2063000, "h200", 8, weight=30),
    Node("node3", 64, 1031000, "h100", 4, weight=20),
    Node("node4", 64, 1031000, "h100", 4, weight=20),
    Node("node5", 64, 1031000, "l40s", 4, weight=10),
    Node("node6", 64, 1031000, "a100", 4, weight=20),
    Node("node7", 96, 386000),
    Node("node8", 96, 386000),
)

# The H100 and A100 nodes belong to groups: the public reaches them through mit_preemptable only.
PARTITIONS = (
    Partition("mit_normal", "node[7-8]", "12:00:00", default=True, limits="cpu=96"),
    Partition("mit_normal_gpu", "node[1-2,5]", "06:00:00", limits="gres/gpu=2,cpu=32"),
    Partition("mit_quicktest", "node[7-8]", "00:15:00", limits="cpu=48"),
    Partition(
        "mit_preemptable",
        "node[1-8]",
        "2-00:00:00",
        tier=1,
        preemptable=True,
        limits="gres/gpu=4,cpu=1024",
    ),
    Partition("pi_lab", "node[1-8]", "7-00:00:00", tier=20),
)

ACCOUNT = "mit_general"
CLUSTER = "practice"
