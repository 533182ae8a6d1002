"""CUDA graphs of one function: recorded once for each key while nobody counts the time, then launched by one call.

Replaces: calling the function. A lane of the speedrun is some hundred launches, each a few microseconds of Python and
driver; where a lane's kernels take less than that (the first stage), the GPU waits for the CPU.
Invariants: the function's tensors stay where they are (`check_addresses`), what is a number to it is part of the key,
and its results are read before the next replay of any key: all graphs share one pool of memory.
Exactness: the same kernels on the same numbers; each recording is compared with a plain call at once.
Source: CUDA graphs as torch.cuda.graph records them (https://pytorch.org/blog/accelerating-pytorch-with-cuda-graphs).
"""

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Values = Sequence[Tensor | None]
WARM_CALLS = 2  # before recording: what a kernel or a library sets up at its first call must not be recorded
# A replay against a plain call, by norm: the sums of library products may be cut elsewhere on another stream.
TOLERANCE = 1e-2


@dataclass
class Recording:
    """One graph: where it reads, how it is launched, where its results are."""

    given: list[Tensor | None]
    launch: Callable[[], None]
    results: list[Tensor | None]


class Recorder:
    """Recordings by key, on one GPU. `record` each key, `seal`, then `replay`: nothing is recorded after `seal`.

    lasting: gives (name, tensor) of all tensors that the function reads or changes besides its arguments.
    """

    def __init__(self, device: torch.device, lasting: Callable[[], Iterable[tuple[str, Tensor]]]) -> None:
        self.device, self.lasting = device, lasting
        self.recordings: dict[Hashable, Recording] = {}
        self.sealed = False
        self._addresses: dict[str, int] = {}
        self._pool, self._stream = None, None

    def record(self, key: Hashable, given: Values, body: Callable[[list[Tensor | None]], Values]) -> None:
        """Record `body` of copies of `given`, and compare a replay with a plain call on the same numbers.

        body takes the copies as a list and returns tensors (or None); numbers that it uses are those of now. It must
        neither allocate anything that outlives it nor read a tensor on the CPU. RuntimeError when the replay differs.
        """
        if self.sealed:
            raise RuntimeError(f"capture: {key}: nothing may be recorded any more: the clock is running")
        self.check_addresses()
        copies = [None if tensor is None else tensor.clone() for tensor in given]
        launch, results = self._capture(lambda: list(body(copies)))
        self.recordings[key] = Recording(copies, launch, results)
        launch()
        replayed = [None if result is None else result.clone() for result in results]
        self._compare(key, replayed, body(copies))

    def replay(self, key: Hashable, given: Values) -> list[Tensor | None]:
        """The function's results on `given`: tensors that the next replay overwrites. RuntimeError for a new key."""
        recording = self.recordings.get(key)
        if recording is None:
            raise RuntimeError(f"capture: {key}: was never recorded; recorded are {list(self.recordings)}")
        for copy, tensor in zip(recording.given, given, strict=True):
            if copy is not None:
                copy.copy_(tensor, non_blocking=True)
        recording.launch()
        return recording.results

    def seal(self) -> None:
        """From now on nothing is recorded. RuntimeError when a lasting tensor has moved since the first recording."""
        self.check_addresses()
        self.sealed = True

    def check_addresses(self) -> None:
        """RuntimeError when a lasting tensor lies elsewhere than at the first recording: graphs read old memory."""
        now = {name: tensor.data_ptr() for name, tensor in self.lasting()}
        if not self._addresses:
            self._addresses = now
        moved = sorted(
            name for name in now.keys() | self._addresses.keys() if now.get(name) != self._addresses.get(name)
        )
        if moved:
            raise RuntimeError(f"capture: {', '.join(moved)}: no longer where the graphs read it")

    def _capture(
        self, body: Callable[[], list[Tensor | None]]
    ) -> tuple[Callable[[], None], list[Tensor | None]]:
        """(what launches the graph of `body`, its results)."""
        if self._stream is None:
            self._pool, self._stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream(self.device)
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            for _ in range(WARM_CALLS):
                body()
        torch.cuda.current_stream(self.device).wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        # thread_local: the thread that reads the next batch may allocate page-locked memory meanwhile
        with torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"):
            results = body()
        return graph.replay, results

    def _compare(self, key: Hashable, replayed: Values, plain: Values) -> None:
        for place, (ours, expected) in enumerate(zip(replayed, plain, strict=True)):
            if expected is None:
                continue
            error, size = (ours.float() - expected.float()).norm(), expected.float().norm()
            if not error <= TOLERANCE * size + 1e-12:
                raise RuntimeError(
                    f"capture: {key}: result {place} of a replay differs from a plain call's by {float(error):.3g}, "
                    f"its norm is {float(size):.3g}; --capture=false trains without graphs"
                )
