#!/bin/bash
#SBATCH --job-name=nanogpt-train-gpt2
#SBATCH --partition=mit_preemptable
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gres=gpu:h200:4
#SBATCH --cpus-per-gpu=8
#SBATCH --mem-per-gpu=64G
#SBATCH --time=2-00:00:00
#SBATCH --output=logs/%x-%j.out
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@120

# The baseline's GPT-2 124M on OpenWebText: days, result in out/nanogpt-gpt2. Preempted or out of time, it saves,
# requeues itself and goes on.
#   sbatch slurm/nanogpt/train_gpt2.sh [--learning_rate=3e-4 ...]
#   sbatch --nodes=2 --gres=gpu:h200:2 slurm/nanogpt/train_gpt2.sh  two nodes
#   sbatch --partition=YOURS --nodes=2 --gres=gpu:h200:4 slurm/nanogpt/train_gpt2.sh   more than a free account
#   GPU_TYPE=h100 NUM_GPUS=2 TIME=6h bash slurm/nanogpt/train_gpt2.sh
#   srun --ntasks-per-node=1 bash slurm/nanogpt/train_gpt2.sh       inside an allocation
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

out=$(run_of nanogpt-gpt2)
need_data openwebtext slurm/nanogpt/prepare_openwebtext.sh --out_dir="$out" "$@"
submit_unless_in_job "${BASH_SOURCE[0]}" "$@"
if [ "${1:-}" = -- ]; then shift; fi
begin_job
exec bash slurm/lib/run.sh nanogpt.train train_gpt2 --out_dir="$out" --auto_resume=true "$@"
