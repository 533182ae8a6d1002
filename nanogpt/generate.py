"""Text from a model, a token at a time, with the keys and values of earlier positions kept.

The cache has a fixed size, so on a GPU the whole step from one token to the next (model, choice and bookkeeping) is
one CUDA graph: a replay costs one launch instead of some 250, and capturing takes a moment where a compiler would
take a minute.

Positions are absolute and learned, so there are only block_size of them. nanoGPT drops the oldest token at every
step from then on, which moves all others and makes everything cached worthless. Here a full window is read again
from its last 7/8, and the next 1/8 of its tokens are cheap again. Up to block_size tokens the two are the same.

Shapes: B samples, T positions, V vocabulary, L positions of the cache, H heads, D = C / H.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from nanogpt.model import GPT

GREEDY_BELOW = 1e-5  # temperatures so low leave one token with all the probability, and divide by nearly zero
SHORTEST_READ = 256  # positions that a step reads at least; from there on it doubles, with a graph for each
TOKENS_AT_ONCE = 8  # steps on a GPU between two looks at the result: each look makes the GPU wait for Python
# cuDNN's attention is left out: it plans anew for every length of a prompt.
KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen: temperature 0 takes the most likely one; top_k 0 and top_p 1 leave all tokens in."""

    temperature: float = 0.8
    top_k: int = 200
    top_p: float = 1.0


def choose(logits: Tensor, draws: Tensor, sampling: Sampling) -> Tensor:
    """One token for each row: logits (B, V), draws (B,) float64 uniform in [0, 1) -> (B,) int64.

    Temperature first, then the top_k most likely tokens, then of these the fewest that have top_p of the
    probability (Holtzman et al. 2019). The draw picks from the cumulative sum: no random state is kept on the device.
    """
    logits = logits.float()
    if sampling.temperature < GREEDY_BELOW:
        return logits.argmax(-1)
    ids = None
    vocabulary = logits.shape[-1]
    if 0 < sampling.top_k < vocabulary:
        logits, ids = logits.topk(sampling.top_k)
    elif sampling.top_p < 1:
        logits, ids = logits.sort(dim=-1, descending=True)
    logits = (logits - logits.amax(-1, keepdim=True)) / sampling.temperature
    cumulative = torch.softmax(logits, -1, dtype=torch.float64).cumsum(-1)
    last = torch.full_like(draws, cumulative.shape[-1] - 1, dtype=torch.int64)[:, None]
    if sampling.top_p < 1:
        last = torch.minimum(last, (cumulative < sampling.top_p).sum(-1, keepdim=True))
    place = torch.searchsorted(cumulative, draws[:, None] * cumulative.gather(-1, last), right=True)
    place = torch.minimum(place, last)
    return (place if ids is None else ids.gather(-1, place))[:, 0]


def random_draws(seed: int, samples: range, tokens: int) -> Tensor:
    """(tokens, B) float64 uniform in [0, 1). A sample's draws depend on the seed and its number alone."""
    rows = [np.random.Generator(np.random.Philox(key=[seed, sample])).random(tokens) for sample in samples]
    return torch.from_numpy(np.stack(rows, axis=1))


def next_window(window: int, block_size: int) -> int:
    """How many of the last tokens the model sees for the next token, when it saw `window` for the last one."""
    return window + 1 if window < block_size else max(1, block_size * 7 // 8)


@torch.no_grad()
def generate_plain(
    model: GPT, prompt: Sequence[int], draws: Tensor, sampling: Sampling, vocab_size: int
) -> Tensor:
    """The plain twin of `Generator`: all positions computed for every token, as nanoGPT does. (tokens, B) int64."""
    block_size = model.shape.block_size
    device = model.transformer.wte.weight.device
    draws = draws.to(device)
    tokens = torch.tensor(prompt, device=device).expand(draws.shape[1], -1)
    window = min(len(prompt), block_size)
    for row in draws:
        hidden = model.hidden(tokens[:, -window:])
        token = choose(model.logits(hidden[:, -1])[:, :vocab_size], row, sampling)
        tokens = torch.cat([tokens, token[:, None]], dim=1)
        window = next_window(window, block_size)
    return tokens[:, len(prompt) :].T


class Generator:
    """Continues one prompt `batch` times at once, up to `max_tokens` tokens each.

    The model is used as it is: give it in evaluation mode, and with weights in its own dtype if speed matters.
    `graphs`: whether steps are CUDA graphs; None: on a GPU.
    """

    def __init__(
        self, model: GPT, batch: int, max_tokens: int, sampling: Sampling, vocab_size: int,
        graphs: bool | None = None,
    ) -> None:  # fmt: skip
        shape, weight = model.shape, model.transformer.wte.weight
        self.model, self.sampling, self.vocab_size, device = model, sampling, vocab_size, weight.device
        self.batch, self.on_gpu = batch, device.type == "cuda"
        self.use_graphs = self.on_gpu if graphs is None else graphs
        size = (shape.n_layer, batch, shape.n_head, shape.block_size, shape.n_embd // shape.n_head)
        self.keys = torch.zeros(size, dtype=model.dtype, device=device)
        self.values = torch.zeros_like(self.keys)
        self.length = 0  # positions that the cache holds
        # What a step reads and writes lives on the device, at one place, so that a graph can be replayed.
        self.draws = torch.zeros(max_tokens, batch, dtype=torch.float64, device=device)
        self.chosen = torch.zeros(max_tokens, batch, dtype=torch.int64, device=device)
        self.token = torch.zeros(batch, dtype=torch.int64, device=device)
        self.position = torch.zeros(1, dtype=torch.int64, device=device)
        self.count = torch.zeros(1, dtype=torch.int64, device=device)
        self.logits = torch.zeros(batch, vocab_size, dtype=model.dtype, device=device)  # of the last step
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}

    def generate(self, prompt: Sequence[int], draws: Tensor) -> Iterator[list[int]]:
        """Yield the tokens of each step, a list of B, as they come (on a GPU a few steps at a time).

        `prompt` is at least one token; `draws` (tokens, B) says how many tokens, and how they fall.
        """
        steps, block_size = len(draws), self.model.shape.block_size
        self.draws[:steps] = draws.to(self.draws.device)
        self.count.zero_()
        start = torch.tensor([list(prompt[-block_size:])], device=self.token.device)
        told = 0
        for step in range(steps):
            if step == 0:
                self.read(start)
            elif self.length == block_size:
                recent = self.chosen[max(0, step - block_size) : step].T
                tokens = torch.cat([start.expand(self.batch, -1), recent], dim=1)
                self.read(tokens[:, -next_window(block_size, block_size) :])
            else:
                self.step()
            if not self.on_gpu or step % TOKENS_AT_ONCE == 0 or step == steps - 1:
                yield from self.chosen[told : step + 1].tolist()
                told = step + 1

    @torch.no_grad()
    def read(self, tokens: Tensor) -> None:
        """Forget everything, read `tokens` (B or 1, T) from position 0, and choose the token after them."""
        with sdpa_kernel(KERNELS):
            hidden = self.model.hidden(tokens, 0, self._attend_all)
        self.length = tokens.shape[1]
        self.position.fill_(self.length)
        self._choose(self.model.logits(hidden[:, -1]).expand(self.batch, -1))

    @torch.no_grad()
    def step(self) -> None:
        """Put the last chosen token into the cache and choose the next one."""
        limit = self.length + 1
        if self.on_gpu:
            limit = min(self.model.shape.block_size, max(SHORTEST_READ, 1 << (limit - 1).bit_length()))
        if self.use_graphs:
            if limit not in self._graphs:
                self._graphs[limit] = self._capture(limit)
            self._graphs[limit].replay()
        else:
            self._step(limit)
        self.length += 1

    def _step(self, limit: int) -> None:
        """A step that reads `limit` positions of the cache, of which those after self.position count for nothing."""
        unseen = torch.arange(limit, device=self.token.device) > self.position
        bias = self.keys.new_zeros(1, 1, limit).masked_fill_(unseen, -torch.inf)
        hidden = self.model.hidden(self.token[:, None], self.position, partial(self._attend_one, limit, bias))
        self.position += 1
        self._choose(self.model.logits(hidden[:, -1]))

    def _choose(self, logits: Tensor) -> None:
        self.logits.copy_(logits[:, : self.vocab_size])  # the rest is padding
        draws = self.draws.index_select(0, self.count)[0]
        self.token.copy_(choose(self.logits, draws, self.sampling))
        self.chosen.index_copy_(0, self.count, self.token[None])
        self.count += 1

    def _capture(self, limit: int) -> torch.cuda.CUDAGraph:
        """The step as a graph. It runs once before, because libraries set themselves up in their first call."""
        state = [tensor.clone() for tensor in (self.token, self.position, self.count)]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._step(limit)
        torch.cuda.current_stream().wait_stream(stream)
        for tensor, before in zip((self.token, self.position, self.count), state, strict=True):
            tensor.copy_(before)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._step(limit)
        return graph

    def _attend_all(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Causal attention over positions 0 .. T - 1, which the cache keeps. Each (B or 1, H, T, D)."""
        length = q.shape[2]
        self.keys[layer, :, :, :length] = k
        self.values[layer, :, :, :length] = v
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    def _attend_one(self, limit: int, bias: Tensor, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of one position, self.position, over those up to it. Each (B, H, 1, D); bias: (1, 1, L).

        Two products and a softmax: torch's attention, made for many queries, took half of the step on an H200.
        """
        self.keys[layer].index_copy_(2, self.position, k)
        self.values[layer].index_copy_(2, self.position, v)
        keys, values = (cache[layer, :, :, :limit].flatten(0, 1) for cache in (self.keys, self.values))
        scores = torch.baddbmm(bias, q.flatten(0, 1), keys.mT, alpha=q.shape[-1] ** -0.5)
        return (torch.softmax(scores, -1) @ values).view_as(q)
