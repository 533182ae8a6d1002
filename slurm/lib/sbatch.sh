# shellcheck shell=sh
# Sourced by activate_env.sh in bash and zsh: `sbatch` for this repository's scripts, with what its options leave open
# filled in and checked. Every other script goes to SLURM's own sbatch as it was typed. ENGAGING_SBATCH=0: all do.
# _engaging_lib is this folder, as activate_env.sh has found it.
# shellcheck disable=SC2154

sbatch() {
    if [ "${ENGAGING_SBATCH:-1}" = 0 ] || [ ! -r "$_engaging_lib/sbatch_as_typed.sh" ]; then
        command sbatch "$@"
    else
        bash "$_engaging_lib/sbatch_as_typed.sh" "$@"
    fi
}
