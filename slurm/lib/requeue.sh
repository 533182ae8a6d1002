# shellcheck shell=bash
# A job that is told to end (preempted, or near its time limit) ends its work well, and starts again later. Sourced
# after common.sh.
# shellcheck disable=SC2034  # child_status and signalled are run.sh's too

signalled=""
child=""
child_group="" # "-" where the child has a process group of its own, all of which is told

# shellcheck disable=SC2329  # called by traps
on_signal() { # two different signals may come at once and bash may lose one: either does the same
    signalled=$1
    if [ -n "$child" ]; then kill -s "$child_signal" -- "$child_group$child" 2>/dev/null || :; fi
}

wait_for_child() { # its exit status in child_status, however often a signal interrupts the wait
    while :; do
        child_status=0
        wait "$child" || child_status=$?
        if ! kill -0 "$child" 2>/dev/null; then return; fi
    done
}

requeue_or_explain() { # HOW its work ended, and the STOP file of a run: the job starts again later and goes on
    local name state again how=$1 left=""
    name=$(job_name)
    again="submit it again, and it goes on from there"
    if [ "${SLURM_RESTART_COUNT:-0}" -ge "${MAX_RESTARTS:-100}" ]; then
        left="job $name has restarted ${SLURM_RESTART_COUNT:-0} times (MAX_RESTARTS): $again"
    elif [ "$(job_field BatchFlag)" = 0 ]; then
        left="job $name is interactive: $again"
    elif [ -n "${2:-}" ] && [ -e "$2" ]; then
        left="the run was stopped by its file 'stop': remove that, then $again"
    elif state=$(job_field JobState) && [ -n "$state" ] && [ "$state" != RUNNING ]; then
        left="job $name is being ended ($state); if it was preempted, SLURM starts it again"
    elif ! command -v scontrol >/dev/null 2>&1; then
        left="scontrol is not on PATH, so the job cannot requeue itself: $again"
    fi
    if [ -n "$left" ]; then
        say "--- $how; $left"
        return
    fi
    say "--- $how; job $name requeues itself and will go on" # before: SLURM may end this shell before scontrol returns
    for _ in 1 2 3 4 5 6; do # the controller may be away for a moment
        if scontrol requeue "$name"; then
            sleep 60 # SLURM ends this shell now; ending by itself it would look like a finished job
            return
        fi
        sleep 5
    done
    say "--- job $name could not be requeued: $again"
}

go_on_later() { # FOLDER PATTERN COMMAND...: work that goes on where it was ended; what it keeps are such files of FOLDER
    local folder=$1 pattern=$2 before
    shift 2
    if ! in_job || in_step || [ "$(job_field BatchFlag)" = 0 ]; then # at a terminal, which Ctrl-C comes from
        "$@"
        exit
    fi
    before=$(bytes_kept "$folder" "$pattern")
    trap 'on_signal USR1' USR1
    trap 'on_signal TERM' TERM
    child_signal=TERM child_group=-
    set -m # compilers that outlive their shell would go on writing, and hold the build's lock
    "$@" &
    child=$!
    set +m
    wait_for_child
    if [ "$child_status" -eq 0 ] || [ -z "$signalled" ]; then exit "$child_status"; fi
    if at_time_limit && [ "$(bytes_kept "$folder" "$pattern")" -le "$before" ]; then # else it would try for ever
        say "--- out of time before anything new was in $folder: submit it again with a longer --time"
        exit "$child_status"
    fi
    requeue_or_explain "what has come is kept"
    exit "$EXIT_INTERRUPTED"
}

at_time_limit() { # whether the job is near it, or its limit is not known; else it is preempted
    local limit
    limit=$(minutes_of "$(job_field TimeLimit)")
    [ -z "$limit" ] || [ "$SECONDS" -gt $((limit * 60 - 180)) ] # --signal=B:USR1@60 may come 60 s early
}

bytes_kept() { # FOLDER PATTERN
    { find "$1" -name "$2" -type f -printf '%s\n' 2>/dev/null || :; } | awk '{ sum += $1 } END { printf "%d", sum }'
}
