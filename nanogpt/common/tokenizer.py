"""Text to tokens and back, as the data set of a run did it: GPT-2's byte pairs, or one token a character."""

import codecs
import typing
from collections.abc import Callable
from pathlib import Path

from nanogpt.common.errors import UserError

if typing.TYPE_CHECKING:
    import tiktoken

    from nanogpt.common.shards import TokenSet

GPT2_TOKENS = {"tokenizer": "gpt2", "vocab_size": 50257, "eot": 50256, "chars": None}
END_OF_TEXT = "<|endoftext|>"


def tokens_of(token_set: "TokenSet") -> dict:
    """What a run's config.json keeps as "tokens": enough for `make_tokenizer` when the data set has gone."""
    from nanogpt.common.shards import read_chars

    return {
        "tokenizer": token_set.tokenizer,
        "vocab_size": token_set.vocab_size,
        "eot": token_set.eot,
        "chars": read_chars(token_set.folder) if token_set.tokenizer == "char" else None,
    }


class CharTokenizer:
    """A character's place in `chars` is its token."""

    def __init__(self, chars: str) -> None:
        self.chars, self.vocab_size = chars, len(chars)
        self.default_start = "\n" if "\n" in chars else chars[0]
        self._ids = {char: index for index, char in enumerate(chars)}

    def encode(self, text: str) -> list[int]:
        """The tokens of `text`; UserError naming the first character that the model has never seen."""
        for place, char in enumerate(text):
            if char not in self._ids:
                known = "".join(self.chars.split())
                raise UserError(
                    f"--start: character {char!r} (place {place + 1}): this model does not know it, only line breaks, "
                    f"blanks and {known[:90]}{'...' if len(known) > 90 else ''}; leave it away"
                )
        return [self._ids[char] for char in text]

    def decoder(self) -> Callable[[int], str]:
        """A function that is told one token after the other and gives the text that this makes certain."""
        return self.chars.__getitem__


class Gpt2Tokenizer:
    """GPT-2's byte pairs. One token may hold a part of a character only."""

    def __init__(self, encoding: "tiktoken.Encoding") -> None:
        self.encoding, self.vocab_size = encoding, encoding.n_vocab
        self.default_start = END_OF_TEXT  # it stands before each document, so this asks for a new one

    def encode(self, text: str) -> list[int]:
        """The tokens of `text`, in which <|endoftext|> is the token of that name."""
        return self.encoding.encode(text, allowed_special={END_OF_TEXT})

    def decoder(self) -> Callable[[int], str]:
        """As CharTokenizer's; "" until a character is complete, and U+FFFD for bytes that are no character."""
        incomplete = codecs.getincrementaldecoder("utf-8")("replace")
        return lambda token: incomplete.decode(self.encoding.decode_single_token_bytes(token))


Tokenizer = CharTokenizer | Gpt2Tokenizer


def make_tokenizer(tokens: dict, where: str, root: Path) -> Tokenizer:
    """The tokenizer that config.json's "tokens" describes; `where` names it in UserErrors. GPT-2's files are kept
    in `root`."""
    kind, chars = tokens.get("tokenizer"), tokens.get("chars")
    if kind == "char" and isinstance(chars, str) and chars and len(set(chars)) == len(chars):
        return CharTokenizer(chars)
    if kind == "gpt2":
        from nanogpt.common.gpt2_encoding import gpt2_encoding

        return Gpt2Tokenizer(gpt2_encoding(root))
    if kind == "unknown":
        raise UserError(
            f"{where}: the run's data set did not say how its tokens become text; "
            'put meta.json {"chars": "..."} into its folder and start the run again'
        )
    raise UserError(f"{where}: tokens: {str(tokens)[:60]}: names no tokenizer; is it the directory of a run?")


def printable(text: str) -> str:
    """Without the control characters that could rewrite a terminal; line breaks and tabs stay."""
    return "".join(
        char if char in "\n\t" or char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in text
    )
