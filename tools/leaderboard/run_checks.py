"""What may be wrong with one run of ours. Each check yields (check, reason) for what does not hold.

A run's files were written by the person who gains from them. So nothing in them is taken alone: the log against the
metrics, the metrics against themselves, the configuration against what was trained, the clock against the hardware.
"""

import datetime
import itertools
import json
import math
import re

from nanogpt.common.errors import UserError
from tools.leaderboard.clock_checks import Problems, clock, hardware
from tools.leaderboard.data_manifest import fingerprint
from tools.leaderboard.evidence import Run
from tools.leaderboard.strict import is_whole, parse_object
from tools.leaderboard.tracks import BUILT_IN, Track

TITLES = {
    "evidence": "the evidence is there, byte for byte",
    "source": "the log carries its source, whole, and the configuration belongs to it",
    "attempts": "one attempt from start to finish",
    "marks": "the trainer's marks allow it on this track",
    "steps": "every step is there once, in order",
    "losses": "losses start where an untrained model stands and end where this text allows",
    "log": "what the log printed is what the metrics say",
    "clock": "the clock adds up",
    "hardware": "the hardware is named, and could have done it in that time",
    "data": "the validation tokens are the track's",
    "runs": "all runs are the same recipe on the same hardware, with different seeds",
    "duplicates": "no two runs are one run",
    "statistics": "the target is met over all submitted runs",
    "claim": "the record says what its evidence says",
    "text": "the description is somebody's own",
}
_ABOVE = re.compile(r"the loss [\d.]+ is above the target")
_OWN_TRACK = re.compile(
    _ABOVE.pattern + r"|the recipe \w+ has no record|the data set is \S+, not |validated on [\d,]+ "
)
START_MARGIN = 0.75  # nats around ln(vocabulary) before training
# What the trainers print of a step. Some count a step from 0, when it begins, some from 1, when it is done.
_STEP_LINE = re.compile(
    r"step (?P<step>\d{1,9})/\d+: loss (?P<loss>\d+\.\d{4}),(?:.*?, |\s)(?P<ms>[\d,]+\.\d) ms,"
)
_VAL_LINE = re.compile(r"step (\d{1,9})(?:/\d+)?: val loss (\d+\.\d{4})(?!\d)")
_PRINTED = 0.5000001e-4  # half of the last decimal of a loss
# Torch flags that no record may set (the speedrun's third rule).
_FLAGS = re.compile(rb"^[^#\n]*(?:torch\._inductor\.config\.|inductor_config\.)([a-z_.]+)\s*=[^=]", re.M)
_ALLOWED_FLAGS = {b"fx_graph_cache", b"fx_graph_remote_cache"}


def check_run(run: Run, track: Track, submitted: datetime.datetime, manifest: dict | None) -> Problems:
    """Everything that may be wrong with one run of ours."""
    for check in (_attempts, _source, _steps, _losses, _log):
        yield from check(run)
    yield from _marks(run, track)
    yield from _start(run, track)
    yield from clock(run, submitted)
    yield from hardware(run, track)
    yield from _data(run, track, manifest)


def _source(run: Run) -> Problems:
    if run.record["source_sha256"] != run.source_sha256:
        yield "source", f"{run.label}: config.json names another source than the log carries"
    if run.copy_sha256 and run.copy_sha256 != run.source_sha256:
        yield (
            "source",
            f"{run.label}: its source/ folder is not the source in its log; it was edited afterwards",
        )
    if run.entry not in run.source_files:
        yield "source", f"{run.label}: the log's source does not hold the trainer {run.entry[:80]}"
    lines = run.log_lines
    for number, (word, expected) in enumerate((("config", run.record), ("environment", run.attempts[0]))):
        try:
            text = lines[number].removeprefix(f"{word} ") if lines[number].startswith(f"{word} ") else ""
            found = parse_object(text.encode("utf-8", "surrogatepass"), word)
        except (IndexError, UserError):
            yield "source", f"{run.label}: after the source, the log has no readable line '{word} {{...}}'"
            continue
        if json.dumps(found, sort_keys=True) != json.dumps(expected, sort_keys=True):
            yield "source", f"{run.label}: {word}.json is not the {word} that the log opens with"
    for name, data in run.source_files.items():
        for flag in {found[1] for found in _FLAGS.finditer(data)} - _ALLOWED_FLAGS:
            yield "source", f"{run.label}: {name} sets the compiler flag {flag.decode()}, which no record may"


def _attempts(run: Run) -> Problems:
    kinds = [event["event"] for event in run.events]
    attempts = {event["attempt"] for event in run.events if event.get("attempt") is not None}
    if "resume" in kinds or len(run.attempts) > 1 or attempts - {1} or run.record.get("must_resume"):
        yield "attempts", f"{run.label}: was resumed; a record is one attempt from its first step to its last"
    if any(line.startswith("environment {") for line in run.log_lines[2:]):
        yield "attempts", f"{run.label}: its log holds a second attempt; a record is one attempt"
    if kinds.count("start") != 1 or kinds[0] != "start":
        yield "attempts", f"{run.label}: metrics.jsonl does not begin with its one 'start' line"
    if kinds.count("end") != 1 or kinds[-1] != "end":
        yield "attempts", f"{run.label}: metrics.jsonl does not end with its one 'end' line"
    elif run.end["status"] != "finished":
        yield "attempts", f"{run.label}: did not finish; its end says {run.end['status'][:40]!r}"
    seeds = [word.partition("=")[2] for word in _argv(run) if word.startswith("--seed=")]
    if seeds and seeds[-1] != str(run.seed):
        yield (
            "attempts",
            f"{run.label}: was started with --seed={seeds[-1][:20]}, its configuration says {run.seed}",
        )
    if run.config.get("init_from", "scratch") != "scratch":
        yield (
            "attempts",
            f"{run.label}: did not start from scratch (init_from={run.config['init_from']!s:.40})",
        )


def _argv(run: Run) -> list[str]:
    argv = run.attempts[0].get("argv")
    return [word for word in argv if isinstance(word, str)] if isinstance(argv, list) else []


def _marks(run: Run, track: Track) -> Problems:
    end = run.end
    # One run above the target is no fault of it: the test looks at all of them.
    # On a board's own track, data and size of the validation are the track's matter, not the speedrun's.
    excused = _ABOVE if track.marks else _OWN_TRACK
    stated = [str(reason) for reason in end.get("ineligible") or []]
    against = [reason[:80] for reason in stated if not excused.match(reason)]
    if end.get("eligible") is False and (against or not stated):
        yield (
            "marks",
            f"{run.label}: the trainer marked it not eligible: {'; '.join(against[:3]) or 'no reason given'}",
        )
    elif track.marks and not isinstance(end.get("eligible"), bool):
        yield "marks", f"{run.label}: carries no mark of the trainer that it is eligible"
    elif end.get("eligible") and end.get("ineligible"):
        yield "marks", f"{run.label}: is marked eligible, with reasons why it is not"
    if track.entries and run.entry not in track.entries:
        yield "marks", f"{run.label}: {run.entry[:80]} is not a trainer of the track {track.name}"
    recipe = run.config.get("recipe")
    if recipe is not None and track.recipes and recipe not in track.recipes:
        yield (
            "marks",
            f"{run.label}: was trained with --recipe={recipe!s:.40}, not with {' or '.join(track.recipes)}",
        )
    if end.get("target") is not None and not math.isclose(end["target"], track.target):
        yield "marks", f"{run.label}: its target was {end['target']:g}; the track's is {track.target:g}"
    met = run.val_loss <= track.target
    if end.get("target") is not None and end.get("target_met") not in (None, met):
        yield "marks", f"{run.label}: says target_met={end['target_met']} with a loss of {run.val_loss:.5f}"


def _steps(run: Run) -> Problems:
    steps, every = [point.step for point in run.train], run.config.get("log_interval") or 1
    if not steps:
        yield "steps", f"{run.label}: metrics.jsonl holds no training step"
        return
    if any(b <= a for a, b in itertools.pairwise(steps)):
        yield "steps", f"{run.label}: training steps are repeated or out of order"
    total = run.steps
    if not is_whole(every, 1) or every > 100:
        yield (
            "steps",
            f"{run.label}: was logged every {every!s:.20} steps; a record needs at least one line in 100",
        )
    else:
        expected = {step for step in range(total) if step % every == 0} | {total - 1}
        if missing := sorted(expected - set(steps)):
            yield (
                "steps",
                f"{run.label}: {len(missing)} training steps are missing, the first is {missing[0]}",
            )
        if extra := sorted(set(steps) - expected):
            yield "steps", f"{run.label}: step {extra[-1]} does not belong to a run of {total} steps"
    planned = _planned(run)
    if planned is not None and planned != total:
        yield "steps", f"{run.label}: {planned} steps were planned, it ended after {total}"
    vals = [point.step for point in run.val]
    if vals[-1] != total:
        yield "steps", f"{run.label}: its last validation is at step {vals[-1]}, not at its end, {total}"
    if any(b <= a for a, b in itertools.pairwise(vals)):
        yield "steps", f"{run.label}: validations are repeated or out of order"
    interval = run.config.get("eval_interval", run.config.get("val_loss_every"))
    if is_whole(interval, 1) and (odd := [step for step in vals if step % interval and step != total]):
        yield "steps", f"{run.label}: a validation at step {odd[0]}, one was due every {interval}"
    yield from _tokens(run)


def _planned(run: Run) -> int | None:
    """How many steps the run was to make, as its trainer wrote it down."""
    for place, names in ((run.plan, ("total_steps", "steps")), (run.config, ("max_iters", "num_iterations"))):
        for name in names:
            if is_whole(place.get(name), 1):
                return place[name]
    return None


def _tokens(run: Run) -> Problems:
    counts = [(point.step, point.tokens) for point in run.train if point.tokens is not None]
    if any(b[1] <= a[1] for a, b in itertools.pairwise(counts)):
        yield "steps", f"{run.label}: the tokens trained on do not grow from step to step"
    each = run.plan.get("tokens_per_step")
    if is_whole(each, 1) and (bad := [step for step, tokens in counts if tokens != (step + 1) * each]):
        yield "steps", f"{run.label}: the tokens at step {bad[0]} are not steps times {each:,}"
    after = dict(counts)
    for point in run.val:
        expected = after.get(point.step - 1, 0 if point.step == 0 else None)
        if point.tokens is not None and expected is not None and point.tokens != expected:
            yield (
                "steps",
                f"{run.label}: the validation at step {point.step} counts other tokens than the training",
            )
            break


def _losses(run: Run) -> Problems:
    losses = [point.loss for point in run.train] + [point.loss for point in run.val]
    if any(loss is None or not math.isfinite(loss) for loss in losses):
        yield "losses", f"{run.label}: a loss is not a finite number"
    elif min(losses) <= 0 or max(losses) > 50:
        yield "losses", f"{run.label}: losses from {min(losses):g} to {max(losses):g} are no cross entropies"
    final = run.end.get("val_loss")
    if final is None or final != run.val_loss:
        yield "losses", f"{run.label}: its end says val_loss {final}, its last validation {run.val_loss}"


def _start(run: Run, track: Track) -> Problems:
    """The first loss belongs to an untrained model, the last one to a model that has not seen the answers."""
    before = run.val[0].loss if run.val[0].step == 0 else run.train[0].loss if run.train else None
    random = math.log(track.vocab_size)
    if before is not None and abs(before - random) > START_MARGIN:
        yield (
            "losses",
            (
                f"{run.label}: starts at a loss of {before:.3f}; an untrained model stands near "
                f"ln {track.vocab_size:,} = {random:.2f}"
            ),
        )
    if run.val_loss < track.loss_floor:
        yield (
            "losses",
            f"{run.label}: a final loss of {run.val_loss:.4f} is below what this text allows ({track.name})",
        )
    late = [point.loss for point in run.train[-max(1, len(run.train) // 20) :] if point.loss is not None]
    if late and track.loss_floor and abs(sum(late) / len(late) - run.val_loss) > 0.5:
        yield "losses", f"{run.label}: its training losses do not lead to its validation loss"


def _log(run: Run) -> Problems:
    """The lines that the trainer printed, against the metrics."""
    train = {point.step: point for point in run.train}
    val, printed_vals = {point.step: point.loss for point in run.val}, set()
    first = next((int(found["step"]) for line in run.log_lines if (found := _STEP_LINE.match(line))), 0)
    for line in run.log_lines:
        if found := _STEP_LINE.match(line):
            step = int(found["step"]) - (first == 1)
            kind, loss, known = "train", found["loss"], train[step].loss if step in train else None
        elif found := _VAL_LINE.match(line):
            kind, step, loss = "val", int(found[1]), found[2]
            known = val.get(step)
            printed_vals.add(step)
        else:
            continue
        if known is None or abs(known - float(loss)) > _PRINTED:
            yield (
                "log",
                f"{run.label}: the log printed {kind} loss {loss} at step {step}, the metrics say {known}",
            )
            return
        time = train[step].ms if kind == "train" else None
        if time is not None and abs(float(found["ms"].replace(",", "")) - time) > 0.0501:
            yield (
                "log",
                f"{run.label}: the log printed {found['ms']} ms for step {step}, the metrics say {time}",
            )
            return
    if missing := sorted(set(val) - printed_vals):
        yield (
            "log",
            f"{run.label}: the log does not print the validation of step {missing[0]}; it was cut or made up",
        )


def _data(run: Run, track: Track, manifest: dict | None) -> Problems:
    """The manifest's digest is the run's, and its validation file is the track's."""
    if manifest is None:
        yield "data", f"{run.label}: the submission holds no manifest of its data set"
        return
    files = sorted(manifest["files"], key=lambda one: one["name"])
    if fingerprint(manifest) != run.record.get("data"):
        yield "data", f"{run.label}: was trained on other data than the submission's manifest lists"
    val = [one for one in files if one["split"] == "val"]
    if [one["sha256"] for one in val] != [track.val_sha256]:
        yield "data", f"{run.label}: its validation file is not the track's ({track.val_sha256[:12]}...)"
    elif val[0]["tokens"] < track.val_tokens:
        yield "data", f"{run.label}: its validation file holds {val[0]['tokens']:,} tokens"
    if any(one["split"] == "train" and one["sha256"] == track.val_sha256 for one in files):
        yield "data", f"{run.label}: trains on the validation file"
    for one in files:
        if one["name"] in track.pinned and one["sha256"] != track.pinned[one["name"]]:
            yield "data", f"{run.label}: {one['name']} is not the published file"
    there = sum(one["tokens"] for one in files if one["split"] == "train")
    if track.name in BUILT_IN and (run.tokens or 0) > there:
        yield (
            "data",
            f"{run.label}: trained on {run.tokens:,} tokens, its files have {there:,}: some were read twice",
        )
    if run.val_tokens != track.val_tokens:
        said = f"{run.val_tokens:,}" if run.val_tokens else "an unknown number of"
        yield "data", f"{run.label}: validates on {said} tokens; the track's number is {track.val_tokens:,}"
