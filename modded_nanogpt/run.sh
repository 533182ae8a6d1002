#!/usr/bin/env bash
# The speedrun on this machine's GPUs. With fewer than 8 of them, change the 8 in the last line to 4, 2 or 1: a step is
# the same for any number. FineWeb's tokens are downloaded first where they are missing. Flags go to the trainer.
#   cd modded_nanogpt && ./run.sh                     ./run.sh snapshot --seed=2 --out_dir=../out/second
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source-path=SCRIPTDIR source=../slurm/lib/common.sh
. "$here/../slurm/lib/common.sh"

place=$(flag_of data_root "$@")
place=${place:-$(data_root)}
folder=$place/fineweb10B
if [ -z "$(flag_of dataset "$@")" ] && ! [[ " $* " =~ " -h "|" --help " ]] && [ ! -e "$folder/manifest.json" ] &&
    ! compgen -G "$folder/*_train_*.bin" >/dev/null; then
    python "$here/data/cached_fineweb10B.py" --data_root="$place"
fi
exec torchrun --standalone --nproc_per_node=8 "$here/train_gpt.py" "$@"
