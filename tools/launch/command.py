"""`engaging launch`: submit a run, or an array of seeds, or start it here where there is no SLURM.

    engaging launch gpt2 --gpus 4 --gpu-type h200 --time 6h -- --learning_rate=3e-4
    engaging launch gpt2 --gpus 1 --seeds 9 --throttle 2 --name wd-0.2 -- --weight_decay=0.2
    engaging launch nanogpt --dry-run          the exact batch script, nothing else
    engaging launch nanogpt --test-only        what the scheduler says to it

Everything that can be known is checked before anything queues. The same name again goes on with the same run.
"""

import argparse
import contextlib
import os
import secrets
import sys
import time
from pathlib import Path

from nanogpt.common.errors import UserError
from tools.args import Parser, add_request, counted, name_of, spoken, whole
from tools.launch import book, environment, presets, snapshot
from tools.launch.book import Launch
from tools.launch.passed_on import passed_on
from tools.launch.presets import Target
from tools.launch.request import choose, fitting_throttle
from tools.place import checkout
from tools.site import profile, settings, slurm
from tools.site.cluster import Cluster, ask_cluster
from tools.site.estimate import past, too_short
from tools.site.plan import Option
from tools.site.slurm import SlurmUnreachable

FIRST_SEED = 1337


def main(argv: list[str]) -> int:
    """The command. Everything after a lone `--` goes to the trainer."""
    cut = argv.index("--") if "--" in argv else len(argv)
    args = _parser().read(argv[:cut])
    overrides = presets.check_overrides(argv[cut + 1 :])
    root = checkout()
    target = presets.resolve(root, args.preset)
    presets.need_trainer(root, target)
    name = args.name or f"{target.name}-{time.strftime('%m%d-%H%M%S')}"
    here = args.local or not slurm.available()
    if here and not args.local and (sign := slurm.sign_of_cluster()):
        raise UserError(
            f"no SLURM here (no sbatch on PATH), yet {sign}: load its module, or --local to train on this machine"
        )
    launch = _launch_here if here else _launch_slurm
    if args.dry_run or args.test_only:
        return launch(args, root, target, name, overrides)
    with contextlib.ExitStack() as stack:
        if not args.name and not (stack.enter_context(book.held(root, name)) and not book.latest(root, name)):
            name = f"{name}-{os.getpid()}"  # two launches of one preset in one second
        if args.name and not stack.enter_context(book.held(root, name)):
            raise UserError(
                f"--name={name}: another engaging launch is submitting it at this moment; "
                f"engaging status {name}, or choose another name"
            )
        _refuse_running(root, name)
        return launch(args, root, target, name, overrides)


def _launch_slurm(
    args: argparse.Namespace, root: Path, target: Target, name: str, overrides: list[str]
) -> int:
    cluster, site = ask_cluster(), profile.current_site(root)
    settings.fill(args, site.path)
    args.gpus = 1 if args.gpus is None else args.gpus
    most = slurm.largest_array() if args.seeds > 1 else None
    if most and args.seeds > most:
        raise UserError(
            f"--seeds={args.seeds}: an array of this cluster holds {most} (MaxArraySize); --seeds={most}, or engaging "
            "experiment, which makes several"
        )
    previous = book.latest(root, name)
    only_asking = args.dry_run or args.test_only
    if previous is not None and not only_asking and (status := _still_there(cluster, previous)):
        raise UserError(f"--name={name}: {status}; engaging status {name}, or choose another name")
    option = choose(args, cluster, site, target)
    throttle = fitting_throttle(args, cluster, option)
    runs = run_folders(name, args.seeds)
    if not only_asking:
        python = environment.need_environment()
        environment.need_log_folder(root)
        if not args.no_check:
            presets.ask_trainer(
                python, root, target, [*overrides, *run_words(root, runs[0])], environment.job_environment()
            )
    words = trainer_words(root, target, overrides, args.seeds, runs)
    fixed = {
        "token": secrets.token_hex(12),
        "preset": args.preset,
        "trainer": target.trainer,
        "runs": runs,
        "args": [*target.words, *overrides],
        "log": "logs/%x-%A_%a.out" if args.seeds > 1 else "logs/%x-%j.out",
        "request": {**vars(option.request), "partition": option.partition, "seeds": args.seeds},
    }
    if only_asking:
        number = (previous.number if previous else 0) + 1
        launch = Launch(name=name, number=number, **fixed)
        return _dry(args, root, launch, option, throttle)
    launch = book.new_launch(root, name, **fixed)
    return _submit(args, root, launch, option, throttle, words)


def _dry(args: argparse.Namespace, root: Path, launch: Launch, option: Option, throttle: int) -> int:
    from tools.launch.submit import explain_refusal, test_only

    script = _script(args, launch, option, throttle)
    if args.dry_run:
        print(script, end="")
        print("nothing was submitted; the same line without --dry-run does it", file=sys.stderr)
        return 0
    answer = test_only(root, script)
    if answer.unreachable:
        raise SlurmUnreachable(f"sbatch --test-only: {slurm.refusal(answer)}; try again in a minute")
    if answer.rc != 0:
        raise UserError(explain_refusal(answer, launch))
    print(slurm.refusal(answer))
    return 0


def _script(args: argparse.Namespace, launch: Launch, option: Option, throttle: int) -> str:
    from tools.launch.submit import batch_script

    return batch_script(
        launch,
        option.request,
        partition=option.partition,
        tasks=args.seeds,
        throttle=throttle,
        reservation=args.reservation,
        passed_on=passed_on(args),
    )


def _submit(
    args: argparse.Namespace,
    root: Path,
    launch: Launch,
    option: Option,
    throttle: int,
    words: list[list[str]],
) -> int:
    from tools.launch.submit import submit, write_args

    folder = launch.folder(root)
    try:
        launch.code = snapshot.copy_code(root, folder / "code")
        write_args(launch, root, words)
        launch.save(root)
        extra = environment.for_run(root, environment.need_environment(), args.max_restarts)
        job_id = submit(launch, root, _script(args, launch, option, throttle), extra)
    except SlurmUnreachable:
        launch.state = "unknown"
        launch.save(root)
        raise
    except BaseException:
        snapshot.remove(folder)
        raise
    request = option.request
    gpu = f"{request.gpus}x {request.gpu_type or 'GPU'}" if request.gpus else counted(request.cpus, "CPU")
    nodes = f" on {request.nodes} nodes" if request.nodes > 1 else ""
    side = min(throttle, option.room or throttle)
    many = f", {args.seeds} seeds, {side} at once" if args.seeds > 1 else ""
    print(
        f"{launch.name}: job {job_id} in {option.partition} ({gpu}{nodes}, {spoken(request.minutes)}{many})"
    )
    if warning := too_short(root, launch.preset, request.minutes, request.all_gpus):
        print(f"note: {past(root, launch.preset, request.all_gpus)}; {warning}", file=sys.stderr)
    print(f"  run  {launch.runs[0]}" + (f" ... {launch.runs[-1]}" if args.seeds > 1 else ""))
    print(f"  log  {launch.log.replace('%x', launch.name).replace('%A', job_id).replace('%j', job_id)}")
    for left in launch.code["left_out"][:3]:
        print(f"  not copied with the code (over 64 MB): {left}")
    print(f"  next engaging status {launch.name}   engaging watch {job_id}   engaging cancel {launch.name}")
    return 0


def run_folders(name: str, seeds: int) -> list[str]:
    """The run directories, relative to the checkout: `out/<name>`, or `out/<name>-s<seed>` for several."""
    if seeds == 1:
        return [f"out/{name}"]
    return [f"out/{name}-s{FIRST_SEED + index}" for index in range(seeds)]


def run_words(root: Path, run: str) -> list[str]:
    """The flags that the launcher sets: where the run is, and that it goes on when it is there already."""
    return [f"--out_dir={root / run}", "--auto_resume=true"]


def trainer_words(
    root: Path, target: Target, overrides: list[str], seeds: int, runs: list[str]
) -> list[list[str]]:
    """What each task's argument file holds: the trainer's module, its preset, flags (the last one wins)."""
    if seeds > 1 and any(word.startswith("--seed=") or word == "--seed" for word in overrides):
        raise UserError("--seed: with --seeds the launcher sets it (1337, 1338, ...); leave one of them out")
    tasks = []
    for index, run in enumerate(runs):
        words = [target.trainer, *target.words, *overrides, *run_words(root, run)]
        tasks.append([*words, f"--seed={FIRST_SEED + index}"] if seeds > 1 else words)
    return tasks


def _launch_here(
    args: argparse.Namespace, root: Path, target: Target, name: str, overrides: list[str]
) -> int:
    from tools.launch.local import local_gpus, start

    if args.test_only:
        raise UserError("--test-only: no SLURM here to ask (no sbatch on PATH); log in to the cluster")
    asked = [
        f for f in ("partition", "account", "qos", "reservation", "gpu_type", "sbatch") if getattr(args, f)
    ]
    asked += ["mail"] if args.mail is not None else []
    if asked:
        raise UserError(
            f"--{asked[0].replace('_', '-')}: no SLURM here (no sbatch on PATH); leave it out, or log in to the cluster"
        )
    if args.nodes > 1:
        raise UserError(f"--nodes={args.nodes}: without SLURM a run stays on this machine; leave it out")
    here = local_gpus()
    gpus = min(here, 1) if args.gpus is None else args.gpus
    if gpus > here:
        raise UserError(f"--gpus={gpus}: this machine has {here}; leave --gpus out, or submit on the cluster")
    runs = run_folders(name, args.seeds)
    words = trainer_words(root, target, overrides, args.seeds, runs)
    if args.dry_run:
        for task in words:
            print("bash slurm/lib/run.sh", *[word if word.isprintable() else repr(word) for word in task])
        return 0
    python = environment.need_environment()
    environment.need_log_folder(root)
    if not args.no_check:
        presets.ask_trainer(
            python, root, target, [*overrides, *run_words(root, runs[0])], environment.job_environment()
        )
    launch = book.new_launch(
        root,
        name,
        token=secrets.token_hex(12),
        preset=args.preset,
        trainer=target.trainer,
        runs=runs,
        args=[*target.words, *overrides],
        log=f"logs/%x-{os.getpid()}.out",
        request={"gpus": gpus, "seeds": args.seeds, "max_restarts": args.max_restarts},
    )
    return start(root, launch, words, gpus, environment.for_run(root, python, args.max_restarts))


def _refuse_running(root: Path, name: str) -> None:
    """UserError for a name whose local process still runs."""
    previous = book.latest(root, name)
    if previous is not None and previous.state == "local":
        from tools.launch.local import alive

        if alive(previous):
            raise UserError(
                f"--name={name}: runs already (process {previous.pid}); engaging status {name}, "
                "or choose another name"
            )


def _still_there(cluster: Cluster, launch: Launch) -> str:
    """What the previous launch of this name is doing, "" when it is over.

    Adopts a job whose answer was lost.
    """
    for job in cluster.my_jobs:
        lost = launch.state in ("prepared", "unknown") and job.comment == book.COMMENT + launch.token
        if lost or (launch.job_id and job.base == launch.job_id):
            return f"job {job.base} of this name is in the queue ({job.state})"
    return ""


def _parser() -> Parser:
    parser = Parser(
        "launch",
        __doc__ or "",
        usage="engaging launch PRESET [options] [-- --learning_rate=3e-4 ...]",
    )
    add = parser.add_argument
    add("preset", metavar="PRESET", help="nanogpt, gpt2, speedrun, or a preset of either trainer")
    add_request(parser)
    add("--name", type=name_of("--name"), help="the run's name; default: the preset and the time")
    add(
        "--seeds",
        type=whole("--seeds", 1, 10000),
        default=1,
        help="the run with this many seeds, as one array",
    )
    add(
        "--throttle",
        type=whole("--throttle", 1, 10000),
        help="seeds at once; default: what your limits allow",
    )
    add("--max-restarts", type=whole("--max-restarts", 0, 1000), default=20, help="further jobs, default 20")
    add(
        "--mail",
        nargs="?",
        const="",
        metavar="ADDRESS",
        help="mail at its beginning, end, failure and requeue; default: the address of engaging config",
    )
    add(
        "--sbatch",
        action="append",
        default=[],
        metavar="OPTION[=VALUE]",
        help="any other option of sbatch, as often as needed: --sbatch nice=100 --sbatch exclusive",
    )
    add("--dry-run", action="store_true", help="print the exact batch script and stop")
    add("--test-only", action="store_true", help="ask the scheduler, queue nothing")
    add("--local", action="store_true", help="run on this machine, in the background")
    add("--no-check", action="store_true", help="skip the trainer's own check of its flags and data")
    parser.set_defaults(gpus=None)  # here, without SLURM: what there is, and at most one
    return parser
