"""One attention layer: projections, QK norm, rotary embedding, value embedding, what happens around the softmax.

Symbols in comments: T tokens of the lane, d model width, H heads, D the width of their queries and keys, V of values.

Rotary embedding (Su et al. 2021, arXiv 2104.09864) turns only the first half of each head ("half-truncated": the other
half carries content without position); heads of half the width turn whole. When the windows grow, frequencies and
softmax scale follow YaRN (Peng et al. 2023, arXiv 2309.00071). The other ideas are modded-nanogpt's: paired heads
(record 58), partial key offset (49), gated value embeddings (55), attention gates (28), narrow queries and keys (90);
and exclusive self-attention, XSA (arXiv 2603.09078, record 82).
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modded_nanogpt.kernels.dynamic_composition import dynamic_composition
from modded_nanogpt.kernels.linear import linear
from modded_nanogpt.layer_plan import Layer

BLOCK = 128  # tokens; windows are counted in blocks where YaRN is concerned
YARN_ALPHA, YARN_BETA, YARN_TEMPERATURE = 1.0, 32.0, 0.2  # the paper's temperature factor is 0.1


def norm(x: Tensor) -> Tensor:
    """RMS norm over the last axis of x [..., width], without weight. A tiny epsilon: embedding rows start at 0.005."""
    return F.rms_norm(x, (x.shape[-1],), eps=1.2e-7)


class Rotary(nn.Module):
    """Cosines and sines of every position, for single and for paired heads, and the softmax scale that goes with them.

    Tables are (positions, D / 2), one column for each pair of neighbouring dimensions; pairs that do not turn have a
    cosine of 1. Buffers are updated in place, so that a compiled model needs no recompilation when the window grows.
    """

    def __init__(
        self,
        head_dim: int,
        positions: int,
        half: bool,
        dtype: torch.dtype,
        device: torch.device,
        scale: float = 0.1,
    ) -> None:
        """head_dim: D; half: only the first half turns; scale: of the softmax at the start of training."""
        super().__init__()
        self.first_scale = scale
        self.positions, turning = positions, head_dim // 4 if half else head_dim // 2
        steps = torch.arange(turning, dtype=torch.float64) / max(1, turning - 1)
        self.base = torch.cat([1024.0**-steps, torch.zeros(head_dim // 2 - turning, dtype=torch.float64)])
        for name, factor in (("single", 1), ("paired", 2)):
            for function in ("cos", "sin"):
                table = torch.empty(factor * positions, head_dim // 2, dtype=dtype, device=device)
                self.register_buffer(f"{function}_{name}", table, persistent=False)
        self.register_buffer("scale", torch.empty((), device=device), persistent=False)
        self.reset()

    def reset(self) -> None:
        """Back to what training begins with."""
        self.frequencies, self.temperature = self.base.clone(), self.first_scale
        self._fill()

    def follow(self, windows: list[int]) -> None:
        """The state after the window (in tokens) has taken these values one after the other: exact on a resume."""
        self.frequencies, self.temperature = self.base.clone(), self.first_scale
        for old, new in itertools.pairwise(windows):
            turns = old * self.frequencies / (2 * math.pi)  # full turns within the old window
            kept = ((turns - YARN_ALPHA) / (YARN_BETA - YARN_ALPHA)).clamp(0, 1)
            self.frequencies *= old / new + kept * (1 - old / new)
            self.temperature *= 1 + YARN_TEMPERATURE * math.log(new / old)
        self._fill()

    def _fill(self) -> None:
        for name, factor in (("single", 1), ("paired", 2)):
            places = torch.arange(factor * self.positions, dtype=torch.float32, device=self.scale.device)
            angles = torch.outer(places, self.frequencies.float().to(places.device))
            getattr(self, f"cos_{name}").copy_(angles.cos())
            getattr(self, f"sin_{name}").copy_(angles.sin())
        self.scale.fill_(self.temperature)

    def tables(self, tokens: int, paired: bool) -> tuple[Tensor, Tensor]:
        """(cos, sin) to broadcast against (T, H, D / 2). Of two paired heads the second stands one position later."""
        if not paired:
            return self.cos_single[:tokens, None], self.sin_single[:tokens, None]
        cos, sin = self.cos_paired[: 2 * tokens], self.sin_paired[: 2 * tokens]
        return cos.view(tokens, 2, -1), sin.view(tokens, 2, -1)


class Rotaries(nn.ModuleDict):
    """The tables that a model's layers use, by `Layer.rotary`: those that follow the short and the long window."""

    def follow(self, windows: list[tuple[int, int]]) -> None:
        """The state after (short, long) windows, in tokens, have taken these values one after the other."""
        for place, name in enumerate(("short", "long")):
            if name in self:
                self[name].follow([pair[place] for pair in windows])


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn neighbouring dimensions of x (T, H, D) by their angle; tables as `Rotary.tables` gives them."""
    tokens, heads, width = x.shape
    first, second = x.view(tokens, heads // cos.shape[1], cos.shape[1], width // 2, 2).unbind(-1)
    cos, sin = cos[:, None], sin[:, None]
    turned = torch.stack([first * cos + second * sin, second * cos - first * sin], dim=-1)
    return turned.view(tokens, heads, width)


@dataclass(frozen=True)
class Documents:
    """Where the documents of a lane are, for single or for paired heads (see `attention_backends`)."""

    cu_seqlens: Tensor  # (N,) int32
    start: Tensor  # (T,) int32: first token of each token's document
    end: Tensor  # (T,) int32: one past its last token
    longest: int

    def paired(self) -> "Documents":
        """The same documents when every token has two places."""
        start, end = (2 * self.start).repeat_interleave(2), (2 * self.end).repeat_interleave(2)
        return Documents(2 * self.cu_seqlens, start, end, 2 * self.longest)


@dataclass(frozen=True)
class Extras:
    """What a layer adds around its softmax; None where the layer plan, or the user, leaves it out. (T, ...) tensors."""

    value: Tensor | None = None  # (T, H, at least V): its first V channels are added to V
    xsa: Tensor | None = None  # (T, H) before tanh
    gate: Tensor | None = None  # (T, H)
    dc: tuple[Tensor, Tensor] | None = None  # (T, H) each


def attend(
    u: Tensor, qkv: Tensor, out: Tensor, layer: Layer, heads: int, documents: Documents, window: Tensor,
    rotaries: Rotaries, extras: Extras, backend: Callable[..., Tensor], low: bool = False,
) -> Tensor:  # fmt: skip
    """The layer's output (T, d) before it joins the residual stream.

    u: (T, d) normalised input; qkv: (H (2 D + V), d), Q above K above V; out: (d, H V); window: 0-dim int32 tensor on
    the CPU, in tokens; low: 8-bit operands in the projection to Q, K and V.
    """
    tokens, rotary = u.shape[0], rotaries[layer.rotary]
    widths = (heads * layer.qk_width, heads * layer.qk_width, heads * layer.v_width)
    q, k, v = (part.view(tokens, heads, -1) for part in linear(u, qkv, low).split(widths, dim=-1))
    cos, sin = rotary.tables(tokens, layer.paired)
    q, k = rotate(norm(q), cos, sin), rotate(norm(k), cos, sin)
    if extras.value is not None:
        v = v + extras.value[..., : layer.v_width]
    if layer.key_offset:  # the half that carries content comes from the token before: induction in one layer
        moving, content = k.chunk(2, dim=-1)
        k = torch.cat([moving, torch.cat([content[:1], content[:-1]])], dim=-1)
    q = (q.float() * rotary.scale).to(q.dtype)
    # Three heads of twice the length: memory order puts heads h and h + H/2 into one softmax.
    if layer.paired:
        q, k, v = (part.reshape(2 * tokens, heads // 2, -1) for part in (q, k, v))
        documents = documents.paired()
    y = backend(q, k, v, documents.cu_seqlens, documents.start, documents.end, documents.longest, window)
    y = y.view(tokens, heads, -1)
    if extras.dc is not None:
        y = dynamic_composition(y, q, k, v, *extras.dc, documents.start)
    if extras.xsa is not None:  # remove from the output what lies along the token's own value
        v = v.view(tokens, heads, -1)
        along = (y * v).sum(-1) / v.square().sum(-1).clamp(min=1e-8)
        y = y - (torch.tanh(extras.xsa) * along)[..., None] * v
    if extras.gate is not None:
        y = extras.gate[..., None] * y
    return F.linear(y.reshape(tokens, -1), out)
