"""The code as it is now, copied beside the launch: what is queued today runs today's code next week.

Taken: what git tracks plus what is new and not ignored. Without git: the folder, less what is generated.
"""

import contextlib
import hashlib
import os
import shutil
import subprocess
from pathlib import Path

from nanogpt.common.errors import UserError
from nanogpt.common.storage import fsync_folder, storage_errors

GENERATED = {"data", "out", "logs", "experiment_logs", "wandb", "build", "__pycache__", "node_modules"}
LARGEST_FILE = 64 << 20  # bytes; a bigger file in a source tree is data that nobody ignored
MOST_FILES = 20_000


def copy_code(root: Path, target: Path) -> dict:
    """Copy the checkout at `root` to `target` (must not exist yet).

    Returns {"files", "bytes", "digest" (SHA-256 over names and contents), "commit", "changed", "left_out"}.
    """
    names, how = list_files(root)
    if not names:
        raise UserError(f"{root}: no files to copy; is this a checkout of engaging-nanogpt?")
    if len(names) > MOST_FILES:
        raise UserError(f"{root}: {len(names)} files would be copied; add what is not code to .gitignore")
    digest, total, left_out, copied = hashlib.sha256(), 0, [], 0
    partial = target.with_name(f".{target.name}.partial")
    with storage_errors(target):
        partial.mkdir(mode=0o700)
        for name in names:
            source = root / name
            if source.is_symlink() or not source.is_file():
                continue  # a link may lead anywhere; a tracked file may be deleted; a submodule is a folder
            if source.stat().st_size > LARGEST_FILE:
                left_out.append(name)
                continue
            data = source.read_bytes()
            goal = partial / name
            goal.parent.mkdir(parents=True, exist_ok=True)
            goal.write_bytes(data)
            if os.access(source, os.X_OK):
                goal.chmod(0o755)
            digest.update(os.fsencode(name) + f"\0{len(data)}\0".encode() + data)
            total, copied = total + len(data), copied + 1
        partial.rename(target)
        fsync_folder(target.parent)
    commit = _git(root, "rev-parse", "HEAD") if how == "git" else None
    changed = bool(_git(root, "status", "--porcelain", "-z")) if how == "git" else None
    return {
        "files": copied,
        "bytes": total,
        "digest": digest.hexdigest(),
        "commit": commit.strip() if commit else None,
        "changed": changed,
        "left_out": left_out,
    }


def list_files(root: Path) -> tuple[list[str], str]:
    """The files that are code, sorted, and how they were found: `git` or `folder`."""
    listed = _git(root, "ls-files", "-z", "--cached", "--others", "--exclude-standard")
    if listed:
        return sorted({name for name in listed.split("\0") if name and not name.startswith("../")}), "git"
    found = []
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if name not in GENERATED and not name.startswith(".")]
        here = Path(folder).relative_to(root)
        found += [str(here / name) for name in files if not name.endswith(".pyc")]
        if len(found) > MOST_FILES:
            break
    return sorted(found), "folder"


def remove(folder: Path) -> None:
    """Delete a launch that did not come to be."""
    with contextlib.suppress(OSError):
        shutil.rmtree(folder)


def _git(root: Path, *words: str) -> str | None:
    """git's answer, or None where git is absent, refuses, or the folder is no repository of its own."""
    if not (root / ".git").exists():
        return None
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *words], stdin=subprocess.DEVNULL, capture_output=True, timeout=30
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.decode("utf-8", "surrogateescape") if done.returncode == 0 else None
