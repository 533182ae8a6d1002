"""The GPT-2 byte-pair vocabulary, fetched once, checksums pinned: from then on tiktoken needs no network."""

import hashlib
import os
import typing
from pathlib import Path

from nanogpt.common.download import DownloadError, fetch, shown
from nanogpt.common.errors import UserError
from nanogpt.common.progress import Progress
from nanogpt.common.storage import make_folder

if typing.TYPE_CHECKING:
    import tiktoken

# tiktoken keeps a downloaded file under the SHA-1 of its address, and checks the same SHA-256 on reading.
ADDRESS = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"
FILES = {
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
}


def gpt2_encoding(root: Path) -> "tiktoken.Encoding":
    """tiktoken's "gpt2" encoding; its files are kept in $TIKTOKEN_CACHE_DIR, else in `root`/tiktoken_cache.

    DATA_MIRROR, a folder or a base URL, is asked for tiktoken_cache/<name as tiktoken keeps it> instead of
    OpenAI's server. Raises DownloadError or UserError with what to do when the files cannot be had.
    """
    paths = cached_files(root)
    for name, sha256 in FILES.items():
        _fetch_file(paths[name], name, sha256)
    os.environ["TIKTOKEN_CACHE_DIR"] = str(paths["vocab.bpe"].parent)
    import tiktoken

    return tiktoken.get_encoding("gpt2")


def cached_files(root: Path) -> dict[str, Path]:
    """Where the files of FILES are kept, whether they are there or not."""
    cache = Path(os.environ.get("TIKTOKEN_CACHE_DIR") or root / "tiktoken_cache").expanduser().absolute()
    return {name: cache / hashlib.sha1((ADDRESS + name).encode()).hexdigest() for name in FILES}


def _fetch_file(destination: Path, name: str, sha256: str) -> None:
    if not destination.exists():
        make_folder(destination.parent)
    mirror = os.environ.get("DATA_MIRROR", "").rstrip("/")
    source = ADDRESS + name
    if mirror and "://" in mirror:
        source = f"{mirror}/tiktoken_cache/{destination.name}"
    elif mirror and (Path(mirror) / "tiktoken_cache" / destination.name).is_file():
        source = str(Path(mirror) / "tiktoken_cache" / destination.name)
    try:
        with Progress(f"downloading {name}") as bar:
            fetch(source, destination, sha256, progress=bar.update, attempts=3, backoff=0.5)
    except (DownloadError, UserError) as error:
        raise type(error)(
            f"the GPT-2 vocabulary ({name}) cannot be had: {_reason(error)}; run this command once where there "
            f"is a network (on a cluster: the login node), or copy tiktoken's file {destination.name} from "
            f"another machine into {destination.parent}, or into tiktoken_cache/ of a folder that DATA_MIRROR names"
            + (f" (asked: {shown(source)})" if mirror else "")
        ) from None


def _reason(error: Exception) -> str:
    """What went wrong, without the general remedy: this file has its own."""
    return str(error).split("; ")[0]
