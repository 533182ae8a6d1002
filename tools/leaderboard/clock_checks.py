"""Time: the clock of one run against itself, against the calendar, and against what its hardware can do."""

import datetime
import itertools
import json
from collections.abc import Iterator

from nanogpt.common.peaks import peak_flops_of
from tools.leaderboard.evidence import Run, gpu_in_log
from tools.leaderboard.strict import is_whole
from tools.leaderboard.tracks import Track

Problems = Iterator[tuple[str, str]]

NOT_JUDGED = "the speed was not judged"
CPU_PEAK = 2e12  # FLOP/s of a rank on CPUs: more than any has
WINDOW = 50  # steps over which the speed must be possible; single steps are stamped before the GPU is done
FIRST_RUN = datetime.datetime(2024, 1, 1, tzinfo=datetime.timezone.utc)


def clock(run: Run, submitted: datetime.datetime) -> Problems:
    """Step times are positive and add up to the time that the run claims; stamps agree with them."""
    if any(point.ms is None or point.ms <= 0 for point in run.train):
        yield "clock", f"{run.label}: a step without a time, or with one that is not positive"
        return
    if run.train_ms <= 0:
        yield "clock", f"{run.label}: its end states no training time"
        return
    stamped = all(point.train_ms is not None for point in run.train) and run.train
    yield from _running_clock(run) if stamped else _sum(run)
    for point in run.train:
        rate, before = point.tokens_per_s, run.plan.get("tokens_per_step")
        if not rate or not is_whole(before, 1):
            continue
        if abs(rate * point.ms / 1000 - before) > 0.02 * before + 2 * point.ms / 1000:
            yield (
                "clock",
                f"{run.label}: at step {point.step} its tokens a second and its milliseconds disagree",
            )
            break
    yield from _calendar(run, submitted)


def _sum(run: Run) -> Problems:
    """Steps that carry their own time only: the times add up to the whole."""
    total = sum(point.ms for point in run.train)
    said = f"{total / 1000:.2f} s; the run claims {run.train_ms / 1000:.2f} s"
    every_step = (run.config.get("log_interval") or 1) == 1
    if total > 1.01 * run.train_ms + 50.0 or (every_step and total < 0.99 * run.train_ms - 50.0):
        yield "clock", f"{run.label}: its step times add up to {said}"


def _running_clock(run: Run) -> Problems:
    """Steps that carry the clock: it never runs back, each step moves it by the step's time, and it ends at the end.

    A GPU works behind the CPU that stamps the steps; a validation waits for it, so the clock also moves there.
    """
    mark, step_before, apart = 0.0, 0.0, None
    every_step = (run.config.get("log_interval") or 1) == 1
    for event in run.events:
        if event["event"] not in ("train", "val") or event.get("train_ms") is None:
            continue
        now, step = event["train_ms"], event["step"]
        if now < mark - 0.01:
            yield "clock", f"{run.label}: its clock runs backwards at step {step}"
            return
        if event["event"] == "train" and every_step and apart is None:
            # What a validation waited for may be counted with the step after it, or with none.
            moved = min(now - mark, now - step_before, key=lambda one: abs(event["ms"] - one))
            if abs(event["ms"] - moved) > 1.0 + 0.001 * moved:
                apart = f"its time is {event['ms']:.1f} ms, its clock moved by {moved:.1f}"
                yield "clock", f"{run.label}: at step {step} {apart}"
        mark, step_before = now, now if event["event"] == "train" else step_before
    if abs(mark - run.train_ms) > 1.0:
        said = f"{mark / 1000:.2f} s; its end says {run.train_ms / 1000:.2f} s"
        yield "clock", f"{run.label}: its clock stands at {said}"


def _calendar(run: Run, submitted: datetime.datetime) -> Problems:
    if run.started is None:
        yield "clock", f"{run.label}: environment.json does not say when it started (time, with a time zone)"
        return
    if run.started < FIRST_RUN:
        yield "clock", f"{run.label}: says that it started in {run.started.year}"
    end = run.started + datetime.timedelta(milliseconds=run.train_ms)
    if end > submitted + datetime.timedelta(seconds=60):
        yield "clock", f"{run.label}: would have ended after it was submitted"
    stamps = [event["time"] for event in run.events if event.get("time") is not None]
    if any(b < a - 1.0 for a, b in itertools.pairwise(stamps)):
        yield "clock", f"{run.label}: its wall-clock stamps run backwards"
    timed = [
        event for event in run.events if event.get("time") is not None and event["event"] in ("start", "end")
    ]
    if len(timed) == 2 and timed[1]["time"] - timed[0]["time"] < 0.99 * run.train_ms / 1000 - 2.0:
        yield "clock", f"{run.label}: by its wall-clock stamps it was shorter than the time it claims"


def hardware(run: Run, track: Track) -> Problems:
    """The hardware is named and agrees with itself, and its peak allows the speed."""
    said = {"the end": run.end.get("world_size"), "the plan": run.plan.get("world_size")}
    said["the start"] = next((e.get("world_size") for e in run.events if e["event"] == "start"), None)
    for where, ranks in said.items():
        if ranks is not None and ranks != run.world_size:
            yield "hardware", f"{run.label}: {where} says {ranks} ranks, its environment {run.world_size}"
    listed = run.attempts[0].get("gpus") if run.attempts else None
    if isinstance(listed, list) and listed and len(listed) < run.world_size:
        yield "hardware", f"{run.label}: {run.world_size} ranks on {len(listed)} GPUs"
    if isinstance(listed, list) and len({json.dumps(one, sort_keys=True, default=str) for one in listed}) > 1:
        yield "hardware", f"{run.label}: its GPUs are not all of one kind"
    names, device = _listed_names(listed), gpu_in_log(run.log_lines) if run.kind == "engaging" else ""
    if device not in ("", "CPU") and names and device not in names:
        yield (
            "hardware",
            f"{run.label}: its log names {device}, its environment {', '.join(sorted(names))[:80]}",
        )
    if not run.gpu:
        yield "hardware", f"{run.label}: neither log nor environment says what computed"
        return
    shares = [event["mfu"] for event in run.events if isinstance(event.get("mfu"), int | float)]
    if max(shares, default=0.0) > 1.0:
        yield "hardware", f"{run.label}: says that it used {100 * max(shares):.0f} % of the hardware's peak"
    peak = CPU_PEAK if run.gpu == "CPU" else peak_flops_of(run.gpu)
    flops = track.flops_per_token or _flops_per_token(run)
    if peak is None or not flops:
        what = f"the peak of {run.gpu}" if flops else "the arithmetic of a token on this track"
        run.notes.append(f"{what} is not known here: {NOT_JUDGED}")
        return
    yield from _possible(run, flops, peak * run.world_size)


def _listed_names(listed: object) -> set[str]:
    """The names in environment.json's list of GPUs."""
    found = (
        [one.get("name") if isinstance(one, dict) else one for one in listed]
        if isinstance(listed, list)
        else []
    )
    return {name for name in found if isinstance(name, str)}


def _possible(run: Run, flops: float, peak: float) -> Problems:
    """No run, and no stretch of one, may be faster than the peak allows for the track's arithmetic."""
    tokens, seconds = run.tokens, run.train_ms / 1000
    if tokens and seconds > 0 and tokens * flops > peak * seconds:
        share = tokens * flops / (peak * seconds)
        yield (
            "hardware",
            f"{run.label}: {seconds:.1f} s would take {share:.1f} times the peak of {run.world_size} x {run.gpu}",
        )
        return
    points = [p for p in run.train if p.tokens is not None and p.ms is not None]
    if run.kind == "modded" or (run.config.get("log_interval") or 1) != 1:
        return
    for a in range(0, len(points) - WINDOW, WINDOW // 2):
        part = points[a : a + WINDOW + 1]
        done = (part[-1].tokens - part[0].tokens) * flops
        took = sum(p.ms for p in part[1:]) / 1000
        if took > 0 and done > 1.25 * peak * took:
            yield (
                "hardware",
                f"{run.label}: steps {part[1].step} to {part[-1].step} are faster than the hardware's peak",
            )
            return


def _flops_per_token(run: Run) -> float:
    """6 N + 12 L C T from the run's own shape (PaLM, appendix B), without embeddings; 0 where it has none.

    The small trainer's variants may do less than their shape says: of it, the baseline alone.
    """
    shapes = [("n_layer", "n_embd", "block_size")]
    if run.config.get("variant") == "baseline":
        shapes.append(("num_layers", "model_dim", "sequence_length"))
    for names in shapes:
        knobs = [run.config.get(name) for name in names]
        if all(is_whole(value, 1, 10**6) for value in knobs):
            layers, width, length = knobs
            return 6.0 * 12 * layers * width**2 + 12.0 * layers * width * length
    return 0.0
