"""Texts and a vocabulary for the tests of prepare.py, found once: no test passes for the lack of them."""

import os
from pathlib import Path

import pytest
import tiktoken

from nanogpt.common.gpt2_encoding import gpt2_encoding
from nanogpt.data.small_sets import shakespeare_text

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def mirror(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as DATA_MIRROR expects it: tinyshakespeare.txt and tiktoken_cache/ with the GPT-2 vocabulary.

    It is the session's shared folder where that exists, else $DATA_MIRROR, else what the network gives.
    """
    for folder in (ROOT.parent / "shared" / "data", Path(os.environ.get("DATA_MIRROR", "/nowhere"))):
        if (folder / "tinyshakespeare.txt").is_file() and (folder / "tiktoken_cache").is_dir():
            return folder
    root = tmp_path_factory.mktemp("mirror")
    (root / "tinyshakespeare.txt").write_text(shakespeare_text(root), encoding="utf-8")
    gpt2_encoding(root)
    return root


@pytest.fixture(scope="session")
def byte_encoding() -> tiktoken.Encoding:
    """A vocabulary that needs no file: a byte is a token, and end-of-text has GPT-2's number."""
    pattern = r"\p{L}+|\p{N}+|[^\s\p{L}\p{N}]+|\s+"
    ranks = {bytes([byte]): byte for byte in range(256)}
    return tiktoken.Encoding(
        "bytes", pat_str=pattern, mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 50256}
    )
