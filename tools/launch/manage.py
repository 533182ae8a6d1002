"""`engaging status|logs|cancel NAME`: a run found again by its name, from any shell, days later."""

import contextlib
import sys
import time
from pathlib import Path

from nanogpt.common.errors import UserError
from tools.args import Parser, words
from tools.launch import book
from tools.launch.book import Launch
from tools.place import checkout
from tools.runs import Run, printable, read_run
from tools.site import slurm
from tools.site.cluster import my_jobs
from tools.site.slurm import SlurmUnreachable

FOLLOW_S = 1.0  # inotify says nothing on a network file system, so following means looking again


def status(argv: list[str]) -> int:
    """`engaging status [NAME]`: one line a run, or everything about one."""
    parser = Parser("status", "The state of what was launched here: one line each, or all about one NAME.")
    parser.add_argument("name", nargs="?", metavar="NAME")
    parser.add_argument(
        "-n", type=int, default=20, help="without NAME: how many, the newest first (default 20)"
    )
    args = parser.read(argv)
    root = checkout()
    names = [args.name] if args.name else book.names(root)[: max(1, args.n)]
    found = [book.find(root, args.name)] if args.name else [book.latest(root, name) for name in names]
    launches = [launch for launch in found if launch is not None]
    if not launches:
        print("nothing was launched here yet; engaging launch nanogpt --name first")
        return 0
    states = _states(root, launches)
    if args.name:
        _show_one(root, launches[0], states[launches[0].name])
        return 0
    width = max(len(launch.name) for launch in launches)
    for launch in launches:
        run = read_run(root / launch.runs[0])
        counts = states[launch.name]
        where = launch.job_id or launch.state
        print(f"{launch.name:{width}}  {where:>10}  {_brief(counts):24}  {_progress(run, counts)}")
    return 0


def logs(argv: list[str]) -> int:
    """`engaging logs NAME [-f] [--task N]`: the log of all attempts."""
    parser = Parser(
        "logs", "A run's log, all attempts. -f follows it until the job is over (Ctrl-C stops looking)."
    )
    parser.add_argument("name", metavar="NAME")
    parser.add_argument("-f", "--follow", action="store_true")
    parser.add_argument("--task", type=int, help="of an array: the task's number, from 0")
    args = parser.read(argv)
    root = checkout()
    launch = book.find(root, args.name)
    path = _wait_for_log(root, launch, args)
    with path.open("rb") as file:
        while True:
            while chunk := file.read(1 << 16):
                sys.stdout.write(_safe(chunk.decode("utf-8", "replace")))
            sys.stdout.flush()
            if not args.follow or _over(root, launch):
                for line in file:  # what came between the last read and the end
                    sys.stdout.write(_safe(line.decode("utf-8", "replace")))
                return 0
            time.sleep(FOLLOW_S)


def cancel(argv: list[str]) -> int:
    """`engaging cancel NAME`: the job and all tasks of its array; the run saves first, as at a preemption."""
    parser = Parser("cancel", "Stop a run by its name. It saves first; launch the same NAME again to go on.")
    parser.add_argument("name", metavar="NAME")
    args = parser.read(argv)
    root = checkout()
    launch = book.find(root, args.name)
    if launch.state == "local":
        from tools.launch.local import stop

        print(f"{launch.name}: {'stopped' if stop(launch) else 'was not running'}")
        return 0
    slurm.need_slurm("engaging cancel")
    if not launch.job_id:
        _adopt(root, launch)
    if not launch.job_id:
        print(f"{launch.name}: no job of this name was submitted")
        return 0
    ended = ended_states([launch.job_id])
    if ended and not any(job.base == launch.job_id for job in my_jobs()):
        print(
            f"{launch.name}: job {launch.job_id} has ended already ({', '.join({state for _, state in ended})})"
        )
        return 0
    answer = slurm.ask(["scancel", launch.job_id])
    text = slurm.refusal(answer)
    if answer.rc != 0 and "invalid job id" not in text.lower() and "already completing" not in text.lower():
        raise SlurmUnreachable(f"scancel {launch.job_id}: {text}; try again in a minute")
    where = launch.runs[0] + (f" ... {launch.runs[-1]}" if len(launch.runs) > 1 else "")
    print(f"{launch.name}: job {launch.job_id} cancelled; what it had saved is in {where}")
    return 0


def _states(root: Path, launches: list[Launch]) -> dict[str, dict[str, int]]:
    """For each name, how many of its tasks are in which state: from squeue, then sacct for what has ended."""
    found: dict[str, dict[str, int]] = {launch.name: {} for launch in launches}
    remote = [launch for launch in launches if launch.state != "local"]
    for launch in launches:
        if launch.state == "local":
            from tools.launch.local import alive

            found[launch.name] = {"RUNNING" if alive(launch) else "ENDED": 1}
    if not remote or not slurm.available():
        return found
    for launch in remote:
        if not launch.job_id:
            _adopt(root, launch)
    ids = [launch.job_id for launch in remote if launch.job_id]
    from tools.site.cluster import my_jobs

    by_id = {launch.job_id: launch for launch in remote if launch.job_id}
    ended = ended_states(ids) if ids else []
    over = {key for key, _ in ended}  # squeue has some of them still, as COMPLETING
    with contextlib.suppress(SlurmUnreachable):
        for job in my_jobs():
            if job.base in by_id and not (job.state == "COMPLETING" and job.key in over):
                counts = found[by_id[job.base].name]
                key = job.state + (f" ({job.reason})" if job.state == "PENDING" else "")
                counts[key] = counts.get(key, 0) + job.tasks
    for key, state in ended:
        base = key.partition("_")[0]
        counts = found[by_id[base].name] if base in by_id else {}
        counts[state] = counts.get(state, 0) + slurm.count_tasks(key)
    return found


def ended_states(ids: list[str]) -> list[tuple[str, str]]:
    """(`12`, `12_3` or `12_[4-9]`, state) of what has ended: from sacct, else from scontrol."""
    answer = slurm.ask(["sacct", "-X", "--parsable2", "-j", ",".join(ids), "-o", "JobID,State"])
    rows = [(row.get("JobID", ""), slurm.state_of(row.get("State", ""))) for row in slurm.table(answer.out)]
    if not rows:
        for job in ids:
            for line in slurm.ask(["scontrol", "show", "job", "-o", job]).out.splitlines():
                row = slurm.fields(line)
                key, index = row.get("ArrayJobId", row.get("JobId", "")), row.get("ArrayTaskId", "")
                key += f"_{index}" if index.isdigit() else f"_[{index}]" if index else ""
                rows.append((key, slurm.state_of(row.get("JobState", ""))))
    return [(key, state) for key, state in rows if state in slurm.ENDED]


def _adopt(root: Path, launch: Launch) -> None:
    """A launch whose sbatch got no answer: find its job by the token."""
    from tools.launch.submit import find_by_token

    with contextlib.suppress(SlurmUnreachable):
        launch.job_id = find_by_token(launch.token)
        if launch.job_id:
            launch.state = "submitted"
            launch.save(root)


def _show_one(root: Path, launch: Launch, counts: dict[str, int]) -> None:
    made = time.strftime("%Y-%m-%d %H:%M", time.localtime(launch.made))
    print(f"{launch.name} ({launch.preset}), launched {made}, launch {launch.number}")
    where = f"job {launch.job_id}" if launch.job_id else f"process {launch.pid} on {launch.host}"
    print(f"  {where if launch.job_id or launch.pid else launch.state}: {_brief(counts)}")
    code = launch.code
    if code:
        commit = (code.get("commit") or "no commit")[:12] + (" + changes" if code.get("changed") else "")
        print(f"  code {commit}, {code.get('files')} files, digest {str(code.get('digest'))[:12]}")
    for path in launch.runs[:20]:
        run = read_run(root / path)
        print(f"  {path}: {_progress(run, counts)}")
        if saved := run.checkpoints():
            print(f"    last checkpoint: step {saved[-1].step}, {saved[-1].size / 1e6:.1f} MB")
    if len(launch.runs) > 20:
        print(f"  ... and {len(launch.runs) - 20} more")
    for path in launch.log_files(root)[:3]:
        print(f"  log {path.relative_to(root)}")
    if any(state.startswith("PENDING") for state in counts):
        print(f"  engaging why {launch.job_id} says what it waits for")


def _progress(run: Run, counts: dict[str, int]) -> str:
    if run.status == "empty":
        return "no step yet"
    active = not counts or any(state in slurm.ACTIVE or state.startswith("PENDING") for state in counts)
    status = run.status if active or run.status != "running" else "cut off"
    parts = [status, f"step {run.step}" + (f" of {run.max_steps}" if run.max_steps else "")]
    parts += [f"loss {run.loss:.4f}"] if run.loss is not None else []
    parts += [f"val {run.val_loss:.4f}"] if run.val_loss is not None else []
    eta = run.eta_s()
    parts += [f"{words(eta / 60)} to go"] if eta and run.status == "running" else []
    parts += [f"{run.attempts} attempts"] if run.attempts > 1 else []
    return ", ".join(parts)


def _brief(counts: dict[str, int]) -> str:
    if not counts:
        return "not in the queue: from run files"
    if sum(counts.values()) == 1:
        return next(iter(counts))
    return ", ".join(f"{count} {state}" for state, count in sorted(counts.items()))


def _wait_for_log(root: Path, launch: Launch, args) -> Path:
    while True:
        files = launch.log_files(root)
        if args.task is not None and "%a" in launch.log:
            files = [path for path in files if path.stem.endswith(f"_{args.task}")]
        if files:
            return files[0]
        if not args.follow or _over(root, launch):
            raise UserError(f"{launch.name}: no log yet ({launch.log}); engaging status {launch.name}")
        time.sleep(FOLLOW_S)


_asked: dict[str, float] = {}


def _over(root: Path, launch: Launch) -> bool:
    """Whether the job has left the queue. Asks SLURM at most every 10 s."""
    if launch.state == "local":
        from tools.launch.local import alive

        return not alive(launch)
    now = time.monotonic()
    if now - _asked.get(launch.name, -60.0) < 10:
        return False
    _asked[launch.name] = now
    from tools.site.cluster import my_jobs

    try:
        return not any(job.base == launch.job_id for job in my_jobs())
    except SlurmUnreachable:
        return False


def _safe(text: str) -> str:
    """Log text for a terminal: newlines stay, escape sequences do not act."""
    return text if not sys.stdout.isatty() else "\n".join(printable(line) for line in text.split("\n"))
