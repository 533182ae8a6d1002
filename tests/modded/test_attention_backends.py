"""The choice of attention, the documents in the graph, and one compiled graph for all windows."""

import re
import sys
import types
from pathlib import Path

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from modded_nanogpt import attention_backends as backends
from modded_nanogpt.kernels.launch import INTERPRETED
from nanogpt.common.errors import UserError
from tests.modded.kernels.packed_kit import LENGTHS, bounds, worst

CPU = torch.device("cpu")
ON_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA driver on this machine")


def offsets(lengths: tuple[int, ...], empty: int, device: str = "cpu") -> torch.Tensor:
    """cu_seqlens with empty documents at its end."""
    ends = torch.tensor([0, *lengths]).cumsum(0)
    return torch.cat([ends, ends[-1:].expand(empty)]).to(device, torch.int32)


@pytest.mark.parametrize("empty", [0, 1, 40])
def test_documents(empty):
    found = backends.documents(offsets(LENGTHS, empty), sum(LENGTHS))
    for column, expected in zip(found, bounds(LENGTHS), strict=True):
        assert column.dtype == torch.int32 and torch.equal(column, expected)


def test_documents_that_are_empty_between_others():
    start, end = backends.documents(torch.tensor([0, 0, 2, 2, 2, 5, 5], dtype=torch.int32), 5)
    assert start.tolist() == [0, 0, 2, 2, 2] and end.tolist() == [2, 2, 5, 5, 5]


def test_auto_on_a_cpu_is_the_plain_one_and_says_so():
    chosen = backends.choose("auto", CPU, torch.float32)
    assert chosen.name == "reference" and "cpu" in chosen.why
    assert backends.choose("reference", CPU, torch.bfloat16).why == "asked for"


@pytest.mark.skipif(INTERPRETED, reason="TRITON_INTERPRET lets Triton run on a CPU")
@pytest.mark.parametrize("name", ["varlen", "fa3", "triton"])
def test_what_was_asked_for_is_refused_rather_than_replaced(name):
    with pytest.raises(UserError, match=rf"^--attention={name}: needs a CUDA GPU, .*; --attention=auto"):
        backends.choose(name, CPU, torch.bfloat16)


def test_an_unknown_name():
    with pytest.raises(UserError, match="--attention=flash: unknown; use auto or one of varlen, fa3, triton"):
        backends.choose("flash", CPU, torch.bfloat16)


@pytest.mark.parametrize(
    ("capability", "activate", "reason"),
    [
        ((8, 0), print, "is for Hopper"),
        ((9, 0), None, "2.11 can"),
        ((9, 0), print, "is not installed .pip install"),
    ],
)
def test_why_flash_attention_3_does_not_load(capability, activate, reason, monkeypatch):
    monkeypatch.setattr(
        torch.nn, "attention", types.SimpleNamespace(activate_flash_attention_impl=activate), raising=False
    )
    monkeypatch.setattr(backends.importlib.util, "find_spec", lambda name: None)
    assert re.search(reason, backends._load_fa3(capability))


def test_a_flash_attention_3_that_is_damaged(tmp_path: Path, monkeypatch):
    """The library is found inside of xformers, without importing it, and the loader's complaint is handed on."""
    library = tmp_path / "xformers" / "flash_attn_3" / "_C.so"
    library.parent.mkdir(parents=True)
    library.write_bytes(b"no library")
    (tmp_path / "xformers" / "__init__.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    problem = backends._load_fa3((9, 0))
    assert problem.startswith("did not load: ") and "\n" not in problem


def test_flash_attention_3_from_xformers_is_loaded_once(tmp_path: Path, monkeypatch):
    """What the loader and torch's switch are handed (both stand in for a GPU's), and a second choice is harmless."""
    library = tmp_path / "xformers" / "flash_attn_3" / "_C.so"
    library.parent.mkdir(parents=True)
    library.touch()
    (tmp_path / "xformers" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(sys.modules, "flash_attn_interface", None)  # restored at the end
    monkeypatch.delitem(sys.modules, "flash_attn_interface")
    seen = []
    monkeypatch.setattr(torch.ops, "load_library", seen.append)
    switch = types.SimpleNamespace(activate_flash_attention_impl=seen.append)
    monkeypatch.setattr(torch.nn, "attention", switch)
    assert backends._load_fa3((9, 0)) is None and backends._load_fa3((9, 0)) is None
    assert seen == [str(library), "FA3", "FA3"]


def test_one_graph_for_all_windows():
    """Forward and backward of the chosen backend, compiled whole, are those of the eager one at every window."""
    attend = backends.choose("auto", CPU, torch.float32).attend
    cu_seqlens = offsets(LENGTHS, 5)

    def loss(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: torch.Tensor) -> torch.Tensor:
        documents = backends.documents(cu_seqlens, q.shape[0])
        return attend(q, k, v, cu_seqlens, *documents, 90, window).square().sum()

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(loss, backend=counter, fullgraph=True)
    values = []
    for size in (5, 16, 200):
        window = torch.tensor(size, dtype=torch.int32)
        leaves = [torch.randn(sum(LENGTHS), 2, 16, requires_grad=True) for _ in range(3)]
        found = []
        for function in (loss, compiled):
            value = function(*leaves, window)
            found.append([value, *torch.autograd.grad(value, leaves)])
        assert all(torch.equal(*pair) for pair in zip(*found, strict=True))
        values.append(found[0][0].item())
    assert counter.frame_count == 1 and len(set(values)) == 3


def test_the_plain_operator_by_torchs_rules():
    doc_start, _ = bounds((20, 1, 9))
    given = [torch.randn(30, 2, 16).requires_grad_() for _ in range(3)]
    checks = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static")
    torch.library.opcheck(
        torch.ops.speedrun.attention_reference.default,
        (*given, doc_start, torch.tensor(7, dtype=torch.int32)),
        test_utils=checks,
    )


def test_the_shapes_of_flash_attention_without_data():
    """What the compiler sees: contiguous outputs and gradients, whatever the strides of q, k, v."""
    q, k, v = torch.empty(30, 3, 2, 16, device="meta", requires_grad=True).unbind(1)
    cu_seqlens = torch.empty(9, dtype=torch.int32, device="meta")
    out, lse = torch.ops.speedrun.attention_flash(q, k, v, cu_seqlens, 90, torch.tensor(5, dtype=torch.int32))
    assert out.shape == (30, 2, 16) and out.is_contiguous()
    assert lse.shape == (2, 30) and lse.dtype == torch.float32
    assert [x.shape for x in torch.autograd.grad(out.sum(), (q, k, v))] == [out.shape] * 3


def test_the_plain_one_needs_memory_for_a_block_and_its_window_only():
    """16,384 tokens: one (T, T) float32 matrix of scores would take 1 GB."""
    tokens, window = 16_384, torch.tensor(64, dtype=torch.int32)
    q = torch.randn(tokens, 1, 16)
    cu_seqlens = offsets((tokens // 2, tokens // 2), 3)
    documents = backends.documents(cu_seqlens, tokens)
    attend = backends.choose("reference", CPU, torch.float32).attend
    with torch.profiler.profile(profile_memory=True) as profile:
        out = attend(q, q, q, cu_seqlens, *documents, tokens, window)
    assert out.shape == q.shape
    largest = max(
        event.self_cpu_memory_usage for event in profile.events() if event.name.startswith("aten::")
    )
    assert 0 < largest <= 2 * 4 * tokens * 16


@pytest.mark.gpu
@ON_GPU
@pytest.mark.parametrize("name", ["triton", "reference", "varlen", "fa3"])
def test_a_backend_on_a_gpu(name):
    """Each against float64, compiled by inductor, the window changing without another graph."""
    device = torch.device("cuda")
    problem = backends._problem(name, device, torch.bfloat16)
    if problem is not None:
        pytest.skip(f"{name}: {problem}")
    attend = backends.choose(name, device, torch.bfloat16).attend
    lengths = (2048, 1, 700, 33, 1314)
    cu_seqlens = offsets(lengths, 10, "cuda")
    counter = CompileCounterWithBackend("inductor")

    @torch.compile(backend=counter, fullgraph=True)
    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: torch.Tensor) -> torch.Tensor:
        return attend(q, k, v, cu_seqlens, *backends.documents(cu_seqlens, q.shape[0]), 2048, window)

    plain = backends.choose("reference", device, torch.float64).attend
    for size in (128, 640, 1408):
        window = torch.tensor(size, dtype=torch.int32)
        leaves = [(s * torch.randn(4096, 6, 128, device="cuda")).bfloat16() for s in (128**-0.5, 1, 1)]
        grad = torch.randn(4096, 6, 128, device="cuda").bfloat16()
        found = []
        for function, dtype in ((run, torch.bfloat16), (plain, torch.float64)):
            given = [x.to(dtype).requires_grad_() for x in leaves]
            documents = backends.documents(cu_seqlens, 4096)
            others = (window,) if function is run else (cu_seqlens, *documents, 2048, window)
            out = function(*given, *others)
            found.append([out.detach(), *torch.autograd.grad(out, given, grad.to(dtype))])
        assert max(worst(a, b) for a, b in zip(*found, strict=True)) < 2e-2
    assert counter.frame_count == 1
