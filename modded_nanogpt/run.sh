#!/usr/bin/env bash
# The speedrun on this machine's GPUs (1, 2, 4 or 8), outside of SLURM or inside a job; flags go to the trainer.
#   cd modded_nanogpt && ./run.sh                     NUM_GPUS=2 ./run.sh --out_dir=../out/two-gpus
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
exec bash "$root/slurm/lib/run.sh" modded_nanogpt.train_gpt "$@"
