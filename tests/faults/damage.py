"""Damaged files at seeded places: checkpoints, token shards, archives of compiled code, records of the board.

Each must be found, and the same files undamaged must pass: a check that always refuses finds everything, too.
"""

import contextlib
import io
import json
import os
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from nanogpt.common import checkpoints
from nanogpt.common.checkpoint_names import name_of, steps
from nanogpt.common.errors import CommandError, UserError
from nanogpt.common.shards import open_token_set, verify
from tests.faults import tiny
from tests.faults.campaign import Rig
from tests.faults.outcomes import Tally

KINDS = ("flipped", "cut", "zeroed", "removed", "lengthened", "swapped")
DAMAGES_PER_CLEAN_LOAD = 6


def _change(kind: str, data: bytes, other: bytes, rng: random.Random) -> bytes | None:
    """What a file of `data` holds after its damage; None: it is gone."""
    start = rng.randrange(len(data))
    if kind == "flipped":
        return data[:start] + bytes([data[start] ^ 1 << rng.randrange(8)]) + data[start + 1 :]
    if kind == "zeroed":
        return data[:start] + b"\0" * len(data[start : start + 4096]) + data[start + 4096 :]
    return {"cut": data[:start], "lengthened": data + b"\0", "swapped": other, "removed": None}[kind]


@contextlib.contextmanager
def damaged(path: Path, kind: str, other: bytes, rng: random.Random) -> Iterator[bool]:
    """The file damaged within the block; whether it now differs from what it was."""
    data = path.read_bytes()
    changed = _change(kind, data, other, rng)
    if changed is None:
        path.unlink()
    else:
        path.write_bytes(changed)
    try:
        yield changed != data
    finally:
        path.write_bytes(data)


def harm(
    tally: Tally, files: list[Path], others: list[bytes], problem: Callable[[], str], rng: random.Random,
    count: int, kinds: tuple[str, ...] = KINDS, where: Callable[[Path, str], str] = lambda path, kind: kind,
    matters: Callable[[Path], bool] = lambda path: True,
) -> Tally:  # fmt: skip
    """`count` damages, each file in turn, each to be found by `problem`; and a clean look after every few of them.

    matters: whether a file that has changed says something else than before.
    """
    number = 0
    while tally.injected < count:
        at, kind = number % len(files), kinds[number // len(files) % len(kinds)]
        path, number = files[at], number + 1
        with damaged(path, kind, others[at], rng) as differs:
            found, differs = problem(), differs and matters(path)
        if differs:
            tally.injected += 1
            tally.where[where(path, kind)] += 1
        if differs and not found:
            tally.failures.append(f"{path.name}: {kind}: not seen")
        if number % DAMAGES_PER_CLEAN_LOAD == 0:
            tally.clean += 1
            found = problem()
            tally.failures += [f"a false alarm: {found}"] if found else []
    return tally


def _checkpoint(rig: Rig) -> tuple[Path, list[Path], list[bytes]]:
    """The newest checkpoint of an undisturbed run, its files, and those of an older one."""
    folder = rig.reference(8) / "checkpoints"
    newest, older = folder / name_of(steps(folder)[-1]), folder / name_of(steps(folder)[0])
    files = sorted(newest.iterdir())
    return newest, files, [(older / path.name).read_bytes() for path in files]


def flips(rig: Rig, rng: random.Random, count: int) -> Tally:
    """One flipped bit anywhere in a checkpoint, each file as often as the others."""
    tally = Tally("one bit flipped in a checkpoint", "refused")
    folder, files, others = _checkpoint(rig)
    problem = lambda: checkpoints.problem(folder)  # noqa: E731
    return harm(tally, files, others, problem, rng, count, ("flipped",), lambda path, _: path.name)


def damages(rig: Rig, rng: random.Random, count: int) -> Tally:
    """A checkpoint's file cut, zeroed in a block, removed, lengthened, or taken from another step."""
    tally = Tally("a checkpoint's file cut, zeroed, removed, lengthened or swapped", "refused")
    folder, files, others = _checkpoint(rig)
    return harm(tally, files, others, lambda: checkpoints.problem(folder), rng, count, KINDS[1:])


def shards(rig: Rig, rng: random.Random, count: int) -> Tally:
    """A token shard damaged; opening the set, or reading it through, must name it."""
    tally = Tally(
        "a token shard flipped, cut, zeroed, removed, lengthened or swapped", "refused, by its name"
    )
    folder = rig.folder / "shards" / "tiny"
    if not folder.exists():
        tiny.make_data(folder.parent)
    files = sorted(folder.glob("*.bin"))

    def problem() -> str:
        try:
            verify(open_token_set("tiny", folder.parent))
        except UserError as error:
            return str(error)
        return ""

    return harm(tally, files, [path.read_bytes() for path in files[::-1]], problem, rng, count)


def archives(rig: Rig, rng: random.Random, count: int) -> Tally:
    """A packed compile cache damaged: left alone with a note, and nothing of it is unpacked."""
    from modded_nanogpt.compile_cache import CompileCache
    from nanogpt.common.compiler import FOLDERS

    tally = Tally("an archive of compiled code damaged", "left alone, nothing unpacked")
    root, said = rig.fresh("archives"), []
    packed, node = root / "packed", root / "node"
    with contextlib.ExitStack() as stack:
        stack.enter_context(environment({name: f"{node}/{room}" for room, name in FOLDERS.items()}))

        def fill(content: bytes) -> CompileCache:
            for room in FOLDERS:
                (node / room / "ab").mkdir(parents=True, exist_ok=True)
                (node / room / "ab" / "kernel").write_bytes(content)
            return CompileCache(packed, "e" * 12, "5" * 64, said.append)

        cache = fill(rng.randbytes(3000))
        cache.keep()
        (archive,) = packed.glob("*.tar.gz")

        def problem() -> str:
            for room in FOLDERS:
                (node / room / "ab" / "kernel").unlink(missing_ok=True)
            said.clear()
            cache.restore()
            unpacked = any((node / room / "ab" / "kernel").exists() for room in FOLDERS)
            return "" if unpacked else "; ".join(said) or "silence"

        kinds = tuple(kind for kind in KINDS if kind != "swapped")
        return harm(tally, [archive], [b""], problem, rng, count, kinds)


@contextlib.contextmanager
def environment(values: dict[str, str]) -> Iterator[None]:
    """Variables of the environment within a block."""
    old = dict(os.environ)
    os.environ.update(values)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(old)


TYPED = (
    "description",
    "contributors",
    "log_url",
    "submitted",
)  # somebody's words: nothing says what they were


def records(rig: Rig, rng: random.Random, count: int) -> Tally:
    """A record of the board or a file of its evidence damaged; `engaging leaderboard verify` must refuse it."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools" / "leaderboard"))
    import board_kit

    from tools.leaderboard import command

    tally = Tally(
        "a record of the board, or a log, metrics or configuration of its evidence, damaged", "refused"
    )
    root = rig.fresh("records")
    paths, data = board_kit.write_all(board_kit.seeds(2, steps=20), root)
    (board := root / "board").mkdir()
    words = ["submit", str(board), *map(str, paths), f"--data_root={data}", "--kind=negative"]
    _said_by(command.main, [*words, "--contributors=A", "--description=Smear over two tokens"])
    (record,) = (board / "records").iterdir()
    files = [record, *sorted((board / "evidence").rglob("*.xz"))]
    kept = _computed(record)

    def seen() -> str:
        return _said_by(command.main, ["verify", str(record)])

    others = [path.read_bytes() for path in [files[0], *files[2:], files[1]]]
    others[0] = b"{}"
    return harm(
        tally, files, others, seen, rng, count, matters=lambda path: path != record or _computed(path) != kept
    )


def _said_by(main: Callable[[list[str]], int], words: list[str]) -> str:
    """What a command said when it refused; "" when it did not."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            return (said.getvalue() or "silence") if main(words) else ""
        except CommandError as error:
            return str(error)


def _computed(record: Path) -> dict | None:
    """A record but for its typed fields; None when it is no JSON object."""
    try:
        return {key: value for key, value in json.loads(record.read_bytes()).items() if key not in TYPED}
    except (OSError, ValueError, AttributeError):
        return None
