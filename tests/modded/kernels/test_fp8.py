"""8-bit numbers: which machine uses them, the copies and their layouts, the product."""

import pytest
import torch

from modded_nanogpt.kernels import fp8
from nanogpt.common.errors import UserError

SIZES = [(1, 1, 1), (3, 33, 70), (2, 64, 128), (1, 130, 5)]


def compare_copies(device: str, low: torch.dtype, size: tuple[int, int, int]) -> None:
    """`quantise` against plain torch, bit for bit, from a strided bank; the largest entries are exact."""
    count, height, width = size
    torch.manual_seed(0)
    magnitudes = torch.tensor([1.0, 300.0, 1e-4])[:count, None, None]
    bank = (torch.randn(count, 2, height, width) * magnitudes[:, None]).to(device, torch.bfloat16)
    scale, largest = fp8.scales(count, 0.05, device), fp8.scales(count, 0.0, device)
    rows = torch.empty(count, height, width, dtype=low, device=device)
    columns = torch.empty(count, width, height, dtype=low, device=device)
    fp8.quantise(bank[:, 1], scale, rows, columns, largest)
    expected = fp8.to_low(bank[:, 1], scale[:, None, None], low)
    # A GPU divides by the scale within one step of float32, which can tip a tie.
    assert (rows.float() != expected.float()).float().mean() <= (1e-4 if device == "cuda" else 0)
    assert torch.equal(columns.float(), rows.float().mT)
    assert torch.equal(largest, bank[:, 1].abs().amax((1, 2)).float())
    alone = torch.empty_like(columns)
    fp8.quantise(bank[:, 1], scale, columns=alone)
    assert torch.equal(alone.float(), columns.float())


def compare_transpose(device: str, height: int, width: int) -> None:
    matrix = torch.randint(256, (height, width), dtype=torch.uint8, device=device)
    assert torch.equal(fp8.transpose_bytes(matrix), matrix.T)


def compare_product(device: str, low: torch.dtype) -> None:
    """Against float64 products of what the 8-bit operands hold; scales at any address."""
    torch.manual_seed(0)
    a, b = torch.randn(48, 64, device=device).to(low), torch.randn(32, 64, device=device).to(fp8.E4M3)
    several = torch.tensor([9.0, 0.5, 0.25], device=device)
    got = fp8.scaled_mm(a, b.T, several[1], several[2], torch.bfloat16, fast=False)
    expected = a.double() @ b.double().T / 8
    assert ((got.double() - expected).abs() <= 2**-8 * expected.abs() + 1e-3).all()


def compare_all(device: str, sizes: list[tuple[int, int, int]]) -> None:
    for low in (fp8.E4M3, fp8.E5M2):
        for size in sizes:
            compare_copies(device, low, size)
    for size in ((2, 1), (70, 131), (256, 128)):
        compare_transpose(device, *size)
    with pytest.raises(ValueError, match="needs whole pairs of rows"):
        fp8.transpose_bytes(torch.zeros(3, 4, dtype=torch.uint8, device=device))


def test_rounding_clamps_and_keeps_the_nearest():
    values = torch.tensor([0.0, 1.0, -1.06, 1.07, 1e9, -1e9, 17.0])
    assert fp8.to_low(values, 1.0).tolist() == [0, 1, -1, 1.125, 448, -448, 16]
    assert fp8.to_low(values, 1.0, fp8.E5M2).tolist() == [0, 1, -1, 1, 57344, -57344, 16]
    assert fp8.to_low(values, torch.tensor(0.5)).tolist()[-1] == 32  # between 32 and 36: to the even one


def test_every_scale_lies_where_cublas_takes_it():
    scales = fp8.scales(5, 0.5, torch.device("cpu"))
    assert all(scale.data_ptr() % 16 == 0 for scale in scales) and (scales == 0.5).all()


@pytest.mark.parametrize("low", [fp8.E4M3, fp8.E5M2])
def test_the_product_equals_float64(low):
    compare_product("cpu", low)


def test_fp8_is_refused_where_there_is_none():
    cpu = torch.device("cpu")
    for wanted in ("auto", "off"):
        choice = fp8.choose(wanted, cpu)
        assert not choice.head and not choice.mlp and choice.why
    with pytest.raises(UserError, match="--fp8=force: device cpu has no FP8 products; use --fp8=auto"):
        fp8.choose("force", cpu)


@pytest.mark.parametrize(
    ("capability", "head", "mlp"),
    [((8, 0), False, False), ((8, 9), True, False), ((9, 0), True, True), ((12, 0), True, True)],
)
def test_what_each_generation_does(monkeypatch, capability, head, mlp):
    """The table alone: the GPU is named by the two questions that are put to the driver."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "GPU")
    choice = fp8.choose("auto", torch.device("cuda:0"))
    assert (choice.head, choice.mlp) == (head, mlp)
    if not head:
        with pytest.raises(UserError, match=r"GPU \(sm_80\) has no FP8"):
            fp8.choose("force", torch.device("cuda:0"))


@pytest.mark.gpu
def test_the_kernels_on_a_gpu():
    if not torch.cuda.is_available():
        pytest.skip("no NVIDIA driver on this machine")
    if not fp8.choose("auto", torch.device("cuda")).head:
        pytest.skip("this GPU has no FP8 products")
    compare_all("cuda", SIZES)
    wide, scale = torch.zeros(1, 2, 2, device="cuda"), fp8.scales(1, 1.0, torch.device("cuda"))
    with pytest.raises(ValueError, match=r"quantise: columns of torch.float32: give bfloat16"):
        fp8.quantise(wide, scale, columns=torch.empty(1, 2, 2, dtype=fp8.E4M3, device="cuda"))
    compare_transpose("cuda", 50_304, 49_152)  # more than 2^31 entries
    for low in (fp8.E4M3, fp8.E5M2):
        compare_product("cuda", low)


def interpreted(everything: bool) -> None:
    compare_all("cpu", SIZES if everything else SIZES[1:2])
