# shellcheck shell=bash
# What all scripts here share: messages, checks, the environment, the job's GPUs. Sourced after `set -euo pipefail`.
# Submitting is in submit.sh, launching in run.sh. Values are always quoted arguments, never script text.

if ((BASH_VERSINFO[0] < 4)); then
    echo "error: bash $BASH_VERSION is too old; use bash 4.2 or newer (on macOS: brew install bash)" >&2
    exit 2
fi

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd -P)
readonly ROOT
# shellcheck disable=SC2034  # for settings.sh
_engaging_sites=$ROOT/slurm/sites
# shellcheck source-path=SCRIPTDIR source=settings.sh
. "$ROOT/slurm/lib/settings.sh"
readonly EXIT_USAGE=2
# shellcheck disable=SC2034  # for run.sh
readonly EXIT_INTERRUPTED=75

say() { printf '%s\n' "$*"; }

note() { printf 'note: %s\n' "$*" >&2; }

warn() { printf 'warning: %s\n' "$*" >&2; }

die() { # one line and exit status 2; inside $(...) it ends only the subshell, so assign first
    printf 'error: %s\n' "${*//$'\n'/ }" >&2
    exit "$EXIT_USAGE"
}

counted() { printf '%s %s%s' "$1" "$2" "$([ "$1" = 1 ] || echo s)"; } # NUMBER NOUN

is_number() { [[ $1 =~ ^[1-9][0-9]{0,5}$ ]]; }

check_setting() { # NAME PATTERN WHAT: dies unless the variable is unset, empty or matches the whole pattern
    local value=${!1:-}
    if [ -n "$value" ] && ! [[ $value =~ ^($2)$ ]]; then die "$1=$(printf '%q' "$value"): expected $3"; fi
}

check_settings() { # everything a user may set for a job
    check_setting NUM_GPUS '[1-9][0-9]{0,3}' "a number of GPUs a node, such as 2"
    check_setting NODES '[1-9][0-9]{0,3}' "a number of nodes, such as 2"
    check_setting GPU_TYPE '[A-Za-z0-9][A-Za-z0-9_.-]{0,63}' "a GPU type of this cluster, such as h200 (sinfo -o %G)"
    check_setting PARTITION '[A-Za-z0-9][A-Za-z0-9_.,-]{0,255}' "a partition's name (sinfo -o %P)"
    check_setting ACCOUNT '[A-Za-z0-9][A-Za-z0-9_.-]{0,63}' "an account's name"
    check_setting QOS '[A-Za-z0-9][A-Za-z0-9_.-]{0,63}' "a QOS's name"
    check_setting TIME '([0-9]+-)?[0-9]+(:[0-9]+){0,2}|([0-9]+[dhm])+' "a time such as 2:00:00, 90 (minutes) or 6h"
    check_setting MAX_RESTARTS '[0-9]{1,4}' "a number"
    check_setting FINEWEB_CHUNKS '[1-9][0-9]{0,3}' "a number of shards, such as 9"
    check_setting DRY_RUN '0|1' "0 or 1"
    check_setting LOCAL '0|1' "0 or 1"
}

flag_of() { # NAME WORDS...: the last --NAME=value or --NAME value among the words
    local name=$1 value=""
    shift
    while [ $# -gt 0 ]; do
        case $1 in
            "--$name="*) value=${1#*=} ;;
            "--$name") value=${2:-} ;;
        esac
        shift
    done
    printf '%s' "$value"
}

minutes_of() { # a time as SLURM or people write it -> whole minutes, rounded up; nothing when it is no time
    local text=$1 days=0 total=0 parts
    if [[ $text =~ ^([0-9]+[dhm])+$ ]]; then
        while [[ $text =~ ^([0-9]+)([dhm])(.*)$ ]]; do
            case ${BASH_REMATCH[2]} in
                d) total=$((total + 10#${BASH_REMATCH[1]} * 1440)) ;;
                h) total=$((total + 10#${BASH_REMATCH[1]} * 60)) ;;
                m) total=$((total + 10#${BASH_REMATCH[1]})) ;;
            esac
            text=${BASH_REMATCH[3]}
        done
        echo "$total"
        return
    fi
    [[ $text =~ ^(([0-9]+)-)?([0-9]+)(:([0-9]+))?(:([0-9]+))?$ ]] || return 0
    days=${BASH_REMATCH[2]:-}
    parts=("${BASH_REMATCH[3]}" "${BASH_REMATCH[5]:-}" "${BASH_REMATCH[7]:-}")
    if [ -n "$days" ]; then # D-H[:M[:S]]
        total=$((10#$days * 1440 + 10#${parts[0]} * 60 + 10#${parts[1]:-0} + (10#${parts[2]:-0} > 0)))
    elif [ -n "${parts[2]}" ]; then # H:M:S
        total=$((10#${parts[0]} * 60 + 10#${parts[1]} + (10#${parts[2]} > 0)))
    else # M[:S]
        total=$((10#${parts[0]} + (10#${parts[1]:-0} > 0)))
    fi
    echo "$total"
}

clock_of() { # minutes -> what --time takes
    printf '%d-%02d:%02d:00' $(($1 / 1440)) $(($1 % 1440 / 60)) $(($1 % 60))
}

# ---- where this runs ------------------------------------------------------------------------------------------

in_job() { [ -n "${SLURM_JOB_ID:-}" ]; }

in_step() { # a task of `srun`; the batch script and an interactive shell have reserved step numbers
    [ -n "${SLURM_STEP_ID:-}" ] && [ -n "${SLURM_PROCID:-}" ] && [ "$SLURM_STEP_ID" -lt 4294967000 ]
}

forget_outer_step() { # sbatch in a step of another job (`srun --pty bash`) passes on what that step was told
    local name
    if ! in_job || [ -z "${SLURM_STEP_ID:-}" ] || [ "${RUN_STEP:-}" = "$SLURM_JOB_ID" ]; then return 0; fi
    if in_step && [[ $(scontrol show step "$SLURM_JOB_ID.$SLURM_STEP_ID" 2>&1) != *"not found"* ]]; then return 0; fi
    for name in $(compgen -v | grep -E '^SLURM_(STEP|CPU_BIND|MEM_BIND|TRES_BIND|DISTRIBUTION)'); do unset "$name"; done
}
forget_outer_step

job_name() { # what requeue takes: an array's task, never the array
    if [ -n "${SLURM_ARRAY_TASK_ID:-}" ]; then
        echo "${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}"
    else
        echo "${SLURM_JOB_ID:-}"
    fi
}

job_field() { # FIELD: of this job, from the controller; nothing when it does not answer
    in_job || return 0 # without a name scontrol would show everybody's
    # The last one counts: a job's name comes first, and may hold anything.
    scontrol show job "$(job_name)" 2>/dev/null | sed -n "s/^ *\\(.* \\)\\{0,1\\}$1=\\([^ ]*\\).*/\\2/p" | tail -n 1
}

gpus_on_node() { # how many GPUs the job has on this node; 0 for none
    if [ -n "${SLURM_GPUS_ON_NODE:-}" ]; then
        echo "$SLURM_GPUS_ON_NODE"
    elif in_job; then
        echo 0
    elif [ -n "${CUDA_VISIBLE_DEVICES+set}" ]; then
        tr ',' '\n' <<<"$CUDA_VISIBLE_DEVICES" | grep -c . || :
    elif command -v nvidia-smi >/dev/null 2>&1; then
        nvidia-smi -L 2>/dev/null | grep -c '^GPU' || :
    else
        echo 0
    fi
}

gpu_type_of_job() { # h200, ...: as the job asked for it; nothing for an untyped request
    job_field 'TresPerNode' | sed -n 's/.*gpu:\([A-Za-z][A-Za-z0-9_.-]*\).*/\1/p'
}

choose_gpus() { # sets gpus: the allocation's number, or NUM_GPUS where that is less
    local allocated type
    allocated=$(gpus_on_node)
    gpus=${NUM_GPUS:-$allocated}
    if ! in_job; then return; fi
    if [ -n "${SLURM_GPUS_PER_NODE:-}" ] && [[ $(job_field TresPerNode) == *gpu*,*gpu* ]]; then
        warn "--gpus-per-node=$SLURM_GPUS_PER_NODE: SLURM takes the script's --gres instead, so this job has" \
            "$allocated on each node; submit with --gres=gpu:$SLURM_GPUS_PER_NODE"
    fi
    if [ -n "${GPU_TYPE:-}" ]; then
        type=$(gpu_type_of_job)
        if [ -n "$type" ] && [ "$type" != "$GPU_TYPE" ]; then
            die "GPU_TYPE=$GPU_TYPE: this job was given $type; ask for it when submitting: $(submit_command)"
        fi
    fi
    if [ "$gpus" -gt "$allocated" ]; then
        die "NUM_GPUS=$gpus: this job has $allocated on each node; ask for them when submitting: $(submit_command)"
    fi
    if [ "$gpus" -lt "$allocated" ]; then
        warn "NUM_GPUS=$gpus: $((allocated - gpus)) of the job's $allocated GPUs a node stay idle"
    fi
}

submit_command() { # the line that would have worked
    local type=${GPU_TYPE:-} script
    script=$(scontrol show job "$(job_name)" 2>/dev/null | sed -n 's/^ *Command=//p' | tail -n 1)
    script=${script#"$ROOT"/}
    if [ -n "$type" ]; then type+=: ; fi
    printf 'sbatch --gres=gpu:%s%s %q' "$type" "${NUM_GPUS:-$(gpus_on_node)}" "${script:-SCRIPT}"
}

# ---- the environment ------------------------------------------------------------------------------------------

environment_folder() { # ENV_PATH, else the setting's, else the default place, else the environment that is active
    local named=${ENV_PATH:-$(engaging_setting env_path)} folder active
    folder=${named:-$HOME/conda_envs/nanogpt_env}
    if [ -z "$named" ] && [ ! -x "$folder/bin/python" ]; then
        for active in "${VIRTUAL_ENV:-}" "${CONDA_PREFIX:-}"; do
            if [ -n "$active" ] && [ -x "$active/bin/python" ]; then folder=$active; fi
        done
    fi
    echo "${folder%/}"
}

not_exported() { # why a job may not know what its user has set
    case ,${SLURM_EXPORT_ENV:-ALL}, in
        *,ALL,*) ;;
        *) if in_job; then echo " (sbatch --export left your own settings behind: --export=ALL,...)"; fi ;;
    esac
}

check_environment() { # before anything is queued
    local folder
    folder=$(environment_folder)
    [ -x "$folder/bin/python" ] || die "ENV_PATH=$folder: no Python there; build it first: bash setup_env.sh$(not_exported)"
}

activate_environment() { # Python of ENV_PATH first on PATH: through activate_env.sh, or by hand where conda is broken
    local folder
    check_environment
    folder=$(environment_folder)
    export ENV_PATH=$folder
    set +eu # other people's start-up code does not know these options
    # shellcheck source=/dev/null
    . "$ROOT/activate_env.sh" >/dev/null 2>&1
    set -eu
    if [ "$(command -v python || :)" != "$folder/bin/python" ]; then
        warn "activate_env.sh did not activate $folder; using its Python directly"
        PATH=$folder/bin:$PATH
    fi
    export PATH PYTHONNOUSERSITE=1 PYTHONUNBUFFERED=1
}

set_caches() { # compile caches on the node's own disk, each job's its own: shared folders break Triton's, and are slow
    local name folder
    for name in TRITON_CACHE_DIR TORCHINDUCTOR_CACHE_DIR; do
        if [ -n "${!name:-}" ] && on_network_disk "${!name}"; then
            warn "$name=${!name}: on a network disk, where compile caches break; unset it: the node's disk is better"
        fi
    done
    folder=$(cache_folder)
    if [ -z "$folder" ]; then return 0; fi
    export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$folder/triton}
    export TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-$folder/inductor}
}

cache_folder() { # this node's, made if need be: one for each user, in it one for each job; nothing without room
    local folder job left
    folder=$(user_caches)
    (umask 077 && mkdir -p "$folder") 2>/dev/null || :
    if [ ! -O "$folder" ] || [ -L "$folder" ] || [ "$(stat -c %a "$folder" 2>/dev/null)" != 700 ]; then
        if ! folder=$(mktemp -d "${folder%/*}/nanogpt-cache-XXXXXX" 2>/dev/null); then
            warn "${folder%/*}: no room for compile caches"
            return 0
        fi
    fi
    if in_job; then
        job=$folder/job-$(job_name)
        if [ ! -d "$job" ] && left=$(timeout 10 squeue --me -h -o %F 2>/dev/null); then
            drop_caches_of_others "$folder" "$left" # of jobs that were killed before they could
        fi
        if ! (umask 077 && mkdir -p "$job") 2>/dev/null; then
            warn "$job: no room for compile caches"
            return 0
        fi
        folder=$job
    fi
    echo "$folder"
}

user_caches() { # the folder for this user's on this node
    local base
    for base in "${SLURM_TMPDIR:-}" "${TMPDIR:-}" /tmp; do
        if [ -d "$base" ] && [ -w "$base" ] && ! on_network_disk "$base"; then break; fi
    done
    echo "$base/nanogpt-cache-$EUID"
}

drop_caches_of_others() { # FOLDER JOBS: those of jobs that are not in the list
    local other number
    for other in "$1"/job-*; do
        number=${other##*/job-}
        if [ -d "$other" ] && ! grep -qx "${number%%_*}" <<<"$2"; then rm -rf "$other" || :; fi
    done
}

drop_caches() { # this job's on this node, when no attempt can use them again
    rm -rf "$(user_caches)/job-$(job_name)" || :
}

on_network_disk() { # PATH (it need not exist): as `df` names the file system
    local path=$1 kind
    while [ -n "$path" ] && [ ! -e "$path" ]; do path=${path%/*}; done
    kind=$(df --output=fstype "${path:-/}" 2>/dev/null) || :
    case ${kind##*$'\n'} in # the line below the heading
        nfs* | lustre | gpfs | beegfs | fhgfs | wekafs | fuse.sshfs | cifs | smb* | afs | panfs | ceph) ;;
        *) return 1 ;;
    esac
}

set_threads() { # RANKS: the node's CPUs shared by its ranks; OMP_NUM_THREADS counts for each of them
    local cpus=${SLURM_CPUS_PER_TASK:-${SLURM_CPUS_ON_NODE:-1}}
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cpus / $1 > 0 ? cpus / $1 : 1))}
}

data_root() { # DATA_ROOT, else the setting's, else the clone's own
    local place=${DATA_ROOT:-$(engaging_setting data_root)}
    echo "${place:-$ROOT/data}"
}

begin_job() { # what every script does first when it runs: the right folder, settings, environment
    check_settings
    cd "$ROOT" || die "$ROOT: cannot be entered"
    export DATA_ROOT
    DATA_ROOT=$(data_root)
    announce_job
    note_edits
    activate_environment
}

announce_job() { # the first line of each attempt in the log
    local attempt
    attempt="job $(job_name) attempt $((${SLURM_RESTART_COUNT:-0} + 1))"
    if ! in_job || [ "${RUN_ANNOUNCED:-}" = "$attempt" ]; then return 0; fi
    say "--- $attempt on ${SLURM_JOB_NODELIST:-?} at $(date '+%F %T')"
    export RUN_ANNOUNCED=$attempt
}

run_of() { # NAME: the run directory, one for each task of an array
    echo "out/$1${SLURM_ARRAY_TASK_ID:+-$SLURM_ARRAY_TASK_ID}"
}
