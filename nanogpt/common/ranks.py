"""The processes that train together: who this one is, its device, and the few collectives the trainers use."""

import contextlib
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from nanogpt.common.errors import EXIT_USAGE, CommandError, UserError
from nanogpt.common.machine import has_nvidia_driver, local_ranks, usable_cores


@dataclass(frozen=True)
class Ranks:
    """This process among `world_size`. `device` is the GPU (or CPU) it computes on."""

    rank: int
    local_rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this process writes the run directory."""
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum `tensor`, of any shape, the same on all ranks, over the ranks: in place, and returned."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def wait(self) -> None:
        """Return when all ranks have come here."""
        self.sum(torch.zeros((), device=self.device))
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def fail(self, error: CommandError) -> NoReturn:
        """Leave for a reason that all ranks have: rank 0 raises it and so reports it, the others go silently."""
        if self.is_main:
            raise error
        sys.exit(error.exit_code)

    def agree(self, failure: CommandError | None) -> None:
        """End all ranks when one of them has a `failure`; the first of them reports it."""
        mine = self.rank if failure is not None else self.world_size
        first = torch.tensor(mine, device=self.device)
        if self.world_size > 1:
            dist.all_reduce(first, dist.ReduceOp.MIN)
        if failure is not None and int(first) == self.rank:
            raise failure
        if int(first) < self.world_size:
            sys.exit(EXIT_USAGE)

    def share(self, value: object) -> object:
        """Rank 0's `value` (JSON-like: str, int, float, None, list, dict) on every rank."""
        if self.world_size == 1:
            return value
        import json

        # As JSON bytes, not with broadcast_object_list: that one pickles.
        payload = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8).to(self.device)
        size = torch.tensor([payload.numel()], device=self.device)
        dist.broadcast(size, 0)
        if not self.is_main:
            payload = torch.empty(int(size), dtype=torch.uint8, device=self.device)
        dist.broadcast(payload, 0)
        return json.loads(bytes(payload.cpu().tolist()))

    @contextlib.contextmanager
    def main_only(self) -> Iterator[dict]:
        """A block that rank 0 executes while the others wait; an expected failure there ends all ranks.

        The others skip nothing by themselves: write `if ranks.is_main:` inside. What rank 0 puts into the dict
        that the block gets (JSON-like) is on every rank afterwards.
        """
        box: dict = {}
        failure: CommandError | None = None
        try:
            yield box
        except CommandError as error:
            failure = error
        shared = self.share({"box": box, "error": [str(failure), failure.exit_code] if failure else None})
        if shared["error"]:
            code = shared["error"][1]
            raise failure or SystemExit(code)
        box.update(shared["box"])


def choose_device(wanted: str, local_rank: int) -> torch.device:
    """The device `--device` means on this rank. UserError when there is no such GPU, or `auto` would waste a job's."""
    if wanted == "auto" and not torch.cuda.is_available() and _job_has_gpus():
        cpu_build = torch.version.cuda is None
        why = "it is a CPU build" if cpu_build else "it sees none of them"
        remedy = "bash setup_env.sh --cuda" if cpu_build else "nvidia-smi, engaging doctor"
        raise UserError(
            f"torch {torch.__version__}: {why}, and this job has GPUs; {remedy} (to use the CPU: --device=cpu)"
        )
    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        why = "this torch was built without CUDA" if torch.version.cuda is None else "torch sees no GPU"
        raise UserError(f"--device={wanted}: {why} on this machine; use --device=cpu, or ask SLURM for a GPU")
    index = int(wanted.split(":")[1]) if ":" in wanted else local_rank
    if index >= torch.cuda.device_count():
        raise UserError(
            f"--device={wanted}: rank {local_rank} of this machine wants GPU {index}, which has "
            f"{torch.cuda.device_count()}; start fewer ranks (--nproc_per_node), or ask for more GPUs"
        )
    return torch.device("cuda", index)


def _job_has_gpus() -> bool:
    """Whether SLURM gave this job GPUs on a machine that really has them, and nobody hid them."""
    given = any(os.environ.get(name) for name in ("SLURM_JOB_GPUS", "SLURM_STEP_GPUS", "SLURM_GPUS_ON_NODE"))
    return given and has_nvidia_driver() and os.environ.get("CUDA_VISIBLE_DEVICES") != ""


def start(device_flag: str, backend_flag: str, num_threads: int = 0) -> Ranks:
    """Join the process group that torchrun described (or stand alone) and choose the device.

    On CPUs every rank gets its share of the cores, since torch would otherwise give all of them to each.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    rank, local_rank = int(os.environ.get("RANK", "0")), int(os.environ.get("LOCAL_RANK", "0"))
    if ":" in device_flag and world_size > 1:
        raise UserError(
            f"--device={device_flag}: names one GPU, but there are {world_size} ranks; use --device=cuda"
        )
    device = choose_device(device_flag, local_rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        backend = "nccl" if backend_flag == "auto" else backend_flag
    else:
        if backend_flag == "nccl":
            raise UserError("--backend=nccl: needs GPUs; use --backend=gloo on CPUs")
        backend = "gloo"
        torch.set_num_threads(num_threads or max(1, usable_cores() // local_ranks()))
    if world_size > 1 and not dist.is_initialized():
        device_id = device if backend == "nccl" else None
        dist.init_process_group(backend, timeout=timedelta(minutes=10), device_id=device_id)
    return Ranks(rank, local_rank, world_size, device)


def leave(status: int) -> None:
    """End this process with `status` when it belongs to a group; do nothing when it stands alone.

    Everything has to be written and closed before. Taking the group apart, or letting the interpreter do it, can abort
    the process (status 134, "terminate called without an active exception"): a finished run would look broken.
    """
    if dist.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
