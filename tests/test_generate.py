"""Generation: the cache against no cache, the choice of a token against its definition, samples that stand alone."""

import math
from collections import Counter

import pytest
import torch

from nanogpt.generate import (
    Generator,
    Sampling,
    choose,
    generate_plain,
    next_window,
    random_draws,
)  # fmt: skip
from nanogpt.model import GPT, Shape

BLOCK = 16
GREEDY = Sampling(temperature=0.0)


def small_model(vocab_size: int = 40, dtype: torch.dtype = torch.float32, **changes: int) -> GPT:
    """Weights far from the initial ones, so that attention and positions matter."""
    shape = {"block_size": BLOCK, "n_layer": 3, "n_head": 2, "n_embd": 16, "bias": True} | changes
    model = GPT(Shape(vocab_size=vocab_size, **shape), dtype=dtype).eval()
    model.init_weights(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                parameter.mul_(40 if ".h." in name else 8)
    return model


def run(
    model: GPT, prompt: list[int], draws: torch.Tensor, sampling: Sampling, **kwargs: object
) -> list[list[int]]:
    vocab_size = kwargs.pop("vocab_size", model.shape.vocab_size)
    generator = Generator(model, draws.shape[1], len(draws), sampling, vocab_size, **kwargs)
    return list(generator.generate(prompt, draws))


@pytest.mark.parametrize("prompt_length", [1, 5, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK])
def test_greedy_with_the_cache_equals_greedy_without(prompt_length):
    model, draws = small_model(), random_draws(0, range(2), 3 * BLOCK)
    prompt = torch.randint(40, (prompt_length,), generator=torch.Generator().manual_seed(3)).tolist()
    ours = run(model, prompt, draws, GREEDY)
    assert ours == generate_plain(model, prompt, draws, GREEDY, 40).tolist()
    assert len({row[0] for row in ours}) > 3, "a model that repeats itself would prove nothing"


def test_the_logits_of_every_step_equal_those_without_a_cache():
    model, prompt, steps = small_model(), [7, 3, 9], 2 * BLOCK + 3
    generator = Generator(model, 1, steps, GREEDY, 40)
    tokens, window = list(prompt), len(prompt)
    for token in generator.generate(prompt, random_draws(0, range(1), steps)):
        with torch.no_grad():
            plain = model.logits(model.hidden(torch.tensor([tokens[-window:]]))[:, -1])
        torch.testing.assert_close(generator.logits, plain, rtol=1e-4, atol=1e-4)
        tokens += token
        window = next_window(window, BLOCK)


def test_the_cache_would_be_wrong_if_a_position_were(monkeypatch):
    """The comparison above can fail: with a wrong position the sequences part."""
    model, draws = small_model(), random_draws(0, range(1), BLOCK)
    right = run(model, [1], draws, GREEDY)
    plain_hidden = model.hidden
    monkeypatch.setattr(model, "hidden", lambda tokens, start=0, attend=None: plain_hidden(tokens, 0, attend))
    assert run(model, [1], draws, GREEDY) != right


@pytest.mark.parametrize("block_size", [1, 2, 3, 8, 1024])
def test_the_window_never_outgrows_the_block_and_keeps_seven_eighths(block_size):
    window, seen = 1, []
    for _ in range(3 * block_size + 5):
        window = next_window(window, block_size)
        seen.append(window)
    assert max(seen) == block_size
    shortest = min(seen[block_size:])
    assert shortest == max(1, block_size * 7 // 8)


@pytest.mark.parametrize("block_size", [1, 2, 3])
def test_the_smallest_windows_work(block_size):
    model, draws = small_model(block_size=block_size), random_draws(0, range(2), 9)
    sampling = Sampling(1.0, 0, 1.0)
    assert run(model, [4, 2], draws, sampling) == generate_plain(model, [4, 2], draws, sampling, 40).tolist()


def test_a_sample_depends_on_seed_and_number_only():
    model, sampling = small_model(), Sampling(1.0, 10, 0.9)
    together = run(model, [1, 2], random_draws(11, range(5), 40), sampling)
    for number in range(5):
        alone = run(model, [1, 2], random_draws(11, range(number, number + 1), 40), sampling)
        assert [row[0] for row in alone] == [row[number] for row in together]
    assert run(model, [1, 2], random_draws(11, range(5), 40), sampling) == together
    assert run(model, [1, 2], random_draws(12, range(5), 40), sampling) != together
    columns = {tuple(row[number] for row in together) for number in range(5)}
    assert len(columns) == 5


def test_a_generator_can_be_used_again():
    model, draws = small_model(), random_draws(1, range(2), 30)
    generator = Generator(model, 2, 30, Sampling(), 40)
    first = list(generator.generate([5], draws))
    list(generator.generate([6, 7, 8], draws[:10]))
    assert list(generator.generate([5], draws)) == first


def test_padding_of_the_vocabulary_is_never_chosen():
    model = small_model(vocab_size=64)
    with torch.no_grad():
        model.transformer.wte.weight[50:] *= 100  # the padding would win every time
    ours = run(model, [1], random_draws(1, range(3), 60), Sampling(5.0, 0, 1.0), vocab_size=50)
    assert max(max(row) for row in ours) < 50


def twin(logits: list[float], draw: float, sampling: Sampling) -> int:
    """`choose` for one row, by its definition and in plain Python."""
    ranked = sorted(range(len(logits)), key=lambda token: -logits[token])
    if sampling.temperature == 0:
        return ranked[0]
    kept = ranked[: sampling.top_k or None]
    top = max(logits[token] for token in kept)
    weight = {token: math.exp((logits[token] - top) / sampling.temperature) for token in kept}
    mass = sum(weight.values())
    nucleus, reached = [], 0.0
    for token in kept:
        nucleus.append(token)
        reached += weight[token] / mass
        if sampling.top_p < 1 and reached >= sampling.top_p:
            break
    if sampling.top_p == 1 and not 0 < sampling.top_k < len(logits):
        nucleus.sort()  # without a filter there is no need to rank: the order is that of the vocabulary
    goal, reached = draw * sum(weight[token] for token in nucleus), 0.0
    for token in nucleus:
        reached += weight[token]
        if reached > goal:
            return token
    return nucleus[-1]


@pytest.mark.parametrize("temperature", [0.0, 0.3, 1.0, 4.0])
@pytest.mark.parametrize("top_k", [0, 1, 7, 50])
@pytest.mark.parametrize("top_p", [1e-9, 0.3, 0.9, 1.0])
def test_the_choice_equals_its_plain_twin(temperature, top_k, top_p):
    generator = torch.Generator().manual_seed(17)
    sampling = Sampling(temperature, top_k, top_p)
    logits = 3 * torch.randn(64, 33, generator=generator)
    draws = torch.rand(64, dtype=torch.float64, generator=generator)
    ours = choose(logits, draws, sampling).tolist()
    assert ours == [
        twin(row.tolist(), draw.item(), sampling) for row, draw in zip(logits, draws, strict=True)
    ]


def test_the_frequencies_are_the_probabilities():
    """20,000 draws: each token's share is within five standard deviations of its probability."""
    logits = torch.tensor([1.0, 0.0, 2.0, -1.0, 0.5])
    count = 20_000
    draws = random_draws(3, range(1), count)[:, 0]
    for sampling, kept in ((Sampling(0.7, 0, 1.0), [0, 1, 2, 3, 4]), (Sampling(0.7, 3, 1.0), [0, 2, 4]),
                           (Sampling(0.7, 0, 0.9), [0, 2, 4]), (Sampling(0.7, 2, 0.5), [2])):  # fmt: skip
        found = Counter(choose(logits.expand(count, -1), draws, sampling).tolist())
        expected = torch.softmax(logits[kept] / 0.7, 0).tolist()
        assert set(found) == set(kept)
        for token, share in zip(kept, expected, strict=True):
            assert abs(found[token] / count - share) <= 5 * math.sqrt(share * (1 - share) / count), (
                sampling,
                token,
            )


def test_extreme_temperatures_and_logits_stay_in_the_vocabulary():
    logits = torch.tensor([[1e4, -1e4, 0.0], [0.0, 0.0, 0.0], [-torch.inf, 3.0, -torch.inf]])
    almost_one = torch.full((3,), 1 - 2**-53, dtype=torch.float64)
    for temperature in (1e-300, 1e-6, 1e-4, 1.0, 1e6):
        for draws in (torch.zeros(3, dtype=torch.float64), almost_one):
            tokens = choose(logits, draws, Sampling(temperature, 0, 1.0))
            assert tokens[0] == 0 or temperature == 1e6
            assert all(0 <= token < 3 for token in tokens.tolist())
            assert choose(logits, draws, Sampling(temperature, 2, 0.9))[2] == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_graphs_equal_plain_calls_and_no_cache_on_a_gpu(dtype):
    """Across several lengths of the cache's view, and two refills."""
    model = small_model(block_size=640, dtype=dtype).to("cuda", dtype)
    draws = random_draws(2, range(3), 1500)
    sampling = Sampling(1.0, 20, 0.95)
    graphs = run(model, [1, 2, 3], draws, sampling, graphs=True)
    assert graphs == run(model, [1, 2, 3], draws, sampling, graphs=False)
    if dtype == torch.float32:
        plain = generate_plain(model, [1, 2, 3], draws[:300], GREEDY, 40).tolist()
        assert run(model, [1, 2, 3], draws[:300], GREEDY, graphs=True) == plain
