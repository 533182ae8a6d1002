"""`engaging wandb RUN`: send a run's metrics to Weights & Biases, while it runs or afterwards.

    engaging wandb out/nanogpt-gpt2
    engaging wandb out/nanogpt-gpt2 --follow
    WANDB_MODE=offline engaging wandb out/speedrun --project mine

Everything comes from metrics.jsonl, so it is the same for every trainer; --wandb_log=true of a trainer starts the same
command beside it. What was sent is remembered: a second call sends what is new. WANDB_MODE is obeyed; without it the
run is sent when there is a login and kept in RUN/wandb when there is none. No key is ever asked for.
"""

import contextlib
import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

from nanogpt.common import lease, rundir, tracking
from nanogpt.common.errors import UserError
from nanogpt.common.storage import atomic_write_json, make_folder
from tools.args import Parser
from tools.runs import MAX_LINE

PROJECT = "engaging-nanogpt"
PAUSE_SECONDS = 0.5
NOT_VALUES = ("event", "step", "attempt", "time")


def parser() -> Parser:
    """The command line."""
    read = Parser("wandb", __doc__)
    read.add_argument("run", metavar="RUN", help="the run directory")
    read.add_argument(
        "--follow", action="store_true", help="go on until the run ends (Ctrl-C ends it earlier)"
    )
    read.add_argument("--project", default="", help="Weights & Biases project (default: what the run says)")
    read.add_argument(
        "--name", default="", help="the run's name there (default: what the run says, or its folder)"
    )
    read.add_argument("--parent", type=int, default=0, help="follow until this process, our parent, is gone")
    return read


def main(argv: list[str]) -> int:
    """Send what is new; with --follow or --parent, until the run ends."""
    options = parser().read(argv)
    folder = Path(options.run).expanduser().absolute()
    if not rundir.holds_run(folder) and not (folder / "metrics.jsonl").is_file():
        raise UserError(f"{folder}: holds no run; name the run directory (what --out_dir was)")
    mode = tracking.mode(f"engaging wandb {folder.name}")
    if mode == "disabled":
        print(f"{folder}: WANDB_MODE=disabled: nothing is sent")
        return 0
    sent = read_sent(folder)
    lines = Lines(folder / "metrics.jsonl", sent["bytes"])
    live = options.follow or options.parent > 0
    if not live and not lines.waiting():
        print(f"{folder}: everything has been sent already")
        return 0
    stop = _Stop(options.parent) if live else None
    held = lease.read(folder) if options.parent else None
    run = begin(folder, options, mode, options.parent)
    step = sent["step"]
    try:
        for record in until_the_end(lines, stop, held.attempt if held else 0):
            step = send(run, record, step)
    finally:
        run.finish()
    make_folder(folder / "wandb")
    atomic_write_json(folder / "wandb" / "sent.json", {"bytes": lines.position, "step": step})
    if mode == "offline":
        print(f"{folder.name}: kept offline; send it with: wandb sync {run.settings.sync_dir}", flush=True)
    else:
        print(f"{folder.name}: sent to {run.url}", flush=True)
    return 0


class Lines:
    """The lines of a growing file, whole ones only. `position` is the byte after the last that was read."""

    def __init__(self, path: Path, position: int) -> None:
        self.path = path
        self.position = position if position <= self._size() else 0  # the run was started afresh

    def waiting(self) -> bool:
        """Whether there is more."""
        return self._size() > self.position

    def read(self) -> Iterator[dict]:
        """The JSON objects that have been added; other lines are passed over."""
        if not self.waiting():
            return
        with contextlib.suppress(OSError), self.path.open("rb") as file:
            file.seek(self.position)
            while (line := file.readline(MAX_LINE)).endswith(b"\n"):
                self.position += len(line)
                with contextlib.suppress(ValueError, RecursionError):
                    if isinstance(record := json.loads(line), dict):
                        yield record

    def _size(self) -> int:
        try:
            return self.path.stat().st_size
        except OSError:
            return 0


class _Stop:
    """Becomes true when the person, SLURM or the parent's end says so. A trainer that was told to stop writes its last
    lines first: with a parent, a signal is passed over."""

    def __init__(self, parent: int) -> None:
        self.parent, self.asked = parent, False
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, self._on_signal)

    def _on_signal(self, *_: object) -> None:
        self.asked = not self.parent

    def __bool__(self) -> bool:
        return self.asked or (bool(self.parent) and os.getppid() != self.parent)


def until_the_end(lines: Lines, stop: _Stop | None, attempt: int = 0) -> Iterator[dict]:
    """What is there and, with a `stop`, what is added until the run's `end`, or until `stop`.

    The end of an attempt before number `attempt`, that of the trainer beside us, is not the end. Its own may be there
    already: a short run is over before wandb has come up, and waits for us.
    """
    ended = False
    while True:
        stopping = stop is None or bool(stop)  # looked at before the last lines are read
        for record in lines.read():
            if record.get("event") == "end":
                ended = record.get("attempt", attempt) >= attempt
            elif record.get("event") in ("start", "resume"):
                ended = False
            yield record
        if stopping or ended:
            return
        time.sleep(PAUSE_SECONDS)


def begin(folder: Path, options, mode: str, parent: int):
    """The wandb run, which goes on with what an earlier attempt has sent. UserError when the server refuses."""
    import wandb

    record = rundir.read_json(folder / "config.json") if rundir.holds_run(folder) else {}
    config = record.get("config") if isinstance(record.get("config"), dict) else {}
    quiet = {
        "console": "off",
        "silent": True,
        "disable_git": True,
        "disable_code": True,
        "x_disable_machine_info": True,
    }
    # Of the machine that trains, and only while it does: afterwards its load says nothing about the run.
    stats = {"x_stats_pid": parent} if parent else {"x_disable_stats": True, "x_disable_meta": True}
    about = {key: record[key] for key in ("plan", "source_sha256", "data") if key in record}
    try:
        return wandb.init(
            project=options.project or config.get("wandb_project") or PROJECT,
            name=options.name or config.get("wandb_run_name") or folder.name,
            id=record.get("run_id"), resume="allow", dir=str(folder), config={**config, **about}, mode=mode,
            settings=wandb.Settings(**quiet, **stats),
        )  # fmt: skip
    except (wandb.errors.Error, OSError) as error:
        raise UserError(
            f"engaging wandb {folder}: {error}; check the login and the network, or set WANDB_MODE=offline"
        ) from None


def send(run, record: dict, last_step: int) -> int:
    """Hand one line over; the step reached. Steps that a resumed run writes again, with equal values, are left out."""
    step, event = record.get("step"), record.get("event")
    values = {
        key: value
        for key, value in record.items()
        if key not in NOT_VALUES and isinstance(value, int | float) and not isinstance(value, bool)
    }
    if event == "end":
        run.summary.update(
            {key: value for key, value in record.items() if key not in ("event", "step", "time")}
        )
        return last_step
    if event not in ("train", "val") or not isinstance(step, int) or step < last_step:
        return last_step
    run.log(values, step=step)
    return step


def read_sent(folder: Path) -> dict[str, int]:
    """How far earlier calls have come; the beginning when nothing says so."""
    try:
        found = json.loads((folder / "wandb" / "sent.json").read_text())
        return {"bytes": max(0, int(found["bytes"])), "step": int(found["step"])}
    except (OSError, ValueError, KeyError, TypeError):
        return {"bytes": 0, "step": -1}
