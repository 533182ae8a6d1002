# shellcheck shell=bash
# The trainers as they were when a job was submitted: a copy of them, or else a note of what has changed since.
# Sourced after common.sh.

readonly COPIES=logs/.code # one folder for each state of the code, named by its digest
readonly KEEP_DAYS=30      # a copy that no submission has used for so long goes

keep_code() { # exports RUN_CODE, a copy of the trainers that later edits do not reach; run.sh starts what is in it
    local digest folder fresh
    digest=$(cd "$ROOT" && trainer_files | xargs -0 sha256sum | sha256sum | cut -c 1-16) || digest=""
    folder=$ROOT/$COPIES/$digest
    if [ -n "$digest" ] && [ ! -d "$folder" ]; then
        if fresh=$(mkdir -p "$ROOT/$COPIES" && mktemp -d "$ROOT/$COPIES/.new-XXXXXX" 2>/dev/null) &&
            (cd "$ROOT" && trainer_files | tar -cf - --null -T - | tar -xf - -C "$fresh") 2>/dev/null; then
            mv -T "$fresh" "$folder" 2>/dev/null || rm -rf "$fresh" # another submission was quicker
        fi
    fi
    if [ ! -d "$folder" ] || [ -z "$digest" ]; then
        warn "$ROOT/$COPIES: cannot be written, so what you edit before the job starts changes it"
        return 0
    fi
    touch "$folder"
    find "$ROOT/$COPIES" -mindepth 1 -maxdepth 1 -mtime "+$KEEP_DAYS" -exec rm -rf {} + 2>/dev/null || :
    export RUN_CODE=$folder
}

trainer_files() { find nanogpt modded_nanogpt -name '*.py' -type f -print0 | LC_ALL=C sort -z; }

note_edits() { # in a job that was submitted without a copy: what was changed while it waited is what runs
    local submitted changed count
    if ! in_job || [ "${SLURM_RESTART_COUNT:-0}" != 0 ]; then return 0; fi
    if [ -n "${RUN_CODE:-}" ]; then
        if [ ! -d "$RUN_CODE" ]; then warn "$RUN_CODE is gone: the trainer runs as it is now"; fi
        return 0
    fi
    submitted=$(date -d "$(job_field SubmitTime)" +%s 2>/dev/null) || return 0
    changed=$(find nanogpt modded_nanogpt slurm \( -name '*.py' -o -name '*.sh' \) -newermt "@$((submitted + 1))" | sort)
    if [ -z "$changed" ]; then return 0; fi
    count=$(wc -l <<<"$changed")
    say "note: changed since this job was submitted, and used as it is now:" \
        "$(head -n 5 <<<"$changed" | tr '\n' ' ')"
    if [ "$count" -gt 5 ]; then say "note: and $((count - 5)) more"; fi
}
