"""FineWeb's first tokens as the speedrun uses them: shards of 100 M GPT-2 tokens, downloaded and verified.

    python modded_nanogpt/data/cached_fineweb10B.py          # 1 validation shard and 9 for training: 2 GB
    python modded_nanogpt/data/cached_fineweb10B.py 3        # 3 for training
    python modded_nanogpt/data/cached_fineweb10B.py 103      # all
    python modded_nanogpt/data/cached_fineweb10B.py 20 --set=fineweb100B      # or finewebedu10B

They come from kjj0's data sets on the Hugging Face hub (fineweb10B-gpt2 and the like) and go to $DATA_ROOT/<set>. Each
file is checked against the SHA-256 that the hub states, and again by every later call and by the trainer; interrupted,
the next call goes on; several may run at once. A complete set in somebody else's folder is used as it is: nothing is
written there, and what was checked is remembered in ~/.cache/engaging-nanogpt. HF_ENDPOINT names a mirror; with
HF_HUB_OFFLINE=1 what is on the disk is checked and nothing is fetched.
"""

import contextlib
import json
import os
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

if __package__ in (None, ""):
    sys.path[0] = str(
        Path(__file__).resolve().parents[2]
    )  # the repository root, so that `import nanogpt` works

from nanogpt.common.errors import GOES_ON, UserError, run_command
from nanogpt.common.flags import knob, parse

PROG = "modded_nanogpt/data/cached_fineweb10B.py"
VOCABULARY, END_OF_TEXT = 50257, 50256
RETRIES = 4


@dataclass(frozen=True)
class Published:
    """A token set on the hub: its repository, what its files are called, how many training shards there are."""

    repository: str
    prefix: str
    chunks: int


SETS = {
    "fineweb10B": Published("kjj0/fineweb10B-gpt2", "fineweb", 103),
    "fineweb100B": Published("kjj0/fineweb100B-gpt2", "fineweb", 1030),
    "finewebedu10B": Published("kjj0/finewebedu10B-gpt2", "finewebedu", 99),
}


@dataclass(frozen=True)
class Config:
    """The command line."""

    chunks: int = knob(9, "training shards, of 100 million tokens each", low=1)
    set: str = knob("fineweb10B", "which token set", choices=tuple(SETS))
    data_root: str = knob("", "folder that holds the token sets (default $DATA_ROOT, else data/)")
    parallel: int = knob(4, "files downloaded at a time", low=1, high=32)

    def __post_init__(self) -> None:
        """No more shards than there are: UserError with one line."""
        if self.chunks > SETS[self.set].chunks:
            raise UserError(
                f"--chunks={self.chunks}: must be at most {SETS[self.set].chunks} for --set={self.set}"
            )


def main(argv: list[str]) -> None:
    """Download what is missing, check everything, write the manifest."""
    if argv and not argv[0].startswith("-"):  # the number alone, as the original script takes it
        argv = [f"--chunks={argv[0]}", *argv[1:]]
    config = parse(Config, argv, prog=PROG, description=__doc__)
    from nanogpt.common.download import remove_abandoned
    from nanogpt.common.shards import data_root
    from nanogpt.common.storage import check_room, make_folder

    published = SETS[config.set]
    folder = data_root(config.data_root) / config.set
    make_folder(folder)
    names = [f"{published.prefix}_val_000000.bin"]
    names += [f"{published.prefix}_train_{number:06d}.bin" for number in range(1, config.chunks + 1)]
    known = known_entries(folder)
    if offline() or all(is_whole(folder, name, known) for name in names):
        missing = [name for name in names if not is_whole(folder, name, known)]
        if missing:
            raise UserError(
                f"{folder}: {', '.join(missing[:3])}: not there or not whole ({len(missing)} of {len(names)} files), "
                "and HF_HUB_OFFLINE forbids to fetch; unset it, or run this where there is a network"
            )
        for name in names:
            remove_abandoned(folder / name)
        print(f"{config.set}: {len(names)} files are there, in {folder}{how_to_get_all(config)}")
        return
    facts = ask_hub(published.repository, names, config.parallel)
    if os.access(folder, os.W_OK):
        needed = sum(fact.size for name, fact in facts.items() if not (folder / name).exists())
        check_room(folder, needed)
        fetch_all(folder, facts, config.parallel)
        publish(folder, published.repository, facts)
    else:
        use_as_it_is(folder, facts)
    tokens = sum((fact.size - 1024) // 2 for fact in facts.values())
    print(
        f"{config.set}: {len(names)} files, {tokens:,} tokens, verified, in {folder}{how_to_get_all(config)}"
    )


def how_to_get_all(config: Config) -> str:
    """The end of the last line: the command for the whole set, where this was not it."""
    everything = SETS[config.set].chunks
    if config.chunks >= everything:
        return ""
    named = "" if config.set == "fineweb10B" else f" --set={config.set}"
    return f"; all {everything} shards: python {PROG} {everything}{named}"


def use_as_it_is(folder: Path, facts: dict[str, "Fact"]) -> None:
    """Somebody else's folder without a manifest for these files: they must be there. UserError names what is not."""
    wrong = [
        name
        for name, fact in facts.items()
        if not is_whole(folder, name, {name: {"bytes": fact.size, "sha256": fact.sha256}})
    ]
    if wrong:
        raise UserError(
            f"{folder}: {', '.join(wrong[:3])}: not there or not whole ({len(wrong)} of {len(facts)} files), and "
            "you may not write there; ask its owner to run this, or set DATA_ROOT to a folder of yours"
        )


@dataclass(frozen=True)
class Fact:
    """What the hub says about a file: its address at a fixed commit, its SHA-256, its size in bytes."""

    url: str
    sha256: str
    size: int
    commit: str


def offline() -> bool:
    """Whether HF_HUB_OFFLINE forbids the network."""
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")


def known_entries(folder: Path) -> dict[str, dict]:
    """The files that a manifest already vouches for: name to entry; none when it is missing or unreadable."""
    from dataclasses import asdict

    from nanogpt.common.manifest import read_manifest

    try:
        return {entry.name: asdict(entry) for entry in read_manifest(folder).files}
    except UserError:
        return {}


def is_whole(folder: Path, name: str, known: dict[str, dict]) -> bool:
    """Whether the file is there with the content that the manifest states."""
    path, entry = folder / name, known.get(name)
    if entry is None or not path.is_file() or path.stat().st_size != entry["bytes"]:
        return False
    return content_digest(path) == entry["sha256"]


def content_digest(path: Path) -> str:
    """SHA-256 (hex) of a file. Where this user may not write, it is remembered until the file changes."""

    from nanogpt.common.storage import StorageError, atomic_write_json, make_folder, sha256_of

    state, key = path.stat(), str(path.resolve())
    cache = (
        Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
        / "engaging-nanogpt"
        / "verified.json"
    )
    foreign = not os.access(path.parent, os.W_OK)
    stamp = [state.st_size, state.st_mtime_ns, state.st_ino]
    remembered: dict[str, list] = {}
    if foreign:
        try:
            remembered = dict(json.loads(cache.read_text()))
        except (OSError, ValueError, TypeError):
            remembered = {}  # none yet, or one that is of no use: it is made anew
        if remembered.get(key, [])[:3] == stamp:
            return str(remembered[key][3])
    with path.open("rb") as file:
        digest = sha256_of(file)
    if foreign:
        try:
            make_folder(cache.parent)
            atomic_write_json(cache, {**remembered, key: [*stamp, digest]})
        except StorageError as error:
            print(f"warning: {error}; it is checked again next time", file=sys.stderr)
    return digest


def ask_hub(repository: str, names: list[str], parallel: int) -> dict[str, Fact]:
    """Size and SHA-256 of each file, all of one commit of the repository."""
    first = _fact(repository, names[0], None)
    with ThreadPoolExecutor(parallel) as pool:
        rest = pool.map(lambda name: _fact(repository, name, first.commit), names[1:])
        return {names[0]: first, **dict(zip(names[1:], rest, strict=True))}


def fetch_all(folder: Path, facts: dict[str, Fact], parallel: int) -> None:
    """Every file to its place, verified. The first failure or an interruption ends it; what has come stays."""
    from nanogpt.common.download import fetch
    from nanogpt.common.progress import Progress

    done, lock, total = dict.fromkeys(facts, 0), threading.Lock(), sum(fact.size for fact in facts.values())
    ending = threading.Event()
    with Progress("downloading FineWeb") as bar, ThreadPoolExecutor(parallel) as pool:

        def one(name: str) -> None:
            def progress(count: int, _: int | None) -> None:
                if ending.is_set():
                    raise KeyboardInterrupt
                with lock:
                    done[name] = count
                    bar.update(sum(done.values()), total)

            fetch(facts[name].url, folder / name, facts[name].sha256, facts[name].size, progress=progress)
            progress(facts[name].size, None)

        waiting = [pool.submit(one, name) for name in facts]
        try:
            for job in waiting:
                job.result()
        except BaseException:
            ending.set()  # the other downloads break off at their next piece
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def publish(folder: Path, repository: str, facts: dict[str, Fact]) -> None:
    """The manifest: these files, and what another call has added to it meanwhile."""
    from nanogpt.common.manifest import write_manifest
    from nanogpt.common.shards import read_header

    entries = {name: entry for name, entry in known_entries(folder).items() if (folder / name).is_file()}
    for name, fact in facts.items():
        entries[name] = {
            "name": name,
            "split": "val" if "_val_" in name else "train",
            "tokens": read_header(folder / name),
            "bytes": fact.size,
            "sha256": fact.sha256,
        }
    ordered = [entries[name] for name in sorted(entries)]
    commit = next(iter(facts.values())).commit
    source = {"repository": repository, "commit": commit}
    write_manifest(folder, folder.name, "gpt2", VOCABULARY, END_OF_TEXT, ordered, source=source)
    for path, bits in ((folder, 0o050), (folder / "manifest.json", 0o040)):
        with contextlib.suppress(PermissionError):  # another member of the group has made it
            path.chmod(path.stat().st_mode | bits)  # the group may use it, whatever the umask


def _fact(repository: str, name: str, commit: str | None) -> Fact:
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import HfHubHTTPError

    from nanogpt.common.download import DownloadError

    endpoint = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    url = hf_hub_url(repository, name, repo_type="dataset", revision=commit)
    for attempt in range(RETRIES):
        try:
            found = get_hf_file_metadata(url, token=False)
            break
        except HfHubHTTPError as error:
            status = error.response.status_code if error.response is not None else 0
            if status in (401, 403, 404):
                raise DownloadError(
                    f"{endpoint}: {repository}/{name}: answered {status}; is HF_ENDPOINT right?"
                ) from None
            reason = f"answered {status}"
        except OSError as error:
            reason = str(error)[:200] or type(error).__name__
        except Exception as error:  # the HTTP client's own errors; its class changes with the hub's version
            if type(error).__module__.partition(".")[0] not in (
                "httpx",
                "httpx2",
                "httpcore",
                "requests",
                "urllib3",
            ):
                raise
            reason = str(error)[:200] or type(error).__name__
        if attempt + 1 < RETRIES:
            time.sleep(0.5 * 2**attempt)
    else:
        raise DownloadError(f"{endpoint}: {repository}/{name}: {reason}; check the network, or HF_ENDPOINT")
    digest = found.etag or ""
    if len(digest) != 64 or not set(digest) <= set("0123456789abcdef") or found.size is None:
        raise DownloadError(
            f"{endpoint}: {repository}/{name}: states no SHA-256 and size, so it cannot be verified"
        )
    fixed = hf_hub_url(repository, name, repo_type="dataset", revision=found.commit_hash or commit)
    return Fact(fixed, digest, found.size, found.commit_hash or commit or "main")


if __name__ == "__main__":
    run_command(main, again=GOES_ON)
