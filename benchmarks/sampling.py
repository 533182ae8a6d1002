"""How fast text is sampled: our cached generation beside a loop without a cache, over the same weights.

    python benchmarks/sampling.py
    python benchmarks/sampling.py --device=cpu --n_layer=4 --n_head=4 --n_embd=128 --new_tokens=200

The loop is what nanoGPT's sample.py does: all positions again for every token, under autocast, weights kept in
float32. The weights are random: the speed does not depend on them. The last line is JSON for programs.
"""

import contextlib
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from nanogpt.common.errors import run_command
from nanogpt.common.flags import knob, parse
from nanogpt.config import check_device


@dataclass(frozen=True)
class Settings:
    """The command line."""

    n_layer: int = knob(12, "transformer blocks", low=1)
    n_head: int = knob(12, "attention heads", low=1)
    n_embd: int = knob(768, "width", low=1)
    block_size: int = knob(1024, "context length, in tokens", low=1)
    vocab_size: int = knob(50304, "rows of the embedding", low=2)
    new_tokens: int = knob(1000, "tokens to generate", low=1)
    samples: int = knob(1, "generated at once", low=1)
    top_k: int = knob(200, "as in sample.py", low=0)
    rounds: int = knob(3, "measure both so many times", low=1)
    device: str = knob("auto", "auto, cpu, cuda or cuda:N")

    def __post_init__(self) -> None:
        """UserError for a device that is none."""
        check_device(self.device)


def main(argv: list[str]) -> None:
    """Measure and print."""
    settings = parse(Settings, argv, prog="benchmarks/sampling.py", description=__doc__)
    import torch

    from nanogpt.common import hardware
    from nanogpt.common.ranks import choose_device
    from nanogpt.generate import Generator, Sampling, generate_plain, random_draws
    from nanogpt.model import GPT, Shape

    device = choose_device(settings.device, 0)
    dtype = hardware.choose_dtype("auto", device)
    shape = Shape(
        settings.vocab_size,
        settings.block_size,
        settings.n_layer,
        settings.n_head,
        settings.n_embd,
        bias=False,
    )
    ours_model, plain_model = GPT(shape, dtype=dtype), GPT(shape, dtype=torch.float32)
    for model in (ours_model, plain_model):
        model.init_weights(1)
    ours_model.to(device, dtype).eval()
    plain_model.to(device).eval()
    draws = random_draws(1, range(settings.samples), settings.new_tokens)
    sampling = Sampling(temperature=0.8, top_k=settings.top_k)
    autocast = torch.autocast(device.type, dtype) if device.type == "cuda" else contextlib.nullcontext()

    def ours() -> None:
        generator = Generator(
            ours_model, settings.samples, settings.new_tokens, sampling, settings.vocab_size
        )
        for _ in generator.generate([0], draws):
            pass

    def plain() -> None:
        with autocast:
            generate_plain(plain_model, [0], draws, sampling, settings.vocab_size).cpu()

    cold = seconds_of(ours)  # with everything that happens once: libraries, the graphs' capture
    if device.type == "cuda":
        seconds_of(plain)
    times: dict[str, list[float]] = {"ours": [], "plain": []}
    for _ in range(settings.rounds):  # in turns, so that a busy machine slows both
        times["ours"].append(seconds_of(ours))
        times["plain"].append(seconds_of(plain))
    result = {name: statistics.median(found) for name, found in times.items()}
    print(
        f"{hardware.describe(device)}; {ours_model.num_parameters() / 1e6:.1f} M parameters, "
        f"{settings.new_tokens} tokens"
    )
    for name, label in (("ours", "with the cache"), ("plain", "without, as nanoGPT")):
        rate = settings.new_tokens * settings.samples / result[name]
        print(f"{label:20} {1e3 * result[name] / settings.new_tokens:8.3f} ms a token {rate:10,.0f} tokens/s")
    print(f"ratio {result['plain'] / result['ours']:.1f}; our first call, captures included: {cold:.2f} s")
    print(json.dumps({"device": hardware.describe(device), "seconds": times, "cold_seconds": cold,
                      "ratio": result["plain"] / result["ours"], "new_tokens": settings.new_tokens}))  # fmt: skip


def seconds_of(call: Callable[[], None]) -> float:
    """Wall-clock seconds of a call that ends with its results on the CPU."""
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


if __name__ == "__main__":
    run_command(main)
