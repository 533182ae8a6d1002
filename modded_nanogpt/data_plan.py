"""Which documents every step of a run trains on, worked out before the first step from their positions alone.

A shard is a row of documents, each behind an end-of-text token. A step takes documents in that order: every lane begins
with a document, longer ones lose what is past the stage's limit, and the last one of a lane is cut so that the lane
has exactly one token more than its inputs. When a shard ends in the middle of a step, that step begins anew with the
next shard. So the plan depends on the data, the schedule and the number of lanes, and on nothing else: every rank
works it out alone, every world size trains on the same lanes, and a resumed run needs no more than its step's number.
"""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from modded_nanogpt import layer_plan, schedule
from modded_nanogpt.config import Config, lane_count
from modded_nanogpt.data.cached_fineweb10B import SETS
from nanogpt.common.errors import UserError
from nanogpt.common.shards import Shard, TokenSet

SHARD_TOKENS = 100_000_000  # of the published sets
CHUNK = 1 << 22  # tokens looked through at a time
READ_AHEAD = 3  # shards whose documents are looked for at once
# The share of FineWeb's tokens that is left when documents are cut at so many tokens: for a first estimate only.
KEPT = {0: 0.3, 256: 0.45, 896: 0.66, 2048: 0.85, 4096: 0.93}


@dataclass(frozen=True)
class Documents:
    """Where the documents of one shard begin: positions int64 [n], and the shard's length in tokens."""

    starts: np.ndarray
    num_tokens: int

    def ends(self, limit: int) -> np.ndarray:
        """int64 [n + 1]: tokens in the first k documents when each is cut at `limit`."""
        lengths = np.diff(self.starts, append=self.num_tokens)
        return np.concatenate([[0], np.minimum(lengths, limit).cumsum()])


@dataclass(frozen=True)
class DataPlan:
    """The documents of every step. Step s takes those from `first[s, 0]` on, of the shard number `shard[s]`."""

    shard: np.ndarray  # int64 [steps]
    first: (
        np.ndarray
    )  # int64 [steps, lanes + 1]: the document that each lane begins with, and where the next step does
    documents: dict[int, Documents]  # of the shards that are used
    # By lane size: the most documents that one lane has, or pieces of documents that attention keeps apart.
    most_documents: dict[int, int]
    source_tokens: int  # gone through, with what was cut away

    def position(self, step: int) -> dict[str, int]:
        """Where step `step` begins: shard and document. The end for the step after the last one."""
        if step < len(self.shard):
            return {"shard": int(self.shard[step]), "document": int(self.first[step, 0])}
        return {"shard": int(self.shard[-1]), "document": int(self.first[-1, -1])}

    def repeats_from(self) -> int | None:
        """The first step whose text was trained on before; None where all text is read once."""
        shards, documents = np.diff(self.shard), np.diff(self.first[:, 0])
        back = np.flatnonzero((shards < 0) | ((shards == 0) & (documents < 0)))
        return int(back[0]) + 1 if back.size else None

    def pieces(self, step: int, lane: int, inputs: int, limit: int) -> tuple[np.ndarray, np.ndarray]:
        """(where in their shard they begin, how long they are) of the documents of one lane: inputs + 1 tokens in all.

        limit: the stage's longest document, in tokens.
        """
        first, after = self.first[step, lane : lane + 2]
        documents = self.documents[int(self.shard[step])]
        starts = documents.starts[first:after]
        ends = np.append(documents.starts[first + 1 : after + 1], documents.num_tokens)[: len(starts)]
        lengths = np.minimum(ends - starts, limit)
        lengths[-1] -= lengths.sum() - (inputs + 1)
        return starts, lengths

    def describe(self, token_set: TokenSet, config: Config) -> str:
        """One line for the log."""
        trained = sum((stage.end - stage.start) * stage.batch_tokens for stage in schedule.stages(config))
        how = "documents are cut" if token_set.eot is not None else "no end-of-text tokens: cut into pieces"
        return (
            f"{token_set.name}: {len(self.documents)} of {len(token_set.shards_train)} training shards are used, "
            f"{self.source_tokens:,} tokens for {trained:,} trained ones ({how})"
        )


def find_documents(shard: Shard, end_of_text: int | None, piece: int) -> Documents:
    """The places of `end_of_text` in a shard; every `piece` tokens for a set that has no such token.

    UserError when the set has one and the shard has not.
    """
    if end_of_text is None:
        return Documents(np.arange(0, shard.num_tokens, piece), shard.num_tokens)
    tokens = shard.tokens()
    found = [
        np.flatnonzero(tokens[place : place + CHUNK] == end_of_text) + place
        for place in range(0, len(tokens), CHUNK)
    ]
    starts = np.concatenate(found).astype(np.int64)
    if not len(starts):
        raise UserError(
            f"{shard.path}: no token {end_of_text} in it, which stands before each document; prepare the set again"
        )
    return Documents(starts, shard.num_tokens)


def tokens_needed(config: Config) -> int:
    """About how many tokens of text the training goes through, FineWeb's document lengths assumed."""
    needed = 0.0
    for stage in schedule.stages(config):
        kept = KEPT[max(limit for limit in KEPT if limit <= stage.max_document)]
        needed += (stage.end - stage.start) * stage.batch_tokens / kept
    return int(needed)


def check_vocabulary(token_set: TokenSet, config: Config) -> None:
    """UserError for a set whose token ids the model does not know."""
    vocab = layer_plan.size(config).vocab
    if token_set.vocab_size is None or token_set.vocab_size > vocab:
        raise UserError(
            f"--dataset={config.dataset}: has {token_set.vocab_size or 'unknown'} tokens in its vocabulary, the model "
            f"{vocab}; say --vocab_size={token_set.vocab_size or '...'}"
        )


def check_validation(token_set: TokenSet, config: Config) -> None:
    """UserError unless there are validation tokens enough, and one more for the last target."""
    there = token_set.num_tokens("val")
    if there <= config.eval_tokens:
        names = ", ".join(shard.path.name for shard in token_set.shards_val)
        raise UserError(
            f"{token_set.folder}: validation has {there:,} tokens ({names}), --eval_tokens={config.eval_tokens} needs "
            f"{config.eval_tokens + 1:,}; pass --eval_tokens={max(1, (there - 1) // 128 * 128)}, or another --dataset"
        )


def check_targets(plan: DataPlan, token_set: TokenSet, config: Config) -> None:
    """UserError when a lane has more different tokens than a step with sampled softmax scores.

    FineWeb has not, so its tokens are not read for this.
    """
    if not config.sampled_softmax or token_set.name in SETS:
        return
    lanes = lane_count(config)
    for stage in schedule.stages(config):
        size = stage.batch_tokens // lanes
        for step in range(stage.start, stage.end):
            classes = schedule.sampled_classes(config, step)
            tokens = token_set.shards_train[plan.shard[step]].tokens()
            for lane in range(lanes if classes else 0):
                pieces = zip(*plan.pieces(step, lane, size, stage.max_document), strict=True)
                lane_tokens = np.concatenate([tokens[at : at + length] for at, length in pieces])
                # The copy pointer's slot is scored too.
                found = np.count_nonzero(np.bincount(lane_tokens)) + config.copy_pointer
                if found > classes:
                    raise UserError(
                        f"--sampled_softmax=true: {token_set.folder}: a lane of step {step} has {found:,} different "
                        f"tokens, and {classes:,} are scored; pass --lanes={2 * lanes}, or --sampled_softmax=false"
                    )


def plan_data(token_set: TokenSet, config: Config) -> DataPlan:
    """Plan every step of the run. UserError names the files and what is missing when the data is too short."""
    walk = _Walk(token_set, config)
    lanes, total = lane_count(config), schedule.total_steps(config)
    shard, first = np.empty(total, np.int64), np.empty((total, lanes + 1), np.int64)
    most: dict[int, int] = {}
    try:
        for stage in schedule.stages(config):
            size = stage.batch_tokens // lanes
            for step in range(stage.start, stage.end):
                shard[step], first[step] = walk.take(lanes, size + 1, stage.max_document, step)
                most[size] = max(most.get(size, 0), walk.most_pieces(first[step]))
    finally:
        walk.close()
    used = {int(index): walk.documents[int(index)] for index in np.unique(shard)}
    return DataPlan(shard, first, used, most, walk.passed_tokens())


class _Walk:
    """Goes through the shards, whose documents are looked for ahead by threads."""

    def __init__(self, token_set: TokenSet, config: Config) -> None:
        check_vocabulary(token_set, config)
        self.token_set, self.config = token_set, config
        self._piece = max(stage.max_document for stage in schedule.stages(config))
        self.shards = token_set.shards_train
        self.documents: dict[int, Documents] = {}
        self.index, self.cursor, self.passed, self.passes = 0, 0, 0, 1
        self._ends, self._pieces, self._ends_of = np.empty(0), np.empty(0, np.int64), (-1, -1)
        self._pool = ThreadPoolExecutor(READ_AHEAD)
        self._waiting: deque[Future] = deque()
        self._unread: Iterator[Shard] = iter(self.shards)
        self._open()

    def close(self) -> None:
        """Stop the threads."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def passed_tokens(self) -> int:
        """Tokens of text between the beginning and the cursor."""
        here = self.documents[self.index]
        inside = here.starts[self.cursor] if self.cursor < len(here.starts) else here.num_tokens
        return self.passed + int(inside)

    def take(self, lanes: int, need: int, limit: int, step: int) -> tuple[int, np.ndarray]:
        """The next step's shard and lane boundaries, `need` tokens a lane, documents cut at `limit`."""
        tried = 0
        while (bounds := self._bounds(lanes, need, limit)) is None:
            tried += 1
            at_end = self.index + 1 == len(self.shards)
            if tried > len(self.shards) or (at_end and self.passes == self.config.data_passes):
                raise self._too_short(step, lanes * need)
            self.passes += at_end
            self.passed += self.documents[self.index].num_tokens
            self.index = (self.index + 1) % len(self.shards)
            self._open()
        self.cursor = int(bounds[-1])
        return self.index, bounds

    def most_pieces(self, bounds: np.ndarray) -> int:
        """Of the lanes that `take` has just bounded: the most pieces that attention keeps apart in one of them."""
        return int(np.diff(self._pieces[bounds]).max())

    def _open(self) -> None:
        """Begin the shard `index` at its first document."""
        self.cursor = 0
        if self.index in self.documents:
            return
        while len(self._waiting) < READ_AHEAD and (shard := next(self._unread, None)) is not None:
            self._waiting.append(self._pool.submit(find_documents, shard, self.token_set.eot, self._piece))
        self.documents[self.index] = self._waiting.popleft().result()

    def _bounds(self, lanes: int, need: int, limit: int) -> np.ndarray | None:
        if self._ends_of != (self.index, limit):
            self._ends, self._ends_of = self.documents[self.index].ends(limit), (self.index, limit)
            cap = schedule.attention_cap(self.config) or limit
            self._pieces = np.concatenate([[0], (-(-np.diff(self._ends) // cap)).cumsum()])
        bounds = np.empty(lanes + 1, np.int64)
        bounds[0] = self.cursor
        for lane in range(lanes):
            after = self._ends.searchsorted(self._ends[bounds[lane]] + need)
            if after == len(self._ends):
                return None
            bounds[lane + 1] = after
        return bounds

    def _too_short(self, step: int, step_tokens: int) -> UserError:
        config, found = self.config, self.token_set
        names = [shard.path.name for shard in self.shards]
        named = ", ".join(names) if len(names) < 4 else f"{names[0]} to {names[-1]}"
        total = schedule.total_steps(config)
        trained = sum(
            max(0, min(stage.end, step) - stage.start) * stage.batch_tokens
            for stage in schedule.stages(config)
        )
        whole = sum((stage.end - stage.start) * stage.batch_tokens for stage in schedule.stages(config))
        there = found.num_tokens("train")
        # What this text has given so far says how much of it the rest will take.
        needed = int(there * whole / trained) if trained else max(tokens_needed(config), 2 * step_tokens)
        more = "prepare more shards"
        if found.name in SETS:
            shards = min(SETS[found.name].chunks, -(-needed // SHARD_TOKENS))
            more = f"python modded_nanogpt/data/cached_fineweb10B.py {shards} --set={found.name}"
        return UserError(
            f"{found.folder}: {len(names)} training file{'s' * (len(names) > 1)} ({named}) with {there:,} tokens last "
            f"for {step:,} of {total:,} steps, about {needed:,} tokens are needed; {more}, or train fewer --steps, or "
            f"pass --data_passes={max(config.data_passes + 1, -(-needed // max(there, 1)))}"
        )
