"""Twelve secrets where people keep theirs, and every command beside them: none may stand in anything written or said.

Trainings (one of them breaks), samples, plots, the doctor's support bundle, a launch on this machine. Looked through:
stdout and stderr, every file below the home folder and the clone (archives opened), and the arguments of every process
meanwhile. What sbatch is given: tests/slurm/test_refusals.py and test_launch.py, on a real SLURM.
"""

import contextlib
import os
import random
import shutil
import subprocess
import sys
import tarfile
import threading
from pathlib import Path

from tests.faults import tiny
from tests.faults.campaign import Rig
from tests.faults.outcomes import Tally
from tools.launch.snapshot import copy_code

ROOT = Path(__file__).resolve().parents[2]
MARK = "c4n4ry"
VARIABLES = (
    "WANDB_API_KEY", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "GITHUB_TOKEN", "AWS_SECRET_ACCESS_KEY", "OPENAI_API_KEY",
    "SLURM_JWT",
)  # fmt: skip
FILES = {
    ".netrc": "machine api.wandb.ai login user password {}\n",
    ".cache/huggingface/token": "{}\n",
    ".aws/credentials": "[default]\naws_secret_access_key = {}\n",
    ".ssh/id_ed25519": "-----BEGIN OPENSSH PRIVATE KEY-----\n{}\n-----END OPENSSH PRIVATE KEY-----\n",
}


def commands(data: Path) -> dict[str, list[str]]:
    """Name: words. Each is run in the clone; what fails does so with words that are looked through as well."""
    python, out = sys.executable, "out/canary"
    train = [python, "-m", "nanogpt.train", *tiny.FLAGS, f"--data_root={data}"]
    engaging = [python, "-m", "tools"]
    return {
        "a training": [*train, f"--out_dir={out}"],
        "W&B's files": [*train, "--out_dir=out/tracked", "--wandb_log=true"],
        "a training that breaks": [
            *train,
            "--out_dir=out/broken",
            "--learning_rate=1000",
            "--min_lr=0",
            "--grad_clip=0",
            "--warmup_iters=0",
        ],
        "a resume": [*train, f"--out_dir={out}", "--auto_resume=true", "--max_iters=22"],
        "a sample": [*engaging, "sample", out],
        "a plot": [*engaging, "plot", out],
        "the support bundle": [*engaging, "doctor", "--bundle", "support.tar.gz"],
        "the settings": [*engaging, "config"],
        "a launch": [
            "env",
            "LOCAL=1",
            "bash",
            "slurm/nanogpt/train_shakespeare.sh",
            *train[3:],
            "--out_dir=out/script",
        ],
        "a replay": [*engaging, "repro", f"{out}/log.txt", "--extract-only", "rebuilt"],
        "a download": [python, "nanogpt/data/shakespeare_char/prepare.py", f"--data_root={data}"],
    }


def canaries(rig: Rig, rng: random.Random, count: int) -> Tally:
    """All commands once; `count` is not looked at: there are twelve secrets."""
    tally = Tally(
        "secrets in variables, files and addresses", "in no file, argument, log, bundle or sbatch text"
    )
    home = rig.fresh("canaries")
    secrets = {
        name: f"{MARK}{number:02}{rng.randrange(10**12)}"
        for number, name in enumerate([*VARIABLES, *FILES, "url"])
    }
    for name, text in FILES.items():
        path = home / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text.format(secrets[name]))
        path.chmod(0o600)
    clone = home / "clone"
    copy_code(ROOT, clone)
    (clone / "logs").mkdir(exist_ok=True)
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("SLURM")},
        **{name: secrets[name] for name in VARIABLES}, "HOME": str(home), "WANDB_MODE": "offline",
        "DATA_MIRROR": f"http://user:{secrets['url']}@127.0.0.1:9/", "ENV_PATH": sys.prefix,
        "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    said: dict[str, str] = {}
    with arguments() as seen:
        for name, words in commands(rig.folder / "data").items():
            done = subprocess.run(
                words, cwd=clone, env=environment, capture_output=True, stdin=subprocess.DEVNULL, timeout=900
            )
            said[name] = (done.stdout + done.stderr).decode(errors="replace")
            tally.where[f"{name} (status {done.returncode})"] += 1
    said["the arguments of processes"] = "\n".join(seen)
    planted = {home / name for name in FILES}
    for path in home.rglob("*"):
        if path.is_file() and not path.is_symlink() and path not in planted:
            said[str(path.relative_to(home))] = text_of(path)
    for name, secret in secrets.items():
        tally.injected += 1
        tally.failures += [f"{name}: in {place}" for place, text in said.items() if secret in text]
    tally.clean = len(said)
    shutil.rmtree(home)
    return tally


def text_of(path: Path) -> str:
    """What a file holds, of an archive what its members hold."""
    if tarfile.is_tarfile(path):
        with tarfile.open(path) as archive:
            return "\n".join(
                archive.extractfile(one).read().decode(errors="replace") for one in archive if one.isfile()
            )
    return path.read_bytes().decode(errors="replace")


@contextlib.contextmanager
def arguments():
    """The set of command lines of all processes, looked at all the time within the block."""
    seen: set[str] = set()
    over = threading.Event()

    def look() -> None:
        while not over.wait(0.02):
            for path in Path("/proc").glob("[0-9]*/cmdline"):
                with contextlib.suppress(OSError):
                    seen.add(path.read_bytes().decode(errors="replace"))

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield seen
    finally:
        over.set()
        thread.join()
