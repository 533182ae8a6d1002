# shellcheck shell=bash
# A script run with `bash` outside a job submits itself: GPU_TYPE, NUM_GPUS, NODES, PARTITION, TIME, ACCOUNT and QOS
# become sbatch's options, checked against the live cluster, so that what can never start is refused before it queues.
# The one file that the scripts source.

# shellcheck source-path=SCRIPTDIR source=common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

site_file() { # the file of this cluster
    local name file
    name=${ENGAGING_SITE:-}
    if [ -n "$name" ]; then
        check_setting ENGAGING_SITE '[A-Za-z0-9_-]+' "the name of a file in slurm/sites"
        [ -f "$ROOT/slurm/sites/$name.toml" ] || die "ENGAGING_SITE=$name: no slurm/sites/$name.toml"
        echo "$ROOT/slurm/sites/$name.toml"
        return
    fi
    name=$(scontrol show config 2>/dev/null | sed -n 's/^ClusterName *= *//p')
    for file in "$ROOT"/slurm/sites/*.toml; do
        if [ -n "$name" ] && grep -q "^cluster_names *=.*\"$name\"" "$file"; then
            echo "$file"
            return
        fi
    done
    echo "$ROOT/slurm/sites/generic.toml"
}

site_value() { # TABLE KEY: of the site file, lists as words; nothing when absent
    awk -v table="[$1]" -v key="$2" '
        /^\[/ { inside = ($1 == table); next }
        inside && $1 == key { sub(/^[^=]*= */, ""); sub(/ *#.*/, ""); gsub(/[]["]/, ""); gsub(/, */, " "); print }
    ' "$site"
}

site_partitions() { sed -n 's/^\[partitions\.\([A-Za-z0-9_.-]*\)\]$/\1/p' "$site"; }

header_value() { # SCRIPT OPTION: of its #SBATCH lines
    sed -n "s/^#SBATCH --$2=\\([^ #]*\\).*/\\1/p" "$1" | head -n 1
}

ask_cluster() { # sets live: partition|limit|gres|cpus|memory|up|nodes, a line for each kind of node
    live=$(timeout 20 sinfo -h -o '%P|%l|%G|%c|%m|%a|%D' 2>/dev/null | awk -F'|' '$6 == "up"' | tr -d '*+') || live=""
    if [ -z "$live" ]; then die "sinfo: SLURM does not answer; try again in a few minutes"; fi
}

has_partition() { awk -F'|' -v p="$1" '$1 == p { found = 1 } END { exit !found }' <<<"$live"; }

partition_minutes() { # the most a job may run there; nothing for no limit
    minutes_of "$(awk -F'|' -v p="$1" '$1 == p { print $2; exit }' <<<"$live")"
}

gpu_row() { # PARTITION TYPE [GPUS]: "gpus cpus memory_mb nodes": its node with the most such GPUs (any, for no
    # TYPE), and how many nodes have at least GPUS of them
    awk -F'|' -v p="$1" -v type="$2" -v least="${3:-1}" '
        $1 != p { next }
        {
            total = 0
            count = split($3, entries, ",")
            for (i = 1; i <= count; i++) {
                sub(/\(.*/, "", entries[i])
                parts = split(entries[i], part, ":")
                if (part[1] != "gpu") continue
                if (parts == 2 && type == "") total += part[2]
                if (parts >= 3 && (type == "" || part[2] == type)) total += part[3]
            }
            if (total >= least) nodes += $7
            if (total > best) { best = total; row = total " " $4 " " $5 }
        }
        END { if (row != "") print row " " nodes + 0 }
    ' <<<"$live"
}

gpu_limit() { # PARTITION: GPUs that one user may hold there; nothing for no limit. Asked of the cluster
    local name answer
    for name in "${QOS:-}" "$(scontrol show partition "$1" -o 2>/dev/null | tr ' ' '\n' | sed -n 's/^QoS=//p')"; do
        if [ -z "$name" ] || [ "$name" = N/A ]; then continue; fi
        if answer=$(sacctmgr -nP show qos "$name" format=MaxTRESPU 2>/dev/null); then
            answer=$(tr ',' '\n' <<<"$answer" | sed -n 's|^gres/gpu=||p' | head -n 1)
        else
            answer=$(site_value "partitions.$1" gpus_per_user)
        fi
        if [ -n "$answer" ]; then
            echo "$answer"
            return
        fi
    done
}

candidates() { # KIND HEADERS_PARTITION: partitions to try, best first
    local name
    if [ -n "${PARTITION:-}" ]; then
        tr ',' '\n' <<<"$PARTITION"
        return
    fi
    {
        echo "$2"
        if [ "$1" = gpu ]; then site_partitions; fi
        if ! (has_partition "$2" || for name in $(site_partitions); do has_partition "$name" && break; done); then
            sinfo -h -o %P | grep '\*$' || : # another cluster: its default first, then whatever there is
            cut -d '|' -f 1 <<<"$live"
        fi
    } | tr -d '*' | awk 'NF && !seen[$0]++' | while read -r name; do
        if has_partition "$name"; then echo "$name"; fi
    done
}

why_not() { # PARTITION TYPE GPUS NODES MINUTES: why it cannot take this, in a few words; nothing when it can
    local row limit most
    has_partition "$1" || { echo "is not on this cluster"; return; }
    most=$(partition_minutes "$1")
    if [ -n "$most" ] && [ "$5" -gt "$most" ]; then echo "takes at most $(clock_of "$most")"; return; fi
    [ "$3" -gt 0 ] || return 0
    row=$(gpu_row "$1" "$2" "$3")
    if [ -z "$row" ]; then echo "has no ${2:-GPUs}"; return; fi
    if [ "$3" -gt "${row%% *}" ]; then echo "has ${row%% *} ${2:+$2 }a node"; return; fi
    if [ "$4" -gt "${row##* }" ]; then echo "has ${row##* } such nodes"; return; fi
    limit=$(gpu_limit "$1")
    if [ -n "$limit" ] && [ $(($3 * $4)) -gt "$limit" ]; then echo "gives one user $limit GPUs"; fi
}

plan_job() { # SCRIPT: sets options (sbatch's), from the script's header, the settings and the cluster
    local script=$1 header_gres kind=cpu type="" gpus=0 nodes=${NODES:-} partition="" asked wanted name reason
    local reasons="" row header_partition most
    ask_cluster
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
        size_gpu_job "$type" "$gpus" "$row"
    fi
    if [ -n "${ACCOUNT:-}" ]; then options+=("--account=$ACCOUNT"); fi
    if [ -n "${QOS:-}" ]; then options+=("--qos=$QOS"); fi
}

type_is_here() { grep -q "gpu:$1:" <<<"$live"; }

size_gpu_job() { # TYPE GPUS "gpus cpus memory nodes" of the node: CPUs and memory by the GPU, never more than its share
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
    options+=("--gres=gpu:${type:+$type:}$gpus" "--cpus-per-gpu=$cpus" "--mem-per-gpu=${memory}G")
}

refuse() { # REASONS GPUS TYPE NODES KIND HEADERS_PARTITION
    local name row nodes limit best=0 asked advice="PARTITION=NAME names another one (engaging plan shows yours)"
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

ask_sbatch() { # WORDS...: submits, prints the job's number
    # The request was checked: a GPU that SLURM does not know now is on a node that has not reported yet to a
    # controller that has just started.
    local errors tries=0
    while :; do
        if { errors=$(cd "$ROOT" && sbatch --parsable "$@" 2>&1 >&3); } 3>&1; then break; fi
        tries=$((tries + 1))
        if [ "$tries" -eq 15 ] || [[ $errors != *"Invalid generic resource"* ]]; then
            printf '%s\n' "$errors" >&2
            return 1
        fi
        if [ "$tries" -eq 1 ]; then warn "SLURM does not know its GPUs yet; asking again for half a minute"; fi
        sleep 2
    done
    if [ -n "$errors" ]; then printf '%s\n' "$errors" >&2; fi
}

submit() { # SCRIPT [ARGS...]: prints the line and submits (DRY_RUN=1: only prints); sets job
    local script=$1
    shift
    show_command "${options[@]}" "${script#"$ROOT"/}" "$@"
    job=
    if [ "${DRY_RUN:-0}" = 1 ]; then return; fi
    job=$(ask_sbatch "${options[@]}" "${script#"$ROOT"/}" "$@") ||
        die "sbatch refused it (above); engaging plan shows what this cluster takes"
    job=${job%%;*}
    say "submitted job $job; its log: logs/$(header_value "$script" job-name)-$job.out;" \
        "why it waits: engaging why $job"
}

submit_first() { # SCRIPT: what the job needs, as a job of its own, unless one is on its way; sets job
    local name
    name=$(header_value "$1" job-name)
    job=$(squeue --me -h --name="$name" -o %A 2>/dev/null | head -n 1) || job=""
    if [ -n "$job" ]; then
        say "job $job ($name) is on its way already"
        return
    fi
    unset GPU_TYPE NUM_GPUS NODES PARTITION TIME # they are about the job that waits for this one
    plan_job "$1"
    submit "$1"
}

submit_unless_in_job() { # SCRIPT [ARGS...]: outside a job this submits and ends the script. `first`: see submit_first
    local script planned
    if in_job || [ "${LOCAL:-0}" = 1 ]; then return 0; fi
    script=$(cd "$(dirname "$1")" && pwd -P)/$(basename "$1")
    shift
    check_settings
    if ! command -v sbatch >/dev/null 2>&1; then
        die "sbatch: not found: log in to the cluster, or run it on this machine: LOCAL=1 bash ${script#"$ROOT"/}"
    fi
    need_log_folder
    check_environment
    plan_job "$script"
    if [ -n "${first:-}" ]; then
        planned=("${options[@]}")
        submit_first "$ROOT/$first"
        options=("${planned[@]}" "--dependency=afterok:${job:-JOB_OF_THE_LINE_ABOVE}" --kill-on-invalid-dep=yes)
    fi
    submit "$script" "$@"
    exit 0
}
