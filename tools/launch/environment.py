"""What a job sees of the submitting shell, and whether the shell is fit to submit.

The job gets a list of names, not the whole environment: a stray PYTHONPATH or SBATCH_PARTITION of today
would change the run in a way that no file shows. Tokens (WANDB_API_KEY, HF_TOKEN) go from environment to
environment: they stand in no argument, no script, no file of ours and no log. SLURM keeps them with the job
as it does for every `sbatch`.
"""

import importlib.util
import os
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

from nanogpt.common.errors import StorageError, UserError
from nanogpt.common.storage import check_room, make_folder, storage_errors

KEPT = {
    "HOME", "USER", "LOGNAME", "SHELL", "PATH", "LANG", "TZ", "TERM", "LD_LIBRARY_PATH", "BASH_ENV",
    "SLURM_CONF",
    "CONDA_SH", "ENV_PATH", "VIRTUAL_ENV", "CONDA_PREFIX", "CONDA_EXE", "DATA_ROOT", "DATA_MIRROR", "HF_HOME",
    "HF_TOKEN", "HF_ENDPOINT", "HF_HUB_OFFLINE", "HF_HUB_CACHE", "HF_DATASETS_CACHE", "TIKTOKEN_CACHE_DIR",
    "WANDB_API_KEY", "WANDB_MODE", "WANDB_PROJECT", "WANDB_ENTITY", "WANDB_BASE_URL", "WANDB_DIR",
    "CUDA_HOME",
    "XDG_CACHE_HOME", "http_proxy", "https_proxy", "no_proxy", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY",
    "SSL_CERT_FILE", "MODULEPATH", "MODULESHOME", "MODULESHOME_modshare", "BASH_FUNC_module%%",
    "BASH_FUNC_ml%%",
    "MAX_RESTARTS", "FINEWEB_CHUNKS",
}  # fmt: skip
KEPT_PREFIXES = ("LC_", "LMOD_", "NCCL_", "TORCH_NCCL_", "NANOGPT_", "ENGAGING_")
SECRETS = ("TOKEN", "KEY", "SECRET", "PASSWORD", "PASSWD", "CREDENTIAL")
ROOM = 256 << 20  # bytes that a launch wants to see free: logs, the code copy, the first checkpoint


def job_environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """The variables a job is submitted with: the kept ones of this shell, then `extra`."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if name in KEPT or (name.startswith(KEPT_PREFIXES) and not is_secret(name))
    }
    return {**kept, **(extra or {})}


def for_run(root: Path, python: Path, max_restarts: int) -> dict[str, str]:
    """What slurm/lib/run.sh is told by variables: the environment, the data, how often to go on."""
    return {
        "ENV_PATH": str(python.parent.parent),
        "DATA_ROOT": str(Path(os.environ.get("DATA_ROOT") or root / "data").absolute()),
        "MAX_RESTARTS": str(max_restarts),
    }


def is_secret(name: str) -> bool:
    """Whether a variable's name says that its value must not be shown."""
    return any(word in name.upper() for word in SECRETS)


def environment_python() -> Path | None:
    """The Python that runs the trainer: `$ENV_PATH`'s when that is set, else ~/conda_envs/nanogpt_env's, the active
    environment's, this one. None where there is no torch.
    """
    asked = os.environ.get("ENV_PATH")
    active = [os.environ.get(name) for name in ("VIRTUAL_ENV", "CONDA_PREFIX")]
    prefixes = (
        [asked] if asked else [Path.home() / "conda_envs" / "nanogpt_env", *filter(None, active), sys.prefix]
    )
    for prefix in map(Path, prefixes):
        python = prefix / "bin" / "python"
        if python.exists() and any(prefix.glob("lib/python3.*/site-packages/torch/__init__.py")):
            return python
    return Path(sys.executable) if not asked and importlib.util.find_spec("torch") else None


def need_environment() -> Path:
    """`environment_python`, or UserError with the command that builds it."""
    python = environment_python()
    if python is None:
        where = os.environ.get("ENV_PATH") or "~/conda_envs/nanogpt_env"
        raise UserError(f"ENV_PATH={where}: no Python with torch there; build it first: bash setup_env.sh")
    return python


def need_log_folder(root: Path) -> Path:
    """Make `logs/` and try a write: SLURM starts no job whose log it cannot open, and says so nowhere."""
    folder = root / "logs"
    if folder.is_symlink() and not folder.exists():
        raise UserError(f"{folder}: a link to a folder that is gone; remove it: rm {folder.name}")
    make_folder(folder)
    probe = folder / f".probe-{os.getpid()}"
    with storage_errors(folder):
        try:
            probe.write_bytes(b"\0" * 65536)
        finally:
            probe.unlink(missing_ok=True)
    try:
        check_room(folder, ROOM)
    except StorageError as error:
        raise StorageError(f"{error} (nothing was submitted)") from None
    return folder


def need_program(name: str, remedy: str) -> str:
    """The path of a program, or UserError."""
    path = shutil.which(name)
    if path is None:
        raise UserError(f"{name}: not found on PATH; {remedy}")
    return path
