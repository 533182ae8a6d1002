"""`engaging runs`: the runs that are here, the newest first: how each ended, what it changed, and your note.

    engaging runs                                  the runs in out/
    engaging runs experiment_logs/palm_2026 -n 5   those of an experiment, or of any folder
    engaging runs --against first                  each beside one run, not beside the one before it
    engaging runs mine --note "warm-down of 400 steps: smoother, no better"

A note is the file note.txt in the run's directory; any editor will do. What changed is read from the copies that each
run holds of its settings and its source, whatever the note says.
"""

from pathlib import Path

from nanogpt.common.errors import UserError
from nanogpt.common.storage import atomic_write_text, storage_errors
from tools.args import Parser, whole
from tools.place import checkout
from tools.runs import NOTE, Run, is_run, named_run, note_of, printable, read_run, runs_under

MOST_CHANGES = 4  # shown of each run
LONGEST_NOTE = 300


def main(argv: list[str]) -> int:
    """The command."""
    parser = Parser("runs", __doc__ or "")
    add = parser.add_argument
    add(
        "where",
        nargs="*",
        type=Path,
        metavar="RUN",
        help="runs by name or folder, or folders of runs; default: out",
    )
    add("-n", type=whole("-n", 1, 100_000), default=20, help="how many, the newest first (default 20)")
    add("--against", type=Path, metavar="RUN", help="the run that each is held beside")
    add("--note", metavar="TEXT", help="write a line down with one run ('' removes it), and list nothing")
    args = parser.read(argv)
    if args.note is not None:
        return _write_note(args.where, args.note)
    fixed = read_run(_need_run(args.against)) if args.against else None
    folders = _folders([_named(path) for path in args.where] or [checkout() / "out"])
    if not folders:
        where = ", ".join(printable(str(path)) for path in args.where) or "out"
        print(f"no run in {where} yet; engaging launch nanogpt --name first")
        return 0
    listed = folders[: args.n]
    several = len(args.where) > 1
    width = max(len(_title(folder, several)) for folder in listed)
    known: dict[Path, Run] = {}  # each is read once, though the next one is held beside it
    for place, folder in enumerate(listed):
        run = known.pop(folder, None) or read_run(folder)
        other = fixed or _one_before(run, folders[place + 1 :], known)
        print(f"{_title(folder, several):{width}}  {_state(run)}")
        print(f"{'':{width}}  {_changed(run, other, several)}")
        if note := note_of(folder):
            print(f"{'':{width}}  note: {note}")
    if len(folders) > len(listed):
        print(f"... and {len(folders) - len(listed)} older ones (-n {len(folders)})")
    return 0


def _named(path: Path) -> Path:
    """The path, or the run that it names."""
    return path if path.exists() else named_run(checkout(), path) or path


def _folders(where: list[Path]) -> list[Path]:
    """The runs that `where` means, the newest first in each. UserError for what is neither a run nor a folder."""
    found: list[Path] = []
    for path in where:
        if is_run(path) and not (path / "runs").is_dir():
            found.append(path)
        elif path.is_dir():
            found += runs_under(path / "runs") if (path / "runs").is_dir() else runs_under(path)
        elif path.name != "out":
            raise UserError(f"{printable(str(path))}: is not a folder; expected a run, or a folder of runs")
    return list(dict.fromkeys(found))


def _need_run(path: Path) -> Path:
    path = _named(path)
    if not is_run(path):
        raise UserError(f"{printable(str(path))}: is no run; expected a run's directory (its --out_dir)")
    return path


def _one_before(run: Run, older: list[Path], known: dict[Path, Run]) -> Run | None:
    """The newest older run of the same trainer."""
    for folder in older:
        other = known.setdefault(folder, read_run(folder))
        if other.config.get("entry") == run.config.get("entry"):
            return other
    return None


def _state(run: Run) -> str:
    """`finished, step 500 of 500, val 1.8862`."""
    if run.status == "empty":
        return "no step yet"
    parts = [run.standing, f"step {run.step}" + (f" of {run.max_steps}" if run.max_steps else "")]
    parts += [f"val {run.val_loss:.4f}"] if run.val_loss is not None else []
    return printable(", ".join(parts))


def _title(folder: Path, several: bool) -> str:
    """A run's name; where several folders are listed, with its folder's, or its experiment's."""
    *_, experiment, parent, name = ("", "", *folder.absolute().parts)
    return printable(f"{experiment if parent == 'runs' else parent}/{name}" if several else name)


def _changed(run: Run, other: Run | None, several: bool) -> str:
    """What differs from the other run, in a line."""
    from tools.analysis import changes

    if other is None:
        return "the first run of its trainer here"
    if other.path.absolute() == run.path.absolute():
        return "the run that the others are held beside"
    sides = [one.config.get("config") for one in (other, run)]
    if not all(isinstance(side, dict) for side in sides):
        return "what it changed is not known: no settings were recorded"
    sources = [changes.texts_in(one.path / "source") for one in (other, run)]
    found = changes.between(*(changes.settings(side) for side in sides), *sources)
    said = "; ".join(changes.brief(found, MOST_CHANGES)) or "nothing but the seed, if that"
    return f"changed since {_title(other.path, several)}: {said}"


def _write_note(where: list[Path], note: str) -> int:
    """Put the line into the run's directory."""
    from tools.leaderboard import text

    if len(where) != 1:
        raise UserError("--note: name the one run that it is about")
    path = _need_run(where[0]) / NOTE
    with storage_errors(path):
        if not note:
            path.unlink(missing_ok=True)
        else:
            atomic_write_text(path, text.line_of(note, "--note", LONGEST_NOTE) + "\n")
    print(f"{path}: {'written' if note else 'removed'}")
    return 0
