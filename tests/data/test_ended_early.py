"""Preparations that SLURM ends (SIGTERM): one line, nothing half done, and what has come serves another node."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from nanogpt.common.download import DownloadError
from nanogpt.common.shards import PROGRESS
from tests.common.test_download import CONTENT, FAST, SHA256, Server, cut_at, fetch, server
from tests.data.hub_server import REPOSITORY
from tests.data.test_prepare_openwebtext import FLAGS, LAST, PREPARE, documents, env, hub
from tests.modded.test_cached_fineweb import SCRIPT as FINEWEB
from tests.modded.test_cached_fineweb import Hub, download, environment

__all__ = ["documents", "env", "hub", "server"]  # fixtures
GOES_ON = "interrupted; the same command goes on where this one stopped"


def end(process: subprocess.Popen, ready: Callable[[], object]) -> str:
    """SIGTERM, twice as SLURM may send it, as soon as it is `ready`; what it said on stderr."""
    limit = time.monotonic() + 600
    while not ready():
        assert process.poll() is None and time.monotonic() < limit, process.communicate()
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=600)[1]
    assert process.returncode == 130, said
    return said


def test_fineweb_ended_on_one_node_goes_on_on_another(tmp_path: Path) -> None:
    server, name = Hub(), "fineweb_train_000001.bin"
    folder, size = tmp_path / "fineweb10B", len(server.files[name])
    server.cut_after[name] = 400_000

    def cut() -> list[Path]:
        found = [path for path in folder.glob(f".{name}.*.part") if path.stat().st_size == 400_000]
        if found:
            server.busy = 1000  # it waits for its next attempt, longer each time
        return found

    process = subprocess.Popen(
        [sys.executable, str(FINEWEB), "1"],
        env=environment(server, tmp_path),
        stderr=subprocess.PIPE,
        text=True,
    )
    assert end(process, cut).splitlines() == [GOES_ON]
    (part,) = folder.glob(".*")
    assert part.name.startswith(f".{name}.released.") and part.stat().st_size == 400_000
    server.busy = 0
    assert download(server, tmp_path, "1").returncode == 0
    assert server.sent[name] == size, "bytes that were there have been fetched again"
    assert not list(folder.glob(".*"))
    server.server.shutdown()


def test_openwebtext_ended_early_keeps_whole_shards_and_says_one_line(hub, env, tmp_path) -> None:
    """The last file does not answer: pyarrow's and the hub's threads are at work when Python ends."""
    hub.held = LAST
    folder, command = (
        tmp_path / "data" / "t",
        [sys.executable, str(PREPARE), *FLAGS, f"--repository={REPOSITORY}"],
    )

    def shards() -> list[Path]:
        """Those that the next command will not make again: a file is there a moment before it is recorded."""
        record = folder / PROGRESS
        files = json.loads(record.read_text())["files"] if record.exists() else []
        return [folder / entry["name"] for entry in files]

    process = subprocess.Popen([*command, "--num_workers=1"], env=env(hub), stderr=subprocess.PIPE, text=True)
    assert end(process, lambda: len(shards()) > 2).splitlines() == [GOES_ON]
    kept = {path: path.stat().st_mtime_ns for path in shards()}
    assert not list(folder.glob(".*.tmp"))
    hub.held = ""
    done = subprocess.run(command, env=env(hub), capture_output=True, text=True)
    assert done.returncode == 0 and f"{len(kept)} shards are there; going on" in done.stdout, done
    assert all(path.stat().st_mtime_ns == time for path, time in kept.items())


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """Partial files of another node: one given up, one of a killed process, and one that is being written."""
    (tmp_path / ".f.released.0abc.part").write_bytes(CONTENT[:300_000])
    (old := tmp_path / ".f.node9.17.part").write_bytes(CONTENT[:700_000])
    (tmp_path / ".f.node8.17.part").write_bytes(CONTENT[:900_000])
    os.utime(old, (time.time() - 700,) * 2)
    yield tmp_path


def test_the_longest_partial_file_is_used_and_the_others_go(server: Server, folder: Path) -> None:
    fetch(server.url, folder / "f", SHA256, **FAST)
    assert server.requests == [700_000]
    assert sorted(path.name for path in folder.iterdir()) == [".f.node8.17.part", "f"]


def test_a_download_that_fails_leaves_its_piece_to_the_next(server: Server, tmp_path: Path) -> None:
    server.behave = cut_at(600_000)
    with pytest.raises(DownloadError, match="connection broke"):
        fetch(server.url, tmp_path / "f", SHA256, **{**FAST, "attempts": 1})
    (part,) = tmp_path.iterdir()
    assert part.name.startswith(".f.released.")
    fetch(server.url, tmp_path / "f", SHA256, **FAST)
    assert server.requests == [0, 600_000] and [path.name for path in tmp_path.iterdir()] == ["f"]
