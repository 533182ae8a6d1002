"""Downloads that end with the right bytes or with nothing: streamed, resumed, checked, published by a rename.

The bytes go to a hidden file beside the destination whose name holds host and process, so any number of
processes may fetch the same file at once without a lock (locks are a no-op or stale on cluster file systems).
Only a file whose SHA-256 is the pinned one takes the final name.
"""

import contextlib
import glob
import http.client
import os
import re
import shutil
import socket
import ssl
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from pathlib import Path

from nanogpt.common.errors import CommandError, UserError
from nanogpt.common.storage import fsync_folder, make_folder, sha256_of, storage_errors

EXIT_UNAVAILABLE = 69  # a server could not be reached or did not give the file (EX_UNAVAILABLE of sysexits.h)
CHUNK = 2**18
LARGEST = 2**36  # for a file whose size nobody stated
SLOWEST = 1024  # bytes a second, over a time-out's length: slower is a dead connection
# Another host's partial file that nobody has written to for so long may be taken over: no attempt is silent that long.
ABANDONED_SECONDS = 600.0
RELEASED = "released"  # in the place of the host: its process has given it up, anybody may go on with it
RETRY_STATUS = {408, 425, 429, 500, 502, 503, 504}

ProgressCall = Callable[[int, int | None], None]


class DownloadError(CommandError):
    """The network, a server or what it sent: nothing was published, trying later may help."""

    exit_code = EXIT_UNAVAILABLE


class _TryAgain(Exception):
    """This attempt failed in a way that the next may not; `wait` is what the server asked for, in seconds."""

    def __init__(self, reason: str, wait: float = 0.0) -> None:
        super().__init__(reason)
        self.wait = wait


def fetch(
    source: str,
    destination: Path,
    sha256: str,
    size: int | None = None,
    *,
    progress: ProgressCall | None = None,
    attempts: int = 5,
    timeout: float = 30.0,
    backoff: float = 1.0,
) -> Path:
    """Put the file `source` (http, https, or a local path) at `destination`, and return that.

    Does nothing when it is already there with this `sha256`. `size` in bytes is checked early where known.
    Connections are retried `attempts` times, `backoff` seconds apart and doubling, each going on where the
    last one stopped. DownloadError: nothing was published; UserError: a bad source; StorageError: a bad disk.
    """
    kind = scheme_of(source)
    destination = Path(destination)
    if destination.exists() and _matches(destination, sha256):
        remove_abandoned(destination)
        return destination
    make_folder(destination.parent)
    part = _own_part(destination)
    if kind == "path":
        _copy(Path(source), part, progress)
        if not _matches(part, sha256):
            _remove(part)
            raise DownloadError(
                f"{source}: not the expected content (SHA-256 {sha256[:16]}...): get it again"
            )
    else:
        _adopt_abandoned(destination, part)
        try:
            _download(source, part, sha256, size, progress, attempts, timeout, backoff)
        except BaseException:
            _release(destination, part)
            raise
    with storage_errors(destination):
        part.chmod(part.stat().st_mode | 0o040)  # a group shares its data, whatever the umask
        part.replace(destination)
        fsync_folder(destination.parent)
    remove_abandoned(destination)
    return destination


def scheme_of(source: str) -> str:
    """ "http", "https" or "path"; UserError for any other scheme."""
    match = re.match(r"([A-Za-z][A-Za-z0-9+.-]*):(?=//)", source)
    scheme = match.group(1).lower() if match else "path"
    if scheme not in ("http", "https", "path"):
        raise UserError(f"{shown(source)}: {scheme}:// is not fetched; use http://, https:// or a path")
    if scheme != "path" and not urllib.parse.urlsplit(source).hostname:
        raise UserError(f"{shown(source)}: names no host; expected http://host/path")
    return scheme


def shown(url: str) -> str:
    """The URL without a user name, password and query: fit for a message or a log."""
    if "://" not in url:
        return url
    parts = urllib.parse.urlsplit(url)
    return urllib.parse.urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def _download(
    url: str,
    part: Path,
    sha256: str,
    size: int | None,
    progress: ProgressCall | None,
    attempts: int,
    timeout: float,
    backoff: float,
) -> None:
    """Until `part` holds the content that was asked for, or the attempts are used up."""
    reason, wrong = "", 0
    failures = 0
    while failures < attempts:
        before = _length(part)
        try:
            _attempt(url, part, size, progress, timeout)
            if _matches(part, sha256):
                return
            reason, wait = _describe_wrong(part, sha256), 0.0
            _remove(part)
            if before == 0:  # a partial file from before may have been to blame, a whole answer was not
                wrong += 1
                if wrong == 2:
                    break
        except _TryAgain as error:
            reason, wait = str(error), error.wait
        # A connection that is cut again and again still gets there as long as each attempt adds a piece.
        failures = 1 if _length(part) - before > CHUNK else failures + 1
        if failures < attempts:
            _pause(min(60.0, max(wait, backoff * 2 ** (failures - 1))), part, size, progress)
    if _length(part) == 0 or wrong:
        _remove(part)
    raise DownloadError(
        f"{shown(url)}: {reason}; check the network or proxy and run this again (it goes on where it "
        "stopped), or fetch the file elsewhere and set DATA_MIRROR to its folder"
    )


def _pause(seconds: float, part: Path, size: int | None, progress: ProgressCall | None) -> None:
    """Before another attempt; `progress` is called meanwhile, since by raising it may end the work."""
    limit = time.monotonic() + seconds
    while (left := limit - time.monotonic()) > 0:
        time.sleep(min(0.5, left))
        if progress is not None:
            progress(_length(part), size)


def _attempt(url: str, part: Path, size: int | None, progress: ProgressCall | None, timeout: float) -> None:
    """One connection: append to `part` what is missing. _TryAgain, or DownloadError if that is pointless."""
    offset = _length(part)
    headers = {"User-Agent": "engaging-nanogpt", "Accept-Encoding": "identity"}
    if offset:
        headers["Range"] = f"bytes={offset}-"
    request = urllib.request.Request(url, headers=headers)
    try:
        with _opener().open(request, timeout=timeout) as response:
            if offset and not _continues(response, offset):
                offset = 0
            expected = _expected_length(response, offset, size)
            _receive(response, part, offset, expected, size, progress, timeout)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == 416:  # our partial file is longer than the real one
            _remove(part)
            raise _TryAgain("the server refused to continue the download") from None
        if error.code in RETRY_STATUS:
            after = error.headers.get("Retry-After", "")
            wait = float(after) if after.isdigit() else 0.0
            raise _TryAgain(f"the server answers {error.code} {error.reason}", wait) from None
        raise DownloadError(
            f"{shown(url)}: the server answers {error.code} {error.reason}; "
            "set DATA_MIRROR to a folder or an address that has the file"
        ) from None
    except urllib.error.URLError as error:
        if isinstance(error.reason, ssl.SSLCertVerificationError):
            raise DownloadError(
                f"{shown(url)}: the certificate is not trusted ({error.reason.verify_message}); "
                "behind a proxy set SSL_CERT_FILE to its certificates"
            ) from None
        raise _TryAgain(f"no connection: {error.reason}") from None
    except (http.client.HTTPException, OSError, ValueError) as error:
        raise _TryAgain(f"the connection broke: {error or type(error).__name__}") from None


def _receive(
    response: http.client.HTTPResponse,
    part: Path,
    offset: int,
    expected: int | None,
    size: int | None,
    progress: ProgressCall | None,
    timeout: float,
) -> None:
    done, window_start, window_bytes = offset, time.monotonic(), 0
    with storage_errors(part):
        file = part.open("r+b" if offset else "wb")
    with file:
        file.seek(offset)
        while chunk := response.read1(CHUNK):
            with storage_errors(part):
                file.write(chunk)
            done += len(chunk)
            window_bytes += len(chunk)
            if done > (size or LARGEST):
                raise _TryAgain(f"the server sends more than the expected {size or LARGEST:,} bytes")
            if progress is not None:
                progress(done, expected or size)
            now = time.monotonic()
            if now - window_start > timeout:
                if window_bytes < SLOWEST * timeout:
                    raise _TryAgain(f"too slow: {window_bytes} bytes in {timeout:.0f} s")
                window_start, window_bytes = now, 0
        with storage_errors(part):
            file.flush()
            os.fsync(file.fileno())
    if expected is not None and done < expected:
        raise _TryAgain(f"the connection broke after {done:,} of {expected:,} bytes")


def _continues(response: http.client.HTTPResponse, offset: int) -> bool:
    """Whether the answer is the rest that was asked for: not the whole file (status 200) or another piece."""
    range_given = re.match(r"bytes (\d+)-", response.headers.get("Content-Range") or "")
    return response.status == 206 and range_given is not None and int(range_given.group(1)) == offset


def _expected_length(response: http.client.HTTPResponse, offset: int, size: int | None) -> int | None:
    """Bytes of the whole file as the server states them; _TryAgain when that cannot be the file."""
    stated = response.headers.get("Content-Length", "")
    total = offset + int(stated) if stated.isdigit() else None
    if total is not None and size is not None and total != size:
        raise _TryAgain(f"the server offers {total:,} bytes, expected {size:,}")
    if total is not None and total > LARGEST:
        raise _TryAgain(f"the server offers {total:,} bytes, which cannot be the file")
    return total


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows ten redirects, to http and https only."""

    def redirect_request(self, req, fp, code, msg, headers, newurl):
        if urllib.parse.urlsplit(newurl).scheme not in ("http", "https"):
            raise DownloadError(f"{shown(req.full_url)}: redirects to {shown(newurl)}, which is not fetched")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _opener() -> urllib.request.OpenerDirector:
    """HTTP and HTTPS and the proxies of the environment; nothing that opens ftp:, file: or data:."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(),
        urllib.request.HTTPHandler(),
        urllib.request.HTTPSHandler(),
        urllib.request.HTTPDefaultErrorHandler(),
        _Redirects(),
        urllib.request.HTTPErrorProcessor(),
    ):
        opener.add_handler(handler)
    return opener


def _copy(source: Path, part: Path, progress: ProgressCall | None) -> None:
    try:
        total = source.stat().st_size
        reader = source.open("rb")
    except OSError as error:
        raise UserError(f"{source}: cannot be read: {error.strerror}") from None
    with reader, storage_errors(part), part.open("wb") as writer:
        shutil.copyfileobj(reader, writer, CHUNK)
        writer.flush()
        os.fsync(writer.fileno())
    if progress is not None:
        progress(total, total)


def _own_part(destination: Path) -> Path:
    return destination.with_name(f".{destination.name}.{socket.gethostname()}.{os.getpid()}.part")


def _release(destination: Path, part: Path) -> None:
    """Leave what has come to whoever asks for the file next, on another host too."""
    with contextlib.suppress(OSError):
        part.rename(destination.with_name(f".{destination.name}.{RELEASED}.{os.urandom(4).hex()}.part"))


def _adopt_abandoned(destination: Path, part: Path) -> None:
    """Go on with the longest partial file that nobody writes any more. The rename decides who of several takes it."""
    for path in sorted(_abandoned(destination), key=_length, reverse=True):
        with contextlib.suppress(OSError):
            path.rename(part)
            return


def remove_abandoned(destination: Path) -> None:
    """The partial files of a file that is there: shorter ones that other attempts have left."""
    for path in _abandoned(destination):
        _remove(path)


def _abandoned(destination: Path) -> list[Path]:
    """The partial files of a destination that no process writes: released, of a dead process of this host, or old."""
    found = []
    for path in destination.parent.glob(f".{glob.escape(destination.name)}.*.part"):
        host, _, pid = path.name.removeprefix(f".{destination.name}.").removesuffix(".part").rpartition(".")
        with contextlib.suppress(OSError):
            old = time.time() - path.stat().st_mtime > ABANDONED_SECONDS
            dead = host == socket.gethostname() and pid.isdigit() and not process_alive(int(pid))
            if old or dead or host == RELEASED:
                found.append(path)
    return found


def process_alive(pid: int) -> bool:
    """Whether this host has a process with this number, ours or another user's."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


def _matches(path: Path, sha256: str) -> bool:
    try:
        with path.open("rb") as file:
            return sha256_of(file) == sha256
    except OSError:
        return False


def _describe_wrong(part: Path, sha256: str) -> str:
    try:
        with part.open("rb") as file:
            start = file.read(64).lstrip().lower()
    except OSError:
        start = b""
    page = start.startswith((b"<!doctype html", b"<html"))
    what = "an HTML page (a login or a proxy?)" if page else "other content"
    return f"the server sent {what}, not the file with SHA-256 {sha256[:16]}..."


def _length(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink(missing_ok=True)
