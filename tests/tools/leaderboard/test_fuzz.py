"""Random damage to honest submissions: an answer each time, never a traceback, and never a better result."""

import contextlib
import io
import json
import random
from pathlib import Path

import board_kit as kit
import pytest

from nanogpt.common.errors import CommandError
from tools.leaderboard import command

VALUES = (
    None, True, False, 0, -1, 1, 7.5, 1e300, 10**17, 2**63, "", "x", "1e400", "\u202e", [], {}, [1], {"a": 1},
    ["x"] * 3,
)  # fmt: skip


def swap_a_value(value: object, noise: random.Random) -> object:
    """`value` with one of its parts replaced by something else, or gone."""
    if isinstance(value, dict) and value and noise.random() < 0.9:
        name = noise.choice(sorted(value))
        if noise.random() < 0.15:
            return {key: one for key, one in value.items() if key != name}
        return {**value, name: swap_a_value(value[name], noise)}
    if isinstance(value, list) and value and noise.random() < 0.9:
        place = noise.randrange(len(value))
        return [*value[:place], swap_a_value(value[place], noise), *value[place + 1 :]]
    return noise.choice(VALUES)


def damage(path: Path, noise: random.Random) -> None:
    """One JSON value swapped, or a few bytes changed, removed or repeated."""
    data = path.read_bytes()
    if path.suffix in (".json", ".jsonl") and noise.random() < 0.75:
        lines = data.decode().splitlines() if path.suffix == ".jsonl" else [data.decode()]
        place = noise.randrange(len(lines))
        lines[place] = json.dumps(swap_a_value(json.loads(lines[place]), noise))
        path.write_text("\n".join([*lines, ""]))
        return
    place, length = noise.randrange(len(data)), noise.randrange(1, 40)
    middle = noise.choice(
        [b"", data[place : place + length] * 2, bytes(noise.randrange(256) for _ in range(length))]
    )
    path.write_bytes(data[:place] + middle + data[place + length :])


def answer(words: list[str]) -> int:
    """The exit status; anything but a verdict or a CommandError is a fault of ours and raises."""
    with contextlib.redirect_stdout(io.StringIO()):
        try:
            return command.main(words)
        except CommandError as error:
            assert "\n" not in str(error)
            return error.exit_code


@pytest.mark.parametrize("seed", range(3))
def test_damaged_runs(seed: int, tmp_path: Path) -> None:
    noise = random.Random(seed)
    paths, data = kit.write_all(kit.seeds(2, steps=20), tmp_path)
    words = ["verify", *map(str, paths), f"--data_root={data}", "--track=track1", "--kind=negative"]
    assert answer(words) == 0
    files = [path for path in [*paths[1].iterdir(), data / "fineweb10B/manifest.json"] if path.is_file()]
    found = set()
    for _ in range(60):
        path = noise.choice(files)
        kept = path.read_bytes()
        damage(path, noise)
        found.add(answer(words))
        path.write_bytes(kept)
    assert found <= {0, 1, 2} and {1, 2} <= found


def test_damaged_records(tmp_path: Path) -> None:
    noise = random.Random(7)
    paths, data = kit.write_all(kit.seeds(2, steps=20), tmp_path)
    board = tmp_path / "board"
    board.mkdir()
    words = [
        "submit",
        str(board),
        *map(str, paths),
        f"--data_root={data}",
        "--kind=negative",
        "--contributors=A",
    ]
    assert answer([*words, "--description=Smear over two tokens"]) == 0
    (record,) = (board / "records").iterdir()
    kept = record.read_bytes()
    found = set()
    for _ in range(60):
        damage(record, noise)
        found.add(answer(["verify", str(record)]))
        record.write_bytes(kept)
    assert found <= {0, 1, 2} and 2 in found


def test_damaged_foreign_logs(tmp_path: Path) -> None:
    noise = random.Random(8)
    paths = [tmp_path / f"{seed}.txt" for seed in (1, 2, 3)]
    for seed, path in enumerate(paths, 1):
        path.write_text(kit.modded_log(seed, final=3.2765 + seed * 2e-4))
    kept = paths[1].read_bytes()
    found = set()
    for _ in range(60):
        damage(paths[1], noise)
        found.add(answer(["verify", *map(str, paths)]))
        paths[1].write_bytes(kept)
    assert found <= {0, 1, 2} and {1, 2} <= found
