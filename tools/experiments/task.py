"""A task of a SLURM array: the runs that its launch names, through run.sh, then their results.

    python -I task.py LAUNCH_FOLDER TASK

LAUNCH_FOLDER/tasks.json: {"tasks": [[[experiment folder, run_id], ...], ...], "together": bool}. A variant of a later
stage is trained only if the rules let it through (experiment.json: gate); else its runs are marked as skipped. Started
by its path from the experiment's copy of the code. A requeued task comes here again and goes on.
"""

import sys
from pathlib import Path

CODE = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(CODE))

import json
import os

from nanogpt.common.errors import run_command
from tools.experiments import collect, gate, records
from tools.experiments.execute import Executor


def main(argv: list[str]) -> int:
    """Run what is not finished yet; the exit status that SLURM is to see."""
    launch, task = Path(argv[0]), int(argv[1])
    orders = json.loads((launch / "tasks.json").read_bytes())
    experiments: dict[str, records.Experiment] = {}
    executor = Executor(Path.cwd(), dict(os.environ), in_job=True, say=lambda text: print(text, flush=True))
    executor.listen()
    pairs = []
    for folder, run_id in orders["tasks"][task]:
        experiment = experiments.setdefault(folder, records.read(Path(folder)))
        state = collect.verdicts(experiment)[run_id].state
        if state in ("finished", "failed"):
            print(f"{experiment.name} run {run_id}: {state} already", flush=True)
        else:
            pairs.append((experiment, run_id))
    open_ones = {e.name for e in gate.through(list({e.name: e for e, _ in pairs}.values()))}
    pairs = [pair for pair in pairs if pair[0].name in open_ones]
    if not pairs:
        return 0
    if orders["together"]:
        return executor.run_together(pairs, launch / f"plan-{task}.json")
    return executor.run_each(pairs)


if __name__ == "__main__":
    run_command(main)
