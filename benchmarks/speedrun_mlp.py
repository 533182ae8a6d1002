"""What `speedrun_kernels.py` measures of the MLP: products with the activation between them, whole and in pieces."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

WIDTH, HIDDEN = 768, 3072


@dataclass(frozen=True)
class Case:
    """Something to measure: our call, the twin's (None: there is none), and the least work it takes."""

    name: str
    ours: Callable[[], object]
    twin: Callable[[], object] | None
    flops: float = 0.0
    bytes: float = 0.0


def mlp_inputs(tokens: int, device: object) -> tuple:
    """(u, bank of one layer, gradient of the result)."""
    import torch

    u = torch.nn.functional.rms_norm(torch.randn(tokens, WIDTH, device=device), (WIDTH,)).bfloat16()
    bank = (torch.randn(1, 2, HIDDEN, WIDTH, device=device) / WIDTH**0.5).bfloat16()
    return u.requires_grad_(), bank.requires_grad_(), 0.01 * torch.randn_like(u)


def mlp_cases(tokens: int, device: object, choice: object) -> Iterator[Case]:
    """One layer's MLP as the model compiles it, forward alone and with its backward pass."""
    import torch

    from modded_nanogpt.kernels import mlp as kernels
    from modded_nanogpt.kernels.reference import mlp as reference

    u, bank, grad = mlp_inputs(tokens, device)
    up, down = (part.detach().requires_grad_() for part in bank[0])
    torch._dynamo.reset()  # what was compiled for other numbers of tokens counts towards a limit
    kernels.before_compiling()
    ours, twin = (torch.compile(f, fullgraph=True, dynamic=False) for f in (kernels.mlp, reference.mlp))

    def both(function: Callable[..., torch.Tensor], *state: object) -> None:
        u.grad = up.grad = down.grad = None
        function(u, up, down, *state).backward(grad)

    forms = [("bfloat16", None)]
    if choice.mlp:
        for name, backward in (("FP8", False), ("FP8, backward too", True)):
            state = kernels.Fp8Mlp(bank.detach(), backward=backward)
            state.refresh(exact=True)
            forms.append((name, state))
    flops = 4 * tokens * WIDTH * HIDDEN

    def forward(function: Callable[..., torch.Tensor], *state: object) -> None:
        with torch.no_grad():
            function(u, up, down, *state)

    for name, state in forms:
        if not name.endswith("too"):
            yield Case(
                f"MLP forward, {name}",
                lambda s=state: forward(ours, s),
                lambda: forward(twin),
                flops,
            )
        yield Case(
            f"MLP forward and backward, {name}",
            lambda s=state: both(ours, s),
            lambda: both(twin),
            3 * flops,
        )


def mlp_pieces(tokens: int, device: object, choice: object) -> Iterator[Case]:
    """The fused products alone, beside cuBLAS's product of the same operands without anything after it."""
    import torch

    from modded_nanogpt.kernels import fp8
    from modded_nanogpt.kernels import mlp as kernels

    if not choice.mlp:
        return
    u, bank, grad = (t.detach() for t in mlp_inputs(tokens, device))
    up, down = bank[0]
    post = torch.rand(tokens, HIDDEN, device=device).bfloat16()
    flops = 2 * tokens * WIDTH * HIDDEN
    yield Case("  up and ReLU^2, bfloat16", lambda: kernels._launch(u, up, post), lambda: u @ up.T, flops)
    one = fp8.constant(1.0, device)
    low_u, low_up = fp8.to_low(u, 0.1), fp8.to_low(up, 0.001)
    low_post, largest = torch.empty_like(post, dtype=fp8.E4M3), torch.zeros(1, device=device)
    yield Case(
        "  up and ReLU^2, FP8 in and out",
        lambda: kernels._launch(low_u, low_up, post, (one, one), low=low_post, low_scale=one, largest=largest),
        lambda: fp8.scaled_mm(low_u, low_up.T, one, one, torch.bfloat16), flops,
    )  # fmt: skip
    turned = torch.empty(HIDDEN, tokens, dtype=fp8.E4M3, device=device)
    yield Case(
        "  up and ReLU^2, FP8 in both layouts",
        lambda: kernels._launch(
            low_u, low_up, None, (one, one), low=low_post, turned=turned, low_scale=one, largest=largest
        ),
        lambda: fp8.scaled_mm(low_u, low_up.T, one, one, torch.bfloat16), flops,
    )  # fmt: skip
    low_grad, pre, pre_turned = fp8.to_low(grad, 0.001, fp8.E5M2), low_post.to(fp8.E5M2), turned.to(fp8.E5M2)
    yield Case(
        "  gradient before ReLU^2, FP8 in both layouts",
        lambda: kernels._launch(
            low_grad, low_up, None, (one, one), post=low_post, post_scale=one, low=pre, turned=pre_turned,
            low_scale=one,
        ),
        lambda: fp8.scaled_mm(low_grad, low_up.T, one, one, torch.bfloat16), flops,
    )  # fmt: skip
    pre_grad = torch.empty_like(post)
    yield Case(
        "  gradient before ReLU^2, bfloat16",
        lambda: kernels._launch(grad, down, pre_grad, post=post), lambda: grad @ down.T, flops,
    )  # fmt: skip


def tile_sweep(tokens: int, device: object, choice: object) -> Iterator[Case]:
    """The MLP's fused products with other tiles."""
    from modded_nanogpt.kernels import mlp as kernels

    cuts = [
        (128, 256, 64, 3, 8), (128, 256, 64, 4, 8), (128, 256, 64, 5, 8), (128, 256, 64, 7, 8), (128, 256, 128, 3, 8),
        (128, 128, 64, 4, 4), (128, 128, 64, 5, 8), (128, 128, 128, 4, 8), (256, 128, 64, 3, 8), (64, 256, 64, 4, 4),
    ]  # fmt: skip
    for case in mlp_pieces(tokens, device, choice):
        for cut in cuts:

            def call(case: Case = case, cut: tuple[int, ...] = cut) -> None:
                kept, kernels.tiles = kernels.tiles, lambda *_: kernels.Tiles(*cut)
                try:
                    case.ours()
                finally:
                    kernels.tiles = kept

            yield Case(f"  sweep:{case.name[1:30]} {cut}", call, None, case.flops)
