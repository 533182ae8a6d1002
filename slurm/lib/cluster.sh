# shellcheck shell=bash
# What this cluster has and allows, asked of it: partitions, nodes, GPUs, limits. Sourced after common.sh.
# site is what site_file has named, live what ask_cluster has read.

site="" live=""

site_file() { # the file of this cluster
    local name=${ENGAGING_SITE:-}
    check_setting ENGAGING_SITE '[A-Za-z0-9_-]+' "the name of a file in slurm/sites"
    # shellcheck disable=SC2154  # common.sh sets it
    [ -z "$name" ] || [ -f "$_engaging_sites/$name.toml" ] || die "ENGAGING_SITE=$name: no slurm/sites/$name.toml"
    engaging_site "$_engaging_sites"
}

site_value() { # TABLE KEY: of the site file, lists as words; nothing when absent
    awk -v table="[$1]" -v key="$2" '
        { sub(/\r$/, "") } # a file that Windows has edited
        /^\[/ { inside = ($1 == table); next }
        inside && $1 == key { sub(/^[^=]*= */, ""); sub(/ *#.*/, ""); gsub(/[]["]/, ""); gsub(/, */, " "); print }
    ' "$site"
}

site_partitions() { sed -n 's/^\[partitions\.\([A-Za-z0-9_.-]*\)\][[:space:]]*$/\1/p' "$site"; }

header_value() { # SCRIPT OPTION: of its #SBATCH lines
    sed -n "s/^#SBATCH --$2=\\([^ #]*\\).*/\\1/p" "$1" | head -n 1
}

ask_cluster() { # sets live: partition|limit|gres|cpus|memory|up|nodes, a line for each kind of node; false: no answer
    live=$(timeout 20 sinfo -h -o '%P|%l|%G|%c|%m|%a|%D' 2>/dev/null | awk -F'|' '$6 == "up"' | tr -d '*+') || live=""
    [ -n "$live" ]
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
        if answer=$(timeout 10 sacctmgr -nP show qos "$name" format=MaxTRESPU 2>/dev/null); then
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
    if [ "$4" -gt "${row##* }" ]; then echo "has $(counted "${row##* }" "such node")"; return; fi
    limit=$(gpu_limit "$1")
    if [ -n "$limit" ] && [ $(($3 * $4)) -gt "$limit" ]; then echo "gives one user $(counted "$limit" GPU)"; fi
}

type_is_here() { grep -q "gpu:$1:" <<<"$live"; }
