"""What STUDY means on a command line, and the experiments it stands for.

A STUDY is one or more of: the name that `run --study NAME` gave, an experiment's folder or its name
(`nanogpt_palm_screening`: the newest of that name), a folder of experiments, a configuration, a folder of
configurations (searched in depth: tools/experiments/configs is all three stages).
"""

from dataclasses import dataclass, field
from pathlib import Path

from nanogpt.common.errors import UserError
from nanogpt.common.flags import nearest
from tools.experiments import collect, records
from tools.experiments.config import ExperimentConfig, load
from tools.experiments.records import SHELF, Experiment

CONFIGS = Path("tools/experiments/configs")


@dataclass
class Result:
    """A variant at one stage, as the rules of promotion look at it."""

    variant: str
    label: str
    letter: str
    baseline: bool
    planned: int
    losses: dict[int, float] = field(default_factory=dict)  # seed -> final validation loss
    curves: dict[int, list[tuple[int, float]]] = field(
        default_factory=dict
    )  # seed -> (step, validation loss)
    failed: int = 0
    missing: int = 0
    seconds: list[float] = field(default_factory=list)
    gpus: int = 0
    work: float | None = None  # iterations x batch size: what GPU-hours grow with
    kin: tuple = ()  # work is comparable among results with equal ones
    gpu_type: str | None = None
    baseline_val_loss: float | None = None
    baseline_std: float | None = None
    target: float | None = None
    name: str = ""

    @property
    def complete(self) -> bool:
        """Whether every planned run has ended, well or not."""
        return self.planned > 0 and not self.missing


def config_files(root: Path, words: list[str]) -> list[Path]:
    """The configuration files that `words` mean: files, or folders of them. UserError for what is neither."""
    found: list[Path] = []
    for word in words:
        path = _config_path(root, word)
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*.json") if not p.name.startswith("."))
            if not inside:
                raise UserError(f"{word}: this folder holds no configuration (*.json)")
            found += inside
        else:
            found.append(path)
    return list(dict.fromkeys(path.resolve() for path in found))


def load_all(root: Path, words: list[str]) -> list[tuple[Path, ExperimentConfig]]:
    """The configurations, stage A first and the baseline first in each; equal names are refused.

    Of a folder with stages, its configurations without a stage are no part (configs/baseline.json is run by its name).
    """
    loaded = [(path, load(path)) for path in config_files(root, words)]
    if any(config.letter for _, config in loaded):
        named = {_config_path(root, word).resolve() for word in words}
        loaded = [(path, config) for path, config in loaded if config.letter or path in named]
    seen: dict[str, Path] = {}
    for path, config in loaded:
        if config.experiment_name in seen:
            raise UserError(
                f"{path}: experiment_name: {config.experiment_name}: {seen[config.experiment_name]} has the "
                "same; name one of them otherwise"
            )
        seen[config.experiment_name] = path
    return sorted(loaded, key=lambda pair: (pair[1].letter, not pair[1].is_baseline))


def is_config(root: Path, word: str) -> bool:
    """Whether `word` names configurations rather than experiments; what was run wins."""
    path = Path(word)
    if records.is_experiment(path) or (path.is_dir() and records.all_in(path)) or _named(root / SHELF, word):
        return False
    try:
        path = _config_path(root, word)
    except UserError:
        return word.endswith(".json")
    return path.is_file() or any(path.rglob("*.json"))


def experiments(root: Path, words: list[str]) -> list[Experiment]:
    """The experiments that `words` mean: by stage, the baseline first, the older of two first.

    UserError for a name that nothing has.
    """
    shelf = root / SHELF
    found: dict[Path, Experiment] = {}
    for word in words:
        for folder in _folders(root, shelf, word):
            found.setdefault(folder.resolve(), records.read(folder.resolve()))
    order = {folder: number for number, folder in enumerate(records.all_in(shelf))}
    return sorted(
        found.values(),
        key=lambda e: (
            e.config.letter,
            not e.config.is_baseline,
            e.config.label,
            order.get(e.folder, 0),
            e.name,
        ),
    )


def _folders(root: Path, shelf: Path, word: str) -> list[Path]:
    for path in (Path(word), root / word, shelf / word):
        if records.is_experiment(path):
            return [path]
        if path.is_dir() and (inside := records.all_in(path)):
            return inside
    if found := _named(shelf, word):
        return found
    everything = records.all_in(shelf)
    if is_config(root, word):
        names = {config.experiment_name for _, config in load_all(root, [word])}
        newest = {records.name_of(path): path for path in everything}
        if chosen := [newest[name] for name in sorted(names & newest.keys())]:
            return chosen
        raise UserError(
            f"{word}: none of its experiments was run here yet: engaging experiment run --config {word}"
        )
    known = [path.name for path in everything] + sorted({_study_of(path) for path in everything} - {""})
    there = ", ".join(known[-4:]) or "none yet: engaging experiment run --config FILE"
    raise UserError(
        f"{word}: no study, experiment or configuration of this name{nearest(word, known)} ({there})"
    )


def _named(shelf: Path, word: str) -> list[Path]:
    """The newest experiment of that name, else the experiments of the study of that name."""
    everything = records.all_in(shelf)
    named = [path for path in everything if records.name_of(path) == word]
    return named[-1:] or [path for path in everything if _study_of(path) == word]


def refuse_twice(root: Path, name: str, configs: list[ExperimentConfig]) -> None:
    """UserError when the study `name` has an experiment of these already: two of one name are told apart by nobody."""
    there = {
        records.name_of(path) for path in records.all_in(root / SHELF) if name and _study_of(path) == name
    }
    for config in configs:
        if config.experiment_name in there:
            raise UserError(
                f"--study={name}: has {config.experiment_name} already; engaging experiment resume {name} goes on with "
                "it (--n-runs adds seeds), and a new study has another name"
            )


def _study_of(folder: Path) -> str:
    try:
        return records.read(folder).study
    except UserError:
        return ""


def _config_path(root: Path, word: str) -> Path:
    """As written, from the root, or from where the configurations lie (`configs/stage_a_screening/...`)."""
    if not word or "\0" in word:
        raise UserError(f"--config={word!r}: expected a file or a folder")
    for path in (Path(word), root / word, root / CONFIGS.parent / word, root / CONFIGS / word):
        try:
            if path.exists():
                return path
        except OSError:
            break
    known = [p.relative_to(root).as_posix() for p in (root / CONFIGS).rglob("*.json")]
    short = {Path(name).name: name for name in known}
    close = nearest(Path(word).name, list(short))
    raise UserError(f"{word[:200]}: there is no such configuration{close} ({CONFIGS} holds thirteen)")


# ---- what the stages have found --------------------------------------------------------------------------------------


def stage_results(members: list[Experiment]) -> list[Result]:
    """One Result for each experiment; of two of the same variant and stage the newer one."""
    found: dict[tuple[str, str], Result] = {}
    for experiment in members:
        states = {verdict.state for verdict in collect.collect(experiment)}
        if states == {"skipped"}:
            continue  # its variant was not promoted: it has no part in this stage
        found[experiment.config.variant, experiment.config.letter] = result_of(experiment)
    return list(found.values())


def work_of(config: ExperimentConfig) -> float | None:
    """iterations x batch size, None where the configuration leaves them to the trainer."""
    iterations, batch = config.stage_config.num_iterations, config.stage_config.batch_size
    return None if iterations is None else float(iterations * (batch or 1))


def kin_of(config: ExperimentConfig) -> tuple:
    """What two configurations must share so that iterations x batch size say which one trains longer."""
    return config.script, str(config.hyperparameters.get("preset")), config.stage_config.batch_size is None


def _gpu_type(experiment: Experiment) -> str | None:
    """The type that the user asked for, else the one that its newest job got."""
    rows = records.read_lines(experiment.folder / "launches.jsonl")
    chosen = [row.get("gpu_type") for row in rows if isinstance(row.get("gpu_type"), str)]
    return experiment.options.get("gpu_type") or (chosen[-1] if chosen else None)


def result_of(experiment: Experiment, with_curves: bool = True) -> Result:
    """What an experiment's results say; the curves are the part that takes time."""
    config, done = experiment.config, records.results(experiment)
    result = Result(
        config.variant,
        config.label,
        config.letter,
        config.is_baseline,
        planned=len(experiment.runs),
        missing=len(experiment.runs) - len(done),
        gpus=experiment.gpus,
        work=work_of(config),
        kin=kin_of(config),
        gpu_type=_gpu_type(experiment),
        baseline_val_loss=config.baseline_val_loss,
        baseline_std=config.baseline_std,
        target=config.target_val_loss,
        name=experiment.name,
    )
    for row in done.values():
        if row.get("success") is not True:
            result.failed += 1
            continue
        seed = row["seed"]
        result.losses[seed] = float(row["final_val_loss"])
        result.seconds.append(float(row.get("time_seconds") or 0))
    if not with_curves:
        return result
    by_run: dict[int, dict[int, float]] = {}
    for row in records.read_lines(experiment.folder / "metrics.jsonl", b'"val_loss"'):
        value, step, run = row.get("val_loss"), row.get("step"), row.get("run_id")
        if isinstance(value, int | float) and isinstance(step, int) and isinstance(run, int):
            by_run.setdefault(run, {})[step] = float(value)
    for run, curve in by_run.items():
        if config.base_seed + run in result.losses:
            result.curves[config.base_seed + run] = sorted(curve.items())
    return result
