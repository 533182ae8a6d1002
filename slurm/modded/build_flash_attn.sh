#!/bin/bash
#SBATCH --job-name=build-flash-attn
#SBATCH --partition=mit_normal_gpu
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gres=gpu:h200:1
#SBATCH --cpus-per-task=15
#SBATCH --mem=120G
#SBATCH --time=05:00:00
#SBATCH --output=logs/%x-%j.out
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@60

# FlashAttention for one type of GPU, into the environment. No run needs it: torch's own attention is as fast here.
#   GPU_TYPE=h100 bash slurm/modded/build_flash_attn.sh --prebuilt          a pinned wheel, checked: two minutes
#   GPU_TYPE=h100 bash slurm/modded/build_flash_attn.sh [--fa2 | --fa3]     from source: an hour on CPUs, then cached
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

# shellcheck source=slurm/lib/flash_attn.sh
. "$ROOT/slurm/lib/flash_attn.sh"

if [[ " $* " != *" --prebuilt "* ]]; then submit_build_unless_in_job "${BASH_SOURCE[0]}" "$@"; fi
submit_unless_in_job "${BASH_SOURCE[0]}" "$@"
if [ "${1:-}" = -- ]; then shift; fi
begin_job
go_on_later "$(flash_attn_cache)" '*.o' build_flash_attn "$@"
