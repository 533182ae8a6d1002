"""modded-nanogpt's own logs: read as a run, and checked as far as that format allows.

    <the trainer's source>
    ==================================================== (100 signs)
    Running Python 3.12 ..., Running PyTorch 2.10 ..., the output of nvidia-smi
    ====================================================
    step:0/1770 val_loss:10.8258 train_time:0ms step_avg:0.03ms
    step:1/1770 train_time:433ms step_avg:433.40ms

The records since October 2024 differ in details: until the end of 2024 the clock began anew after ten steps (that was
the rule), training losses were printed, and `step_avg` counted the timed steps; track 3 prints five decimals, seconds
("train_time:615.172s") and validations only. Lines between the separators and among the steps are free text.
"""

import datetime
import hashlib
import itertools
import re
from pathlib import Path

from nanogpt.common.errors import UserError
from nanogpt.common.peaks import peak_flops_of
from tools.leaderboard.clock_checks import Problems, hardware
from tools.leaderboard.evidence import LARGEST_LOG, Refused, Run, Train, Val
from tools.leaderboard.strict import read_bytes
from tools.leaderboard.tracks import Track

SEPARATOR = "=" * 100
LEAST_TOKENS = 100e6  # to the target of any of these tracks: a third of what the fastest run has read
FREE_STEPS = 10  # steps whose time did not count, by the rule of 2024
LONGEST_LINE = 1 << 20
LEFT_OUT = "source left out"  # the one check whose failure leaves a log plausible
COPY = "<source: not in this copy of what the run printed>"
_STEP = re.compile(
    r"step:(?P<step>\d{1,7})/(?P<total>\d{1,7})(?: (?P<kind>val|train)_loss:(?P<loss>\d{1,3}\.\d{2,8}))?"
    r"(?: val_[a-z]+_loss:\d{1,3}\.\d{2,8}){0,4}"  # of averaged weights: val_loss is the one that counts
    r" train_time:(?P<time>\d{1,10}(?:\.\d{1,3})?)(?P<unit>ms|s) step_avg:(?P<avg>\d{1,9}\.\d{2}|nan|inf)ms(?: .*)?"
)
_DEVICE = re.compile(r"(?:device_name=|\bon )((?:NVIDIA|AMD)?[^\n=]{1,60}?) with world_size[= ](\d{1,4})\b")
_LLMC = re.compile(r"s:(\d{1,7}) (tel|trl):(\d{1,3}\.\d{2,8})\b.*")
_LEFT_OUT = re.compile(r"\s*<source: .{1,80}>\s*")
_SMI_GPU = re.compile(r"\|\s+(\d{1,2})\s+((?:NVIDIA|Tesla|GRID|Quadro|AMD)[^|]{2,40}?)\s+(?:On|Off|N/A)\s+\|")
_VERSION = re.compile(r"running (python|pytorch|triton)(?: version)? ([0-9][\w.+]{0,40})", re.IGNORECASE)
_DATE = re.compile(r"\w{3} (\w{3} +\d{1,2} \d\d:\d\d:\d\d(?: [AP]M)?)(?: [A-Z]{3,4})? (20\d\d)\s*")
_VAL_TOKENS = re.compile(r"\bval_tokens\s*(?::\s*int\s*)?=\s*([\d_]{4,20})\b")


def looks_like_one(data: bytes) -> bool:
    """Whether the file has the separator line that these logs have."""
    return f"\n{SEPARATOR}\n".encode() in data.replace(b"\r\n", b"\n")


def read_modded_log(path: Path, label: str) -> Run:
    """The run in a log. UserError: no such log; Refused: its lines contradict each other."""
    data = read_bytes(path, LARGEST_LOG)
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from None
    if any(len(line) > LONGEST_LINE for line in text.split("\n")):
        raise UserError(f"{path}: a line of more than {LONGEST_LINE:,} characters; no run prints that")
    if looks_like_one(data):
        parted = re.split(rf"^{SEPARATOR}\r?\n", text, flags=re.MULTILINE)
        code, *parts = (
            parted[1:] if len(parted) > 2 and not parted[0].strip() else parted
        )  # in 2024 one came first
    elif any(_STEP.fullmatch(line.rstrip()) for line in text.splitlines()):
        code, parts = COPY, [text]
    else:
        _name_llmc(text, label)
        raise UserError(
            f"{path}: not a log of modded-nanogpt (no line 'step:S/T ... train_time:...'), nor of ours"
        )
    head, body = (parts[0], "\n".join(parts[1:])) if len(parts) > 1 else ("", parts[0])
    head += "\n" + "\n".join(
        itertools.takewhile(lambda line: not line.startswith("step:"), body.splitlines())
    )
    rows = [found for line in body.splitlines() if (found := _STEP.fullmatch(line.rstrip()))]
    if not rows:
        raise UserError(
            f"{path}: holds no line 'step:S/T ... train_time:...'; it was cut before the first step"
        )
    damaged = [
        line for line in body.splitlines() if line.startswith("step:") and not _STEP.fullmatch(line.rstrip())
    ]
    if damaged:
        raise UserError(
            f"{path}: {ascii(damaged[0])[:60]}: not a line that the trainer prints; it was cut or edited"
        )
    _name_two_runs(rows, label)
    train, val, free = _rows(rows)
    if not val:
        raise Refused("losses", f"{label}: the log holds no validation loss")
    gpus = _SMI_GPU.findall(head)
    device = _DEVICE.search(head)
    name = device[1] if device else gpus[0][1] if gpus else ""
    run = Run(
        label=label, kind="modded", files={"log.txt": data}, source_sha256=hashlib.sha256(code.encode()).hexdigest(),
        source_files={"train_gpt.py": code.encode()}, recipe={"entry": "modded-nanogpt"}, seed=_seed(head),
        steps=int(rows[-1]["total"]), train=train, val=val, train_ms=val[-1].train_ms or 0.0,
        world_size=int(device[2]) if device else len({index for index, _ in gpus}), gpu=name, started=_date(head),
        software={found[1].lower(): found[2] for found in _VERSION.finditer(head)}, entry="modded-nanogpt",
        log_lines=body.splitlines(),
        extra={"rows": rows, "free": free, "gpus": {gpu for _, gpu in gpus}, "head": head},
    )  # fmt: skip
    readable = "" if _LEFT_OUT.fullmatch(code) else ", its source can be read"
    run.notes.append(f"a log of modded-nanogpt: its validation data cannot be checked{readable}")
    if free:
        run.notes.append(
            f"the first {FREE_STEPS} steps were not timed, as the rule was until the end of 2024"
        )
    return run


def _name_llmc(text: str, label: str) -> None:
    """Refused, by its name, when the log is llm.c's: the baseline of the record, from before the speedrun."""
    rows = [found for line in text.splitlines() if (found := _LLMC.fullmatch(line.rstrip()))]
    vals = [row for row in rows if row[2] == "tel"]
    if vals and len(rows) > 0.9 * len(text.splitlines()):
        raise Refused(
            "clock",
            f"{label}: a log of llm.c: it states neither times nor source nor hardware; its {len(vals)} validations "
            f"end at {vals[-1][3]} (step {vals[-1][1]})",
        )


def _name_two_runs(rows: list[re.Match], label: str) -> None:
    """Refused when validations go back in the middle, mostly to step 0: nobody can say which run counts."""
    for before, row in itertools.pairwise(row for row in rows if row["kind"] == "val" or row["step"] == "0"):
        last, step = int(before["step"]), int(row["step"])
        if step < last:
            how = f"begins again at {step}" if step == 0 else f"goes back to {step}"
            raise Refused(
                "attempts", f"{label}: two runs in one file: after step {last} it {how}; hand in one of them"
            )


def _rows(rows: list[re.Match]) -> tuple[list[Train], list[Val], bool]:
    """Training steps (0-based, as ours) and validations in the order of the log; whether the clock began anew."""
    train, val, free, before = [], [], False, 0.0
    for row in rows:
        step, time = int(row["step"]), float(row["time"]) * (1000 if row["unit"] == "s" else 1)
        if time < before and step in (FREE_STEPS, FREE_STEPS + 1) and not free:
            free, before = True, 0.0
        if row["kind"] == "val":
            val.append(Val(step, float(row["loss"]), train_ms=time))
        else:
            loss = float(row["loss"]) if row["loss"] else None
            train.append(Train(step - 1, loss, time - before, None, time))
        before = time
    return train, val, free


def _seed(head: str) -> int | None:
    found = re.search(r"\bseed[=:] ?(\d{1,9})\b", head)
    return int(found[1]) if found else None


def _date(head: str) -> datetime.datetime | None:
    """The time that nvidia-smi prints, taken as UTC: the logs do not say the zone."""
    found = _DATE.search(head)
    if not found:
        return None
    clock = f"{found[1]} {found[2]}"
    for form in ("%b %d %H:%M:%S %Y", "%b %d %H:%M:%S %p %Y"):
        try:
            return datetime.datetime.strptime(" ".join(clock.split()), form).replace(
                tzinfo=datetime.timezone.utc
            )
        except ValueError:
            continue
    return None


def check_modded(run: Run, track: Track, submitted: datetime.datetime) -> Problems:
    """What may be wrong with one of these logs."""
    yield from _source(run, track)
    yield from _steps(run, track)
    yield from _losses(run, track)
    yield from _clock(run, submitted)
    yield from _possible(run, track)
    if len(run.extra["gpus"]) > 1:
        yield "hardware", f"{run.label}: its GPUs are not all of one kind"
    yield from hardware(run, track)


def _source(run: Run, track: Track) -> Problems:
    code = run.source_files["train_gpt.py"].decode()
    if _LEFT_OUT.fullmatch(code):
        copy = "it is a copy of what the run printed, without its source"
        said = copy if code == COPY else "its source was left out of the file"
        yield LEFT_OUT, f"{run.label}: {said}, so it cannot be looked at"
        return
    if "import torch" not in code or len(code) < 2000:
        yield "source", f"{run.label}: the log does not begin with a trainer's source"
    for found in _VAL_TOKENS.finditer(code):
        if int(found[1].replace("_", "") or 0) != track.val_tokens:
            yield (
                "data",
                f"{run.label}: its source validates on {found[1]} tokens; the track's number is {track.val_tokens:,}",
            )


def _steps(run: Run, track: Track) -> Problems:
    rows, total = run.extra["rows"], int(run.extra["rows"][-1]["total"])
    if {int(row["total"]) for row in rows} != {total}:
        yield "steps", f"{run.label}: its lines name different numbers of steps in all"
    steps, vals = [point.step for point in run.train], [point.step for point in run.val]
    if any(b != a + 1 for a, b in itertools.pairwise(steps)) or (steps and steps[0] > 1):
        yield "steps", f"{run.label}: training steps are missing, repeated or out of order"
    stopped = track.metric == "steps"  # track 3 stops where it likes, all seeds at one step
    if stopped:
        total = vals[-1]
    if steps and steps[-1] != total - 1:
        yield "steps", f"{run.label}: its last training step is {steps[-1] + 1} of {total}"
    order = [int(row["step"]) for row in rows]
    if any(b <= a for a, b in itertools.pairwise(vals)) or order != sorted(order):
        yield "steps", f"{run.label}: its lines are repeated or out of order"
    if vals[-1] != total:
        yield (
            "attempts",
            f"{run.label}: ends without the validation of its last step, {total}; it was cut or not finished",
        )


def _losses(run: Run, track: Track) -> Problems:
    first, last = run.val[0], run.val_loss
    if first.step == 0 and abs(first.loss - 10.826) > 0.3:
        yield (
            "losses",
            f"{run.label}: starts at a loss of {first.loss:.3f}; an untrained model stands near ln 50,304 = 10.83",
        )
    if last < track.loss_floor:
        yield (
            "losses",
            f"{run.label}: a final loss of {last:.4f} is below what this text allows ({track.name})",
        )
    if first.loss < last:
        yield "losses", f"{run.label}: its loss rose"


def _clock(run: Run, submitted: datetime.datetime) -> Problems:
    before, reset, steps_of, last = -1.0, False, run.extra["free"], 0
    for row in run.extra["rows"]:
        step = int(row["step"])
        time = float(row["time"]) * (1000 if row["unit"] == "s" else 1)
        if steps_of and not reset and time < before and step in (FREE_STEPS, FREE_STEPS + 1):
            reset, before = True, -1.0
        passed, since = time - before, step - last
        if time < before:
            yield "clock", f"{run.label}: its clock runs backwards at step {step}"
            return
        before, last = time, step
        if row["avg"] in ("nan", "inf") or step <= FREE_STEPS:
            continue
        if not _average_fits(row, step, time) and not _fits(row, since, passed):
            yield (
                "clock",
                f"{run.label}: at step {step}, {time:.0f} ms do not average to {row['avg']} ms a step",
            )
            return
    if run.started and run.started > submitted + datetime.timedelta(days=1):
        yield "clock", f"{run.label}: started after it was submitted"


def _possible(run: Run, track: Track) -> Problems:
    """These logs do not say how many tokens were read; the least that anybody needs takes its time all the same."""
    if run.train_ms <= 0:
        yield "clock", f"{run.label}: states no training time"
        return
    peak, seconds = peak_flops_of(run.gpu), run.train_ms / 1000
    least = LEAST_TOKENS * track.flops_per_token / (peak * run.world_size) if peak and run.world_size else 0.0
    if seconds < least:
        needs = f"the peak of {run.world_size} x {run.gpu} needs {least:.1f} s for {LEAST_TOKENS / 1e6:.0f} M tokens"
        yield "hardware", f"{run.label}: {seconds:.1f} s; {needs}"


def _average_fits(row: re.Match, step: int, time: float) -> bool:
    """`step_avg` is the time by the steps, or by the steps that were timed (an off-by-one there is historical)."""
    return any(
        _fits(row, counted, time)
        for counted in (
            step,
            step - FREE_STEPS,
            step - FREE_STEPS - 1,
            step - FREE_STEPS + 1,
            step - 1,
            step + 1,
        )
    )


def _fits(row: re.Match, steps: int, time: float) -> bool:
    """Whether `step_avg` is `time` by `steps`; some of track 3's average since their last line."""
    rounding = 0.6 if row["unit"] == "ms" else 1.1
    return steps > 0 and abs(float(row["avg"]) - time / steps) <= rounding / steps + 0.0051
