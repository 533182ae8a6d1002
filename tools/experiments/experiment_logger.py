"""Does writing experiments work here? Makes one of two made-up runs in a temporary folder, and reads it back.

    python experiment_logger.py

What writes the real ones is records.py and collect.py.
"""

import json
import sys
import tempfile
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])  # this folder's queue.py is not the standard library's

from nanogpt.common.errors import UserError, run_command
from tools.experiments import collect, records
from tools.experiments.config import ExperimentConfig
from tools.experiments.trainer import Trainer

LOSSES = (3.275, 3.282)
FILES = ("experiment.log", "config.json", "results.jsonl", "metrics.jsonl", "summary.json")


def main(argv: list[str]) -> int:
    """Write, read back, say so."""
    if argv:
        print((__doc__ or "").strip())
        return 0 if argv[0] in ("-h", "--help") else 2
    with tempfile.TemporaryDirectory() as folder:
        experiment = _made_up(Path(folder) / "logger_test_20241207_143022")
        collect.collect(experiment)
        found = json.loads((experiment.folder / "summary.json").read_text())["statistics"]
        lost = [name for name in FILES if not (experiment.folder / name).is_file()]
        if lost or found["successful_runs"] != len(LOSSES):
            raise UserError(
                f"{folder}: {', '.join(lost) or 'a run'} was written and is not there; check this disk"
            )
        print(collect.summary_text(experiment))
    print(f"\nThe experiment logger works: {', '.join(FILES)} were written and read back.")
    return 0


def _made_up(folder: Path) -> records.Experiment:
    """An experiment whose script has printed its lines and ended."""
    config = ExperimentConfig(experiment_name="logger_test", script="train_gpt.py", n_runs=len(LOSSES))
    experiment = records.Experiment(folder, config, Trainer("train_gpt.py", False, False, False), 0)
    folder.mkdir()
    experiment.save()
    for (run, seed), loss in zip(experiment.runs, LOSSES, strict=True):
        shelf = experiment.run_folder(run)
        shelf.mkdir(parents=True)
        (shelf / "stdout.log").write_text(
            "step:0/125 val_loss:10.8258 train_time:0ms step_avg:nanms\n"
            "step:125/125 train_loss:3.3000 train_time:15000ms step_avg:120.00ms\n"
            f"step:125/125 val_loss:{loss:.4f} train_time:15000ms step_avg:120.00ms\n"
        )
        collect.write_outcome(shelf, exit=0, gpus=[])
        experiment.log(f"run {run} seed {seed}: finished")
    return experiment


if __name__ == "__main__":
    run_command(main)
