"""The benchmarks of the kernels go on when one kernel fails: what else was measured is worth keeping."""

import pytest
import torch

from benchmarks import speedrun_attention, speedrun_kernels


@pytest.fixture
def no_gpu_needed(monkeypatch):
    """Events and queues of a GPU are left out; what is called and printed is real."""
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    for module in (speedrun_kernels, speedrun_attention):
        monkeypatch.setattr(module, "milliseconds", lambda call, *_: (call(), 2.0)[1])


def test_a_case_that_fails_leaves_the_others(no_gpu_needed, capsys):
    def cases(tokens, device, choice):
        yield speedrun_kernels.Case("one", lambda: 1, lambda: torch.ones(2) @ torch.ones(3))
        yield speedrun_kernels.Case("two", lambda: 1, None, flops=4e9)
        raise MemoryError

    rows = speedrun_kernels.table_rows(cases, 16, "cpu", None, rounds=2)
    assert [row["name"] for row in rows] == ["one", "two", "cases"]
    assert rows[0]["ms"] == {"ours": 2.0} and rows[0]["faults"][0].startswith("twin: RuntimeError: ")
    assert rows[1]["tflops"] == 2.0 and rows[2]["faults"] == ["inputs: MemoryError: "]
    assert len(capsys.readouterr().out.splitlines()) == 3


def test_table_gradients_are_measured_where_the_plain_twin_runs_too(no_gpu_needed, monkeypatch):
    monkeypatch.setattr(speedrun_kernels, "VOCABULARY", 64)
    rows = speedrun_kernels.table_rows(speedrun_kernels.table_cases, 32, torch.device("cpu"), None, rounds=1)
    assert rows[0]["ms"] == {"ours": 2.0, "twin": 2.0} and not rows[0]["faults"]
    monkeypatch.setattr(speedrun_kernels, "GRAM_ROWS", 640)
    rows = speedrun_kernels.table_rows(speedrun_kernels.gram_cases, 32, torch.device("cpu"), None, rounds=1)
    assert len(rows) == 9 and not any(row["faults"] for row in rows)
    rows = speedrun_kernels.table_rows(
        speedrun_kernels.pointer_cases, 32, torch.device("cpu"), None, rounds=1
    )
    assert len(rows) == 3 and not any(row["faults"] for row in rows)


def test_a_backend_that_fails_leaves_the_others(no_gpu_needed, monkeypatch, capsys):
    from modded_nanogpt import attention_backends as backends

    def attend(q, *others):
        raise RuntimeError("no kernel image\nis available")

    right = backends.Backend("reference", "", backends._BACKENDS["reference"])
    wrong = backends.Backend("triton", "", attend)
    chosen = {"triton": wrong, "reference": right}
    monkeypatch.setattr(backends, "choose", lambda name, *_: chosen[name])
    ends = torch.tensor([0, 20, 50], dtype=torch.int32)
    tensors = [0.3 * torch.randn(50, 2, 16).bfloat16() for _ in range(4)]
    problem = speedrun_attention.Problem([20, 30], ends, *backends.documents(ends, 50), tensors)
    settings = speedrun_attention.Settings(backends="triton,reference", slice=40)
    rows = speedrun_attention.measure_backends({"single": problem}, [8], settings)
    assert rows[0]["fault"] == "RuntimeError: no kernel image is available" and "both_ms" not in rows[0]
    assert rows[1]["both_ms"] == 2.0 and rows[1]["error"] < 2e-2
    assert "triton     failed" in capsys.readouterr().out
