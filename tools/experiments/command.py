"""`engaging experiment`: a study from its configurations to the variant that goes on.

    engaging experiment run --config FILE_OR_FOLDER [--n-runs 2] [--dry-run]
    engaging experiment plan STUDY        runs, waves under your own limits, GPU-hours, cost, when it ends
    engaging experiment status STUDY      what is finished, failed, running, queued (and why), missing
    engaging experiment resume STUDY      start what is missing, and nothing else
    engaging experiment promote STUDY     A -> B -> C by written rules; --run starts the next stage
    engaging experiment sweep STUDY       tune every arm with the same number of trials, compare on fresh seeds
    engaging experiment ab A B --runs 8   two versions of the code in turn on this machine, and the verdict

STUDY: the name given to run --study, an experiment (its folder, or its name for the newest), or configurations.
Each has its own --help. The guide is docs/guide-3-experiments.md.
"""

import importlib

from nanogpt.common.errors import UserError
from nanogpt.common.flags import nearest

COMMANDS = {
    "run": "tools.experiments.run:main",
    "plan": "tools.experiments.plan:main",
    "status": "tools.experiments.status:status",
    "resume": "tools.experiments.status:resume",
    "promote": "tools.experiments.advance:main",
    "sweep": "tools.experiments.sweep:main",
    "ab": "tools.experiments.ab:main",
}


def main(argv: list[str]) -> int:
    """The command. Flags may be written with - or _: `--n_runs`, `--n_gpus`, `--dry_run` as users know them."""
    if not argv or argv[0] in ("-h", "--help", "help"):
        print("usage: engaging experiment COMMAND [...]\n\n" + (__doc__ or "").strip())
        return 0
    name = argv[0]
    if name not in COMMANDS:
        raise UserError(
            f"engaging experiment {name[:60]!r}: no such command{nearest(name, list(COMMANDS))} "
            f"(there are: {', '.join(COMMANDS)})"
        )
    module, _, function = COMMANDS[name].partition(":")
    return getattr(importlib.import_module(module), function)(dashed(argv[1:]))


def dashed(words: list[str]) -> list[str]:
    """`--n_runs` as `--n-runs`, up to a lone `--`: what follows belongs to the trainer."""
    cut = words.index("--") if "--" in words else len(words)
    found = []
    for word in words[:cut]:
        name, equals, value = word.partition("=")
        found.append((name.replace("_", "-") if name.startswith("--") else name) + equals + value)
    return found + words[cut:]
