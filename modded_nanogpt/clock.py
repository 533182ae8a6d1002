"""The clock of a record, and messages from the GPU that nobody waits for."""

import time
from collections import deque
from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from nanogpt.common.ranks import Ranks

STEPS_AHEAD = 4  # that the CPU may be ahead of the GPU before it looks at a message


class Clock:
    """Milliseconds of training: started and stopped with the device idle, around everything the rules leave out."""

    def __init__(self, ranks: Ranks, milliseconds: float) -> None:
        self.ranks, self.before, self.began = ranks, milliseconds, 0.0
        self.saved = time.monotonic()  # when the last checkpoint was asked for

    def start(self) -> None:
        """From here on time counts; the ranks wait for each other first."""
        self.ranks.wait()
        self.began = time.perf_counter()

    def stop(self) -> float:
        """The total so far; the clock stands until the next `start`."""
        self.ranks.wait()
        self.before = self.now()
        self.began = 0.0
        return self.before

    def now(self) -> float:
        """The total so far without waiting for the device."""
        return self.before + (1e3 * (time.perf_counter() - self.began) if self.began else 0.0)


class Messages:
    """Small tensors from the device, read some steps later, so that the CPU never waits for the step it has launched.

    Every rank reads the same message at the same step: what it decides from it, all decide together.
    """

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self.waiting: deque[tuple[dict, Tensor, torch.cuda.Event | None]] = deque()
        self.depth = STEPS_AHEAD if ranks.device.type == "cuda" else 0

    def send(self, about: dict, loss: Tensor, flags: list[bool]) -> None:
        """Sum the loss and the flags over the ranks and keep them with `about`, what this rank knows of the step."""
        device = self.ranks.device
        message = torch.cat([loss.float().view(1), to_device([float(flag) for flag in flags], device)])
        if self.ranks.world_size > 1:
            dist.all_reduce(message)
        if device.type == "cpu":
            self.waiting.append((about, message, None))
            return
        copy = torch.empty(message.shape, dtype=message.dtype, pin_memory=True).copy_(
            message, non_blocking=True
        )
        event = torch.cuda.Event()
        event.record()
        self.waiting.append((about, copy, event))

    def read(self, everything: bool = False) -> Iterator[tuple[dict, list[float]]]:
        """What was sent `STEPS_AHEAD` steps ago or earlier; with `everything`, all there is."""
        while len(self.waiting) > (0 if everything else self.depth):
            about, message, event = self.waiting.popleft()
            if event is not None:
                event.synchronize()
            yield about, message.tolist()


def to_device(values: Sequence[float], device: torch.device) -> Tensor:
    """float32 numbers on the device, without waiting for it: a plain copy would wait for all work before it."""
    numbers = torch.tensor(values, dtype=torch.float32, pin_memory=device.type == "cuda")
    return numbers.to(device, non_blocking=True)
