"""`engaging leaderboard`: hand in a result, check one without trusting it, build the board's page.

    engaging leaderboard submit BOARD out/a-seed-1 out/a-seed-2 --description "smear over two tokens"
    engaging leaderboard verify out/a-seed-1 out/a-seed-2          # as one submission; publishes nothing
    engaging leaderboard verify BOARD                              # every record, from its evidence
    engaging leaderboard verify log-1.txt log-2.txt                # modded-nanogpt's own logs, as one submission
    engaging leaderboard build BOARD                               # BOARD/site/index.html, opens from the disk
    engaging leaderboard init BOARD --title "Our lab"              # a new one: the group writes, only owners delete
    engaging leaderboard retract BOARD ID --reason TEXT            # or correct ... --description TEXT
    engaging leaderboard fetch BOARD ID FOLDER                     # a record's evidence, to run it again
    engaging leaderboard track BOARD out/start --name=tiny --title="Tiny, CPU" --target=3.9
    engaging leaderboard term BOARD "Fall 2026" --from=2026-09-01  # a tab for what is handed in from that day on

A board is a folder: in the lab's shared pool, or a git repository. Exit status: 0 accepted, 1 refused (the reasons
are printed), 2 bad input. docs/leaderboard.md has the rules.
"""

import datetime
import getpass
import shlex
import subprocess
from pathlib import Path

from nanogpt.common.errors import CommandError, UserError
from nanogpt.common.flags import nearest
from tools.args import Parser, name_of
from tools.place import print_fetch_line
from tools.runs import printable

EXIT_REFUSED = 1
MEDIUM_BELOW = 3.1  # a log of the speedrun that ends below it is of the medium track
OWN_TRACK = "engaging leaderboard track BOARD RUN --name=NAME --title=TITLE --target=LOSS"
COMMANDS = ("init", "submit", "verify", "build", "fetch", "retract", "correct", "track", "term")


def main(argv: list[str]) -> int:
    """The command."""
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(__doc__)
        return 0
    name, rest = argv[0], argv[1:]
    if name not in COMMANDS:
        raise UserError(
            f"engaging leaderboard {printable(name)[:40]}: no such command{nearest(name, COMMANDS)} "
            f"(there are {', '.join(COMMANDS)})"
        )
    here = {"submit": submit, "verify": verify, "build": build, "fetch": fetch}
    if name in here:
        return here[name](rest)
    from tools.leaderboard import manage

    return getattr(manage, name)(rest)


def submit(argv: list[str]) -> int:
    """Make a record of runs, check it as a stranger would, publish it."""
    parser = Parser("leaderboard submit", "Hand in runs of one recipe, a seed each.")
    parser.add_argument("board", type=Path, help="the board's folder")
    parser.add_argument(
        "runs",
        type=Path,
        nargs="+",
        help="run directories, an experiment's folder, or logs of modded-nanogpt",
    )
    parser.add_argument("--description", required=True, help="what was changed, in one line")
    parser.add_argument(
        "--contributors", help="names, separated by commas (default: git's user.name, or your account)"
    )
    parser.add_argument("--track", help="default: the one that these runs fit")
    parser.add_argument(
        "--kind", choices=("record", "negative", "rerun"), default="record",
        help="negative: it did not help, and others should know; rerun: you confirm somebody's record",
    )  # fmt: skip
    parser.add_argument(
        "--log-url", default="", help="https address of the logs elsewhere: shown, never fetched"
    )
    parser.add_argument(
        "--data_root", default="", help="folder of the data sets (default: $DATA_ROOT, else data/)"
    )
    args = parser.read(argv)
    from tools.leaderboard import text
    from tools.leaderboard.board import open_board
    from tools.leaderboard.submission import make

    board = open_board(args.board)
    said = {
        "description": text.line_of(args.description, "--description", text.DESCRIPTION),
        "contributors": text.names_of(args.contributors or _my_name(), "--contributors"),
        "log_url": text.url_of(args.log_url, "--log-url") if args.log_url else "",
        "submitted": datetime.datetime.now(datetime.timezone.utc),
    }
    verdict, manifest = _judge(args, board.tracks, said["description"], said["submitted"], board.others())
    if verdict.accepted:
        record = board.beside(
            make(verdict.runs, verdict.result, verdict.track, args.kind, said, manifest), verdict.runs[0]
        )
        blobs = [data for run in verdict.runs for data in run.files.values()]
        path = board.add(record, [*blobs, manifest] if manifest is not None else blobs)
        verdict.name, verdict.record = record.id, record
    show(verdict)
    if verdict.accepted:
        for line in record.changed:
            print(f"  changed  {printable(line)}")
        print(f"published: {path}\nnext: engaging leaderboard build {shlex.quote(str(board.folder))}")
    return 0 if verdict.accepted else EXIT_REFUSED


def _my_name() -> str:
    """The name that git signs commits with, or the account's."""
    try:
        done = subprocess.run(["git", "config", "user.name"], capture_output=True, text=True, timeout=10)
        name = done.stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        name = ""
    return name or getpass.getuser()


def _judge(args, tracks: dict, description: str, submitted: datetime.datetime, others):
    """(verdict, bytes of the data's manifest or None) of run directories or logs as one submission."""
    from tools.leaderboard.evidence import Refused
    from tools.leaderboard.submission import MOST_RUNS
    from tools.leaderboard.verify import Verdict, expand, judge, read_runs

    paths, notes = expand(args.runs)
    if len(paths) > MOST_RUNS:
        raise UserError(f"{len(paths)} runs; at most {MOST_RUNS} make one submission")
    if len({path.resolve() for path in paths}) < len(paths):
        raise UserError("one run is named twice; name each once")
    name = ", ".join(path.name for path in args.runs[:3]) + (", ..." if len(args.runs) > 3 else "")
    try:
        runs = read_runs(paths)
    except Refused as refusal:
        track = choose(None, tracks, args.track or "track1")
        return Verdict(name, track, args.kind, [(refusal.check, str(refusal))]), None
    data, facts = manifest_of(runs[0], args.data_root)
    track = choose(runs[0], tracks, args.track, facts)
    verdict = judge(runs, track, args.kind, description, submitted, facts, others, name)
    verdict.notes += notes
    return verdict, data


def manifest_of(run, flag: str):
    """(bytes, facts) of the manifest of the data that a run was trained on; (None, None) for a foreign log."""
    from nanogpt.common.manifest import MANIFEST
    from tools.leaderboard.data_manifest import as_it_was, read_data_manifest

    if run.kind == "modded":
        return None, None
    import os

    dataset, recorded = run.config.get("dataset"), run.config.get("data_root")
    if not isinstance(dataset, str) or not dataset:
        raise UserError("config.json: dataset: missing; a record needs to say what it was trained on")
    roots = [flag] if flag else [os.environ.get("DATA_ROOT", ""), str(recorded or ""), "data"]
    folders = [Path(root).expanduser() / dataset for root in roots if root]
    for folder in folders:
        if (folder / MANIFEST).is_file():
            return as_it_was(*read_data_manifest(folder), run.record.get("data"))
    raise UserError(
        f"{folders[0] / MANIFEST}: is missing; the manifest shows which tokens were read: name the data's folder "
        "with --data_root"
    )


def choose(run, tracks: dict, wanted: str | None, facts: dict | None = None):
    """The track: the one asked for, else the one that fits the run. UserError when none does, or several do."""
    from tools.leaderboard.tracks import find

    if wanted:
        return find(wanted, tracks)
    if run.kind == "modded":
        if not any(row["unit"] == "ms" for row in run.extra["rows"]):
            return tracks["steps"]
        return tracks["medium" if run.val_loss < MEDIUM_BELOW else "track1"]
    vals = {one.get("sha256") for one in (facts or {"files": []})["files"] if one.get("split") == "val"}
    fits = [
        track for track in tracks.values()
        if (not track.entries or run.entry in track.entries) and track.val_sha256 in vals
        and (not track.recipes or run.config.get("recipe", track.recipes[0]) in track.recipes)
    ]  # fmt: skip
    if len(fits) != 1:
        names = ", ".join(track.name for track in fits or tracks.values())
        own = "" if fits else f"; or a board's own track (verify needs --board BOARD), made by: {OWN_TRACK}"
        found = "several fit" if fits else "none fits"
        raise UserError(f"--track: {found} these runs; name one of: {names}{own}")
    return fits[0]


def show(verdict) -> None:
    """Print what was checked and what came of it."""
    result, track = verdict.result, verdict.track
    where = f"{result.world_size} x {result.gpu}" if result and result.gpu else "hardware that nothing names"
    what = f", {result.runs} run{'s' * (result.runs != 1)} on {where}" if result else ""
    print(printable(f"{verdict.name}: {track.name}{what}"))
    for title in verdict.passed:
        print(f"  ok       {title}")
    for _, reason in verdict.problems:
        print(f"  REFUSED  {printable(reason)}")
    for note in verdict.notes:
        print(f"  note     {printable(note)}")
    if verdict.accepted:
        figure = f"{result.steps} steps" if track.metric == "steps" else f"{result.mean_seconds:.2f} s"
        as_what = {"negative": " as a negative result", "rerun": " as a re-run"}.get(verdict.kind, "")
        foreign = verdict.runs[0].kind == "modded"
        word = "plausible" if verdict.waived else f"accepted{as_what}"
        standing = (
            "\nplausible, not verified: its arithmetic holds, where it comes from cannot be checked"
            if foreign
            else ""
        )
        print(printable(f"{word}: {figure}; {result.said}") + standing)
    else:
        more = len(verdict.problems) - 1
        print(printable(f"refused: {verdict.problems[0][1]}") + (f" (and {more} more)" if more else ""))


def verify(argv: list[str]) -> int:
    """Check a board, records of one, run directories or foreign logs."""
    parser = Parser("leaderboard verify", "Check without trusting; nothing is published.")
    parser.add_argument(
        "runs", type=Path, nargs="+", metavar="WHAT", help="a board, its records, runs, or logs"
    )
    parser.add_argument("--track", help="default: the one that the runs fit")
    parser.add_argument("--kind", choices=("record", "negative", "rerun"), default="record")
    parser.add_argument("--board", type=Path, help="compare with this board's records, and know its tracks")
    parser.add_argument(
        "--data_root", default="", help="folder of the data sets (default: $DATA_ROOT, else data/)"
    )
    args = parser.read(argv)
    records = [path for path in args.runs if path.suffix == ".json"]
    boards = [path for path in args.runs if path.is_dir() and _is_board(path)]
    if records or boards:
        if len(records) + len(boards) != len(args.runs) or len({_home(p) for p in records} | set(boards)) > 1:
            raise UserError("verify: name one board, or records of one board, or the runs of one submission")
        return _verify_board(boards[0] if boards else _home(records[0]), records)
    from tools.leaderboard.board import open_board
    from tools.leaderboard.group_checks import Others
    from tools.leaderboard.tracks import BUILT_IN

    tracks, others = BUILT_IN, Others.none()
    if args.board:
        board = open_board(args.board)
        tracks, others = board.tracks, board.others()
    now = datetime.datetime.now(datetime.timezone.utc)
    verdict, _ = _judge(args, tracks, "a check before handing in", now, others)
    verdict.look_only()
    show(verdict)
    return 0 if verdict.accepted else EXIT_REFUSED


def _is_board(path: Path) -> bool:
    from tools.leaderboard.board import is_board

    return is_board(path)


def _home(record: Path) -> Path:
    """The board that a record's file lies on."""
    return record.absolute().parent.parent


def _verify_board(folder: Path, only: list[Path]) -> int:
    """Every record of the board, or those named; the worst exit status."""
    from tools.leaderboard.board import open_board

    wanted, status, count = {path.name for path in only}, 0, 0
    missing = [path for path in only if not path.is_file()]
    if missing:
        raise UserError(f"{missing[0]}: is missing; expected a record of a board")
    for path, verdict in open_board(folder).verdicts():
        if wanted and path.name not in wanted:
            continue
        count += 1
        if isinstance(verdict, CommandError):
            if len(wanted) == 1:
                raise verdict
            print(f"{path.name}: malformed: {printable(str(verdict))}")
            status = 2
            continue
        show(verdict)
        status = max(status, 0 if verdict.accepted else EXIT_REFUSED)
    print(f"{count} record{'s' * (count != 1)} checked")
    return status


def build(argv: list[str]) -> int:
    """The static page."""
    parser = Parser("leaderboard build", "Verify every record and write the page.")
    parser.add_argument("board", type=Path, help="the board's folder")
    parser.add_argument("--out", type=Path, help="where to (default: BOARD/site)")
    parser.add_argument(
        "--jekyll", type=name_of("--jekyll"), metavar="LAYOUT",
        help="pages for a Jekyll site, in its layout of this name, such as page",
    )  # fmt: skip
    args = parser.read(argv)
    from tools.leaderboard.board import open_board
    from tools.leaderboard.pages import build_site

    board = open_board(args.board)
    out = args.out or board.folder / "site"
    shown, left_out = build_site(board, out, args.jekyll or "")
    for name, reason in left_out:
        print(f"left out  {printable(name)}: {printable(reason)}")
    print(f"{shown} record{'s' * (shown != 1)} on {out / 'index.html'}")
    print_fetch_line(out)
    return 0


def fetch(argv: list[str]) -> int:
    """Write a record's evidence to a new folder."""
    parser = Parser("leaderboard fetch", "A record's logs and metrics, as run directories.")
    parser.add_argument("board", type=Path, help="the board's folder")
    parser.add_argument("id", type=name_of("ID"), help="the record")
    parser.add_argument("folder", type=Path, help="where to; must be new")
    args = parser.read(argv)
    from nanogpt.common.storage import storage_errors
    from tools.leaderboard.board import open_board
    from tools.leaderboard.evidence import Refused

    board = open_board(args.board)
    record = board.record_named(args.id)
    if args.folder.exists() or args.folder.is_symlink():
        raise UserError(f"{args.folder}: exists already; name a new folder")
    try:
        with storage_errors(args.folder):
            args.folder.mkdir(parents=True)
            paths, _ = board.unpack(record, args.folder)
    except Refused as refusal:
        raise UserError(f"{args.id}: {refusal}") from None
    print(f"{len(paths)} runs in {args.folder}; nothing of them was run")
    if len(record.runs[0].files) > 1:
        print(f"run it again: engaging repro {paths[0] / 'log.txt'} --data_root=DATA")
    return 0
