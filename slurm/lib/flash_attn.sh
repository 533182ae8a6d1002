# shellcheck shell=bash
# Builds FlashAttention for one type of GPU, once for each (torch, CUDA, Python, GPU): later calls install the wheel.
# Sourced after common.sh by slurm/modded/build_flash_attn.sh. The pins are checked before anything is unpacked.

readonly FA_VERSION=2.8.3.post2 # FlashAttention 2, and FlashAttention 3 in its folder hopper/
readonly FA_SHA256=d0f9f0b08a986cdeadbffcf5ec8b3a8f514366c68ad1853d3ab061bc83cc340b
readonly FA_SITE=https://files.pythonhosted.org/packages
readonly FA_FOLDER=$FA_SITE/6c/b1/b77625e3d11260d2bd6a4fc249a4be9a3da97ff848e2222e810c4f0e0211
# FlashAttention 3 without a compiler: the library inside this wheel, built against torch's stable ABI, sm_80 and sm_90.
readonly PREBUILT="xformers==0.0.34 --hash=sha256:381cc47f43e95893e21b7f04f1aa31dc10a81fc95ba92482e4465a5064c77743"
readonly RUNTIME_SHA256=25bba2dfb01d48a9b59ca474a1ac43c6ebf7011f1b0b8cc44f54eb6ac48a96c3
readonly PREBUILT_NEEDS="nvidia-cuda-runtime-cu12==12.9.79 --hash=sha256:$RUNTIME_SHA256"
readonly GB_A_JOB=6 # memory of one compiler process with two threads, at its worst

gpu_architecture() { # 80, 89, 90, 120, ...: of the GPU that is here, else of GPU_TYPE, which must not contradict
    local found named
    named=$(architecture_of "${GPU_TYPE:-}")
    found=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | head -n 1 | tr -d '. ') || found=""
    if ! [[ $found =~ ^[0-9]{2,3}$ ]]; then found=$(architecture_of "$(gpu_type_of_job)"); fi
    if [ -n "$named" ] && [ -n "$found" ] && [ "$named" != "$found" ]; then
        die "GPU_TYPE=$GPU_TYPE: is sm_$named, and this job's GPU is sm_$found; submit it for its own type:" \
            "GPU_TYPE=$GPU_TYPE bash slurm/modded/build_flash_attn.sh"
    fi
    found=${found:-$named}
    [ -n "$found" ] ||
        die "GPU_TYPE=${GPU_TYPE:-}: no GPU here to ask, and the type is not known; such as a100, l40s, h100, h200"
    echo "$found"
}

architecture_of() { # TYPE: of the names that clusters use; nothing for another one
    case $1 in
        a100*) echo 80 ;;
        a40* | a6000*) echo 86 ;;
        l40* | l4) echo 89 ;;
        h100* | h200*) echo 90 ;;
        b200* | b300*) echo 100 ;;
        rtx_pro_6000* | rtxpro6000*) echo 120 ;;
    esac
}

memory_gb() { # what this job may use
    local megabytes=${SLURM_MEM_PER_NODE:-}
    if [ -n "$megabytes" ]; then
        echo $((megabytes / 1024))
    else
        awk '/^MemAvailable/ { print int($2 / 1048576) }' /proc/meminfo
    fi
}

build_jobs() { # compiler processes: by CPUs and by memory, whichever allows fewer
    local cpus memory jobs
    cpus=${SLURM_CPUS_PER_TASK:-$(nproc)}
    memory=$(memory_gb)
    jobs=$((memory / GB_A_JOB < cpus / 2 ? memory / GB_A_JOB : cpus / 2))
    echo $((jobs > 0 ? jobs : 1))
}

find_nvcc() { # a compiler of the CUDA version that torch was built with
    local wanted=$1 found
    if [ -n "${CUDA_HOME:-}" ] && [ -x "$CUDA_HOME/bin/nvcc" ]; then PATH=$CUDA_HOME/bin:$PATH; fi
    if ! command -v nvcc >/dev/null 2>&1 && type module >/dev/null 2>&1; then
        set +eu # module systems do not know these options
        module load "${CUDA_MODULE:-cuda}" >/dev/null 2>&1
        set -eu
    fi
    command -v nvcc >/dev/null 2>&1 ||
        die "nvcc: not found; load CUDA $wanted (CUDA_MODULE names its module, CUDA_HOME its folder), or use --prebuilt"
    found=$(nvcc --version | sed -n 's/.*release \([0-9]*\.[0-9]*\).*/\1/p')
    [ "${found%%.*}" = "${wanted%%.*}" ] ||
        die "nvcc: is CUDA $found, but torch was built with $wanted; CUDA_MODULE or CUDA_HOME names another one"
}

fetch_source() { # FOLDER: sets source, the checked archive
    local fresh
    source=$1/flash_attn-$FA_VERSION.tar.gz
    if [ ! -f "$source" ]; then
        fresh=$(mktemp "$1/.download-XXXXXX")
        curl -fsSL --retry 3 -o "$fresh" "${FLASH_ATTN_URL:-$FA_FOLDER}/flash_attn-$FA_VERSION.tar.gz" ||
            die "flash_attn-$FA_VERSION: could not be downloaded; check the network, or put the archive at $source"
        mv "$fresh" "$source"
    fi
    if [ "$(sha256sum "$source" | cut -d ' ' -f 1)" != "${FLASH_ATTN_SHA256:-$FA_SHA256}" ]; then
        mv "$source" "$source.wrong"
        die "$source: not the pinned content (SHA-256 differs); it was not unpacked: see $source.wrong"
    fi
}

build_wheel() { # CACHE KEY KIND ARCHITECTURE: sets wheel; goes on where an earlier build stopped
    local cache=$1 key=$2 kind=$3 architecture=$4 tree jobs log
    tree=$cache/build-$key
    wheel=$(compgen -G "$cache/$key/*.whl" | head -n 1 || :)
    if [ -n "$wheel" ] && (cd "$cache/$key" && sha256sum -c --quiet SHA256SUMS) >/dev/null 2>&1; then
        say "found: $wheel"
        return
    fi
    exec 9>"$cache/$key.lock"
    flock -n 9 || die "$cache/$key: another job is building it; wait for that one"
    fetch_source "$cache"
    if [ ! -e "$tree/.unpacked" ]; then
        rm -rf "$tree"
        mkdir -p "$tree"
        tar -xzf "$source" -C "$tree" --strip-components=1
        touch "$tree/.unpacked"
    fi
    jobs=$(build_jobs)
    log=$cache/$key.log
    say "building $key with $jobs compiler processes; the compiler's words: $log"
    export MAX_JOBS=$jobs NVCC_THREADS=2 FLASH_ATTENTION_FORCE_BUILD=TRUE FLASH_ATTN_CUDA_ARCHS=$architecture
    export FLASH_ATTENTION_HOME=$cache
    if [ "$kind" = fa3 ] && [ "$architecture" -ge 90 ]; then export FLASH_ATTENTION_DISABLE_SM80=TRUE; fi
    rm -rf "$cache/$key.new"
    (
        if [ "$kind" = fa3 ]; then cd "$tree/hopper"; else cd "$tree"; fi
        python -m pip wheel . --no-deps --no-build-isolation --wheel-dir "$cache/$key.new"
    ) >>"$log" 2>&1 || die "$key: the build failed; see the end of $log (run it again: what is compiled stays)"
    (cd "$cache/$key.new" && sha256sum -- *.whl >SHA256SUMS)
    rm -rf "${cache:?}/$key"
    mv "$cache/$key.new" "$cache/$key"
    wheel=$(compgen -G "$cache/$key/*.whl" | head -n 1)
}

submit_build_unless_in_job() { # SCRIPT [WORDS...]: the build on a CPU partition, behind it installation and check on a GPU
    # shellcheck disable=SC2034  # split_words uses script
    local script words typed place planned partition build cpus memory
    if in_job || [ "${LOCAL:-0}" = 1 ]; then return 0; fi
    begin_submission "$@"
    export GPU_TYPE=${GPU_TYPE:-h200}
    [ -n "$(architecture_of "$GPU_TYPE")" ] || die "GPU_TYPE=$GPU_TYPE: the type is not known; such as a100, l40s, h100, h200"
    TIME=${TIME:-30} # to install and check; the build has its own
    plan_job "$place"
    planned=("${options[@]}")
    partition=$(PARTITION="" candidates cpu mit_normal | head -n 1)
    # shellcheck disable=SC2154  # ask_cluster sets live
    read -r cpus memory < <(awk -F'|' -v p="$partition" '$1 == p { print $4, int($5 / 1024); exit }' <<<"$live")
    options=("--partition=$partition" --gres=none "--cpus-per-task=$((cpus < 32 ? cpus : 32))")
    options+=("--mem=$((memory < 200 ? memory : 200))G" "--time=$(clock_of 300)" ${typed[@]+"${typed[@]}"})
    submit "$place" ${words[@]+"${words[@]}"}
    build=${job:-JOB_OF_THE_LINE_ABOVE}
    options=("${planned[@]}" ${typed[@]+"${typed[@]}"} "--dependency=afterok:$build" --kill-on-invalid-dep=yes)
    submit "$place" ${words[@]+"${words[@]}"}
    exit 0
}

install_prebuilt() {
    local list
    list=$(mktemp)
    printf '%s\n%s\n' "$PREBUILT" "$PREBUILT_NEEDS" >"$list"
    python -m pip install --no-deps --require-hashes -r "$list" || die "--prebuilt: pip could not install it (above)"
    rm -f "$list"
}

flash_attn_cache() { # where wheels and unfinished builds stay
    echo "${FLASH_ATTN_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/engaging-nanogpt/flash-attn}"
}

build_flash_attn() { # [--prebuilt | --fa2 | --fa3]
    local kind="" architecture cache versions torch cuda python key wheel
    case ${1:-} in
        --prebuilt | --fa2 | --fa3) kind=${1#--} ;;
        "") ;;
        *) die "build_flash_attn.sh: $1: expected --prebuilt, --fa2 or --fa3" ;;
    esac
    architecture=$(gpu_architecture) || exit 2
    if [ -z "$kind" ]; then kind=$([ "$architecture" = 90 ] && echo fa3 || echo fa2); fi
    if [[ $kind != fa2 && $architecture != 90 && $architecture != 80 ]]; then
        die "--$kind: FlashAttention 3 is for sm_80 and sm_90, this GPU is sm_$architecture; use --fa2"
    fi
    versions=$(python -c 'import sys, torch
print(torch.__version__.split("+")[0], torch.version.cuda or "none", "cp%d%d" % sys.version_info[:2])') ||
        die "torch: does not import; run: bash setup_env.sh"
    read -r torch cuda python <<<"$versions"
    [ "$cuda" != none ] || die "torch $torch: a build without CUDA; FlashAttention needs one with it: bash setup_env.sh --cuda"
    if [ "$kind" = prebuilt ]; then
        install_prebuilt
    else
        if [ "$kind" = fa2 ] && [ "$architecture" -lt 90 ]; then architecture=80; fi # its code runs on 8.6 and 8.9 too
        cache=$(flash_attn_cache)
        mkdir -p "$cache" || die "FLASH_ATTN_CACHE=$cache: cannot be made"
        key=$kind-$FA_VERSION-torch$torch-cu$cuda-$python-sm$architecture
        if [ -z "$(compgen -G "$cache/$key/*.whl" || :)" ]; then find_nvcc "$cuda"; fi
        build_wheel "$cache" "$key" "$kind" "$architecture"
        if in_job && [ "$(gpus_on_node)" = 0 ]; then
            say "built: $wheel; the job behind this one installs it and checks it on a GPU"
            return
        fi
        python -m pip install --no-deps --force-reinstall "$wheel" || die "$wheel: pip could not install it (above)"
    fi
    python "$ROOT/slurm/lib/check_flash_attn.py" "$kind"
}
