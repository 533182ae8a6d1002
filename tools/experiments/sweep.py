"""`engaging experiment sweep`: equal trials for every arm, and a final comparison on seeds that chose nothing.

    engaging experiment sweep tune --config mine --set muon_lr=0.018,0.025,0.035 [--n-runs 1] [--dry-run]
    engaging experiment sweep tune --config mine --set small_adam:adam_lr=0.001,0.003 --set small_muon:muon_lr=0.02,0.03
    engaging experiment sweep tune                    # the trials, and which one each arm takes
    engaging experiment sweep tune --final --n-runs 3 # each arm with its best values, on fresh seeds

Arms are the configurations, the baseline among them. `--set NAME=...` holds for every arm, `--set ARM:NAME=...` for
one; several make a grid. Arms with different numbers of trials are refused: a baseline that was tuned less proves
nothing. Trials are the study's experiments (status, resume); `engaging compare` refuses them, because their seeds have
chosen them. What else `run` takes (--executor, --one-job, --n-gpus ...) may follow.
"""

import itertools
import json
import re
from pathlib import Path
from typing import Any

from nanogpt.common.errors import UserError
from nanogpt.common.storage import atomic_write_json, make_folder
from tools.args import Parser, counted, name_of, whole
from tools.experiments import records, run, study
from tools.experiments.config import ExperimentConfig, read_json
from tools.experiments.records import SHELF, all_in
from tools.place import checkout

FOLDER = ".sweeps"  # in experiment_logs: <study>/sweep.json, trials/*.json, final/*.json
MOST_TRIALS = 200


def main(argv: list[str]) -> int:
    """The command."""
    parser = Parser("experiment sweep", __doc__ or "")
    parser.add_argument("study", type=name_of("STUDY"), help="a name for the sweep")
    parser.add_argument("--config", action="append", metavar="FILE", help="an arm, or a folder of them")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=V,V", help="values to try")
    parser.add_argument("--final", action="store_true", help="train each arm's best on fresh seeds")
    parser.add_argument(
        "--n-runs", type=whole("--n-runs", 1, 1000), help="seeds of each; trials: 1, final: 3"
    )
    parser.add_argument("--base-seed", type=whole("--base-seed", 0, 2**31 - 2001), help="of the final runs")
    parser.add_argument("--dry-run", action="store_true")
    args, rest = parser.parse_known_args(argv)
    root = checkout()
    home = root / SHELF / FOLDER / args.study
    if args.config:
        return _begin(root, home, args, rest)
    if args.set:
        raise UserError("--set: name the arms too: --config FILE_OR_FOLDER")
    chosen = _chosen(root, home, args.study)
    if not args.final:
        print(f"\nnext: engaging experiment sweep {args.study} --final --n-runs 3")
        return 0
    seeds = _used(root)
    first = max(seeds) + 1 if args.base_seed is None else args.base_seed
    last = first + (args.n_runs or 3) - 1
    if used := sorted(seed for seed in seeds if first <= seed <= last):
        raise UserError(
            f"--base-seed={first}: seed {used[0]} has chosen among the trials of {seeds[used[0]]}; from "
            f"{max(seeds) + 1} on none has"
        )
    made = [
        {**values, "experiment_name": f"{arm[:42]}_final", "base_seed": first, "n_runs": args.n_runs or 3}
        for arm, values in chosen.items()
    ]
    return _run(root, home / "final", f"{args.study[:58]}_final", made, args, rest)


def _begin(root: Path, home: Path, args: Any, rest: list[str]) -> int:
    """Write the trials' configurations and run them."""
    if args.final:
        raise UserError("--final: takes the arms of the sweep itself; leave out --config")
    if (home / "sweep.json").exists():
        raise UserError(
            f"{args.study}: a sweep of this name has begun; engaging experiment resume {args.study}"
        )
    arms = {config.experiment_name: config for _, config in study.load_all(root, args.config)}
    grids = {arm: _grid(arm, args.set, arms) for arm in arms}
    counts = {arm: len(grid) for arm, grid in grids.items()}
    if len(set(counts.values())) > 1:
        said = ", ".join(f"{arm} {count}" for arm, count in counts.items())
        raise UserError(f"--set: every arm takes the same number of trials, the baseline too; here: {said}")
    if sum(counts.values()) > MOST_TRIALS:
        raise UserError(f"--set: {sum(counts.values())} trials; at most {MOST_TRIALS}")
    made, plan = [], {}
    for arm, config in arms.items():
        base = {k: v for k, v in config.as_json().items() if k not in ("stage", "n_runs")}
        plan[arm] = {"config": base, "trials": []}
        for number, values in enumerate(grids[arm], 1):
            name = f"{arm[:44]}_t{number:02}"
            flags = {**config.hyperparameters, **values}
            made.append(
                {**base, "experiment_name": name, "hyperparameters": flags, "n_runs": args.n_runs or 1}
            )
            plan[arm]["trials"].append({"name": name, "set": values})
    each, seeds = next(iter(counts.values())), args.n_runs or 1
    print(f"{counted(len(arms), 'arm')}, {counted(each, 'trial')} each, {counted(seeds, 'run')} a trial")
    if not args.dry_run:
        make_folder(home)
        atomic_write_json(home / "sweep.json", {"format": 1, "arms": plan})
    try:
        return _run(root, home / "trials", args.study, made, args, rest)
    except UserError:
        if not any(trial_of(folder) == args.study for folder in all_in(root / SHELF)):
            (home / "sweep.json").unlink(missing_ok=True)  # nothing was started: the name is free
        raise


def _grid(arm: str, words: list[str], arms: dict[str, ExperimentConfig]) -> list[dict[str, Any]]:
    """Every combination of the values that `--set` gives this arm."""
    axes: dict[str, list[Any]] = {}
    for word in words:
        match = re.fullmatch(r"(?:([\w.-]+):)?([A-Za-z_]\w*)=(.+)", word)
        if not match:
            raise UserError(f"--set={word[:60]!r}: expected NAME=VALUE,VALUE or ARM:NAME=VALUE,VALUE")
        if match[1] and match[1] not in arms:
            raise UserError(f"--set={word[:60]}: no arm {match[1]} (there are: {', '.join(arms)})")
        if match[1] in (None, arm):
            values = [_value(text) for text in match[3].split(",")]
            if len({json.dumps(value) for value in values}) < len(values):
                raise UserError(f"--set={word[:60]}: a value stands there twice")
            axes[match[2]] = values
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


def _value(text: str) -> Any:
    try:
        value = json.loads(text)
    except ValueError:
        return text
    return value if isinstance(value, bool | int | float) else text


def _used(root: Path) -> dict[int, str]:
    """Seed -> the sweep that used it, over every sweep that is kept here."""
    found: dict[int, str] = {}
    for folder in all_in(root / SHELF):
        if name := trial_of(folder):
            found |= {seed: name for _, seed in records.read(folder).runs}
    return found


def _chosen(root: Path, home: Path, name: str) -> dict[str, dict]:
    """Each arm's configuration with its best values; the table is printed."""
    path = home / "sweep.json"
    if not path.is_file():
        raise UserError(f"{name}: no sweep of this name; begin one with --config and --set")
    plan = read_json(path.read_bytes(), path)
    members = {
        experiment.config.experiment_name: experiment for experiment in study.experiments(root, [name])
    }
    best = {}
    for arm, found in plan["arms"].items():
        ranked = []
        for trial in found["trials"]:
            experiment = members.get(trial["name"])
            result = study.result_of(experiment, with_curves=False) if experiment else None
            if result is None or result.missing:
                raise UserError(
                    f"{trial['name']}: has runs missing, and every trial counts: engaging experiment resume {name}"
                )
            mean = sum(result.losses.values()) / len(result.losses) if result.losses else float("inf")
            ranked.append((mean, trial["name"], trial["set"]))
        mean, _, values = min(ranked, key=lambda row: row[:2])
        if mean == float("inf"):
            raise UserError(f"{arm}: all of its trials failed; engaging experiment status {name}")
        for loss, _, tried in ranked:
            words = " ".join(f"{key}={value}" for key, value in tried.items()) or "as configured"
            print(f"{arm:24} {words:32} {loss:.4f}{'  <- taken' if tried == values else ''}")
        for key in values:
            tried = sorted({t["set"][key] for t in found["trials"]}, key=lambda v: (isinstance(v, str), v))
            if (
                len(tried) > 1
                and values[key] in (tried[0], tried[-1])
                and not isinstance(values[key], str | bool)
            ):
                print(
                    f"  {arm}: {key}={values[key]} is the edge of what was tried; the best may lie beyond it"
                )
        config = found["config"]
        best[arm] = {**config, "hyperparameters": {**config.get("hyperparameters", {}), **values}}
    return best


def _run(root: Path, folder: Path, name: str, made: list[dict], args: Any, rest: list[str]) -> int:
    """Write the configurations and hand them to `run`; with --dry-run they are written beside and go again."""
    make_folder(folder)
    for values in made:
        atomic_write_json(folder / f"{values['experiment_name']}.json", values)
    words = ["--config", str(folder), "--study", name, *(["--dry-run"] if args.dry_run else []), *rest]
    try:
        return run.main(words, sweep=True)
    finally:
        if args.dry_run:
            for values in made:
                (folder / f"{values['experiment_name']}.json").unlink(missing_ok=True)


def trial_of(folder: Path) -> str:
    """The sweep whose trial the experiment in `folder` is, or ""."""
    path = folder / "experiment.json"
    if not path.is_file():
        return ""
    state = read_json(path.read_bytes(), path)
    file = state.get("config_file", "") if isinstance(state, dict) else ""
    match = re.search(rf"(?:^|/){re.escape(FOLDER)}/([^/]+)/trials/", str(file))
    return match[1] if match else ""
