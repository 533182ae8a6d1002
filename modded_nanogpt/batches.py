"""The tokens of each micro-step, packed as attention wants them, and those of the validation.

`data_plan` decides which documents a lane has; here they are read, put one behind the other and sent to the GPU, the
next batch while the current one is computed. Documents stay visible as `cu_seqlens`, the boundaries that attention
does not look across; everything else may. A document's last token is followed by the next one's end-of-text token.
"""

import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from torch import Tensor

from modded_nanogpt import layer_plan, schedule
from modded_nanogpt.candidates import candidates, turn_of
from modded_nanogpt.config import Config, resolve
from modded_nanogpt.copying import ID_BITS, find_copies
from modded_nanogpt.data_plan import DataPlan, check_validation, check_vocabulary, plan_data, tokens_needed
from modded_nanogpt.kernels.embedding import Runs, runs_of
from modded_nanogpt.ngrams import gram_rows, gram_signs
from modded_nanogpt.vocabulary import gpt2_classes
from nanogpt.common.shards import Shard, TokenSet, data_root

__all__ = ["Batch", "TrainBatches", "ValBatches", "tokens_needed"]

# Length of cu_seqlens by tokens of a lane: what the record uses on FineWeb. It has to be fixed (the compiled graph is
# static) and short (some attention kernels take longer for every entry).
BOUNDARIES = {16_384: 64, 32_768: 96, 40_960: 128, 49_152: 128}
USUAL_DOCUMENT = 300  # tokens; for other lane sizes
TEXT_MULTIPLE = 128  # tokens of `text_batch`
STEP = 32  # a text with more documents than expected gets so many entries more, as often as needed

FOR_CPU = ("bigram_rows_cpu", "gram_wanted")  # fields of a batch that stay there
BIGRAM_FACTORS = (36_313, 27_191)  # of a token and of the one before it, for the bigram hash


@dataclass(frozen=True)
class Batch:
    """One lane: L tokens of whole and cut documents, one behind the other."""

    inputs: Tensor  # int32 (L,)
    targets: Tensor  # int64 (L,): the token after each input
    # int32 (N,): 0, where each document ends, then L again and again; N is fixed for each L.
    cu_seqlens: Tensor
    bigram_rows: Tensor | None  # int32 (L,): rows of the bigram table; None without one
    sign_rows: Tensor | None  # int32 (L,): rows of the table of signs
    bigram_rows_cpu: Tensor | None  # the same as bigram_rows, where the CPU can read it
    token_runs: Runs  # the inputs by token, for the gradients of embeddings
    bigram_runs: Runs | None  # the bigram rows by row
    max_document: (
        int  # attention looks over no more tokens than that; the same for all training lanes of a size
    )
    candidates: Tensor | None = None  # int64 (P,): the classes that are scored, ascending; None: all
    # Of the table of n-grams, int32, a row a half; None without one.
    gram_rows: Tensor | None = None  # (2, L): rows of the table
    gram_signs: Tensor | None = None  # (2, L): rows of its signs
    # Where several ranks share the table: the different rows, ascending, for the CPU, and the place of each of
    # `gram_rows` among them.
    gram_wanted: Tensor | None = None  # (K,)
    gram_places: Tensor | None = None  # (2, L)
    # With --copy_input: what tokens are compared by (`copying`), and what `to` finds with it.
    copy_ids: Tensor | None = None  # int64 (L,)
    copy_tokens: Tensor | None = None  # int32 (L,)
    copy_buckets: Tensor | None = None  # int32 (L,)

    def to(self, device: torch.device) -> "Batch":
        """On `device`, copied without waiting, with what is found there."""
        batch = self if device.type == "cpu" else self._copied_to(device)
        if batch.copy_ids is None:
            return batch
        tokens, buckets = find_copies(batch.inputs, batch.copy_ids)
        return replace(batch, copy_tokens=tokens, copy_buckets=buckets)

    def _copied_to(self, device: torch.device) -> "Batch":
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        for name, value in values.items():
            if name not in FOR_CPU and isinstance(value, Tensor):
                values[name] = value.to(device, non_blocking=True)
            elif isinstance(value, Runs):
                values[name] = Runs(*(tensor.to(device, non_blocking=True) for tensor in value))
        return Batch(**values)


class TrainBatches:
    """The training batches of one rank: `get(step, micro_step)`. They depend on step and lane alone."""

    def __init__(
        self, token_set: TokenSet, config: Config, rank: int, world_size: int, device: torch.device
    ) -> None:
        self.config, self.rank, self.device = config, rank, device
        self.layout = resolve(config, world_size)
        self.plan: DataPlan = plan_data(token_set, config)  # UserError when the data is too short
        self.shards = token_set.shards_train
        self.stages = schedule.stages(config)
        self._stage_of = [
            index for index, stage in enumerate(self.stages) for _ in range(stage.start, stage.end)
        ]
        self._packer = _Packer(config, device.type == "cuda", world_size)
        self._cap = schedule.attention_cap(config)
        self._open_shard: tuple[int, np.ndarray] | None = None
        self._next_step = 0
        # On a GPU the next batch is read while this one is computed, and the next shard long before its turn.
        self._reader = None
        # The thread's pinned memory belongs to this rank's GPU, not to the first one.
        if device.type == "cuda":
            self._reader = ThreadPoolExecutor(1, initializer=torch.cuda.set_device, initargs=(device,))
        self._ahead: tuple[tuple[int, int], Future] | None = None

    def get(self, step: int, micro_step: int) -> Batch:
        """What this rank computes in micro-step `micro_step` of `step`, on the device. Any order will do."""
        if self._ahead and self._ahead[0] == (step, micro_step):
            batch = self._ahead[1].result()
        elif self._reader is not None:
            batch = self._reader.submit(self._read, step, micro_step).result()
        else:
            batch = self._read(step, micro_step)
        last = micro_step + 1 == self.layout.micro_steps
        following = (step + 1, 0) if last else (step, micro_step + 1)
        if self._reader is not None and following[0] < self.layout.total_steps:
            self._ahead = (following, self._reader.submit(self._read, *following))
        if last:
            self._next_step = step + 1
        return batch.to(self.device)

    def boundaries(self, lane_tokens: int) -> int:
        """Length of cu_seqlens for lanes of `lane_tokens`."""
        return boundaries(lane_tokens, self.plan.most_documents[lane_tokens])

    def longest(self, lane_tokens: int) -> int:
        """`Batch.max_document` of lanes of `lane_tokens`: one number for all stages, as it is a part of their graph."""
        longest = max(stage.max_document for stage in self.stages)
        return min(self._cap or longest, longest, lane_tokens)

    def state(self) -> dict[str, int]:
        """Where the step after the last whole one begins, as JSON."""
        return {"step": self._next_step, **self.plan.position(self._next_step)}

    def restart(self) -> None:
        """Go on with step 0."""
        self._next_step, self._ahead = 0, None

    def restore(self, state: dict[str, int]) -> str:
        """Go on after a checkpoint with that `state`; returns a line to log when the data is not what it was."""
        self._next_step, self._ahead = int(state["step"]), None
        now = self.state()
        if now == state:
            return ""
        return f"the data has changed: step {now['step']} began at {state}, now at {now}"

    def _read(self, step: int, micro_step: int) -> Batch:
        stage = self.stages[self._stage_of[step]]
        lane, size = self.layout.lane(micro_step, self.rank), stage.batch_tokens // self.layout.lanes
        index = int(self.plan.shard[step])
        starts, lengths = self.plan.pieces(step, lane, size, stage.max_document)
        tokens = self._tokens(index)
        classes = schedule.sampled_classes(self.config, step)
        pieces = [tokens[start : start + length] for start, length in zip(starts, lengths, strict=True)]
        turn = turn_of(step, lane, self.layout.lanes, classes, self._packer.vocabulary)
        return self._packer.pack(
            np.concatenate(pieces), lengths.cumsum(), self.boundaries(size), self.longest(size), (classes, turn),
            self._cap,
        )  # fmt: skip

    def _tokens(self, index: int) -> np.ndarray:
        """The tokens of shard `index`, mapped; the one after it is asked for."""
        if self._open_shard is None or self._open_shard[0] != index:
            self._open_shard = (index, self.shards[index].tokens())
            if self._reader is not None and index + 1 in self.plan.documents:
                _read_ahead(self.shards[index + 1])
        return self._open_shard[1]


class ValBatches:
    """The first `eval_tokens` validation tokens in slices of `eval_slice`; slice i belongs to rank i % world_size.

    A slice begins wherever it falls, in the middle of a document too; its documents have no largest length. Iterate:
    each time gives this rank's (batch, number of predicted tokens), the last slice possibly shorter than the others.
    """

    def __init__(
        self, token_set: TokenSet, config: Config, rank: int, world_size: int, device: torch.device
    ) -> None:
        self.rank, self.world_size, self.device = rank, world_size, device
        self.slice, self.num_tokens = min(config.eval_slice, config.eval_tokens), config.eval_tokens
        check_validation(token_set, config)
        maps = [shard.tokens() for shard in token_set.shards_val]
        self.tokens = np.concatenate([maps[0][: self.num_tokens + 1], *maps[1:]])[: self.num_tokens + 1]
        check_vocabulary(token_set, config)
        self.starts = np.flatnonzero(self.tokens == (-1 if token_set.eot is None else token_set.eot))
        self._packer = _Packer(config, device.type == "cuda", world_size)
        inside = [len(self._documents(*bounds)) + 1 for bounds in self._slices()]
        self.boundaries = boundaries(self.slice, max(inside))

    def __iter__(self) -> Iterator[tuple[Batch, int]]:
        for start, end in self._slices()[self.rank :: self.world_size]:
            ends = np.append(self._documents(start, end), end) - start
            batch = self._packer.pack(self.tokens[start : end + 1], ends, self.boundaries, end - start)
            yield batch.to(self.device), end - start

    def __len__(self) -> int:
        """Slices of this rank."""
        return len(self._slices()[self.rank :: self.world_size])

    @property
    def rounds(self) -> int:
        """The most slices that any rank has."""
        return -(-len(self._slices()) // self.world_size)

    def _slices(self) -> list[tuple[int, int]]:
        return [
            (start, min(start + self.slice, self.num_tokens))
            for start in range(0, self.num_tokens, self.slice)
        ]

    def _documents(self, start: int, end: int) -> np.ndarray:
        """Where documents begin inside the slice, its first token left out."""
        return self.starts[np.searchsorted(self.starts, start + 1) : np.searchsorted(self.starts, end)]


def piece_ends(lengths: np.ndarray, cap: int) -> np.ndarray:
    """Where what attention keeps apart ends, int64, for documents of `lengths` one behind the other.

    These are the documents, and with a `cap` further borders after every so many tokens of one.
    """
    if not cap:
        return lengths.cumsum()
    begins = lengths.cumsum() - lengths
    inner = [
        np.arange(begin + cap, begin + length, cap) for begin, length in zip(begins, lengths, strict=True)
    ]
    return np.sort(np.concatenate([lengths.cumsum(), *inner]))


def boundaries(lane_tokens: int, most_documents: int) -> int:
    """Length of cu_seqlens: what is usual for lanes of that size, more when the text has shorter documents."""
    usual = BOUNDARIES.get(lane_tokens, -(-lane_tokens // (USUAL_DOCUMENT * 128)) * 128)
    missing = max(0, most_documents + 1 - usual)
    return usual + -(-missing // STEP) * STEP


def blank_batch(
    config: Config,
    tokens: int,
    num_boundaries: int,
    max_document: int,
    device: torch.device,
    classes: int = 0,
) -> Batch:
    """A lane of one document of `tokens` tokens 0, shaped like any other: for compiling. classes: scored; 0: all."""
    packer, zeros = _Packer(config, device.type == "cuda"), np.zeros(tokens + 1, np.uint16)
    return packer.pack(zeros, np.array([tokens]), num_boundaries, max_document, (classes, 0)).to(device)


def text_batch(config: Config, tokens: list[int], device: torch.device) -> Batch:
    """One document of `tokens` as inputs, and a second one of tokens 0 behind it up to a size that kernels take."""
    size = -(-len(tokens) // TEXT_MULTIPLE) * TEXT_MULTIPLE
    padded = np.zeros(size + 1, np.uint16)
    padded[: len(tokens)] = tokens
    ends = np.unique([len(tokens), size])
    return _Packer(config, device.type == "cuda").pack(padded, ends, 3, size).to(device)


def bigram_rows(tokens: np.ndarray, rows: int) -> np.ndarray:
    """The bigram table's row for each of `tokens` [n] and the one before it: int64 [n], below `rows`.

    The last row stands for the first token, which has none before it. (Hash embeddings: Svenstrup et al. 2017, arXiv
    1709.03933; bigrams this way: record 62.)
    """
    wide = tokens.astype(np.int64)
    found = np.empty(len(wide), np.int64)
    found[0] = rows - 1
    found[1:] = ((BIGRAM_FACTORS[0] * wide[1:]) ^ (BIGRAM_FACTORS[1] * wide[:-1])) % (rows - 1)
    return found


def sign_rows(tokens: np.ndarray, rows: int) -> np.ndarray:
    """The row of random signs for each of `tokens` [n] and the one before it: int64 [n] (record 83)."""
    wide = tokens.astype(np.int64)
    found = np.zeros(len(wide), np.int64)
    found[1:] = (wide[1:] ^ wide[:-1]) % rows
    return found


class _Packer:
    """Tokens into a Batch, in page-locked memory when a GPU is to fetch it."""

    def __init__(self, config: Config, pinned: bool, world_size: int = 1) -> None:
        size = layer_plan.size(config)
        self.pinned, self.vocabulary, self.several = pinned, size.padded_vocab, world_size > 1
        self.bigram_rows, self.table_rows = layer_plan.bigram_rows(config), layer_plan.table_rows(config)
        self.sign_rows = size.sign_rows if self.bigram_rows and config.bigram_signs else 0
        self.gram_signs = size.sign_rows
        self.by_class, self.copies = config.normalised_grams, config.copy_input
        self.classes = None  # of each token, where something goes by them
        if (self.table_rows and self.by_class) or (self.copies and not config.vocab_size):
            self.classes = gpt2_classes(data_root(config.data_root), size.padded_vocab)
        self.slot = size.vocab if config.copy_pointer else None  # scored like a target

    def pack(
        self,
        tokens: np.ndarray,
        ends: np.ndarray,
        num_boundaries: int,
        max_document: int,
        sampled: tuple[int, int] = (0, 0),
        cap: int = 0,
    ) -> Batch:
        """`tokens` uint16 [L + 1] and where its documents end (the last may lie past L).

        sampled: how many classes are scored (0: all), and where the turn stands (`candidates`); cap: see `piece_ends`.
        """
        length, lengths = len(tokens) - 1, np.diff(ends, prepend=0)
        ends = piece_ends(lengths, cap)
        cu_seqlens = np.full(num_boundaries, length, np.int32)
        cu_seqlens[0] = 0
        cu_seqlens[1 : len(ends) + 1] = np.minimum(ends, length)
        inputs = tokens[:-1]
        bigrams = bigram_rows(inputs, self.bigram_rows) if self.bigram_rows else None
        bigram = None if bigrams is None else self._tensor(bigrams, torch.int32)
        return Batch(
            inputs=self._tensor(inputs, torch.int32),
            targets=self._tensor(tokens[1:], torch.int64),
            cu_seqlens=self._tensor(cu_seqlens, torch.int32),
            bigram_rows=bigram,
            sign_rows=self._tensor(sign_rows(inputs, self.sign_rows), torch.int32)
            if self.sign_rows
            else None,
            bigram_rows_cpu=bigram,
            token_runs=self._runs(inputs),
            bigram_runs=None if bigrams is None else self._runs(bigrams),
            max_document=min(max_document, length),
            candidates=self._candidates(tokens[1:], *sampled) if sampled[0] else None,
            **self._grams(inputs),
            copy_ids=self._copy_ids(inputs, lengths) if self.copies else None,
        )

    def _candidates(self, targets: np.ndarray, classes: int, turn: int) -> Tensor:
        """`Batch.candidates`: the targets, the copy pointer's slot, and the classes whose turn it is."""
        wanted = targets if self.slot is None else np.append(targets, np.int64(self.slot))
        return self._tensor(candidates(wanted, classes, self.vocabulary, turn), torch.int64)

    def _grams(self, inputs: np.ndarray) -> dict[str, Tensor]:
        """The fields of a batch about the table of n-grams."""
        if not self.table_rows:
            return {}
        ids = self.classes[inputs] if self.by_class else inputs
        rows = gram_rows(ids, self.table_rows)
        found = {"gram_rows": rows, "gram_signs": gram_signs(ids, self.gram_signs)}
        if self.several:
            wanted, places = np.unique(rows, return_inverse=True)
            found |= {"gram_wanted": wanted, "gram_places": places.reshape(rows.shape)}
        return {name: self._tensor(values, torch.int32) for name, values in found.items()}

    def _copy_ids(self, inputs: np.ndarray, lengths: np.ndarray) -> Tensor:
        """`Batch.copy_ids`; lengths: of the documents."""
        documents = np.repeat(np.arange(len(lengths)) << ID_BITS, lengths)[: len(inputs)]
        return self._tensor(
            documents | (inputs if self.classes is None else self.classes[inputs]), torch.int64
        )

    def _runs(self, ids: np.ndarray) -> Runs:
        return Runs(*(self._tensor(part, torch.int32) for part in runs_of(ids)))

    def _tensor(self, values: np.ndarray, dtype: torch.dtype) -> Tensor:
        tensor = torch.empty(values.shape, dtype=dtype, pin_memory=self.pinned)
        tensor.numpy()[:] = values
        return tensor


def _read_ahead(shard: Shard) -> None:
    """Ask the system to fetch a file into memory; nothing happens where it cannot."""
    if not hasattr(os, "posix_fadvise"):
        return
    try:
        with shard.path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)
    except OSError:
        return  # the batch that needs it will say what is wrong
