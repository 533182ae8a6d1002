"""The speedrun's model: its parameters, and the forward pass from looked-up rows to the final residual.

The plan of the layers is in `layer_plan`, what one attention layer does in `attention`, the loss in
`kernels.cross_entropy`. Embedding tables are looked up outside of the compiled graph (`tables`). `model_medium` is the
other track's.

Symbols: T tokens of the lane, d width, H heads, V padded vocabulary. x is the residual stream, x0 the normalised
embedding, b the embedding of bigrams or n-grams, c0, c3, c7, c9 the residual after those layers (c0: at the input of
layer 0, c9: of layer 10). Sources: MUDD connections (Xiao et al. 2025, arXiv 2502.12170; record 81) and gates made the
same way (record 85), widths, depth and grouped sums (records 90 and 92), DCMHA (arXiv 2405.08553; record 85), hash
embeddings (arXiv 1709.03933; record 62) with random signs (record 83), value embeddings (arXiv 2410.17897), smear
(record 34), backout (record 40).
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modded_nanogpt import layer_plan, pointer
from modded_nanogpt.attention import Documents, Extras, Rotaries, Rotary, attend, norm
from modded_nanogpt.attention_backends import Backend
from modded_nanogpt.config import Config, lane_tokens
from modded_nanogpt.copying import BUCKETS
from modded_nanogpt.kernels.mlp import mlp
from modded_nanogpt.kernels.mlp_weights import Fp8Mlp
from modded_nanogpt.layer_plan import (
    BACKED_OUT,
    BACKOUT_START,
    MUDD_OUTPUTS,
    POST,
    PRE,
    ROOT_OF_GROWTH,
    Layer,
)

HIDDEN = 64  # width of the gate networks
MUDD_SCALE = 0.1  # of the outputs of the MUDD networks; their biases are stored divided by it
FIRST_GATE_SCALE = 0.1  # the same for the gates, where it is learned
SKIP_START = -1.5  # before the sigmoid
COPY_AT_INPUT, COPY_AT_END = 0.5, 1.0  # factors of what may be copied, where it joins the residual
INPUT = -1  # among the kept residuals: the input of layer 0

Values = tuple[Tensor, ...] | None  # the rows of each value table, (T, d)
Shapes = dict[str, tuple[tuple[int, ...], torch.dtype | None]]  # by name; None: the activations' dtype


class Rows(NamedTuple):
    """What one lane of T tokens looked up (`tables`): leaves of the graph."""

    embed: Tensor  # (T, d)
    second: Tensor | None = None  # (T, d): of the second embedding, which the medium track has
    value: Tensor | None = None  # (tables, T, d)
    bigram: Tensor | None = None  # (T, d): of the bigram table, or of the table of n-grams


class Copied(NamedTuple):
    """What each of T tokens may be about to repeat (`copying`); no gradient goes through it."""

    rows: Tensor  # (T, d): the candidates' embeddings
    buckets: Tensor  # (T,) int32


class SpeedrunModel(nn.Module):
    """Parameters under the names of the optimizer's table, and the forward pass."""

    def __init__(self, config: Config, backend: Backend, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self.config, self.backend = config, backend
        self.size, self.layers = layer_plan.size(config), layer_plan.layers(config)
        self.gates = layer_plan.gates(config)
        self.cached_source = layer_plan.cached_source(config)
        self.second_tier = layer_plan.second_tier(config)
        self.mudd_sources = layer_plan.mudd_sources(config)
        self.end_sources = layer_plan.end_sources(config) if config.mudd else ()
        size = self.size
        self.rotary = Rotaries()
        for name, scale in layer_plan.softmax_scales(config).items():
            positions = max(config.eval_slice, *lane_tokens(config))
            width, half = (size.head_dim, config.half_rope) if name == "long" else (size.head_dim // 2, False)
            self.rotary[name] = Rotary(width, positions, half, dtype, device, scale)
        for name, (shape, kind) in self.parameter_shapes().items():
            self.register_parameter(
                name, nn.Parameter(torch.empty(shape, dtype=kind or dtype, device=device))
            )
        self.signed_bigrams = bool(layer_plan.bigram_rows(config)) and config.bigram_signs
        if self.signed_bigrams:
            signs = torch.empty(size.sign_rows, size.width, dtype=dtype, device=device)
            self.register_buffer("signs", signs, persistent=False)
        self.fp8: Fp8Mlp | None = None  # set by `setup` where the hardware has it
        self.fp8_qkv = False  # the same

    def shared_shapes(self) -> Shapes:
        """Head, embeddings and matrices, which the models of both tracks have."""
        size, d = self.size, self.size.width
        attention_layers = sum(layer.attention for layer in self.layers)
        groups = attention_layers * size.heads  # two heads a group, of Q and of K
        shapes: Shapes = {
            "head": ((size.padded_vocab, d), None),
            "embed": ((size.padded_vocab, d), None),
            "qk_bank": ((groups, 2 * size.head_dim, d), None),
            "vo_bank": ((2 * attention_layers, d, d), None),
            "mlp_bank": ((layer_plan.mlp_count(self.config), 2, size.mlp_width, d), None),
        }
        if self.config.value_embeds:
            shapes["value_embeds"] = ((size.value_tables * size.padded_vocab, d), None)
            value_gates = sum(layer.value_gate is not None for layer in self.layers)
            shapes["ve_gates"] = ((value_gates, size.heads, size.gate_dims), None)
        if self.config.smear:
            shapes["smear_gate"] = ((1, size.gate_dims), None)
        return shapes

    def parameter_shapes(self) -> Shapes:
        """The parameters that this configuration has."""
        size, config, wide = self.size, self.config, torch.float32
        d, n_layers = size.width, size.layers
        shapes = self.shared_shapes() | {
            "post_lambdas": ((n_layers, 2), wide),
            "residual_lambdas": ((n_layers, 2), wide),
            "scalars": ((2 * n_layers + 2,), wide),
        }
        if layer_plan.bigram_rows(config):
            shapes["bigram"] = ((size.bigram_rows, d), None)
        if config.mudd:
            widths, sources = max(len(MUDD_OUTPUTS), len(self.end_sources)), len(self.end_sources)
            shapes |= {"mudd_w1": ((2, HIDDEN, d), None), "mudd_w2": ((2, widths, HIDDEN), None)}
            shapes["mudd_b2"] = ((2, widths), None)
            if config.grouped_mudd:
                shapes["mudd_groups"] = ((sources, size.mudd_groups, HIDDEN), None)
        if config.copy_input:
            shapes |= {"copy_scales": ((BUCKETS,), wide), "copy_embeds": ((BUCKETS, d), wide)}
        width = layer_plan.gate_width(config)
        if config.input_gates:
            shapes |= {"gate_w1": ((2, HIDDEN, d), None), "gate_w2": ((2, width, HIDDEN), None)}
            shapes |= {"gate_b2": ((2, width), None), "gate_scale": ((1,), wide)}
        elif width:
            shapes["static_gates"] = ((2 * width,), wide)
        if config.copy_pointer:
            shapes |= pointer.parameter_shapes(d, size.head_dim)
        return shapes

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Weights of step 0, the same on all ranks and whatever the number of them."""
        generator = torch.Generator(self.head.device).manual_seed(seed)
        d = self.size.width
        bound = 0.5 * math.sqrt(
            3.0 / d
        )  # uniform with half the usual standard deviation (record 64): 1/32 at 768
        self.head.normal_(0.0, 0.005, generator=generator)
        self.embed.copy_(self.head)
        self.qk_bank.uniform_(-bound, bound, generator=generator)
        self.vo_bank.uniform_(-bound, bound, generator=generator)
        self.mlp_bank[:, 0].uniform_(-bound, bound, generator=generator)
        self.mlp_bank[:, 1].zero_()
        self.post_lambdas.fill_(1.0)
        self.residual_lambdas.fill_(ROOT_OF_GROWTH)
        self.scalars.copy_(torch.tensor([0.5, 1.0] * self.size.layers + [0.0, SKIP_START]))
        if self.config.value_embeds:
            self.value_embeds.normal_(0.0, 0.01, generator=generator)
            self.ve_gates.zero_()
        for name in (
            "bigram", "smear_gate", "mudd_w2", "mudd_groups", "gate_w2", "copy_scales", "copy_embeds",
        ):  # fmt: skip
            if hasattr(self, name):
                getattr(self, name).zero_()
        for name in ("mudd_w1", "gate_w1"):
            if hasattr(self, name):
                getattr(self, name).uniform_(-1 / math.sqrt(d), 1 / math.sqrt(d), generator=generator)
        if self.config.mudd:
            self.mudd_b2.zero_()
            self.mudd_b2[0, : len(MUDD_OUTPUTS)] = torch.tensor(
                [start / MUDD_SCALE for _, start in MUDD_OUTPUTS]
            )
            self.mudd_b2[1, self.end_sources.index(BACKED_OUT)] = BACKOUT_START / MUDD_SCALE
        self._init_gates()
        if self.config.copy_pointer:
            pointer.init_weights(self, generator)
        if hasattr(self, "signs"):
            # On the CPU, so that they are the same on every device: no checkpoint holds them.
            drawn = torch.Generator().manual_seed(seed)
            self.signs.copy_(torch.randint(0, 2, self.signs.shape, generator=drawn, dtype=torch.int8))
            self.signs.mul_(2).sub_(1)

    def _init_gates(self) -> None:
        width = layer_plan.gate_width(self.config)
        starts = torch.zeros(2, width)
        for gate in (*self.gates[PRE], *self.gates[POST]):
            starts[gate.tier, gate.start : gate.start + gate.width] = gate.init
        if self.config.input_gates:
            self.gate_scale.fill_(FIRST_GATE_SCALE)
            self.gate_b2.copy_(starts / FIRST_GATE_SCALE)
        elif width:
            self.static_gates.copy_(starts.flatten())

    def forward(
        self,
        rows: Rows,
        sign_rows: Tensor | None,
        documents: Documents,
        windows: tuple[Tensor, Tensor],
        fp8: bool,
        copied: Copied | None = None,
    ) -> Tensor:
        """The normalised residual at the end (T, d), which the head reads.

        sign_rows: (T,) int32; windows: short and long, 0-dim int32 tensors on the CPU, in tokens; fp8: whether what
        `setup` has chosen reads 8-bit operands (training only); copied: with `copy_input`.
        """
        weights, bigram = self._attention_weights(), rows.bigram
        x0 = norm(self._smeared(rows.embed))
        if bigram is not None and self.signed_bigrams:
            bigram = bigram * self.signs[sign_rows]
        gate = self._gate_values(PRE, x0)
        x = x0 if bigram is None else x0 + gate["bigram", 0] * bigram
        likely = None if copied is None else self._copied(copied)
        if likely is not None:
            x = x + COPY_AT_INPUT * likely
        kept: dict[int, Tensor] = {INPUT: x}  # residuals that later layers read
        late_input, values = None, None if rows.value is None else rows.value.unbind(0)

        def attention(layer: Layer, u: Tensor, value: Tensor | None) -> Tensor:
            extras = Extras(
                value=value,
                xsa=gate["xsa", layer.index] if layer.xsa else None,
                gate=gate["attention_gate", layer.index] if layer.attention_gate else None,
                dc=(gate["dc_w1", layer.index], gate["dc_w2", layer.index]) if layer.dc else None,
            )
            window = windows[0] if layer.window == "short" else windows[1]
            qkv, out = weights[layer.bank]
            return attend(
                u,
                qkv,
                out,
                layer,
                self.size.heads,
                documents,
                window,
                self.rotary,
                extras,
                self.backend.attend,
                fp8 and self.fp8_qkv,
            )

        mlps = self.mlp_bank.view(-1, self.size.mlp_width, self.size.width).unbind(0)  # up and down alternate
        fp8_state = self.fp8 if fp8 else None

        def feed_forward(layer: Layer, u: Tensor) -> Tensor:
            """The sum of the layer's MLPs on u (T, d)."""
            parts = [mlp(u, mlps[2 * slot], mlps[2 * slot + 1], fp8_state, slot) for slot in layer.mlps]
            return parts[0] if len(parts) == 1 else parts[0] + parts[1]

        lambdas = zip(self.residual_lambdas.unbind(0), self.post_lambdas.unbind(0), strict=True)
        for layer, (residual, post) in zip(self.layers, lambdas, strict=True):
            if layer.index == self.second_tier:
                gate |= self._gate_values(POST, x)
            if layer.index - 1 == self.cached_source:
                late_input = norm(x)
            if layer.skip_from is not None:
                x = x + torch.sigmoid(self.scalars[-1]) * gate["skip", layer.index] * kept[layer.skip_from]
            u = late_input if layer.cached_input else norm(x) if layer.attention else None
            if layer.mudd:
                x, last = self._mudd_layer(layer, x, u, values, bigram, kept, attention, feed_forward)
                continue
            if layer.attention:
                added = self._gated_value(layer, u, values)
                x = residual[0] * x + post[0] * attention(layer, u, added)
            elif (
                layer.skip_from is None
            ):  # without attention it grows all the same, but not where a skip ends
                x = residual[0] * x
            if "x0" in layer.inject:
                x = x + gate["x0", layer.index] * x0
            if "bigram" in layer.inject and layer.index > 0:
                x = x + gate["bigram", layer.index] * bigram
            if layer.mlps:
                last = norm(x)
                x = residual[1] * x + post[1] * feed_forward(layer, last)
            else:
                x = residual[1] * x
            if layer.keep_output:
                kept[layer.index] = x
        if self.config.mudd:
            x = self._mudd_end(x, values, kept, last, late_input)
        return norm(x if likely is None else x + COPY_AT_END * likely)

    def _attention_weights(self) -> list[tuple[Tensor, Tensor]]:
        """[(Q, K and V (H (2 D + V), d), output (d, H V))] by bank slot; a layer's learned factors are multiplied in.

        Of narrow heads it is the first rows of each head in the bank; the others have no gradient and no effect.
        Queries and keys are normalised, so a factor before the projections matters to V alone. Banks are taken apart
        by `unbind`: the backward pass of indexing would write a whole bank of zeros for every slice.
        """
        d, heads, full = self.size.width, self.size.heads, self.size.head_dim
        qk, vo = self.qk_bank.view(-1, 2 * d, d).unbind(0), self.vo_bank.unbind(0)
        found = []
        for layer in self.layers:
            if layer.attention:
                before, after = self.scalars[2 * layer.index], self.scalars[2 * layer.index + 1]
                both, v, o = qk[layer.bank], vo[2 * layer.bank], vo[2 * layer.bank + 1]
                if layer.qk_width < full:
                    both = both.view(2 * heads, full, d)[:, : layer.qk_width].reshape(-1, d)
                if layer.v_width < full:
                    v = v.view(heads, full, d)[:, : layer.v_width].reshape(-1, d)
                    o = o.view(d, heads, full)[:, :, : layer.v_width].reshape(d, -1)
                found.append((torch.cat([both, before * v]), after * o))
        return found

    def _smeared(self, embed: Tensor) -> Tensor:
        """A little of the previous token's embedding, without attention."""
        if not self.config.smear:
            return embed
        strength = torch.sigmoid(F.linear(embed[1:, : self.size.gate_dims], self.smear_gate))
        # The scalars begin with two a layer; then comes this one.
        return torch.cat([embed[:1], embed[1:] + self.scalars[2 * len(self.layers)] * strength * embed[:-1]])

    def _copied(self, copied: Copied) -> Tensor:
        """(T, d): s_b x norm(embedding of the candidate) + e_b of each token's bucket b; e_0 where there is none.

        Both begin at 0. The embedding gets no gradient from it (proposal 378 does not say), which saves a way back.
        """
        # Rows are picked by a product, so that their gradients are one: thousands of tokens share a row.
        wide = -(-BUCKETS // 8) * 8  # as matrix units like it
        picked = copied.buckets[:, None] == torch.arange(wide, device=copied.buckets.device)
        picked = picked.to(copied.rows.dtype)
        scales = F.pad(self.copy_scales, (0, wide - BUCKETS)).to(picked.dtype)
        embeds = F.pad(self.copy_embeds, (0, 0, 0, wide - BUCKETS)).to(picked.dtype)
        there = (copied.buckets > 0)[:, None]
        return (picked @ scales[:, None]) * there * norm(copied.rows) + picked @ embeds

    def _gate_values(self, tier: int, z: Tensor) -> dict[tuple[str, int], Tensor]:
        """{(name, layer): (T, width)} of one gate network on z (T, d), or of plain learned numbers."""
        if self.config.input_gates:
            hidden = F.gelu(F.linear(z, self.gate_w1[tier]))
            # The bias is no part of the product, whose bfloat16 result would lose what small inputs add to 10.5.
            values = (F.linear(hidden, self.gate_w2[tier]) + self.gate_b2[tier]) * self.gate_scale[0]
        elif self.gates[tier]:
            values = self.static_gates.chunk(2)[tier].to(z.dtype).expand(z.shape[0], -1)
        return {
            (gate.name, gate.layer): values[..., gate.start : gate.start + gate.width]
            for gate in self.gates[tier]
        }

    def _gated_value(self, layer: Layer, u: Tensor, values: Values) -> Tensor | None:
        """The layer's value embedding (T, H, D), each head scaled by 2 sigmoid(linear in 6 + 6 dimensions)."""
        if layer.value_embed is None:
            return None
        value, half = values[layer.value_embed], self.size.gate_dims // 2
        seen = torch.cat([u[:, :half], value[:, :half]], dim=-1)
        strength = 2 * torch.sigmoid(F.linear(seen, self.ve_gates[layer.value_gate]))
        return strength[..., None] * value.view(value.shape[0], self.size.heads, -1)

    def _mudd_values(self, z: Tensor) -> dict[str, Tensor]:
        """{name: (T, 1)} of the first MUDD network on the residual z (T, d)."""
        hidden = F.gelu(F.linear(z, self.mudd_w1[0]))
        values = MUDD_SCALE * (F.linear(hidden, self.mudd_w2[0]) + self.mudd_b2[0])
        return {name: values[:, column : column + 1] for column, (name, _) in enumerate(MUDD_OUTPUTS)}

    def _mudd_layer(
        self, layer: Layer, x: Tensor, u: Tensor, values: Values, bigram: Tensor | None, kept: dict[int, Tensor],
        attention: Callable[[Layer, Tensor, Tensor | None], Tensor], feed_forward: Callable[[Layer, Tensor], Tensor],
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """The last layer, whose sums of residuals are gated: into V, into the residual and between its parts.

        Returns its output and what its MLP read.
        """
        tokens, heads = x.shape[0], self.size.heads
        mu, c0, c7 = self._mudd_values(x), kept[INPUT], kept[self.mudd_sources[1]]
        kept[layer.index - 1] = x
        value = (mu["v_c0"] * c0 + mu["v_c7"] * c7 + mu["v_x"] * x).view(tokens, heads, -1)
        if layer.value_embed is not None:
            halves = [mu["value_gate_low"], mu["value_gate_high"]]
            strength = torch.cat([half.expand(-1, heads // 2) for half in halves], dim=-1)
            value = value + strength[..., None] * values[layer.value_embed].view(tokens, heads, -1)
        x = (1 + mu["x_x"]) * x + mu["x_c0"] * c0 + mu["x_c7"] * c7
        x = mu["attention_x"] * x + mu["attention_y"] * attention(layer, u, value) + mu["attention_c0"] * c0
        if bigram is not None:
            x = x + mu["attention_bigram"] * bigram
        read = norm(x)
        return mu["mlp_x"] * x + mu["mlp_y"] * feed_forward(layer, read), read

    def _mudd_end(
        self, x: Tensor, values: Values, kept: dict[int, Tensor], read: Tensor, late: Tensor | None
    ) -> Tensor:
        """After the last layer: what only served as context is taken out of the residual ("backout").

        Every token weighs the sources; with `grouped_mudd`, each group of channels differently. read, late: what the
        last layer's MLP and attention read.
        """
        early, source = self.mudd_sources
        found = {
            "c0": kept[INPUT],
            "c3": kept[early],
            "c7": kept[source],
            "c9": kept[len(self.layers) - 2],
            "u": read,
        }
        found["late"] = norm(kept[source]) if late is None else late
        found |= {f"value_{table}": rows for table, rows in enumerate(values or ())}
        hidden, groups = F.gelu(F.linear(x, self.mudd_w1[1])), 1
        count = len(self.end_sources)
        weights = (F.linear(hidden, self.mudd_w2[1, :count]) + self.mudd_b2[1, :count])[..., None]
        if self.config.grouped_mudd:
            groups = self.size.mudd_groups
            weights = weights + F.linear(hidden, self.mudd_groups.flatten(0, 1)).view(-1, count, groups)
        mixed = x.view(x.shape[0], groups, -1)
        for weight, name in zip((MUDD_SCALE * weights).unbind(1), self.end_sources, strict=True):
            mixed = mixed + weight[..., None] * found[name].view(mixed.shape)
        return mixed.view(x.shape)
