"""From a command line to a process that runs from the run's own copy of the source.

Rank 0 opens the run directory (or refuses), the other ranks of the launch wait for it, then all of them go on in the
copy. A resumed run goes on with the copy and the configuration it was started with, so editing the repository never
changes a run that is queued or preempted.
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
MOMENTARY = frozenset(["auto_resume", "overwrite", "accept_changed", "check", "eval_only"])


@dataclass(frozen=True)
class Trainer:
    """What distinguishes one trainer from another here."""

    # A frozen dataclass with out_dir, init_from, auto_resume, overwrite, accept_changed, check, smoke.
    config_class: type
    root: Path  # of the repository
    folders: tuple[str, ...]  # of the source copy
    entry: str  # relative to the root
    free: frozenset[str]  # knobs that a resumed run may change
    # Checks the data and the plan of a config; returns it with everything derived filled in, and what else
    # config.json is to keep.
    inspect: Callable[[object], tuple[object, dict]]
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

    What the command line itself says wins over `small`.
    """
    small = {**small, "out_dir": f"{values['out_dir']}-smoke"}
    return values | {name: value for name, value in small.items() if not flag_given(argv, name)}


def open_run(trainer: Trainer, explicit: dict[str, object], argv: list[str]) -> Path | None:
    """Open the run that the command line asks for; its directory, to go on in with `enter_copy`. None for `--check`.

    `explicit` holds the knobs the user set. UserError and StorageError come from rank 0 alone.
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
        if config.check:
            return None
        lease.wait_for(folder)
    return folder


def _open(trainer: Trainer, config: object, explicit: dict, folder: Path, argv: list[str]) -> bool:
    """Rank 0's part of `open_run`; False when `--check` ends here."""
    if getattr(config, "wandb_log", False):
        tracking.mode()
    held = rundir.holds_run(folder)
    anew = config.smoke and config.init_from != "resume"
    going_on = config.init_from == "resume" or (config.auto_resume and held and not anew)
    if not going_on:
        replaced = anew and held and bool(_stored(folder)["config"].get("smoke"))
        rundir.refuse_taken(folder, config.overwrite or replaced)
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
        if replaced:
            rundir.remove(folder)
        rundir.create(folder, files, record, argv, config.overwrite)
        return True
    if not rundir.holds_run(folder):
        raise UserError(
            f"--out_dir={folder}: holds no run to resume; start one (--init_from=scratch), "
            "or name the directory of a run"
        )
    lease.refuse_live(folder)
    stored = _stored(folder)
    accepted = set(filter(None, config.accept_changed.split(",")))
    merged = _merge(trainer, stored, explicit, "config" in accepted)
    merged, details = trainer.inspect(merged)
    _refuse_changes(folder, stored, details, accepted)
    if config.init_from == "resume" and not checkpoint_names.steps(folder / "checkpoints"):
        raise UserError(
            f"--out_dir={folder}: the run has no checkpoint to resume from (--init_from=resume); "
            "start it again with --overwrite=true"
        )
    if config.check:
        return False
    asked = stored["asked"] | ({} if "config" not in accepted else explicit)
    changes = {
        "config": dataclasses.asdict(merged),
        "asked": asked,
        "must_resume": config.init_from == "resume",
    }
    rundir.reopen(folder, {**stored, **changes, **details}, argv)
    return True


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
    code = source.digest(source.collect(folder / "source", (".",)))
    changes = {
        "data": (
            "the data set is not the one it was started with",
            stored.get("data") != details.get("data"),
        ),
        "torch": (f"torch was {torch_then}, now it is {torch_now}", torch_then not in ("", torch_now)),
        "code": ("its source copy was edited", stored["source_sha256"] != code),
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
