#!/bin/bash
#SBATCH --job-name=modded-prepare-fineweb
#SBATCH --partition=mit_normal
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=4
#SBATCH --mem=16G
#SBATCH --time=06:00:00
#SBATCH --output=logs/%x-%j.out
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@60

# FineWeb's GPT-2 tokens for the speedrun, in $DATA_ROOT/fineweb10B: FINEWEB_CHUNKS (default 9) shards of 100 M tokens.
#   sbatch slurm/modded/prepare_fineweb.sh
#   FINEWEB_CHUNKS=3 sbatch slurm/modded/prepare_fineweb.sh
set -euo pipefail
for root in "$(dirname "${BASH_SOURCE[0]}")/../.." "${SLURM_SUBMIT_DIR:-.}" "${SLURM_SUBMIT_DIR:-.}/../.."; do
    if [ -f "$root/slurm/lib/submit.sh" ]; then break; fi
done
if [ ! -f "$root/slurm/lib/submit.sh" ]; then
    echo "error: $PWD: not in the repository; cd to its root and submit from there" >&2
    exit 2
fi
# shellcheck source=slurm/lib/submit.sh
. "$root/slurm/lib/submit.sh"

submit_unless_in_job "${BASH_SOURCE[0]}" "$@"
if [ "${1:-}" = -- ]; then shift; fi
begin_job
go_on_later "$(made_folder set fineweb10B "$@")" '*' python modded_nanogpt/data/cached_fineweb10B.py "${FINEWEB_CHUNKS:-9}" "$@"
