"""Your own text as a token set: files, or folders of them, into shards that `--dataset=NAME` trains on.

    python nanogpt/data/text/prepare.py book.txt letters/ --name=mine
    python nanogpt/data/text/prepare.py notes/*.md --tokenizer=char --name=notes
    python nanogpt/data/text/prepare.py posts.jsonl --name=posts        # {"text": "..."} a line

A file is a document, and so is each line of a .jsonl file; of a folder, its .txt, .md and .jsonl files are taken.
One document in ten is validation text, at most a tenth of the characters; of fewer than ten documents, the last
tenth of each. The files are UTF-8. Interrupted, it goes on after the last complete shard when it is run again.
"""

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

if __package__ in (None, ""):
    sys.path[0] = str(
        Path(__file__).resolve().parents[3]
    )  # the repository root, so that `import nanogpt` works

from nanogpt.common.errors import GOES_ON, UserError, run_command
from nanogpt.common.flags import knob, parse, words
from nanogpt.data.making import SetFlags, format_knob, print_raw, tokenize_all

LARGEST_ALPHABET = 60_000  # characters, which are ids of 16 bits


@dataclass(frozen=True)
class Config(SetFlags):
    """The command line."""

    files: tuple[str, ...] = words("text files (UTF-8), .jsonl files, or folders of them", "FILE")
    tokenizer: str = knob("gpt2", "GPT-2's byte pairs, or a token a character", choices=("gpt2", "char"))
    format: str = format_knob()


def main(argv: list[str]) -> None:
    """Make the set, go on making it, or say that it is there."""
    config = parse(Config, argv, prog="nanogpt/data/text/prepare.py", description=__doc__)
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
        tokenize_all(config, source, encode, writer, source.validates, source.total_bytes())
    say(
        config,
        root,
        source.describe_split(),
        "already prepared and verified" if state is None else "prepared",
    )


def say(config: Config, root: Path, split: str, what: str) -> None:
    """What there is now, and the command that trains on it."""
    from nanogpt.common.shards import open_token_set

    found = open_token_set(config.name, root)
    print(
        f"{config.name}: {what}: {found.num_tokens('train'):,} training tokens, {found.num_tokens('val'):,} for "
        f"validation ({split}), vocabulary {found.vocab_size:,}, in {found.folder}"
    )
    if config.format == "bin":
        print_raw(found)
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


if __name__ == "__main__":
    run_command(main, again=GOES_ON)
