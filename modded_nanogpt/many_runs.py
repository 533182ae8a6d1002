"""`--runs=N`: N seeds of one configuration in one process, one compilation, and what they say together.

One run proves nothing. Each run has a directory of its own, OUT_DIR/seed-S, and is the same as if it had been trained
alone: only its graphs come from the first one's warm-up. The same command again trains what is missing.
"""

import math
import statistics
from collections.abc import Callable
from pathlib import Path

from modded_nanogpt.config import Config
from nanogpt.common import rundir
from nanogpt.common.errors import UserError
from nanogpt.common.shards import data_root

LIKELY = 0.01  # the p-value that a claim must stay below (track 1's rule)
SLICES = 2000  # of the t distribution's integral; an even number

Values = dict[str, object]  # knobs that somebody set, by name


def runs_of(values: Values) -> list[Values]:
    """The knobs of each run that the command line asks for: one, or those of --runs. UserError for contradictions."""
    count = int(values.get("runs", Config.runs))
    if count == 1:
        return [values]
    if values.get("smoke"):
        raise UserError(f"--smoke with --runs={count}: try one run; keep one of the two")
    if values.get("init_from") == "resume":
        raise UserError(
            f"--init_from=resume with --runs={count}: the same command again goes on; leave it away"
        )
    folder, first = Path(str(values["out_dir"])).expanduser().absolute(), int(values.get("seed", Config.seed))
    if rundir.holds_run(folder):
        raise UserError(
            f"--out_dir={folder}: is one run, and --runs={count} makes a folder of runs; choose another"
        )
    # The later ones are opened by the first one's copy, which lies elsewhere, and so would its default.
    common = {**values, "runs": 1, "data_root": str(data_root(str(values.get("data_root", ""))))}
    common |= {} if values.get("overwrite") else {"auto_resume": True}
    return [
        {**common, "seed": seed, "out_dir": str(folder / f"seed-{seed}")}
        for seed in range(first, first + count)
    ]


def unfinished(runs: list[Values]) -> list[Values]:
    """Those that have not come to their end; all of them where they are to start afresh."""
    return [run for run in runs if run.get("overwrite") or not rundir.is_finished(Path(str(run["out_dir"])))]


def others(runs: list[Values], first: Path) -> list[Values]:
    """Those that are to be trained after the one in `first`."""
    return [run for run in unfinished(runs) if Path(str(run["out_dir"])) != first]


def say_together(runs: list[Values], say: Callable[[str], None]) -> None:
    """n, mean, deviation and p of those that are finished, and what the rule makes of them."""
    ends = [rundir.last_end(Path(str(run["out_dir"]))) or {} for run in runs]
    ends = [end for end in ends if end.get("status") == "finished"]
    losses = [float(end["val_loss"]) for end in ends]
    if len(losses) < 2:
        return
    mean, deviation = statistics.fmean(losses), statistics.stdev(losses)
    seconds = [end["train_ms"] / 1e3 for end in ends]
    say(
        f"{len(losses)} runs: val loss {mean:.4f}, sd {deviation:.4f} ({', '.join(f'{loss:.4f}' for loss in losses)}); "
        f"{statistics.fmean(seconds):.2f} s of training, sd {statistics.stdev(seconds):.2f}"
    )
    target = ends[0].get("target")
    if target:
        p = chance(losses, float(target))
        verdict = "proves" if p < LIKELY else "does not prove"
        say(f"p = {p:.2g} against {target:g}: {verdict} a mean below it (p < {LIKELY:g}, one-sided t-test)")


def chance(losses: list[float], target: float) -> float:
    """p of a one-sided t-test: how often such a mean, or a lower one, would come from runs with the mean `target`."""
    count, deviation = len(losses), statistics.stdev(losses)
    distance = statistics.fmean(losses) - target
    if deviation == 0:
        return 0.5 if distance == 0 else float(distance > 0)
    return student_below(distance * math.sqrt(count) / deviation, count - 1)


def student_below(t: float, degrees: int) -> float:
    """P(T < t) of Student's t distribution, `degrees` >= 1, to 1e-9: Simpson's rule after t = sqrt(degrees) tan(a).

    With that the density becomes cos(a)^(degrees - 1) times a constant, smooth over the whole line.
    """
    log_constant = math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2) - 0.5 * math.log(math.pi)
    end, low = math.atan(t / math.sqrt(degrees)), -math.pi / 2
    step = (end - low) / SLICES
    total = 0.0
    for index in range(SLICES + 1):
        weight = 1 if index in (0, SLICES) else 4 if index % 2 else 2
        total += weight * max(0.0, math.cos(low + index * step)) ** (degrees - 1)
    return math.exp(log_constant) * total * step / 3
