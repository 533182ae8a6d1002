"""The medium track's model: 16 layers of the older make, with matrices, attention and MLPs as `model` has them.

Where track 1 computes its gates with small networks and hashes bigrams, this one has sigmoids of the first 16 channels,
a second input embedding, and three skips instead of MUDD. Symbols as in `model`, and e the normalised row of the second
embedding. Layer by layer:

    x <- x + sigmoid(s) 2 sigmoid(W x0[:16]) c        where a skip ends, c being the residual that it kept
    x <- r x + a x0 + b e
    x <- x + attention(RN(x)),    x <- x + mlp(RN(x))

and at the end x <- RN(x - beta c), c being the residual after a late layer ("backout"). r starts at 1.05, a and b at 0,
s at -1.5, beta at 0.5. Within attention, with u its input, a value embedding is scaled by 2 sigmoid(G u[:16]) a head,
and each head's output by sigmoid(A u[:16]). Sources: records of the modded-nanogpt speedrun's medium track, up to 18;
value embeddings arXiv 2410.17897.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from modded_nanogpt import layer_plan
from modded_nanogpt.attention import Documents, Extras, attend, norm
from modded_nanogpt.kernels.mlp import mlp
from modded_nanogpt.model import SKIP_START, Rows, Shapes, SpeedrunModel, Values

RESIDUAL_START = 1.05
BACKOUT_START = 0.5


class MediumModel(SpeedrunModel):
    """Parameters under the names of the optimizer's table, and the forward pass."""

    def parameter_shapes(self) -> Shapes:
        """The parameters that this configuration has."""
        size, wide = self.size, torch.float32
        skips, gated = len(self._skipping()), sum(layer.attention_gate for layer in self.layers)
        shapes = self.shared_shapes() | {
            "embed2": ((size.padded_vocab, size.width), None),
            "residual_lambdas": ((size.layers,), wide),
            "input_lambdas": ((size.layers, 2), wide),  # of the embedding and of the second one
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

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Weights of step 0, the same on all ranks and whatever the number of them."""
        generator = torch.Generator(self.head.device).manual_seed(seed)
        bound = math.sqrt(3.0 / self.size.width)  # uniform with the usual standard deviation, 1 / sqrt(d)
        self.head.normal_(0.0, 0.005, generator=generator)
        self.embed.copy_(self.head)
        self.embed2.normal_(
            generator=generator
        )  # first updates, 0.3 in size, are not to drown what tells rows apart
        self.qk_bank.uniform_(-bound, bound, generator=generator)
        values, outputs = self.vo_bank[0::2], self.vo_bank[1::2]
        values.uniform_(-bound, bound, generator=generator)
        outputs.zero_()
        self.mlp_bank[:, 0].uniform_(-bound / 2, bound / 2, generator=generator)
        self.mlp_bank[:, 1].zero_()
        self.residual_lambdas.fill_(RESIDUAL_START)
        skips = [SKIP_START] * len(self._skipping())
        self.scalars.copy_(torch.tensor([0.5, 1.0] * self.size.layers + [0.0, *skips, BACKOUT_START]))
        for name in (
            "input_lambdas",
            "value_embeds",
            "ve_gates",
            "attention_gates",
            "skip_gates",
            "smear_gate",
        ):
            if hasattr(self, name):
                getattr(self, name).zero_()

    def forward(
        self, rows: Rows, sign_rows: None, documents: Documents, windows: tuple[Tensor, Tensor], fp8: bool
    ) -> Tensor:
        """The normalised residual at the end (T, d), which the head reads. Arguments as `SpeedrunModel.forward`."""
        weights, fp8_state = self._attention_weights(), self.fp8 if fp8 else None
        mlps = self.mlp_bank.view(-1, self.size.mlp_width, self.size.width).unbind(0)  # up and down alternate
        x = x0 = norm(self._smeared(rows.embed))
        second, skips, kept = norm(rows.second), self._skip_strengths(x0), {}
        values = None if rows.value is None else rows.value.unbind(0)
        lambdas = zip(self.residual_lambdas.unbind(0), self.input_lambdas.unbind(0), strict=True)
        for layer, (residual, (of_first, of_second)) in zip(self.layers, lambdas, strict=True):
            if layer.index in skips:
                x = x + skips[layer.index] * kept[layer.skip_from]
            x = residual * x + of_first * x0 + of_second * second
            u = norm(x)
            window = windows[0] if layer.window == "short" else windows[1]
            x = x + attend(
                u, *weights[layer.bank], layer, self.size.heads, documents, window, self.rotary,
                self._extras(layer, u, values), self.backend.attend,
            )  # fmt: skip
            up, down = mlps[2 * layer.index : 2 * layer.index + 2]
            x = x + mlp(norm(x), up, down, fp8_state, layer.index)
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
