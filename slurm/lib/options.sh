# shellcheck shell=bash
# sbatch's options as somebody has typed them: taken apart, completed and fitted to the script. Sourced after cluster.sh.
# shellcheck disable=SC2034  # parts that other files use

declare -A LONG=([A]=account [c]=cpus-per-task [d]=dependency [D]=chdir [G]=gpus [N]=nodes [o]=output [p]=partition
    [q]=qos [t]=time [W]=wait)
readonly ALONE=" contiguous exclusive get-user-env help hold ignore-pbs kill-on-invalid-dep no-kill no-requeue
 overcommit oversubscribe parsable nice propagate quiet reboot requeue spread-job test-only usage use-min-nodes verbose
 version wait x11 "

parse_line() { # sets typed (options, in one form where that matters), script and arguments
    local word
    typed=() script="" arguments=()
    while [ $# -gt 0 ]; do
        word=$1
        case $word in
            --) ;;
            --*=*) typed+=("$word") ;;
            --*)
                if [[ $ALONE == *[[:space:]]"${word#--}"[[:space:]]* ]] || [ $# -eq 1 ]; then
                    typed+=("$word")
                else
                    typed+=("$word=$2")
                    shift
                fi
                ;;
            -[WHIhkOQsvV]) typed+=("${LONG[${word#-}]:+--}${LONG[${word#-}]:-$word}") ;;
            -?*)
                if [ ${#word} -eq 2 ] && [ $# -gt 1 ]; then
                    shift
                    word+=$1
                fi
                if [ -n "${LONG[${word:1:1}]:-}" ]; then word=--${LONG[${word:1:1}]}=${word:2}; fi
                typed+=("$word")
                ;;
            *)
                script=$word
                shift
                arguments=("$@")
                return
                ;;
        esac
        shift
    done
}

said() { flag_of "$1" ${typed[@]+"${typed[@]}"}; } # NAME: of an option as it was typed

drop() { # NAMES...: takes these options out of typed
    local word name kept=()
    for word in ${typed[@]+"${typed[@]}"}; do
        for name in "$@"; do
            case $word in "--$name" | "--$name="*) continue 2 ;; esac
        done
        kept+=("$word")
    done
    typed=(${kept[@]+"${kept[@]}"})
}

fill_gpus() { # sets type and gpus (for each node) from --gres, GPU_TYPE and NUM_GPUS; filled: --gres written anew
    local gres header parts total
    header=$(header_value "$script" gres)
    gres=$(said gres)
    total=$(said gpus) filled=""
    if [ -z "$gres$(said gpus-per-node)$total${SBATCH_GRES:-}${SBATCH_GPUS_PER_NODE:-}" ]; then total=${SBATCH_GPUS:-}; fi
    if [ -z "$gres" ] && [ -n "$(said gpus-per-node)" ]; then gres=gpu:$(said gpus-per-node); fi
    if [ -z "$gres" ] && [ -n "$total" ]; then
        gres=gpu:$total
        if [ "$nodes" -gt 1 ]; then die "--gpus=$total: on $nodes nodes say how many on each: --gres=gpu:N"; fi
    fi
    if [ -z "$gres" ]; then gres=${SBATCH_GRES:-${SBATCH_GPUS_PER_NODE:+gpu:$SBATCH_GPUS_PER_NODE}}; fi
    unset SBATCH_GPUS SBATCH_GPUS_PER_NODE # beside --gres SLURM drops them, or refuses
    type=${GPU_TYPE:-} gpus=${NUM_GPUS:-}
    if [ -n "$gres" ]; then
        [[ $gres =~ ^gpu(:[^:,]*){0,2}$ ]] || return 1 # something else: sbatch's own business
        IFS=: read -r -a parts <<<"$gres:"
        case ${#parts[@]}$gres in
            1*) parts=(gpu "" 1) ;;
            2gpu:) parts=(gpu "$type" "$gpus") ;;
            2*) if is_number "${parts[1]}"; then parts=(gpu "" "${parts[1]}"); else parts+=(1); fi ;;
        esac
        if [[ $gres == gpu::* || $gres == gpu: ]] && [ -z "$type" ]; then
            die "--gres=$gres: no GPU type in it, and GPU_TYPE is not set; type GPU_TYPE=h200 in front of sbatch"
        fi
        if [ -z "${parts[2]:-}" ] && [ -z "$gpus" ]; then
            die "--gres=$gres: no number in it, and NUM_GPUS is not set; type NUM_GPUS=1 in front of sbatch"
        fi
        if [[ -n $type && -n ${parts[1]} && ${parts[1]} != "$type" ]]; then
            die "--gres=$gres: GPU_TYPE=$type says otherwise; unset GPU_TYPE, or say the same in both"
        fi
        if [[ -n $gpus && -n ${parts[2]:-} && ${parts[2]} -lt $gpus ]]; then
            die "--gres=$gres: NUM_GPUS=$gpus is more; unset NUM_GPUS, or say the same in both"
        fi
        if [[ $gres != gpu::* && $gres != gpu: ]]; then type=${parts[1]}; fi
        gpus=${parts[2]:-$gpus}
    elif [ -n "$type$gpus" ]; then
        type=${type:-$(sed -n 's/^gpu:\([a-z][^:]*\):.*/\1/p' <<<"$header")}
        gpus=${gpus:-${header##*:}}
    else
        type=$(sed -n 's/^gpu:\([a-z][^:]*\):.*/\1/p' <<<"$header") gpus=${header##*:}
        return 0 # the header as it is
    fi
    if [ -n "$type" ] && ! [[ $type =~ ^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$ ]]; then
        die "--gres=$(printf '%q' "$gres"): no GPU type of this cluster; such as h200 (sinfo -o %G)"
    fi
    if ! is_number "$gpus"; then die "--gres=$(printf '%q' "$gres"): no number of GPUs; expected --gres=gpu:TYPE:NUMBER"; fi
    if [ "$(said gres)" = "gpu:${type:+$type:}$gpus" ]; then return 0; fi
    drop gres gpus gpus-per-node
    typed+=("--gres=gpu:${type:+$type:}$gpus")
    filled=--gres=gpu:${type:+$type:}$gpus
}

fit_node_share() { # SCRIPT: --cpus-per-task and --mem, which contradict a header that counts by the GPU, become shares of a GPU
    local cpus memory number
    if [ -n "$(header_value "$1" cpus-per-task)" ]; then return 0; fi
    cpus=$(said cpus-per-task)
    if is_number "$cpus"; then
        drop cpus-per-task
        typed+=("--cpus-per-gpu=$(((cpus + gpus - 1) / gpus))")
        note "--cpus-per-task=$cpus: asked for as --cpus-per-gpu=$(((cpus + gpus - 1) / gpus))"
    fi
    memory=$(said mem)
    if [[ $memory =~ ^([1-9][0-9]{0,8})([KMGTkmgt]?)B?$ ]]; then
        number=${BASH_REMATCH[1]}
        case ${BASH_REMATCH[2]} in
            [Kk]) number=$((number / 1024)) ;;
            [Gg]) number=$((number * 1024)) ;;
            [Tt]) number=$((number * 1048576)) ;;
        esac
        drop mem
        typed+=("--mem-per-gpu=$((number / gpus > 0 ? number / gpus : 1))M")
        note "--mem=$memory: asked for as ${typed[-1]}"
    fi
}

warn_about_account() { # ACCOUNT QOS
    if [ -n "$1" ] && [ -z "$2" ]; then
        warn "--account=$1 without --qos: it may run under the default QOS, silently; name both" \
            "(sacctmgr -nP show assoc where user=\$USER format=Account,QOS)"
    fi
}

note_export() { # --export=NAME=1 leaves all your other variables behind, these scripts' too; the trainer's copy goes along
    local name list left=""
    list=$(said export)
    list=${list:-${SBATCH_EXPORT:-}}
    case ,$list, in ,, | *,ALL,* | ,NIL,) return 0 ;; esac
    for name in ENV_PATH DATA_ROOT NUM_GPUS SPEEDRUN_TRAINER MAX_RESTARTS FINEWEB_CHUNKS WANDB_API_KEY HF_TOKEN; do
        if [ -n "${!name:-}" ] && ! [[ ,$list, =~ ,${name}[=,] ]]; then left+="${left:+, }$name"; fi
    done
    if [ -n "$left" ]; then warn "--export leaves $left behind; to take them along begin its list with ALL: --export=ALL,..."; fi
    if [ "$list" != NONE ]; then
        drop export
        typed+=("--export=$list,RUN_CODE")
    fi
}

note_time() { # TEXT: two numbers are minutes and seconds to SLURM, and hours to many people
    if [[ $1 =~ ^([0-9]+):[0-9]+$ ]]; then
        note "--time=$1: $(minutes_of "$1") minutes, as SLURM reads it; hours: ${BASH_REMATCH[1]}h or $1:00"
    fi
}

split_words() { # WORDS...: what follows the script's name: sets typed (sbatch's) and words (after --, the trainer's)
    # Without -- they are all sbatch's, or none of them is.
    local known word foreign="" own=""
    words=() typed=()
    while [ $# -gt 0 ] && [ "$1" != -- ]; do
        words+=("$1")
        shift
    done
    if [ ${#words[@]} -gt 0 ] && [ $# -eq 0 ]; then
        known=$(sbatch --help 2>/dev/null | grep -oE -- '--[a-z0-9-]+') || known=""
        for word in ${words[@]+"${words[@]}"}; do
            case $word in
                --*) if grep -qx -- "${word%%=*}" <<<"$known"; then own=$word; else foreign=$word; fi ;;
                -[A-Za-z]*) own=$word ;;
            esac
        done
        if [ -z "$own" ]; then return 0; fi
        if [ -n "$foreign" ]; then
            die "$foreign: not an option of sbatch; the trainer's flags go after --: ... $own -- $foreign"
        fi
    fi
    if [ $# -gt 0 ]; then shift; fi
    parse_line ${words[@]+"${words[@]}"}
    if [ -n "$script" ]; then die "$script: not an option of sbatch; the trainer's words go after --"; fi
    words=("$@")
}

own_setting() { # OPTION SCRIPT: what `engaging config` says; its partition is for what uses GPUs
    case $1 in
        account | qos) engaging_setting "$1" ;;
        partition) if [ -n "$(header_value "$2" gres)" ]; then engaging_setting "$1"; fi ;;
    esac
}

adopt_options() { # SCRIPT: what sbatch's options and variables say about size and place counts as settings do
    local name option variable value type gpus nodes=1
    for name in PARTITION:partition:SBATCH_PARTITION TIME:time:SBATCH_TIMELIMIT ACCOUNT:account:SBATCH_ACCOUNT \
        QOS:qos:SBATCH_QOS NODES:nodes:; do
        IFS=: read -r name option variable <<<"$name"
        value=$(said "$option")
        if [ -z "$value" ] && [ -z "${!name:-}" ] && [ -n "$variable" ]; then
            value=${!variable:-}
            if [ -z "$value" ]; then value=$(own_setting "$option" "$1"); fi
        fi
        if [ -n "$value" ]; then printf -v "$name" '%s' "$value"; fi
        drop "$option"
    done
    note_time "${TIME:-}"
    note_export
    script=$1
    value=$(said gres)$(said gpus)$(said gpus-per-node)
    if [ -n "$value${SBATCH_GRES:-}${SBATCH_GPUS:-}${SBATCH_GPUS_PER_NODE:-}" ] && fill_gpus; then
        GPU_TYPE=$type NUM_GPUS=$gpus
        drop gres gpus gpus-per-node
    fi
}
