"""The speedrun's trainers in a process that tests/faults/zygote.py has forked: no start of torch.

    zygote.start(["train_gpt", *flags], module="tests.modded.forked", ...)
    launch(zygote, "train_gpt_simple", flags, data, ranks=2)     # with the variables that torchrun sets

A child does what the command does, but for one thing: it goes on in the same process where the command would execute
itself again from the run's copy of the source, of which it takes the variants alone. Each trainer's own tests have
runs by the real commands besides. With KILLED_AT_SAVE=N in its environment it dies of SIGKILL before checkpoint N.
"""

import importlib
import itertools
import json
import os
import signal
import socket
from pathlib import Path

from nanogpt.common import rundir

LAUNCHES = itertools.count()
# What a run imports besides torch: once for all children.
PARTS = {
    "train_gpt": ("data_plan", "lanes", "precompile", "report", "rules", "setup", "train_gpt", "vocabulary"),
    "train_gpt_simple": ("simple_graphs", "simple_launch", "simple_setup", "train_gpt_simple", "variants"),
}


def main(argv: list[str]) -> int:
    """`argv`: the trainer's module, and its own words."""
    name, *words = argv
    trainer = importlib.import_module(f"modded_nanogpt.{name}")
    if name != "train_gpt_simple":

        def train(folder: Path, entry: str, runs: str = "[]") -> None:
            raise SystemExit(trainer.go_on(folder, json.loads(runs)))

        rundir.enter_copy = train
        if "KILLED_AT_SAVE" in os.environ:
            die_at_save(int(os.environ["KILLED_AT_SAVE"]))
        return trainer.main(words)
    from modded_nanogpt import simple_launch, variants

    def go_on(folder: Path, entry: str, *more: str) -> None:
        simple_launch.ROOT = folder / "source"
        variants.FOLDER = folder / "source" / "modded_nanogpt" / "variants"
        variants.__path__ = [str(variants.FOLDER)]
        trainer.OWN_RUN = folder
        raise SystemExit(trainer.main([f"--out_dir={folder}", *more]))

    rundir.enter_copy = go_on
    return simple_launch.launch(words, trainer.__doc__)


def die_at_save(number: int) -> None:
    """Let the speedrun's trainer kill itself instead of writing its checkpoint of this number, from 1 on."""
    from modded_nanogpt import setup

    save, calls = setup.save, itertools.count(1)

    def save_or_die(*given: object) -> None:
        if next(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        save(*given)

    setup.save = save_or_die


def launch(zygote, name: str, flags: list[str], data: Path, ranks: int = 1, **variables: str) -> list:
    """The children of one launch, rank 0 first."""
    shared = {"DATA_ROOT": str(data), **variables}
    if ranks > 1:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        shared |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1",
                   "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": f"{os.getpid()}-{next(LAUNCHES)}"}  # fmt: skip
    each = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {} for rank in range(ranks)]
    zygote.preload = [f"modded_nanogpt.{part}" for part in PARTS[name]]
    words = [name, *map(str, flags)]
    return [zygote.start(words, module="tests.modded.forked", env={**shared, **mine}) for mine in each]


def finished(children: list, status: int = 0) -> tuple[str, str]:
    """What a launch has said and complained of, when all ranks have ended with `status`."""
    found = [child.wait() for child in children]
    said, errors = ("".join(getattr(child, name) for child in children) for name in ("stdout", "stderr"))
    assert found == [status] * len(children), (found, said, errors)
    return said, errors
