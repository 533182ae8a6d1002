"""A server on the loopback interface that speaks as much of the hub's protocol as streaming needs."""

import hashlib
import io
import json
import threading
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pyarrow as pa
import pyarrow.parquet as pq

REPOSITORY = "someone/texts"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def parquet(texts: list[str], rows: int = 16) -> bytes:
    """A Parquet file with a text column, `rows` to a row group."""
    sink = io.BytesIO()
    pq.write_table(pa.table({"text": texts}), sink, row_group_size=rows)
    return sink.getvalue()


class HubServer:
    """`files` maps paths to bytes. The next `cuts` downloads break off after `cut_bytes`; the file `held` stays out."""

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files = files
        self.cuts = self.cut_bytes = 0
        self.fail = 0  # so many of the next downloads are answered with 503
        self.held, self.closing = "", threading.Event()
        self.downloads = 0
        self.bytes_sent = 0
        self.lock = threading.Lock()
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: object) -> None:
                pass

            def do_HEAD(self) -> None:
                self.answer(body=False)

            def do_GET(self) -> None:
                self.answer(body=True)

            def do_POST(self) -> None:
                length = int(self.headers.get("Content-Length", 0))
                form = self.rfile.read(length)
                if "/paths-info/" in self.path:
                    kind = self.headers.get("Content-Type", "")
                    paths = (
                        json.loads(form)["paths"]
                        if "json" in kind
                        else urllib.parse.parse_qs(form.decode())["paths"]
                    )
                    return self.send_json([server.entry(path) for path in paths if path in server.files])
                return self.send_json({"error": "not found"}, 404)

            def answer(self, body: bool) -> None:
                path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
                api = f"/api/datasets/{REPOSITORY}"
                if path == api or path.startswith(f"{api}/revision/"):
                    siblings = [{"rfilename": name} for name in server.files]
                    return self.send_json({"id": REPOSITORY, "sha": COMMIT, "siblings": siblings, "tags": []})
                if path.startswith(f"{api}/tree/"):
                    return self.send_json(server.tree(path.removeprefix(f"{api}/tree/").partition("/")[2]))
                prefix = f"/datasets/{REPOSITORY}/resolve/"
                if path.startswith(prefix):
                    name = path.removeprefix(prefix).partition("/")[2]
                    if body and name == server.held:
                        server.closing.wait()
                    if name in server.files:
                        return self.send_file(server.files[name], body)
                self.send_response(404)
                self.send_header(
                    "X-Error-Code", "EntryNotFound" if path.startswith(prefix) else "RepoNotFound"
                )
                self.send_header("Content-Length", "0")
                self.end_headers()
                return None

            def send_json(self, value: object, status: int = 200) -> None:
                data = json.dumps(value).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(data)

            def send_file(self, data: bytes, body: bool) -> None:
                with server.lock:
                    server.downloads += body
                    failing = body and server.fail > 0
                    server.fail -= failing
                    cutting = body and not failing and server.cuts > 0
                    server.cuts -= cutting
                if failing:
                    return self.send_json({"error": "busy"}, 503)
                first, last = 0, len(data) - 1
                wanted = self.headers.get("Range")
                if wanted:
                    start, _, end = wanted.removeprefix("bytes=").partition("-")
                    first, last = int(start), min(last, int(end or last))
                piece = data[first : last + 1]
                self.send_response(206 if wanted else 200)
                if wanted:
                    self.send_header("Content-Range", f"bytes {first}-{last}/{len(data)}")
                self.send_header("Accept-Ranges", "bytes")
                self.send_header("Content-Length", str(len(piece)))
                self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
                self.send_header("X-Repo-Commit", COMMIT)
                self.end_headers()
                if not body:
                    return None
                if cutting:
                    self.wfile.write(piece[: server.cut_bytes])
                    self.wfile.flush()
                    self.close_connection = True
                    self.connection.shutdown(2)
                    return None
                self.wfile.write(piece)
                server.bytes_sent += len(piece)
                return None

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._server.handle_error = lambda *_: None  # killed clients hang up
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def entry(self, path: str) -> dict[str, object]:
        """A file as the hub's tree describes it."""
        data = self.files[path]
        return {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}

    def tree(self, folder: str) -> list[dict[str, object]]:
        """Files and folders below `folder`, recursively: more than was asked for does no harm."""
        prefix = f"{folder}/" if folder else ""
        inside = [name for name in self.files if name.startswith(prefix)]
        folders = {
            "/".join(name.split("/")[:depth]) for name in inside for depth in range(1, name.count("/") + 1)
        }
        listed = [
            {"type": "directory", "path": path, "size": 0, "oid": "0" * 40}
            for path in sorted(folders)
            if path.startswith(prefix) and path != folder
        ]
        return listed + [self.entry(name) for name in sorted(inside)]

    def close(self) -> None:
        """Stop answering."""
        self.closing.set()
        self._server.shutdown()
        self._server.server_close()
