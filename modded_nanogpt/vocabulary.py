"""Three tables over GPT-2's tokens, made from nothing but their bytes: prefixes, what can follow what, what is alike.

`prefix_table`: the longest proper prefix of each token that is a token itself. The training loss gives some credit for
it ("prefix token prediction", record 88).

`canonical_table`: which token can follow which in text that GPT-2's tokenizer has made (Vieira et al. 2025, arXiv
2506.07956). "th" + "e" cannot: that text would have been "the". Evaluation may give such tokens the probability 0 and
share it out among the others. What the table forbids never occurs; a few pairs that never occur are allowed.

`class_table`: tokens that are the same word but for case, accents and white space share a class, from which hashes of
n-grams may be made ("compressed" ids: Engram, arXiv 2601.07372; proposal 375 of the modded-nanogpt speedrun).
"""

import re
import unicodedata
from functools import cache
from itertools import pairwise
from pathlib import Path

import numpy as np

# The first tokens are the single bytes; every later one is two earlier ones merged, in that order.
BYTES = 256
END_OF_TEXT = 50_256
CONTRACTIONS = frozenset([b"'s", b"'t", b"'re", b"'ve", b"'m", b"'ll", b"'d"])
# What Unicode calls White_Space, which is what \s means to the tokenizer.
WHITESPACE = frozenset(
    "\t\n\v\f\r \x85\xa0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a\u2028\u2029\u202f"
    "\u205f\u3000"
)


def gpt2_tokens(root: Path) -> list[bytes]:
    """The bytes of GPT-2's 50,256 ordinary tokens, from tiktoken's files (see `gpt2_encoding`)."""
    from nanogpt.common.gpt2_encoding import gpt2_encoding

    encoding = gpt2_encoding(root)
    return [encoding.decode_single_token_bytes(token) for token in range(END_OF_TEXT)]


def prefix_table(tokens: list[bytes], padded_vocab: int) -> np.ndarray:
    """int64 [padded_vocab]: the token that is the longest proper prefix of each token; -1 where there is none."""
    ids = {text: token for token, text in enumerate(tokens[:padded_vocab])}
    table = np.full(padded_vocab, -1, np.int64)
    for text, token in ids.items():
        for length in range(len(text) - 1, 0, -1):
            if (found := ids.get(text[:length])) is not None:
                table[token] = found
                break
    return table


def class_table(tokens: list[bytes], padded_vocab: int) -> np.ndarray:
    """uint16 [padded_vocab]: the class of each token, which is the first token with the same `_normal_form`.

    Tokens that are no whole characters, those of which nothing is left, end-of-text and the padding are alone. Of
    GPT-2's 50,257 tokens 17,277 get another one's number, and 32,980 classes remain.
    """
    table, first = np.arange(padded_vocab, dtype=np.uint16), {}
    for token, text in enumerate(tokens[:padded_vocab]):
        try:
            form = _normal_form(text.decode("utf-8"))
        except UnicodeDecodeError:
            continue
        if form:
            table[token] = first.setdefault(form, token)
    return table


@cache
def gpt2_classes(root: Path, padded_vocab: int) -> np.ndarray:
    """`class_table` of GPT-2's tokens (see `gpt2_tokens`), made once."""
    return class_table(gpt2_tokens(root), padded_vocab)


def _normal_form(text: str) -> str:
    """`text` compatibly composed (NFKC), in lower case, without accents or white space around it; a blank for a run."""
    parts = unicodedata.normalize("NFD", unicodedata.normalize("NFKC", text))
    bare = "".join(char for char in parts if not unicodedata.category(char).startswith("M"))
    one_line = re.sub("[ \t\r\n]+", " ", bare.lower())
    return one_line if one_line == " " else one_line.strip("".join(WHITESPACE))


def canonical_table(tokens: list[bytes], padded_vocab: int) -> np.ndarray:
    """uint8 [padded_vocab, ceil(padded_vocab / 8)]: bit v % 8 (from the lowest) of [u, v // 8]: may v follow u?

    `tokens` are byte pairs in the order in which they were merged. End-of-text comes behind them and may stand
    anywhere; the padding behind that may not.

    Two tokens cannot stand side by side within a word when the tokenizer would have merged across their border:
    when there is a merge of something at the end of the first with something at the beginning of the second that
    came before the merges which made those parts of the two.
    """
    merges = _Merges(tokens)
    within_word = _within_word(tokens, padded_vocab)
    never = np.ones(padded_vocab, np.uint8)
    never[: len(tokens) + 1] = 0  # the padding
    never = _packed(never)
    inherited = np.zeros(
        (len(tokens), len(never)), np.uint8
    )  # what the smaller parts at a token's end forbid
    table = np.empty((padded_vocab, len(never)), np.uint8)
    table[:] = ~never
    for part, (ending, events) in enumerate(zip(_endings(tokens), merges.by_part(), strict=True)):
        forbidden = np.zeros(padded_vocab, np.uint8)
        # Going up through the merges, those with `part` on their left forbid more and more; a token that ends with
        # `part` hears of those before itself only: later, `part` was not at its end any more.
        for token in events:
            if merges.last[token] == part:
                inherited[token] = _packed(forbidden) | inherited[part]
            if merges.first[token] == part:
                forbidden[merges.beginning_with(merges.last[token], token)] = 1
        table[part] = ~((_packed(forbidden) | inherited[part]) & within_word[ending] | never)
    return table


def may_follow(table: np.ndarray, before: np.ndarray, token: np.ndarray) -> np.ndarray:
    """bool, of the common shape of `before` and `token`: whether the second may follow the first."""
    return (table[before, token >> 3] >> (token & 7)) & 1 == 1


def _packed(bits: np.ndarray) -> np.ndarray:
    return np.packbits(bits, bitorder="little")


class _Merges:
    """The two parts that each token was merged from, and an order in which tokens of the same beginning stand together.

    Behind each token come those that begin with it, the latest merges first.
    """

    def __init__(self, tokens: list[bytes]) -> None:
        ranks = {text: token for token, text in enumerate(tokens)}
        parts = [_split(text, token, ranks) for token, text in enumerate(tokens[BYTES:], BYTES)]
        none = [-1] * BYTES
        self.first = none + [ranks[left] for left, _ in parts]  # token to the part on its left, -1 for a byte
        self.last = none + [ranks[right] for _, right in parts]
        # Of each token: those whose left part it is, the latest first.
        self._longer: list[list[int]] = [[] for _ in tokens]
        for token in range(len(tokens) - 1, BYTES - 1, -1):
            self._longer[self.first[token]].append(token)
        order: list[int] = []
        self._place = [0] * len(tokens)  # in that order
        self._after = [0] * len(tokens)  # where the tokens that begin with this one end
        stack = list(range(BYTES - 1, -1, -1))
        while stack:
            token = stack.pop()
            if token < 0:
                self._after[~token] = len(order)
                continue
            self._place[token] = len(order)
            order.append(token)
            stack.append(~token)
            stack += reversed(self._longer[token])
        self._order = np.array(order)

    def beginning_with(self, part: int, since: int) -> np.ndarray:
        """The tokens at whose beginning `part` stands until merge number `since` or a later one, itself among them."""
        end = self._place[part] + 1
        for token in self._longer[part]:
            if token < since:
                break
            end = self._after[token]
        return self._order[self._place[part] : end]

    def by_part(self) -> list[list[int]]:
        """For each token the merges that it takes part in, in the order of the merges."""
        found: list[list[int]] = [[] for _ in self.first]
        for token in range(BYTES, len(self.first)):
            for part in {self.first[token], self.last[token]}:
                found[part].append(token)
        return found


def _split(text: bytes, token: int, ranks: dict[bytes, int]) -> tuple[bytes, bytes]:
    """The two parts of `token` that byte-pair encoding merges last."""
    parts = [text[place : place + 1] for place in range(len(text))]
    while len(parts) > 2:
        merged = [ranks.get(left + right, token) for left, right in pairwise(parts)]
        best = merged.index(min(merged))
        parts[best : best + 2] = [parts[best] + parts[best + 1]]
    return parts[0], parts[1]


def _within_word(tokens: list[bytes], padded_vocab: int) -> dict[str, np.ndarray]:
    """{how a token ends: bits of the tokens that stand in the same word when they follow it}.

    The tokenizer first cuts text into words (with their leading blank), numbers, signs and white space, and merges
    within these only. Where there is or may be such a cut between two tokens, anything can follow.
    """
    beginnings = np.array([_beginning(text) for text in tokens])
    found = {}
    for ending in ("letter", "number", "sign", "blank", "white", "unknown"):
        same = beginnings == "inside"
        if ending in ("letter", "number", "sign"):
            same |= beginnings == ending
        if ending == "blank":  # one blank belongs to what comes next
            same |= np.isin(beginnings, ["letter", "number", "sign"])
        if ending in ("blank", "white"):
            same |= beginnings == "run"
        found[ending] = _packed(np.pad(same, (0, padded_vocab - len(tokens))))
    return found


def _beginning(text: bytes) -> str:
    """What a token begins with: "inside" a character, a "run" of white space only, or as `_kind` calls it."""
    if text[0] & 0xC0 == 0x80:
        return "inside"
    whole = text.decode("utf-8", "ignore")
    if len(whole) > 1 and len(whole.encode()) == len(text) and all(char in WHITESPACE for char in whole):
        return "run"
    return _kind(text[: _length(text[0])])


def _endings(tokens: list[bytes]) -> list[str]:
    """What each token ends with, as `_kind` calls it. After 's and its like a word may begin at once: "unknown"."""
    found = []
    for text in tokens:
        start = len(text) - 1
        while start > 0 and text[start] & 0xC0 == 0x80:
            start -= 1
        found.append("unknown" if text in CONTRACTIONS else _kind(text[start:]))
    return found


def _length(first_byte: int) -> int:
    """Bytes of the UTF-8 character that begins so."""
    return 1 if first_byte < 0xC0 else 2 if first_byte < 0xE0 else 3 if first_byte < 0xF0 else 4


def _kind(char: bytes) -> str:
    """What the tokenizer's pattern takes a character for; "unknown" when it is not a whole one."""
    try:
        text = char.decode("utf-8")
    except UnicodeDecodeError:
        return "unknown"
    if text in WHITESPACE:
        return "blank" if text == " " else "white"
    return {"L": "letter", "N": "number"}.get(unicodedata.category(text)[0], "sign")
