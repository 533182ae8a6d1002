"""What can be launched: three names, and every preset file of the baseline and of the speedrun."""

import subprocess
from dataclasses import dataclass, replace
from pathlib import Path

from nanogpt.common.errors import UserError
from nanogpt.common.flags import nearest

CHECK_TIMEOUT_S = 60
SECRET_WORDS = ("key", "token", "secret", "password")
NOT_SECRET = ("tokens", "eval_tokens", "tokens_per_step", "monkey")


@dataclass(frozen=True)
class Target:
    """One thing to train: `trainer` is a module, `words` stand before the flags, `minutes` suits --time.

    Which GPUs it can use is the trainer's own business; how many of them is known here, for what refuses early.
    """

    name: str
    trainer: str
    words: tuple[str, ...]
    minutes: int = 360
    world_sizes: tuple[int, ...] = ()  # empty: any
    small: bool = False  # any GPU does: of those that are free at once the most modest is taken

    def refuse_gpus(self, gpus: int) -> str | None:
        """Why this many GPUs cannot run it, or None."""
        if self.world_sizes and gpus not in self.world_sizes:
            sizes = ", ".join(map(str, self.world_sizes))
            return f"--gpus={gpus}: {self.name} runs on {sizes} GPUs"
        return None


SPEEDRUN = Target("speedrun", "modded_nanogpt.train_gpt", (), minutes=60, world_sizes=(1, 2, 4, 8))
SMALL = ("quickstart", "train_shakespeare_char", "tiny")
NAMED = {
    "nanogpt": Target("nanogpt", "nanogpt.train", ("train_shakespeare_char",), minutes=60, small=True),
    "gpt2": Target("gpt2", "nanogpt.train", ("train_gpt2",)),
    "speedrun": SPEEDRUN,
}


def resolve(root: Path, name: str) -> Target:
    """The target of a name: one of NAMED, or a preset file of a trainer.

    UserError names the nearest one.
    """
    if name in NAMED:
        return NAMED[name]
    asked = name.removeprefix("./").removesuffix(".py")
    bare = asked.rpartition("/")[2]
    folders = {"nanogpt/config": Target("", "nanogpt.train", ()), "modded_nanogpt/presets": SPEEDRUN}
    there = [*NAMED]
    for folder, like in folders.items():
        known = [path.stem for path in sorted((root / folder).glob("*.py")) if path.stem != "__init__"]
        if bare in known and f"/{folder}/{bare}".endswith(f"/{asked}"):
            return replace(like, name=bare, words=(bare,), small=bare in SMALL)
        there += known
    # A word that several have in common; not one's whole name, which stands for a wrong folder.
    having = [repr(known) for known in there if bare and bare in known] if bare not in there else []
    hint = f"; did you mean {' or '.join(having)}?" if having[1:] else nearest(bare, there)
    raise UserError(f"preset {name!r} does not exist{hint} (there are: {', '.join(there)})")


def need_trainer(root: Path, target: Target) -> None:
    """UserError when this checkout does not hold the trainer."""
    path = root / (target.trainer.replace(".", "/") + ".py")
    if not path.is_file() and not (path.with_suffix("") / "__init__.py").is_file():
        raise UserError(f"{target.name}: this checkout has no {path.relative_to(root)}; update it: git pull")


def check_overrides(words: list[str]) -> list[str]:
    """The words after `--`: flags of the trainer.

    Refuses what is no flag, what the launcher sets, and secrets.
    """
    for word in words:
        shown = word if word.isprintable() else repr(word)
        name, _, _ = word.partition("=")
        bare = name.removeprefix("--").replace("-", "_")
        if not word.startswith("--") or not bare.isidentifier():
            raise UserError(f"{shown[:80]}: after -- only flags of the trainer stand, written --name=value")
        if any(ord(char) < 32 or ord(char) == 127 for char in word):
            raise UserError(f"{shown[:80]}: control characters are not allowed here")
        if bare in ("out_dir", "auto_resume", "check"):
            raise UserError(f"--{bare}: launch sets it itself; the run's name is --name")
        if _is_secret(bare):
            raise UserError(
                f"--{bare}: a secret on a command line is seen by every user of the machine; put it in the "
                "environment (WANDB_API_KEY, HF_TOKEN) or in ~/.netrc"
            )
    return list(words)


def ask_trainer(
    python: Path, root: Path, target: Target, words: list[str], environment: dict[str, str]
) -> None:
    """Let the trainer check its flags, preset and data without a GPU (`--check=true`), before anything
    queues.

    Raises UserError with the trainer's own line.
    """
    command = [str(python), "-m", target.trainer, *target.words, *words, "--check=true"]
    try:
        done = subprocess.run(
            command,
            cwd=root,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=CHECK_TIMEOUT_S,
        )
    except (OSError, subprocess.TimeoutExpired):
        return  # a login node may be slow or odd; the job itself checks again
    if done.returncode == 2:
        lines = [
            line for line in done.stderr.decode("utf-8", "replace").splitlines() if line.startswith("error:")
        ]
        if lines:
            raise UserError(lines[-1].removeprefix("error:").strip())


def _is_secret(name: str) -> bool:
    lowered = name.lower()
    return lowered not in NOT_SECRET and any(
        part in SECRET_WORDS or part.endswith(("key", "secret", "password")) for part in lowered.split("_")
    )
