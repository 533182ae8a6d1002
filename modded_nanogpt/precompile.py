"""Compiling ahead: in processes of their own, while the trainer compiles its first graph, all that it needs later.

A graph takes the better part of a minute in torch.compile, nearly all of it Python in one thread, and the run has five:
four lane sizes and the validation. So they are dealt out to the trainer and as many further processes as there are
cores for, which leave what they compiled in the node's compile caches, where the trainer finds it a little later. Such
a process holds weights without values and launches nothing. One more rehearses: it launches a small lane without
torch.compile and updates the weights, so that Triton compiles our own kernels, and torch the optimizer's small graphs,
which otherwise would begin when the first lane is compiled. One that fails costs a note, and the trainer compiles.

A compiled graph belongs to the GPU of one number, so each rank has processes of its own.
"""

import ctypes
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, NoReturn

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch

from modded_nanogpt import layer_plan, schedule
from modded_nanogpt.batches import TrainBatches, ValBatches, blank_batch
from modded_nanogpt.compile_cache import CompileCache
from modded_nanogpt.config import FREE, Config
from nanogpt.common.compiler import THREADS_VARIABLE, compiler_threads
from nanogpt.common.errors import run_command
from nanogpt.common.machine import local_ranks, usable_cores
from nanogpt.common.ranks import Ranks
from nanogpt.common.rundir import RunDir

PR_SET_PDEATHSIG = 1
LEAST_MEMORY = 32 << 30  # bytes of a GPU where the weights of these processes fit beside the trainer
CORES_EACH = 2  # for each process, the trainer's too: its own, and some for Triton's compilers
POLL_SECONDS = 0.05
COMPILE, REHEARSE = "compile", "rehearse"  # what a process does
REHEARSED = "rehearsed\n"  # what it writes after the second
NOT_IN_GRAPHS = {
    "seed", "dataset", "data_passes", "steps", "extension_steps", "cooldown", "lr_floor", "mtp", "table_rows", *FREE,
} - {"attention", "compile", "deterministic"}  # fmt: skip
REHEARSED_TOKENS = 4096  # of its lane; kernels are compiled for any number
REHEARSED_ROWS = 1 << 16  # of its table of n-grams


@dataclass(frozen=True)
class Graph:
    """What a compiled graph depends on besides the configuration."""

    step: int  # a step of the stage; -1: the validation
    tokens: int  # of the lane
    boundaries: int  # length of cu_seqlens
    max_document: int


def graphs(config: Config, batches: TrainBatches, val_batches: ValBatches) -> list[Graph]:
    """The graphs of a run in the order in which `setup.warm_up` comes to them."""
    found: dict[int, Graph] = {}
    lanes_each = batches.layout.lanes
    for stage in schedule.stages(config):
        tokens = stage.batch_tokens // lanes_each
        graph = Graph(stage.start, tokens, batches.boundaries(tokens), batches.longest(tokens))
        found.setdefault(tokens, graph)
    size = val_batches.slice
    return [*found.values(), Graph(-1, size, val_batches.boundaries, size)]


class Ahead:
    """The processes that compile, by what each will write: `wait` before a graph is used. They end with the trainer."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self.say = say
        self.running: dict[str, tuple[subprocess.Popen, IO[bytes]]] = {}

    def start(self, graphs: list[Graph], processes: int, folder: Path, ranks: Ranks) -> None:
        """Deal `graphs` out to this process, which has the first one, and `processes` others; folder: the run's.

        The node's first rank also has a lane rehearsed: Triton's kernels are the same for all GPUs.
        """
        threads = compiler_threads(local_ranks() * (processes + 1))
        for part in (graphs[first :: processes + 1] for first in range(1, processes + 1)):
            self._launch(COMPILE, part, [_done(graph) for graph in part], threads, folder, ranks)
        if ranks.local_rank == 0:
            self._launch(REHEARSE, graphs[:1], [REHEARSED], threads, folder, ranks)

    def _launch(
        self, what: str, graphs: list[Graph], lines: list[str], threads: int, folder: Path, ranks: Ranks
    ) -> None:
        output = tempfile.TemporaryFile()  # noqa: SIM115 (it goes with the last of its lines)
        words = [
            what, json.dumps([asdict(graph) for graph in graphs]), str(folder), str(ranks.device),
            str(ranks.world_size), str(os.getpid()),
        ]  # fmt: skip
        process = subprocess.Popen(
            [sys.executable, str(Path(__file__).resolve()), *words],
            env={**os.environ, THREADS_VARIABLE: str(threads)},
            stdin=subprocess.DEVNULL, stdout=output, stderr=output,
        )  # fmt: skip
        self.running |= dict.fromkeys(lines, (process, output))

    def wait(self, graph: Graph) -> None:
        """Return when nobody compiles `graph` any more."""
        self._wait(_done(graph))

    def wait_for_rehearsal(self) -> None:
        """Return when nobody rehearses any more: the GPU's memory is this process's again."""
        self._wait(REHEARSED)

    def _wait(self, line: str) -> None:
        if line not in self.running:
            return
        process, output = self.running.pop(line)
        while line not in (said := _read(output)):
            if process.poll() is not None and said == _read(output):
                last = (said.strip().splitlines() or [f"status {process.returncode}"])[-1]
                self.say(f"note: compiling ahead failed ({last[:200]}); compiled here instead")
                return
            time.sleep(POLL_SECONDS)


def _done(graph: Graph) -> str:
    """What a process writes when it has compiled `graph`."""
    return f"compiled {graph}\n"


def _read(output: IO[bytes]) -> str:
    """All that was written so far. The writer's place in the file is the reader's too, so nothing may move it."""
    return os.pread(output.fileno(), os.fstat(output.fileno()).st_size, 0).decode(errors="replace")


def large_gpu(device: torch.device) -> bool:
    """Whether weights of further processes fit beside the trainer."""
    return device.type == "cuda" and torch.cuda.get_device_properties(device).total_memory >= LEAST_MEMORY


def processes_for(config: Config, ranks: Ranks, count: int) -> int:
    """How many processes beside this one pay for `count` graphs in all: none without a large GPU, else by the cores."""
    if config.compile == "false" or not large_gpu(ranks.device):
        return 0
    return max(0, min(count, usable_cores() // (CORES_EACH * local_ranks())) - 1)


def compile_graphs(
    config: Config, graphs: list[Graph], device: torch.device, world_size: int
) -> Iterator[Graph]:
    """Compile each as a rank of `world_size` will, up to where it would be launched, and yield it then."""
    from modded_nanogpt import lanes, setup
    from modded_nanogpt.tables import look_up

    ranks = Ranks(0, device.index or 0, world_size, device)  # never to speak with each other
    state = setup.build(config, ranks, compile_with=_compile_only)
    for graph in graphs:
        batch = blank_batch(config, graph.tokens, graph.boundaries, graph.max_document, device)
        try:
            if graph.step < 0:
                lanes.eval_lane(state, batch, True, schedule.final_window(config))
            else:
                step = schedule.at(config, graph.step)
                rows = look_up(state.model, None, batch, step.tied, train=True)
                state.train_graph(*lanes.train_arguments(state, batch, rows, step))
        except _Compiled:
            yield graph
            continue
        raise RuntimeError(f"{graph}: ran, where it was to be compiled only")


def rehearse(config: Config, graph: Graph, device: torch.device) -> None:
    """Launch, as a run on one GPU, what a lane like `graph`, its updates and a validation launch; nothing is kept."""
    from modded_nanogpt import lanes, setup

    ranks = Ranks(0, device.index or 0, 1, device)
    if layer_plan.table_rows(config):
        config = replace(config, table_rows=str(REHEARSED_ROWS))
    state = setup.build(config, ranks)
    state.train_graph, state.eval_graph = lanes.lane_residual, lanes.lane_losses
    setup.randomize(state, config.seed)
    tokens = min(graph.tokens, REHEARSED_TOKENS)
    step = schedule.at(config, graph.step)
    batch = blank_batch(
        config, tokens, graph.boundaries, min(graph.max_document, tokens), device, step.classes
    )
    setup.lanes_and_updates(state, ranks, batch, step)
    lanes.eval_lane(state, batch, True, schedule.final_window(config))


def compile_ahead(
    config: Config, run: RunDir, ranks: Ranks, caches: CompileCache | None, needed: list[Graph]
) -> Ahead:
    """Who compiles the later graphs while this process compiles the first: nobody where that does not pay."""
    ahead = Ahead(run.say)
    known = caches is not None and caches.holds(graphs_key(config, needed))
    processes = processes_for(config, ranks, len(needed)) if config.warmup and not known else 0
    if processes:
        ahead.start(needed, processes, run.folder, ranks)
        who = "a process" if processes == 1 else f"{processes} processes"
        run.say(
            f"warm-up: {len(needed) - len(needed[:: processes + 1])} of {len(needed)} graphs are compiled by {who} "
            "beside this one, and another one compiles the kernels"
        )
    return ahead


def graphs_key(config: Config, needed: list[Graph]) -> str:
    """What the graphs of a run are known by, besides code and machine."""
    values = {name: value for name, value in asdict(config).items() if name not in NOT_IN_GRAPHS}
    sizes = [(graph.step < 0, graph.tokens, graph.boundaries, graph.max_document) for graph in needed]
    return json.dumps([values, bool(layer_plan.table_rows(config)), sizes], sort_keys=True)


class _Compiled(Exception):
    """Raised in place of the first launch."""


def _compile_only(module: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., NoReturn]:
    """A backend of torch.compile: inductor, whose result is kept in its caches and never called."""
    from torch._inductor.compile_fx import compile_fx

    compile_fx(module, inputs)

    def stop(*_: torch.Tensor) -> NoReturn:
        raise _Compiled

    return stop


def main(argv: list[str]) -> None:
    """What `Ahead.start` starts: compile|rehearse GRAPHS FOLDER DEVICE WORLD_SIZE PARENT."""
    graphs, folder = [Graph(**values) for values in json.loads(argv[1])], Path(argv[2])
    device, world_size, parent = torch.device(argv[3]), int(argv[4]), int(argv[5])
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # a trainer that is killed leaves nobody behind
    if os.getppid() != parent:
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    config = Config(**RunDir(folder, writes=False).config["config"])
    if argv[0] == REHEARSE:
        rehearse(config, graphs[0], device)
        print(REHEARSED, end="", flush=True)
        return
    for graph in compile_graphs(config, graphs, device, world_size):
        print(_done(graph), end="", flush=True)


if __name__ == "__main__":
    run_command(main)
