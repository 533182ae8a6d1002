#!/bin/bash
#SBATCH --job-name=modded-speedrun
#SBATCH --partition=mit_normal_gpu
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gres=gpu:h200:8
#SBATCH --cpus-per-gpu=8
#SBATCH --mem-per-gpu=120G
#SBATCH --time=06:00:00
#SBATCH --output=logs/%x-%j.out
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@120

# The speedrun on 8x H200, result in out/speedrun-<job>. A free account gets fewer GPUs at once.
#   sbatch slurm/modded/train_speedrun.sh
#   GPU_TYPE=h100 NUM_GPUS=2 bash slurm/modded/train_speedrun.sh    submits itself, and the data's job first if needed
# SPEEDRUN_TRAINER=nanogpt.train puts another trainer behind the same path (the tests do, with its flags as arguments).
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

trainer=${SPEEDRUN_TRAINER:-modded_nanogpt.train_gpt}
file=${trainer//.//}.py
if [ "${trainer%.py}" != "$trainer" ]; then file=$trainer; fi
case $file in /*) ;; *) file=$ROOT/$file ;; esac
[ -f "$file" ] || die "$trainer: this checkout has no such trainer yet; update it: git pull"

out=$(run_of "speedrun-${SLURM_ARRAY_JOB_ID:-${SLURM_JOB_ID:-local}}")
need_data fineweb10B slurm/modded/prepare_fineweb.sh --out_dir="$out" "$@"
submit_unless_in_job "${BASH_SOURCE[0]}" "$@"
if [ "${1:-}" = -- ]; then shift; fi
begin_job
exec bash slurm/lib/run.sh "$trainer" --out_dir="$out" --auto_resume=true "$@"
