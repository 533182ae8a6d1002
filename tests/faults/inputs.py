"""Bad input that Hypothesis makes up, wrong by construction, for every entry point: flags, names, paths and files.

Each case must be refused in one line with exit status 2. Many carry text that would make a file if a shell, Python or a
template ran it; none may ever appear, and nothing may be left behind.
"""

import contextlib
import dataclasses
import importlib
import io
import json
import os
import random
import re
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import hypothesis
from hypothesis import strategies as st

from nanogpt.common.errors import run_command
from tests.faults.campaign import Rig
from tests.faults.damage import environment
from tests.faults.outcomes import Tally
from tools.cli import COMMANDS

DATACLASSES = (  # every command whose flags are the fields of a dataclass in its module
    "nanogpt.train", "nanogpt.sample", "nanogpt.bench", "nanogpt.data.shakespeare_char.prepare",
    "nanogpt.data.shakespeare.prepare", "nanogpt.data.python_source.prepare", "nanogpt.data.openwebtext.prepare",
    "nanogpt.data.text.prepare", "modded_nanogpt.train_gpt", "modded_nanogpt.train_gpt_medium",
    "modded_nanogpt.train_gpt_simple", "modded_nanogpt.sample", "modded_nanogpt.data.cached_fineweb10B",
    "modded_nanogpt.data.fineweb",
)  # fmt: skip
TRAINERS = tuple(name for name in DATACLASSES if ".train" in name)
SUBCOMMANDS = {
    "experiment": ("plan", "run", "status", "resume", "promote", "sweep", "ab"),
    "leaderboard": ("init", "submit", "verify", "build", "fetch"),
    "site": ("init",),
}
# Commands that take the name of a run, or a file, and must say that there is none of that name.
OF_A_FILE = (
    "plot", "analyze", "compare", "report", "export", "import", "wandb", "repro", "sample", "leaderboard verify",
    "experiment plan", "experiment run",
)  # fmt: skip
CANARY = "CANARY"
HOSTILE = (
    "$(touch {0})", "`touch {0}`", "; touch {0} #", "| touch {0}", "& touch {0}", "\ntouch {0}\n", "'; touch {0}; '",
    '"; touch {0}; "', "__import__('os').system('touch {0}')", "{{{{ cycler.__init__.__globals__.os }}}}", "${{IFS}}",
    "%s%n%x", "../../../../{0}", "\x1b]0;title\x07", "\u202egnp.exe", "\r\n", "=cmd|'touch {0}'!A1",
    "!!python/object/apply:os.system ['touch {0}']", "<script>touch {0}</script>", "A" * 5000,
)  # fmt: skip
TEXT = st.text(st.characters(exclude_characters="\0"), max_size=8)  # no argument of a process holds a NUL
LETTERS = st.text("abcdefghijklmnopqrstuvwxyz_-", min_size=1, max_size=20)


@cache
def hostile(folder: Path) -> st.SearchStrategy[str]:
    """Text that would make the file CANARY if something ran it, in the middle of other text."""
    payload = st.sampled_from(HOSTILE).map(lambda text: text.format(folder / CANARY))
    return st.tuples(TEXT, payload, TEXT).map("".join)


@cache
def knobs(module: str) -> tuple[dataclasses.Field, ...]:
    """The flags of a command."""
    room = importlib.import_module(module)
    names = {
        "nanogpt.bench": "Bench",
        "modded_nanogpt.train_gpt_medium": "",
        "modded_nanogpt.train_gpt_simple": "",
    }
    simple = "modded_nanogpt.simple_config" if module.endswith("simple") else "modded_nanogpt.config"
    room = room if names.get(module, "Config") else importlib.import_module(simple)
    return dataclasses.fields(getattr(room, names.get(module) or "Config"))


@cache
def wrong_value(module: str, name: str, folder: Path) -> st.SearchStrategy[str]:
    """Text that this flag cannot take."""
    knob = next(knob for knob in knobs(module) if knob.name == name)
    meta, kind = knob.metadata, knob.type
    no_digits = hostile(folder).map(lambda text: re.sub(r"\d", "", text) + "x")
    kinds = [no_digits] if kind in (int, float) or "None" in str(kind) else []
    if kind in (int, float) and meta.get("low") is not None:
        kinds.append(st.integers(max_value=int(meta["low"]) - 1).map(str))
    if kind in (int, float) and meta.get("high") is not None:
        kinds.append(st.integers(min_value=int(meta["high"]) + 1).map(str))
    if kind is bool or meta.get("choices"):
        kinds.append(hostile(folder).map(lambda text: text + "!"))
    if kind is str and not meta.get("any_text"):
        control = st.sampled_from("\0\n\r\x1b\x7f\x08")
        kinds.append(st.tuples(st.text(max_size=9), control, hostile(folder)).map("".join))
    return st.one_of(kinds) if kinds else st.just("\0")


@st.composite
def flags(draw: Callable, folder: Path) -> tuple[str, list[str]]:
    """A command of DATACLASSES with a value that its flag cannot take, or with a flag that it does not have."""
    module = draw(st.sampled_from(DATACLASSES))
    known = [knob for knob in knobs(module) if "words" not in knob.metadata]
    if draw(st.booleans()):
        knob = draw(st.sampled_from(known))
        return module, [f"--{knob.name}={draw(wrong_value(module, knob.name, folder))}"]
    return module, [draw(unknown_flag(module, folder))]


@cache
def unknown_flag(module: str, folder: Path) -> st.SearchStrategy[str]:
    """A flag that the command does not have, with or without a value."""
    taken = {knob.name for knob in knobs(module)} | {"help", "h"}
    name = LETTERS.filter(lambda text: text.replace("-", "_") not in taken and text.strip("-"))
    return st.tuples(name, st.just("") | hostile(folder).map("={}".format)).map(
        lambda two: f"--{two[0]}{two[1]}"
    )


@st.composite
def tools(draw: Callable, folder: Path) -> tuple[str, list[str]]:
    """`engaging COMMAND` with a flag, a file or a name that does not exist; or a COMMAND that does not."""
    what = draw(st.integers(0, 9))
    if what == 0:
        word = draw(hostile(folder) | LETTERS.filter(lambda text: text not in {*COMMANDS, "runs", "help"}))
        return "tools.cli", [word.lstrip("-") or "x"]
    if what <= 5:
        name = draw(st.sampled_from(sorted(COMMANDS)))
        words = [name]
        if name in SUBCOMMANDS:
            words.append(draw(st.sampled_from(SUBCOMMANDS[name])))
        return "tools.cli", [*words, f"--no-such-{draw(LETTERS)}"]
    name = draw(st.sampled_from(OF_A_FILE))
    return "tools.cli", [*name.split(), "./" + draw(hostile(folder))]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.sampled_from(HOSTILE),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=12), inner, max_size=4),
    max_leaves=12,
)
EXPRESSIONS = st.sampled_from((
    "__import__('os').system('touch {0}')", "open('{0}', 'w')", "exec('1')", "[1, 2]", "lambda: 0", "(1).__class__",
    "f'{{1}}'", "9**9**9", "x", "'a' 'b'.upper()", "1 if True else 2", "print(1)", "{{}}", "not True",
))  # fmt: skip
STATEMENTS = st.sampled_from((
    "import os", "from os import system", "exec(\"open('{0}', 'w')\")", "def f(): pass", "class A: pass",
    "for i in x: pass", "batch_size += 1", "batch_size: int = 3", "batch_size = n_layer = 1", "del batch_size",
    "no_such_setting = 1",
    "if 1: pass", "batch_size =", "\x00", "batch_size = '12", "with open('{0}', 'w'): pass", "a, b = 1, 2",
    "assert False", "@x", "nonlocal x",
))  # fmt: skip


@st.composite
def files(draw: Callable, folder: Path) -> tuple[str, list[str]]:
    """A file with nonsense in it where a command expects a preset, a record, a configuration or a log."""
    path = folder / "given" / "file"
    kind = draw(st.sampled_from(("preset", "record", "experiment", "log", "settings", "shard")))
    if kind == "preset":
        bad = draw(st.one_of(STATEMENTS, EXPRESSIONS.map("max_iters = {}".format)))
        lines = [draw(st.sampled_from(("batch_size = 4", "# text", ""))), bad.format(folder / CANARY)]
        path.write_text("\n".join(lines), encoding="utf-8")
        return draw(st.sampled_from(TRAINERS)), [str(path)]
    if kind == "shard":
        head = draw(
            st.lists(st.integers(-(2**31), 2**31 - 1).filter(lambda n: n != 20240520), min_size=3, max_size=3)
        )
        body = b"".join(number.to_bytes(4, "little", signed=True) for number in head) + draw(
            st.binary(max_size=1100)
        )
        for split in ("train", "val"):
            (folder / "given" / f"file_{split}_000001.bin").write_bytes(body)
        return "nanogpt.train", ["--dataset=" + str(folder / "given") + "/", "--device=cpu"]
    text = draw(st.binary(max_size=200) | JSON.map(lambda value: json.dumps(value).encode()))
    path = path.with_suffix(
        {"record": ".json", "experiment": ".yaml", "log": ".txt", "settings": ".toml"}[kind]
    )
    if kind == "settings":
        return "tools.cli", ["config", f"{draw(LETTERS)}={draw(hostile(folder))}"]
    path.write_bytes(text)
    command = {"record": ["leaderboard", "verify"], "experiment": ["experiment", "plan"], "log": ["repro"]}[
        kind
    ]
    return "tools.cli", [*command, str(path)]


@cache
def entry(module: str) -> Callable[[list[str]], int | None]:
    """`main` of a command; of the small trainer the part that comes before torch."""
    if module == "modded_nanogpt.train_gpt_simple":
        return lambda argv: importlib.import_module("modded_nanogpt.simple_launch").launch(argv, "")
    return importlib.import_module(module).main


def call(module: str, argv: list[str]) -> tuple[int, str]:
    """(exit status, stderr) of `python -m MODULE ARGV...`, in this process."""
    said = io.StringIO()
    old = sys.argv
    sys.argv = [module, *argv]
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said):
            run_command(entry(module))
    except SystemExit as end:
        return int(end.code or 0), said.getvalue()
    finally:
        sys.argv = old
    raise AssertionError("run_command has returned")


def complaint(module: str, argv: list[str], folder: Path) -> str:
    """What is wrong with how a command took its bad input; "" when nothing is."""
    before = sorted(os.listdir(folder))  # noqa: PTH208
    status, said = call(module, argv)
    if (folder / CANARY).exists():
        return "executed"
    if sorted(os.listdir(folder)) != before:  # noqa: PTH208
        return "something was left behind"
    if status != 2:
        return f"status {status}: {said[-300:]}"
    lines = said.splitlines()
    one_line = (
        lines and lines[-1].startswith("error: ") and all(line.startswith("note: ") for line in lines[:-1])
    )
    return "" if one_line and len(said) < 3000 else f"not one line: {said[:300]!r}"


def generated(rig: Rig, rng: random.Random, count: int) -> Tally:
    """`count` cases, over the three families."""
    tally = Tally("bad input made up for every entry point", "one line, exit 2, nothing run, nothing left")
    folder = rig.fresh("inputs")
    (folder / "given").mkdir(parents=True)
    with contextlib.chdir(folder), environment({"HOME": str(folder), "DATA_ROOT": str(folder / "data")}):
        for name in ("SLURM_JOB_ID", "RANK", "WORLD_SIZE", "XDG_CONFIG_HOME"):
            os.environ.pop(name, None)
        for family, share in (
            (flags, count // 2),
            (tools, count // 4),
            (files, count - count // 2 - count // 4),
        ):
            _family(tally, family(folder), share, rng.randrange(2**31), folder, family.__name__)
    return tally


def _family(tally: Tally, cases: st.SearchStrategy, count: int, seed: int, folder: Path, name: str) -> None:
    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=count, database=None, deadline=None, phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck), report_multiple_bugs=False, print_blob=False,
    )  # fmt: skip
    @hypothesis.given(cases)
    def each(case: tuple[str, list[str]]) -> None:
        module, argv = case
        tally.injected += 1
        tally.where[name] += 1
        try:
            found = complaint(module, argv, folder)
        except Exception as error:
            found = f"traceback: {type(error).__name__}: {error}"
        if found:
            (folder / CANARY).unlink(missing_ok=True)
            tally.failures.append(f"{module} {[word[:200] for word in argv]!r}: {found}")

    each()
