# shellcheck shell=bash
# A training job's tokens: there, on their way in a job of one's own, or missing. Sourced after common.sh.
# shellcheck disable=SC2034  # first and behind are for submit.sh

has_tokens() { # PLACE SET PATTERN: a set of that data root, or a folder of its own, holds such a file
    compgen -G "$1/$2/$3" >/dev/null || compgen -G "$2/$3" >/dev/null
}

has_begun() { # RUN: it has a checkpoint, so these tokens are what it trains on
    local run=$1
    if [[ $run != /* ]]; then run=$ROOT/$run; fi
    compgen -G "$run/checkpoints/step_*" >/dev/null
}

preparing() { # SCRIPT: the number of one's own job that runs it or waits; nothing for none
    squeue --me -h --name="$(header_value "$ROOT/$1" job-name)" -o %A 2>/dev/null | head -n 1 || :
}

check_flags() { # SCRIPT WORDS...: the trainer's own refusal of a flag or a preset, before the job waits for it
    local script=$1 python trainer preset
    shift
    if [ "${1:-}" = -- ]; then shift; fi # as the scripts do
    python=$(environment_folder)/bin/python
    read -r trainer preset < <(sed -n 's/^exec bash slurm\/lib\/run\.sh \([^ ]*\) \(.*\)--out_dir.*/\1 \2/p' "$script") || return 0
    if [[ $trainer == *trainer* ]]; then trainer=${SPEEDRUN_TRAINER:-modded_nanogpt.train_gpt}; fi
    case $trainer in nanogpt.train | modded_nanogpt.train_gpt) ;; *) return 0 ;; esac
    if [ ! -x "$python" ]; then return 0; fi
    (cd "$ROOT" && "$python" slurm/lib/check_flags.py "$trainer" ${preset:+"$preset"} "$@") || exit "$EXIT_USAGE"
}

note_same_run() { # SCRIPT WORDS...: jobs that train one run take it from each other, which few people mean
    local run job others
    # shellcheck disable=SC2016 # the line of a script, as it stands there
    run=$(sed -n 's/^out=$(run_of \([a-z0-9-]*\))$/\1/p' "$1")
    if [ -z "$run" ] || [ -n "$(flag_of out_dir "${@:2}")" ]; then return 0; fi
    others=$(squeue --me -h --name="$(header_value "$1" job-name)" -o '%A %F_%K' 2>/dev/null) || return 0
    while read -r job others; do # the tasks of an array have runs of their own
        if [[ $others != *_N/A ]]; then continue; fi
        if [[ $(scontrol show job -o "$job" 2>/dev/null) != *" --out_dir"* ]]; then
            note "your job $job trains out/$run too: the one that starts later takes it over, and the other ends;" \
                "for a run of its own: --out_dir=out/NAME behind the script"
            return 0
        fi
    done <<<"$others"
}

need_data() { # SET SCRIPT WORDS...: the trainer's words name the set and its place, where they are not the usual ones
    # Outside a job this sets first to the script that must run before, and behind to a job that does so already. In a
    # job it returns when the tokens are there, goes back into the queue behind a job that prepares them, or ends it.
    local set=$1 script=$2 wanted place job
    shift 2
    wanted=$(flag_of dataset "$@")
    place=$(flag_of data_root "$@")
    place=${place:-$(data_root)}
    first="" behind=""
    announce_job
    if has_tokens "$place" "${wanted:-$set}" manifest.json; then return 0; fi # written when all is there
    if has_begun "$(flag_of out_dir "$@")" && has_tokens "$place" "${wanted:-$set}" '*train*.bin'; then return 0; fi
    job=""
    if [ "${LOCAL:-0}" != 1 ] && [ "${wanted:-$set}" = "$set" ]; then job=$(preparing "$script"); fi
    if [ -n "$job" ]; then
        if in_job; then wait_behind "$job" "$set"; fi
        behind=$job
        return 0
    fi
    if has_tokens "$place" "${wanted:-$set}" '*train*.bin'; then return 0; fi
    if [ "${wanted:-$set}" != "$set" ]; then
        die "--dataset=$wanted: no tokens in $place/$wanted; prepare them first"
    fi
    if [ "$set" = shakespeare_char ] && [ "$place" = "$(data_root)" ]; then # 1 MB: the job makes it
        if in_job || [ "${LOCAL:-0}" = 1 ]; then make_here "$set"; fi
        return 0
    fi
    if in_job || [ "${LOCAL:-0}" = 1 ] || [ "$place" != "$(data_root)" ]; then # GPUs must not wait for a download
        die "DATA_ROOT=$place: no $set there; prepare it first: sbatch $script$(last_attempt "$script")$(not_exported)"
    fi
    first=$script
}

made_folder() { # FLAG SET WORDS...: of the token set that a preparation makes, which --FLAG may name otherwise
    local place name
    place=$(flag_of data_root "${@:3}")
    name=$(flag_of "$1" "${@:3}")
    echo "${place:-$(data_root)}/${name:-$2}"
}

make_here() { # SET: with the environment's Python, and nothing else of it stays in this shell
    (
        begin_job >/dev/null
        python "nanogpt/data/$1/prepare.py"
    )
}

last_attempt() { # SCRIPT: how the newest job that ran it ended, to be appended to a message; nothing where none did
    local name row
    in_job || return 0
    name=$(header_value "$ROOT/$1" job-name)
    # The controller knows what has just ended; the accounting hears of it later, and keeps it longer.
    row=$(squeue --me -h --states=all --name="$name" --sort=-i -o '%A|%T' 2>/dev/null | head -n 1) || row=""
    if [ -z "$row" ]; then
        row=$(timeout 5 sacct -X -n -P -S now-7days --name="$name" -o JobID,State 2>/dev/null | tail -n 1) || row=""
    fi
    if [ -n "$row" ]; then printf ' (job %s did: %s, its log: logs/%s-%s.out)' "${row%%|*}" "${row#*|}" "$name" "${row%%|*}"; fi
}

wait_behind() { # JOB SET: gives the GPUs back, and starts again when that job has ended, however it did
    local name
    name=$(job_name)
    if in_step || [ "$(job_field BatchFlag)" = 0 ]; then
        die "DATA_ROOT: no $2 there yet; your job $1 prepares it: start this again when that has ended"
    fi
    say "--- no $2 there yet; your job $1 prepares it: this job goes back into the queue behind it"
    trap '' TERM # requeueing ends this shell, and the dependency can be set only when it has begun to
    scontrol requeue "$name" || die "job $name: cannot be requeued (above); submit it again when job $1 has ended"
    for _ in 1 2 3 4 5; do
        if scontrol update "JobId=$name" "Dependency=afterany:$1"; then exit 0; fi
        sleep 0.5
    done
    exit 0 # it comes back at once, sees the same, and tries again
}
