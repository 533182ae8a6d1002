"""From a command line to a process that runs from the run's own copy of the source.

Rank 0 opens the run directory (or refuses), the other ranks of the launch wait for it, then all of them go on in the
copy. The same command again goes on with a run that was interrupted. An attempt that nobody watches keeps the copy and
the configuration that the run was started with, so editing never changes a run that is queued or preempted.
"""

import contextlib
import dataclasses
import os
import secrets
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from nanogpt.common import checkpoint_names, lease, rundir, source, tracking
from nanogpt.common.errors import CommandError, UserError
from nanogpt.common.flags import flag_given

SMOKE_STEPS = 10
# What a command line asks for this once; a resume without the flag does not inherit it.
MOMENTARY = frozenset(["auto_resume", "overwrite", "accept_changed", "new_source", "check", "eval_only"])


@dataclass(frozen=True)
class Trainer:
    """What distinguishes one trainer from another here."""

    # A frozen dataclass with out_dir, init_from, auto_resume, overwrite, accept_changed, new_source, check,
    # smoke.
    config_class: type
    root: Path  # of the repository
    folders: tuple[str, ...]  # of the source copy
    entry: str  # relative to the root
    free: frozenset[str]  # knobs that a resumed run may change
    # Checks the data and the plan of a config; returns it with everything derived filled in, and what else
    # config.json is to keep.
    inspect: Callable[[object], tuple[object, dict]]
    steps: Callable[[object], int]  # optimizer steps of a config's whole run
    # Files of the source copy that lie elsewhere, by their paths in the copy: a user's own.
    more_source: Callable[[object], dict[str, bytes]] = lambda config: {}


@contextlib.contextmanager
def rank_zero_speaks() -> Iterator[None]:
    """A block whose expected failures are the same on all ranks: rank 0 reports them, the others leave silently."""
    try:
        yield
    except CommandError as error:
        if os.environ.get("RANK", "0") == "0":
            raise
        raise SystemExit(error.exit_code) from None


def smoke_values(values: dict[str, object], argv: list[str], small: dict[str, object]) -> dict[str, object]:
    """The knobs of a --smoke: `values` with those of `small` in their place, in a run directory of its own.

    What the command line itself says wins over `small`. On CPUs a rank has one thread where `small` says nothing else:
    with so little to do, several would wait for each other.
    """
    small = {"num_threads": 1, **small, "out_dir": f"{values['out_dir']}-smoke"}
    return values | {name: value for name, value in small.items() if not flag_given(argv, name)}


def open_run(trainer: Trainer, explicit: dict[str, object], argv: list[str]) -> Path | None:
    """Open the run that the command line asks for; its directory, to go on in with `enter_copy`.

    None when nothing is to be trained: `--check`, or a run that is finished. `explicit` holds the knobs the user set.
    UserError and StorageError come from rank 0 alone.
    """
    with rank_zero_speaks():
        config = trainer.config_class(**explicit)
        folder = Path(config.out_dir).expanduser().absolute()
        if os.environ.get("RANK", "0") == "0":
            with rundir.one_at_a_time(folder):
                opened = _open(trainer, config, explicit, folder, argv)
            if opened and _stored(folder)["config"].get("wandb_log"):
                tracking.start(folder, trainer.root)
            return folder if opened else None
        if config.check or _says_finished(trainer, config, explicit, folder):
            return None
        lease.wait_for(folder)
    return folder


def _open(trainer: Trainer, config: object, explicit: dict, folder: Path, argv: list[str]) -> bool:
    """Rank 0's part of `open_run`; False when nothing is to be trained."""
    if getattr(config, "wandb_log", False):
        tracking.mode()  # a setting that W&B does not know is refused before anything is written
    if not _goes_on(config, folder):
        return _begin(trainer, config, folder, argv)
    if not rundir.holds_run(folder):
        raise UserError(
            f"--out_dir={folder}: holds no run to resume; start one (--init_from=scratch), "
            "or name the directory of a run"
        )
    lease.refuse_live(folder)
    stored = _stored(folder)
    if config.init_from != "resume" and not config.auto_resume:
        _refuse_another(trainer, folder, stored, config)
    accepted = set(filter(None, config.accept_changed.split(",")))
    merged = _merge(trainer, stored, explicit, "config" in accepted)
    if _is_over(trainer, config, merged, folder):
        # What the disk refused to delete at the end.
        checkpoint_names.remove_leftovers(folder / "checkpoints")
        loss = rundir.last_end(folder).get("val_loss")
        print(
            f"{folder}: finished{'' if loss is None else f', val loss {loss:.4f}'}; nothing is left to train. To start "
            "anew: --overwrite=true, which moves this run aside, or another --out_dir",
            flush=True,
        )
        return False
    merged, details = trainer.inspect(merged)
    _refuse_changes(folder, stored, details, accepted)
    files = _new_source(trainer, config, stored, folder)
    if config.init_from == "resume" and not checkpoint_names.steps(folder / "checkpoints"):
        raise UserError(
            f"--out_dir={folder}: the run has no checkpoint to resume from (--init_from=resume); "
            "start it again with --overwrite=true"
        )
    if config.check:
        return False
    changes = {
        "config": dataclasses.asdict(merged),
        "asked": stored["asked"] | ({} if "config" not in accepted else explicit),
        "must_resume": config.init_from == "resume",
        "source_sha256": source.digest(files) if files else stored["source_sha256"],
    }
    rundir.reopen(folder, {**stored, **changes, **details}, argv, files)
    return True


def _begin(trainer: Trainer, config: object, folder: Path, argv: list[str]) -> bool:
    """A new run, also in the place of an old one where that may be; False for `--check`."""
    old_smoke = config.smoke and rundir.holds_run(folder) and bool(_stored(folder)["config"].get("smoke"))
    rundir.refuse_taken(folder, config.overwrite or old_smoke)
    resolved, details = trainer.inspect(config)
    if config.check:
        return False
    files = source.collect(trainer.root, trainer.folders) | trainer.more_source(config)
    record = {
        "config": dataclasses.asdict(resolved),
        "asked": dataclasses.asdict(config),
        "source_sha256": source.digest(files),
        "entry": trainer.entry,
        "run_id": secrets.token_hex(8),
        **details,
    }
    if old_smoke:
        rundir.remove(folder)
    rundir.create(folder, files, record, argv, config.overwrite)
    return True


def _goes_on(config: object, folder: Path) -> bool:
    """Whether the command line means the run in `folder`, rather than a new one."""
    return config.init_from == "resume" or (
        rundir.holds_run(folder) and not config.overwrite and not config.smoke
    )


def _says_finished(trainer: Trainer, config: object, explicit: dict, folder: Path) -> bool:
    """Whether the command line means a run that has had all of its steps: the same answer on all ranks."""
    if not _goes_on(config, folder):
        return False
    try:
        accepted = "config" in config.accept_changed.split(",")
        merged = _merge(trainer, _stored(folder), explicit, accepted)
    except UserError:
        return False  # which rank 0 reports
    return _is_over(trainer, config, merged, folder)


def _is_over(trainer: Trainer, config: object, merged: object, folder: Path) -> bool:
    """Whether the run in `folder` has had all the steps that `merged`, its configuration with our flags, asks for."""
    if getattr(config, "eval_only", False):
        return False
    end = rundir.last_end(folder)
    return bool(end) and end.get("status") == "finished" and int(end.get("step", 0)) >= trainer.steps(merged)


def _refuse_another(trainer: Trainer, folder: Path, stored: dict, config: object) -> None:
    """UserError unless the command is the one that the run was started with."""
    differing = {
        name: (stored["asked"][name], value)
        for name, value in dataclasses.asdict(config).items()
        if name in stored["asked"] and name not in MOMENTARY | {"out_dir", "data_root"}
        and value not in (stored["asked"][name], stored["config"].get(name))
    }  # fmt: skip
    if differing:
        named = ", ".join(
            f"--{name}={value}, was {then}" for name, (then, value) in list(differing.items())[:3]
        )
        more = f" and {len(differing) - 3} more" if len(differing) > 3 else ""
        way = "go on with it (--init_from=resume), " if differing.keys() <= trainer.free else ""
        raise UserError(
            f"--out_dir={folder}: holds a run already, with another configuration ({named}{more}); {way}choose another "
            "--out_dir, or move it aside with --overwrite=true"
        )


def _new_source(trainer: Trainer, config: object, stored: dict, folder: Path) -> dict[str, bytes] | None:
    """What takes the place of the run's source copy; None: the copy stays.

    A resume by hand from edited source wants --new_source. With --auto_resume, which scripts say, the run goes on with
    its copy; --new_source is then for the first attempt of a job, not for those that are requeued. UserError.
    """
    copy = source.collect(folder / "source", (".",))
    edited = source.digest(copy) != stored["source_sha256"]
    own = source.collect(trainer.root, trainer.folders)
    with contextlib.suppress(UserError):  # a user's own file may have gone: the copy has it
        own |= trainer.more_source(config)
    new = copy | own
    changed = source.changed(copy, new)
    if config.new_source and not (config.auto_resume and _is_requeued(folder)):
        return new if changed or edited else None
    if edited:
        raise UserError(
            f"--out_dir={folder}: its source copy was edited, so a resume would not be exact; undo that, or go on with "
            "this repository's source: --new_source=true"
        )
    if not changed:
        return None
    what = f"{changed[0]}{f' and {len(changed) - 1} more files' if changed[1:] else ''}"
    if not config.auto_resume:
        raise UserError(
            f"--out_dir={folder}: {what} changed since this run was started; go on with the new source "
            "(--new_source=true), or with the run's own copy of the old one (--auto_resume=true)"
        )
    print(
        f"note: {what} changed since; this run goes on with its own copy of the source",
        file=sys.stderr,
        flush=True,
    )
    return None


def _is_requeued(folder: Path) -> bool:
    """Whether this attempt is one that SLURM, or the job's script, has made of an earlier one of the same job."""
    job, last = os.environ.get("SLURM_JOB_ID", ""), lease.read(folder)
    return os.environ.get("SLURM_RESTART_COUNT", "0") not in ("", "0") or bool(
        job and last and last.job == job
    )


def _stored(folder: Path) -> dict:
    """The run's config.json. UserError when it is not what a run writes."""
    path = folder / "config.json"
    stored = rundir.read_json(path)
    for name, kind in {"config": dict, "asked": dict, "source_sha256": str}.items():
        if not isinstance(stored.get(name), kind):
            raise UserError(f"{path}: {name}: missing or damaged; start another run with another --out_dir")
    return stored


def _merge(trainer: Trainer, stored: dict, explicit: dict, accept_config: bool) -> object:
    """The stored configuration with the free knobs of the command line. UserError for a knob that is not free."""
    names = {field.name for field in dataclasses.fields(trainer.config_class)}
    merged = {
        name: value for name, value in stored["config"].items() if name in names and name not in MOMENTARY
    }
    for name, value in explicit.items():
        if name == "init_from":
            # Where the run came from stays: it decides the model's shape, and where a run without checkpoint begins.
            if value != "resume" and value != merged.get(name):
                raise _not_so(name, value, merged.get(name))
        elif name in trainer.free or accept_config:
            merged[name] = value
        elif value not in (stored["asked"].get(name), merged.get(name)):
            raise _not_so(name, value, stored["asked"].get(name))
    return trainer.config_class(**merged)


def _not_so(name: str, value: object, then: object) -> UserError:
    return UserError(
        f"--{name}={value}: this run was started with {then}; leave the flag away, start another run with "
        f"another --out_dir{'' if name == 'init_from' else ', or say --accept_changed=config'}"
    )


def _refuse_changes(folder: Path, stored: dict, details: dict, accepted: set[str]) -> None:
    """UserError when what the run depends on is not what it was, unless the user accepts that."""
    try:
        torch_then = rundir.read_json(folder / "environment.json")["attempts"][0]["packages"]["torch"]
    except (KeyError, IndexError, TypeError):
        torch_then = ""  # torch was not installed as a package, or the file was edited
    torch_now = metadata.version("torch")
    changes = {
        "data": (
            "the data set is not the one it was started with",
            stored.get("data") != details.get("data"),
        ),
        "torch": (f"torch was {torch_then}, now it is {torch_now}", torch_then not in ("", torch_now)),
    }
    for name, (what, changed) in changes.items():
        if not changed:
            continue
        if name not in accepted:
            raise UserError(
                f"--out_dir={folder}: {what}, so a resume would not be exact; undo that, or go on with "
                f"--accept_changed={name}"
            )
        print(f"note: {what} (accepted)", file=sys.stderr, flush=True)
