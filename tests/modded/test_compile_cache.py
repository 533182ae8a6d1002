"""Packed compile caches: real archives, hostile ones, jobs at once, a compiled graph that another process reuses."""

import hashlib
import io
import json
import multiprocessing
import os
import tarfile
import time
from pathlib import Path

import pytest

from modded_nanogpt import cache_archive, compile_cache
from modded_nanogpt.compile_cache import CompileCache
from nanogpt.common import compiler

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT, SOURCE, OTHER = "e" * 12, "5" * 64, "0" * 64


class Node:
    """A node with its own disk; `log` holds what was said there."""

    def __init__(self, folder: Path, archives: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.archives, self.monkeypatch, self.log = folder, archives, monkeypatch, []

    def cache(self, source: str = SOURCE, environment: str = ENVIRONMENT) -> CompileCache:
        for name, variable in compiler.FOLDERS.items():
            self.monkeypatch.setenv(variable, str(self.folder / name))
        return CompileCache(self.archives, environment, source, self.log.append)

    def put(self, name: str, data: bytes) -> Path:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        temporary.write_bytes(data)
        return temporary.replace(path)

    def files(self) -> dict[str, bytes]:
        found = (path for path in self.folder.rglob("*") if path.is_file())
        return {path.relative_to(self.folder).as_posix(): path.read_bytes() for path in found}


@pytest.fixture
def nodes(tmp_path, monkeypatch):
    """Makes nodes that share one folder of archives."""
    return lambda name: Node(tmp_path / name, tmp_path / "archives", monkeypatch)


def packed(nodes, files: dict[str, bytes], source: str = SOURCE) -> Node:
    node = nodes("first")
    for name, data in files.items():
        node.put(name, data)
    node.cache(source).keep()
    return node


CONTENT = {
    "inductor/fxgraph/ab/x": b"graph",
    "inductor/cd/kernel.so": bytes(5000),
    "triton/KEY/k.cubin": b"cubin",
}


def archive_of(node: Node) -> Path:
    (archive,) = node.archives.glob("*.tar.gz")
    return archive


def test_what_one_node_packed_is_there_on_another(nodes):
    first = packed(nodes, {**CONTENT, "inductor/locks/a.lock": b"", "inductor/ab/.1.tmp": b"x",
                           "triton/tmp.pid_1/k": b"half", "inductor/ab/__pycache__/x.pyc": b"p"})  # fmt: skip
    assert "packed 3 files, 3 of them new" in first.log[-1]
    second = nodes("second")
    second.cache().restore()
    assert second.files() == CONTENT
    assert "restored" in second.log[-1] and "3 files" in second.log[-1] and "of this code" in second.log[-1]
    second.cache().restore()
    assert "already there (3 files" in second.log[-1]
    second.cache().keep()
    assert len(second.log) == 2  # nothing new, nothing said
    (second.folder / "triton/KEY/k.cubin").unlink()  # as a cleaner of /tmp might
    second.put("inductor/cd/kernel.so", b"its own")
    second.cache().restore()
    assert second.files() == {**CONTENT, "inductor/cd/kernel.so": b"its own"}


def test_cold_says_so(nodes):
    node = nodes("first")
    node.cache().restore()
    assert "cold" in node.log[0] and str(node.archives) in node.log[0]
    node.cache().keep()
    assert len(node.log) == 1 and not node.archives.exists()


def test_later_code_takes_earlier_archives_and_another_gpu_none(nodes):
    packed(nodes, CONTENT, source=OTHER)
    second = nodes("second")
    second.cache(environment="f" * 12).restore()
    assert second.files() == {} and "cold" in second.log[-1]
    second.cache().restore()
    assert second.files() == CONTENT and "of earlier code" in second.log[-1]
    second.put("inductor/ef/new", b"new")
    second.cache().keep()
    assert len(list(second.archives.glob("*.tar.gz"))) == 2
    third = nodes("third")
    third.cache().restore()  # the newest of this code
    assert third.files() == second.files() and "of this code" in third.log[-1]
    fourth = nodes("fourth")
    fourth.cache(source=OTHER).restore()  # this code's before a newer one
    assert fourth.files() == CONTENT


def test_triton_groups_name_files_where_they_are_now(nodes):
    def group(folder: Path) -> bytes:
        return json.dumps({"child_paths": {"k.cubin": str(folder / "triton/KEY/k.cubin")}}).encode()

    first = nodes("first")
    packed(nodes, {**CONTENT, "triton/KEY/__grp__k.json": group(first.folder)})
    second = nodes("second")
    second.cache().restore()
    assert second.files()["triton/KEY/__grp__k.json"] == group(second.folder)


def test_files_are_private_and_nothing_else_is_left(nodes, monkeypatch):
    mask = os.umask(0o002)
    try:
        node = packed(nodes, CONTENT)
    finally:
        os.umask(mask)
    assert len(list(node.archives.iterdir())) == 2
    assert [path.stat().st_mode & 0o777 for path in node.archives.iterdir()] == [0o600, 0o600]


def rewrite(
    archive: Path, members: list[tuple[tarfile.TarInfo, bytes]], files: dict[str, int] | None = None
) -> None:
    """A whole archive, its digest right, that holds `members` and whose manifest names `files`."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for member, data in members:
            tar.addfile(member, io.BytesIO(data))
    archive.write_bytes(buffer.getvalue())
    sizes = {member.name: member.size for member, _ in members} if files is None else files
    manifest = archive.with_name(archive.name.removesuffix(".tar.gz") + ".json")
    manifest.write_text(json.dumps({"sha256": hashlib.sha256(buffer.getvalue()).hexdigest(), "files": sizes}))


def member(name: str, data: bytes = b"", **values: object) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for key, value in values.items():
        setattr(info, key, value)
    return info, data


HOSTILE = {
    "above": [member("inductor/../../evil", b"x")],
    "absolute": [member("/tmp/evil-compile-cache", b"x")],
    "elsewhere": [member("evil", b"x")],
    "folder": [member("ssh/authorized_keys", b"x")],
    "symlink": [member("inductor/a", type=tarfile.SYMTYPE, linkname="../..", mode=0o777)],
    "hardlink": [member("inductor/a", type=tarfile.LNKTYPE, linkname="/etc/passwd")],
    "device": [member("inductor/a", type=tarfile.CHRTYPE)],
    "fifo": [member("inductor/a", type=tarfile.FIFOTYPE)],
    "twice": [member("inductor/a", b"1"), member("inductor/a", b"2")],
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_archives_are_left_alone(nodes, tmp_path, kind):
    rewrite(archive_of(packed(nodes, CONTENT)), HOSTILE[kind])
    second = nodes("second")
    second.cache().restore()
    assert second.files() == {} and not (tmp_path / "evil").exists()
    assert not Path("/tmp/evil-compile-cache").exists()
    assert "left alone" in second.log[0] and "cold" in second.log[1] and len(second.log) == 2


def test_a_member_that_the_manifest_does_not_name(nodes):
    rewrite(archive_of(packed(nodes, CONTENT)), [member("inductor/a", b"1"), member("inductor/b", b"2")],
            {"inductor/a": 1})  # fmt: skip
    second = nodes("second")
    second.cache().restore()
    assert second.files() == {} and "inductor/b" in second.log[0]


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", "nonsense", '{"sha256": 1, "files": {"inductor/a": 1}}', '{"sha256": "", "files": ["inductor/a"]}',
     '{"sha256": "", "files": {"inductor/a": -1}}', '{"sha256": "", "files": {"inductor/a": 1e99}}',
     '{"sha256": "", "files": {"inductor/a\\u0000": 1}}', "[" * 100_000],
)  # fmt: skip
def test_damaged_manifests_are_left_alone(nodes, text):
    (manifest,) = packed(nodes, CONTENT).archives.glob("*.json")
    manifest.write_text(text)
    second = nodes("second")
    second.cache().restore()
    assert second.files() == {} and "left alone" in second.log[0]


@pytest.mark.parametrize(
    "damage", ["cut", "flipped", "others", "group", "link", "gone", "manifest of others"]
)
def test_archives_that_were_changed_or_could_have_been(nodes, damage):
    archive = archive_of(packed(nodes, CONTENT))
    data = archive.read_bytes()
    if damage == "cut":
        archive.write_bytes(data[: len(data) // 2])
    elif damage == "flipped":
        archive.write_bytes(data[:100] + bytes([data[100] ^ 1]) + data[101:])
    elif damage in ("others", "group"):
        archive.chmod(0o602 if damage == "others" else 0o620)
    elif damage == "link":
        archive.rename(archive.with_name("target"))
        archive.symlink_to("target")
    elif damage == "gone":
        archive.unlink()
    else:
        archive.with_name(archive.name.removesuffix(".tar.gz") + ".json").chmod(0o622)
    second = nodes("second")
    second.cache().restore()
    assert second.files() == {} and "left alone" in second.log[0] and "cold" in second.log[1]
    for name, content in CONTENT.items():
        second.put(name, content)
    second.put("inductor/new", b"new")
    second.cache().keep()
    third = nodes("third")
    third.cache().restore()
    assert third.files() == second.files()  # the sound one that has been packed since


def test_another_users_archive_is_refused(nodes):
    if os.getuid() != 0:
        pytest.skip("only root can give a file to another user")
    os.chown(archive_of(packed(nodes, CONTENT)), 12345, -1)
    second = nodes("second")
    second.cache().restore()
    assert second.files() == {} and "belongs to another user" in second.log[0]


def test_more_than_the_limit_is_not_unpacked(nodes, monkeypatch):
    archive = archive_of(packed(nodes, CONTENT))
    rewrite(archive, [member("inductor/a", b"1")], {"inductor/a": cache_archive.LARGEST + 1})
    second = nodes("second")
    second.cache().restore()
    assert second.files() == {} and "larger" in second.log[0]


def test_the_newest_files_are_packed_up_to_the_limit(nodes, monkeypatch):
    monkeypatch.setattr(cache_archive, "LARGEST", 250)
    node = nodes("first")
    for number in range(5):
        os.utime(node.put(f"inductor/{number}", bytes(100)), (1000 + number, 1000 + number))
    node.cache().keep()
    second = nodes("second")
    second.cache().restore()
    assert sorted(second.files()) == ["inductor/3", "inductor/4"]


def test_old_archives_go(nodes, monkeypatch):
    monkeypatch.setattr(compile_cache, "MOST_ARCHIVES", 3)
    node = nodes("first")
    for number in range(5):
        for part in range(2):  # the second replaces the first, which is of the same code
            node.put(f"inductor/{number}-{part}", b"data")
            node.cache(source=f"{number:064x}"[::-1]).keep()
            time.sleep(0.01)
    left = sorted(path.name.split("-")[2] for path in node.archives.glob("*.tar.gz"))
    assert left == [f"{number}{'0' * 11}" for number in (2, 3, 4)]
    assert len(list(node.archives.iterdir())) == 6
    (node.archives / ".host.1.2.tmp").write_bytes(b"left by a killed job")
    os.utime(node.archives / ".host.1.2.tmp", (1, 1))
    node.put("inductor/last", b"data")
    node.cache().keep()
    assert not (node.archives / ".host.1.2.tmp").exists()


def test_a_folder_that_cannot_be_written_costs_a_note(nodes, tmp_path):
    node = nodes("first")
    node.put("inductor/a", b"data")
    node.archives.write_text("a file in its place")
    node.cache().restore()
    node.cache().keep()
    assert "cold" in node.log[0] and "not kept" in node.log[1]


def test_a_full_disk_costs_the_archive_only(nodes):
    """A small file-size limit stands for the disk: the write fails in the middle."""
    node = nodes("first")
    node.put("inductor/a", os.urandom(300_000))
    node.archives.mkdir(mode=0o700)
    process = multiprocessing.get_context("fork").Process(target=_keep_with_limit, args=(node,))
    process.start()
    process.join(20)
    assert process.exitcode == 0
    assert [path.name for path in node.archives.iterdir()] == ["said"]
    assert "not kept" in (node.archives / "said").read_text()


def _keep_with_limit(node: Node) -> None:
    import resource
    import signal

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    node.cache().keep()
    (node.archives / "said").write_text("\n".join(node.log))


def _job(node: Node, number: int) -> None:
    cache = node.cache()
    cache.restore()
    for index in range(20):
        node.put(f"inductor/{index}", bytes([index]) * 20_000)
    node.put(f"triton/{number}", b"own")
    cache.keep()
    for line in node.log:
        print(line, flush=True)
    os._exit(0 if not any("note" in line for line in node.log) else 1)


def test_jobs_at_once(nodes):
    """Six jobs on two nodes restore and keep together; what is left is whole, and every job's file was whole."""
    fork = multiprocessing.get_context("fork")
    jobs = [fork.Process(target=_job, args=(nodes(f"node-{number % 2}"), number)) for number in range(6)]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join(60)
    assert [job.exitcode for job in jobs] == [0] * 6
    third = nodes("third")
    third.cache().restore()
    found = third.files()
    assert all(found[f"inductor/{index}"] == bytes([index]) * 20_000 for index in range(20))
    archives = third.archives
    assert {path.suffix for path in archives.iterdir()} == {".gz", ".json"}
