"""From a fresh clone to a trained model, a sample of its text and its loss curve: what `make quickstart` runs.

    python -m tools.quickstart
    python -m tools.quickstart --dataset=python_source --max_iters=500     # further flags go to the trainer

Stop it at any moment with Ctrl-C and type the same again: it goes on where it was, as long as the code and the flags
are the same. A run that is complete is moved aside and trained anew.
"""

import contextlib
import os
import shlex
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from nanogpt.common import lease, rundir, source
from nanogpt.common.errors import EXIT_INTERRUPTED, UserError, run_command
from nanogpt.common.machine import has_nvidia_driver, usable_cores
from nanogpt.common.storage import storage_errors
from tools.args import Parser
from tools.children import Children, Interrupted
from tools.place import print_fetch_line
from tools.plot import PNG_NAME, curves, draw, write
from tools.runs import Run, read_run

ROOT = Path(__file__).resolve().parents[1]
PRESET, TRAINED_FOLDERS = "quickstart", ("nanogpt",)
ENOUGH_CORES, LOOK_SECONDS = 1.5, 0.3
NETWORK_SECONDS = 60.0  # so long the text's 1.1 MB may take before the quickstart goes on without them
NO_NETWORK_STATUS = 69  # of prepare.py: the server could not be reached (nanogpt/common/download.py)
SAMPLE_TOKENS = 300


@dataclass(frozen=True)
class Expected:
    """The validation loss of the unchanged preset, in nats a character, and how far from it is still usual."""

    loss: float
    within: float
    text: str


# The one place of these figures; the guide points here.
EXPECTED = {
    "shakespeare_char": Expected(1.83, 0.04, "Shakespeare's plays"),
    "python_source": Expected(
        1.81, 0.15, "the source of Python's own standard library"
    ),  # varies with Python
}
WITH_NETWORK, WITHOUT_NETWORK = "shakespeare_char", "python_source"


def say(line: str = "") -> None:
    """A line for the person who waits."""
    print(line, flush=True)


def prepare(dataset: str, data_root: str, children: Children) -> str:
    """Make the data set, or see that it is there; its name. `auto` is Shakespeare, or what needs no network."""
    say(f"[1/4] data: {EXPECTED[WITH_NETWORK if dataset == 'auto' else dataset].text}, one token a character")
    if dataset != "auto":
        _prepare(dataset, data_root, children)
        return dataset
    status, error = _try_prepare(WITH_NETWORK, data_root, children)
    if status == 0:
        return WITH_NETWORK
    if status != NO_NETWORK_STATUS:
        say_error(error)
        raise SystemExit(status)
    say(f"  no network: {error.removeprefix('error: ').split(';')[0]}")
    say(f"  so the text is {EXPECTED[WITHOUT_NETWORK].text}, which this machine has")
    _prepare(WITHOUT_NETWORK, data_root, children)
    return WITHOUT_NETWORK


def _prepare(dataset: str, data_root: str, children: Children) -> None:
    status, error = _try_prepare(dataset, data_root, children)
    if status:
        say_error(error)
        raise SystemExit(status)


def _try_prepare(dataset: str, data_root: str, children: Children) -> tuple[int, str]:
    command = [sys.executable, str(ROOT / "nanogpt" / "data" / dataset / "prepare.py")]
    command += [f"--data_root={data_root}"] if data_root else []
    status, error = children.run_quietly(command, NETWORK_SECONDS)
    if status is None:
        return NO_NETWORK_STATUS, f"no answer within {NETWORK_SECONDS:.0f} s"
    return status, error


def say_error(text: str) -> None:
    """What a child wrote to stderr."""
    print(text.rstrip("\n"), file=sys.stderr, flush=True)


def train(folder: Path, argv: list[str], data_root: str, children: Children) -> None:
    """Train, resume, or leave a complete run as it is."""
    extra = []
    if rundir.holds_run(folder):
        lease.refuse_live(folder)  # whose `stop` file, if there is one, is not ours to delete
        reason = why_anew(folder, argv, data_root)
        if not reason and is_finished(folder):
            say("  trained already, by this code and with these flags; its report is what is missing")
            return
        if reason:
            say(f"  {shown(folder)} holds {reason}; it is moved aside")
            extra = ["--overwrite=true"]
        else:
            say("  going on with the interrupted run")
            forget_stop_request(folder)
            extra = ["--auto_resume=true"]
    status = children.run([sys.executable, "-m", "nanogpt.train", *argv, *extra], cwd=ROOT)
    if status == EXIT_INTERRUPTED:
        raise Interrupted("the stop file")
    if status:
        raise SystemExit(status)


def fast_arithmetic(passed_on: list[str], cpuinfo: Path = Path("/proc/cpuinfo")) -> list[str]:
    """`--dtype=bfloat16` where no GPU is and the CPU multiplies it in hardware, faster than float32."""
    chosen = any(word.startswith(("--dtype", "--device")) for word in passed_on)
    if chosen or has_nvidia_driver():
        return []
    try:
        flags = set(cpuinfo.read_text().split())
    except OSError:  # not Linux
        return []
    if not flags & {"avx512_bf16", "amx_bf16"}:
        return []
    say("  this CPU multiplies bfloat16, so that is used (--dtype=float32 would not)")
    return ["--dtype=bfloat16"]


def threads(folder: Path, passed_on: list[str], idle: Callable[[], float]) -> list[str]:
    """`--num_threads` for a CPU: two where two cores have nothing to do, else one; an unfinished run keeps its own.

    Two threads wait for each other after each of a small model's operations: where others compute on the same cores a
    step of theirs takes twice as long as one thread's, or a hundred times. More than two gain nothing.
    """
    chosen = any(word.startswith(("--num_threads", "--device")) for word in passed_on)
    if chosen or has_nvidia_driver():
        return []
    if rundir.holds_run(folder) and not is_complete(folder):
        with contextlib.suppress(UserError, KeyError, IndexError, TypeError):
            words = first_attempt(folder)["argv"]
            return [word for word in words if word.startswith("--num_threads=")]
    free = min(usable_cores(), idle())
    if free >= ENOUGH_CORES:
        return ["--num_threads=2"]
    say(
        f"  {max(0.0, free):.1f} cores have nothing else to do, so one thread computes (--num_threads=2 would not)"
    )
    return ["--num_threads=1"]


def idle_cores(stat: Path = Path("/proc/stat")) -> float:
    """How many cores of this machine were idle in the last moment; infinity where nobody says (not Linux)."""
    try:
        before, began = stat.read_text(), time.monotonic()
        time.sleep(LOOK_SECONDS)
        after, seconds = stat.read_text(), time.monotonic() - began
        idle = [
            sum(map(int, text.split("\n", 1)[0].split()[4:6])) for text in (before, after)
        ]  # idle, iowait
        return (idle[1] - idle[0]) / os.sysconf("SC_CLK_TCK") / seconds
    except (OSError, ValueError):
        return float("inf")


def why_anew(folder: Path, argv: list[str], data_root: str) -> str:
    """What makes the run in `folder` useless for `argv`, in a few words; "" when it can be continued."""
    try:
        stored = rundir.read_json(folder / "config.json")
        first = first_attempt(folder)
        if stored.get("source_sha256") != source.digest(source.collect(ROOT, TRAINED_FOLDERS)):
            return "a run of other code"
        if [word for word in first["argv"] if not word.startswith("--overwrite=")] != argv:
            return "a run with other flags"
        if first["packages"].get("torch") != metadata.version("torch"):
            return "a run of another version of torch"
    except (UserError, KeyError, IndexError, TypeError):
        return "a run that cannot be read"
    if stored.get("data") != _fingerprint(str(stored["config"]["dataset"]), data_root):
        return "a run on other data"
    return "a complete run" if is_complete(folder) else ""


def first_attempt(folder: Path) -> dict:
    """What a run's first attempt has recorded of itself. UserError, KeyError, IndexError, TypeError for no run."""
    return rundir.read_json(folder / "environment.json")["attempts"][0]


def _fingerprint(dataset: str, root: str) -> str:
    from nanogpt.common.shards import data_root, open_token_set

    try:
        return open_token_set(dataset, data_root(root)).fingerprint()
    except UserError:
        return ""


def is_finished(folder: Path) -> bool:
    """Whether the run came to its end."""
    return read_run(folder).status == "finished"


def is_complete(folder: Path) -> bool:
    """Whether it did, and has its report."""
    return is_finished(folder) and (folder / PNG_NAME).exists()


def forget_stop_request(folder: Path) -> None:
    """Delete `stop`: whoever starts the quickstart again means to go on."""
    with storage_errors(folder):
        (folder / "stop").unlink(missing_ok=True)


def sample(folder: Path, children: Children) -> None:
    """Let the model write, straight to the terminal."""
    say(f"[3/4] a sample: {SAMPLE_TOKENS} characters that the model writes")
    command = [sys.executable, "-m", "nanogpt.sample", f"--out_dir={folder}", "--num_samples=1"]
    status = children.run([*command, f"--max_new_tokens={SAMPLE_TOKENS}"], cwd=ROOT)
    if status:
        say(f"  no sample (status {status}); the trained model is saved: {shown(folder / 'checkpoints')}")
        raise SystemExit(status)


def report(folder: Path, dataset: str, settings: list[str], changed: list[str]) -> None:
    """The curve, the loss beside what to expect, and where to go from here."""
    say("[4/4] the loss curve")
    run = read_run(folder)
    found = [curves(run, folder.name)]
    say("\n".join(draw(found)))
    write(found, folder / PNG_NAME)  # a run that has its picture has had its report
    say()
    say(f"run directory     {shown(folder)}")
    say(f"validation loss   {verdict(run, dataset, changed)}")
    say(f"loss curve        {shown(folder / PNG_NAME)}")
    print_fetch_line(folder / PNG_NAME)
    for number, command in enumerate(next_commands(folder, dataset, settings)):
        say(f"{'' if number else 'next':17} {command}")
    if not active():
        say(
            f"                  (first, in a new shell: source {shlex.quote(shown(ROOT / 'activate_env.sh'))})"
        )


def verdict(run: Run, dataset: str, changed: list[str]) -> str:
    """The last validation loss, beside the one to expect."""
    expected = EXPECTED[dataset]
    if run.val_loss is None:
        return "not known: the run validated nothing"
    text = f"{run.val_loss:.4f} nats a character; expected: {expected.loss:.2f}, give or take {expected.within:.2f}"
    if changed:
        return f"{text}, with unchanged settings (yours: {' '.join(changed)})"
    if run.val_loss > expected.loss + expected.within:
        return f"{text}. HIGHER THAN USUAL: was the code changed? `git status` and `make test` tell"
    return text


def next_commands(folder: Path, dataset: str, settings: list[str]) -> list[str]:
    """Three commands that go on from here, to be typed in the clone; the second run has the first one's `settings`."""
    here, there = shlex.quote(shown(folder)), shlex.quote(shown(folder.with_name("wider")))
    wider = shlex.join([f"--dataset={dataset}", *settings, "--n_embd=192"])
    start = "def " if dataset == "python_source" else "ROMEO:"
    return [
        f"python -m nanogpt.sample --out_dir={here} --start={shlex.quote(start)}",
        f"python -m nanogpt.train {PRESET} {wider} --out_dir={there}",
        f"engaging plot {here} {there} --out=compare.png",
    ]


def active() -> bool:
    """Whether `python` in the user's shell is the Python of this environment."""
    python = shutil.which("python")
    return python is not None and Path(python).parent == Path(sys.executable).parent


def shown(path: Path) -> str:
    """`path` as the user would type it: relative when it is below the current folder."""
    here = Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)


def main(argv: list[str]) -> int:
    """The command."""
    parser = Parser("quickstart", __doc__ or "")
    parser.prog = "python -m tools.quickstart"
    parser.add_argument("--out_dir", type=Path, default=ROOT / "out" / "quickstart", help="the run directory")
    parser.add_argument(
        "--data_root", default="", help="folder of the data sets (default: $DATA_ROOT, else data/)"
    )
    parser.add_argument("--dataset", choices=("auto", *EXPECTED), default="auto",
                        help="auto: Shakespeare, or without a network what needs none")  # fmt: skip
    args, passed_on = parser.parse_known_args(argv)
    folder = args.out_dir.expanduser().absolute()
    data_root = str(Path(args.data_root).expanduser().absolute()) if args.data_root else ""
    children = Children()
    try:
        dataset = prepare(args.dataset, data_root, children)
        say(f"[2/4] training: preset {PRESET}, in {shown(folder)} (on the GPU where there is one)")
        settings = [f"--data_root={data_root}"] if data_root else []
        settings += [*fast_arithmetic(passed_on), *threads(folder, passed_on, idle_cores), *passed_on]
        train(folder, [PRESET, f"--dataset={dataset}", f"--out_dir={folder}", *settings], data_root, children)
        sample(folder, children)
        report(folder, dataset, settings, passed_on)
    except Interrupted as stopped:
        again = "make quickstart" if not argv else shlex.join(["python", "-m", "tools.quickstart", *argv])
        kept = "nothing is lost" if stopped.saved else "not saved since its last checkpoint"
        say(f"\nstopped by {stopped}; {kept}: `{again}` goes on")
        return EXIT_INTERRUPTED
    return 0


if __name__ == "__main__":
    os.environ.setdefault("PYTHONUNBUFFERED", "1")
    run_command(main)
