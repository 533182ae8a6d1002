"""What compiling leaves: on the node's own disk while a job runs, packed under the data root for jobs on other nodes.

torch.compile (inductor) and Triton keep what they compiled in two folders. Network disks are slow for them and corrupt
Triton's, so they lie on the node's disk, which the next job does not see. `CompileCache.restore` unpacks what an
earlier job has packed, `CompileCache.keep` packs what is new; neither ever stops a run: an archive that cannot be
used, or written, costs a note and the time to compile.

An archive is <environment>-<operators>-<source>-<content>.tar.gz, with a manifest .json beside it:

    environment   torch, Triton, Python, GPU, and the instruction set of the CPU: another one's archive is of no use
    operators     the code behind our custom operators
    source        the trainer's code: of several archives the one of this very code is the best

Any archive of the same environment helps: entries are found by the hash of what was compiled, so that those of other
code lie idle (`nanogpt.common.compiler` says what that hash leaves out, and adds it).

Packing is by names alone: a file that an archive holds by this name is not packed again. Triton writes absolute paths
into its `__grp__` files; they are made to fit the folder they are unpacked to. Whoever can write an archive can run
code here, so archives that others own or may write are refused, and the SHA-256 is checked before anything is unpacked.

Standard library only: the folders have to be chosen before torch is imported.
"""

import contextlib
import gzip
import hashlib
import io
import json
import os
import platform
import re
import shutil
import stat
import sys
import tarfile
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path

from modded_nanogpt import cache_archive
from modded_nanogpt.cache_archive import (
    Hashing,
    Manifest,
    Unusable,
    check_name,
    move_in,
    private,
    read_manifest,
    trusted,
)
from nanogpt.common.compiler import FOLDERS, code_digest
from nanogpt.common.storage import sha256_of

MOST_ARCHIVES, MOST_BYTES = 8, 4 << 30  # that stay in the folder
NEW_PART = 0.01  # of the files, that must be new for an archive to be worth its seconds
TRIES = 3  # archives that are looked at, when the first ones cannot be used
LEFT_SECONDS = 24 * 3600  # after which a temporary file's writer is no more
_ID = 12  # hex digits of each part of a name
_MANIFEST = re.compile(rf"((?:[0-9a-f]{{{_ID}}}-){{3}}[0-9a-f]{{{_ID}}})\.json")
_SKIPPED = re.compile(r"^(\.|tmp\.)|\.(tmp|lock|pyc)$|^(lock|locks|__pycache__|precompiled_headers)$")
_UNREADABLE = (
    OSError, EOFError, zlib.error, tarfile.TarError, ValueError, KeyError, TypeError, AttributeError, RecursionError
)  # fmt: skip


def operators() -> list[Path]:
    """The code that torch's own keys leave out: of custom operators and all that they call here."""
    room = Path(__file__).resolve().parent
    return [*(room / "kernels").rglob("*.py"), room / "attention_backends.py"]


def environment(torch_version: str, gpu: str) -> str:
    """Hex digits for what compiled code depends on besides the source; gpu: name and capability, or "cpu"."""
    try:
        triton = metadata.version("triton")
    except metadata.PackageNotFoundError:
        triton = ""
    flags = ""
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    parts = [torch_version, triton, list(sys.version_info[:2]), gpu, platform.machine(), flags]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:_ID]


class CompileCache:
    """This node's compile caches and the archives in `folder`; `say` gets one line about each thing done."""

    def __init__(
        self, folder: Path, environment: str, source_sha256: str, say: Callable[[str], None]
    ) -> None:
        """environment: as the function of this name returns it. The local folders are those of the environment."""
        self.folder, self.environment, self.source = folder, environment, source_sha256[:_ID]
        self.operators = code_digest(operators())
        self.local = {name: Path(os.environ[variable]) for name, variable in FOLDERS.items()}
        self._say = say

    def say(self, text: str) -> None:
        """One line for the log."""
        self._say(f"compile caches: {text}")

    def restore(self) -> None:
        """Unpack the best archive, as far as its files are not on this node already."""
        began, tried = time.perf_counter(), 0
        for path in self._manifests()[:TRIES]:
            tried += 1
            try:
                manifest = read_manifest(path)
                missing = {name for name in manifest.files if not self._place(name).exists()}
                which = self._relation(path)
                if not missing:
                    self.say(f"already there ({len(manifest.files):,} files, {which})")
                    return
                self._unpack(manifest, missing)
            except _UNREADABLE as error:
                if isinstance(error, FileNotFoundError) and not path.exists():
                    continue  # a job beside this one has put a better one in its place
                self.say(f"note: {path.with_suffix('.tar.gz')}: cannot be used ({error}); left alone")
            except Unusable as error:
                self.say(f"note: {path.with_suffix('.tar.gz')}: {error}; left alone")
            else:
                size = sum(manifest.files[name] for name in missing)
                seconds = time.perf_counter() - began
                self.say(
                    f"restored {size / 1e6:,.1f} MB, {len(missing):,} files, in {seconds:.1f} s ({which})"
                )
                return
        files = sum(1 for _ in self._files())
        there = f"; {files:,} files of earlier runs on this node" if files else ""
        self.say(f"cold: {self.folder} has no archive{' that can be used' if tried else ''} for this GPU, torch "
                 f"and Triton{there}")  # fmt: skip

    def holds(self, graphs: str) -> bool:
        """Whether a run of this very code has compiled `graphs`, any text that stands for them, into these caches."""
        return self._mark(graphs).exists()

    def _mark(self, graphs: str) -> Path:
        parts = [self.environment, self.operators, self.source, graphs]
        digest = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[: 2 * _ID]
        return self.local["inductor"] / f"graphs-{digest}"

    def keep(self, graphs: str = "") -> None:
        """Pack this node's caches, if they hold more than the best archive does; remove archives beyond the limits.

        graphs: what a run has now compiled, for `holds`.
        """
        began = time.perf_counter()
        try:
            if graphs:
                mark = self._mark(graphs)
                mark.parent.mkdir(parents=True, exist_ok=True)
                mark.touch()
            known: set[str] = set()
            for path in self._manifests()[:TRIES]:
                with contextlib.suppress(Unusable, *_UNREADABLE):
                    known = set(read_manifest(path).files)
                    break
            files = self._newest_files()
            new = sum(name not in known for name in files)
            if new < NEW_PART * len(files) or not new:
                return
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            size = sum(path.stat().st_size for path in files.values())
            free = shutil.disk_usage(self.folder).free
            if free < size:
                raise Unusable(f"{free / 1e6:,.0f} MB free on its disk, {size / 1e6:,.0f} MB might be needed")
            archive, packed = self._pack(files)
            seconds = time.perf_counter() - began
            self.say(f"packed {len(files):,} files, {new:,} of them new, as {archive.name} "
                     f"({packed / 1e6:,.1f} MB) in {seconds:.1f} s")  # fmt: skip
            self._prune(archive)
        except (OSError, Unusable) as error:
            why = getattr(error, "strerror", None) or error
            self.say(f"note: {self.folder}: not kept: {why}; the next job compiles again (--compile_cache)")

    def _relation(self, manifest: Path) -> str:
        _, operators, source, _ = manifest.stem.split("-")
        if source == self.source:
            return "of this code"
        return "of earlier code" if operators == self.operators else "of earlier code, with other operators"

    def _manifests(self) -> list[Path]:
        """Manifests of this environment, the best one first."""
        found = []
        with contextlib.suppress(OSError):
            for path in self.folder.iterdir():
                name = _MANIFEST.fullmatch(path.name)
                if name and name[1].startswith(f"{self.environment}-"):
                    _, operators, source, _ = name[1].split("-")
                    with contextlib.suppress(OSError):
                        rank = (source == self.source, operators == self.operators, path.lstat().st_mtime_ns)
                        found.append((rank, path))
        return [path for _, path in sorted(found, reverse=True)]

    def _place(self, name: str) -> Path:
        room, _, rest = name.partition("/")
        return self.local[room] / rest

    def _files(self) -> Iterator[tuple[str, Path]]:
        """(name in the archive, path) of everything worth packing."""
        for room, root in self.local.items():
            others = [other.resolve() for other in self.local.values() if other != root]
            for folder, subfolders, names in os.walk(root):
                subfolders[:] = [
                    name for name in subfolders
                    if not _SKIPPED.search(name) and (Path(folder) / name).resolve() not in others
                ]  # fmt: skip
                for name in names:
                    path = Path(folder) / name
                    if not _SKIPPED.search(name):
                        yield f"{room}/{path.relative_to(root).as_posix()}", path

    def _newest_files(self) -> dict[str, Path]:
        """Name in the archive: path. The newest regular files, as many as one archive takes."""
        dated = []
        for name, path in self._files():
            with contextlib.suppress(OSError, Unusable):  # another job may remove what is only for a moment
                state = path.lstat()
                if stat.S_ISREG(state.st_mode) and check_name(name):
                    dated.append((state.st_mtime_ns, state.st_size, name, path))
        taken, size = {}, 0
        for _, bytes_of, name, path in sorted(dated, reverse=True)[: cache_archive.MOST_FILES]:
            size += bytes_of
            if size > cache_archive.LARGEST:
                break
            taken[name] = path
        return dict(sorted(taken.items()))

    def _pack(self, files: dict[str, Path]) -> tuple[Path, int]:
        """Write archive and manifest; the archive's path and bytes: a later job may have removed it by now. OSError."""
        sizes: dict[str, int] = {}
        temporary = self.folder / f".{platform.node()}.{os.getpid()}.{time.time_ns()}.tmp"
        try:
            with private(temporary) as file:
                total = Hashing(file)
                with (
                    gzip.GzipFile("", "wb", 1, total, mtime=0) as packed,
                    tarfile.open(fileobj=packed, mode="w|") as tar,
                ):
                    for name, path in files.items():
                        with contextlib.suppress(FileNotFoundError):  # another job's, or a cleaner's
                            data = path.read_bytes()  # at once: what is packed is one state of the file
                            member = tarfile.TarInfo(name)
                            member.size, member.mtime, member.mode = (
                                len(data),
                                int(path.stat().st_mtime),
                                0o600,
                            )
                            tar.addfile(member, io.BytesIO(data))
                            sizes[name] = member.size
                file.flush()
                os.fsync(file.fileno())
                written = file.tell()
            sha256 = total.digest.hexdigest()
            stem = "-".join([self.environment, self.operators, self.source, sha256[:_ID]])
            archive = self.folder / f"{stem}.tar.gz"
            temporary.replace(archive)
            with private(temporary) as file:
                file.write(json.dumps({"sha256": sha256, "files": sizes}).encode())
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(self.folder / f"{stem}.json")  # with it the archive is there
        finally:
            temporary.unlink(missing_ok=True)
        return archive, written

    def _unpack(self, manifest: Manifest, missing: set[str]) -> None:
        """Put the archive's `missing` files into their places, each whole or not at all. Unusable, OSError, ..."""
        if not hasattr(tarfile, "data_filter"):
            raise Unusable(
                f"Python {platform.python_version()} cannot unpack safely; 3.10.12, 3.11.4 and later can"
            )
        temporary: dict[str, Path] = {}
        try:
            for room, root in self.local.items():
                root.mkdir(mode=0o700, parents=True, exist_ok=True)
                _remove_left(root, ".restore-*")
                temporary[room] = Path(tempfile.mkdtemp(prefix=".restore-", dir=root))
            with trusted(manifest.archive) as file:
                if sha256_of(file) != manifest.sha256:
                    raise Unusable("its SHA-256 is not the one in its manifest")
                file.seek(0)
                with gzip.open(file) as unpacked, tarfile.open(fileobj=unpacked, mode="r|") as tar:
                    left = dict(manifest.files)
                    for member in tar:
                        if not member.isreg() or left.pop(member.name, None) != member.size:
                            raise Unusable(f"it holds {member.name!r}, which its manifest does not")
                        if member.name in missing:
                            room, _, rest = member.name.partition("/")
                            member.name = rest
                            tar.extract(member, temporary[room], filter="data")
            # Triton's group files last: each names files that have to be there by then.
            for name in sorted(missing - left.keys(), key=lambda name: ("/__grp__" in name, name)):
                room, _, rest = name.partition("/")
                move_in(temporary[room] / rest, self._place(name))
        finally:
            for path in temporary.values():
                shutil.rmtree(path, ignore_errors=True)

    def _prune(self, newest: Path) -> None:
        """Remove archives that later ones replace, those beyond the limits, and what killed jobs left."""
        _remove_left(self.folder, ".*.tmp")
        dated = []
        for path in self.folder.iterdir():
            if _MANIFEST.fullmatch(path.name):
                with contextlib.suppress(OSError):
                    archive = path.with_suffix(".tar.gz")
                    dated.append((-path.stat().st_mtime_ns, archive.stat().st_size, archive))
        # The same order for all: two jobs that each put their own archive first would remove both.
        seen, size = set(), 0
        for _, bytes_of, archive in sorted(dated):
            code = archive.name.rsplit("-", 1)[0]
            size += bytes_of
            if code in seen or len(seen) >= MOST_ARCHIVES or (size > MOST_BYTES and archive != newest):
                size -= bytes_of
                for path in (archive.with_name(archive.name.removesuffix(".tar.gz") + ".json"), archive):
                    with contextlib.suppress(OSError):
                        path.unlink(missing_ok=True)
            seen.add(code)


def _remove_left(folder: Path, pattern: str) -> None:
    """Remove temporary files and folders whose writers were killed."""
    for path in folder.glob(pattern):
        with contextlib.suppress(OSError):
            if time.time() - path.lstat().st_mtime > LEFT_SECONDS:
                shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
