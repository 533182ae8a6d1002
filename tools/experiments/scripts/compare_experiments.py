"""`engaging compare` as the document names it: `python scripts/compare_experiments.py BASELINE VARIANT`."""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[3])  # the checkout

from tools.experiments import door

if __name__ == "__main__":
    door.enter("compare")
