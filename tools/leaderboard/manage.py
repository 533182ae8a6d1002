"""`engaging leaderboard init|track|term`, for a board's manager; `retract|correct`, for submitters too."""

import dataclasses
import shlex
from pathlib import Path

from nanogpt.common.errors import UserError
from tools.args import Parser, name_of, whole
from tools.leaderboard.command import manifest_of
from tools.runs import printable


def init(argv: list[str]) -> int:
    """A new board for a group."""
    parser = Parser("leaderboard init", "Make a board: the group reads and writes it, only owners delete.")
    parser.add_argument("board", type=Path, help="a new folder")
    parser.add_argument("--title", default="Leaderboard", help="one line")
    args = parser.read(argv)
    from tools.leaderboard import corrections

    folder = corrections.init(args.board, args.title)
    print(f"{folder}: an empty board")
    print(f"next: engaging leaderboard submit {shlex.quote(str(folder))} RUN... --description TEXT")
    return 0


def retract(argv: list[str]) -> int:
    """Withdraw a record: it stays, and is shown as withdrawn."""
    return _amend("retract", "Withdraw a record of yours, or of the board that you manage.", argv)


def correct(argv: list[str]) -> int:
    """Give a record another description."""
    return _amend(
        "correct", "Correct the description of a record of yours, or of the board that you manage.", argv
    )


def _amend(name: str, what: str, argv: list[str]) -> int:
    parser = Parser(f"leaderboard {name}", what)
    parser.add_argument("board", type=Path, help="the board's folder")
    parser.add_argument("id", type=name_of("ID"), help="the record")
    parser.add_argument("--reason", required=True, help="one line, which the page shows")
    if name == "correct":
        parser.add_argument("--description", required=True, help="what was changed, in one line")
    args = parser.read(argv)
    from tools.leaderboard import corrections
    from tools.leaderboard.board import open_board

    board = open_board(args.board)
    path = corrections.write(board, args.id, args.reason, getattr(args, "description", ""))
    print(f"written: {path}\nnext: engaging leaderboard build {shlex.quote(str(args.board))}")
    return 0


def track(argv: list[str]) -> int:
    """Give a board a track of its own: what a run was trained and validated on, and a target."""
    parser = Parser(
        "leaderboard track", "A board's own track, from a run of the recipe that everybody starts from."
    )
    parser.add_argument("board", type=Path, help="the board's folder; made when it is not there")
    parser.add_argument("run", type=Path, help="a finished run of the template")
    parser.add_argument("--name", required=True, type=name_of("--name"))
    parser.add_argument("--title", required=True, help="one line")
    parser.add_argument("--target", required=True, help="validation loss to reach, nats a token")
    parser.add_argument("--metric", choices=("seconds", "steps"), default="seconds")
    parser.add_argument("--test", choices=("t", "mean"), default="t", help="mean: no test; for practice")
    parser.add_argument("--min-runs", type=whole("--min-runs", 1, 100), default=2)
    parser.add_argument("--board-title", help="the board's name")
    parser.add_argument(
        "--data_root", default="", help="folder of the data sets (default: $DATA_ROOT, else data/)"
    )
    args = parser.read(argv)
    from tools.leaderboard import text
    from tools.leaderboard.board import add_track
    from tools.leaderboard.evidence import Refused, read_run_directory
    from tools.leaderboard.group_checks import recipe_digest
    from tools.leaderboard.tracks import Track

    try:
        run = read_run_directory(args.run, "the run")
    except Refused as refusal:
        raise UserError(f"{args.run}: {refusal}") from None
    _, facts = manifest_of(run, args.data_root)
    vals = [one for one in facts["files"] if one["split"] == "val"]
    if len(vals) != 1 or not run.val_tokens:
        raise UserError(
            f"{args.run}: needs one validation file, and a log that says how many of its tokens are read"
        )
    try:
        target = float(args.target)
    except ValueError:
        target = float("nan")
    if not 0 < target < 100:
        raise UserError(f"--target={printable(args.target)[:40]}: expected a loss in nats, such as 3.28")
    new = Track(
        name=args.name, title=text.line_of(args.title, "--title", 80), target=target, metric=args.metric,
        test=args.test, val_sha256=vals[0]["sha256"], val_tokens=run.val_tokens, vocab_size=facts["vocab_size"],
        min_runs=args.min_runs, entries=(run.entry,), template=(run.source_sha256, recipe_digest(run)),
    )  # fmt: skip
    board = add_track(
        args.board, args.board_title and text.line_of(args.board_title, "--board-title", 80), new
    )
    print(
        f"{board.folder}: track {new.name}: loss {new.target:g} on {new.val_tokens:,} tokens of {vals[0]['name']}"
    )
    print(
        ", ".join(
            f"{name}={value}" for name, value in dataclasses.asdict(new).items() if name in ("metric", "test")
        )
    )
    print(f"next: engaging leaderboard submit {shlex.quote(str(board.folder))} RUN... --description TEXT")
    return 0


def term(argv: list[str]) -> int:
    """A tab for a term of a course."""
    parser = Parser("leaderboard term", "A tab for what is handed in from a day on, until the next term's.")
    parser.add_argument("board", type=Path, help="the board's folder")
    parser.add_argument("name", help="such as: Fall 2026")
    parser.add_argument("--from", dest="first", required=True, metavar="DAY", help="such as 2026-09-01")
    args = parser.read(argv)
    from tools.leaderboard import text
    from tools.leaderboard.board import Term, add_term, day_of

    made = Term(text.line_of(args.name, "NAME", 40), day_of(args.first, "--from"))
    board = add_term(args.board, made)
    for one in board.terms:
        print(f"from {one.first}: {printable(one.name)}")
    print(f"next: engaging leaderboard build {shlex.quote(str(args.board))}")
    return 0
