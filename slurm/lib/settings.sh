# shellcheck shell=sh
# What `engaging config` has set, for scripts and shells: for common.sh, activate_env.sh and tools/bin/engaging, so for
# every POSIX shell. tools/site/settings.py writes these files, reads them with more care, and says what is wrong in one.

engaging_setting() { # KEY: its value in your own file, else in the lab's; nothing where neither has it
    # `local` is in every shell that this is for, though not in POSIX.
    # shellcheck disable=SC3043
    local own lab value
    own=${XDG_CONFIG_HOME:-${HOME:-}/.config}/engaging/config.toml
    value=$(_engaging_line "$own" "$1")
    if [ -z "$value" ]; then
        lab=${ENGAGING_LAB:-$(_engaging_line "$own" lab)}
        case $lab in [~]/*) lab=$HOME/${lab#??} ;; esac
        if [ -n "$lab" ] && [ -n "$(find -L "$lab" -maxdepth 0 -perm -0002 2>/dev/null)" ]; then
            echo "warning: lab=$lab: not read, since everybody may write to it; its owner: chmod o-w" >&2
        elif [ -n "$lab" ]; then
            value=$(_engaging_line "$lab" "$1")
        fi
    fi
    case $value in [~]/*) value=$HOME/${value#??} ;; esac
    printf '%s' "$value"
}

_engaging_line() { # FILE KEY: what stands in quotes behind the key, above the first table
    if [ -r "$1" ]; then
        sed -n "/^[[:space:]]*\[/q
            s/^[[:space:]]*$2[[:space:]]*=[[:space:]]*[\"']\([^\"'\\\\]*\)[\"'][[:space:]]*\(#.*\)\{0,1\}\$/\1/p" "$1"
    fi
}
