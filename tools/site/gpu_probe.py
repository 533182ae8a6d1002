"""Measures this machine's GPUs; run by `engaging doctor` in the trainer's Python. Prints one JSON object.

    python gpu_probe.py speed     bfloat16 matmul and copy of each GPU
    python gpu_probe.py nccl      all-reduce over all GPUs (gloo on the CPU with two ranks where there is none)

The ranks meet in a file of a private folder: no port is opened on a node that others use too.
"""

import json
import os
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

SIDE = 8192  # of the square matrices
COPY_BYTES = 1 << 30
REDUCE_BYTES = 256 << 20


def speed() -> dict:
    """TFLOPS of a bfloat16 matmul and GB/s of a copy (read + write), for each GPU."""
    rows = []
    for index in range(torch.cuda.device_count()):
        with torch.cuda.device(index):
            a = torch.randn(SIDE, SIDE, device="cuda", dtype=torch.bfloat16)
            b = torch.randn(SIDE, SIDE, device="cuda", dtype=torch.bfloat16)
            seconds = best_time(lambda a=a, b=b: a @ b)
            source = torch.empty(COPY_BYTES, device="cuda", dtype=torch.uint8)
            target = torch.empty_like(source)
            copying = best_time(lambda s=source, t=target: t.copy_(s))
            rows.append(
                {
                    "name": torch.cuda.get_device_name(index),
                    "tflops": 2 * SIDE**3 / seconds / 1e12,
                    "gb_per_s": 2 * COPY_BYTES / copying / 1e9,
                }
            )
            del a, b, source, target
    if not rows:
        raise SystemExit("torch sees no GPU")
    return {"gpus": rows}


def best_time(work, repeats: int = 5, inner: int = 10) -> float:
    """The best mean time of one call in seconds, after a warm-up of the clocks."""
    for _ in range(20):
        work()
    best = float("inf")
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(inner):
            work()
        end.record()
        end.synchronize()
        best = min(best, start.elapsed_time(end) / 1000 / inner)
    return best


def reduce_rank(rank: int, world: int, folder: str, on_gpu: bool) -> None:
    """One rank of the all-reduce; rank 0 writes what it found to `folder`/facts.json."""
    if on_gpu:
        torch.cuda.set_device(rank)
    device = torch.device("cuda", rank) if on_gpu else torch.device("cpu")
    dist.init_process_group(
        "nccl" if on_gpu else "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=world,
    )
    values = torch.full((1024,), float(rank + 1), device=device)
    dist.all_reduce(values)
    if not torch.equal(values, torch.full_like(values, world * (world + 1) / 2)):
        raise SystemExit(f"rank {rank}: the all-reduce gave a wrong sum")
    size = REDUCE_BYTES if on_gpu else 1 << 20
    data = torch.ones(size // 4, device=device)
    times = []
    for _ in range(8):
        if on_gpu:
            torch.cuda.synchronize()
        dist.barrier()
        began = time.perf_counter()
        dist.all_reduce(data)
        if on_gpu:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    if rank == 0:
        bus = size * 2 * (world - 1) / world / min(times) / 1e9
        facts = {"world": world, "bus_gb_per_s": bus, "backend": dist.get_backend()}
        Path(folder, "facts.json").write_text(json.dumps(facts))
    dist.destroy_process_group()


def all_reduce() -> dict:
    """The all-reduce over every GPU of this node, as processes of one rank each."""
    count = torch.cuda.device_count()
    world = count or 2
    if not count:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    if world == 1:
        return {"world": 1, "bus_gb_per_s": 0.0, "backend": "nccl"}
    with tempfile.TemporaryDirectory(prefix="engaging-nccl-") as folder:
        mp.spawn(reduce_rank, args=(world, folder, bool(count)), nprocs=world)
        return json.loads(Path(folder, "facts.json").read_text())


if __name__ == "__main__":
    print(json.dumps(speed() if sys.argv[1:] == ["speed"] else all_reduce()))
