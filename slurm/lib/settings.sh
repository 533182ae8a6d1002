# shellcheck shell=sh
# What `engaging config` has set, for scripts and shells: for common.sh, activate_env.sh and tools/bin/engaging, so for
# every POSIX shell. tools/site/settings.py writes these files, reads them with more care, and says what is wrong in one.
# _engaging_sites: the folder of the sites' files, set by who sources this.

engaging_setting() { # KEY: its value in your own file, else in the lab's, else in the site's; nothing where none has it
    # `local` is in every shell that this is for, though not in POSIX.
    # shellcheck disable=SC3043
    local own lab value
    own=${XDG_CONFIG_HOME:-${HOME:-}/.config}/engaging/config.toml
    value=$(_engaging_line "$1" "$own")
    if [ -z "$value" ]; then
        lab=${ENGAGING_LAB:-$(_engaging_line lab "$own")}
        case $lab in [~]/*) lab=$HOME/${lab#??} ;; esac
        if [ -n "$lab" ] && [ -n "$(find -L "$lab" -maxdepth 0 -perm -0002 2>/dev/null)" ]; then
            echo "warning: lab=$lab: not read, since everybody may write to it; its owner: chmod o-w" >&2
        elif [ -n "$lab" ]; then
            value=$(_engaging_line "$1" "$lab")
        fi
    fi
    # SLURM is asked which site this is only where a site's file has settings.
    if [ -z "$value" ] && [ -d "${_engaging_sites:-}" ] && grep -rq '^\[settings\]' "$_engaging_sites"; then
        value=$(sed -n '/^\[settings\]/,$p' "$(engaging_site "$_engaging_sites")" | sed 1d | _engaging_line "$1" -)
    fi
    case $value in [~]/*) value=$HOME/${value#??} ;; esac
    printf '%s' "$value"
}

engaging_site() { # FOLDER: of it, the file of this cluster
    # shellcheck disable=SC3043
    local name file
    case ${ENGAGING_SITE:-} in
        '' | *[!A-Za-z0-9_-]*) name=$(scontrol show config 2>/dev/null | sed -n 's/^ClusterName *= *//p') ;;
        *) printf '%s' "$1/$ENGAGING_SITE.toml" && return ;;
    esac
    for file in "$1"/*.toml; do
        if [ -n "$name" ] && grep -q "^cluster_names *=.*\"$name\"" "$file"; then printf '%s' "$file" && return; fi
    done
    printf '%s' "$1/generic.toml"
}

_engaging_line() { # KEY FILE: what stands in quotes behind the key, above the first table; - is stdin
    if [ -r "$2" ] || [ "$2" = - ]; then
        sed -n "/^[[:space:]]*\[/q
            s/^[[:space:]]*$1[[:space:]]*=[[:space:]]*[\"']\([^\"'\\\\]*\)[\"'][[:space:]]*\(#.*\)\{0,1\}\$/\1/p" "$2"
    fi
}
