#!/bin/bash
#SBATCH --job-name=nanogpt-prepare-openwebtext
#SBATCH --partition=mit_normal
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=32
#SBATCH --mem=64G
#SBATCH --time=12:00:00
#SBATCH --output=logs/%x-%j.out
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@60

# OpenWebText as GPT-2 tokens, in $DATA_ROOT/openwebtext: hours of download and encoding; requeued, it goes on.
#   sbatch slurm/nanogpt/prepare_openwebtext.sh
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
go_on_later "$(made_folder name openwebtext "$@")" '*' python nanogpt/data/openwebtext/prepare.py "$@"
