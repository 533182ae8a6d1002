"""The n-gram table's kernels and their twins against float64: lookup, sums of entries, one update of touched rows."""

import pytest
import torch

from modded_nanogpt.kernels.reference import row_table as reference
from modded_nanogpt.kernels.row_table import Entries, Rates, look_up, sum_entries, update_rows_

CASES = [(1, 8), (7, 24), (40, 96), (150, 300)]  # (tokens, width)
ROWS, POOL = 60, 16


def random(device: str, tokens: int, width: int) -> dict[str, torch.Tensor]:
    """A cycle of `tokens`: two rows each, one of them with many entries, and what lookups and updates read besides."""
    g = torch.Generator().manual_seed(tokens)

    def whole(high: int, *shape: int) -> torch.Tensor:
        return torch.randint(high, shape, generator=g, dtype=torch.int32)

    places = whole(ROWS, 2, tokens)
    places[0, : tokens // 2] = 3
    found = {
        "places": places,
        "signs": whole(POOL, 2, tokens),
        "pool": (2 * whole(2, POOL, width) - 1).to(torch.int8),
        "rows": torch.randn(ROWS, width, generator=g).bfloat16(),
        "gradients": (1e-3 * torch.randn(tokens, width, generator=g)).bfloat16(),
        "second": 1e-6 * torch.rand(ROWS, generator=g),
        "last": whole(5, ROWS),
        "log_kept": torch.log(torch.tensor([1.0, 0.95, 0.95, 0.9025, 0.9025, 0.9025]).double()).cumsum(0),
    }
    return {name: tensor.to(device) for name, tensor in found.items()}


def entries_of(given: dict[str, torch.Tensor]) -> Entries:
    ids, order = torch.sort(given["places"].flatten(), stable=True)
    return Entries(ids, order, given["gradients"], given["signs"].flatten(), given["pool"])


def literal(given: dict[str, torch.Tensor], rates: Rates) -> tuple[torch.Tensor, torch.Tensor]:
    """(rows, second moments) after the event, entry by entry in float64, as the specification has it."""
    tokens = given["places"].shape[1]
    rows, second = given["rows"].double().cpu(), given["second"].double().cpu()
    sums: dict[int, torch.Tensor] = {}
    for half in range(2):
        for t in range(tokens):
            row, sign = int(given["places"][half, t]), given["pool"][int(given["signs"][half, t])].cpu()
            sums[row] = sums.get(row, 0) + given["gradients"][t].double().cpu() * sign
    betas = (given["log_kept"].double().cpu()).diff().exp()
    for row, total in sums.items():
        g = rates.scale * total
        for missed in range(int(given["last"][row]) + 1, rates.event):
            second[row] *= betas[missed - 1]
        second[row] = rates.beta2 * second[row] + (1 - rates.beta2) * g.square().mean()
        p = rows[row]
        u = g / (second[row].sqrt() + rates.epsilon) * rates.step_size
        u += ((u * p > 0) | (not rates.cautious)) * rates.decay * p
        rows[row] = p - u
    return rows, second


def compare(device: str, tokens: int, width: int) -> None:
    given = random(device, tokens, width)
    found = look_up(given["rows"], given["places"], given["pool"], given["signs"])
    wide = given["rows"].double()
    parts = [wide[p] * given["pool"][s] for p, s in zip(given["places"], given["signs"], strict=True)]
    torch.testing.assert_close(found.double(), sum(parts), rtol=2**-8, atol=1e-6)

    entries = entries_of(given)
    distinct = torch.unique(entries.ids)
    sums = sum_entries(entries, distinct.numel())
    expected = reference.sum_entries(entries._replace(gradients=entries.gradients.double()), distinct.numel())
    torch.testing.assert_close(sums.double(), expected, rtol=2**-8, atol=1e-6)

    for cautious in (True, False):
        rates = Rates(5, 0.9025, 0.56 * 0.3, 0.56**2 * 0.05, 0.5, 1e-10, cautious)
        rows, second, last = (given[name].clone() for name in ("rows", "second", "last"))
        update_rows_(rows, second, last, given["log_kept"], entries, rates)
        want_rows, want_second = literal(given, rates)
        torch.testing.assert_close(rows.double().cpu(), want_rows, rtol=2**-8, atol=2e-3)
        torch.testing.assert_close(second.double().cpu(), want_second, rtol=1e-5, atol=1e-14)
        touched = torch.zeros(ROWS, dtype=torch.bool, device=device)
        touched[distinct.long()] = True
        assert torch.equal(rows[~touched], given["rows"][~touched])
        assert torch.equal(last, torch.where(touched, 5, given["last"]))


@pytest.mark.parametrize(("tokens", "width"), CASES)
def test_the_twins_are_the_equations(tokens, width):
    compare("cpu", tokens, width)


def test_nothing_touched_changes_nothing():
    given = random("cpu", 7, 24)
    none = Entries(torch.empty(0, dtype=torch.int32), torch.empty(0, dtype=torch.int64), given["gradients"])
    before = given["rows"].clone()
    rates = Rates(5, 0.9, 0.1, 0.1, 1.0, 1e-10, True)
    update_rows_(given["rows"], given["second"], given["last"], given["log_kept"], none, rates)
    assert torch.equal(given["rows"], before) and sum_entries(none, 0).shape == (0, 24)


@pytest.mark.gpu
def test_the_kernels_on_a_gpu():
    if not torch.cuda.is_available():
        pytest.skip("no NVIDIA driver on this machine")
    for tokens, width in CASES:
        compare("cuda", tokens, width)


def interpreted(everything: bool) -> None:
    for case in CASES if everything else CASES[1:3]:
        compare("cpu", *case)
