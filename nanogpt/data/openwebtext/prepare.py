"""OpenWebText in GPT-2's tokens: about 9 billion, in shards of 100 million (18 GB), 8,013,769 documents.

    python nanogpt/data/openwebtext/prepare.py
    python nanogpt/data/openwebtext/prepare.py --max_documents=100000 --name=openwebtext_small
    python nanogpt/data/openwebtext/prepare.py --format=bin
    python nanogpt/data/openwebtext/prepare.py --text_files='/data/mine/*.jsonl' --name=mine

Streams the text from the Hugging Face hub and encodes it on all cores; memory stays under 1 GB. Interrupted
at any moment, it goes on after the last complete shard when it is run again. The tokens do not depend on
--num_workers. HF_ENDPOINT, HF_HUB_OFFLINE and HF_TOKEN work as everywhere.
"""

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

if __package__ in (None, ""):
    sys.path[0] = str(
        Path(__file__).resolve().parents[3]
    )  # the repository root, so that `import nanogpt` works

from nanogpt.common.errors import GOES_ON, run_command
from nanogpt.common.flags import knob, parse
from nanogpt.data.making import SetFlags, format_knob, print_raw, tokenize_all

REPOSITORY = "Skylion007/openwebtext"
# The hub's own conversion to Parquet (80 files): the authors' own files are archives that only a script can
# read, and scripts are not run. A branch can move, so the commit that it means at the start is
# written down, in progress.json and then in manifest.json, and a resumed run reads that commit.
# `--revision=<commit>` pins one for everybody.
REVISION = "refs/convert/parquet"
TEXT_BYTES = 39_769_491_688  # of the whole set, for the time that is left


@dataclass(frozen=True)
class Config(SetFlags):
    """The command line."""

    name: str = knob("openwebtext", "name of the token set and its folder")
    repository: str = knob(REPOSITORY, "data set on the hub, in Parquet files with a text column")
    revision: str = knob(REVISION, "its branch or commit")
    text_files: str = knob(
        "", 'read these .jsonl ({"text": ...} a line) or .parquet files instead; a glob pattern'
    )
    max_documents: int = knob(0, "stop after so many documents, 0: all", low=0)
    val_every: int = knob(2000, "one document in so many is validation text, picked by a hash", low=2)
    format: str = format_knob()


def main(argv: list[str]) -> None:
    """Make the set, go on making it, mend it, or say that it is there."""
    config = parse(Config, argv, prog="nanogpt/data/openwebtext/prepare.py", description=__doc__)
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
    from nanogpt.data.token_stream import ShardWriter, encode_documents, in_validation

    encode = partial(encode_documents, gpt2_encoding(root))
    writer = ShardWriter(config.name, root / config.name, config.shard_tokens, made_from, state)
    total = source.total_bytes() if not config.max_documents else None
    validates = partial(in_validation, every=config.val_every)
    tokenize_all(config, source, encode, writer, validates, total, config.max_documents)


def _say(config: Config, root: Path, what: str) -> None:
    from nanogpt.common.shards import open_token_set

    found = open_token_set(config.name, root)
    print(
        f"{config.name}: {what}: {found.num_tokens('train'):,} training tokens in {len(found.shards_train)} shards, "
        f"{found.num_tokens('val'):,} for validation, in {found.folder}"
    )
    if config.format == "bin":
        print_raw(found)


if __name__ == "__main__":
    run_command(main, again=GOES_ON)
