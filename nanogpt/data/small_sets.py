"""What the small sets share: tiny Shakespeare, ids for characters, publishing, and `already prepared`."""

import contextlib
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np

from nanogpt.common.download import fetch
from nanogpt.common.errors import UserError
from nanogpt.common.manifest import MANIFEST, META, chars_digest
from nanogpt.common.progress import Progress
from nanogpt.common.shards import TokenSet, open_token_set, verify, write_manifest, write_shard
from nanogpt.common.storage import atomic_write_json, make_folder

SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
SHAKESPEARE_BYTES = 1_115_394
MIRROR_NAMES = ("tinyshakespeare.txt", "input.txt")


def shakespeare_text(root: Path) -> str:
    """Tiny Shakespeare, 1,115,394 characters, kept in `root`/downloads; from DATA_MIRROR when that is set."""
    path = root / "downloads" / "tinyshakespeare.txt"
    with Progress("downloading tiny Shakespeare") as bar:
        fetch(
            _shakespeare_source(path),
            path,
            SHAKESPEARE_SHA256,
            SHAKESPEARE_BYTES,
            progress=bar.update,
            attempts=3,
        )
    return path.read_text(encoding="utf-8")


def _shakespeare_source(path: Path) -> str:
    mirror = os.environ.get("DATA_MIRROR", "")
    if not mirror:
        return SHAKESPEARE_URL
    if "://" in mirror:
        return f"{mirror.rstrip('/')}/{MIRROR_NAMES[0]}"
    candidates = [Path(mirror).expanduser() / name for name in MIRROR_NAMES]
    for candidate in candidates:
        if candidate.is_file():
            return str(candidate)
    if path.exists():
        return SHAKESPEARE_URL  # what is there is checked, and wins when it is right
    raise UserError(f"DATA_MIRROR={mirror}: holds neither {' nor '.join(MIRROR_NAMES)}; put the text there")


def split_90_10(text: str) -> dict[str, str]:
    """nanoGPT's split: the first nine tenths of the characters train."""
    at = int(len(text) * 0.9)
    return {"train": text[:at], "val": text[at:]}


def char_ids(text: str, chars: str) -> np.ndarray:
    """Ids uint16 [len(text)]: the place of each character in `chars`, which are sorted and complete."""
    points = np.frombuffer(text.encode("utf-32-le"), dtype="<u4")
    known = np.array([ord(char) for char in chars], dtype=np.uint32)
    ids = np.searchsorted(known, points).astype(np.uint16)
    if not np.array_equal(known[np.minimum(ids, len(chars) - 1)], points):
        raise ValueError("the text holds a character that is not in the alphabet")
    return ids


def ready(name: str, root: Path) -> TokenSet | None:
    """The set when it is there and every byte is right. A damaged one is named, to be made again."""
    if not (root / name / MANIFEST).exists():
        return None
    try:
        found = open_token_set(name, root)
        with Progress(f"verifying {name}") as bar:
            verify(found, progress=bar.update)
    except UserError as error:
        print(f"{error}\nmaking it again", flush=True)
        return None
    return found


def publish(
    name: str,
    root: Path,
    splits: dict[str, np.ndarray],
    tokenizer: str,
    vocab_size: int,
    chars: str | None = None,
    **extra: object,
) -> TokenSet:
    """Write uint16 tokens [n] for "train" and "val" as a complete set, manifest last, and open it.

    Two processes doing this at once write the same bytes, each file by a rename: either order is right.
    """
    folder = root / name
    make_folder(folder)
    files = [
        {**write_shard(folder / f"{name}_{split}_{number:06d}.bin", splits[split]), "split": split}
        for split, number in (("train", 1), ("val", 0))
    ]
    if chars is not None:
        atomic_write_json(folder / META, {"chars": chars})
        extra["chars_sha256"] = chars_digest(chars)
    write_manifest(folder, name, tokenizer, vocab_size, None, files, **extra)
    return open_token_set(name, root)


def prepare_small(name: str, root: Path, make: Callable[[], TokenSet]) -> None:
    """`make` the set unless it is there and right, and say what came of it."""
    found = ready(name, root)
    state = "already prepared and verified" if found else "prepared"
    if found is None:
        make_folder(root / name)  # a place that refuses shows before the work
        try:
            found = make()
        finally:
            with contextlib.suppress(OSError):
                (root / name).rmdir()  # only while it is empty
    print(
        f"{name}: {state}: {found.num_tokens('train'):,} training tokens, {found.num_tokens('val'):,} for "
        f"validation, vocabulary {found.vocab_size:,}, in {found.folder}"
    )
