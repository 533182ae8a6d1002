"""A practice cluster: a real SLURM of several nodes on one Debian or Ubuntu machine, kept in one folder.

    from tools.practice import down, environment, status, up
    up(Path("/var/lib/engaging-practice"))     # seconds; safe to repeat
    env = {**os.environ, **environment(Path("/var/lib/engaging-practice"))}
    down(Path("/var/lib/engaging-practice"))

It has the partitions, GPU types and per-user limits of MIT Engaging's free tier. The GPUs are names only:
SLURM hands them out and counts them, and programs find none.
`python -m tools.practice up|down|status` does the same from a shell.
"""

from tools.practice.cluster import Options, down, status, up
from tools.practice.commands import environment

__all__ = ["Options", "down", "environment", "status", "up"]
