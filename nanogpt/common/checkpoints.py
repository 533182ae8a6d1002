"""Checkpoints that are whole or not there: tensors in safetensors, the rest in JSON, a SHA-256 for every file.

    checkpoints/step_00000250/model.safetensors optimizer.safetensors state.json manifest.json manifest.sha256

A checkpoint is written into a hidden folder, flushed to the disk and renamed; only a renamed folder counts. It is
believed when its manifest has the digest beside it and every file has the size and digest of the manifest, which is
checked before a byte is parsed. One that fails is moved to checkpoints/quarantine/ and the one before it is used.
No pickle is read or written.
"""

import errno
import hashlib
import json
import math
import os
import shutil
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from nanogpt.common.checkpoint_names import name_of, steps
from nanogpt.common.errors import StorageError, UserError
from nanogpt.common.storage import fsync_folder, make_folder, sha256_of, storage_errors

FORMAT = 1
_DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64",
           torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.uint8: "U8"}  # fmt: skip


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint. `tensors(part)` reads one file of it."""

    path: Path
    step: int
    state: dict

    def tensors(self, part: str) -> dict[str, Tensor]:
        """The tensors of `<part>.safetensors`, on the CPU; {} when the checkpoint has no such part."""
        path = self.path / f"{part}.safetensors"
        return load_file(path) if path.exists() else {}


class _HashingFile:
    """A file that knows the size and SHA-256 of what went through it, so that nothing is read back."""

    def __init__(self, path: Path) -> None:
        # Unbuffered: what a full disk refuses is refused here, not again when the file is closed.
        self.file, self.sha, self.size = path.open("wb", buffering=0), hashlib.sha256(), 0

    def write(self, data: bytes | memoryview) -> None:
        view, done = memoryview(data).cast("B"), 0
        while done < len(view):  # one write may take less: 2 GiB at most, or what the disk has left
            done += self.file.write(view[done:])
        self.sha.update(view)
        self.size += len(view)

    def close(self) -> dict:
        """Flush to the disk; the manifest entry."""
        try:
            self.file.flush()
            os.fsync(self.file.fileno())
        finally:
            self.file.close()
        return {"bytes": self.size, "sha256": self.sha.hexdigest()}


def _write_tensors(file: _HashingFile, tensors: dict[str, Tensor]) -> None:
    """The safetensors format, one tensor at a time, so that a save needs no second copy of the model."""
    header, position = {}, 0
    for name, tensor in sorted(tensors.items()):
        size = tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [position, position + size],
        }
        position += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for _, tensor in sorted(tensors.items()):
        if tensor.numel():
            flat = tensor.detach().cpu().contiguous().view(torch.uint8).flatten() if tensor.ndim else (
                tensor.detach().cpu().reshape(1).view(torch.uint8)
            )  # fmt: skip
            file.write(memoryview(flat.numpy()))


def save(
    folder: Path,
    step: int,
    parts: dict[str, dict[str, Tensor]],
    state: dict,
    before_publish: Callable[[], None] = lambda: None,
) -> Path:
    """Write a checkpoint and return its path.

    `parts` are files of named tensors, `state` is JSON. `before_publish` is called last of all before the rename, and
    may raise to prevent it; it is also asked for a better reason when writing fails. StorageError when the disk does
    not take it; then nothing is left behind.
    """
    make_folder(folder)
    final = folder / name_of(step)
    temporary = folder / f".{final.name}.{socket.gethostname()}.{os.getpid()}.tmp"
    with storage_errors(final):
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()
            files = {}
            for part, tensors in parts.items():
                file = _HashingFile(temporary / f"{part}.safetensors")
                try:
                    _write_tensors(file, tensors)
                finally:
                    files[f"{part}.safetensors"] = file.close()
            files["state.json"] = _write_bytes(temporary / "state.json", _json_bytes({"step": step, **state}))
            manifest = _json_bytes({"format": FORMAT, "step": step, "files": files})
            written = _write_bytes(temporary / "manifest.json", manifest)
            _write_bytes(temporary / "manifest.sha256", (written["sha256"] + "\n").encode())
            fsync_folder(temporary)
            before_publish()
            if final.exists() and not problem(final):
                shutil.rmtree(temporary)  # an earlier attempt saved this step: equal, and already safe
            else:
                if final.exists():
                    quarantine(final)
                temporary.rename(final)
                fsync_folder(folder)
        except OSError:
            shutil.rmtree(temporary, ignore_errors=True)
            before_publish()  # who has taken over the run also takes away what an earlier attempt was writing
            raise
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
    return final


def _json_bytes(value: object) -> bytes:
    return (json.dumps(value, indent=1, allow_nan=False) + "\n").encode()


def _write_bytes(path: Path, data: bytes) -> dict:
    file = _HashingFile(path)
    try:
        file.write(data)
    finally:
        entry = file.close()
    return entry


def problem(path: Path) -> str:
    """What is wrong with the checkpoint folder `path`, in a few words; "" when it is sound."""
    try:
        data = (path / "manifest.json").read_bytes()
        if (path / "manifest.sha256").read_bytes() != f"{hashlib.sha256(data).hexdigest()}\n".encode():
            return "manifest.json does not have its digest"
        manifest = json.loads(data)
        if manifest.get("format") != FORMAT or name_of(manifest.get("step", -1)) != path.name:
            return "manifest.json belongs to another checkpoint, or another version"
        if "state.json" not in manifest["files"]:
            return "manifest.json lists no state.json"
        for name, entry in manifest["files"].items():
            file = path / name
            if file.stat().st_size != entry["bytes"]:
                return f"{name} has {file.stat().st_size} bytes, not {entry['bytes']}"
            with file.open("rb") as opened:
                if sha256_of(opened) != entry["sha256"]:
                    return f"{name} does not have its digest"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def load(path: Path) -> Checkpoint:
    """The sound checkpoint `path`."""
    state = json.loads((path / "state.json").read_text())
    return Checkpoint(path, state["step"], state)


def load_latest(folder: Path, say: Callable[[str], None]) -> Checkpoint | None:
    """The newest sound checkpoint, or None. Unsound ones are moved to quarantine/, never deleted, and `say` tells."""
    for step in reversed(steps(folder)):
        path = folder / name_of(step)
        fault = problem(path)
        if not fault:
            return load(path)
        say(f"checkpoint {path.name} is not used: {fault}; moved to {quarantine(path)}")
    return None


def choose(folder: Path, wanted: str, note: Callable[[str], None]) -> Checkpoint:
    """The checkpoint in `folder` that `wanted` means: best (lowest validation loss), last, or the number of a step.

    Nothing is moved or written: the run may still be training. best and last pass over unsound ones, and `note` tells;
    UserError when there is no sound one, or the step that was wanted is unsound.
    """
    names = [name_of(step) for step in reversed(steps(folder))]
    if wanted.isdecimal():
        names = [name_of(int(wanted))]
    elif wanted == "best":
        names.sort(key=lambda name: val_loss_of(folder / name))  # stable: the newest of equals comes first
    for name in names:
        fault = problem(folder / name)
        if not fault:
            return load(folder / name)
        if wanted.isdecimal():
            raise UserError(f"{folder / name}: {fault}; name another step, or --checkpoint=last")
        note(f"checkpoint {name} is not used: {fault}")
    raise UserError(f"{folder}: holds no sound checkpoint; resume the run (--init_from=resume) to write one")


def val_loss_of(checkpoint: Path) -> float:
    """The validation loss of a checkpoint's very step; infinite when it was saved between two validations."""
    try:
        state = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))
        return float(state["val_loss"]) if state["val_step"] == state["step"] else math.inf
    except (OSError, ValueError, KeyError, TypeError):
        return math.inf  # unsound, which is found out later


def quarantine(path: Path) -> Path:
    """Move an unsound checkpoint out of the way; its new path."""
    folder = path.parent / "quarantine"
    make_folder(folder)
    number = 0
    while (target := folder / f"{path.name}.{number}").exists():
        number += 1
    with storage_errors(path):
        path.rename(target)
    return target


def prune(folder: Path, keep: int, also: set[int]) -> None:
    """Delete all but the newest `keep` checkpoints and the steps in `also`. Call it after a save, never before."""
    for step in steps(folder)[:-keep]:
        if step not in also:
            _discard(folder / name_of(step))


def _discard(path: Path) -> bool:
    """Delete a checkpoint; False when the file system refuses, which is no reason to stop a run that has just saved."""
    # Renamed first: a kill in the middle of the deletion must not leave half a checkpoint under a good name.
    trash = path.with_name(f".trash_{path.name}.{os.getpid()}")
    try:
        path.rename(trash)
    except OSError:
        return False
    shutil.rmtree(trash, ignore_errors=True)
    return True


def save_or_make_room(folder: Path, keep_step: int | None, save_once: Callable[[], Path]) -> Path:
    """`save_once()`; on a full disk the oldest checkpoint but one (and but `keep_step`) goes and it is tried again."""
    try:
        return save_once()
    except StorageError as error:
        cause = error.__cause__
        spare = [step for step in steps(folder)[:-1] if step != keep_step]
        if not spare or not isinstance(cause, OSError) or cause.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        if not _discard(folder / name_of(spare[0])):
            raise
        return save_once()
