"""Between stages: which experiments may train, by the results of the ones they wait for."""

from pathlib import Path

from tools.experiments import collect, promote, records, study
from tools.experiments.promote import Decision
from tools.experiments.records import Experiment


def decision_for(experiment: Experiment) -> Decision | None:
    """What the rules say about the experiments that this one waits for; None when it waits for none."""
    if not experiment.gate:
        return None
    shelf = experiment.folder.parent
    before = [records.read(shelf / name) for name in experiment.gate if records.is_experiment(shelf / name)]
    return _decide(before)


def _decide(before: list[Experiment]) -> Decision:
    """The rules, applied to what was queued: where no baseline was, the numbers that its configurations state."""
    results = study.stage_results(before)
    last = max((result.letter for result in results if result.letter in promote.NEXT), default="")
    here = [result for result in results if result.letter == last]
    return promote.decide(results, typed=None if any(r.baseline for r in here) else promote.stated(here))


def through(experiments: list[Experiment]) -> list[Experiment]:
    """Those that may train now. One that the rules turn away is marked as skipped, with the reason."""
    known: dict[tuple[str, ...], Decision | None] = {}
    found = []
    for experiment in experiments:
        if experiment.gate not in known:
            known[experiment.gate] = decision = decision_for(experiment)
            if decision is not None:
                print(f"promotion from stage {decision.stage}: {decision.verdict}", flush=True)
        decision = known[experiment.gate]
        config = experiment.config
        along = config.is_baseline and bool(decision and decision.advance and decision.to == config.letter)
        if decision is None or along or decision.passes(config.letter, config.variant):
            found.append(experiment)
        elif decision.complete:
            skip(
                experiment, f"not promoted from stage {decision.stage}: {decision.reason_for(config.variant)}"
            )
    return found


def skip(experiment: Experiment, reason: str) -> None:
    """Mark every run that has not begun."""
    experiment.log(reason)
    for verdict in collect.verdicts(experiment):
        if verdict.state == "new":
            collect.write_outcome(experiment.run_folder(verdict.run_id), skipped=reason)


def open_again(experiment: Experiment) -> Experiment:
    """The experiment with its skipped runs back, and no gate before them."""
    for run_id, _ in experiment.runs:
        path: Path = experiment.run_folder(run_id) / collect.OUTCOME
        if collect.read_outcome(experiment.run_folder(run_id)).get("skipped"):
            path.unlink()
    made = Experiment(**{**vars(experiment), "gate": ()})
    made.save()
    made.log("its variant goes on after all: the skipped runs are back")
    return made


def pivot(before: list[Experiment], group: list[Experiment]) -> list[Experiment]:
    """The skipped experiments of stage B that the one pivot goes to, opened again; [] when there is none."""
    decision = _decide([*before, *group])
    if decision.stage != "B" or decision.to != "B":
        return []
    return [
        open_again(experiment)
        for experiment in group
        if decision.passes("B", experiment.config.variant)
        and all(verdict.state == "skipped" for verdict in collect.verdicts(experiment))
    ]
