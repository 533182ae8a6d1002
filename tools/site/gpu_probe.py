"""Measures this machine's GPUs; run by `engaging doctor` in the trainer's Python. Prints one JSON object.

    python gpu_probe.py speed                      bfloat16 matmul and copy of each GPU
    python gpu_probe.py reduce nccl RANKS SECONDS  all-reduces between RANKS processes, one GPU each
    python gpu_probe.py reduce gloo RANKS SECONDS  the same on the CPU, for the tests

The ranks meet in a file of a private folder: no port is opened on a node that others use too. Each notes there
what it is about to do, so that the one which died, or which the others wait for, can be named.
"""

import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SIDE = 8192  # of the square matrices
COPY_BYTES = 1 << 30
REDUCE_BYTES = 256 << 20
WARM_UP = 5  # rounds that are not counted: NCCL connects its channels, the clocks rise
START_LIMIT_S = 180.0  # torch comes from a network disk, CUDA and NCCL begin
STUCK_LIMIT_S = 20.0  # a round takes milliseconds


def speed() -> dict:
    """TFLOPS of a bfloat16 matmul and GB/s of a copy (read + write), for each GPU."""
    import torch

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
    import torch

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


def note(folder: str, rank: int, doing: str, count: int = 0) -> None:
    """Write what a rank is about to do. Renamed into place: the parent reads while ranks write."""
    path = Path(folder, f"rank-{rank}.json")
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps({"doing": doing, "round": count}))
    partial.rename(path)


def reduce_rank(backend: str, rank: int, world: int, folder: str, seconds: float) -> None:
    """One rank: reduces for `seconds` and checks each sum. Rank 0 says when it is over and writes facts.json."""
    note(folder, rank, "importing torch")
    import torch
    import torch.distributed as dist

    on_gpu = backend == "nccl"
    device = torch.device("cuda", rank) if on_gpu else torch.device("cpu")
    note(folder, rank, "joining the group")
    if on_gpu:
        torch.cuda.set_device(rank)
    meeting = f"file://{folder}/store"
    bound = device if on_gpu else None  # or a barrier guesses which GPU it is for
    dist.init_process_group(backend, init_method=meeting, rank=rank, world_size=world, device_id=bound)
    size = REDUCE_BYTES if on_gpu else 1 << 20
    data, over = torch.empty(size // 4, device=device), torch.zeros(1, device=device)
    times: list[float] = []
    end = time.monotonic() + seconds
    while not over.item():
        data.fill_(rank + 1)
        note(folder, rank, "reducing", len(times) + 1)
        dist.barrier()
        began = time.perf_counter()
        dist.all_reduce(data)
        if on_gpu:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
        if not bool((data == world * (world + 1) / 2).all()):
            raise SystemExit(f"error: the sum of round {len(times)} is wrong")
        over.fill_(rank == 0 and time.monotonic() > end and len(times) > 2 * WARM_UP)
        dist.all_reduce(over)
    if rank == 0:
        bus = size * 2 * (world - 1) / world / statistics.median(times[WARM_UP:]) / 1e9
        name = torch.cuda.get_device_name(0) if on_gpu else "CPU"
        facts = {"world": world, "bus_gb_per_s": bus, "rounds": len(times), "name": name}
        Path(folder, "facts.json").write_text(json.dumps(facts))
    note(folder, rank, "leaving")
    dist.destroy_process_group()


def all_reduce(backend: str, world: int, seconds: float) -> dict:
    """The all-reduce as processes of one rank each. SystemExit names the rank that ended or stands still."""
    with tempfile.TemporaryDirectory(prefix="engaging-nccl-") as folder:
        ranks: list[subprocess.Popen] = []
        try:
            for rank in range(world):
                with Path(folder, f"rank-{rank}.err").open("wb") as errors:
                    words = ["rank", backend, str(rank), str(world), folder, str(seconds)]
                    command = [sys.executable, __file__, *words]
                    ranks.append(subprocess.Popen(command, stdout=errors, stderr=errors))
            who = ", ".join(f"{rank} is process {child.pid}" for rank, child in enumerate(ranks))
            print(f"all-reduce for {seconds:g} s, rank {who}", file=sys.stderr, flush=True)
            wait_for(ranks, folder)
            return json.loads(Path(folder, "facts.json").read_text())
        finally:
            for child in ranks:
                child.kill()
                child.wait()


def wait_for(ranks: list[subprocess.Popen], folder: str) -> None:
    """Until all ranks have ended well."""
    seen, moved = {}, time.monotonic()
    while True:
        ended = [child.poll() for child in ranks]
        bad = [(status, rank) for rank, status in enumerate(ended) if status]
        if bad:  # a rank whose peer was killed fails too, within the same glance: signals are negative, and come first
            status, rank = min(bad)
            raise SystemExit(f"rank {rank} (process {ranks[rank].pid}) {how(rank, status, folder)}")
        if all(status == 0 for status in ended):
            return
        notes = [read_note(folder, rank) for rank in range(len(ranks))]
        if notes != seen:
            seen, moved = notes, time.monotonic()
        begun = all(row["round"] > 1 for row in notes)  # the first round connects the GPUs
        if time.monotonic() - moved > (STUCK_LIMIT_S if begun else START_LIMIT_S):
            raise SystemExit(stuck(notes, ranks))
        time.sleep(0.1)


def read_note(folder: str, rank: int) -> dict:
    """What a rank has noted last."""
    try:
        return json.loads(Path(folder, f"rank-{rank}.json").read_bytes())
    except FileNotFoundError:
        return {"doing": "starting", "round": 0}


def how(rank: int, status: int, folder: str) -> str:
    """How a rank ended: by which signal, or with which last line; and in what."""
    row = read_note(folder, rank)
    where = f"in round {row['round']}" if row["doing"] == "reducing" else f"while {row['doing']}"
    if status < 0:
        return f"was ended by {signal.Signals(-status).name} {where}"
    lines = Path(folder, f"rank-{rank}.err").read_text(errors="replace").strip().splitlines()
    errors = [line for line in lines if "error" in line.lower()] or lines or [f"exit status {status}"]
    return f"failed {where}: {errors[-1]}"


def stuck(notes: list[dict], ranks: list[subprocess.Popen]) -> str:
    """Who is waited for: the ranks behind the others; with none behind, it is the link between them."""
    last = max(row["round"] for row in notes)
    behind = [rank for rank, row in enumerate(notes) if row["round"] < last]
    if not behind:
        doing = f"round {last}" if last else notes[0]["doing"]
        return f"no rank goes on ({doing}): the link between the GPUs"
    names = ", ".join(f"rank {rank} (process {ranks[rank].pid}, {notes[rank]['doing']})" for rank in behind)
    return f"{names} stands still; the others wait for it in round {last}"


def main(argv: list[str]) -> None:
    """The command."""
    if argv[0] == "rank":
        reduce_rank(argv[1], int(argv[2]), int(argv[3]), argv[4], float(argv[5]))
        return
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit("ended by SIGTERM"))
    with contextlib.suppress(KeyboardInterrupt):
        print(
            json.dumps(speed() if argv[0] == "speed" else all_reduce(argv[1], int(argv[2]), float(argv[3])))
        )


if __name__ == "__main__":
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    main(sys.argv[1:])
