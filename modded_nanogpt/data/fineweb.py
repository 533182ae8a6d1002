"""FineWeb, or any other text, in GPT-2's tokens, laid out as the speedrun's published shards are.

    python modded_nanogpt/data/fineweb.py                                     # the sample of 10 billion tokens
    python modded_nanogpt/data/fineweb.py --text_files='/data/mine/*.jsonl' --name=mine --val_tokens=2000000

The documents stay in their order, each behind an end-of-text token, and are cut into shards wherever 100 million
tokens are full. The first shard is for validation. From the hub, from Parquet files or from JSON lines; memory stays
bounded; interrupted at any moment, the next call goes on after the last complete shard. The tokens do not depend on
--num_workers. The published tokens come quicker: cached_fineweb10B.py.
"""

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

if __package__ in (None, ""):
    sys.path[0] = str(
        Path(__file__).resolve().parents[2]
    )  # the repository root, so that `import nanogpt` works

from nanogpt.common.errors import GOES_ON, run_command
from nanogpt.common.flags import knob, parse
from nanogpt.data.making import SetFlags, tokenize_all

if TYPE_CHECKING:
    from nanogpt.data.sources import Source
    from nanogpt.data.token_stream import ShardWriter

PROG = "modded_nanogpt/data/fineweb.py"


@dataclass(frozen=True)
class Config(SetFlags):
    """The command line."""

    name: str = knob("fineweb", "name of the token set and its folder")
    repository: str = knob(
        "HuggingFaceFW/fineweb", "data set on the hub, in Parquet files with a text column"
    )
    revision: str = knob("main", "its branch or commit")
    files: str = knob("sample/10BT/*.parquet", "which files of it")
    text_files: str = knob("", "read these files instead: a glob pattern; *.parquet, or JSON lines")
    max_documents: int = knob(0, "stop after so many documents, 0: all", low=0)
    val_tokens: int = knob(
        0, "tokens for validation, from the beginning; 0: one shard", low=0, high=1_000_000_000
    )


def main(argv: list[str]) -> None:
    """Make the set, go on making it, mend it, or say that it is there."""
    config = parse(Config, argv, prog=PROG, description=__doc__)
    from nanogpt.common.shards import data_root, open_token_set
    from nanogpt.common.storage import make_folder
    from nanogpt.data.resume import recover
    from nanogpt.data.sources import Hub, local_source
    from nanogpt.data.token_stream import ShardWriter

    root = data_root(config.data_root)
    folder = root / config.name
    if config.text_files:
        source = local_source(config.text_files)
    else:
        source = Hub(config.repository, config.revision, files=config.files)
    val_tokens = config.val_tokens or config.shard_tokens
    settings = {
        "max_documents": config.max_documents,
        "shard_tokens": config.shard_tokens,
        "val_first": val_tokens,
    }
    made_from = {**source.identity, **settings}
    make_folder(folder)
    state = recover(folder, made_from, report=lambda line: print(line, flush=True))
    if state is not None:
        source.commit = state.commit
        if state.files:
            print(f"{config.name}: {len(state.files)} shards are there; going on", flush=True)
        shards = ShardWriter(config.name, folder, config.shard_tokens, made_from, state, val_first=val_tokens)
        _make(config, source, root, shards)
    found = open_token_set(config.name, root)
    print(
        f"{config.name}: {'already prepared and verified' if state is None else 'prepared'}: "
        f"{found.num_tokens('train'):,} training tokens in {len(found.shards_train)} shards, "
        f"{found.num_tokens('val'):,} for validation, in {found.folder}"
    )


def _make(config: Config, source: "Source", root: Path, shards: "ShardWriter") -> None:
    from nanogpt.common.gpt2_encoding import gpt2_encoding
    from nanogpt.data.token_stream import encode_documents

    encode = partial(encode_documents, gpt2_encoding(root))
    total = source.total_bytes() if not config.max_documents else None
    tokenize_all(config, source, encode, shards, lambda _: False, total, config.max_documents)


if __name__ == "__main__":
    run_command(main, again=GOES_ON)
