"""The FineWeb downloader against a server that speaks the hub's protocol: whole, verified, resumed, side by side."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from modded_nanogpt.data import cached_fineweb10B
from tests.faults.disks import small_disk
from tests.modded.refusals import refused

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "modded_nanogpt" / "data" / "cached_fineweb10B.py"
COMMIT = "89abcdef0123456789abcdef0123456789abcdef"
PREFIXES = tuple(
    f"/datasets/kjj0/{name}-gpt2/resolve/" for name in ("fineweb10B", "fineweb100B", "finewebedu10B")
)


def shard(seed: int, tokens: int = 300_000) -> bytes:
    header = np.zeros(256, dtype="<i4")
    header[:3] = [20240520, 1, tokens]
    return header.tobytes() + np.random.default_rng(seed).integers(0, 50257, tokens).astype("<u2").tobytes()


class Hub:
    """Large files as the hub serves them: a redirect that states SHA-256 and size, then another address."""

    def __init__(self) -> None:
        names = ["fineweb_val_000000.bin", *(f"fineweb_train_{i:06d}.bin" for i in range(1, 6))]
        self.files = {name: shard(i) for i, name in enumerate(names)}
        self.asked: set[str] = set()  # data sets
        self.sent: dict[str, int] = {}
        self.cut_after: dict[str, int] = {}  # the next answers break off after so many bytes
        self.lie: set[str] = set()  # right size, wrong bytes
        self.busy = 0  # so many answers are 503
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: object) -> None:
                pass

            def plain(self, status: int, headers: dict[str, str]) -> None:
                self.send_response(status)
                for key, value in {"Content-Length": "0", **headers}.items():
                    self.send_header(key, value)
                self.end_headers()

            def do_HEAD(self) -> None:
                self.do_GET()

            def do_GET(self) -> None:
                if hub.busy > 0:
                    hub.busy -= 1
                    return self.plain(503, {})
                name = self.path.rpartition("/")[2].partition("?")[0]
                data = hub.files.get(name)
                if data is None:
                    return self.plain(404, {"X-Error-Code": "EntryNotFound"})
                if self.path.startswith(PREFIXES):
                    hub.asked.add(self.path.split("/")[3])
                    digest = hashlib.sha256(data).hexdigest()
                    stated = {"X-Linked-Etag": f'"{digest}"', "X-Linked-Size": str(len(data))}
                    return self.plain(
                        302, {"Location": f"{hub.cdn}/{name}", "X-Repo-Commit": COMMIT, **stated}
                    )
                return self.content(name, data)

            def content(self, name: str, data: bytes) -> None:
                if name in hub.lie:
                    data = bytes([data[0], *data[1:-1], data[-1] ^ 1])
                wanted = self.headers.get("Range", "")
                first = int(wanted.removeprefix("bytes=").partition("-")[0]) if wanted else 0
                piece = data[first:]
                self.send_response(206 if wanted else 200)
                if wanted:
                    self.send_header("Content-Range", f"bytes {first}-{len(data) - 1}/{len(data)}")
                self.send_header("Content-Length", str(len(piece)))
                self.end_headers()
                if self.command == "HEAD":
                    return
                cut = hub.cut_after.pop(name, None)
                if cut is not None:
                    piece, self.close_connection = piece[:cut], True
                self.wfile.write(piece)
                hub.sent[name] = hub.sent.get(name, 0) + len(piece)
                if cut is not None:
                    self.wfile.flush()
                    self.connection.shutdown(2)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.server.handle_error = lambda *_: None
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.cdn = f"http://localhost:{self.server.server_port}/cdn"  # another host, as the hub's is
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def hub() -> Iterator[Hub]:
    server = Hub()
    yield server
    server.server.shutdown()
    server.server.server_close()


def environment(hub: Hub, root: Path, **more: str) -> dict[str, str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith("HF_") and "proxy" not in k.lower()}
    return {**clean, "HF_ENDPOINT": hub.url, "DATA_ROOT": str(root), "OMP_NUM_THREADS": "1", **more}


def download(hub: Hub, root: Path, *args: str, **more: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(SCRIPT), *args]
    return subprocess.run(
        command, env=environment(hub, root, **more), capture_output=True, text=True, timeout=600
    )


def manifest(root: Path) -> dict:
    return json.loads((root / "fineweb10B" / "manifest.json").read_text())


def test_downloads_what_is_asked_for_and_the_token_set_opens(hub, tmp_path):
    done = download(hub, tmp_path, "2")
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "fineweb10B"
    found = manifest(tmp_path)
    assert [entry["name"] for entry in found["files"]] == [
        "fineweb_train_000001.bin", "fineweb_train_000002.bin", "fineweb_val_000000.bin",
    ]  # fmt: skip
    assert (found["vocab_size"], found["eot"], found["source"]["commit"]) == (50257, 50256, COMMIT)
    for entry in found["files"]:
        assert (folder / entry["name"]).read_bytes() == hub.files[entry["name"]]
    from nanogpt.common.shards import open_token_set, verify

    verify(open_token_set("fineweb10B", tmp_path))


def test_only_the_data_root_is_measured_and_written(hub, tmp_path):
    """Case B9: a home with less room than the shards need; then a data root with less."""
    for small, big, status in (("home", "data", 0), ("data", "home", 74)):
        with small_disk(tmp_path / f"{small} {status}", "1m") as disk:
            other = tmp_path / f"{big} {status}"
            other.mkdir()
            home, root = (disk, other) if small == "home" else (other, disk)
            done = download(hub, root, "2", HOME=str(home))
            assert done.returncode == status, done.stderr
            assert not [path for path in home.rglob("*") if path.is_file()]
            if status:
                assert (
                    done.stderr.count("\n") == 1
                    and "data 74/fineweb10B: needs 0.00 GB, the disk has" in done.stderr
                )
                assert not list(root.rglob("*.bin"))


def test_a_complete_folder_of_somebody_else_is_used_without_a_write(hub, tmp_path):
    """Read-only by a mount, which stops root too; with its manifest, without one, with a shard missing."""
    lab, folder = tmp_path / "lab", tmp_path / "lab" / "fineweb10B"
    done = subprocess.run(
        ["bash", "-c", f'umask 077; exec "{sys.executable}" "{SCRIPT}" 1'],
        env=environment(hub, lab), capture_output=True, text=True,
    )  # fmt: skip
    assert (
        done.returncode == 0
        and "all 103 shards: python modded_nanogpt/data/cached_fineweb10B.py 103" in done.stdout
    )
    assert all(path.stat().st_mode & 0o040 for path in (folder, *folder.iterdir()))
    read_only = f'mount --bind "{lab}" "{lab}" && mount -o remount,ro,bind "{lab}" && exec "$@"'

    def use(*args: str) -> subprocess.CompletedProcess:
        command = ["unshare", "-m", "bash", "-c", read_only, "use", sys.executable, str(SCRIPT), *args]
        env = environment(hub, lab, XDG_CACHE_HOME=str(tmp_path / "cache"))
        return subprocess.run(command, env=env, capture_output=True, text=True)

    if subprocess.run(["unshare", "-m", "bash", "-c", read_only, "use", "true"]).returncode:
        pytest.skip("no mount namespaces here")
    assert use("1").returncode == 0
    (folder / "manifest.json").unlink()
    done = use("1")
    assert done.returncode == 0 and "verified" in done.stdout, done.stderr
    assert len(json.loads((tmp_path / "cache/engaging-nanogpt/verified.json").read_text())) == 2
    done = use("2")
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert (
        "fineweb_train_000002.bin: not there" in done.stderr
        and "set DATA_ROOT to a folder of yours" in done.stderr
    )


def test_more_shards_later_fetch_only_the_new_ones(hub, tmp_path):
    assert download(hub, tmp_path, "1").returncode == 0
    hub.sent.clear()
    assert download(hub, tmp_path, "--chunks=3").returncode == 0
    assert set(hub.sent) == {"fineweb_train_000002.bin", "fineweb_train_000003.bin"}
    hub.sent.clear()
    assert download(hub, tmp_path, "2", HF_ENDPOINT="http://127.0.0.1:9").returncode == 0  # asks nobody
    assert len(manifest(tmp_path)["files"]) == 4
    assert not hub.sent


def test_the_other_published_sets(hub, tmp_path):
    """Each from its repository, under its own names, into its own folder."""
    from nanogpt.common.shards import open_token_set

    edu = {name: name.replace("fineweb", "finewebedu") for name in hub.files}
    hub.files.update({edu[name]: data for name, data in list(hub.files.items())})
    for name, prefix in (("fineweb100B", "fineweb"), ("finewebedu10B", "finewebedu")):
        hub.asked.clear()
        done = download(hub, tmp_path, "2", f"--set={name}")
        assert done.returncode == 0, done.stderr
        assert hub.asked == {f"{name}-gpt2"}
        found = open_token_set(name, tmp_path)
        assert [shard.path.name for shard in found.shards] == [
            f"{prefix}_train_000001.bin", f"{prefix}_train_000002.bin", f"{prefix}_val_000000.bin",
        ]  # fmt: skip
        assert json.loads((found.folder / "manifest.json").read_text())["name"] == name
        assert name in done.stdout


def test_a_cut_connection_goes_on_where_it_stopped(hub, tmp_path):
    hub.cut_after["fineweb_train_000001.bin"] = 400_000
    hub.busy = 2
    done = download(hub, tmp_path, "1")
    assert done.returncode == 0, done.stderr
    name = "fineweb_train_000001.bin"
    assert hub.sent[name] == len(hub.files[name])  # no byte twice


def test_wrong_bytes_of_the_right_size_are_refused(hub, tmp_path):
    hub.lie.add("fineweb_train_000001.bin")
    done = download(hub, tmp_path, "1")
    assert done.returncode == 69
    assert "SHA-256" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "fineweb10B" / "fineweb_train_000001.bin").exists()
    assert not (tmp_path / "fineweb10B" / "manifest.json").exists()


def test_a_flipped_bit_on_disk_is_found_and_mended(hub, tmp_path):
    assert download(hub, tmp_path, "1").returncode == 0
    path = tmp_path / "fineweb10B" / "fineweb_train_000001.bin"
    data = bytearray(path.read_bytes())
    data[100_000] ^= 4
    path.write_bytes(data)
    offline = download(hub, tmp_path, "1", HF_HUB_OFFLINE="1")
    assert offline.returncode == 2
    assert "fineweb_train_000001.bin" in offline.stderr
    assert download(hub, tmp_path, "1").returncode == 0
    assert path.read_bytes() == hub.files[path.name]
    assert download(hub, tmp_path, "1", HF_HUB_OFFLINE="1").returncode == 0


SIXTEEN = """
import os, sys
from huggingface_hub import get_hf_file_metadata, hf_hub_url  # what takes long; the package itself loads nothing
from modded_nanogpt.data import cached_fineweb10B
from nanogpt.common.errors import run_command
children = []
for number in range(16):
    children.append(os.fork())
    if not children[-1]:
        status, sys.argv[1:] = 0, ["2" if number == 5 else "3"]
        try:
            run_command(cached_fineweb10B.main)
        except SystemExit as end:
            status = end.code or 0
        sys.stdout.flush()
        os._exit(status)
sys.exit(any([os.waitpid(child, 0)[1] for child in children]))
"""


def test_sixteen_at_once_agree(hub, tmp_path):
    """As many jobs as an array may start in one minute; forked, so that the library is imported once."""
    done = subprocess.run(
        [sys.executable, "-c", SIXTEEN], cwd=ROOT, env=environment(hub, tmp_path), capture_output=True, text=True,
        timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(manifest(tmp_path)["files"]) == 4
    folder = tmp_path / "fineweb10B"
    assert all((folder / e["name"]).read_bytes() == hub.files[e["name"]] for e in manifest(tmp_path)["files"])
    assert not list(folder.glob(".*"))


@pytest.mark.parametrize(
    ("args", "more", "status", "words"),
    [
        (("104",), {}, 2, "at most 103"),
        (("6",), {}, 69, "404"),
        (("1",), {"HF_ENDPOINT": "http://127.0.0.1:9"}, 69, "HF_ENDPOINT"),
        (("1",), {"HF_HUB_OFFLINE": "1"}, 2, "HF_HUB_OFFLINE"),
    ],
)
def test_bad_requests_are_one_line(hub, tmp_path, args, more, status, words):
    done = download(hub, tmp_path, *args, **more)
    assert (done.returncode, len(done.stderr.strip().splitlines())) == (status, 1), done.stderr
    assert words in done.stderr


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["0"], "--chunks=0"),
        (["x"], "--chunks=x"),
        (["100", "--set=finewebedu10B"], "at most 99"),
        (["--set=fineweb1B"], "did you mean 'fineweb10B'?"),
    ],
)
def test_bad_flags_are_one_line(tmp_path, monkeypatch, capsys, args, words):
    assert words in refused(cached_fineweb10B.main, args, monkeypatch, capsys, tmp_path)


def test_help_is_quick():
    env = {**os.environ, "PYTHONPATH": ""}
    code = (
        "import runpy, sys\nsys.argv = ['x', '--help']\ntry:\n    runpy.run_path(%r, run_name='__main__')\n"
        "except SystemExit:\n    print('huggingface_hub' in sys.modules, 'numpy' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code % str(SCRIPT)], env=env, capture_output=True, text=True)
    assert done.stdout.strip().endswith("False False")
