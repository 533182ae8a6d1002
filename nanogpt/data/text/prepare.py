"""Your own text as a token set: files, or folders of them, into shards that `--dataset=NAME` trains on.

    python nanogpt/data/text/prepare.py book.txt letters/ --name=mine
    python nanogpt/data/text/prepare.py notes/*.md --tokenizer=char --name=notes
    python nanogpt/data/text/prepare.py posts.jsonl --name=posts        # {"text": "..."} a line

A file is a document, and so is each line of a .jsonl file; of a folder, its .txt, .md and .jsonl files are taken.
One document in ten is validation text, at most a tenth of the characters; of fewer than ten documents, the last
tenth of each. The files are UTF-8. Interrupted, it goes on after the last complete shard when it is run again.
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
from nanogpt.common.flags import knob, parse, words

LARGEST_ALPHABET = 60_000  # characters, which are ids of 16 bits


@dataclass(frozen=True)
class Config:
    """The command line."""

    files: tuple[str, ...] = words("text files (UTF-8), .jsonl files, or folders of them", "FILE")
    tokenizer: str = knob("gpt2", "GPT-2's byte pairs, or a token a character", choices=("gpt2", "char"))
    name: str = knob("mine", "name of the token set and its folder")
    data_root: str = knob("", "folder that holds the token sets (default $DATA_ROOT, else data/)")
    shard_tokens: int = knob(100_000_000, "tokens in one shard", low=1024, high=1_000_000_000)
    format: str = knob(
        "shards", "bin: also nanoGPT's train.bin and val.bin, beside the shards", choices=("shards", "bin")
    )
    num_workers: int = knob(0, "threads that encode, 0: one a core", low=0, high=512)


def main(argv: list[str]) -> None:
    """Make the set, go on making it, or say that it is there."""
    config = parse(Config, argv, prog="nanogpt/data/text/prepare.py", description=__doc__)
    if not config.name or not config.name.replace("_", "").replace("-", "").isalnum():
        raise UserError(f"--name={config.name!r}: expected letters, digits, _ and -")
    if not config.files:
        raise UserError(
            "FILE: name the text files to prepare, for example: "
            "python nanogpt/data/text/prepare.py book.txt --name=mine"
        )
    from nanogpt.common.shards import data_root
    from nanogpt.common.storage import make_folder
    from nanogpt.data.files import TextFiles
    from nanogpt.data.resume import recover
    from nanogpt.data.token_stream import ShardWriter

    root = data_root(config.data_root)
    source = TextFiles(config.files)
    encode, vocabulary = make_encoder(config.tokenizer, source.chars, root)
    folder = root / config.name
    settings = {"tokenizer": config.tokenizer, "shard_tokens": config.shard_tokens}
    make_folder(folder)
    made_from = {**source.identity, **settings}
    state = recover(folder, made_from, report=lambda line: print(line, flush=True))
    if state is not None:
        writer = ShardWriter(
            config.name, folder, config.shard_tokens, made_from, state, vocabulary=vocabulary
        )
        write(config, source, encode, writer)
    say(
        config,
        root,
        source.describe_split(),
        "already prepared and verified" if state is None else "prepared",
    )


def say(config: Config, root: Path, split: str, what: str) -> None:
    """What there is now, and the command that trains on it."""
    from nanogpt.common.shards import open_token_set
    from nanogpt.data.raw import write_raw

    found = open_token_set(config.name, root)
    print(
        f"{config.name}: {what}: {found.num_tokens('train'):,} training tokens, {found.num_tokens('val'):,} for "
        f"validation ({split}), vocabulary {found.vocab_size:,}, in {found.folder}"
    )
    if config.format == "bin":
        for path in write_raw(found):
            print(f"{path}: {path.stat().st_size / 1e9:,.2f} GB, uint16")
    preset = (
        "train_shakespeare_char" if config.tokenizer == "char" else "finetune_shakespeare --init_from=gpt2"
    )
    where = f" --data_root={root}" if config.data_root else ""
    print(
        f"train on it: python -m nanogpt.train {preset} --dataset={config.name}{where} --out_dir=out/{config.name}"
    )


def make_encoder(tokenizer: str, chars: str, root: Path):
    """(documents -> uint16 tokens [n], what the ids mean). `chars` are all characters of the text, sorted."""
    import numpy as np

    from nanogpt.data.small_sets import char_ids
    from nanogpt.data.token_stream import Vocabulary, encode_documents

    if tokenizer == "gpt2":
        from nanogpt.common.gpt2_encoding import gpt2_encoding

        return partial(encode_documents, gpt2_encoding(root)), Vocabulary()
    if len(chars) > LARGEST_ALPHABET:
        raise UserError(
            f"--tokenizer=char: the text has {len(chars):,} different characters, at most {LARGEST_ALPHABET:,} can be "
            "tokens; take --tokenizer=gpt2"
        )

    def encode(documents: list[str]) -> np.ndarray:
        # A line break ends each document: the character that the text has anyway, and what sampling starts with.
        ended = (text if text.endswith("\n") else f"{text}\n" for text in documents)
        return np.concatenate([np.empty(0, np.uint16), *(char_ids(text, chars) for text in ended)])

    return encode, Vocabulary("char", len(chars), None, chars)


def write(config: Config, source, encode, writer) -> None:
    """Encode on all cores, and write the shards."""
    from nanogpt.common.progress import Progress
    from nanogpt.data.token_stream import AlreadyDone, tokenize

    with Progress(f"tokenizing {config.name}") as bar:
        try:
            tokenize(
                source,
                encode,
                writer,
                workers=config.num_workers or len(os.sched_getaffinity(0)),
                validates=source.validates,
                report=lambda chars, documents, tokens: bar.update(
                    chars, source.total_bytes(), f"{documents:,} documents, {tokens:,} tokens"
                ),
            )
        except AlreadyDone:
            print(f"{config.name}: another process has finished it meanwhile", flush=True)


if __name__ == "__main__":
    run_command(main)
