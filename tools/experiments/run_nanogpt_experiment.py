"""The document's own command, after `cd tools/experiments`: what follows is `engaging experiment run`'s.

python run_nanogpt_experiment.py --config configs/stage_a_screening/palm_screening.json --n_runs 2
python run_nanogpt_experiment.py --config configs/baseline.json --dry_run
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])  # this folder's queue.py is not the standard library's

from tools.experiments import door

if __name__ == "__main__":
    door.enter("experiment", "run")
