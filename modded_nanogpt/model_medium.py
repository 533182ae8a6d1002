"""The models of the older make: the medium track's, and track 1's of early 2026 (record 68, the preset `snapshot`).

Matrices, attention and MLPs are those of `model`. Where that computes its gates with small networks and mixes residuals
by MUDD, these have sigmoids of the first channels (medium 16, snapshot 12), and skips. Symbols as in `model`; e is the
normalised row of a second input embedding in medium, the hashed bigram's row in snapshot. Layer by layer:

    x <- x + sigmoid(s) 2 sigmoid(W x0[:16]) c        where a skip ends, c being the residual that it kept
    x <- r x + a x0 + b e
    x <- x + attention(RN(x)),    x <- x + mlp(RN(x))

and at the end x <- RN(x - beta c), c being the residual after a late layer ("backout"). r starts at 1.05 (snapshot:
1.1), a at 0, b at 0 (snapshot: 0.1), s at -1.5, beta at 0.5. Within attention, with u its input, a value embedding is
scaled by 2 sigmoid(G u[:16]) a head, and each head's output by sigmoid(A u[:16]). Sources: records of the
modded-nanogpt speedrun, track 1 up to 68 and medium up to 18; value embeddings arXiv 2410.17897, hash embeddings arXiv
1709.03933.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from modded_nanogpt import layer_plan
from modded_nanogpt.attention import Documents, Extras, attend, norm
from modded_nanogpt.kernels.mlp import mlp
from modded_nanogpt.model import SKIP_START, Rows, Shapes, SpeedrunModel, Values

BACKOUT_START = 0.5


class OlderModel(SpeedrunModel):
    """What the two have in common; each says what else it adds before a layer, and what training starts from."""

    residual_start: float
    zeros: tuple[str, ...]  # parameters that start at zero, where the configuration has them

    def parameter_shapes(self) -> Shapes:
        """The parameters that this configuration has."""
        size, wide = self.size, torch.float32
        skips, gated = len(self._skipping()), sum(layer.attention_gate for layer in self.layers)
        shapes = self.shared_shapes() | {
            "residual_lambdas": ((size.layers,), wide),
            # Two a layer (`SpeedrunModel._attention_weights`), smear, skips, backout.
            "scalars": ((2 * size.layers + 1 + skips + 1,), wide),
        }
        if gated:
            shapes["attention_gates"] = ((gated, size.heads, size.gate_dims), None)
        if skips:
            shapes["skip_gates"] = ((skips, size.gate_dims), None)
        return shapes

    def _skipping(self) -> list[int]:
        """The layers before which a skip ends."""
        return [layer.index for layer in self.layers if layer.skip_from is not None]

    def _added(self, rows: Rows, x0: Tensor) -> list[Tensor]:
        """What joins the residual before each layer, a x0 + b e: (T, d) a layer."""
        raise NotImplementedError

    def _init_matrices(self, generator: torch.Generator) -> None:
        """Fill the banks of attention; the MLPs' start the same in both."""
        raise NotImplementedError

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Weights of step 0, the same on all ranks and whatever the number of them."""
        generator = torch.Generator(self.head.device).manual_seed(seed)
        self.head.normal_(0.0, 0.005, generator=generator)
        self.embed.copy_(self.head)
        self._init_matrices(generator)
        half = 0.5 * self.bound
        self.mlp_bank[:, 0].uniform_(-half, half, generator=generator)
        self.mlp_bank[:, 1].zero_()
        self.residual_lambdas.fill_(self.residual_start)
        skips = [SKIP_START] * len(self._skipping())
        self.scalars.copy_(torch.tensor([0.5, 1.0] * self.size.layers + [0.0, *skips, BACKOUT_START]))
        for name in ("value_embeds", "ve_gates", "attention_gates", "skip_gates", "smear_gate", *self.zeros):
            if hasattr(self, name):
                getattr(self, name).zero_()

    @property
    def bound(self) -> float:
        """Of the uniform distribution with the usual standard deviation, 1 / sqrt(d)."""
        return math.sqrt(3.0 / self.size.width)

    def forward(
        self, rows: Rows, sign_rows: None, documents: Documents, windows: tuple[Tensor, Tensor], fp8: bool,
        copied: None = None,
    ) -> Tensor:  # fmt: skip
        """The normalised residual at the end (T, d), which the head reads. Arguments as `SpeedrunModel.forward`."""
        weights, fp8_state = self._attention_weights(), self.fp8 if fp8 else None
        mlps = self.mlp_bank.view(-1, self.size.mlp_width, self.size.width).unbind(0)  # up and down alternate
        x = x0 = norm(self._smeared(rows.embed))
        skips, kept = self._skip_strengths(x0), {}
        values = None if rows.value is None else rows.value.unbind(0)
        lambdas = zip(self.residual_lambdas.unbind(0), self._added(rows, x0), strict=True)
        for layer, (residual, added) in zip(self.layers, lambdas, strict=True):
            if layer.index in skips:
                x = x + skips[layer.index] * kept[layer.skip_from]
            x = residual * x + added
            if layer.attention:
                u = norm(x)
                window = windows[0] if layer.window == "short" else windows[1]
                x = x + attend(
                    u, *weights[layer.bank], layer, self.size.heads, documents, window, self.rotary,
                    self._extras(layer, u, values), self.backend.attend, fp8 and self.fp8_qkv,
                )  # fmt: skip
            (slot,) = layer.mlps
            x = x + mlp(norm(x), mlps[2 * slot], mlps[2 * slot + 1], fp8_state, slot)
            if layer.keep_output:
                kept[layer.index] = x
        return norm(x - self.scalars[-1] * kept[layer_plan.backout(self.config)])

    def _skip_strengths(self, x0: Tensor) -> dict[int, Tensor]:
        """{layer before which a skip ends: (T, 1)}."""
        places = self._skipping()
        if not places:
            return {}
        learned = torch.sigmoid(self.scalars[-1 - len(places) : -1]).to(x0.dtype)
        strengths = learned * 2 * torch.sigmoid(F.linear(x0[:, : self.size.gate_dims], self.skip_gates))
        return dict(zip(places, strengths.split(1, dim=1), strict=True))

    def _extras(self, layer: layer_plan.Layer, u: Tensor, values: Values) -> Extras:
        """The gated value embedding and the head gates of a layer with input u (T, d)."""
        seen, value, gate = u[:, : self.size.gate_dims], None, None
        if layer.value_embed is not None:
            strength = 2 * torch.sigmoid(F.linear(seen, self.ve_gates[layer.value_gate]))
            rows = values[layer.value_embed]
            value = strength[..., None] * rows.view(rows.shape[0], self.size.heads, -1)
        if layer.attention_gate:
            gate = torch.sigmoid(F.linear(seen, self.attention_gates[layer.bank]))
        return Extras(value=value, gate=gate)


class MediumModel(OlderModel):
    """Track 2: a second embedding of the input beside the first."""

    residual_start = 1.05
    zeros = ("input_lambdas",)

    def parameter_shapes(self) -> Shapes:
        """The parameters that this configuration has."""
        size = self.size
        return super().parameter_shapes() | {
            "embed2": ((size.padded_vocab, size.width), None),
            "input_lambdas": ((size.layers, 2), torch.float32),  # of the embedding and of the second one
        }

    def _added(self, rows: Rows, x0: Tensor) -> list[Tensor]:
        second = norm(rows.second)
        return [first * x0 + other * second for first, other in self.input_lambdas.unbind(0)]

    def _init_matrices(self, generator: torch.Generator) -> None:
        # First updates, 0.3 in size, are not to drown what tells rows apart.
        self.embed2.normal_(generator=generator)
        self.qk_bank.uniform_(-self.bound, self.bound, generator=generator)
        values, outputs = self.vo_bank[0::2], self.vo_bank[1::2]
        values.uniform_(-self.bound, self.bound, generator=generator)
        outputs.zero_()


class SnapshotModel(OlderModel):
    """Track 1 at record 68: one hashed row for each pair of tokens, added before every layer."""

    residual_start = 1.1
    zeros = ("input_lambdas", "bigram")
    bigram_start = 0.1

    def parameter_shapes(self) -> Shapes:
        """The parameters that this configuration has."""
        size, wide = self.size, torch.float32
        shapes = super().parameter_shapes() | {"input_lambdas": ((size.layers,), wide)}
        if self.config.bigram:
            shapes["bigram"] = ((size.bigram_rows, size.width), None)
            shapes["bigram_lambdas"] = ((size.layers,), wide)
        return shapes

    def _added(self, rows: Rows, x0: Tensor) -> list[Tensor]:
        found = [first * x0 for first in self.input_lambdas.unbind(0)]
        if rows.bigram is None:
            return found
        others = self.bigram_lambdas.unbind(0)
        return [added + other * rows.bigram for added, other in zip(found, others, strict=True)]

    def _init_matrices(self, generator: torch.Generator) -> None:
        half = 0.5 * self.bound  # values and outputs too: record 64
        self.qk_bank.uniform_(-half, half, generator=generator)
        self.vo_bank.uniform_(-half, half, generator=generator)
        if self.config.bigram:
            self.bigram_lambdas.fill_(self.bigram_start)
