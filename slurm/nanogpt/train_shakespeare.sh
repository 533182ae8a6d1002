#!/bin/bash
#SBATCH --job-name=nanogpt-train-shakespeare
#SBATCH --partition=mit_normal_gpu
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gres=gpu:1
#SBATCH --cpus-per-gpu=8
#SBATCH --mem-per-gpu=32G
#SBATCH --time=01:00:00
#SBATCH --output=logs/%x-%j.out
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@120

# The baseline on tiny Shakespeare: some minutes on one GPU, result in out/nanogpt-shakespeare.
#   sbatch slurm/nanogpt/train_shakespeare.sh [--max_iters=2000 ...]
#   GPU_TYPE=h200 bash slurm/nanogpt/train_shakespeare.sh          submits itself with what that asks for
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

out=$(run_of nanogpt-shakespeare)
need_data shakespeare_char slurm/nanogpt/prepare_shakespeare.sh --out_dir="$out" "$@"
submit_unless_in_job "${BASH_SOURCE[0]}" "$@"
if [ "${1:-}" = -- ]; then shift; fi
begin_job
exec bash slurm/lib/run.sh nanogpt.train train_shakespeare_char --out_dir="$out" --auto_resume=true "$@"
