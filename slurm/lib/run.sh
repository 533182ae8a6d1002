#!/bin/bash
# Starts a trainer on whatever there is, and looks after it: the one launch path of the batch scripts, of `engaging
# launch` and of a person without SLURM.
#
#   bash slurm/lib/run.sh [--gpus N] [--args-file FILE] [--] TRAINER [ARGS...]
#
# TRAINER is nanogpt.train or nanogpt/train.py. The words of FILE, each ended by a NUL byte, follow those of the
# command line (TRAINER may be the first of them). The current folder stays what it is.
#
#   in a batch job     srun starts one task a node. Preempted or near its time limit, the trainer saves and exits 75;
#                      then the job requeues itself, at most MAX_RESTARTS (default 100) times. A trainer that breaks
#                      is started again, until it broke three times in a row without a new checkpoint.
#   in a task of srun  this node's part: `srun --ntasks-per-node=1 bash slurm/lib/run.sh ...` inside an allocation.
#   without SLURM      on this machine's GPUs, once.
#
# Several ranks run under torchrun, one rank runs by itself. Exit status: the trainer's.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
# shellcheck source-path=SCRIPTDIR source=requeue.sh
. "$ROOT/slurm/lib/requeue.sh"

readonly MAX_FAILURES=3 # in a row, without progress
readonly RETRY_SECONDS=5
readonly STEP_PATIENCE=300 # seconds in which SLURM must be able to start the trainer's step
readonly MEETING_SECONDS=120 # in which the nodes of a run must have found each other

parse_words() { # sets trainer and words
    local word file=""
    while [ $# -gt 0 ]; do
        case $1 in
            --gpus) export NUM_GPUS=${2:?}; shift ;;
            --gpus=*) export NUM_GPUS=${1#--gpus=} ;;
            --args-file) file=${2:?}; shift ;;
            --args-file=*) file=${1#--args-file=} ;;
            --) shift; break ;;
            -*) die "run.sh: unknown flag $1; it takes --gpus and --args-file, the trainer's flags follow its name" ;;
            *) break ;;
        esac
        shift
    done
    words=("$@")
    if [ -n "$file" ]; then
        [ -r "$file" ] || die "--args-file=$file: cannot be read"
        while IFS= read -r -d '' word; do words+=("$word"); done <"$file"
    fi
    [ ${#words[@]} -gt 0 ] || die "run.sh: nothing to run; name a trainer, such as nanogpt.train"
    trainer=${words[0]}
    words=("${words[@]:1}")
    if [[ $trainer != */* && $trainer != *.py ]]; then trainer=${trainer//.//}.py; fi
    if [[ $trainer != /* ]]; then trainer=$ROOT/$trainer; fi
    [ -f "$trainer" ] || die "${trainer#"$ROOT"/}: there is no such trainer"
    # As it was when the job was submitted (code.sh). What already stands in the run's folder goes before either.
    if [ -n "${RUN_CODE:-}" ] && [ -f "$RUN_CODE/${trainer#"$ROOT"/}" ]; then trainer=$RUN_CODE/${trainer#"$ROOT"/}; fi
}

flag_value() { flag_of "$1" ${words[@]+"${words[@]}"}; } # NAME: of the trainer's words

# ---- one node's part --------------------------------------------------------------------------------------------

run_node() { # FOLDER NODES NODE NAMES...: the ranks of this node; FOLDER is shared by the nodes
    local folder=$1 nodes=$2 node=$3 interface address own
    shift 3
    if [ -n "${RUN_GPUS:-}" ]; then gpus=$RUN_GPUS; else choose_gpus; fi
    if [ "$gpus" -lt 1 ]; then gpus=1; fi # a CPU run is one rank
    set_threads "$gpus"
    set_caches
    mkdir -p "$folder"
    echo $((gpus * nodes)) >"$folder/ranks"
    if [ $((gpus * nodes)) -eq 1 ]; then
        exec python "$ROOT/slurm/lib/rank.py" "$folder" "$trainer" ${words[@]+"${words[@]}"}
    fi
    if [ "$nodes" -eq 1 ]; then
        interface=lo address=127.0.0.1
    else
        own=$(python "$ROOT/slurm/lib/rendezvous.py" local "$@") || {
            : >"$folder/failed-$node"
            exit 2
        }
        read -r interface address <<<"$own"
    fi
    set_network "$interface" "$nodes"
    if [ "$node" -eq 0 ]; then
        (trap '' USR1 TERM && exec python "$ROOT/slurm/lib/rendezvous.py" serve "$folder/store" "$address") &
    fi
    (meet "$folder" "$nodes" "$node" "$@") || {
        own=$?
        : >"$folder/failed-$node"
        exit "$own"
    }
    torchrun_words "$nodes" "$folder"
    if [ "$nodes" -eq 1 ]; then
        if [ -z "$torchrun_forwards" ]; then trap '' USR1; fi # else it dies of the signal that its ranks live by
        exec python "$ROOT/slurm/lib/torchrun.py" "${torchrun[@]}"
    fi
    run_one_of_several "$folder" "$nodes" "$node"
}

run_one_of_several() { # FOLDER NODES NODE: the first node's store stays until every node's torchrun has ended well
    local limit others
    trap : TERM USR1 INT # they reach torchrun and the ranks by themselves: all of them are in the step
    if [ -z "$torchrun_forwards" ]; then trap '' USR1; fi
    python "$ROOT/slurm/lib/torchrun.py" "${torchrun[@]}" &
    child=$!
    end_with_others "$1" "$child" &
    wait_for_child
    # The first node's are the batch script's to drop.
    if [ "$3" -ne 0 ] && ! grep -qsx "$EXIT_INTERRUPTED" "$1"/rank-*; then drop_caches; fi
    if [ "$child_status" -ne 0 ]; then
        : >"$1/failed-$3"
        exit "$child_status" # and the store with it: ranks elsewhere would wait for this node's for minutes
    fi
    : >"$1/done-$3"
    limit=$((SECONDS + 60))
    while [ "$3" -eq 0 ] && [ $SECONDS -lt $limit ]; do
        others=("$1"/done-*)
        if [ ${#others[@]} -eq "$2" ]; then break; fi
        sleep 0.1
    done
    exit 0
}

end_with_others() { # FOLDER PROCESS: ends it when another node has failed and it does not notice
    while sleep 2 && kill -0 "$2" 2>/dev/null; do
        if compgen -G "$1/failed-*" >/dev/null; then
            sleep 20
            kill -TERM "$2" 2>/dev/null || :
            return
        fi
    done
}

torchrun_words() { # NODES FOLDER: sets torchrun and torchrun_forwards
    local address port source
    read -r address port _ <"$2/store"
    export RUN_STORE="$address $port" TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
    torchrun=(--nnodes="$1" --nproc-per-node="$gpus" --max-restarts=0 --rdzv-backend=c10d --rdzv-conf=is_host=0)
    torchrun+=(--rdzv-endpoint="$address:$port" --rdzv-id="run-${2##*/}")
    source=$(python -c 'import importlib.util as u; print(u.find_spec("torch").submodule_search_locations[0])') ||
        die "torch: not in this environment; run: bash setup_env.sh"
    torchrun_forwards=""
    if grep -q -- --signals-to-handle "$source/distributed/run.py" 2>/dev/null; then
        torchrun_forwards=yes
        torchrun+=("--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1")
    fi
    if grep -q -- --shutdown-timeout "$source/distributed/run.py" 2>/dev/null; then
        torchrun+=(--shutdown-timeout=600) # the scheduler's grace is the limit, not torchrun's 30 s
    fi
    torchrun+=("$ROOT/slurm/lib/rank.py" "$2" "$trainer" ${words[@]+"${words[@]}"})
}

meet() { # FOLDER NODES NODE NAMES...: returns when all nodes have reached the store; else a line says who has not
    local folder=$1 nodes=$2 node=$3 names=("${@:4}") limit=$((SECONDS + MEETING_SECONDS)) address port other silent
    until [ -s "$folder/store" ]; do # other nodes may see it late on a network file system
        if [ $SECONDS -ge $limit ]; then
            say "error: ${names[0]}: has opened no meeting point within $MEETING_SECONDS s ($folder/store)" >&2
            exit 1
        fi
        look_again "$folder"
    done
    if [ "$node" -ne 0 ]; then python "$ROOT/slurm/lib/rendezvous.py" reach "$folder/store" "${names[0]}" || exit 2; fi
    : >"$folder/here-$node"
    if [ "$node" -ne 0 ]; then return 0; fi
    read -r address port _ <"$folder/store"
    while :; do
        silent=""
        for ((other = 1; other < nodes; other++)); do
            if [ ! -e "$folder/here-$other" ]; then silent+="${silent:+, }${names[other]}"; fi
        done
        if [ -z "$silent" ]; then return 0; fi
        if compgen -G "$folder/failed-*" >/dev/null; then exit 2; fi # which has said why
        if [ $SECONDS -ge $limit ]; then
            say "error: $silent: not heard of within $MEETING_SECONDS s; ${names[0]} waited at $address port $port" >&2
            exit 1
        fi
        look_again "$folder"
    done
}

look_again() { # FOLDER: which NFS may have cached
    ls "$1" >/dev/null
    sleep 0.05
}

set_network() { # INTERFACE NODES: where NCCL and gloo talk, unless the user has said so; InfiniBand stays on
    if [ -n "$1" ]; then
        export GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-$1} NCCL_SOCKET_IFNAME=${NCCL_SOCKET_IFNAME:-$1}
    fi
    if [ "$2" -gt 1 ]; then
        if grep -qs ACTIVE /sys/class/infiniband/*/ports/*/state; then
            say "$(hostname): InfiniBand is up, NCCL uses it; sockets on $1"
        else
            say "$(hostname): no InfiniBand, NCCL talks over ${1:-the interface it finds}"
        fi
    fi
}

# ---- the job's part ---------------------------------------------------------------------------------------------

outcome_of() { # FOLDER STATUS: what the trainer meant, from its ranks' notes, else from its run directory
    local file code codes=" " other="" well=0 ranks="" out_dir
    for file in "$1"/rank-*; do
        code=""
        { read -r code <"$file" || :; } 2>/dev/null
        case $code in
            '') continue ;;
            0) well=$((well + 1)) ;;
            *) other=${other:-$code} ;;
        esac
        codes+="$code "
    done
    for code in 2 70 74 76 1 75; do # a mistake outweighs a crash, a crash outweighs an interruption
        if [[ $codes == *" $code "* ]]; then echo "$code"; return; fi
    done
    { read -r ranks <"$1/ranks" || :; } 2>/dev/null
    if [ -n "$other" ]; then echo "$other"; return; fi
    if [ "$well" = "$ranks" ]; then echo 0; return; fi # a signal after the last step ended torchrun, and nothing else
    out_dir=$(flag_value out_dir)
    if [ "$2" -ne 0 ] && [ -n "$out_dir" ] &&
        tail -n 1 "$out_dir/metrics.jsonl" 2>/dev/null | grep -q '"status": *"interrupted"'; then
        echo "$EXIT_INTERRUPTED"
    else
        echo "$2"
    fi
}

progress_mark() { # changes when the run has saved a checkpoint
    local out_dir
    out_dir=$(flag_value out_dir)
    # shellcheck disable=SC2012  # only whether it changes matters
    if [ -n "$out_dir" ]; then { ls -1 "$out_dir/checkpoints" "$out_dir"/seed-*/checkpoints 2>/dev/null || :; } | cksum; fi
}

state_folder() { # where this job's attempts are noted; beside the logs, so that a requeued job finds it
    local folder
    folder=$PWD/logs/.attempts/${SLURM_CLUSTER_NAME:-slurm}-$(job_name)
    mkdir -p "$folder" || die "$folder: cannot be made; check the quota of this file system"
    echo "$folder"
}

supervise() { # a batch job: attempts until the run is done, moved to a later start of the job, or given up
    local state failures mark before folder status started
    choose_gpus
    export RUN_GPUS=$gpus
    state=$(state_folder)
    failures=$(cat "$state/failures" 2>/dev/null || echo 0)
    is_number "$failures" || failures=0
    trap 'on_signal USR1' USR1
    trap 'on_signal TERM' TERM
    child_signal=USR1
    while :; do
        started=$SECONDS
        folder=$state/$((${SLURM_RESTART_COUNT:-0} + 1)).$((failures + 1)).$(date +%s)
        mkdir -p "$folder"
        before=$(progress_mark)
        run_step "$folder"
        status=$(outcome_of "$folder" "$child_status")
        mark=$(progress_mark)
        printf '%s restart=%s status=%s signal=%s seconds=%s\n' "$(date '+%F %T')" "${SLURM_RESTART_COUNT:-0}" \
            "$status" "${signalled:-none}" $((SECONDS - started)) >>"$state/history"
        case $status in
            0) break ;;
            "$EXIT_INTERRUPTED")
                echo 0 >"$state/failures"
                requeue_or_explain saved "$(flag_value out_dir)/stop"
                exit "$EXIT_INTERRUPTED"
                ;;
            2 | 70 | 74 | 76) break ;; # another attempt would end the same way
            137 | 138 | 143) # the signal came before the trainer listened to it, or left it no time
                if [ -n "$signalled" ]; then
                    requeue_or_explain "ended before it could save" "$(flag_value out_dir)/stop"
                    exit "$EXIT_INTERRUPTED"
                fi
                ;;
        esac
        if [ -n "$signalled" ]; then break; fi # being ended: there is nothing to start again
        if [ "$mark" != "$before" ]; then failures=1; else failures=$((failures + 1)); fi
        echo "$failures" >"$state/failures"
        if [ "$failures" -ge "$MAX_FAILURES" ]; then
            say "--- the trainer broke $MAX_FAILURES times in a row without a new checkpoint (status $status):" \
                "giving up; what it said is above$(more_memory "$status")"
            break
        fi
        say "--- the trainer broke (status $status), failure $failures of $MAX_FAILURES in a row:" \
            "once more in $RETRY_SECONDS s"
        sleep "$RETRY_SECONDS"
    done
    drop_caches
    exit "$status"
}

more_memory() { # STATUS: of a trainer that was killed, what to ask for; to be appended to a message
    local name amount option
    if [ "$1" != 137 ]; then return 0; fi
    for name in gpu cpu node; do
        amount=SLURM_MEM_PER_${name^^} option=--mem-per-$name
        if [[ ${!amount:-} =~ ^[1-9][0-9]*$ ]]; then
            printf '; killed, as where memory is used up: %s=%sM asks for twice as much' "${option/-per-node/}" $((2 * ${!amount}))
            return
        fi
    done
}

run_step() { # FOLDER: the trainer on all nodes, until it has ended; sets child_status
    # A step that never began says nothing about the trainer. Right after a restart of the controller the nodes have
    # not reported yet, and every step with GPUs is refused ("Invalid generic resource").
    local limit=$((SECONDS + STEP_PATIENCE))
    while :; do
        start_step "$1"
        wait_for_child
        child=""
        if [ "$child_status" -eq 0 ] || [ -e "$1/began" ]; then return; fi
        if [ -z "$signalled" ] && [ $SECONDS -lt $limit ]; then
            say "--- SLURM could not start the trainer (above): once more in 2 s"
            sleep 2
        fi
        if [ -n "$signalled" ]; then child_status=143; return; fi # told to end meanwhile: nothing is lost
        if [ $SECONDS -ge $limit ]; then return; fi
    done
}

start_step() { # FOLDER: one task a node, in the background, so that this shell hears signals
    # The task takes all of the node's CPUs, memory and GPUs that the job has. Said in full, because an inner srun
    # inherits no CPUs from `sbatch --cpus-per-task` since 22.05, and takes the job's --cpus-per-gpu in its own way.
    # What a job that submitted this one has left in the environment (sbatch passes all of it on) is not asked for.
    local nodes=${SLURM_JOB_NUM_NODES:-1} options cpus name
    cpus=$(tr ',' '\n' <<<"${SLURM_JOB_CPUS_PER_NODE:-${SLURM_CPUS_ON_NODE:-}}" | sed 's/(.*//' | sort -n | head -n 1)
    options=(--nodes="$nodes" --ntasks="$nodes" --ntasks-per-node=1 --export=ALL --kill-on-bad-exit=0 --wait=300)
    if [ -n "$cpus" ]; then options+=(--cpus-per-task="$cpus"); fi
    (
        for name in CPUS_PER_{GPU,TASK} MEM_PER_{GPU,NODE,CPU} GPUS{,_PER_NODE,_PER_TASK,_PER_SOCKET} NTASKS_PER_GPU; do
            unset "SLURM_$name"
        done
        RUN_FOLDER=$1 RUN_STEP=$SLURM_JOB_ID exec srun "${options[@]}" bash "$ROOT/slurm/lib/run.sh" "$trainer" ${words[@]+"${words[@]}"}
    ) &
    child=$!
}

run_here() { # without SLURM: once, on this machine; the folder is closed to others
    local folder
    folder=$(mktemp -d "${TMPDIR:-/tmp}/nanogpt-run-XXXXXX") || die "${TMPDIR:-/tmp}: cannot be written"
    trap 'on_signal TERM' TERM HUP
    trap 'on_signal USR1' USR1
    trap 'on_signal INT' INT
    child_signal=TERM # torchrun passes it on, and one rank takes it as it is
    (run_node "$folder" 1 0) &
    child=$!
    wait_for_child
    child_status=$(outcome_of "$folder" "$child_status")
    rm -rf "$folder"
    exit "$child_status"
}

main() {
    local folder names
    if in_step && [ -d "${RUN_FOLDER:-}" ]; then : >"$RUN_FOLDER/began" || :; fi
    parse_words "$@"
    check_settings
    if ! in_step; then announce_job; fi
    activate_environment
    if in_step; then
        [ "${SLURM_LOCALID:-0}" = 0 ] || die "srun: start one task a node: srun --ntasks-per-node=1 bash ..."
        folder=${RUN_FOLDER:-$PWD/logs/.attempts/$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}.step$SLURM_STEP_ID}
        mapfile -t names < <(scontrol show hostnames "${SLURM_STEP_NODELIST:-$SLURM_JOB_NODELIST}")
        [ ${#names[@]} -gt 0 ] || die "scontrol: does not name this job's nodes; is it on PATH?"
        run_node "$folder" "${SLURM_STEP_NUM_NODES:-${SLURM_NNODES:-1}}" "$SLURM_NODEID" "${names[@]}"
    elif in_job && command -v srun >/dev/null 2>&1; then
        supervise
    else
        run_here
    fi
}

main "$@"
