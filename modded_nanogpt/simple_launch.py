"""From the small trainer's command line to a process in the run's own copy of the source. No torch here.

A plan's runs are trained by one process, in the copy of the first of them that is not finished: each of the others
keeps a copy of that same source, and one that was begun with other source is refused before anything is trained.
"""

import contextlib
import dataclasses
import functools
import os
from collections.abc import Iterator
from pathlib import Path

from modded_nanogpt import many_runs
from modded_nanogpt.many_runs import Values
from modded_nanogpt.simple_config import (
    FREE,
    Config,
    end_step,
    read_plan,
    resolve,
    smoke_sizes,
    values_of,
)
from modded_nanogpt.variants import find, name_of
from nanogpt.common import rundir, source
from nanogpt.common.errors import UserError
from nanogpt.common.flags import flag_given
from nanogpt.common.launch import Trainer, open_run, rank_zero_speaks, smoke_values
from nanogpt.common.machine import has_nvidia_driver, world_size_from_environment
from nanogpt.common.shards import TokenSet, data_root, open_token_set, verify

ENTRY = "modded_nanogpt/train_gpt_simple.py"
ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("modded_nanogpt", "nanogpt")
SMALL_DATA = 1 << 28  # bytes that are read and checked before the run directory is made; more by all ranks
ONE_FOR_ALL = ("device", "backend", "num_threads", "deterministic")  # of a plan's runs, which share a process
VOCABULARY_MULTIPLE = 64  # rows of embedding and head, as matrix units like them


def launch(argv: list[str], description: str) -> int:
    """Open the run, or the first of a plan's runs, and go on in its copy. Returns when nothing is to be trained."""
    with rank_zero_speaks():
        values = values_of(argv, description)
        runs = runs_of(values, argv)
        if values.get("plan"):
            runs = _unfinished(runs)
            _look_ahead(runs, argv)
            if not runs or values.get("check"):
                return 0
    folder = open_run(trainer(runs), runs[0], argv)
    if folder is None:
        return 0
    root = data_root(str(values.get("data_root", "")))  # the copy lies elsewhere, and so would its default
    rundir.enter_copy(folder, ENTRY, *([*argv, f"--data_root={root}"] if values.get("plan") else []))
    return 0


def runs_of(values: Values, argv: list[str]) -> list[Values]:
    """The knobs of every run that the command line asks for: one, or those of its plan."""
    if values.get("plan"):
        common = {name: value for name, value in values.items() if name not in ("plan", "check", "out_dir")}
        if values.get("overwrite"):
            raise UserError("--overwrite=true with --plan: a plan goes on with what is there; keep one")
        if values.get("smoke"):
            raise UserError("--smoke with --plan: try one run of the plan; keep one of the two")
        if flag_given(argv, "out_dir"):
            raise UserError("--out_dir with --plan: every run of the plan names its own; leave the flag away")
        return read_plan(Path(str(values["plan"])).expanduser(), common)
    folder = Path(str(values.get("out_dir", Config.out_dir))).expanduser()
    one = {**values, "out_dir": str(folder if flag_given(argv, "out_dir") else ROOT / folder)}
    if values.get("smoke"):
        on_gpu = values.get("device") != "cpu" and has_nvidia_driver()
        one = smoke_values(one, argv, smoke_sizes(values, on_gpu, world_size_from_environment()))
    return [one]


def later_runs(argv: list[str], description: str, first: Path) -> list[Values]:
    """In the copy: the runs that this process trains after `first`, the one whose copy it is. [] without a plan."""
    values = values_of(argv, description)
    if not values.get("plan"):
        return []
    # In the copy the variants of all runs lie under their names, as they were when the plan began.
    words = [word for word in argv if not word.startswith("--out_dir=")]
    runs = [
        {**run, "variant": name_of(str(run.get("variant", "baseline")))} for run in runs_of(values, words)
    ]
    return many_runs.others(runs, first)


def trainer(runs: list[Values]) -> Trainer:
    """What `open_run` needs to know. The source copy holds the variants of all runs that this process trains."""
    specs = list(dict.fromkeys(str(run.get("variant", "baseline")) for run in runs))
    own = functools.partial(_own_variants, specs)
    return Trainer(Config, ROOT, FOLDERS, ENTRY, FREE, inspect, end_step, own)


def vocabulary_rows(token_set: TokenSet) -> int:
    """Rows of embedding and head."""
    return -(-token_set.vocab_size // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE


def inspect(config: Config) -> tuple[Config, dict]:
    """Check what needs no GPU: the plan, the variant and the data. Prints the plan when that is all the user wants."""
    plan = resolve(config, world_size_from_environment())
    _refuse_missing_gpu(config)
    _check_variant(config)
    root = data_root(config.data_root)
    token_set = _checked(config.dataset, root)
    _refuse_short(config, token_set)
    if config.check:
        print(plan.describe(config))
        print(
            f"{token_set.folder}: {token_set.num_tokens('train'):,} training tokens, "
            f"{token_set.num_tokens('val'):,} validation tokens"
        )
    config = dataclasses.replace(config, data_root=str(root), variant=name_of(config.variant), plan="")
    return config, {"plan": dataclasses.asdict(plan), "data": token_set.fingerprint()}


@functools.cache
def _checked(dataset: str, root: Path) -> TokenSet:
    """The set, opened; read through when it is small. Once for all runs of a plan."""
    token_set = open_token_set(dataset, root)
    if sum(shard.bytes for shard in token_set.shards) <= SMALL_DATA:
        verify(token_set)
    return token_set


def _check_variant(config: Config) -> None:
    """UserError unless the variant is there: in the copy of a run that goes on, else in the repository, or a file."""
    folder = Path(config.out_dir).expanduser()
    own = folder / "source" / FOLDERS[0] / "variants" / f"{name_of(config.variant)}.py"
    if config.overwrite or not rundir.holds_run(folder) or not own.is_file():
        find(config.variant)


def _refuse_missing_gpu(config: Config) -> None:
    none = not has_nvidia_driver()
    if none and config.device.startswith("cuda"):
        raise UserError(
            f"--device={config.device}: this machine has no NVIDIA GPU; use --device=cpu, or ask SLURM for a GPU"
        )
    if none and config.backend == "nccl":
        raise UserError("--backend=nccl: needs GPUs; use --backend=gloo on CPUs")


def _refuse_short(config: Config, token_set: TokenSet) -> None:
    if not token_set.vocab_size:
        raise UserError(
            f"--dataset={config.dataset}: nothing says how large its vocabulary is; prepare it again"
        )
    length = config.sequence_length
    for split, shards, needed in (
        (
            "train",
            token_set.shards_train,
            1 if config.repeat_data else end_step(config) * config.batch_size,
        ),
        ("val", token_set.shards_val, max(1, config.val_tokens // length)),
    ):
        there = sum(max(0, shard.num_tokens - 1) // length for shard in shards)
        if there >= needed:
            continue
        names = [shard.path.name for shard in shards]
        named = names[0] if len(names) == 1 else f"{names[0]} to {names[-1]}"
        lower = (
            f"--val_tokens={there * length}" if split == "val" and there else "a shorter --sequence_length"
        )
        if split == "train" and there:
            lower = (
                f"--num_iterations={there // config.batch_size}"
                if there >= config.batch_size
                else "a smaller batch"
            )
            lower += ", or --repeat_data=true"
        raise UserError(
            f"{token_set.folder}: {len(names)} {split} file{'s' * (len(names) > 1)} ({named}) with "
            f"{token_set.num_tokens(split):,} tokens make {there:,} sequences of {length}, {needed:,} are needed; "
            f"prepare more shards, or pass {lower}"
        )


def _own_variants(specs: list[str], config: Config) -> dict[str, bytes]:
    """The user's variants as files of the source copy."""
    files, folder = {}, f"{FOLDERS[0]}/variants"
    for spec in specs:
        path, data = f"{folder}/{name_of(spec)}.py", find(spec).read_bytes()
        if files.setdefault(path, data) != data:
            raise UserError(f"--variant={spec}: the plan has another file of this name; rename one of them")
    return files


def _unfinished(runs: list[Values]) -> list[Values]:
    """The runs that are not finished, in order; says how many are."""
    left = many_runs.unfinished(runs)
    if len(left) < len(runs) and os.environ.get("RANK", "0") == "0":
        print(f"{len(runs) - len(left)} of {len(runs)} runs are finished already", flush=True)
    return left


def _look_ahead(runs: list[Values], argv: list[str]) -> None:
    """UserError when any run of a plan could not be opened when its turn comes. Changes nothing."""
    for number, run in enumerate(runs):
        with _about(run):
            config, first = Config(**run), Config(**runs[0])
            for name in ONE_FOR_ALL:
                if getattr(config, name) != getattr(first, name):
                    raise UserError(
                        f"--{name}={getattr(config, name)}: the plan's other runs have {getattr(first, name)}, and one "
                        "process trains them all; make two plans"
                    )
            if os.environ.get("RANK", "0") != "0":
                continue
            print(f"run {number + 1} of {len(runs)}: {run['out_dir']}", flush=True)
            open_run(trainer(runs), {**run, "check": True}, argv)
    if runs and os.environ.get("RANK", "0") == "0":
        _refuse_other_source(runs)


def _refuse_other_source(runs: list[Values]) -> None:
    begun = [folder for run in runs if rundir.holds_run(folder := Path(str(run["out_dir"])))]
    digests = {folder: rundir.read_json(folder / "config.json").get("source_sha256") for folder in begun}
    first = Path(str(runs[0]["out_dir"]))
    files = source.collect(ROOT, FOLDERS) | _own_variants(
        [str(run.get("variant", "baseline")) for run in runs], Config()
    )
    for run in runs if first in digests else []:
        name = name_of(str(run.get("variant", "baseline")))
        if not (first / "source" / FOLDERS[0] / "variants" / f"{name}.py").is_file():
            raise UserError(
                f"{run['out_dir']}: --variant={name}: the plan's first run that is left was begun without it, and its "
                f"source serves them all; finish that one alone, with --init_from=resume --out_dir={first}"
            )
    expected = digests.get(first) or source.digest(files)
    for folder, digest in digests.items():
        if digest != expected:
            raise UserError(
                f"{folder}: was begun with other source than the plan's first run that is left; finish it alone, with "
                f"--init_from=resume --out_dir={folder}, or start it again elsewhere"
            )


@contextlib.contextmanager
def _about(run: Values) -> Iterator[None]:
    """Names the run in the error of one of a plan's many."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{run['out_dir']}: {error}") from None
