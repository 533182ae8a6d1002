"""The pages about the cluster, and what becomes of each command in them: run on a real SLURM, or not run and why.

tests/docs/test_docs.py sees that no command is without an entry here and no entry without a command;
tests/slurm/test_guide.py runs them.
"""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = tuple(
    ROOT / "docs" / name
    for name in ("guide-1-cluster.md", "guide-2-speedrun.md", "engaging.md", "troubleshooting.md")
)
NOT_RUN = {  # pattern: reason
    r"ssh .*": "there is no login node here",
    r"git clone .*": "needs a network",
    r"cd .*": "the test's clone is the current folder",
    r"bash setup_env\.sh|source activate_env\.sh": "tests/environment runs them",
    r"engaging watch .*": "a screen that waits for a key: test_advice.py has it on a terminal",
    r"engaging drill": "tests/slurm/test_drill.py",
    r"cat ~/orcd/\.quota": "Engaging's own file",
    r"module avail .*": "no module system here; test_branches.py has the scripts without one",
}
RUN = {  # pattern: what is demanded; see test_guide.py
    r"sbatch .*prepare_\w+\.sh": "prepares",
    r"FINEWEB_CHUNKS=3 sbatch .*": "prepares",
    r"sbatch slurm/modded/train_speedrun\.sh": "waits for ever",
    r"sbatch .*train_\w+\.sh.*": "trains",
    r"GPU_TYPE=\w+ NUM_GPUS=\d+ sbatch .*": "needs the function",
    r"GPU_TYPE=.* bash slurm/modded/train_speedrun\.sh": "trains",
    r"srun --ntasks-per-node=1 bash .*": "trains in an allocation",
    r"DRY_RUN=1 NODES=2 NUM_GPUS=4 .*": "is refused",
    r"DRY_RUN=1 .*": "prints sbatch",
    r"(export|unset) .*|scancel JOBID|touch .*|rm .*": "works",
    r"cat logs/.*": "works after the job",
    r"tail -f .*": "shows the log",
    r"srun --partition=mit_quicktest .*nanogpt\.sample.*": "samples",
    r"engaging (why|usage|plot) .*": "works after the job",
    r"engaging (doctor|plan .*|launch .*--dry-run .*)": "answers",
    r"(sinfo|scontrol|sacctmgr|squeue|sacct) .*": "answers",
}


def bash_lines(page: Path) -> list[str]:
    """The commands in the page's ```bash blocks."""
    blocks = re.findall(r"^```bash\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    lines = (line.strip() for block in blocks for line in block.replace("\\\n", " ").splitlines())
    return [line for line in lines if line and not line.startswith("#")]


def demanded(line: str) -> str:
    """What RUN demands of a command; "" for one that is not run."""
    if any(re.fullmatch(pattern, line) for pattern in NOT_RUN):
        return ""
    return next((what for pattern, what in RUN.items() if re.fullmatch(pattern, line)), "unknown")


def problems() -> list[str]:
    """Commands without an entry, and entries without a command."""
    lines = [line for page in PAGES for line in bash_lines(page)]
    entries = {**NOT_RUN, **RUN}
    unknown = [f"no entry: {line}" for line in lines if demanded(line) == "unknown"]
    unused = [key for key in entries if not any(re.fullmatch(key, line) for line in lines)]
    return unknown + [f"no command: {entry}" for entry in unused]
