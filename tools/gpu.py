"""The GPUs of this machine: what they do and for whom, keeping them busy, ending one's own processes.

    python -m tools.gpu status               # a table of the GPUs, and of the processes on them with users
    python -m tools.gpu hot 0,1,2            # matrix products on GPUs 0, 1 and 2 until Ctrl-C (default: all)
    python -m tools.gpu kill [0,1]           # lists your own GPU processes, asks, and ends them

`make gpu-status`, `make gpu-hot GPUS=0,1,2` and `make kill-gpu` are the same.
"""

import argparse
import os
import pwd
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from nanogpt.common.errors import UserError, run_command

GPU_FIELDS = "index,uuid,memory.used,memory.total,utilization.gpu,temperature.gpu,name"
PROCESS_FIELDS = "gpu_uuid,pid,used_memory,process_name"
MATRIX = 8192  # edge of the square matrices of `hot`: three of them take 0.4 GB in 16 bits
BURST = 20  # products queued on each GPU before its clock is read


@dataclass(frozen=True)
class Gpu:
    """One GPU as nvidia-smi sees it; a number it does not report is None."""

    index: int
    uuid: str
    used_mib: int | None
    total_mib: int | None
    busy_percent: int | None
    celsius: int | None
    name: str


@dataclass(frozen=True)
class Process:
    """A process on a GPU. `uid` is its real user id, None when the process is not visible from here."""

    gpu: int
    pid: int
    used_mib: int | None
    name: str
    uid: int | None
    started: str  # clock ticks since boot: with the pid it names one process for ever

    @property
    def user(self) -> str:
        """The user's name, the number where there is no name, `?` where the process is not visible."""
        if self.uid is None:
            return "?"
        try:
            return pwd.getpwuid(self.uid).pw_name
        except KeyError:
            return str(self.uid)


def read_gpus() -> list[Gpu]:
    """Every GPU that nvidia-smi shows. Raises UserError where there is no driver or no GPU."""
    rows = _query("gpu", GPU_FIELDS)
    if not rows:
        raise UserError("GPU: none on this machine (nvidia-smi lists none)")
    try:
        return [Gpu(int(row[0]), row[1], *map(_number, row[2:6]), row[6]) for row in rows]
    except (ValueError, IndexError):
        raise UserError(f"nvidia-smi: its answer cannot be read: {','.join(rows[0])[:80]!r}") from None


def read_processes(gpus: list[Gpu]) -> list[Process]:
    """Every process that computes on `gpus`."""
    index = {gpu.uuid: gpu.index for gpu in gpus}
    processes = []
    for row in _query("compute-apps", PROCESS_FIELDS):
        if len(row) == 4 and row[0] in index and row[1].isdigit():
            pid = int(row[1])
            processes.append(Process(index[row[0]], pid, _number(row[2]), row[3], *identity(pid)))
    return processes


def identity(pid: int) -> tuple[int | None, str]:
    """(real user id, start time) of a process, or (None, "") when it is not there or not visible."""
    folder = Path("/proc", str(pid))
    try:
        # The folder's owner is root for a process that may not be dumped, so ask for the user by name.
        lines = (folder / "status").read_text(encoding="utf-8", errors="replace").splitlines()
        uid = int(next(line for line in lines if line.startswith("Uid:")).split()[1])
        # The command's name, in parentheses, may hold spaces and parentheses itself.
        after_name = (folder / "stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2]
        return uid, after_name.split()[19]
    except (OSError, StopIteration, ValueError, IndexError):
        return None, ""


def _query(what: str, fields: str) -> list[list[str]]:
    """The rows of one nvidia-smi query; the last field, a name, may hold commas."""
    if shutil.which("nvidia-smi") is None:
        raise UserError("GPU: no NVIDIA driver on this machine (nvidia-smi is not on PATH)")
    command = ["nvidia-smi", f"--query-{what}={fields}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UserError(f"nvidia-smi: does not answer: {error}; the driver may hang: ask the staff") from None
    if done.returncode != 0:
        raise UserError(f"nvidia-smi: fails: {(done.stdout + done.stderr).strip()[:200]}")
    last = fields.count(",")
    return [
        [part.strip() for part in line.split(",", last)] for line in done.stdout.splitlines() if line.strip()
    ]


def _number(text: str) -> int | None:
    """A number of nvidia-smi; None for [N/A], [Not Supported] and the like."""
    try:
        return int(float(text))
    except ValueError:
        return None


def select(gpus: list[Gpu], wanted: str) -> list[Gpu]:
    """The GPUs named by `0,1,2`; when empty, all that this job may use. Else UserError."""
    allowed = _visible(gpus)
    if not wanted:
        if not allowed:
            raise UserError("CUDA_VISIBLE_DEVICES: it allows no GPU of this machine")
        return allowed
    chosen: list[Gpu] = []
    by_index = {str(gpu.index): gpu for gpu in gpus}
    for word in wanted.split(","):
        gpu = by_index.get(word.strip())
        if gpu is None:
            raise UserError(
                f"GPUS={wanted}: {word.strip()!r} is no GPU here; there are: {','.join(by_index)}"
            )
        if gpu in chosen:
            raise UserError(f"GPUS={wanted}: {word.strip()} is named twice")
        if gpu not in allowed:
            raise UserError(f"GPUS={wanted}: CUDA_VISIBLE_DEVICES keeps GPU {gpu.index} from this job")
        chosen.append(gpu)
    return chosen


def _visible(gpus: list[Gpu]) -> list[Gpu]:
    """What CUDA_VISIBLE_DEVICES leaves: on a shared node the other GPUs are other people's."""
    setting = os.environ.get("CUDA_VISIBLE_DEVICES")
    if setting is None:
        return gpus
    words = [word.strip() for word in setting.split(",") if word.strip()]
    return [
        gpu
        for gpu in gpus
        if any(word == str(gpu.index) or (len(word) > 4 and gpu.uuid.startswith(word)) for word in words)
    ]


def status() -> None:
    """Print the table of GPUs, and below it the processes on them."""
    gpus = read_gpus()
    rows = [("GPU", "name", "memory MiB", "busy %", "deg C")]
    for gpu in gpus:
        memory = f"{_shown(gpu.used_mib)} / {_shown(gpu.total_mib)}"
        rows.append((str(gpu.index), gpu.name, memory, _shown(gpu.busy_percent), _shown(gpu.celsius)))
    _print_table(rows)
    print()
    processes = read_processes(gpus)
    if processes:
        _print_processes(processes)
    else:
        print("no processes on them")


def _print_processes(processes: list[Process]) -> None:
    rows = [("GPU", "pid", "user", "MiB", "command")]
    rows += [(str(p.gpu), str(p.pid), p.user, _shown(p.used_mib), p.name[:60]) for p in processes]
    _print_table(rows)


def _shown(number: int | None) -> str:
    return "-" if number is None else str(number)


def _print_table(rows: list[tuple[str, ...]]) -> None:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def hot(wanted: str, seconds: float) -> None:
    """Multiply matrices on the GPUs until Ctrl-C, SIGTERM or `seconds` have passed; a line each every 5 s."""
    gpus = select(read_gpus(), wanted)
    # By UUID, before torch is imported: torch then sees exactly these, in this order.
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(gpu.uuid for gpu in gpus)
    import torch

    if not torch.cuda.is_available() or torch.cuda.device_count() != len(gpus):
        raise UserError(f"GPU: torch {torch.__version__} cannot use them; run: bash setup_env.sh")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    print(f"keeping GPU {', '.join(str(gpu.index) for gpu in gpus)} busy; Ctrl-C ends it", flush=True)
    operands = []
    for device in range(len(gpus)):
        kind = torch.bfloat16 if torch.cuda.get_device_capability(device)[0] >= 8 else torch.float16
        left = torch.randn(MATRIX, MATRIX, device=f"cuda:{device}", dtype=kind)
        operands.append((left, torch.randn_like(left), torch.empty_like(left)))
    started = time.monotonic()
    try:
        while not seconds or time.monotonic() - started < seconds:
            span = min(5.0, seconds or 5.0)
            done, elapsed = _burn(operands, span)
            _print_heat(gpus, done, elapsed)
    except KeyboardInterrupt:
        print("stopped")


def _burn(operands: list, span: float) -> tuple[list[int], float]:
    """Keep every GPU's queue filled for `span` seconds: (products done on each GPU, seconds it took)."""
    import torch

    begin, done = time.monotonic(), [0] * len(operands)
    pending: list[list] = [[] for _ in operands]
    while time.monotonic() - begin < span:
        for device, (left, right, product) in enumerate(operands):
            with torch.cuda.device(device):
                for _ in range(BURST):
                    torch.mm(left, right, out=product)
                event = torch.cuda.Event()
                event.record()
            pending[device].append(event)
            done[device] += BURST
        for events in pending:  # two bursts stay queued, so that no GPU waits for Python
            if len(events) > 2:
                events.pop(0).synchronize()
    for device in range(len(operands)):
        torch.cuda.synchronize(device)
    return done, time.monotonic() - begin


def _print_heat(gpus: list[Gpu], done: list[int], elapsed: float) -> None:
    now = {gpu.uuid: gpu for gpu in read_gpus()}
    for gpu, products in zip(gpus, done, strict=True):
        rate = 2 * MATRIX**3 * products / elapsed / 1e12
        seen = now.get(gpu.uuid, gpu)
        print(f"GPU {gpu.index}  {rate:6.1f} TFLOP/s  {_shown(seen.celsius)} C  {gpu.name}", flush=True)


def kill(wanted: str, yes: bool, grace: float) -> int:
    """End the caller's own processes on the named GPUs (empty: all), after asking; 1: some did not end."""
    gpus = read_gpus()
    chosen = {gpu.index for gpu in (select(gpus, wanted) if wanted else gpus)}
    mine = [
        p for p in read_processes(gpus) if p.gpu in chosen and p.uid == os.getuid() and p.pid != os.getpid()
    ]
    if not mine:
        print("no GPU process of yours here")
        return 0
    _print_processes(mine)
    if not yes:
        if not sys.stdin.isatty():
            raise UserError("kill: there is no terminal to ask at; --yes ends these processes without asking")
        try:
            answer = input(f"end {len({p.pid for p in mine})} of your processes? [y/N] ")
        except EOFError:
            answer = ""
        if answer.strip().lower() not in ("y", "yes"):
            print("nothing was ended")
            return 0
    left = _signal_all(list({p.pid: p for p in mine}.values()), signal.SIGTERM, grace)
    if left:
        print(f"still there after {grace:g} s, so SIGKILL: {', '.join(str(p.pid) for p in left)}")
        left = _signal_all(left, signal.SIGKILL, grace)
    if left:
        print(f"did not end: {', '.join(str(p.pid) for p in left)}; they hang in the driver: ask the staff")
        return 1
    print("ended")
    return 0


def _signal_all(processes: list[Process], number: signal.Signals, grace: float) -> list[Process]:
    """Send a signal to each, wait up to `grace` seconds, and return those that are still there."""
    for process in processes:
        if _alive(process):
            try:
                os.kill(process.pid, number)
            except ProcessLookupError:
                continue
            except PermissionError:
                print(f"{process.pid}: may not be signalled from here", file=sys.stderr)
    deadline = time.monotonic() + grace
    while (left := [p for p in processes if _alive(p)]) and time.monotonic() < deadline:
        time.sleep(min(0.1, grace))
    return left


def _alive(process: Process) -> bool:
    """Whether it is still the same process, and no zombie: its pid may have gone to another one."""
    if identity(process.pid) != (process.uid, process.started):
        return False
    try:
        text = Path("/proc", str(process.pid), "stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    return text.rpartition(")")[2].split()[0] != "Z"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        raise UserError(f"{message.removeprefix('argument ')} (all: python -m tools.gpu --help)")


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1e9:
        raise UserError(f"{text!r}: expected a number of seconds, such as 30")
    return value


def main(argv: list[str]) -> int:
    """The command line of this module; see its docstring."""
    parser = _Parser(
        prog="python -m tools.gpu",
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("action", choices=("status", "hot", "kill"))
    parser.add_argument(
        "gpus", nargs="?", default="", help="indices as in `status`, with commas (default: all)"
    )
    parser.add_argument("--seconds", type=_seconds, default=0.0, help="hot: how long (default: until Ctrl-C)")
    parser.add_argument("--yes", action="store_true", help="kill: without asking")
    parser.add_argument(
        "--grace", type=_seconds, default=10.0, help="kill: seconds from SIGTERM to SIGKILL (default 10)"
    )
    args = parser.parse_args(argv)
    if args.action == "status":
        status()
    elif args.action == "hot":
        hot(args.gpus, args.seconds)
    else:
        return kill(args.gpus, args.yes, args.grace)
    return 0


if __name__ == "__main__":
    run_command(main)
