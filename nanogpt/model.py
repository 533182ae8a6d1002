"""GPT-2 (Radford et al. 2019), in the shape and under the parameter names that nanoGPT and the published weights use.

Shapes: B sequences, T positions, C width, H heads, D = C / H, V vocabulary, N = B T.

Weights are float32; each layer casts its own to the dtype of the activations, and the residual stream has that
dtype too. (Autocast would keep the residual stream in float32: twice the memory traffic, and no better loss.)
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanogpt.cross_entropy import linear_cross_entropy
from nanogpt.fp8 import fp8_linear


@dataclass(frozen=True)
class Shape:
    """What the weights depend on; saved with every checkpoint."""

    vocab_size: int
    block_size: int
    n_layer: int
    n_head: int
    n_embd: int
    bias: bool


class Linear(nn.Linear):
    """A linear layer whose float32 weights are cast to the activations' dtype, or to 8 bits when `fp8` is set."""

    fp8 = False  # set by GPT.use_fp8; counts in training only

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out), in the dtype of x."""
        if self.fp8 and self.training:
            return fp8_linear(x, self.weight, self.bias)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), bias)


class LayerNorm(nn.Module):
    """Layer norm (Ba et al. 2016) with an optional bias; its statistics are computed in float32."""

    def __init__(self, width: int, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., C), in the dtype of x."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.layer_norm(x, self.weight.shape, self.weight.to(x.dtype), bias, 1e-5)


# What an attention layer does with its heads: (layer, q, k, v), each (B, H, T, D) -> (B, H, T, D). Sampling passes
# one that keeps the keys and values of earlier positions.
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]


class Attention(nn.Module):
    """Causal self-attention with H heads (Vaswani et al. 2017, section 3.2)."""

    def __init__(self, layer: int, shape: Shape, dropout: float) -> None:
        super().__init__()
        self.layer, self.n_head, self.dropout = layer, shape.n_head, dropout
        self.c_attn = Linear(shape.n_embd, 3 * shape.n_embd, bias=shape.bias)
        self.c_proj = Linear(shape.n_embd, shape.n_embd, bias=shape.bias)

    def forward(self, x: Tensor, attend: Attend | None = None) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        B, T, C = x.shape
        packed = self.c_attn(x).split(C, dim=2)
        q, k, v = (part.view(B, T, self.n_head, C // self.n_head).transpose(1, 2) for part in packed)
        if attend is not None:
            y = attend(self.layer, q, k, v)
        else:
            if x.device.type == "cpu":  # whose backward is several times slower in bfloat16
                q, k, v = q.float(), k.float(), v.float()
            dropout = self.dropout if self.training else 0.0
            y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True).to(x.dtype)
        y = self.c_proj(y.transpose(1, 2).reshape(B, T, C))
        return F.dropout(y, self.dropout, self.training)


class MLP(nn.Module):
    """C -> 4 C -> C with GELU, in the tanh form that GPT-2 was trained with (Hendrycks and Gimpel 2016)."""

    def __init__(self, shape: Shape, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout
        self.c_fc = Linear(shape.n_embd, 4 * shape.n_embd, bias=shape.bias)
        self.c_proj = Linear(4 * shape.n_embd, shape.n_embd, bias=shape.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        x = self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))
        return F.dropout(x, self.dropout, self.training)


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, layer: int, shape: Shape, dropout: float) -> None:
        super().__init__()
        self.ln_1 = LayerNorm(shape.n_embd, shape.bias)
        self.attn = Attention(layer, shape, dropout)
        self.ln_2 = LayerNorm(shape.n_embd, shape.bias)
        self.mlp = MLP(shape, dropout)

    def forward(self, x: Tensor, attend: Attend | None = None) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        x = x + self.attn(self.ln_1(x), attend)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """The language model. `forward` is for training (a loss), `hidden` and `logits` are for everything else."""

    def __init__(self, shape: Shape, dropout: float = 0.0, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.shape, self.dropout, self.dtype, self.fp8 = shape, dropout, dtype, False
        blocks = [Block(layer, shape, dropout) for layer in range(shape.n_layer)]
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(shape.vocab_size, shape.n_embd),
                "wpe": nn.Embedding(shape.block_size, shape.n_embd),
                "h": nn.ModuleList(blocks),
                "ln_f": LayerNorm(shape.n_embd, shape.bias),
            }
        )  # the head has no weights of its own: it is wte again (Press and Wolf 2017)

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """GPT-2's initialisation, as OpenAI's code has it: normal(0.02), positions normal(0.01), and what writes to
        the residual stream divided by sqrt(2 n_layer) (Radford et al. 2019, section 2.3).

        nanoGPT draws the positions with 0.02; with 0.01 the 80-step run of benchmarks/gpt2_training.py ends 0.07 lower.
        Drawn on the CPU from `seed`, so that the weights are the same on every device.
        """
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                std = 0.01 if name.endswith("wpe.weight") else 0.02
                if name.endswith("c_proj.weight"):
                    std /= math.sqrt(2 * self.shape.n_layer)
                parameter.copy_(torch.empty(parameter.shape).normal_(0.0, std, generator=generator))
            else:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)

    def hidden(self, tokens: Tensor, start: int | Tensor = 0, attend: Attend | None = None) -> Tensor:
        """Tokens (B, T), int64, at positions start .. start + T -> final normed activations (B, T, C)."""
        positions = torch.arange(tokens.shape[1], device=tokens.device) + start
        x = self.transformer.wte(tokens) + self.transformer.wpe(positions)
        x = F.dropout(x.to(self.dtype), self.dropout, self.training)
        for block in self.transformer.h:
            x = block(x, attend)
        return self.transformer.ln_f(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., C) -> (..., V), in the dtype of `hidden`."""
        return F.linear(hidden, self.transformer.wte.weight.to(hidden.dtype))

    def forward(self, tokens: Tensor, targets: Tensor, fused: bool = False) -> Tensor:
        """Mean cross entropy in nats, a float32 scalar. Tokens and targets: (B, T), int64.

        `fused` takes the kernel that never keeps logits and their gradient side by side (needs a GPU).
        """
        x = self.hidden(tokens)
        return linear_cross_entropy(
            x.flatten(0, 1), self.transformer.wte.weight, targets.flatten(), fused, self.fp8
        )

    def use_fp8(self) -> None:
        """Train with 8-bit matrix products from now on; evaluation and sampling are not touched."""
        self.fp8 = True
        for module in self.modules():
            if isinstance(module, Linear):
                module.fp8 = True

    def num_parameters(self) -> int:
        """Parameters, positions left out, as GPT-2's sizes are usually given."""
        return sum(p.numel() for p in self.parameters()) - self.transformer.wpe.weight.numel()

    def flops_per_token(self) -> float:
        """Floating-point operations of one trained token, forward and backward: 6 N + 12 L C T.

        PaLM (Chowdhery et al. 2022), appendix B; the attention is counted as if it were not causal, as everybody
        does, so that the figure compares with nanoGPT's.
        """
        shape = self.shape
        return 6 * self.num_parameters() + 12 * shape.n_layer * shape.n_embd * shape.block_size
