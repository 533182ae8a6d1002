# shellcheck shell=sh
# Activates the environment in the shell that you type in:    source activate_env.sh
#
# For bash, zsh and other POSIX shells. Leaves the shell's options as they are, and never ends the shell: what goes wrong
# is one line and status 1. ENV_PATH names the environment, as for setup_env.sh; CONDA_SH another conda than the one it
# was made with. `engaging` of this clone comes on PATH, too.

_engaging_activate() {
    if [ -z "${ENV_PATH:-}${HOME:-}" ]; then
        echo "error: HOME: not set; name the environment's place in ENV_PATH" >&2
        return 1
    fi
    # `local` is in every shell that this is for, though not in POSIX.
    # shellcheck disable=SC3043
    local env_path conda_sh strict version
    conda_sh=${CONDA_SH:-}
    if [ -n "$conda_sh" ] && [ ! -r "$conda_sh" ]; then
        echo "note: CONDA_SH: $conda_sh: no such file; the environment works without"
        conda_sh=""
    fi
    env_path=${ENV_PATH:-$(_engaging_place)}
    env_path=${env_path:-$HOME/conda_envs/nanogpt_env}
    env_path=${env_path%/}
    case $env_path in
        /*) ;;
        *) env_path=$PWD/$env_path ;;
    esac
    if [ ! -x "$env_path/bin/python" ]; then
        echo "error: ENV_PATH: $env_path: no environment there; make it: bash setup_env.sh" >&2
        return 1
    fi
    if [ ! -e "$env_path/.engaging-nanogpt" ]; then
        echo "error: ENV_PATH: $env_path: its set-up did not come to its end; run again: bash setup_env.sh" >&2
        return 1
    fi
    export PYTHONNOUSERSITE=1 # packages in ~/.local must not take the place of the pinned ones
    if [ -n "${ENV_PATH:-}" ]; then export ENV_PATH="$env_path"; fi # for `engaging` and for jobs
    if [ "$(command -v python)" = "$env_path/bin/python" ]; then
        _engaging_on_path
        echo "$env_path is active already"
        return 0
    fi
    strict=no # the start-up code of conda and of its packages reads variables that are not set
    case $- in *u*) strict=yes ;; esac
    set +u
    if [ -e "$env_path/bin/activate" ] && [ -e "$env_path/pyvenv.cfg" ]; then
        # shellcheck disable=SC1091
        . "$env_path/bin/activate" || true
    else
        if [ -z "$conda_sh" ] && [ -r "$env_path/.conda_sh" ]; then conda_sh=$(cat "$env_path/.conda_sh"); fi
        if [ -r "$conda_sh" ]; then
            # shellcheck disable=SC1090
            . "$conda_sh" && conda activate "$env_path" || true
        fi
    fi
    if [ "$strict" = yes ]; then set -u; fi
    if [ "$(command -v python)" != "$env_path/bin/python" ]; then
        # No conda any more (its module went away), or it failed: the environment itself works without.
        PATH=$env_path/bin:$PATH
        export PATH
        echo "note: conda could not activate $env_path, so it is only put first on PATH"
    fi
    _engaging_on_path
    if ! version=$(python -c 'import sys; print(sys.version.split()[0])' 2>/dev/null); then
        echo "error: ENV_PATH: $env_path: its Python does not start; run: bash setup_env.sh --rebuild" >&2
        return 1
    fi
    echo "$env_path is active: Python $version"
}

_engaging_place() { # that `engaging config set env_path` remembers; nothing else of this stays in your shell
    if [ -r "$_engaging_lib/settings.sh" ]; then
        # shellcheck disable=SC2034  # for settings.sh
        _engaging_sites=$_engaging_lib/../sites
        # shellcheck source=slurm/lib/settings.sh
        . "$_engaging_lib/settings.sh" && engaging_setting env_path
    fi
}

_engaging_on_path() { # in front: an environment of an earlier version has an `engaging` of its own
    if [ "$(command -v engaging)" != "$_engaging_bin/engaging" ] && [ -x "$_engaging_bin/engaging" ]; then
        PATH=$_engaging_bin:$PATH
        export PATH
    fi
}

# Where is this file, and is it sourced, or run by mistake? Each shell says it in its own way.
_engaging_file=./activate_env.sh
if [ -n "${ZSH_VERSION:-}" ]; then
    eval '_engaging_file=${(%):-%x}' # other shells cannot read this
    case ${ZSH_EVAL_CONTEXT:-file} in
        *file*) _engaging_sourced=yes ;;
        *) _engaging_sourced=no ;;
    esac
elif [ -n "${BASH_VERSION:-}" ]; then
    # shellcheck disable=SC3028,SC3054,SC2128
    _engaging_file=$BASH_SOURCE
    # shellcheck disable=SC3028,SC3054,SC2128
    if [ "${BASH_SOURCE:-}" = "$0" ]; then _engaging_sourced=no; else _engaging_sourced=yes; fi
else
    case $0 in
        *activate_env.sh) _engaging_sourced=no ;;
        *) _engaging_sourced=yes ;;
    esac
fi
if [ "$_engaging_sourced" = no ]; then
    echo "error: activate_env.sh: run like this it changes nothing; type: source activate_env.sh" >&2
    exit 2
fi
_engaging_root=$(CDPATH='' cd -- "$(dirname -- "$_engaging_file")" && pwd -P)
_engaging_bin=$_engaging_root/tools/bin
_engaging_lib=$_engaging_root/slurm/lib
# The function sbatch, for bash and zsh: the guides' lines work as they are printed.
# shellcheck source=slurm/lib/sbatch.sh
if [ -n "${BASH_VERSION:-}${ZSH_VERSION:-}" ] && [ -r "$_engaging_root/slurm/lib/sbatch.sh" ]; then
    . "$_engaging_root/slurm/lib/sbatch.sh"
fi
unset _engaging_sourced _engaging_file _engaging_root
_engaging_activate
