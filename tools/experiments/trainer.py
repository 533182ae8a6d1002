"""What a configuration means as a command: which script, which flags, which variables."""

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

from nanogpt.common.errors import UserError
from nanogpt.common.flags import nearest
from tools.experiments.config import ExperimentConfig, StageConfig
from tools.launch.presets import check_overrides

SMALL = "modded_nanogpt/train_gpt_simple.py"
# Names under which configurations of before know the small trainer; the speedrun's is modded_nanogpt/train_gpt.py.
OLD_NAMES = ("train_gpt.py", "experiments/train_gpt.py", "nanogpt/train_gpt.py")
FOLDERS = (
    "",
    "modded_nanogpt",
    "nanogpt",
    "tools/experiments",
)  # where a script is looked for, after the path as it stands
OURS = ("tools/experiments/trainer.py",)  # in one of them, and no trainer
HELP_TIMEOUT_S = 60
POSITIVE = ("num_iterations", "batch_size", "device_batch_size")


@dataclass(frozen=True)
class Trainer:
    """A script and how it takes what the runner says.

    `run_directory`: it takes --out_dir and writes a run directory; otherwise it prints the lines of the old runner's
    scripts (`step:125/5100 val_loss:5.2340 train_time:15000ms step_avg:120.00ms`), and gets its seed as SEED.
    """

    script: str  # relative to the checkout
    run_directory: bool
    stage_variables: bool  # it reads STAGE_NUM_ITERATIONS and so on; otherwise they are flags
    takes_plan: bool  # --plan=FILE: many runs in one process
    takes_target: bool = False  # --target_val_loss


def find(root: Path, config: ExperimentConfig, where: str) -> Trainer:
    """The trainer that `config.script` names; `where` is the configuration's path, for messages."""
    asked = config.script.removeprefix("./")
    if asked in OLD_NAMES and not (root / asked).is_file():
        asked = SMALL
    if asked.startswith(("/", "-")) or ".." in Path(asked).parts:
        raise UserError(f"{where}: script: {asked}: expected a path inside the checkout, such as {SMALL}")
    for folder in FOLDERS:
        path = root / folder / asked
        if path.is_file() and path.suffix == ".py":
            return _look(root, path.relative_to(root).as_posix(), path)
    known = [
        p.relative_to(root).as_posix()
        for f in FOLDERS[1:]
        for p in (root / f).glob("train*.py")
        if f"{f}/{p.name}" not in OURS
    ]
    raise UserError(
        f"{where}: script: {asked}: this checkout has no such script{nearest(asked, known)}; "
        f"there are: {', '.join(sorted(known)) or 'none (update it: git pull)'}"
    )


def _look(root: Path, script: str, path: Path) -> Trainer:
    """What the script takes, from its text and that of the modules beside it that it imports. Nothing is run."""
    text = path.read_text(encoding="utf-8", errors="replace")
    names = re.findall(r"^\s*(?:from|import) ((?:nanogpt|modded_nanogpt)[\w.]*)", text, re.MULTILINE)
    for package, inside in re.findall(r"^\s*from (modded_nanogpt) import ([\w, ]+)", text, re.MULTILINE):
        names += [f"{package}.{name.strip()}" for name in inside.split(",")]
    for name in names:
        for module in (
            root / (name.replace(".", "/") + ".py"),
            root / name.replace(".", "/") / "__init__.py",
        ):
            if module.is_file():
                text += module.read_text(encoding="utf-8", errors="replace")
    return Trainer(
        script,
        run_directory=bool(re.search(r"\bout_dir\b", text)),
        stage_variables=bool(re.search(r"STAGE_(NUM_ITERATIONS|\{|\*)", text)),
        takes_plan=bool(re.search(r"--plan\b|\bplan: str\b", text)),
        takes_target="target_val_loss" in text,
    )


def flags(config: ExperimentConfig, trainer: Trainer) -> list[str]:
    """The words that are the same for every run: preset, hyperparameters, and what the stage changes."""
    words, rest = [], []
    for name, value in config.hyperparameters.items():
        if name == "preset":
            words.append(str(value))
        elif name != "notes":
            rest.append(f"--{name}={_text(value)}")
    if not trainer.stage_variables:
        rest += [f"--{name}={value}" for name, value in stage_values(config).items()]
    rest += [f"--{name}={value}" for name, value in target(config, trainer).items()]
    return words + check_overrides(rest)


def as_of_old(config: ExperimentConfig, trainer: Trainer) -> ExperimentConfig:
    """The script by its path; where an old name means the small trainer, what that script was: its preset."""
    values = dict(config.hyperparameters)
    if trainer.script == SMALL and config.script.removeprefix("./") in OLD_NAMES:
        values = {"preset": "historical", **values}
    return config.model_copy(update={"script": trainer.script, "hyperparameters": values})


def staged(config: ExperimentConfig, overrides: list[str]) -> tuple[ExperimentConfig, list[str]]:
    """`--num_iterations=10` on the command line is the stage's value from then on: STAGE_NUM_ITERATIONS would win."""
    changed, rest = {}, []
    for word in overrides:
        name, _, value = word.removeprefix("--").replace("-", "_").partition("=")
        if name not in StageConfig.model_fields:
            rest.append(word)
        elif not re.fullmatch(r"[0-9]{1,9}", value) or (int(value) < 1 and name in POSITIVE):
            raise UserError(f"--{name}={value[:40]}: expected a whole number of at least 1")
        else:
            changed[name] = int(value)
    stage = config.stage_config.model_copy(update=changed)
    return config.model_copy(update={"stage_config": stage}), rest


def target(config: ExperimentConfig, trainer: Trainer) -> dict[str, float]:
    """The target as a flag, where the trainer has one and the hyperparameters do not say it."""
    if (
        config.target_val_loss is None
        or not trainer.takes_target
        or "target_val_loss" in config.hyperparameters
    ):
        return {}
    return {"target_val_loss": config.target_val_loss}


def stage_values(config: ExperimentConfig) -> dict[str, int]:
    """What the stage sets, by name."""
    return config.stage_config.model_dump(exclude_none=True)


def variables(config: ExperimentConfig, trainer: Trainer, seed: int) -> dict[str, str]:
    """STAGE_NUM_ITERATIONS and so on; SEED for a script that takes no flags."""
    found = {}
    if trainer.stage_variables or not trainer.run_directory:
        found = {f"STAGE_{name.upper()}": str(value) for name, value in stage_values(config).items()}
    if not trainer.run_directory:
        found["SEED"] = str(seed)
    return found


def words(
    config: ExperimentConfig, trainer: Trainer, overrides: list[str], seed: int, folder: Path
) -> list[str]:
    """What slurm/lib/run.sh is given for one run: the script, then its flags; later ones win."""
    if not trainer.run_directory:
        return [trainer.script, *overrides]
    own = [f"--out_dir={folder}", "--auto_resume=true", f"--seed={seed}"]
    return [trainer.script, *flags(config, trainer), *overrides, *own]


def plan_entry(
    config: ExperimentConfig, trainer: Trainer, overrides: list[str], seed: int, folder: Path
) -> dict[str, object]:
    """One run of a `--plan` file: {"out_dir", "seed", "variant", "optimizer", "flags"}."""
    values: dict[str, object] = {
        key: value for key, value in config.hyperparameters.items() if key not in ("notes", "preset")
    }
    values.update(stage_values(config))
    values.update(target(config, trainer))
    for word in overrides:
        name, equals, value = word.removeprefix("--").partition("=")
        values[name.replace("-", "_")] = value if equals else True
    entry: dict[str, object] = {"out_dir": str(folder), "seed": seed}
    for name in ("variant", "optimizer"):
        if name in values:
            entry[name] = values.pop(name)
    return {**entry, "flags": values}


def flags_of(python: Path, root: Path, script: str) -> list[str]:
    """The flags that a script's --help names; none where it has no help."""
    try:
        done = subprocess.run(
            [str(python), str(root / script), "--help"],
            cwd=root,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=HELP_TIMEOUT_S,
        )
    except (OSError, subprocess.TimeoutExpired):
        return []
    found = re.findall(r"--([a-z][a-z0-9_]*)", done.stdout.decode("utf-8", "replace"))
    return [] if done.returncode else sorted(set(found))


def check_flags(known: list[str], config: ExperimentConfig, trainer: Trainer, where: str) -> None:
    """UserError for a key that is none of the trainer's flags `known`. Without any it checks them itself."""
    if not known:
        return
    asked = [name for name in config.hyperparameters if name not in ("notes", "preset")]
    if not trainer.stage_variables:
        asked += list(stage_values(config))
    for name in asked:
        if name not in known:
            place = "hyperparameters" if name in config.hyperparameters else "stage_config"
            raise UserError(
                f"{where}: {place}.{name}: {trainer.script} has no flag --{name}{nearest(name, known)}"
            )


def _text(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
