"""`engaging watch [JOBID]`: one screen for a job and its run: state, step, loss, ETA, GPUs, the log's tail.
q quits.

Files are read in a thread of their own: a network file system that hangs freezes the figures, not the
screen, and the screen says how old they are. SLURM is asked at most once in 10 s, whatever happens.
"""

import contextlib
import select
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

from nanogpt.common.errors import UserError
from tools.args import Parser, words
from tools.launch import book
from tools.place import checkout
from tools.runs import Run, named_run, printable, read_run, runs_under, tail
from tools.site import slurm
from tools.site.cluster import my_jobs
from tools.site.slurm import Job, SlurmUnreachable

SQUEUE_EVERY_S = 10.0
FILES_EVERY_S = 2.0
GPUS_EVERY_S = 30.0
STALE_S = 8.0  # figures older than this are marked
BARS = " ▁▂▃▄▅▆▇█"
GPU_QUERY = "--query-gpu=index,utilization.gpu,memory.used,memory.total,temperature.gpu"


@dataclass
class View:
    """What the screen shows.

    Written by the reader threads, read by the screen; each field is replaced whole.
    """

    job: str = ""
    run_path: Path | None = None
    log_path: Path | None = None
    queue: list[Job] = field(default_factory=list)
    queue_note: str = ""
    run: Run | None = None
    log: list[str] = field(default_factory=list)
    gpus: list[str] = field(default_factory=list)
    files_at: float = 0.0  # time.monotonic() of the last completed read
    asked: int = 0  # squeue calls so far


class Reader(threading.Thread):
    """One question asked again and again in the background; a hang or a fault of it stops nothing else."""

    def __init__(self, every: float, work, first: float = 0.0) -> None:
        super().__init__(daemon=True)
        self.every, self.work, self.first, self.stopped = every, work, first, threading.Event()

    def run(self) -> None:
        """After `first` seconds, until stopped."""
        self.stopped.wait(self.first)
        while not self.stopped.is_set():
            began = time.monotonic()
            with contextlib.suppress(OSError, ValueError, subprocess.SubprocessError):
                self.work()
            self.stopped.wait(max(0.05, self.every - (time.monotonic() - began)))


def read_files(view: View) -> None:
    """The run directory and the log's tail, into the view."""
    run = read_run(view.run_path) if view.run_path else None
    lines = tail(view.log_path, 60) if view.log_path else []
    if not lines and run is not None:
        lines = run.log_tail(60)
    view.run, view.log, view.files_at = run, lines, time.monotonic()


def read_queue(view: View) -> None:
    """One squeue."""
    view.asked += 1
    try:
        view.queue, view.queue_note = my_jobs(), ""
    except SlurmUnreachable as error:
        view.queue_note = str(error)


def read_gpus(view: View) -> None:
    """nvidia-smi on the job's first node (a job step beside the run), or here when there is no job."""
    query = ["nvidia-smi", GPU_QUERY, "--format=csv,noheader,nounits"]
    if view.job:
        if not any(job.state == "RUNNING" and view.job in (job.key, job.base) for job in view.queue):
            view.gpus = []
            return
        query = ["srun", f"--jobid={view.job}", "--overlap", "--nodes=1", "--ntasks=1", "--quiet", *query]
    answer = slurm.ask(query, timeout=15)
    view.gpus = gpu_lines(answer.out) if answer.rc == 0 else []


def gpu_lines(text: str) -> list[str]:
    """nvidia-smi's rows for people; rows of another form are left out."""
    found = []
    for line in text.splitlines():
        parts = [part.strip() for part in line.split(",")]
        if len(parts) == 5 and all(part.replace(".", "", 1).isdigit() for part in parts):
            index, use, used, total, heat = parts
            found.append(
                f"GPU {index}: {use:>3} %  {float(used) / 1024:5.1f} of {float(total) / 1024:.0f} GiB  {heat} C"
            )
    return found


def spark(values: list[float], width: int) -> str:
    """A line of bars, the last `width` means of the values; high is high."""
    if not values or width < 1:
        return ""
    size = max(1, -(-len(values) // width))
    means = [sum(values[i : i + size]) / len(values[i : i + size]) for i in range(0, len(values), size)]
    low, high = min(means), max(means)
    span = (high - low) or 1.0
    return "".join(BARS[1 + int((value - low) / span * (len(BARS) - 2))] for value in means)


def lines_of(view: View, width: int, height: int) -> list[tuple[str, str]]:
    """The screen as (style, text) lines: the same for the live screen, for a pipe and for the tests."""
    found = [("bold", _title(view))]
    found += [("", line) for line in _queue_lines(view)]
    if view.queue_note:
        found.append(("yellow", view.queue_note))
    run = view.run
    if run is not None:
        found += [("", line) for line in _run_lines(run, width, _runs(view))]
    found += [("", line) for line in view.gpus[:8]]
    age = time.monotonic() - view.files_at if view.files_at else 0.0
    if view.files_at and age > STALE_S:
        found.append(("yellow", f"the file system is slow: these figures are {age:.0f} s old"))
    found.append(("dim", "─" * max(1, width - 1)))
    room = max(3, height - len(found) - 1)
    found += [("dim", line[: width - 1]) for line in view.log[-room:]]
    return [(style, text[: width - 1]) for style, text in found][: max(1, height - 1)]


def main(argv: list[str]) -> int:
    """The command."""
    parser = Parser(
        "watch", "One screen for a job and its run; q quits. In a pipe, or with --once: one look."
    )
    parser.add_argument(
        "job", nargs="?", metavar="JOBID", help="a job id, a launch's name, or a run directory"
    )
    parser.add_argument("--once", action="store_true", help="print it once and stop")
    args = parser.read(argv)
    view = View()
    if slurm.available():
        read_queue(view)
    find_target(view, args.job)
    if args.once or not sys.stdout.isatty():
        read_files(view)
        for _, line in lines_of(view, 110, 40):
            print(line)
        return 0
    return _screen(view)


def find_target(view: View, wanted: str | None) -> None:
    """Which job, run directory and log: from an id, a name, a folder, or the newest there is."""
    root = checkout()
    launch = None
    if wanted and wanted not in book.names(root):  # a launch may have a folder's name: nanogpt
        view.run_path = named_run(root, wanted) or (root / wanted if (root / wanted).is_dir() else None)
        if view.run_path is not None:
            return
    if wanted and not slurm.JOB_ID.fullmatch(wanted):
        launch = book.find(root, wanted)
        view.job = launch.job_id
    elif wanted:
        view.job = wanted
    elif view.queue:
        running = [job for job in view.queue if job.state == "RUNNING"] or view.queue
        view.job = max(running, key=lambda job: int(job.base)).key.partition("[")[0].rstrip("_")
    base, _, task = view.job.partition("_")
    launch = launch or (book.by_job(root, base) if base else None)
    if launch is None and not view.job and (names := book.names(root)):
        launch = book.latest(root, names[0])
        view.job = launch.job_id if launch else ""
    index = int(task) if task.isdigit() else 0
    if launch is not None:
        view.run_path = root / launch.runs[min(index, len(launch.runs) - 1)]
        logs = launch.log_files(root)
        view.log_path = next((p for p in logs if p.stem.endswith(f"_{index}")), logs[0] if logs else None)
    if view.log_path is None and view.job:
        view.log_path = _log_of(view.job)
    if view.run_path is None:
        runs = runs_under(root / "out")
        mine = [path for path in runs if base and _names_job(path, base)]
        # Another job's run is not this one's: a job that waits, or that nobody knows, has none to show.
        view.run_path = next(iter(mine if base else runs), None)
    if view.run_path is None and not view.job:
        raise UserError("nothing to watch: no job in the queue, no run in out/; engaging launch nanogpt")


def _title(view: View) -> str:
    name = view.run_path.name if view.run_path else ""
    return "  ".join(part for part in (f"job {view.job}" if view.job else "", name, "q quits") if part)


def _queue_lines(view: View) -> list[str]:
    if not view.job:
        return []
    base = view.job.partition("_")[0]
    mine = [job for job in view.queue if job.base == base]
    if not mine:
        return [
            "none of yours in the queue (any more): engaging why " + view.job
            if not view.queue_note
            else "state unknown"
        ]
    found = []
    for job in mine[:6]:
        limit = f" of {words(job.limit_minutes)}" if job.limit_minutes else ""
        where = f" on {job.node_list}" if job.node_list else f" ({job.reason}; engaging why {base})"
        gpus = ", ".join(f"{count}x {kind or 'GPU'}" for kind, count in job.gpus.items())
        found.append(printable(f"{job.key} {job.state} {job.elapsed}{limit} {job.partition} {gpus}{where}"))
    return found + ([f"... and {len(mine) - 6} more"] if len(mine) > 6 else [])


def _runs(view: View) -> bool:
    """Whether the job is running, as far as anybody knows."""
    base = view.job.partition("_")[0]
    states = [job.state for job in view.queue if job.base == base]
    return not view.job or bool(view.queue_note) or "RUNNING" in states


def _run_lines(run: Run, width: int, runs: bool = True) -> list[str]:
    if run.status == "empty":
        return ["no step yet" + (": compiling or loading data" if runs else "")]
    last = run.train[-1] if run.train else None
    total = f" of {run.max_steps}" if run.max_steps else ""
    parts = [run.standing, f"step {run.step}{total}"]
    parts += [f"loss {run.loss:.4f}"] if run.loss is not None else []
    parts += [f"val {run.val_loss:.4f} (best {run.best_val.val_loss:.4f})"] if run.best_val else []
    eta = run.eta_s()
    parts += [f"ETA {words(eta / 60)}"] if eta is not None and run.standing == "running" else []
    parts += [f"attempt {run.attempts}"] if run.attempts > 1 else []
    found = ["  ".join(parts)]
    if last is not None:
        speed = [f"{run.step_ms():.1f} ms a step"] if run.step_ms() else []
        speed += [f"{last.tokens_per_s:,.0f} tokens/s"] if last.tokens_per_s else []
        speed += [f"MFU {last.mfu:.1%}" if last.mfu <= 1 else f"MFU {last.mfu:.1f} %"] if last.mfu else []
        speed += [f"lr {last.lr:.2e}"] if last.lr is not None else []
        found += ["  ".join(speed)] if speed else []
        found.append("loss " + spark([point.loss for point in run.train], max(10, min(80, width - 8))))
    return found


def _log_of(job: str) -> Path | None:
    for line in slurm.ask(["scontrol", "show", "job", "-o", job]).out.splitlines():
        path = slurm.fields(line).get("StdOut", "")
        if path.startswith("/"):
            return Path(path)
    return None


def _names_job(path: Path, base: str) -> bool:
    """Whether a run's environment.json names this SLURM job."""
    todo: list[object] = [read_run(path).environment]
    while todo:
        value = todo.pop()
        if isinstance(value, list):
            todo += value
        elif isinstance(value, dict):
            if any("job" in str(key).lower() and str(inner) == base for key, inner in value.items()):
                return True
            todo += value.values()
    return False


def _screen(view: View) -> int:
    from rich.console import Console, Group
    from rich.live import Live
    from rich.text import Text

    readers = [Reader(FILES_EVERY_S, lambda: read_files(view)), Reader(GPUS_EVERY_S, lambda: read_gpus(view))]
    if slurm.available():
        readers.append(Reader(SQUEUE_EVERY_S, lambda: read_queue(view), first=SQUEUE_EVERY_S))
    console = Console()

    def page() -> Group:
        return Group(
            *(Text(text, style=style) for style, text in lines_of(view, console.width, console.height))
        )

    with _keys() as quit_asked, Live(page(), console=console, screen=True, auto_refresh=False) as live:
        for reader in readers:
            reader.start()
        while not quit_asked(0.5):
            live.update(page(), refresh=True)
    for reader in readers:
        reader.stopped.set()
    return 0


@contextlib.contextmanager
def _keys():
    """Yields a function (seconds) -> whether q was pressed; the terminal is as before afterwards."""
    if not sys.stdin.isatty():
        yield lambda seconds: bool(time.sleep(seconds))
        return
    import termios
    import tty

    before = termios.tcgetattr(sys.stdin)

    def pressed(seconds: float) -> bool:
        ready, _, _ = select.select([sys.stdin], [], [], seconds)
        return bool(ready) and sys.stdin.read(1).lower() == "q"

    try:
        tty.setcbreak(sys.stdin)
        yield pressed
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)
