#!/bin/bash
# sbatch_as_typed.sh WORDS...: `sbatch WORDS...` for this repository's scripts, as people type it (see sbatch.sh).
#
# The shell has filled in the words already: `GPU_TYPE=h100 NUM_GPUS=2 sbatch --gres=gpu:${GPU_TYPE}:${NUM_GPUS} ...` comes
# here as `--gres=gpu::` with both variables set. Remarks go to stderr: `$(sbatch --parsable ...)` stays a number.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=submit.sh
. "$(dirname "${BASH_SOURCE[0]}")/submit.sh"

is_ours() { # the script lies in this repository and is one of those that submit.sh is for
    local folder
    [ -f "$script" ] || return 1
    folder=$(cd "$(dirname "$script")" && pwd -P) || return 1
    [[ $folder/ == "$ROOT"/* ]] && grep -q 'slurm/lib/submit\.sh' "$script"
}

choose_partition() { # where the header's partition cannot take it: one that can, two for a job that can resume
    local header name reason here="" fits=() most=1 minutes limit
    header=$(header_value "$script" partition)
    minutes=$(minutes_of "${SBATCH_TIMELIMIT:-$(header_value "$script" time)}")
    if [ -n "$(said time)" ]; then minutes=$(minutes_of "$(said time)"); fi
    partition=$(said partition)
    partition=${partition:-${SBATCH_PARTITION:-}}
    if [ -n "$partition" ]; then
        limit=$(partition_minutes "${partition%%,*}")
        if [ -z "$(said time)${SBATCH_TIMELIMIT:-}" ] && [ -n "$limit" ] && [ "${minutes:-0}" -gt "$limit" ]; then
            typed+=("--time=$(clock_of "$limit")")
            note "${typed[-1]}: all that ${partition%%,*} gives"
            minutes=$limit
        fi
        reason=$(why_not "$partition" "$type" "$gpus" "$nodes" "${minutes:-1}")
        if [[ $partition != *,* && ($reason == has* || $reason == "is not"*) ]]; then
            die "--partition=$partition: $partition $reason; engaging plan shows what can start where"
        fi
        own_limit "$partition" "${minutes:-1}"
        return 0
    fi
    if grep -q '^#SBATCH --signal' "$script"; then most=2; fi
    for name in $(candidates gpu "$header"); do
        reason=$(why_not "$name" "$type" "$gpus" "$nodes" "${minutes:-1}")
        if [ -z "$reason" ]; then fits+=("$name"); fi
        if [ "$name" = "$header" ] && [[ -z $reason || $reason == "gives one user"* ]]; then here=$name; fi
        if [ "${fits[0]:-}" = "$header" ] || [ ${#fits[@]} -eq "$most" ]; then break; fi
    done
    partition=$header
    if [ "${fits[0]:-}" = "$header" ]; then return 0; fi
    if [ ${#fits[@]} -gt 0 ]; then
        partition=$(IFS=,; echo "${fits[*]}")
        typed+=("--partition=$partition")
        note "--partition=$partition: $header $(why_not "$header" "$type" "$gpus" "$nodes" "${minutes:-1}")"
    elif [ -n "$here" ]; then
        own_limit "$here" "${minutes:-1}"
    else
        PARTITION="" NODES=${nodes#1} GPU_TYPE=$type NUM_GPUS=$gpus
        refuse "$(reasons_everywhere "$header" "${minutes:-1}")" "$gpus" "$type" "$nodes" gpu "$header"
    fi
}

note_mixed() { # GPUs without a type on several nodes: SLURM takes nodes of several types, and the slowest sets the pace
    local types
    if [ "$nodes" -lt 2 ] || [ -n "$type" ]; then return 0; fi
    # shellcheck disable=SC2154  # ask_cluster sets live
    types=$(awk -F'|' -v p="${partition%%,*}" '$1 == p { print $3 }' <<<"$live" | grep -oE 'gpu:[A-Za-z][^:,(]*' | sort -u) || return 0
    if [ "$(wc -l <<<"$types")" -lt 2 ]; then return 0; fi
    note "--gres=gpu:$gpus names no type, and ${partition%%,*} has several: the nodes may differ, and the slowest sets" \
        "the pace; --gres=$(header_type_or "$types"):$gpus"
}

header_type_or() { # TYPES: the header's, where it is among them, else the first
    local header
    header=$(header_value "$script" gres)
    header=${header%:*}
    if grep -qx -- "$header" <<<"$1"; then echo "$header"; else head -n 1 <<<"$1"; fi
}

reasons_everywhere() { # HEADERS_PARTITION MINUTES: why each partition with GPUs cannot take it
    local name text=""
    for name in $(candidates gpu "$1"); do
        if [ -z "$(gpu_row "$name" "")" ]; then continue; fi
        text+="${text:+, }$name $(why_not "$name" "$type" "$gpus" "$nodes" "$2")"
    done
    printf '%s' "$text"
}

own_limit() { # PARTITIONS MINUTES: sets never where the user's own limit forbids it in each of them
    local name reason most=0
    for name in ${1//,/ }; do
        reason=$(why_not "$name" "$type" "$gpus" "$nodes" "$2")
        if [[ $reason != "gives one user"* ]]; then return 0; fi
        reason=${reason#gives one user }
        if [ "${reason% GPU*}" -gt "$most" ]; then most=${reason% GPU*}; fi
    done
    never="$(counted $((gpus * nodes)) GPU) asked, your limit is $most"
}

ask_slurm() { # JOB: sets never to SLURM's reason, where that is one that does not pass; asked once
    local reason
    reason=$(timeout 2 squeue -h -j "$1" -o %r 2>/dev/null | head -n 1) || reason=""
    case $reason in
        PartitionTimeLimit | PartitionNodeLimit | PartitionConfig | BadConstraints | InvalidAccount | InvalidQOS | \
            QOSMax*PerJob* | AssocMax*PerJob* | QOSMaxWallDuration* | DependencyNeverSatisfied)
            never="SLURM says $reason"
            ;;
    esac
}

submit_as_typed() { # sbatch itself, its answer as it gives it, and then the one question
    local answer status=0 job
    # shellcheck disable=SC2154  # parse_line sets arguments
    local after=(${arguments[@]+"${arguments[@]}"})
    if [[ " ${typed[*]} " == *" --test-only "* || " ${typed[*]} " == *" --wait "* ]]; then
        exec sbatch ${typed[@]+"${typed[@]}"} "$script" ${after[@]+"${after[@]}"}
    fi
    answer=$(sbatch ${typed[@]+"${typed[@]}"} "$script" ${after[@]+"${after[@]}"}) || status=$?
    if [ -n "$answer" ]; then printf '%s\n' "$answer"; fi
    if [ "$status" -ne 0 ]; then exit "$status"; fi
    job=$(job_number "$answer")
    if [ -z "$job" ]; then return 0; fi
    if [ -z "$never" ]; then ask_slurm "$job"; fi
    if [ -n "$never" ]; then
        printf 'warning: job %s will never start: %s; engaging why %s\n' "$job" "$never" "$job" >&2
    fi
}

main() {
    local name variable value
    parse_line "$@"
    if [ -n "$(said wrap)" ] || ! is_ours; then exec sbatch "$@"; fi
    if grep -q $'\r' "$script"; then die "$script: has Windows line ends; sed -i 's/\\r\$//' $(printf '%q' "$script")"; fi
    if in_job; then
        note "submitted from inside job $SLURM_JOB_ID, whose settings do not go along"
        for name in $(compgen -v SLURM_) RUN_GPUS RUN_STORE RUN_FOLDER; do
            if [ "$name" != SLURM_CONF ]; then unset "$name"; fi
        done
    fi
    check_settings
    if [ -n "$(said gpus-per-task)" ]; then
        die "--gpus-per-task=$(said gpus-per-task): one task a node starts a rank for each of its GPUs; type --gres=gpu:NUMBER"
    fi
    script=$(cd "$(dirname "$script")" && pwd -P)/$(basename "$script")
    nodes=$(said nodes)
    nodes=${nodes:-$(header_value "$script" nodes)}
    nodes=${nodes%%-*}
    is_number "$nodes" || nodes=1
    for name in account:SBATCH_ACCOUNT qos:SBATCH_QOS; do
        variable=${name#*:} name=${name%:*}
        if [ -z "$(said "$name")${!variable:-}" ]; then value=$(engaging_setting "$name"); else value=""; fi
        if [ -n "$value" ]; then typed+=("--$name=$value"); fi
    done
    warn_about_account "$(said account)" "$(said qos)"
    note_time "$(said time)"
    note_export
    check_flags "$script" ${arguments[@]+"${arguments[@]}"}
    gpus="" never="" QOS=$(said qos)
    if [ -n "$(header_value "$script" gres)" ] && fill_gpus; then
        fit_node_share "$script"
        if ask_cluster; then
            # shellcheck disable=SC2034  # for cluster.sh
            site=$(site_file) || exit 2
            choose_partition
            note_mixed
        fi
        if [ -n "$filled" ]; then note "$filled"; fi
    fi
    wait_for_data
    if [ -z "$(said array)" ]; then note_same_run "$script" ${arguments[@]+"${arguments[@]}"}; fi
    if [ -z "$(said output)$(said chdir)" ]; then
        need_log_folder
        if [ "$PWD" != "$ROOT" ]; then note "submitted from $ROOT, where its log goes"; fi
        cd "$ROOT" # where logs/ is
    fi
    keep_code
    submit_as_typed
}

wait_for_data() { # a training job behind one's own job that prepares its tokens
    local needs
    read -r -a needs < <(sed -n 's/^need_data \([^ ]*\) \([^ ]*\) .*/\1 \2/p' "$script") || return 0
    if [ -n "$(said dependency)" ] || [ ${#needs[@]} -ne 2 ]; then return 0; fi
    need_data "${needs[@]}" ${arguments[@]+"${arguments[@]}"}
    if [ -n "$first" ]; then
        warn "no ${needs[0]} in $(data_root): the job will end with that as soon as it starts; first: sbatch $first"
    fi
    if [ -n "$behind" ]; then
        typed+=("--dependency=afterany:$behind")
        note "it waits for your job $behind, which prepares ${needs[0]}"
    fi
}

main "$@"
