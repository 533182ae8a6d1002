"""What a text may be about to repeat: the token that followed when its last tokens stood there before.

For each token of a lane, the longest of LENGTHS is found whose last so many tokens, that one among them, occur earlier
in the same document; the candidate is the token behind their latest earlier place, and the bucket says how long the
match is and how often it occurs (proposal 378 of the modded-nanogpt speedrun). Everything is at or before the token
itself. Tokens are compared by class (`vocabulary.class_table`), in a vocabulary that is not GPT-2's by themselves;
the candidate is a token. What the model makes of it: `SpeedrunModel._copied`.

Each run of n tokens has a 64-bit hash, a polynomial of its tokens' mixed ids r with coefficients B^i:

    h_n(t) = r(t) + B r(t - 1) + ... + B^(n-1) r(t - n + 1),    h_(a+b)(t) = h_a(t) + B^a h_b(t - a)

and all LENGTHS are halves of each other, or nearly, so that nine sums give all. The number of the document is a part of
r: a run that reaches back over a document's beginning has no equal. One stable sort of the hashes of all lengths then
puts equal runs side by side in the order of the text. All are integer operations of torch, the same on every device,
none of which waits for a GPU. Products are of 64 bits and wrap around.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

# Each is the sum of one or two that come before: its halves, rounded.
LENGTHS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
COUNTS = 3  # occurrences that are told apart: one, two, more
BUCKETS = 1 + COUNTS * len(LENGTHS)  # the first is for tokens without a candidate
ID_BITS = 16  # of a token or class within an id; the document's number stands above

_MASK, _SIGN = (1 << 64) - 1, 1 << 63
_BASE = 0x9E6C63D0876A9A99  # B: odd, otherwise arbitrary
_STEP = 0xD1342543DE82EF95  # keeps hashes of different lengths apart
# The finalizer of SplitMix64 (Steele, Lea and Flood 2014): (shift, factor), and the last shift.
_ROUNDS, _LAST_SHIFT = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)), 31


def find_copies(tokens: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """(candidates, buckets), int32 (T,), of a lane's `tokens` (T,), compared by their `ids` int64 (T,).

    ids: the document's number x 2^16 + the token's class. buckets: 0 for no candidate, which then is token 0; else
    3 i + c, c of 1 to 3 earlier occurrences (3: or more) of the last LENGTHS[i] tokens.
    """
    count = len(tokens)
    keys, order = torch.sort(_hashes(ids), stable=True)
    row, place = order // count, order % count  # which length, where the run ends
    # No run equals a later one, whatever the hashes do: what is found lies before the token.
    again = _shifted((keys[1:] == keys[:-1]) & (place[:-1] < place[1:]), 1)
    times = again * (1 + _before(again) * (1 + _before(_before(again))))
    # Bucket and place in one number: of a token's lengths, the longest has the largest.
    found = again * ((COUNTS * row + times << 32) + _before(place))
    best = torch.empty_like(found).scatter_(0, order, found).view(len(LENGTHS), count).amax(0)
    buckets, last = best >> 32, best & (1 << 32) - 1
    following = tokens[(last + 1).clamp(max=count - 1)]
    return torch.where(buckets > 0, following, 0).int(), buckets.int()


def _hashes(ids: Tensor) -> Tensor:
    """int64 (len(LENGTHS) x T,): of the runs of each length that end at each token, length by length."""
    runs = {1: _mixed(ids + 1)}
    for length in LENGTHS[1:]:
        near, far = length - length // 2, length // 2
        older = _shifted(runs[far], near)[: len(ids)]
        runs[length] = runs[near] + _signed(pow(_BASE, near, 1 << 64)) * older
    return torch.cat([hashes + _signed(length * _STEP) for length, hashes in runs.items()])


def _mixed(ids: Tensor) -> Tensor:
    """A bijection of int64 after which the numbers look random."""
    for shift, factor in _ROUNDS:
        ids = (ids ^ _shifted_right(ids, shift)) * _signed(factor)
    return ids ^ _shifted_right(ids, _LAST_SHIFT)


def _shifted_right(ids: Tensor, bits: int) -> Tensor:
    """Zeros come in from the left, whatever the sign."""
    return ids >> bits & (1 << 64 - bits) - 1


def _signed(value: int) -> int:
    """The int64 with the last 64 bits of `value`."""
    return ((value & _MASK) ^ _SIGN) - _SIGN


def _shifted(values: Tensor, places: int) -> Tensor:
    """(n + places,): that many zeros before `values` (n,)."""
    return F.pad(values, (places, 0))


def _before(values: Tensor) -> Tensor:
    """The entry before each; a zero before the first."""
    return _shifted(values, 1)[:-1]
