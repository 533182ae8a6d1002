#!/bin/bash
# here_or_srun.sh [--say NAME] COMMAND...: runs the command here; on a cluster's login node, where nothing should
# compute, by srun on the site's partition for tests, with its output as it comes. --say only prints that line, and
# fails. HERE=1 runs it here all the same.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=submit.sh
. "$(dirname "${BASH_SOURCE[0]}")/submit.sh"

on_login_node() {
    [ "${HERE:-0}" != 1 ] && ! in_job && command -v sbatch >/dev/null 2>&1 && command -v srun >/dev/null 2>&1 &&
        ask_cluster
}

srun_words() { # sets words: srun and its options
    local partition minutes
    site=$(site_file) || exit 2
    partition=$(sed -n 's/^test_partition *= *"\([A-Za-z0-9_.-]*\)".*/\1/p' "$site")
    if [ -n "$partition" ] && ! has_partition "$partition"; then partition=""; fi
    words=(srun)
    if [ -n "$partition" ]; then words+=("--partition=$partition"); fi
    minutes=$(partition_minutes "${partition:-none}")
    if [ -z "$minutes" ] || [ "$minutes" -gt 60 ]; then minutes=60; fi
    words+=(--ntasks=1 --cpus-per-task=4 --mem=16G "--time=$minutes" --unbuffered)
}

name=""
if [ "${1:-}" = --say ]; then
    name=$2
    shift 2
fi
if ! on_login_node; then
    if [ -n "$name" ]; then exit 0; fi
    exec "$@"
fi
srun_words
if [ -n "$name" ]; then
    die "$name: this is a login node, where nothing should compute; run: ${words[*]} $name (or HERE=1 $name)"
fi
note "this is a login node: ${words[*]} ... (HERE=1 runs it here)"
exec ${words[@]+"${words[@]}"} "$@"
