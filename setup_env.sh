#!/usr/bin/env bash
# Builds the Python environment: once; repeating it takes seconds, and an interrupted one goes on. See --help.
set -euo pipefail

readonly PYTHON_OF_CONDA=3.12
readonly MIN_TMP_GB=12 # what pip needs to unpack torch for CUDA

usage() {
    cat <<'END'
usage: bash setup_env.sh [options]

Makes $ENV_PATH (default: $HOME/conda_envs/nanogpt_env): a conda environment where there is conda, else a venv with
the system's Python 3.10 to 3.14. Installs the versions pinned in pyproject.toml, imports them all, and prints what
it found. It holds dependencies only and serves every clone: nothing outside $ENV_PATH changes, and no start-up file of a
shell is edited.

  --dev                 what the tests need, too
  --extras LIST         which extras of pyproject.toml to install (default train,tools), or none
  --cuda, --cpu         which build of torch; a torch of the other kind is replaced. Default: the build that is there; in
                        a new environment CUDA where there is a GPU or a SLURM partition with one, else CPU
  --brief               when nothing has to be done, say so in one line and skip the imports
  --plan                say what would be done, and do nothing
  --no-conda            a venv even where there is conda
  --install-miniforge   where there is no conda, first install Miniforge in $HOME/miniforge3 (version pinned, SHA-256
                        checked). Many clusters discourage it: prefer their module
  --rebuild             remove an environment that this script made, and start again
  --help

Settings (environment variables):
  ENV_PATH              where the environment goes
  ENV_PYTHON            the Python of the venv (default: the first that runs of python3.12, 3.13, 3.11, 3.14, 3.10, python3
                        on PATH, or one of uv's)
  CONDA_SH              etc/profile.d/conda.sh of your conda (default: conda on PATH, the module, the usual folders)
  MINIFORGE_MODULE      the module that brings conda (default: miniforge)
  TORCH_INDEX_URL       where torch comes from. Default for CUDA, by NVIDIA's driver: 580 and newer, or only on the
                        cluster's other nodes: pip's index, whose build is for CUDA 13.0; 525 to 579: PyTorch's index
                        for CUDA 12.6. For the CPU: PyTorch's index, or pip's where pip is told to use another
  ENV_MIN_FREE_GB       free disk space to insist on (default 12 with torch, else 1)
  MINIFORGE_URL         the folder that holds the Miniforge installer
  MINIFORGE_SHA256      the installer's digest, when it is not the pinned one

What is tested: the venv for real, conda with a stand-in that builds a real venv. Real conda is checked by users only.
END
}

say() { printf 'setup_env: %s\n' "$*"; }

die() {
    printf 'error: %s\n' "$*" >&2
    exit 2
}

# Ctrl-C reaches every process of the terminal's group. A Python that it meets while starting dies with a fatal error
# of its own, and pip blames the network. So what takes long runs in a group of its own, and this script ends it.
run() {
    set -m
    "$@" </dev/null &
    set +m
    wait $!
}

stopped() { # a trap, which comes before any `|| die`
    trap '' INT TERM HUP
    local child
    for child in $(jobs -p); do
        kill -TERM -- "-$child" 2>/dev/null || true
        wait "$child" 2>/dev/null || true
    done
    say "stopped by $1; what is done stays, and the same command goes on" >&2
    exit "$2"
}

parse_options() {
    extras=train,tools dev=no brief=no plan=no use_conda=yes install_miniforge=no rebuild=no wanted=""
    while [ $# -gt 0 ]; do
        case $1 in
            --dev) dev=yes ;;
            --brief) brief=yes ;;
            --plan) plan=yes ;;
            --no-conda) use_conda=no ;;
            --cuda | --cpu)
                [ -z "$wanted" ] || [ "$wanted" = "${1#--}" ] || die "$1: contradicts --$wanted; leave one of them out"
                wanted=${1#--}
                ;;
            --install-miniforge) install_miniforge=yes ;;
            --rebuild) rebuild=yes ;;
            --extras=*) extras=${1#--extras=} ;;
            --extras)
                [ $# -ge 2 ] || die "--extras: a list is missing; for example --extras train,tools, or none"
                extras=$2
                shift
                ;;
            -h | --help)
                usage
                exit 0
                ;;
            *) die "unknown option $1; all options: bash setup_env.sh --help" ;;
        esac
        shift
    done
    [[ $extras =~ ^[a-z,]+$ ]] ||
        die "--extras: '$extras': expected names of pyproject.toml's extras with commas, or none"
    if [ "$dev" = yes ]; then
        if [ "$extras" = none ]; then extras=dev; else extras=$extras,dev; fi
    fi
}

# ---- where everything is -------------------------------------------------------------------------------------------

locate() {
    root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd -P)
    [ -n "${HOME:-}" ] || die "HOME: not set; set it, or name the environment's place in ENV_PATH"
    # shellcheck disable=SC2034  # for settings.sh
    _engaging_sites=$root/slurm/sites
    # shellcheck source=slurm/lib/settings.sh
    . "$root/slurm/lib/settings.sh"
    env_path=${ENV_PATH:-$(engaging_setting env_path)}
    env_path=${env_path:-$HOME/conda_envs/nanogpt_env}
    [[ $env_path = /* ]] || env_path=$PWD/$env_path
    while [ "$env_path" != "${env_path%/}" ]; do env_path=${env_path%/}; done
    case $env_path in
        '' | "$HOME" | "$root")
            die "ENV_PATH: ${env_path:-/}: the environment needs a folder of its own; for example $HOME/nanogpt_env"
            ;;
    esac
    python=$env_path/bin/python
    stamp=$env_path/.engaging-nanogpt
    torch_from=$env_path/.torch_index
    marker=$env_path.setup # says how far a set-up came, and is what two of them lock
}

# The environment's own Python decides what is complete; `tool` runs it in this clone.
# Call it in a subshell, $() or `run`: it ends the shell that it runs in, and is not for Ctrl-C to interrupt.
tool() {
    trap '' INT
    cd "$root" && exec "$python" -m tools.environment "$@"
}

stamped() { sed -n "s/^$1=//p" "$stamp" 2>/dev/null || true; }

state() { cat "$marker" 2>/dev/null || true; }

record() {
    printf '%s\n' "$1" >"$marker" || die "$marker: cannot be written; free space, or set ENV_PATH to another place"
}

# ---- checks before anything is changed -----------------------------------------------------------------------------

existing_parent() { # the deepest folder of a path that is there already
    local folder=$1
    while [ ! -d "$folder" ]; do folder=$(dirname "$folder"); done
    printf '%s\n' "$folder"
}

free_gb() { # whole GB free where a folder is, or is going to be
    local folder
    folder=$(existing_parent "$1")
    df -Pk "$folder" | awk 'NR == 2 { print int($4 / 1048576) }'
}

may_write() { # asks the file system itself: root passes every other test, on a read-only one too
    local probe=$1/.setup_env.$$
    (: >"$probe") 2>/dev/null || return 1
    rm -f "$probe"
}

is_empty() { [ -d "$1" ] && [ -z "$(ls -A "$1")" ]; }

check_place() {
    local parent need free
    parent=$(existing_parent "$env_path")
    may_write "$parent" || die "ENV_PATH: $env_path: $parent cannot be written; set ENV_PATH to a folder you may write"
    if [ -e "$env_path" ] && [ ! -e "$stamp" ] && [ -z "$(unfinished)" ] && ! is_empty "$env_path"; then
        die "ENV_PATH: $env_path: this script did not make it; remove it yourself, or set ENV_PATH to another place"
    fi
    case ,$extras, in
        *,train,*) need=${ENV_MIN_FREE_GB:-12} ;;
        *) need=${ENV_MIN_FREE_GB:-1} ;;
    esac
    case $need in *[!0-9]*) die "ENV_MIN_FREE_GB: $need: expected a whole number" ;; esac
    if [ -x "$python" ] && [ -z "${ENV_MIN_FREE_GB:-}" ]; then need=1; fi # most of it is there already
    free=$(free_gb "$env_path")
    [ "$free" -ge "$need" ] ||
        die "ENV_PATH: $env_path: $free GB free, $need GB needed; free some, or set ENV_PATH to another disk"
}

own_tmpdir() { # where pip unpacks; an interrupted pip leaves gigabytes there, so it is ours and goes when we go
    local place=${TMPDIR:-/tmp}
    rm -rf "$env_path.tmp"
    if [ "$(free_gb "$place")" -lt $MIN_TMP_GB ]; then
        say "$place has less than $MIN_TMP_GB GB free, so pip unpacks in $env_path.tmp"
        TMPDIR=$env_path.tmp
        mkdir "$TMPDIR" || die "$TMPDIR: cannot be made; free space, or set ENV_PATH to another place"
    else
        TMPDIR=$(mktemp -d "$place/setup_env.XXXXXX") || die "TMPDIR: $place: cannot be written; name another folder"
    fi
    export TMPDIR
    trap 'rm -rf "$TMPDIR"' EXIT
}

unfinished() { # what a set-up that did not come to its end was doing
    case $(state) in creating | installing) state ;; esac
}

lock() { # held as long as file 9 is open: by pip too, should this script be killed under it
    mkdir -p "$(dirname "$env_path")" 2>/dev/null || die "ENV_PATH: $env_path: its folder cannot be made; set ENV_PATH to another place"
    [ ! -d "$marker" ] || die "$marker: is a folder; move it away, or set ENV_PATH to another place"
    { exec 9>>"$marker"; } 2>/dev/null || die "$marker: cannot be written; set ENV_PATH to a folder you may write"
    if try_lock; then return; fi
    say "another setup_env.sh is at work on $env_path; waiting for it"
    until try_lock; do sleep 1; done
}

try_lock() {
    if command -v flock >/dev/null 2>&1; then
        flock -n 9
    else # macOS: the same lock on the same file, taken through Python
        python3 -c 'import fcntl; fcntl.flock(9, fcntl.LOCK_EX | fcntl.LOCK_NB)' 2>/dev/null
    fi
}

# ---- the work ------------------------------------------------------------------------------------------------------

create() {
    record creating # from here until `installing` the folder is ours to remove
    rm -rf "$env_path"
    if [ -n "$conda_sh" ]; then
        say "[1/3] conda environment with Python $PYTHON_OF_CONDA (conda: $conda_from)"
        run "${conda_sh%/etc/profile.d/conda.sh}/bin/conda" create -y -p "$env_path" \
            --override-channels -c conda-forge "python=$PYTHON_OF_CONDA" pip ||
            die "conda could not create $env_path (above); run this again, or with --no-conda for a venv"
    else
        say "[1/3] no conda here, so a venv with the system's $("$base_python" --version) ($base_python)"
        run "$base_python" -m venv "$env_path" ||
            die "$base_python could not make a venv in $env_path (above); free space, or set ENV_PYTHON"
    fi
    [ -x "$python" ] || die "$env_path: holds no bin/python after its creation; run: bash setup_env.sh --rebuild"
    printf '%s\n' "$conda_sh" >"$env_path/.conda_sh" # what activate_env.sh activates it with; empty: a venv
    record installing
}

pip() { cd "$root" && exec "$python" -m pip "$@"; }

pip_install() {
    run pip install --no-input "$@" ||
        die "pip could not install everything (above); what is done stays: check the network and run this again"
}

install_torch() { # the second step of `install_packages`; from pip's own index the third step brings it
    local had had_any=no replace=no pin
    if had=$(cat "$torch_from" 2>/dev/null); then had_any=yes; fi
    if [ "$had_any" = yes ] && [ "$torch_index" = any ] && build_fits; then
        torch_new=$had torch_why="where it came from: ${had:-the default index of pip}"
    fi
    torch_index=$torch_new
    if [ -n "$torch_new" ]; then
        run tool index --torch_index "$torch_new" --builds "$TORCH_BUILDS" || exit 2
    fi
    record installing
    rm -f "$stamp"
    if [ "$had_any" = yes ] && { [ "$torch_new" != "$had" ] || ! build_fits; }; then
        say "torch is replaced: it came from ${had:-the default index of pip}"
        replace=yes
    fi
    printf '%s\n' "$torch_new" >"$torch_from" # before the installation: an interrupted one may have half of it
    say "[2/3] torch from $torch_why"
    pin=$(sed -n 's/.*"\(torch==[^"]*\)".*/\1/p' "$root/pyproject.toml")
    if [ "$replace" = yes ]; then # without a network the old one stays; the new one brings a Triton of its own
        pip_install --force-reinstall --no-deps ${torch_new:+--index-url "$torch_new"} "$pin"
        run pip uninstall -y triton || true
    fi
    if [ -n "$torch_new" ]; then pip_install --index-url "$torch_new" "$pin"; fi
}

build_fits() { # is the installed torch of the kind that is wanted?
    local build
    [ -n "$torch_build" ] || return 0
    build=$(tool build) || return 1
    [[ $torch_build:$build =~ ^(cpu:cpu$|cuda:1|cuda12:12) ]]
}

install_packages() {
    local had_extras lacking
    had_extras=$(stamped extras)
    if [ "$extras" = none ]; then
        extras=${had_extras:-none}
    elif [ -n "$had_extras" ]; then
        extras=$extras,$had_extras
    fi
    case ,$extras, in
        *,train,*) install_torch ;;
        *) torch_index="" ;;
    esac
    record installing
    rm -f "$stamp"
    if compgen -G "$env_path/lib/python3*/site-packages/engaging_nanogpt-*" >/dev/null; then
        say "      an earlier version installed its clone here, in editable mode: that goes"
        run pip uninstall -qy engaging-nanogpt || die "$env_path: pip could not remove engaging-nanogpt (above)"
    fi
    say "[3/3] the pinned packages: $extras"
    run tool lists --extras "$extras" --folder "$TMPDIR" || die "$TMPDIR: cannot be written (above); free space there"
    if [ "$extras" != none ]; then pip_install -c "$TMPDIR/constraints.txt" -r "$TMPDIR/requirements.txt"; fi
    lacking=$(tool lacking --extras "$extras") || die "$env_path: its packages cannot be read; run: bash setup_env.sh --rebuild"
    if [ -n "$lacking" ]; then
        say "      $lacking: this torch (a CPU build) brings none, and the tests of the kernels need it"
        pip_install -c "$TMPDIR/constraints.txt" "$lacking"
    fi
    run tool stamp --extras "$extras" --torch_index "$torch_index"
    record "done"
}

finish() {
    if [ "$brief" = yes ] && [ "$1" = complete ]; then
        say "$env_path is complete"
        return
    fi
    say "importing everything once"
    run tool report --extras "$extras"
    say "ready: $env_path"
    if [ "$brief" = no ]; then # else make goes on with what it was asked for
        say "next: make quickstart     (or, for a shell of your own: source activate_env.sh)"
    fi
    if [ "$torch_later" = no ]; then return; fi
    case $(tool build) in
        '') ;;
        cpu) say "note: this torch is a CPU build; before jobs on GPUs: bash setup_env.sh --cuda" ;;
        *) say "no GPU here: that this torch runs on those of the cluster is checked in the first GPU job" ;;
    esac
}

main() {
    local why="" extra
    trap 'stopped Ctrl-C 130' INT
    trap 'stopped SIGTERM 143' TERM
    trap 'stopped "the end of its terminal" 129' HUP
    parse_options "$@"
    locate
    # shellcheck source=slurm/lib/env.sh
    . "$root/slurm/lib/env.sh"
    # What a user's shell or configuration may carry must not leak into the environment, nor the installation out of it.
    export PYTHONNOUSERSITE=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_USER=0
    unset PYTHONPATH PYTHONHOME PIP_TARGET PIP_PREFIX PIP_REQUIRE_VIRTUALENV
    for extra in ${extras//,/ }; do
        [ "$extra" = none ] || grep -q "^$extra = \[" "$root/pyproject.toml" ||
            die "--extras: $extra: no such extra in pyproject.toml"
    done
    choose_torch
    if [ "$rebuild" = no ] && [ "$plan" = no ] && is_complete; then
        finish complete
        return
    fi
    check_place
    conda_sh="" conda_from="" base_python=""
    if [ "$plan" = no ]; then lock; fi
    if [ "$rebuild" = yes ] || ! runs; then
        if [ "$use_conda" = yes ]; then find_conda; fi
        if [ -z "$conda_sh" ] && [ "$install_miniforge" = yes ] && [ "$plan" = no ]; then install_miniforge; fi
        if [ -z "$conda_sh" ]; then find_python; fi
    fi
    if [ "$plan" = yes ]; then
        show_plan
        return
    fi
    if [ "$rebuild" = no ] && is_complete; then # by the one that held the lock
        finish complete
        return
    fi
    own_tmpdir
    say "$env_path: ${why:-to be made}"
    if [ -n "$conda_sh$base_python" ]; then
        create
    elif [ "$(state)" = installing ]; then
        run tool repair
    fi
    install_packages
    finish new
}

runs() { [ "$(state)" != creating ] && [ -x "$python" ] && "$python" -c 'import pip' >/dev/null 2>&1; }

is_complete() { # and if not, sets why
    why="to be made"
    [ -x "$python" ] && [ -e "$stamp" ] && [ -z "$(unfinished)" ] || return 1
    why=$(tool check --extras "$extras" --torch_index "$torch_index" 2>&1) || return 1
    case ,$extras, in
        *,train,*) build_fits || { why="its torch is of another build than $torch_why"; return 1; } ;;
    esac
}

show_plan() {
    if [ -n "$conda_sh" ]; then
        say "$env_path: conda environment, Python $PYTHON_OF_CONDA, by $conda_sh (found: $conda_from)"
    elif [ -n "$base_python" ]; then
        say "$env_path: venv, $("$base_python" --version), by $base_python (no conda)"
    else
        say "$env_path: is there, and would be brought up to date"
    fi
    say "extras: $extras"
    say "torch from $torch_why"
}

main "$@"
