# shellcheck shell=bash
# A script run with `bash` outside a job submits itself: GPU_TYPE, NUM_GPUS, NODES, PARTITION, TIME, ACCOUNT and QOS
# become sbatch's options, checked against the live cluster, so that what can never start is refused before it queues.
# The one file that the scripts source.

for part in common cluster options code data requeue; do
    # shellcheck source-path=SCRIPTDIR source=/dev/null
    . "$(dirname "${BASH_SOURCE[0]}")/$part.sh"
done

plan_job() { # SCRIPT: sets options (sbatch's), from the script's header, the settings and the cluster
    local script=$1 header_gres kind=cpu type="" gpus=0 nodes=${NODES:-} partition="" asked wanted name reason
    local reasons="" row header_partition most
    ask_cluster || die "sinfo: $(why_silent)"
    # shellcheck disable=SC2034  # for cluster.sh
    site=$(site_file) || exit 2
    header_gres=$(header_value "$script" gres)
    header_partition=$(header_value "$script" partition)
    nodes=${nodes:-$(header_value "$script" nodes)}
    nodes=${nodes:-1}
    if [ -n "$header_gres" ]; then
        kind=gpu
        gpus=${NUM_GPUS:-${header_gres##*:}}
        type=${GPU_TYPE:-$(sed -n 's/^gpu:\([a-z][^:]*\):.*/\1/p' <<<"$header_gres")}
    elif [ -n "${NUM_GPUS:-}${GPU_TYPE:-}" ]; then
        warn "${script#"$ROOT"/} needs no GPU: NUM_GPUS and GPU_TYPE are not asked for"
    fi
    asked=$(minutes_of "${TIME:-$(header_value "$script" time)}")
    wanted=$asked
    local try
    for try in "$type" ""; do # a type that only the header names may be missing on another cluster
        reasons=""
        for name in $(candidates "$kind" "$header_partition"); do
            most=$(partition_minutes "$name")
            wanted=$asked
            if [ -z "${TIME:-}" ] && [ -n "$most" ] && [ "$asked" -gt "$most" ]; then wanted=$most; fi
            reason=$(why_not "$name" "$try" "$gpus" "$nodes" "$wanted")
            if [ -z "$reason" ]; then partition=$name type=$try; break 2; fi
            if [ "$kind" = gpu ] && [ -z "${PARTITION:-}" ] && [ -z "$(gpu_row "$name" "")" ]; then continue; fi
            reasons+="${reasons:+, }$name $reason"
        done
        if [ -n "${GPU_TYPE:-}" ] || [ -z "$type" ] || type_is_here "$type"; then break; fi
    done
    [ -n "$partition" ] || refuse "$reasons" "$gpus" "$type" "$nodes" "$kind" "$header_partition"
    if [ -n "${PARTITION:-}" ]; then partition=$PARTITION; fi
    options=("--partition=$partition" "--nodes=$nodes" --ntasks-per-node=1 "--time=$(clock_of "$wanted")")
    if [ "$kind" = gpu ]; then
        row=$(gpu_row "${partition%%,*}" "$type")
        size_gpu_job "$type" "$gpus" "$row" "$script"
    fi
    if [ -n "${ACCOUNT:-}" ]; then options+=("--account=$ACCOUNT"); fi
    if [ -n "${QOS:-}" ]; then options+=("--qos=$QOS"); fi
}

why_silent() { # what to do where the cluster says nothing
    if [[ $(timeout 20 sinfo -h 2>&1 || :) == *"configuration source"* ]]; then
        echo "SLURM's commands are here, but no cluster is configured (no slurm.conf, no SLURM_CONF); log in to a" \
            "cluster's login node, or run it on this machine: LOCAL=1 bash ..."
    else
        echo "SLURM does not answer; try again in a few minutes"
    fi
}

size_gpu_job() { # TYPE GPUS "gpus cpus memory nodes" SCRIPT: CPUs and memory by the GPU, never more than its share
    local type=$1 gpus=$2 on_node cpus memory share_cpus share_memory
    read -r on_node share_cpus share_memory _ <<<"$3"
    share_cpus=$((share_cpus / on_node)) share_memory=$((share_memory / on_node / 1000))
    cpus=$(site_value "gpu_types.$type" cpus_per_gpu)
    cpus=${cpus:-$(site_value defaults cpus_per_gpu)}
    memory=$(site_value "gpu_types.$type" mem_gb_per_gpu)
    memory=${memory:-$(site_value defaults mem_gb_per_gpu)}
    if [ "$cpus" -gt "$share_cpus" ]; then cpus=$share_cpus; fi
    if [ "$memory" -gt "$share_memory" ]; then memory=$share_memory; fi
    if [ "$cpus" -lt 1 ]; then cpus=1; fi
    if [ "$memory" -lt 1 ]; then memory=1; fi
    options+=("--gres=gpu:${type:+$type:}$gpus")
    if [ -n "$(header_value "$4" cpus-per-task)" ]; then # the two ways of counting contradict each other
        options+=("--cpus-per-task=$((cpus * gpus))" "--mem=$((memory * gpus))G")
    else
        options+=("--cpus-per-gpu=$cpus" "--mem-per-gpu=${memory}G")
    fi
}

refuse() { # REASONS GPUS TYPE NODES KIND HEADERS_PARTITION
    local name row nodes limit best=0 asked advice="PARTITION=NAME (or --partition) names another one (engaging plan shows yours)"
    if [ "$5" = gpu ]; then
        for name in $(candidates gpu "$6"); do
            row=$(gpu_row "$name" "$3")
            limit=$(gpu_limit "$name")
            row=${row%% *}
            if [ -n "$row" ] && [ -n "$limit" ] && [ "$row" -gt $((limit / $4)) ]; then row=$((limit / $4)); fi
            if [ "${row:-0}" -le "$best" ]; then continue; fi
            nodes=$(gpu_row "$name" "$3" "$row")
            if [ "${nodes##* }" -ge "$4" ]; then best=$row; fi
        done
        if [ "$best" -gt 0 ] && [ "$best" -lt "$2" ]; then advice="NUM_GPUS=$best would start; $advice"; fi
    fi
    asked=()
    for name in GPU_TYPE NUM_GPUS NODES PARTITION TIME QOS; do
        if [ -n "${!name:-}" ]; then asked+=("$name=${!name}"); fi
    done
    die "${asked[*]:-its header}: nothing here can start that: ${1:-there is no partition for it}; $advice"
}

need_log_folder() { # SLURM starts no job whose log it cannot open, and says so nowhere
    local probe
    mkdir -p "$ROOT/logs" 2>/dev/null || die "$ROOT/logs: cannot be made; is it a dead link, or a full quota?"
    probe=$(mktemp "$ROOT/logs/.probe-XXXXXX" 2>/dev/null) || die "$ROOT/logs: cannot be written; check your quota"
    if ! head -c 65536 /dev/zero >"$probe" 2>/dev/null; then
        rm -f "$probe"
        die "$ROOT/logs: the disk or your quota is full; make room first"
    fi
    rm -f "$probe"
}

show_command() { # the words, quoted as a shell takes them
    printf 'sbatch'
    printf ' %q' "$@"
    printf '\n'
}

job_number() { # ANSWER: the job's number in what sbatch has printed; a site's greeting there may hold numbers, too
    sed -n 's/^\(Submitted batch job \)\{0,1\}\([0-9][0-9]*\)\(;[^ ]*\| on .*\)\{0,1\}$/\2/p' <<<"$1" | tail -n 1
}

ask_sbatch() { # WORDS...: submits, prints sbatch's answer
    # The request was checked: a GPU that SLURM does not know now is on a node that has not reported yet to a
    # controller that has just started.
    local errors tries=0
    while :; do
        if { errors=$(cd "$ROOT" && sbatch --parsable "$@" 2>&1 >&3); } 3>&1; then break; fi
        tries=$((tries + 1))
        if [ "$tries" -eq 15 ] || [[ $errors != *"Invalid generic resource"* ]]; then
            printf '%s\n' "$errors" >&2
            die "sbatch refused it (above); $(remedy_for "$errors")"
        fi
        if [ "$tries" -eq 1 ]; then warn "SLURM does not know its GPUs yet; asking again for half a minute"; fi
        sleep 2
    done
    if [ -n "$errors" ]; then printf '%s\n' "$errors" >&2; fi
}

remedy_for() { # ERRORS: of sbatch
    local most
    case $1 in
        *"job array"*)
            most=$(scontrol show config 2>/dev/null | sed -n 's/^MaxArraySize *= *//p')
            echo "indices of --array stay below ${most:-MaxArraySize (scontrol show config)} on this cluster"
            ;;
        *"job submit limit"*) echo "it is over a limit of yours, such as that of jobs in the queue (squeue --me -r lists them)" ;;
        *) echo "engaging plan shows what this cluster takes" ;;
    esac
}

submit() { # SCRIPT [ARGS...]: prints the line and submits (DRY_RUN=1: only prints); sets job
    local script=$1
    shift
    show_command "${options[@]}" "${script#"$ROOT"/}" "$@"
    job=
    if [ "${DRY_RUN:-0}" = 1 ]; then return; fi
    job=$(ask_sbatch "${options[@]}" "${script#"$ROOT"/}" "$@") || exit
    job=$(job_number "$job")
    [ -n "$job" ] || die "sbatch: no job's number in its answer; squeue --me shows whether it took the job"
    say "submitted job $job; its log: logs/$(header_value "$script" job-name)-$job.out;" \
        "why it waits: engaging why $job"
}

submit_unless_in_job() { # SCRIPT [WORDS...]: outside a job this submits and ends the script; see split_words
    # first: a script whose job must have ended before, behind: such a job that is on its way (need_data sets them)
    local script words typed planned place gpus
    if in_job || [ "${LOCAL:-0}" = 1 ]; then return 0; fi
    begin_submission "$@"
    check_flags "$place" ${words[@]+"${words[@]}"}
    plan_job "$place"
    gpus=$(flag_of gres "${options[@]}")
    gpus=${gpus##*:}
    if [ -n "$gpus" ]; then fit_node_share "$place"; fi
    planned=("${options[@]}" ${typed[@]+"${typed[@]}"})
    if [ -n "${first:-}" ]; then
        unset GPU_TYPE NUM_GPUS NODES PARTITION TIME # they are about the job that waits for this one
        plan_job "$ROOT/$first"
        submit "$ROOT/$first"
        behind=${job:-JOB_OF_THE_LINE_ABOVE}
    fi
    if [ -n "${behind:-}" ] && [ -z "$(said dependency)" ]; then planned+=("--dependency=afterany:$behind"); fi
    options=("${planned[@]}")
    if [ "${DRY_RUN:-0}" != 1 ]; then
        keep_code
        if [ -z "$(said array)" ]; then note_same_run "$place" ${words[@]+"${words[@]}"}; fi
    fi
    submit "$place" ${words[@]+"${words[@]}"}
    exit 0
}

begin_submission() { # SCRIPT [WORDS...]: sets place (the script), words, typed; everything that needs no plan is checked
    place=$(cd "$(dirname "$1")" && pwd -P)/$(basename "$1")
    shift
    if ! command -v sbatch >/dev/null 2>&1; then
        die "sbatch: not found: log in to the cluster, or run it on this machine: LOCAL=1 bash ${place#"$ROOT"/}"
    fi
    split_words "$@"
    adopt_options "$place"
    check_settings
    warn_about_account "${ACCOUNT:-}" "${QOS:-}"
    need_log_folder
    check_environment
}
