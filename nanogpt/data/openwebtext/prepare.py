"""OpenWebText in GPT-2's tokens: about 9 billion, in shards of 100 million (18 GB), 8,013,769 documents.

    python nanogpt/data/openwebtext/prepare.py
    python nanogpt/data/openwebtext/prepare.py --max_documents=100000 --name=openwebtext_small
    python nanogpt/data/openwebtext/prepare.py --format=bin
    python nanogpt/data/openwebtext/prepare.py --text_files='/data/mine/*.jsonl' --name=mine

Streams the text from the Hugging Face hub and encodes it on all cores; memory stays under 1 GB. Interrupted
at any moment, it goes on after the last complete shard when it is run again. The tokens do not depend on
--num_workers. HF_ENDPOINT, HF_HUB_OFFLINE and HF_TOKEN work as everywhere.
"""

import os
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

if __package__ in (None, ""):
    sys.path[0] = str(
        Path(__file__).resolve().parents[3]
    )  # the repository root, so that `import nanogpt` works

from nanogpt.common.errors import UserError, run_command
from nanogpt.common.flags import knob, parse

REPOSITORY = "Skylion007/openwebtext"
# The hub's own conversion to Parquet (80 files): the authors' own files are archives that only a script can
# read, and scripts are not run. A branch can move, so the commit that it means at the start is
# written down, in progress.json and then in manifest.json, and a resumed run reads that commit.
# `--revision=<commit>` pins one for everybody.
REVISION = "refs/convert/parquet"
TEXT_BYTES = 39_769_491_688  # of the whole set, for the time that is left


@dataclass(frozen=True)
class Config:
    """The command line."""

    data_root: str = knob("", "folder that holds the token sets (default $DATA_ROOT, else data/)")
    name: str = knob("openwebtext", "name of the token set and its folder")
    repository: str = knob(REPOSITORY, "data set on the hub, in Parquet files with a text column")
    revision: str = knob(REVISION, "its branch or commit")
    text_files: str = knob(
        "", 'read these .jsonl ({"text": ...} a line) or .parquet files instead; a glob pattern'
    )
    max_documents: int = knob(0, "stop after so many documents, 0: all", low=0)
    val_every: int = knob(2000, "one document in so many is validation text, picked by a hash", low=2)
    shard_tokens: int = knob(100_000_000, "tokens in one shard", low=1024, high=1_000_000_000)
    format: str = knob(
        "shards", "bin: also nanoGPT's train.bin and val.bin, beside the shards", choices=("shards", "bin")
    )
    num_workers: int = knob(0, "threads that encode, 0: one a core", low=0, high=512)


def main(argv: list[str]) -> None:
    """Make the set, go on making it, mend it, or say that it is there."""
    config = parse(Config, argv, prog="nanogpt/data/openwebtext/prepare.py", description=__doc__)
    if not config.name or not config.name.replace("_", "").replace("-", "").isalnum():
        raise UserError(f"--name={config.name!r}: expected letters, digits, _ and -")
    from nanogpt.common.shards import data_root
    from nanogpt.common.storage import make_folder
    from nanogpt.data.resume import recover
    from nanogpt.data.sources import Hub, local_source

    root = data_root(config.data_root)
    folder = root / config.name
    if config.text_files:
        source = local_source(config.text_files)
    else:
        whole = (config.repository, config.max_documents) == (REPOSITORY, 0)
        source = Hub(config.repository, config.revision, text_bytes=TEXT_BYTES if whole else None)
    settings = {key: getattr(config, key) for key in ("max_documents", "val_every", "shard_tokens")}
    made_from = {**source.identity, **settings}
    make_folder(folder)
    state = recover(folder, made_from, report=lambda line: print(line, flush=True))
    if state is not None:
        if isinstance(source, Hub):
            source.commit = state.commit
        if state.files:
            print(f"{config.name}: {len(state.files)} shards are there; going on", flush=True)
        _make(config, source, root, made_from, state)
    _say(config, root, "already prepared and verified" if state is None else "prepared")


def _make(config: Config, source: object, root: Path, made_from: dict, state: object) -> None:
    from nanogpt.common.gpt2_encoding import gpt2_encoding
    from nanogpt.common.progress import Progress
    from nanogpt.data.token_stream import AlreadyDone, ShardWriter, encode_documents, in_validation, tokenize

    encoding = gpt2_encoding(root)
    writer = ShardWriter(config.name, root / config.name, config.shard_tokens, made_from, state)
    total = source.total_bytes() if not config.max_documents else None
    with Progress(f"tokenizing {config.name}") as bar:
        try:
            tokenize(
                source,
                partial(encode_documents, encoding),
                writer,
                workers=config.num_workers or len(os.sched_getaffinity(0)),
                validates=partial(in_validation, every=config.val_every),
                max_documents=config.max_documents,
                report=lambda chars, documents, tokens: bar.update(
                    chars, total, f"{documents:,} documents, {tokens:,} tokens"
                ),
            )
        except AlreadyDone:
            print(f"{config.name}: another process has finished it meanwhile", flush=True)


def _say(config: Config, root: Path, what: str) -> None:
    from nanogpt.common.shards import open_token_set
    from nanogpt.data.raw import write_raw

    found = open_token_set(config.name, root)
    print(
        f"{config.name}: {what}: {found.num_tokens('train'):,} training tokens in {len(found.shards_train)} shards, "
        f"{found.num_tokens('val'):,} for validation, in {found.folder}"
    )
    if config.format == "bin":
        for path in write_raw(found):
            print(f"{path}: {path.stat().st_size / 1e9:,.2f} GB, uint16")


if __name__ == "__main__":
    run_command(main)
