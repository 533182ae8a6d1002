"""`engaging repro LOG`: rebuild the source of a run from its log, run it again, and compare every loss.

    engaging repro out/quickstart/log.txt
    engaging repro log.txt --extract-only ../their-code       # look at the source first, run nothing
    engaging repro log.txt --yes --device=cuda --out_dir=out/theirs-again

The log alone is enough; where the run's metrics.jsonl lies beside it, its exact losses are compared. Exit status 0: all
losses are equal; 1: they are not, and the first that differs is named; 2: the log is damaged or cannot be run here.
"""

import difflib
import itertools
import json
import math
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from nanogpt.common import rundir, source
from nanogpt.common.errors import EXIT_INTERRUPTED, UserError
from tools.args import Parser, whole
from tools.children import Children, Interrupted
from tools.place import checkout
from tools.runs import printable, read_run

OURS = (
    "auto_resume",
    "overwrite",
    "accept_changed",
    "new_source",
    "check",
    "wandb_log",
    "out_dir",
    "data_root",
)  # not theirs to set
DECIMALS = 4  # of a loss in log.txt
MOST_SHOWN = 12  # changed files that are named
_STEP = re.compile(r"step (\d+)/\d+: loss (\d+\.\d{4}),")
_VAL = re.compile(r"step (\d+): val loss (\d+\.\d{4})(?!\d)")
_ENTRY = re.compile(r"(nanogpt|modded_nanogpt)/train[a-z_]*\.py")
_THREADS = re.compile(r"parameters, .*\bCPU \(.*\), (\d{1,4}) threads a rank;")
_KNOB = re.compile(r"[a-z][a-z0-9_]{0,63}")


@dataclass(frozen=True)
class Recorded:
    """What a log says: the source, how it was started, and the losses it printed."""

    path: Path
    files: dict[str, bytes]
    digest: str
    config: dict[str, object]  # every knob of the trainer
    entry: str
    world_size: int
    data: str  # fingerprint of the data set; "" when the log has none
    environment: dict
    threads: int  # CPU threads of a rank; 0: it ran on a GPU
    losses: dict[tuple[str, int], float]  # ("train" | "val", step) -> loss as printed, four decimals


def read_log(path: Path) -> Recorded:
    """Read and verify a log. UserError when it is not whole, or when its parts do not belong together."""
    if path.is_dir():
        path = path / "log.txt"
    files, rest = source.from_log(path)
    lines = rest.splitlines()
    digest = source.digest(files)
    _refuse_clashes(path, files)
    record = _json_line(path, lines, 0, "config")
    if record.get("source_sha256") != digest:
        raise UserError(f"{path}: its configuration belongs to other source; the log was changed")
    config = record.get("config")
    if not isinstance(config, dict) or not all(map(_is_knob, config.items())):
        raise UserError(f"{path}: its configuration holds something that is no knob; the log was changed")
    plan = record.get("plan")
    world_size = plan.get("world_size") if isinstance(plan, dict) else None
    if isinstance(world_size, bool) or not isinstance(world_size, int) or not 1 <= world_size <= 4096:
        raise UserError(f"{path}: its plan names no number of ranks; the log was changed")
    data = record.get("data")
    threads = next((int(found[1]) for found in map(_THREADS.search, lines) if found), 0)
    return Recorded(
        path, files, digest, config, _entry(path, files, record), world_size,
        data if isinstance(data, str) else "", _json_line(path, lines, 1, "environment"), threads,
        dict(_losses(lines)),
    )  # fmt: skip


def _refuse_clashes(path: Path, files: dict[str, bytes]) -> None:
    """A path cannot be a file and a folder, nor two files on a disk that does not tell a from A."""
    folders = {"/".join(name.split("/")[:depth]) for name in files for depth in range(1, name.count("/") + 1)}
    lower = {name.lower() for name in files}
    if folders & set(files) or len(lower) != len(files):
        raise UserError(f"{path}: two paths of its source clash; the log was changed")


def _json_line(path: Path, lines: list[str], number: int, word: str) -> dict:
    text = lines[number] if number < len(lines) else ""
    try:
        value = json.loads(text.removeprefix(f"{word} ")) if text.startswith(f"{word} ") else None
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise UserError(
            f"{path}: after its source a line '{word} {{...}}' is missing or damaged; the log was cut"
        )
    return value


def _is_knob(item: tuple[object, object]) -> bool:
    name, value = item
    return bool(_KNOB.fullmatch(str(name))) and (value is None or isinstance(value, str | int | float | bool))


def _entry(path: Path, files: dict[str, bytes], record: dict) -> str:
    """The script that was started, one of the log's own."""
    entry = record.get("entry")
    if not isinstance(entry, str) or not _ENTRY.fullmatch(entry) or entry not in files:
        raise UserError(f"{path}: its source does not hold the trainer that its configuration names")
    return entry


def _losses(lines: list[str]) -> Iterator[tuple[tuple[str, int], float]]:
    """The losses that the log prints, as it prints them. A resumed run repeats steps: the last one counts.

    Those after --new_source come from other source than the log opens with: they are left out.
    """
    for line in itertools.takewhile(lambda line: not line.startswith(source.NEW_SOURCE), lines):
        for kind, pattern in (("train", _STEP), ("val", _VAL)):
            if found := pattern.match(line):
                yield (kind, int(found[1])), float(found[2])


def exact_losses(folder: Path) -> dict[tuple[str, int], float]:
    """Every loss in a run directory's metrics.jsonl."""
    run = read_run(folder)
    train = {("train", point.step): point.loss for point in run.train}
    return train | {("val", point.step): point.val_loss for point in run.val}


def differences(files: dict[str, bytes], root: Path) -> list[str]:
    """Where `files` differ from the repository at `root`, a line a file; [] when they are the same, byte for byte."""
    folders = tuple(sorted({name.split("/")[0] for name in files if "/" in name}))
    own = source.collect(root, folders)
    lines = []
    for name in sorted(files.keys() | own.keys()):
        theirs, ours = files.get(name), own.get(name)
        if theirs == ours:
            continue
        if theirs is None or ours is None:
            lines.append(f"{name}: {'only in the log' if ours is None else 'only in this repository'}")
            continue
        old, new = (data.decode("utf-8", "replace").splitlines() for data in (ours, theirs))
        changes = [line[0] for line in difflib.unified_diff(old, new, n=0) if line[:3] not in ("---", "+++")]
        lines.append(f"{name}: {changes.count('+')} lines more, {changes.count('-')} lines less than here")
    return lines


def flags(recorded: Recorded, args, data_root: Path) -> list[str]:
    """The command line that trains the recorded configuration again, here."""
    config = {name: value for name, value in recorded.config.items() if name not in OURS}
    if args.device:
        config["device"] = args.device
    elif str(config.get("device", "")).startswith("cuda:"):
        config["device"] = "cuda"  # which of the GPUs it was means nothing here
    if args.max_iters is not None:
        config["max_iters"] = args.max_iters
    if recorded.threads and not config.get("num_threads") and "num_threads" in config:
        config["num_threads"] = recorded.threads  # sums on a CPU depend on how many threads share them
    words = [f"--{name}={value}" for name, value in config.items() if value is not None]
    return [*words, f"--out_dir={args.out_dir}", f"--data_root={data_root}"]


def check_data(recorded: Recorded, data_root: Path) -> None:
    """UserError unless the data set here is the one the run was trained on."""
    dataset = recorded.config.get("dataset")
    if not recorded.data or not isinstance(dataset, str):
        return
    from nanogpt.common.shards import open_token_set

    found = open_token_set(dataset, data_root)
    if found.fingerprint() != recorded.data:
        raise UserError(
            f"{found.folder}: not the data that the log was trained on (its digests differ); prepare it again, or "
            "name the right folder with --data_root"
        )


def confirm(recorded: Recorded, changed: list[str], yes: bool) -> None:
    """Ask before code that is not this repository's is executed. UserError when the answer is no."""
    if not changed:
        print("source: the same as this repository's, byte for byte")
        return
    print(f"source: not this repository's; {len(changed)} files differ:")
    for line in changed[:MOST_SHOWN]:
        print(f"  {printable(line)}")
    if len(changed) > MOST_SHOWN:
        print(f"  and {len(changed) - MOST_SHOWN} more")
    print(f"To read it first: engaging repro {recorded.path} --extract-only FOLDER", flush=True)
    if yes:
        return
    if not sys.stdin.isatty():
        raise UserError(
            f"{recorded.path}: holds code of somebody else; read it first, then say --yes to run it"
        )
    try:
        answer = input("Run this code with your rights on this machine? [y/N] ")
    except EOFError:
        answer = ""
    if answer.strip().lower() not in ("y", "yes"):
        raise UserError(f"{recorded.path}: not run, as you wished")


def run_again(recorded: Recorded, words: list[str], ranks: int) -> int:
    """Train from a rebuilt copy of the source; the trainer's exit status."""
    with tempfile.TemporaryDirectory(prefix="engaging-repro-") as temporary:
        rebuilt = Path(temporary) / "source"
        source.write_folder(recorded.files, rebuilt)
        command = [sys.executable, str(rebuilt / recorded.entry), *words]
        if ranks > 1:
            launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
            command = [sys.executable, *launcher, *command[1:]]
        # Nothing but what the log holds may be imported in its place.
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        return Children().run(command, environment=environment)


def compare(
    then: dict[tuple[str, int], float],
    now: dict[tuple[str, int], float],
    digits: int | None,
    max_iters: float,
) -> tuple[bool, list[str]]:
    """(equal, what to say) of the losses of the first `max_iters` steps.

    `digits`: the log's losses are rounded to so many decimals; None: they are exact.
    """
    keys = sorted((key for key in then if key[1] < max_iters + (key[0] == "val")), key=lambda key: key[::-1])
    if not keys:
        return False, ["there is no loss in the log to compare with"]
    if missing := [key for key in keys if key not in now]:
        kind, step = missing[0]
        return False, [f"DIFFERENT: the new run has no {kind} loss at step {step}, which the log has"]
    limit = 0.0 if digits is None else 0.5000001 * 10.0**-digits  # half of the last printed decimal
    apart = {key: abs(now[key] - then[key]) for key in keys}
    off = [key for key in keys if not apart[key] <= limit]
    how = "exactly" if digits is None else f"to the {digits} decimals that the log prints"
    if not off:
        return True, [f"EQUAL: all {len(keys)} losses agree {how}"]
    (kind, step), worst = off[0], max(off, key=apart.__getitem__)
    return False, [
        f"DIFFERENT: {len(off)} of {len(keys)} losses; first the {kind} loss at step {step}: "
        f"{then[off[0]]:.{digits or 9}f} then, {now[off[0]]:.9f} now",
        f"largest difference: {apart[worst]:.2e} ({worst[0]} loss at step {worst[1]})",
    ]


def explain(recorded: Recorded, folder: Path) -> list[str]:
    """What is not as it was when the log was written, as reasons for losses that differ."""
    try:
        now = rundir.read_json(folder / "environment.json")["attempts"][-1]
    except (UserError, KeyError, IndexError, TypeError):
        return []
    then, reasons = recorded.environment, []
    old, new = then.get("packages"), now["packages"]
    for name in sorted(new) if isinstance(old, dict) else ():
        if old.get(name) != new[name]:
            reasons.append(f"{name} was {printable(str(old.get(name)))}, is {new[name]}")
    if then.get("host") != now["host"]:
        reasons.append(f"another machine: {printable(str(then.get('host')))}, now {now['host']}")
    if not recorded.threads and recorded.config.get("deterministic") is not True:
        reasons.append(
            "it ran on a GPU without --deterministic=true: sums there change their order from run to run"
        )
    return [f"not as it was: {reason}" for reason in reasons]


def extract(recorded: Recorded, folder: Path) -> None:
    """Write the source under `folder`, which must be new or empty."""
    folder = folder.expanduser().absolute()
    if folder.is_symlink() or (folder.exists() and not (folder.is_dir() and not any(folder.iterdir()))):
        raise UserError(f"--extract-only={folder}: exists already; name a folder that is new or empty")
    folder.parent.mkdir(parents=True, exist_ok=True)
    source.write_folder(recorded.files, folder)
    print(f"{len(recorded.files)} files written to {folder}; nothing of them was run")


def arguments(argv: list[str]):
    """The command line."""
    parser = Parser("repro", __doc__ or "")
    parser.add_argument("log", type=Path, help="a log.txt, or the run directory it is in")
    parser.add_argument(
        "--out_dir", type=Path, help="of the new run (default: out/repro-DIGEST, an old one moved aside)"
    )
    parser.add_argument("--extract-only", type=Path, metavar="DIR", help="write the source there and stop")
    parser.add_argument(
        "--yes", action="store_true", help="run the code although it is not this repository's"
    )
    parser.add_argument("--device", help="instead of the recorded one: auto, cpu, cuda or cuda:N")
    parser.add_argument("--data_root", help="folder of the data sets (default: $DATA_ROOT, else data/)")
    parser.add_argument(
        "--ranks", type=whole("--ranks", 1, 64), help="instead of the recorded number of ranks"
    )
    parser.add_argument(
        "--max_iters", type=whole("--max_iters", 1, 10**9 - 1), help="stop there, and compare what is before"
    )
    return parser.read(argv)


def main(argv: list[str]) -> int:
    """The command."""
    args = arguments(argv)
    recorded = read_log(args.log)
    print(f"{recorded.path}: whole; {len(recorded.files)} files with SHA-256 {recorded.digest}", flush=True)
    if args.extract_only:
        extract(recorded, args.extract_only)
        return 0
    root = checkout()
    chosen = args.data_root or os.environ.get("DATA_ROOT") or str(root / "data")
    data_root = Path(chosen).expanduser().absolute()
    check_data(recorded, data_root)
    confirm(recorded, differences(recorded.files, root), args.yes)
    default = args.out_dir is None
    args.out_dir = (args.out_dir or root / "out" / f"repro-{recorded.digest[:8]}").expanduser().absolute()
    if default and rundir.holds_run(args.out_dir):
        rundir.move_aside(args.out_dir)
    ranks = args.ranks or recorded.world_size
    try:
        status = run_again(recorded, flags(recorded, args, data_root), ranks)
    except Interrupted as stopped:
        print(f"stopped by {stopped}; nothing was compared")
        return EXIT_INTERRUPTED
    if status:
        return status
    return judge(recorded, args.out_dir, comparable_steps(recorded, args.max_iters))


def comparable_steps(recorded: Recorded, wanted: int | None) -> float:
    """How many steps the new run shares with the log: a run that was made longer afterwards has more of its own."""
    planned = recorded.config.get("max_iters")
    if wanted is not None or not isinstance(planned, int):
        return math.inf if wanted is None else wanted
    if any(step > planned for _, step in recorded.losses):
        print(f"the run was made longer after step {planned}; compared are the steps up to there")
    return planned


def judge(recorded: Recorded, folder: Path, max_iters: float) -> int:
    """Compare the new run in `folder` with the log, and with the metrics beside it; 0 when all is equal, else 1."""
    now, beside = exact_losses(folder), exact_losses(recorded.path.parent)
    equal, said = compare(recorded.losses, now, DECIMALS, max_iters)
    if equal and beside:
        equal, said = compare(beside, now, None, max_iters)
    print("\n".join(said if equal else [*said, *explain(recorded, folder)]))
    return 0 if equal else 1
