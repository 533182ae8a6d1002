"""A vocabulary for the tests of prepare.py that needs no file."""

import pytest
import tiktoken


@pytest.fixture(scope="session")
def byte_encoding() -> tiktoken.Encoding:
    """A vocabulary that needs no file: a byte is a token, and end-of-text has GPT-2's number."""
    pattern = r"\p{L}+|\p{N}+|[^\s\p{L}\p{N}]+|\s+"
    ranks = {bytes([byte]): byte for byte in range(256)}
    return tiktoken.Encoding(
        "bytes", pat_str=pattern, mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 50256}
    )
