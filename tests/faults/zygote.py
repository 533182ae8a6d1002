"""A process that has imported torch and forks a child for each command: 20 ms instead of 3 s.

    with Zygote() as zygote:
        child = zygote.start(["--out_dir=...", ...], cwd=tmp_path)     # nanogpt.train, in a process of its own
        os.kill(child.pid, signal.SIGKILL)
        child.wait()

A child does what the command does, in the same order, but for one thing: the trainer goes on in the same process
where the real one would execute itself again from the run's copy of the source (tests with real processes cover that).
"""

import gc
import importlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
NEEDED = {
    "tests.modded.forked": ("torch._dynamo",)
}  # what takes a second in each child of a module: once for all


@dataclass
class Child:
    """A forked command; `status` is its exit status (minus the signal that ended it), None while it runs."""

    pid: int
    output: Path
    zygote: "Zygote"

    @property
    def status(self) -> int | None:
        """Exit status, -9 after SIGKILL, None while it runs."""
        return self.zygote.ended.get(self.pid)

    def wait(self, timeout: float = 600) -> int:
        """Its exit status, when it has ended."""
        end = time.monotonic() + timeout
        while self.status is None:
            if time.monotonic() > end:
                raise TimeoutError(
                    f"process {self.pid} did not end within {timeout} s: {self.stderr[-2000:]}"
                )
            self.zygote.check()
            time.sleep(0.002)
        return self.status

    @property
    def stdout(self) -> str:
        """What it has printed so far."""
        return self._read(".out")

    @property
    def stderr(self) -> str:
        """What it has complained of so far."""
        return self._read(".err")

    def _read(self, suffix: str) -> str:
        path = self.output.with_suffix(suffix)
        return path.read_text(errors="replace") if path.exists() else ""  # right after its fork there is none


class Zygote:
    """Client of the forking process. `preload` is a library that all children have (see shim.py), `root` the clone
    whose code they run (it has this file)."""

    def __init__(self, preload: Path | None = None, root: Path = ROOT) -> None:
        self.folder, self.shim = tempfile.TemporaryDirectory(), preload is not None
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        if preload is not None:
            environment["LD_PRELOAD"] = str(preload)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.zygote"],
            cwd=root, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        self.started: dict[int, int] = {}
        self.ended: dict[int, int] = {}
        self.count, self.preload = 0, ()  # modules that the next children find imported
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        for line in self.process.stdout:
            report = json.loads(line)
            if "started" in report:
                self.ended.pop(report["started"], None)  # of an earlier process that had this number
                self.started[report["number"]] = report["started"]
            else:
                self.ended[report["ended"]] = report["status"]

    def check(self) -> None:
        """RuntimeError when the forking process has ended."""
        if self.process.poll() is not None:
            raise RuntimeError(f"the zygote has ended with {self.process.returncode}")

    def start(
        self, argv: list[str], *, module: str = "nanogpt.train", cwd: Path | str = ROOT,
        env: dict[str, str | None] | None = None,
    ) -> Child:  # fmt: skip
        """Fork a child that does what `python -m <module> <argv>` does; a variable that is None in `env` is unset."""
        self.count += 1
        output = Path(self.folder.name) / str(self.count)
        request = {"number": self.count, "argv": list(map(str, argv)), "module": module, "cwd": str(cwd)}
        try:
            request |= {"env": env or {}, "output": str(output), "preload": self.preload}
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            self.process.wait()
            self.check()
        end = time.monotonic() + 600
        while self.count not in self.started:
            if time.monotonic() > end:
                raise TimeoutError("the zygote does not answer")
            self.check()
            time.sleep(0.001)
        return Child(self.started[self.count], output, self)

    def run(self, argv: list[str], *, timeout: float = 600, **options: object) -> Child:
        """`start`, and wait."""
        child = self.start(argv, **options)
        child.wait(timeout)
        return child

    def __enter__(self) -> "Zygote":
        return self

    def __exit__(self, *failure: object) -> None:
        self.process.stdin.close()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.folder.cleanup()


def command_of(module: str):
    """`main(argv)` of a module; the trainer's without its second process."""
    found = importlib.import_module(module)
    if module != "nanogpt.train":
        return found.main

    def main(argv: list[str]) -> int:
        with found.rank_zero_speaks():
            values = found.values_of(argv)
        folder = found.open_run(found.TRAINER, values, argv)
        return 0 if folder is None else found.go_on(folder)

    return main


def _child(request: dict) -> None:
    """The rest of a forked child's life."""
    from nanogpt.common.errors import run_command

    status = 1
    try:
        for number, suffix in ((1, ".out"), (2, ".err")):
            target = os.open(request["output"] + suffix, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            os.dup2(target, number)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for name, value in request["env"].items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        os.chdir(request["cwd"])
        sys.argv = [request["module"], *request["argv"]]
        run_command(command_of(request["module"]))
    except SystemExit as leaving:
        status = leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except OSError:
                status = status or 1
        os._exit(status)


def _report(**values: int) -> None:
    os.write(1, (json.dumps(values) + "\n").encode())


def _preload(modules: list[str]) -> None:
    if missing := [name for name in modules if name not in sys.modules]:
        for name in missing:
            importlib.import_module(name)
        gc.freeze()  # so that a child's collections do not go through all of torch


def serve() -> None:
    """Read requests from stdin until it is closed; report starts and ends on stdout."""
    import select

    import numpy.random  # noqa: F401 (all that a run of the baseline imports)

    import nanogpt.common.stop
    import nanogpt.common.tokenizer
    import nanogpt.schedule
    import nanogpt.setup
    import nanogpt.train  # noqa: F401

    children: set[int] = set()
    waiting, open_ = b"", True
    while open_ or children:
        if open_ and select.select([0], [], [], 0.002 if children else 1.0)[0]:
            data = os.read(0, 1 << 16)
            open_ = bool(data)
            waiting += data
            while b"\n" in waiting:
                line, _, waiting = waiting.partition(b"\n")
                _preload(json.loads(line)["preload"])
                request = json.loads(line)
                if any(word.endswith(("train_gpt", "train_gpt_medium")) for word in request["argv"][:2]):
                    import torch._dynamo  # noqa: F401 (takes a second, and these trainers need it: once for all)
                pid = os.fork()
                if pid == 0:
                    _child(request)
                children.add(pid)
                _report(number=request["number"], started=pid)
        for pid in list(children):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                children.discard(pid)
                _report(ended=pid, status=os.waitstatus_to_exitcode(status))
        if not open_:
            time.sleep(0.002)


if __name__ == "__main__":
    serve()
    os._exit(0)  # at once: nothing of torch's is to be taken down
