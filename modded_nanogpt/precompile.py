"""Compiling ahead: the graphs of later stages in processes of their own, while the trainer compiles the first one's.

A graph takes the better part of a minute in torch.compile, nearly all of it Python in one thread, and the run has five:
four lane sizes and the validation. So they are dealt out to the trainer and as many further processes as there are
cores for, which leave what they compiled in the node's compile caches, where the trainer finds it a little later. Such
a process holds weights without values and launches nothing; one that fails costs a note, and the trainer compiles.

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
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, NoReturn

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch

from modded_nanogpt import schedule
from modded_nanogpt.batches import TrainBatches, ValBatches, blank_batch
from modded_nanogpt.config import Config
from nanogpt.common.compiler import THREADS_VARIABLE, compiler_threads
from nanogpt.common.errors import run_command
from nanogpt.common.machine import local_ranks, usable_cores
from nanogpt.common.ranks import Ranks
from nanogpt.common.rundir import RunDir

PR_SET_PDEATHSIG = 1
LEAST_MEMORY = 32 << 30  # bytes of a GPU where the weights of these processes fit beside the trainer
CORES_EACH = 2  # for each process, the trainer's too: its own, and some for Triton's compilers
POLL_SECONDS = 0.05


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
    """The processes that compile, by graph: `wait` before the graph is used. They end with the trainer."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self.say = say
        self.running: dict[Graph, tuple[subprocess.Popen, IO[bytes]]] = {}

    def start(self, graphs: list[Graph], processes: int, folder: Path, ranks: Ranks) -> None:
        """Deal `graphs` out to this process, which has the first one, and `processes` others; folder: the run's."""
        threads = compiler_threads(local_ranks() * (processes + 1))
        variables = {**os.environ, THREADS_VARIABLE: str(threads)}
        for part in (graphs[first :: processes + 1] for first in range(1, processes + 1)):
            output = tempfile.TemporaryFile()  # noqa: SIM115 (it goes with the last of its graphs)
            words = [
                json.dumps([asdict(graph) for graph in part]),
                str(folder),
                str(ranks.device),
                str(ranks.world_size),
                str(os.getpid()),
            ]
            command = [sys.executable, str(Path(__file__).resolve()), *words]
            process = subprocess.Popen(
                command, env=variables, stdin=subprocess.DEVNULL, stdout=output, stderr=output
            )
            self.running |= dict.fromkeys(part, (process, output))

    def wait(self, graph: Graph) -> None:
        """Return when nobody compiles `graph` any more."""
        if graph not in self.running:
            return
        process, output = self.running.pop(graph)
        while _done(graph) not in (said := _read(output)):
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
    """What `Ahead.start` starts: GRAPHS FOLDER DEVICE WORLD_SIZE PARENT."""
    graphs, folder = [Graph(**values) for values in json.loads(argv[0])], Path(argv[1])
    device, world_size, parent = torch.device(argv[2]), int(argv[3]), int(argv[4])
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # a trainer that is killed leaves nobody behind
    if os.getppid() != parent:
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    config = Config(**RunDir(folder, writes=False).config["config"])
    for graph in compile_graphs(config, graphs, device, world_size):
        print(_done(graph), end="", flush=True)


if __name__ == "__main__":
    run_command(main)
