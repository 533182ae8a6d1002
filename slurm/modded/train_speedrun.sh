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

set_name=$(flag_of dataset "$@")
set_name=${set_name:-fineweb10B}
place=$(flag_of data_root "$@")
place=${place:-$(data_root)}

has_tokens() { # a set of $place, or a folder of its own
    local folder
    for folder in "$place/$set_name" "$set_name"; do
        if [ -e "$folder/manifest.json" ] || compgen -G "$folder/*_train_*.bin" >/dev/null; then return 0; fi
    done
    return 1
}

if ! has_tokens; then
    [ "$set_name" = fineweb10B ] || die "--dataset=$set_name: no tokens in $place/$set_name; prepare them first"
    if in_job || [ "${LOCAL:-0}" = 1 ] || [ "$place" != "$(data_root)" ]; then # GPUs must not wait for a download
        die "DATA_ROOT=$place: no fineweb10B there; prepare it first: sbatch slurm/modded/prepare_fineweb.sh"
    fi
    # shellcheck disable=SC2034  # for submit_unless_in_job
    first=slurm/modded/prepare_fineweb.sh
fi
submit_unless_in_job "${BASH_SOURCE[0]}" "$@"
begin_job
out=$(run_of "speedrun-${SLURM_ARRAY_JOB_ID:-${SLURM_JOB_ID:-local}}")
exec bash slurm/lib/run.sh "$trainer" --out_dir="$out" --auto_resume=true "$@"
