"""`engaging experiment ab A B`: two versions of the code in turn on this machine, A B B A, and the verdict.

    engaging experiment ab main my-branch --runs 8 -- --num_iterations=200
    engaging experiment ab . ../other-clone --runs 4 --script nanogpt/train.py -- quickstart --max_iters=500
    engaging experiment ab out/before out/after --runs 6 --gpus 1

A and B are git refs, folders with a checkout, or run directories (their own copy of the source). Each is copied first;
pair k has the same seed on both sides. No SLURM is needed: inside a job it uses the job's GPUs. Every run is kept, and
experiment_logs/ab/NAME/ledger.jsonl, which is only appended to, has its start, its end, its exit status and the GPUs'
clocks and power before and after. The same line again goes on where it stopped. What stands after -- goes to the
trainer.
"""

import json
import shlex
import shutil
import subprocess
import tarfile
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from nanogpt.common.errors import EXIT_INTERRUPTED, UserError
from nanogpt.common.storage import atomic_write_json, make_folder, storage_errors
from tools.args import Parser, name_of, whole
from tools.children import Children, Interrupted
from tools.experiments import records, trainer
from tools.experiments.config import read_json
from tools.launch import environment, snapshot
from tools.launch.presets import check_overrides
from tools.place import checkout

SIDES = ("A", "B")
ENDED_BY_ITSELF = (0, 1, 70)  # a run that broke is kept and not repeated
GPU_FIELDS = "name,clocks.sm,power.draw,temperature.gpu"


def main(argv: list[str]) -> int:
    """The command."""
    cut = argv.index("--") if "--" in argv else len(argv)
    parser = Parser(
        "experiment ab", __doc__ or "", usage="engaging experiment ab A B [options] [-- PRESET FLAGS]"
    )
    parser.add_argument(
        "a", metavar="A", help="the baseline: a git ref, a checkout's folder, a run directory"
    )
    parser.add_argument("b", metavar="B", help="the variant")
    parser.add_argument("--runs", type=whole("--runs", 1, 200), default=4, help="of each side (default 4)")
    parser.add_argument("--script", default=trainer.SMALL, help=f"default: {trainer.SMALL}, or the runs' own")
    parser.add_argument("--gpus", type=whole("--gpus", 1, 64), help="of a run; default: what is here")
    parser.add_argument("--base-seed", type=whole("--base-seed", 0, 2**31 - 2001), default=42)
    parser.add_argument("--name", type=name_of("--name"), help="default: made of A and B")
    args = parser.read(argv[:cut])
    presets = [word for word in argv[cut + 1 :] if not word.startswith("-")]
    flags = check_overrides([word for word in argv[cut + 1 :] if word.startswith("-")])
    if any(word.removeprefix("--").startswith("seed=") for word in flags):
        raise UserError("--seed: ab sets it: --base-seed + the pair's number")
    root = checkout()
    python = environment.need_environment()
    made = "".join(char if char.isalnum() else "-" for char in f"{args.a}-{args.b}").strip("-")[:60]
    home = root / records.SHELF / "ab" / (args.name or made or "ab")
    plan = {
        "a": args.a,
        "b": args.b,
        "script": args.script,
        "words": [*presets, *flags],
        "seed": args.base_seed,
    }
    _begin(root, home, plan)
    extra = environment.for_run(root, python, 0)
    with records.lock(home, ".running", wait=False) as held:
        if not held:
            raise UserError(f"{home.name}: another process is running it")
        try:
            _run_all(root, home, plan, args, environment.job_environment(extra))
        except Interrupted as stopped:
            print(f"stopped by {stopped}; the same line goes on: engaging experiment ab {shlex.join(argv)}")
            return EXIT_INTERRUPTED
    return _verdict(home)


def order(runs: int) -> list[tuple[str, int]]:
    """(side, pair) of every run: A B, then B A, then A B ..., so that a drift of the machine meets both alike."""
    return [(side, pair) for pair in range(runs) for side in (SIDES if pair % 2 == 0 else SIDES[::-1])]


def _begin(root: Path, home: Path, plan: dict[str, Any]) -> None:
    """Copy both sides, once. UserError for a side that is nothing, or a name that stands for other sides."""
    path = home / "ab.json"
    if path.is_file():
        known = read_json(path.read_bytes(), path)
        if {key: known.get(key) for key in plan} != plan:
            raise UserError(
                f"--name: {home.name} stands for another comparison; give this one a --name of its own"
            )
        return
    if plan["a"] == plan["b"]:
        raise UserError(f"{plan['b']}: is A as well; name two different ones")
    digests = {}
    make_folder(home)
    try:
        for side, word in zip(SIDES, (plan["a"], plan["b"]), strict=True):
            digests[side] = _copy(root, word, home / f"code-{side}")
            if not (home / f"code-{side}" / plan["script"]).is_file():
                raise UserError(f"{word}: has no {plan['script']}; name the trainer with --script")
    except UserError:
        shutil.rmtree(home)
        raise
    atomic_write_json(path, {**plan, "code": digests})
    if len(set(digests.values())) == 1:
        print("A and B are the same code: this measures the noise")


def _copy(root: Path, word: str, target: Path) -> str:
    """The code that `word` names, copied to `target`; what identifies it."""
    folder = Path(word)
    if (folder / "source").is_dir() and (folder / "config.json").is_file():
        with storage_errors(target):
            shutil.copytree(folder / "source", target)
        return f"source of {folder.resolve().name}"
    if folder.is_dir() and (folder / "nanogpt" / "common").is_dir():
        return snapshot.copy_code(folder.resolve(), target)["digest"]
    if word.startswith("-"):
        raise UserError(f"{word}: is no git ref, no checkout's folder and no run directory")
    git = ["git", "-C", str(root)]
    found = subprocess.run(
        [*git, "rev-parse", "--verify", "-q", f"{word}^{{commit}}"], capture_output=True, text=True
    )
    if found.returncode:
        raise UserError(f"{word[:80]}: is no git ref, no checkout's folder and no run directory")
    archive = target.with_suffix(".tar")
    with storage_errors(target), archive.open("wb") as file:
        subprocess.run([*git, "archive", found.stdout.strip()], stdout=file, check=True)
    with tarfile.open(archive) as packed:
        packed.extractall(target, filter="data")
    archive.unlink()
    return found.stdout.strip()


def _run_all(root: Path, home: Path, plan: dict[str, Any], args: Any, surroundings: dict[str, str]) -> None:
    """What the ledger does not have yet, in its order."""
    ledger, children = home / "ledger.jsonl", Children()
    done = {
        (row.get("side"), row.get("pair"))
        for row in records.read_lines(ledger)
        if row.get("exit") in ENDED_BY_ITSELF
    }
    todo = [place for place in order(args.runs) if place not in done]
    for number, (side, pair) in enumerate(todo, 1):
        seed, code = plan["seed"] + pair, home / f"code-{side}"
        folder = home / side / f"run_{pair}_seed_{seed}"
        words = [*plan["words"], f"--out_dir={folder}", f"--seed={seed}", "--auto_resume=true"]
        gpus = ["--gpus", str(args.gpus)] if args.gpus else []
        command = ["bash", str(root / "slurm/lib/run.sh"), *gpus, plan["script"], *words]
        print(f"[{number}/{len(todo)}] {side} pair {pair} seed {seed}", flush=True)
        row = {"side": side, "pair": pair, "seed": seed, "started": _now(), "gpus_before": _gpus()}
        began, status = time.monotonic(), -1
        try:
            status = children.run(command, root, {**surroundings, "RUN_CODE": str(code)})
        finally:
            row |= {
                "exit": status,
                "ended": _now(),
                "seconds": round(time.monotonic() - began, 3),
                "gpus_after": _gpus(),
            }
            records.append_lines(ledger, [row])
        if status == 2:
            raise UserError(f"{side}: its trainer refused this (above); mend it and type the same line again")


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="milliseconds")


def _gpus() -> list[str]:
    """Name, clock, power and temperature of each GPU, as nvidia-smi says; none without a GPU."""
    try:
        command = ["nvidia-smi", f"--query-gpu={GPU_FIELDS}", "--format=csv,noheader"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return done.stdout.splitlines() if done.returncode == 0 else []


def _verdict(home: Path) -> int:
    """Welch on loss and on time, in words; the exit status says only whether there was something to compare."""
    from tools.analysis import changes, compare, findings

    groups = [compare.one_group(home / side) for side in SIDES]
    for side, group in zip(SIDES, groups, strict=True):
        group.name = side
    found = findings.compare(*groups, pairing="none")
    found.cautions = [caution for caution in found.cautions if caution != findings.NOT_IN_TURN]  # they did
    print("\n" + "\n".join([*changes.text(changes.find(*groups)), "", *compare.text(found)]))
    broke = [row for row in records.read_lines(home / "ledger.jsonl") if row.get("exit")]
    if broke:
        print(
            f"{len(broke)} runs did not end well: {json.dumps([(r.get('side'), r.get('seed')) for r in broke[:10]])}"
        )
    print(f"\nkept: {home}: ledger.jsonl, A/, B/")
    return 0
