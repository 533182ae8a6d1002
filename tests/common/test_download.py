"""Downloads against a real server on the loopback interface that misbehaves in every way we could think of."""

import hashlib
import multiprocessing
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from nanogpt.common.download import DownloadError, fetch
from nanogpt.common.errors import CommandError, StorageError, UserError

CONTENT = bytes(range(256)) * 4000  # 1,024,000 bytes
SHA256 = hashlib.sha256(CONTENT).hexdigest()
FAST = {"backoff": 0.01, "timeout": 0.5, "attempts": 3}


class Server:
    """Answers with `behave(handler, number of the request, offset asked for)`."""

    def __init__(self) -> None:
        self.requests: list[int] = []
        self.behave: Callable = plain
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: object) -> None:
                pass

            def do_GET(self) -> None:
                wanted = self.headers.get("Range", "bytes=0-")
                offset = int(wanted.removeprefix("bytes=").removesuffix("-"))
                outer.requests.append(offset)
                self.close_connection = True
                outer.behave(self, len(outer.requests), offset)

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._server.handle_error = lambda *_: None  # we hang up on it, often
        self.url = f"http://127.0.0.1:{self._server.server_port}/file.txt"
        threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True
        ).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def server() -> Iterator[Server]:
    running = Server()
    yield running
    running.close()


def send(handler: BaseHTTPRequestHandler, status: int, body: bytes = b"", **headers: object) -> None:
    """A whole answer; `Content_Length=None` leaves the length out."""
    handler.send_response(status)
    for name, value in {"Content_Length": len(body), "Connection": "close", **headers}.items():
        if value is not None:
            handler.send_header(name.replace("_", "-"), str(value))
    handler.end_headers()
    handler.wfile.write(body)


def plain(handler: BaseHTTPRequestHandler, number: int, offset: int) -> None:
    """As it should be."""
    if offset >= len(CONTENT):
        send(handler, 416)
    elif offset:
        where = f"bytes {offset}-{len(CONTENT) - 1}/{len(CONTENT)}"
        send(handler, 206, CONTENT[offset:], Content_Range=where)
    else:
        send(handler, 200, CONTENT)


def cut_at(*lengths: int, then: Callable = plain) -> Callable:
    """The first connections break after so many bytes."""

    def behave(handler: BaseHTTPRequestHandler, number: int, offset: int) -> None:
        if number > len(lengths):
            return then(handler, number, offset)
        length = len(CONTENT) - offset
        where = f"bytes {offset}-{len(CONTENT) - 1}/{len(CONTENT)}"
        handler.send_response(206 if offset else 200)
        handler.send_header("Content-Length", str(length))
        if offset:
            handler.send_header("Content-Range", where)
        handler.end_headers()
        handler.wfile.write(CONTENT[offset : offset + lengths[number - 1]])
        return None

    return behave


def first(answer: Callable, count: int = 1) -> Callable:
    """`answer(handler)` to the first `count` requests, then as it should be."""

    def behave(handler: BaseHTTPRequestHandler, number: int, offset: int) -> None:
        if number <= count:
            answer(handler)
        else:
            plain(handler, number, offset)

    return behave


def ignores_range(handler: BaseHTTPRequestHandler, number: int, offset: int) -> None:
    """Always the whole file, whatever was asked for."""
    send(handler, 200, CONTENT)


def wrong_range(handler: BaseHTTPRequestHandler, number: int, offset: int) -> None:
    """206, but the piece from the beginning."""
    where = f"bytes 0-{len(CONTENT) - 1}/{len(CONTENT)}"
    send(handler, 206, CONTENT, Content_Range=where)


def chunked(handler: BaseHTTPRequestHandler, complete: bool = True) -> None:
    handler.send_response(200)
    handler.send_header("Transfer-Encoding", "chunked")
    handler.end_headers()
    for start in range(0, len(CONTENT), 300_000):
        piece = CONTENT[start : start + 300_000]
        handler.wfile.write(f"{len(piece):x}\r\n".encode() + piece + b"\r\n")
        if not complete:
            return
    handler.wfile.write(b"0\r\n\r\n")


def hangs(handler: BaseHTTPRequestHandler) -> None:
    """Headers, some bytes, then silence."""
    handler.send_response(200)
    handler.send_header("Content-Length", str(len(CONTENT)))
    handler.end_headers()
    handler.wfile.write(CONTENT[:1000])
    handler.wfile.flush()
    time.sleep(1.2)


def drips(handler: BaseHTTPRequestHandler) -> None:
    """A byte now and then: each arrives in time, all of them never will."""
    handler.send_response(200)
    handler.send_header("Content-Length", str(len(CONTENT)))
    handler.end_headers()
    try:
        for _ in range(30):
            handler.wfile.write(b"x")
            handler.wfile.flush()
            time.sleep(0.1)
    except OSError:
        pass


# What goes wrong at first, and how the file still arrives.
RECOVERABLE: dict[str, Callable] = {
    "nothing": plain,
    "cut after 0 bytes": cut_at(0),
    "cut after 1 byte": cut_at(1),
    "cut in the middle": cut_at(500_000),
    "cut before the last byte": cut_at(len(CONTENT) - 1),
    "cut nine times": cut_at(*[270_000, 280_000, 100, 270_000] + [10] * 1),
    "cut, then a server that ignores Range": cut_at(500_000, then=ignores_range),
    "cut, then a wrong range": cut_at(500_000, then=wrong_range),
    "cut, then 416": cut_at(400_000, then=lambda h, n, o: send(h, 416) if o else plain(h, n, o)),
    "503 with Retry-After": first(lambda h: send(h, 503, Retry_After="0")),
    "500 twice": first(lambda h: send(h, 500), 2),
    "429": first(lambda h: send(h, 429, b"slow down")),
    "wrong bytes once": first(lambda h: send(h, 200, CONTENT[::-1])),
    "one flipped bit once": first(lambda h: send(h, 200, b"\x01" + CONTENT[1:])),
    "too short, no length": first(lambda h: send(h, 200, CONTENT[:1000], Content_Length=None)),
    "length too large": first(lambda h: send(h, 200, CONTENT, Content_Length=len(CONTENT) + 5)),
    "HTML page once": first(lambda h: send(h, 200, b"<!DOCTYPE html><p>log in")),
    "empty answer": first(lambda h: send(h, 200)),
    "no answer": first(lambda h: None),
    "not HTTP": first(lambda h: h.wfile.write(b"220 ftp ready\r\n")),
    "chunked": first(chunked, 99),
    "chunked, cut": first(lambda h: chunked(h, False)),
    "silence": first(hangs),
    "drip": first(drips),
}


@pytest.mark.parametrize("fault", RECOVERABLE)
def test_faults_that_pass(server: Server, tmp_path: Path, fault: str) -> None:
    server.behave = RECOVERABLE[fault]
    target = tmp_path / "deep" / "file.txt"
    assert fetch(server.url, target, SHA256, **FAST) == target
    assert target.read_bytes() == CONTENT
    assert [path.name for path in target.parent.iterdir()] == ["file.txt"]


def redirect_loop(handler: BaseHTTPRequestHandler, number: int, offset: int) -> None:
    send(handler, 302, Location=handler.path + "x")


# What no retry mends, and what the message says.
LASTING: dict[str, tuple[Callable, str]] = {
    "404": (first(lambda h: send(h, 404), 99), "404"),
    "403": (first(lambda h: send(h, 403), 99), "403"),
    "503 for ever": (first(lambda h: send(h, 503), 99), "503"),
    "wrong bytes, right size": (first(lambda h: send(h, 200, CONTENT[::-1]), 99), "other content"),
    "HTML page": (first(lambda h: send(h, 200, b"<html>log in"), 99), "HTML page"),
    "gzip nobody asked for": (
        first(lambda h: send(h, 200, b"\x1f\x8b" + CONTENT, Content_Encoding="gzip"), 99),
        "other content",
    ),
    "redirect loop": (redirect_loop, "302"),
    "redirect to ftp": (first(lambda h: send(h, 302, Location="ftp://127.0.0.1/x"), 99), "not fetched"),
    "redirect to a file": (first(lambda h: send(h, 302, Location="file:///etc/passwd"), 99), "not allowed"),
    "drips for ever": (first(drips, 99), "slow"),
    "cut for ever": (cut_at(*[0] * 50), "broke"),
}


@pytest.mark.parametrize("fault", LASTING)
def test_faults_that_stay(server: Server, tmp_path: Path, fault: str) -> None:
    server.behave, expected = LASTING[fault]
    with pytest.raises(DownloadError, match=expected) as caught:
        fetch(server.url, tmp_path / "file.txt", SHA256, backoff=0.01, timeout=0.3, attempts=2)
    assert "\n" not in str(caught.value) and "127.0.0.1" in str(caught.value)
    assert not (tmp_path / "file.txt").exists()


@pytest.mark.parametrize("size, answered", [(len(CONTENT) + 1, 200), (999, 200)])
def test_size_is_checked_before_the_bytes(server: Server, tmp_path: Path, size: int, answered: int) -> None:
    with pytest.raises(DownloadError, match="expected"):
        fetch(server.url, tmp_path / "f", SHA256, size=size, **FAST)
    assert list(tmp_path.iterdir()) == []


def test_an_answer_without_end_is_stopped(server: Server, tmp_path: Path) -> None:
    server.behave = first(lambda h: send(h, 200, CONTENT * 3, Content_Length=None), 99)
    with pytest.raises(DownloadError, match="more than the expected"):
        fetch(server.url, tmp_path / "f", SHA256, size=len(CONTENT), **FAST)


def test_goes_on_where_it_stopped(server: Server, tmp_path: Path) -> None:
    server.behave = cut_at(600_000)
    seen: list[tuple[int, int | None]] = []
    fetch(server.url, tmp_path / "f", SHA256, progress=lambda *at: seen.append(at), **FAST)
    assert server.requests == [0, 600_000]
    assert seen[-1] == (len(CONTENT), len(CONTENT))


def test_takes_over_from_a_dead_process(server: Server, tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    (tmp_path / f".f.{socket.gethostname()}.{dead.pid}.part").write_bytes(CONTENT[:700_000])
    fetch(server.url, tmp_path / "f", SHA256, **FAST)
    assert server.requests == [700_000]
    assert [path.name for path in tmp_path.iterdir()] == ["f"]


def test_wrong_bytes_of_a_dead_process_do_no_harm(server: Server, tmp_path: Path) -> None:
    (tmp_path / f".f.{socket.gethostname()}.99999999.part").write_bytes(b"?" * 700_000)
    fetch(server.url, tmp_path / "f", SHA256, **FAST)
    assert server.requests == [700_000, 0]
    assert (tmp_path / "f").read_bytes() == CONTENT


def test_leaves_a_living_process_alone(server: Server, tmp_path: Path) -> None:
    other = tmp_path / f".f.{socket.gethostname()}.{os.getppid()}.part"
    other.write_bytes(CONTENT[:700_000])
    fetch(server.url, tmp_path / "f", SHA256, **FAST)
    assert server.requests == [0] and other.exists()


def test_right_file_needs_no_network_and_wrong_one_is_replaced(server: Server, tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(CONTENT[:-1] + b"!")
    fetch(server.url, tmp_path / "f", SHA256, **FAST)
    assert (tmp_path / "f").read_bytes() == CONTENT
    fetch("http://127.0.0.1:9/nothing-listens", tmp_path / "f", SHA256, **FAST)
    assert len(server.requests) == 1


def test_no_connection(tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match="no connection"):
        fetch("http://127.0.0.1:9/x", tmp_path / "f", SHA256, **FAST)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("scheme", ["ftp", "file", "s3", "data", "gopher", "FTP"])
def test_other_schemes_are_refused(tmp_path: Path, scheme: str) -> None:
    with pytest.raises(UserError, match="is not fetched"):
        fetch(f"{scheme}://127.0.0.1/etc/passwd", tmp_path / "f", SHA256)
    with pytest.raises(UserError, match="no host"):
        fetch("http://", tmp_path / "f", SHA256)


def test_password_is_not_shown(server: Server, tmp_path: Path) -> None:
    server.behave = first(lambda h: send(h, 404), 99)
    with pytest.raises(CommandError) as caught:
        fetch("ftp://me:secret@host/x?token=secret", tmp_path / "f", SHA256)
    assert "secret" not in str(caught.value)


def test_local_files(tmp_path: Path) -> None:
    (tmp_path / "source").write_bytes(CONTENT)
    fetch(str(tmp_path / "source"), tmp_path / "f", SHA256)
    assert (tmp_path / "f").read_bytes() == CONTENT
    (tmp_path / "source").write_bytes(CONTENT[1:])
    with pytest.raises(DownloadError, match="not the expected content"):
        fetch(str(tmp_path / "source"), tmp_path / "g", SHA256)
    with pytest.raises(UserError, match="No such file"):
        fetch(str(tmp_path / "gone"), tmp_path / "g", SHA256)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["f", "source"]


def test_a_folder_that_cannot_be_written_is_a_storage_fault(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError):
        fetch(server.url, tmp_path / "file" / "f", SHA256, **FAST)


def _fetch_in_child(url: str, target: Path) -> None:
    fetch(url, target, SHA256, **FAST)


def test_many_at_once(server: Server, tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    children = [context.Process(target=_fetch_in_child, args=(server.url, tmp_path / "f")) for _ in range(8)]
    for child in children:
        child.start()
    for child in children:
        child.join(30)
    assert [child.exitcode for child in children] == [0] * 8
    assert (tmp_path / "f").read_bytes() == CONTENT
    assert [path.name for path in tmp_path.iterdir()] == ["f"]
