# shellcheck shell=bash
# Where an environment's Python comes from: a conda that is there, the system's Python, or Miniforge; and its torch.
# Sourced by setup_env.sh, whose `say`, `die` and `run` it uses. Sets conda_sh, conda_from and base_python, empty where there
# is none, and the torch_* of `choose_torch`.
# shellcheck disable=SC2034,SC2154  # set for setup_env.sh, and by it

# PyTorch's indices that have the pinned torch, with NVIDIA's oldest driver for each.
readonly TORCH_INDICES=https://download.pytorch.org/whl MIN_DRIVER_CU13=580 MIN_DRIVER_CU12=525
readonly TORCH_BUILDS="$TORCH_INDICES/cu130=$MIN_DRIVER_CU13 $TORCH_INDICES/cu126=$MIN_DRIVER_CU12 $TORCH_INDICES/cpu="
readonly MINIFORGE_VERSION=26.3.2-3

conda_sh_of() { # the conda.sh of a conda command's installation, or nothing
    local base
    base=$("$1" info --base 2>/dev/null) || return 0
    if [ -f "$base/etc/profile.d/conda.sh" ]; then printf '%s\n' "$base/etc/profile.d/conda.sh"; fi
}

conda_of_module() { # through the module system, in a shell of its own: modules may leave anything behind
    (
        set +eu
        if ! type module >/dev/null 2>&1; then
            for init in /etc/profile.d/lmod.sh /etc/profile.d/z00_lmod.sh /etc/profile.d/modules.sh; do
                # shellcheck disable=SC1090  # there is no such file where this is checked
                if [ -r "$init" ]; then . "$init" >/dev/null 2>&1; fi
            done
        fi
        type module >/dev/null 2>&1 && module load "${MINIFORGE_MODULE:-miniforge}" >/dev/null 2>&1
        if command -v conda >/dev/null 2>&1; then conda_sh_of conda; fi
    )
}

find_conda() { # sets conda_sh and conda_from
    local folder
    conda_sh="" conda_from=""
    if [ -n "${CONDA_SH:-}" ]; then
        [ -f "$CONDA_SH" ] || die "CONDA_SH: $CONDA_SH: no such file; it is <conda's folder>/etc/profile.d/conda.sh"
        conda_sh=$CONDA_SH conda_from="CONDA_SH"
        return
    fi
    if command -v conda >/dev/null 2>&1; then
        conda_sh=$(conda_sh_of conda) conda_from="conda on PATH"
    elif [ -n "${CONDA_EXE:-}" ] && [ -x "$CONDA_EXE" ]; then
        conda_sh=$(conda_sh_of "$CONDA_EXE") conda_from="CONDA_EXE"
    fi
    if [ -n "$conda_sh" ]; then return; fi
    conda_sh=$(conda_of_module) conda_from="module load ${MINIFORGE_MODULE:-miniforge}"
    if [ -n "$conda_sh" ]; then return; fi
    for folder in "$HOME"/{miniforge3,mambaforge,miniconda3,anaconda3,conda} \
        /opt/{miniforge3,conda,miniconda3,anaconda3} /usr/local/{miniforge3,miniconda3}; do
        if [ -f "$folder/etc/profile.d/conda.sh" ] && [ ! -e "$folder.setup" ]; then
            conda_sh=$folder/etc/profile.d/conda.sh conda_from=$folder
            return
        fi
    done
    conda_from=""
}

find_python() { # sets base_python: one that runs, can make a venv, and has all pinned packages
    local name found wrong=""
    base_python=""
    local probe='
import sys
if not (3, 10) <= sys.version_info[:2] <= (3, 14):
    sys.exit(f"is Python {sys.version_info[0]}.{sys.version_info[1]}, and 3.10 to 3.14 is needed")
try:
    import ensurepip, venv
except ImportError:
    sys.exit("lacks the venv module (on Debian and Ubuntu: apt-get install python3-venv)")
print(getattr(sys, "_base_executable", "") or sys.executable)'
    if [ -n "${ENV_PYTHON:-}" ]; then
        base_python=$("$ENV_PYTHON" -c "$probe" 2>&1) || die "ENV_PYTHON: $ENV_PYTHON: ${base_python:-does not start}"
        return
    fi
    for name in python3.12 python3.13 python3.11 python3.14 python3.10 python3 uv; do
        command -v "$name" >/dev/null 2>&1 || continue
        if [ "$name" = uv ]; then # one that uv has installed; it shall not download another
            name=$(uv python find --no-python-downloads '>=3.10,<3.15' 2>/dev/null) || continue
        fi
        if found=$("$name" -c "$probe" 2>&1); then
            base_python=$found
            return
        fi
        case $found in # a version manager's stand-in for a Python that is not there says something else: skip it
            is\ Python* | lacks*) wrong="$name $found" ;;
        esac
    done
    die "no conda, and no Python 3.10 to 3.14 to make a venv with${wrong:+ ($wrong)}; install one (Debian 12, Ubuntu" \
        "22.04 and newer: apt-get install python3-venv python3-dev; EL8: dnf install python3.12 python3.12-devel;" \
        "macOS: brew install python@3.12), name one in ENV_PYTHON, or: bash setup_env.sh --install-miniforge"
}

driver_version() { # the major version of NVIDIA's driver, or nothing
    local driver
    driver=$(nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null) || return 0
    driver=${driver%%.*}
    case $driver in *[!0-9]*) ;; *) printf '%s\n' "$driver" ;; esac
}

slurm_gpus() { # why jobs may meet a GPU that is not here; nothing where there is no SLURM, or none in its partitions
    local gres
    command -v sinfo >/dev/null 2>&1 || return 0
    if ! gres=$(sinfo -h -o %G 2>/dev/null); then
        echo "no GPU here, and SLURM does not say what its nodes have"
    elif printf '%s\n' "$gres" | grep -Eq '(^|,)gpu(:|$)'; then
        echo "no GPU here, but in partitions of this cluster"
    fi
}

pip_has_another_index() { # by a variable, or in one of its files
    local config=${PIP_CONFIG_FILE:-} words='^[[:space:]]*(index-url|extra-index-url|find-links|no-index)[[:space:]]*[=:]'
    if [ -n "${PIP_INDEX_URL:-}${PIP_EXTRA_INDEX_URL:-}${PIP_FIND_LINKS:-}${PIP_NO_INDEX:-}" ]; then return 0; fi
    if [ "$config" = /dev/null ]; then return 1; fi # how pip is told to read no file
    grep -Eqs "$words" "${config:-/dev/null}" /etc/pip.conf "${XDG_CONFIG_DIRS:-/etc/xdg}/pip/pip.conf" \
        "$HOME/.pip/pip.conf" "${XDG_CONFIG_HOME:-$HOME/.config}/pip/pip.conf"
}

# Sets torch_index: the index that an installed torch must have come from, or `any`; torch_build: what it must be built for
# (cpu, cuda, cuda12, or empty: anything); torch_new: the index for a torch that is installed now, empty for pip's own;
# torch_why: the choice in words; torch_later: yes when only jobs meet a GPU. Unless asked, the torch that is there stays:
# a home folder that a login node shares with GPU nodes is set up once.
choose_torch() {
    local driver elsewhere
    torch_index=any torch_build="" torch_new="" torch_later=no
    torch_why="pip's default index, whose build is for CUDA 13.0"
    if [ -n "${TORCH_INDEX_URL:-}" ]; then
        [ -z "$wanted" ] || die "--$wanted: TORCH_INDEX_URL names the build already; leave one of them out"
        torch_index=$TORCH_INDEX_URL torch_new=$TORCH_INDEX_URL torch_why="TORCH_INDEX_URL=$TORCH_INDEX_URL"
        return
    fi
    if [ "$wanted" = cpu ]; then
        torch_build=cpu torch_new=$TORCH_INDICES/cpu torch_why="$TORCH_INDICES/cpu: --cpu"
        return
    fi
    driver=$(driver_version)
    elsewhere=$(slurm_gpus)
    if [ -n "$driver" ] && [ "$driver" -lt $MIN_DRIVER_CU12 ]; then
        die "NVIDIA driver $driver: too old for this torch, which needs $MIN_DRIVER_CU12; update it, or use the CPU" \
            "build: bash setup_env.sh --cpu"
    elif [ -n "$driver" ] && [ "$driver" -lt $MIN_DRIVER_CU13 ]; then
        torch_build=cuda12 torch_new=$TORCH_INDICES/cu126
        torch_why="$torch_new: driver $driver is too old for CUDA 13"
        if [ -z "$wanted" ] && [ -n "$(cat "$torch_from" 2>/dev/null)" ]; then torch_build=""; fi # chosen by somebody
    elif [ -n "$driver" ]; then
        torch_why="$torch_why, and driver $driver runs it"
    elif [ -n "$elsewhere" ]; then
        torch_later=yes torch_why="$torch_why: $elsewhere"
    elif [ -z "$wanted" ] && [ "$(uname -s)" != Linux ]; then
        torch_why="pip's default index"
    elif [ -z "$wanted" ] && pip_has_another_index; then
        torch_why="pip's own index (no GPU here or in SLURM; pip is told where its packages are)"
    elif [ -z "$wanted" ]; then
        torch_new=$TORCH_INDICES/cpu torch_why="$TORCH_INDICES/cpu: no GPU here or in SLURM"
    fi
    if [ "$wanted" = cuda ] && [ -z "$torch_build" ]; then
        [ "$(uname -s)" = Linux ] || die "--cuda: there is no build for CUDA for $(uname -s); leave it out"
        torch_build=cuda torch_new=$TORCH_INDICES/cu130 torch_why="$TORCH_INDICES/cu130: --cuda"
    fi
}

sha256_of() {
    if command -v sha256sum >/dev/null 2>&1; then sha256sum "$1"; else shasum -a 256 "$1"; fi | cut -d ' ' -f 1
}

miniforge_sha256() { # as package managers record them for this release (Spack; Homebrew's cask)
    case $1 in
        Linux-x86_64) echo 848194851a98903134187fbb4ab50efe87b003e0c0f808f97644b7524a62bf2c ;;
        Linux-aarch64) echo 2c113a69297e612b01ca0f320c22a3107a11f2ab9b573d79ac868a175945ce29 ;;
        MacOSX-x86_64) echo 39273e4c89a0a1af4538010615d44ae8f44e1af41007e02def593d20f316b003 ;;
        MacOSX-arm64) echo 59168f1e24d0a4ad9932021170809fca836cd240e183eeeb331d5bcfc0098168 ;;
        *) die "Miniforge: nothing is known for $1; install conda yourself and name its conda.sh in CONDA_SH" ;;
    esac
}

download() { # URL, file
    if command -v curl >/dev/null 2>&1; then
        curl -fsSL --retry 3 -o "$2" "$1"
    elif command -v wget >/dev/null 2>&1; then
        wget -q -O "$2" "$1"
    else
        die "Miniforge: neither curl nor wget is here to download it; install one of them"
    fi
}

install_miniforge() {
    local prefix=$HOME/miniforge3 platform file url want have folder
    case $prefix in
        *' '*) die "Miniforge: $prefix: its installer takes no space in a path; install conda elsewhere, set CONDA_SH" ;;
    esac
    platform=$(uname -s)-$(uname -m)
    platform=${platform/Darwin/MacOSX}
    file=Miniforge3-$MINIFORGE_VERSION-$platform.sh
    url=${MINIFORGE_URL:-https://github.com/conda-forge/miniforge/releases/download/$MINIFORGE_VERSION}/$file
    want=${MINIFORGE_SHA256:-$(miniforge_sha256 "$platform")} || exit 2
    if [ -e "$prefix" ] && [ ! -e "$prefix.setup" ]; then
        die "Miniforge: $prefix: is there already, and holds no conda; move it away"
    fi
    folder=$(mktemp -d "$HOME/.miniforge.XXXXXX") || die "Miniforge: $HOME cannot be written"
    trap 'rm -rf "$folder"' EXIT
    say "downloading Miniforge $MINIFORGE_VERSION"
    run download "$url" "$folder/$file" ||
        die "Miniforge: $url: could not be downloaded; check the network, or set MINIFORGE_URL"
    have=$(sha256_of "$folder/$file")
    [ "$have" = "$want" ] || die "Miniforge: $url: SHA-256 is $have, expected $want; it was not run"
    say "installing Miniforge in $prefix"
    : >"$prefix.setup" # until it is gone the folder is half made
    rm -rf "$prefix"
    run bash "$folder/$file" -b -p "$prefix" || die "Miniforge: its installer failed (above); run this again"
    rm -f "$prefix.setup"
    rm -rf "$folder"
    trap - EXIT
    conda_sh=$prefix/etc/profile.d/conda.sh conda_from=$prefix
    [ -f "$conda_sh" ] || die "Miniforge: $prefix holds no etc/profile.d/conda.sh after the installation"
}
