"""Compiling ahead: which graphs, what a process that only compiles leaves, what happens when it fails.

On a GPU `test_train_gpt.py` runs the whole of it.
"""

import os
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from modded_nanogpt import lanes, precompile, schedule, setup
from modded_nanogpt.batches import BOUNDARIES, blank_batch, boundaries
from modded_nanogpt.compile_cache import CompileCache
from modded_nanogpt.config import PRESETS, Config, resolve
from modded_nanogpt.precompile import Ahead, Graph, graphs
from modded_nanogpt.tables import look_up
from nanogpt.common import compiler
from nanogpt.common.flags import parse_values
from nanogpt.common.ranks import Ranks

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
GRAPH, FIRST = Graph(0, 256, 32, 128), Graph(1, 512, 32, 128)


def configured(preset: str, *flags: str) -> Config:
    return Config(**parse_values(Config, [preset, *flags], prog="t", description="", presets=PRESETS))


class Batches:
    """The part of TrainBatches and of ValBatches that says how large they are."""

    def __init__(self, config: Config) -> None:
        self.layout, self.slice, self.boundaries = resolve(config, 1), config.eval_slice, boundaries
        self.longest = lambda tokens: 2560


def test_the_graphs_of_track_1_in_the_order_of_the_warm_up():
    config = configured("record")
    batches, val_batches = Batches(config), Batches(config)
    batches.boundaries, val_batches.boundaries = BOUNDARIES.__getitem__, 896
    found = graphs(config, batches, val_batches)
    assert [(graph.tokens, graph.boundaries, graph.max_document) for graph in found] == [
        (16_384, 64, 2560), (32_768, 96, 2560), (49_152, 128, 2560), (40_960, 128, 2560), (262_144, 896, 262_144)
    ]  # fmt: skip
    steps = [graph.step for graph in found]
    assert steps[0] == 0 and steps == [*sorted(steps[:4]), -1]
    sizes = [schedule.at(config, step).batch_tokens // 8 for step in steps[:4]]
    assert sizes == [16_384, 32_768, 49_152, 40_960]


@pytest.mark.parametrize("copies", ["false", "true"])
def test_a_blank_lane_has_the_shapes_of_a_real_one(copies):
    config = configured("tiny", "--vocab_size=512", "--prefix=false", f"--copy_input={copies}")
    batch = blank_batch(config, 256, 32, 128, CPU)
    state = setup.build(config, Ranks(0, 0, 1, CPU))
    state.model.init_weights(1)
    step = schedule.at(config, 0)
    rows = look_up(state.model, None, batch, step.tied, train=True)
    x, pointers = lanes.lane_residual(*lanes.train_arguments(state, batch, rows, step))
    assert (
        pointers is None
        and x.isfinite().all()
        and (len(batch.inputs), len(batch.cu_seqlens), batch.max_document)
        == (
            256,
            32,
            128,
        )
    )


@pytest.mark.campaign  # two cold compiles
@pytest.mark.skipif(
    not shutil.which("g++"), reason="torch.compile needs a C++ compiler on a CPU; no g++ here"
)
def test_what_only_compiles_leaves_both_passes_to_the_next_process(tmp_path):
    program = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import torch
from modded_nanogpt import precompile
from torch._functorch import config
config.force_non_lazy_backward_lowering = True
def loss(x):
    return (torch.sin(x) * x).sum()
backend = precompile._compile_only if sys.argv[1] == "only" else "inductor"
x = torch.ones(64, requires_grad=True)
try:
    torch.compile(loss, backend=backend)(x).backward()
except precompile._Compiled:
    print("stopped")
counts = torch._dynamo.utils.counters["inductor"]
print(counts["fxgraph_cache_hit"], counts["fxgraph_cache_miss"], x.grad is not None)
"""
    folders = {variable: str(tmp_path / name) for name, variable in compiler.FOLDERS.items()}
    said = [
        subprocess.run(
            [sys.executable, "-c", program, how], env={**os.environ, **folders, "OMP_NUM_THREADS": "1"},
            capture_output=True, text=True, check=True, timeout=600,
        ).stdout.split()
        for how in ("only", "whole")
    ]  # fmt: skip
    assert said == [["stopped", "0", "2", "False"], ["2", "0", "True"]]


def test_a_process_that_fails_costs_a_note_and_no_more(tmp_path):
    said = []
    ahead = Ahead(said.append)
    ahead.start([FIRST, GRAPH], 1, tmp_path / "no-such-run", Ranks(0, 0, 1, CPU))
    for graph in (FIRST, GRAPH, GRAPH):
        ahead.wait(graph)
    ahead.wait_for_rehearsal()
    assert len(said) == 2
    for note in said:
        assert note.startswith("note: compiling ahead failed (") and note.endswith("; compiled here instead")
    assert ahead.running == {}


PLAYED = """
import json, sys, time
from pathlib import Path
if sys.argv[1] == "rehearse":
    while not (Path(sys.argv[3]) / "rehearse").exists():
        time.sleep(0.02)
    print("rehearsed", flush=True)
    sys.exit()
for values in json.loads(sys.argv[2]):
    while not (Path(sys.argv[3]) / str(values["tokens"])).exists():
        time.sleep(0.02)
    if values["tokens"] == 5:
        sys.exit("a compiler broke")
    print("compiled Graph(" + ", ".join(f"{name}={value}" for name, value in values.items()) + ")", flush=True)
"""


@pytest.mark.parametrize(
    ("processes", "parts"),
    [(1, [[1, 3]]), (2, [[1, 4], [2, 5]]), (3, [[1], [2], [3]]), (4, [[1], [2], [3], [4]])],
)
def test_graphs_are_dealt_out_and_each_is_waited_for_alone(tmp_path, monkeypatch, processes, parts):
    """The child is played; the first graph, and every one of its turn, stays with the trainer."""
    script = tmp_path / "child.py"
    script.write_text(PLAYED)
    monkeypatch.setattr(precompile, "__file__", str(script))
    said = []
    ahead = Ahead(said.append)
    wanted = [Graph(tokens, tokens, 32, 128) for tokens in range(6 if processes == 2 else 5)]
    ahead.start(wanted, processes, tmp_path, Ranks(0, 0, 1, CPU))
    started = [(line, child) for line, (child, _) in ahead.running.items()]
    children = dict.fromkeys(child for _, child in started)
    dealt = [[line for line, by in started if by is child] for child in children]
    assert dealt == [
        *([f"compiled {wanted[number]}\n" for number in part] for part in parts),
        ["rehearsed\n"],
    ]
    for graph in wanted:
        (tmp_path / str(graph.tokens)).touch()
        ahead.wait(graph)  # the child's later graphs are not there yet
    assert list(ahead.running) == ["rehearsed\n"] and len(said) == (processes == 2)
    assert not said or said[0] == "note: compiling ahead failed (a compiler broke); compiled here instead"
    (tmp_path / "rehearse").touch()
    for _ in range(2):
        ahead.wait_for_rehearsal()
        assert ahead.running == {}
    assert [child.wait() for child in children] == [
        1 if said and child is list(children)[1] else 0 for child in children
    ]


def test_only_the_first_rank_of_a_node_rehearses(tmp_path, monkeypatch):
    script = tmp_path / "child.py"
    script.write_text("")
    monkeypatch.setattr(precompile, "__file__", str(script))
    ahead = Ahead([].append)
    ahead.start([FIRST, GRAPH], 1, tmp_path, Ranks(1, 1, 2, CPU))
    assert list(ahead.running) == [f"compiled {GRAPH}\n"]
    ahead.wait(GRAPH)


@pytest.mark.parametrize("flags", [[], ["--table_rows=0"], ["--copy_pointer=true", "--copy_input=true"]])
def test_a_rehearsal_launches_lanes_updates_and_a_validation(monkeypatch, flags):
    launched, update, validate = [], setup.Optimizer.step, lanes.lane_losses
    monkeypatch.setattr(
        setup.Optimizer, "step", lambda self, plan: launched.append(plan) or update(self, plan)
    )
    monkeypatch.setattr(lanes, "lane_losses", lambda *given: launched.append(None) or validate(*given))
    config = configured("tiny", "--vocab_size=512", "--prefix=false", *flags)
    precompile.rehearse(config, GRAPH, CPU)
    *updates, validation = launched
    assert [(plan.adam, plan.tied) for plan in updates] == [(False, True), (True, True), (True, False)]
    assert validation is None
    assert all((plan.table is not None) == (plan.adam and "--table_rows=0" not in flags) for plan in updates)


@pytest.mark.parametrize(
    ("cores", "local_ranks", "processes"),
    [(1, 1, 0), (3, 1, 0), (4, 1, 1), (8, 1, 3), (16, 1, 4), (64, 8, 3), (8, 8, 0)],
)
def test_as_many_processes_as_there_are_cores_for(monkeypatch, cores, local_ranks, processes):
    monkeypatch.setattr(precompile, "usable_cores", lambda: cores)
    monkeypatch.setattr(precompile, "local_ranks", lambda: local_ranks)
    monkeypatch.setattr(precompile, "large_gpu", lambda device: True)
    assert precompile.processes_for(configured("record"), Ranks(0, 0, local_ranks, CPU), 5) == processes
    assert precompile.processes_for(configured("record", "--compile=false"), Ranks(0, 0, 1, CPU), 5) == 0


def reads_its_configuration(process: int) -> bool:
    """Whether it waits for somebody to write into the pipe: asleep in `open`, with torch loaded."""
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
        return state == "S" and "libtorch" in Path(f"/proc/{process}/maps").read_text()
    except OSError:
        return False


def test_nobody_stays_behind_when_the_trainer_is_killed(tmp_path):
    """The children are held where they read their configuration: a pipe that nobody writes to."""
    os.mkfifo(tmp_path / "config.json")
    program = f"""
import sys, time
sys.path.insert(0, {str(ROOT)!r})
import torch
from pathlib import Path
from modded_nanogpt.precompile import Ahead, Graph
from nanogpt.common.ranks import Ranks
ahead = Ahead(print)
wanted = [Graph(**values) for values in {[asdict(FIRST), asdict(GRAPH)]!r}]
ahead.start(wanted, 1, Path({str(tmp_path)!r}), Ranks(0, 0, 1, torch.device("cpu")))
print(*(process.pid for process, _ in ahead.running.values()), flush=True)
time.sleep(100)
"""
    trainer = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    children = [int(word) for word in trainer.stdout.readline().split()]
    assert len(children) == 2
    end = time.monotonic() + 600
    while not all(map(reads_its_configuration, children)):
        assert time.monotonic() < end
        time.sleep(0.1)
    trainer.kill()
    trainer.wait()
    while any(Path(f"/proc/{child}").exists() for child in children):
        assert time.monotonic() < end
        time.sleep(0.1)


def test_what_was_compiled_is_known_to_the_same_code_alone(tmp_path, monkeypatch):
    for name, variable in compiler.FOLDERS.items():
        monkeypatch.setenv(variable, str(tmp_path / name))
    said = []
    cache = CompileCache(tmp_path / "archives", "e" * 12, "5" * 64, said.append)
    config = configured("record")
    key = precompile.graphs_key(config, [GRAPH])
    assert not cache.holds(key)
    cache.keep(key)
    assert cache.holds(key)
    assert cache.holds(
        precompile.graphs_key(
            configured("record", "--seed=5", "--save_minutes=3", "--steps=90", "--table_rows=64"), [GRAPH]
        )
    )
    assert cache.holds(precompile.graphs_key(config, [replace(GRAPH, step=7)]))
    assert not cache.holds(precompile.graphs_key(configured("record", "--xsa=false"), [GRAPH]))
    assert not cache.holds(precompile.graphs_key(configured("record", "--table_rows=0"), [GRAPH]))
    assert not cache.holds(precompile.graphs_key(config, [Graph(0, 512, 32, 128)]))
    assert not CompileCache(tmp_path / "archives", "e" * 12, "6" * 64, said.append).holds(key)
    monkeypatch.setenv(compiler.FOLDERS["inductor"], str(tmp_path / "another-node"))
    there = CompileCache(tmp_path / "archives", "e" * 12, "5" * 64, said.append)
    assert not there.holds(key)
    there.restore()
    assert there.holds(key)


@pytest.mark.parametrize("world_size", [1, 2])
def test_on_a_cpu_nobody_compiles_ahead(world_size):
    assert precompile.processes_for(configured("tiny"), Ranks(0, 0, world_size, CPU), 5) == 0
