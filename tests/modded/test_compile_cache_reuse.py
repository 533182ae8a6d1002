"""Compile caches of processes of their own: where they lie, and what another copy finds on another node."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from modded_nanogpt import compile_cache
from nanogpt.common import compiler

ROOT = Path(__file__).resolve().parents[2]


def run_python(code: str, *words: object, **variables: str) -> subprocess.CompletedProcess:
    kept = {name: value for name, value in os.environ.items() if name not in
            {*compiler.FOLDERS.values(), compiler.TAG_VARIABLE, "SLURM_TMPDIR", "TMPDIR"}}  # fmt: skip
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, words)],
        env={**kept, "OMP_NUM_THREADS": "1", **variables}, capture_output=True, text=True, timeout=600,
    )  # fmt: skip


CHOOSE = """
import os, sys
sys.path[0] = sys.argv[1]
from modded_nanogpt import compile_cache
from nanogpt.common import compiler
compiler.use_local_folders(compile_cache.operators())
compiler.use_local_folders(compile_cache.operators())  # once more changes nothing
assert "torch" not in sys.modules
print(*(os.environ[name] for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "TORCH_COMPILE_CACHE_KEY_TAG")))
"""


def test_folders_are_chosen_on_the_nodes_disk(tmp_path):
    disk, home = tmp_path / "disk", tmp_path / "home"
    disk.mkdir()
    (home / "tmp").mkdir(parents=True)
    expected = [f"{disk}/nanogpt-cache-{os.getuid()}/{name}" for name in ("inductor", "triton")]
    digest = compiler.code_digest(compile_cache.operators())
    assert run_python(CHOOSE, ROOT, TMPDIR=str(disk)).stdout.split() == [*expected, digest]
    assert (disk / f"nanogpt-cache-{os.getuid()}").stat().st_mode & 0o777 == 0o700
    given = {"TRITON_CACHE_DIR": "/own/triton", "TORCHINDUCTOR_CACHE_DIR": "/own/inductor"}
    assert run_python(CHOOSE, ROOT, TMPDIR=str(disk), **given).stdout.split()[:2] == [
        "/own/inductor",
        "/own/triton",
    ]
    in_home = run_python(CHOOSE, ROOT, TMPDIR=str(home / "tmp"), SLURM_TMPDIR=str(disk), HOME=str(home))
    assert in_home.stdout.split() == [*expected, digest]
    (disk / f"nanogpt-cache-{os.getuid()}").chmod(0o777)  # others could put files there
    elsewhere = run_python(CHOOSE, ROOT, TMPDIR=str(disk)).stdout.split()
    assert elsewhere[0] not in expected and elsewhere[0].startswith(f"{disk}/nanogpt-cache-")


def test_every_custom_operator_is_in_the_operators_digest():
    """The key must change with any code that defines an operator: graphs are found by its name."""
    room = ROOT / "modded_nanogpt"
    defining = {path for path in room.rglob("*.py")
                if "torch.library.custom_op" in (text := path.read_text()) or "autograd.Function" in text}  # fmt: skip
    assert room / "attention_backends.py" in defining and room / "kernels" / "mlp.py" in defining
    for path in defining - {room / "attention_backends.py", room / "compile_cache.py"}:
        assert path.is_relative_to(room / "kernels"), f"{path} is not in compile_cache.operators"


KERNEL = """
import triton, triton.language as tl

@triton.jit
def add_one(x, y, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + i, tl.load(x + i, mask=i < n) + 1, mask=i < n)
"""
COMPILE = """
import sys
from pathlib import Path
sys.path[:1] = sys.argv[1:3]
from modded_nanogpt import compile_cache
from nanogpt.common import compiler
compiler.use_local_folders(compile_cache.operators())
lines = []
cache = compile_cache.CompileCache(Path(sys.argv[3]), "e" * 12, "5" * 64, lines.append)
cache.restore()
import kernel, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
found = []
triton.knobs.compilation.listener = lambda **values: found.append(values["cache_hit"])
source = ASTSource(kernel.add_one, {"x": "*fp32", "y": "*fp32", "n": "i32", "BLOCK": "constexpr"}, {(3,): 256})
made = triton.compile(source, target=GPUTarget("cuda", 90, 32))
assert len(made.asm["cubin"]) > 1000
cache.keep()
print(*found, len(lines), lines[0])
"""


def test_a_triton_kernel_is_found_from_another_copy_on_another_node(tmp_path):
    """Compiled for an H100, which needs none. The first node is gone by then: nothing may lead back to it."""
    pytest.importorskip("triton.knobs", reason="needs Triton 3.4 or later, which is not installed")
    said = []
    for name in ("one", "two/deeper"):
        folder = tmp_path / name
        (folder / "source").mkdir(parents=True)
        (folder / "source" / "kernel.py").write_text(KERNEL)
        done = run_python(COMPILE, ROOT, folder / "source", tmp_path / "archives", TMPDIR=str(folder))
        assert done.returncode == 0, done.stderr
        said.append(done.stdout)
        shutil.rmtree(folder)
    assert said[0].startswith("False 2 compile caches: cold")
    assert said[1].startswith("True 1 compile caches: restored")


TRAIN = """
import os, sys
from pathlib import Path
sys.path[0] = sys.argv[1]
from modded_nanogpt import compile_cache
from nanogpt.common import compiler
compiler.use_local_folders(compile_cache.operators())
import torch
from toy import loss
lines = []
environment = compile_cache.environment(torch.__version__, "cpu")
cache = compile_cache.CompileCache(Path(sys.argv[2]), environment, sys.argv[3], lines.append)
cache.restore()
torch.manual_seed(1)
weight, x = torch.randn(16, 16, requires_grad=True), torch.randn(8, 16)
try:
    value = torch.compile(loss, fullgraph=True, dynamic=False)(x, weight)
    value.backward()
    torch.testing.assert_close(value, loss(x, weight))
    torch.testing.assert_close(weight.grad, torch.autograd.grad(loss(x, weight), weight)[0], rtol=1e-4, atol=1e-5)
    end = "right"
except Exception as error:
    end = " ".join(str(error).split())
cache.keep()
from torch._dynamo.utils import counters
print("|".join(lines))
print({name: counters[group][name] for group, name in (
    ("aot_autograd", "autograd_cache_hit"), ("aot_autograd", "autograd_cache_miss"),
    ("inductor", "fxgraph_cache_hit"), ("inductor", "fxgraph_cache_miss"))})
print(end)
"""
OPERATOR = """
import torch

@torch.library.custom_op("toy::scale", mutates_args=())
def scale(x: torch.Tensor) -> torch.Tensor:
    return x * FACTOR

scale.register_fake(torch.empty_like)
scale.register_autograd(lambda ctx, grad: grad * FACTOR, setup_context=lambda ctx, inputs, output: None)
"""
TOY = """
from modded_nanogpt.kernels.toy_operator import scale

def loss(x, weight):
    return scale((x @ weight).relu().square()).mean()
"""


def toy_copy(folder: Path, factor: int) -> Path:
    """A run's source copy with an operator and a model of a few lines."""
    shutil.copytree(ROOT / "nanogpt" / "common", folder / "nanogpt" / "common")
    (folder / "nanogpt" / "__init__.py").touch()
    room = folder / "modded_nanogpt"
    (room / "kernels").mkdir(parents=True)
    for name in ("compile_cache.py", "attention_backends.py", "__init__.py"):
        shutil.copy(ROOT / "modded_nanogpt" / name, room / name)
    (room / "kernels" / "toy_operator.py").write_text(OPERATOR.replace("FACTOR", str(factor)))
    (room / "kernels" / "__init__.py").touch()
    (folder / "toy.py").write_text(TOY)
    return folder


@pytest.mark.campaign  # two cold compiles
def test_a_compiled_graph_is_found_from_another_copy_on_another_node(tmp_path):
    """Packed by one process, unpacked by another: nothing is compiled, though source and cache lie elsewhere.

    A third one, whose operator has changed, must not take the graph: torch itself knows operators by name only.
    """
    compiler = shutil.which("g++")
    if not compiler:
        pytest.skip("torch.compile needs a C++ compiler on a CPU, and g++ is not installed")
    wrapped, gone = tmp_path / "bin" / "g++", tmp_path / "no-compiler"
    wrapped.parent.mkdir()
    wrapped.write_text(
        f'#!/bin/sh\ncase $1 in -v|--version) ;; *) [ ! -e {gone} ] || exit 1;; esac\nexec {compiler} "$@"\n'
    )
    wrapped.chmod(0o755)
    said = []
    for name, factor in (("one", 2), ("two/deeper", 2), ("three", 3)):
        copy, disk = toy_copy(tmp_path / name / "run" / "source", factor), tmp_path / name / "disk"
        disk.mkdir()
        variables = {
            "TMPDIR": str(disk), "TORCHINDUCTOR_CPP_CACHE_PRECOMPILE_HEADERS": "0", "CXX": "g++",
            "PATH": f"{wrapped.parent}:{os.environ['PATH']}",
        }  # fmt: skip
        done = run_python(TRAIN, copy, tmp_path / "archives", str(factor) * 64, **variables)
        assert done.returncode == 0, done.stderr
        said.append(done.stdout.splitlines())
        gone.touch()  # from here on nothing can be compiled
    counts = [counts_of(lines[1]) for lines in said]
    assert "cold" in said[0][0] and counts[0]["autograd_cache_miss"] == 1
    assert "restored" in said[1][0] and "packed" not in said[1][0] and said[1][2] == "right"
    assert counts[1]["autograd_cache_hit"] == 1 and counts[1]["fxgraph_cache_hit"] >= 1
    assert counts[1]["autograd_cache_miss"] == counts[1]["fxgraph_cache_miss"] == 0
    assert "with other operators" in said[2][0] and "C++ compile error" in said[2][2]
    assert counts[2]["autograd_cache_hit"] == 0 and counts[2]["autograd_cache_miss"] == 1


def counts_of(line: str) -> dict[str, int]:
    return json.loads(line.replace("'", '"'))
