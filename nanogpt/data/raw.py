"""nanoGPT's files: train.bin and val.bin, the tokens of a set as uint16 and nothing else."""

import os
from pathlib import Path

from nanogpt.common.progress import Progress
from nanogpt.common.shards import TokenSet
from nanogpt.common.storage import check_room, fsync_folder, storage_errors, temporary_name

PIECE = 2**24  # bytes copied at once


def write_raw(found: TokenSet) -> list[Path]:
    """Write the shards once more as train.bin and val.bin beside them; files that are whole already stay.

    Their paths. StorageError when the disk refuses, or has no room for them: then no half file is left.
    """
    splits = {"train": found.shards_train, "val": found.shards_val}
    paths = {split: found.folder / f"{split}.bin" for split in splits}
    missing = {
        split: 2 * found.num_tokens(split)
        for split, path in paths.items()
        if not path.is_file() or path.stat().st_size != 2 * found.num_tokens(split)
    }
    if not missing:
        return list(paths.values())
    check_room(found.folder, sum(missing.values()))
    total, done = sum(missing.values()), 0
    with Progress(f"writing {' and '.join(f'{split}.bin' for split in missing)}") as bar:
        for split in missing:
            temporary = temporary_name(paths[split])
            with storage_errors(paths[split]):
                try:
                    with temporary.open("wb") as target:
                        for shard in splits[split]:
                            with shard.path.open("rb") as source:
                                source.seek(shard.offset_bytes)
                                while piece := source.read(PIECE):
                                    target.write(piece)
                                    done += len(piece)
                                    bar.update(done, total)
                        target.flush()
                        os.fsync(target.fileno())
                    temporary.replace(paths[split])
                    fsync_folder(found.folder)
                finally:
                    temporary.unlink(missing_ok=True)
    return list(paths.values())
