"""How fast text becomes shards: the whole prepare.py beside tiktoken's encode_ordinary_batch.

    python benchmarks/tokenizing.py
    python benchmarks/tokenizing.py --text_files='texts/*.jsonl' --megabytes=400

Both measurements alternate, so that a busy machine slows both. Without --text_files the text is the source of
Python's own library. The GPT-2 vocabulary must be there or downloadable (TIKTOKEN_CACHE_DIR, DATA_MIRROR).
"""

import itertools
import json
import os
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

if __package__ in (None, ""):
    sys.path[0] = str(
        Path(__file__).resolve().parents[1]
    )  # the repository root, so that `import nanogpt` works

from nanogpt.common.errors import UserError, run_command
from nanogpt.common.flags import knob, parse

ROOT = Path(__file__).resolve().parents[1]
PREPARE = ROOT / "nanogpt" / "data" / "openwebtext" / "prepare.py"


@dataclass(frozen=True)
class Config:
    """The command line."""

    text_files: str = knob("", "JSON-lines files to encode, a glob pattern (default: Python's own library)")
    megabytes: int = knob(150, "encode about so much text, repeating what there is", low=1)
    rounds: int = knob(3, "measure both so many times", low=1)
    workers: int = knob(0, "threads, 0: one a core", low=0)


def documents(pattern: str) -> list[str]:
    """The texts to encode."""
    if pattern:
        from nanogpt.data.sources import JsonLines

        source = JsonLines(pattern)
        source.open(None)
        return list(iter(source.read, None))
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    return [path.read_text(encoding="utf-8", errors="replace") for path in files]


def main(argv: list[str]) -> None:
    """Measure and print."""
    config = parse(Config, argv, prog="benchmarks/tokenizing.py", description=__doc__)
    from nanogpt.common.gpt2_encoding import gpt2_encoding
    from nanogpt.common.shards import data_root

    workers = config.workers or len(os.sched_getaffinity(0))
    encoding = gpt2_encoding(data_root())
    texts, size = [], 0
    for text in itertools.cycle(documents(config.text_files)):
        texts.append(text)
        size += len(text.encode())
        if size >= config.megabytes * 1e6:
            break
    ours, theirs, peaks = [], [], []
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "text.jsonl"
        with file.open("w", encoding="utf-8") as lines:
            lines.writelines(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)
        for number in range(config.rounds):
            began = time.perf_counter()
            encoding.encode_ordinary_batch(texts, num_threads=workers)
            theirs.append(size / 1e6 / (time.perf_counter() - began))
            began = time.perf_counter()
            peaks.append(prepare(file, Path(folder) / str(number), workers))
            ours.append(size / 1e6 / (time.perf_counter() - began))
    ratio = statistics.median(mine / other for mine, other in zip(ours, theirs, strict=True))
    print(f"{size / 1e6:.0f} MB of text, {len(texts):,} documents, {workers} threads, {config.rounds} rounds")
    print(f"ours   whole prepare.py, start to manifest   {statistics.median(ours):6.1f} MB/s")
    print(f"theirs tiktoken encode_ordinary_batch alone  {statistics.median(theirs):6.1f} MB/s")
    print(f"ratio  {ratio:.2f}; our peak memory {max(peaks):.0f} MiB")


def prepare(file: Path, root: Path, workers: int) -> float:
    """Run the whole command in a process of its own; returns its peak memory in MiB."""
    command = [sys.executable, str(PREPARE), f"--text_files={file}", "--name=bench", f"--data_root={root}"]
    peak = 0.0
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen([*command, f"--num_workers={workers}"], stdout=output, stderr=output)
        while process.poll() is None:
            peak = max(peak, high_water_mark(process.pid))
            time.sleep(0.05)
        if process.returncode:
            output.seek(0)
            said = output.read().decode(errors="replace").strip()[-300:]
            raise UserError(f"{PREPARE}: exit status {process.returncode}: {said}")
    return peak


def high_water_mark(pid: int) -> float:
    """The largest resident memory of a process so far, in MiB. (getrusage counts what it was forked from.)"""
    status = Path(f"/proc/{pid}/status")
    if b"prepare.py" not in Path(f"/proc/{pid}/cmdline").read_bytes():
        return 0.0  # still a copy of this process, or ended
    for line in status.read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    return 0.0


if __name__ == "__main__":
    run_command(main)
