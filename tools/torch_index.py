"""Asks a package index, once and for five seconds at most, whether it has the pinned torch: before pip loads anything.

An index that says no is refused. One that does not answer, or wants a password, is left to pip, which says so itself.
"""

import re
import threading
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

from nanogpt.common.errors import UserError

PATIENCE_S = 5.0


def answer(index: str, patience_s: float) -> str | None:
    """The index's page about torch; "" when it has none, None when it does not say."""
    pages: list[str | None] = [None]

    def fetch() -> None:
        url = f"{index.rstrip('/')}/torch/"
        try:
            if url.startswith("file:"):
                folder = Path(urllib.request.url2pathname(urllib.parse.urlsplit(url).path))
                names = " ".join(path.name for path in folder.iterdir()) if folder.is_dir() else ""
                page = folder / "index.html"
                pages[0] = names + (page.read_text(encoding="utf-8") if page.is_file() else "")
                return
            with urllib.request.urlopen(url, timeout=patience_s) as reply:
                pages[0] = reply.read().decode("utf-8", "replace")
        except urllib.error.HTTPError as error:
            pages[0] = "" if error.code == 404 else None
        except (OSError, ValueError):
            pages[0] = None

    asking = threading.Thread(
        target=fetch, daemon=True
    )  # looking up a name may take longer than any time-out
    asking.start()
    asking.join(patience_s)
    return pages[0]


def check(index: str, version: str, builds: str) -> str:
    """A note when the index did not answer, else "".

    `builds` are PyTorch's own indices with `version` and the NVIDIA driver that each needs, as
    "https://.../cu130=580 https://.../cpu=". UserError when the index answers and does not have the version.
    """
    page = answer(index, PATIENCE_S)
    if page is None:
        return f"{index} does not answer within {PATIENCE_S:.0f} s; pip asks it again"
    found = set(re.findall(r"torch-(\d+(?:\.\d+)+)(?:\+[\w.]+)?-", urllib.parse.unquote(page)))
    if version in found:
        return ""
    newest = max(found, key=lambda text: tuple(map(int, text.split("."))), default="")
    rows = [build.rpartition("=") for build in builds.split()]
    others = [f"{url} ({f'NVIDIA driver {driver} or newer' if driver else 'CPU'})" for url, _, driver in rows]
    has = f"its newest is {newest}" if newest else "it has none at all"
    raise UserError(
        f"TORCH_INDEX_URL: {index}: no torch {version} ({has}); these have it: {', '.join(others)}"
    )
