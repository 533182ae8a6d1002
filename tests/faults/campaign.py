"""The campaign: kills, damaged files and refusing disks at seeded places; each resume afterwards must be exact."""

import contextlib
import errno
import itertools
import os
import random
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from nanogpt.common import checkpoints
from nanogpt.common.checkpoint_names import name_of, steps
from tests.faults import tiny
from tests.faults.outcomes import Tally
from tests.faults.shim import compile_shim, fault
from tests.faults.zygote import Zygote

FINAL = 24
RUN = (*tiny.FLAGS, "--auto_resume=true", "--dropout=0.1", "--eval_interval=8", f"--max_iters={FINAL}")
ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS)


@dataclass
class Rig:
    """Where the campaign works: a process that forks, data, and the runs that nobody disturbs."""

    zygote: Zygote
    folder: Path
    shim: bool
    seconds: dict[int, float] = field(default_factory=dict)  # of an undisturbed run, by its save interval
    calls: int = 0  # see `calls_of_a_run`
    numbers: itertools.count = field(default_factory=itertools.count)

    def fresh(self, name: str) -> Path:
        """A path that nobody has used."""
        return self.folder / f"{name}-{next(self.numbers)}"

    def argv(self, out: Path, interval: int) -> list[str]:
        """The command line of a run that saves every `interval` steps."""
        return [*RUN, f"--save_interval={interval}", f"--data_root={self.folder}/data", f"--out_dir={out}"]

    def reference(self, interval: int) -> Path:
        """The undisturbed run with that save interval."""
        folder = self.folder / f"undisturbed-{interval}"
        if interval not in self.seconds:
            began = time.monotonic()
            done = self.zygote.run(self.argv(folder, interval))
            self.seconds[interval] = time.monotonic() - began
            assert done.status == 0, done.stderr
        return folder


@contextlib.contextmanager
def rig(forks: Zygote | None = None) -> Iterator[Rig]:
    """A rig in a temporary folder, with a forking process of its own unless one is given."""
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="faults-")))
        tiny.make_data(folder / "data")
        zygote = forks or stack.enter_context(Zygote(compile_shim(folder)))
        zygote.run(["--check", f"--data_root={folder}/data", *RUN])  # returns once torch is imported
        yield Rig(zygote, folder, zygote.shim)


def unsound(out: Path) -> list[str]:
    """Faults of the checkpoints that a resume could choose; [] when all are sound."""
    folder = out / "checkpoints"
    found = {step: checkpoints.problem(folder / name_of(step)) for step in steps(folder)}
    return [f"step {step}: {problem}" for step, problem in found.items() if problem]


def differs(out: Path, reference: Path) -> str:
    """How a finished run differs from the undisturbed one; "" when it does not."""
    try:
        if tiny.losses(out) != tiny.losses(reference) or sorted(tiny.losses(out)) != list(range(FINAL)):
            return "training losses differ"
        if tiny.val_losses(out) != tiny.val_losses(reference):
            return "validation losses differ"
        if tiny.final_weights(out, FINAL) != tiny.final_weights(reference, FINAL):
            return "final weights or optimizer state differ"
    except (AssertionError, OSError, ValueError, KeyError) as error:
        return f"{type(error).__name__}: {error}"
    left = [path.name for path in (out / "checkpoints").iterdir() if path.name.startswith(".")]
    return f"left over: {left}" if left else ""


def finish(rig: Rig, out: Path, interval: int) -> str:
    """Resume to the end without disturbance; what is wrong then, or ""."""
    bad = unsound(out)
    if bad:
        return "; ".join(bad)
    done = rig.zygote.run(rig.argv(out, interval))
    if done.status:
        return f"resume ended with {done.status}: {done.stderr.strip()}"
    return differs(out, rig.reference(interval))


def place_of(out: Path) -> str:
    """Where a kill has hit, from what it left."""
    names = [path.name for path in (out / "checkpoints").glob(".*")]
    if any(name.startswith(".step_") for name in names):
        return "inside a save"
    if any(name.startswith(".trash_") for name in names):
        return "inside a deletion"
    if not (out / "config.json").exists():
        return "before the run directory was complete"
    trained = (out / "metrics.jsonl").exists() and bool(steps(out / "checkpoints"))
    return "between saves" if trained else "before the first save"


def random_kills(rig: Rig, rng: random.Random, kills: int) -> Tally:
    """SIGKILL at random moments, one to four in the same run, half of them while a save is under way."""
    tally = Tally("SIGKILL at a random moment, up to 4 in a run", "loadable, resumed, all losses equal")
    while tally.injected < kills:
        interval, out = rng.choice((1, 2, 3)), rig.fresh("random")
        seconds = rig.seconds[interval] if rig.reference(interval) else 0.0
        for _ in range(min(rng.randint(1, 4), kills - tally.injected)):
            child = rig.zygote.start(rig.argv(out, interval))
            _kill(child, out, rng, seconds)
            if child.wait() == -signal.SIGKILL:
                tally.injected += 1
                tally.where[place_of(out)] += 1
                bad = unsound(out)
                if bad:
                    tally.failures.append(f"{out.name}: {bad}")
        problem = finish(rig, out, interval)
        if problem:
            tally.failures.append(f"{out.name}: {problem}")
        else:
            shutil.rmtree(out, ignore_errors=True)
            for beginning in rig.folder.glob(f"{out.name}.*"):
                shutil.rmtree(beginning)
    return tally


def _kill(child, out: Path, rng: random.Random, seconds: float) -> None:
    """Kill a child at a moment drawn from the length of a run, or shortly after a save has begun."""
    delay = rng.uniform(0, 1.1 * seconds)
    end = time.monotonic() + delay
    while time.monotonic() < end and child.status is None:
        time.sleep(0.0005)
    if rng.random() < 0.5:
        while child.status is None and not list((out / "checkpoints").glob(".*")):
            time.sleep(0.0002)
        time.sleep(rng.uniform(0, 0.02))
    with contextlib.suppress(ProcessLookupError):
        if child.status is None:
            os.kill(child.pid, signal.SIGKILL)


def calls_of_a_run(rig: Rig) -> int:
    """How many calls that change something a whole run makes in its checkpoints folder."""
    if rig.calls:
        return rig.calls
    out, target = rig.folder / "counted", rig.folder / "count"
    rig.reference(8)
    environment = {"FAULT": "count", "FAULT_PATH": "/checkpoints", "FAULT_COUNT": str(target)}
    done = rig.zygote.run(rig.argv(out, 8), env=environment)
    assert done.status == 0, done.stderr
    rig.calls = int(target.read_text())
    return rig.calls


def kills_at_calls(rig: Rig, rng: random.Random, most: int) -> Tally:
    """SIGKILL in place of the n-th call on the checkpoints folder, for all n (or a sample of `most`)."""
    tally = Tally("SIGKILL at a system call of saving and pruning", "loadable, resumed, all losses equal")
    total = calls_of_a_run(rig)
    for number in sorted(rng.sample(range(1, total + 1), min(most, total))):
        out = rig.folder / f"call-{number}"
        status = rig.zygote.run(rig.argv(out, 8), env=fault("any", number, 0)).status
        tally.injected += 1
        tally.where[place_of(out)] += 1
        problem = finish(rig, out, 8) if status == -signal.SIGKILL else f"ended with {status}, not killed"
        tally.failures += [f"call {number}: {problem}"] if problem else []
        shutil.rmtree(out, ignore_errors=True)
    return tally


def refusals(rig: Rig, rng: random.Random, cases: int) -> Tally:
    """A call on the checkpoints folder fails: full, over quota, broken, read-only; for once or from then on."""
    tally = Tally(
        "disk full, quota, I/O error, read-only at a call of a save",
        "exit 74 and one line, or 0 where the run could do without; resumed, equal",
    )
    total = calls_of_a_run(rig)
    for number in range(cases):
        out, at = rig.fresh("refused"), rng.randint(1, total)
        code, lasting = rng.choice(ERRORS), rng.random() < 0.5
        done = rig.zygote.run(rig.argv(out, 8), env=fault("any", at, code, lasting=lasting))
        tally.injected += 1
        tally.where[errno.errorcode[code]] += 1
        one_line = done.stderr.count("\n") == 1 and done.stderr.startswith("error: ")
        # A deletion that fails, or a full disk that gives way, is no reason to stop.
        if not (done.status == 74 and one_line) and not (done.status == 0 and not done.stderr):
            tally.failures.append(f"case {number}, call {at}: status {done.status}: {done.stderr}")
        problem = finish(rig, out, 8)
        tally.failures += [f"case {number}, call {at}, {errno.errorcode[code]}: {problem}"] if problem else []
        shutil.rmtree(out, ignore_errors=True)
    return tally
