"""The source text of Python's own standard library, one token a character: text that every machine has.

    python nanogpt/data/python_source/prepare.py

What `make quickstart` trains on where there is no network. About 4 MB; whole files go to training or to
validation. The same Python gives the same tokens; the manifest says which Python it was.
"""

import hashlib
import platform
import re
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

if __package__ in (None, ""):
    sys.path[0] = str(
        Path(__file__).resolve().parents[3]
    )  # the repository root, so that `import nanogpt` works

from nanogpt.common.errors import GOES_ON, UserError, run_command
from nanogpt.common.flags import knob, parse

NAME = "python_source"
CHARS = "\t\n" + "".join(chr(code) for code in range(32, 127))
REPLACEMENT = "?"
CAP_CHARS = 4_000_000
LARGEST_FILE = 200_000  # longer ones are tables
# Tests, tables, what pip installed, and what configure wrote for this very machine.
SKIPPED = {"test", "tests", "idle_test", "encodings", "site-packages", "dist-packages", "__pycache__"}
SKIPPED_FILE = re.compile(r"_sysconfigdata_.*|__phello__.*")


@dataclass(frozen=True)
class Config:
    """The command line."""

    data_root: str = knob("", "folder that holds the token sets (default $DATA_ROOT, else data/)")


def library_files(folder: Path) -> dict[str, str]:
    """Path in `folder` -> text, sorted, about CAP_CHARS together, picked by a hash of the path."""
    paths = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*.py")}
    wanted = [
        name
        for name, path in paths.items()
        if not SKIPPED & set(Path(name).parts) and not SKIPPED_FILE.match(path.name)
    ]
    wanted.sort(key=lambda name: hashlib.sha256(name.encode()).digest())
    texts: dict[str, str] = {}
    room = CAP_CHARS
    for name in wanted:
        try:
            text = paths[name].read_text(encoding="utf-8")
        except (OSError, ValueError):
            continue
        if 0 < len(text) <= min(room, LARGEST_FILE):
            texts[name] = text
            room -= len(text)
    return dict(sorted(texts.items()))


def split_files(texts: dict[str, str]) -> dict[str, str]:
    """Nine tenths of the characters for training, by whole files; every part of the library is in both."""
    splits: dict[str, list[str]] = {"train": [], "val": []}
    total = held = 0
    for text in texts.values():
        total += len(text)
        validate = held + len(text) <= total / 10
        held += len(text) * validate
        splits["val" if validate else "train"].append(text)
    return {split: only_known("\n".join(parts)) for split, parts in splits.items()}


def only_known(text: str) -> str:
    """`text` with a question mark for every character outside CHARS."""
    return re.sub(f"[^{re.escape(CHARS)}]", REPLACEMENT, text)


def main(argv: list[str]) -> None:
    """Make the set, or say that it is there."""
    config = parse(Config, argv, prog=f"nanogpt/data/{NAME}/prepare.py", description=__doc__)
    from nanogpt.common.shards import TokenSet, data_root
    from nanogpt.data import small_sets

    root = data_root(config.data_root)

    def make() -> TokenSet:
        folder = Path(sysconfig.get_paths()["stdlib"])
        texts = library_files(folder)
        splits = split_files(texts)
        if min(map(len, splits.values())) < 10_000:
            raise UserError(f"{folder}: holds too little Python source; use a full installation of Python")
        digest = hashlib.sha256("\0".join(splits.values()).encode()).hexdigest()
        source = {"python": platform.python_version(), "files": len(texts), "sha256": digest}
        ids = {split: small_sets.char_ids(part, CHARS) for split, part in splits.items()}
        return small_sets.publish(NAME, root, ids, "char", len(CHARS), CHARS, source=source)

    small_sets.prepare_small(NAME, root, make)


if __name__ == "__main__":
    run_command(main, again=GOES_ON)
