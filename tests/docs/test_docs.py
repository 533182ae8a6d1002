"""The documents against the code: their commands run, links lead somewhere, trees, tables, flags and paths are true.

Every line of a ```bash block is run in a copy of the code, made small by flags that are appended, or is in NOT_RUN with
the reason, and then at least its flags, targets and scripts are checked. The pages about the cluster have a table of
their own, cluster_pages.py, and are run by tests/slurm/test_guide.py.
"""

import dataclasses
import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests" / "tools"), str(ROOT / "tests" / "docs")]

import cluster_pages
import run_kit

import modded_nanogpt.config
import nanogpt.bench
import nanogpt.sample
from nanogpt.common import errors
from nanogpt.common.flags import parse
from nanogpt.config import PRESETS, Config, resolve
from tools.cli import COMMANDS

PAGES = [
    *(ROOT / name for name in ("README.md", "CHANGELOG.md", "AGENTS.md")),
    *sorted((ROOT / "docs").glob("*.md")),
]
RUN_PAGES = ("README.md", "guide-1-baseline.md", "hacking.md", "run-directory.md", "performance.md")
OWN_TESTS = ("guide-3-experiments.md",)  # tests/docs/test_guide_3.py runs its commands
NOT_RUN = {
    r"git clone .*": "needs a network",
    r"cd engaging-nanogpt": "the clone of the line before",
    r"make (quickstart|test)( ARGS=.*)?": "builds an environment: tests/test_makefile.py and test_quickstart.py",
    r"bash setup_env\.sh|source activate_env\.sh": "tests/environment runs them",
    r"python nanogpt/data/shakespeare/prepare\.py": "needs a network: tests/data runs it against a server of its own",
    r"python nanogpt/data/openwebtext/prepare\.py": "hours: tests/data runs it on a small text",
    r".*--init_from=gpt2.*": "downloads OpenAI's weights: tests/test_pretrained.py serves small ones",
    r".*out/nanogpt-finetune-shakespeare": "needs OpenAI's weights",
    r"(cd nanogpt && )?torchrun .*|make ddp-train .*": "needs several GPUs; its flags and sizes are checked below",
    r"engaging plot out/nanogpt-gpt2": "needs the run of the line before it",
    r"make gpu-status": "needs a GPU: tests/tools/test_gpu.py",
}
SMALL = (*run_kit.TINY, "--max_iters=6", "--eval_interval=3", "--num_threads=1")
FOR_REAL = "nanogpt.train"
APPENDED = {  # to a command that is run
    "train": SMALL,
    "sample": ("--max_new_tokens=8", "--num_samples=1", "--device=cpu"),
}
TORCHRUN_FLAGS = {"standalone", "nnodes", "nproc_per_node", "rdzv_backend", "rdzv_endpoint"}
SLURM_FLAGS = {
    *(
        "account",
        "array",
        "cpus-per-task",
        "exclude",
        "mail-type",
        "format",
        "gres",
        "me",
        "mem",
        "no-requeue",
        "nodelist",
    ),
    *("nodes", "ntasks-per-node", "output", "partition", "qos", "requeue", "signal", "start", "time", "wrap"),
}


def all_commands() -> list[str]:
    """Every command once, in the order of reading."""
    pages = [page for page in PAGES if page.name in RUN_PAGES]
    return list(dict.fromkeys(line for page in pages for line in cluster_pages.bash_lines(page)))


def reason_not_run(command: str) -> str:
    return next((why for pattern, why in NOT_RUN.items() if re.fullmatch(pattern, command)), "")


def made_small(command: str, clone: Path) -> tuple[list[str], Path]:
    """(words, folder) of the command as it is run here."""
    inside = command.startswith("cd nanogpt && ")
    words = shlex.split(command.removeprefix("cd nanogpt && "))
    if words[0] == "engaging":
        words[0] = str(clone / "tools/bin/engaging")
    kind = next((kind for kind in APPENDED if f"nanogpt.{kind}" in words or f"{kind}.py" in words), "")
    words += APPENDED.get(kind, ())
    words += (
        ["--max_iters=8"] if "--init_from=resume" in words else []
    )  # to go on with a run that is finished
    if words[0] == "python":
        words[0] = sys.executable
    return words, clone / "nanogpt" if inside else clone


@pytest.fixture(scope="module")
def executed(
    zygote, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, subprocess.CompletedProcess]]:
    """(clone, result of each command that is run), run in the order of reading.

    The first start of FOR_REAL is a process of its own; what else needs torch is forked from one that has it. Each has
    real starts in its own tests.
    """
    clone = run_kit.make_clone(tmp_path_factory.mktemp("docs") / "clone")
    shutil.copytree(ROOT / "modded_nanogpt", clone / "modded_nanogpt")
    for name in ("shakespeare_char", "python_source"):
        run_kit.make_data(clone / "data", name)
    results, started, environment = {}, False, run_kit.environment(clone / "data")
    for command in all_commands():
        if reason_not_run(command):
            continue
        words, folder = made_small(command, clone)
        torch = words[0] == sys.executable and "prepare.py" not in words[1]
        if torch and (started or FOR_REAL not in words):
            results[command] = run_kit.forked(zygote, folder, clone / "data", *words[1:])
            continue
        started |= torch
        results[command] = subprocess.run(
            words, cwd=folder, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True,
            timeout=600,
        )  # fmt: skip
    return clone, results


@pytest.mark.parametrize("command", [line for line in all_commands() if not reason_not_run(line)])
def test_the_command_works(executed, command: str) -> None:
    done = executed[1][command]
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"


def test_every_trainer_smokes_in_ten_steps_and_one_validation(executed) -> None:
    """docs/hacking.md has a line for each of them."""
    for name, steps in (("speedrun", 10), ("speedrun-medium", 13), ("simple", 10)):
        metrics = executed[0] / "out" / f"{name}-smoke" / "metrics.jsonl"
        events = [json.loads(line) for line in metrics.read_text().splitlines()]
        assert [event["step"] for event in events if event["event"] == "train"] == list(range(steps))
        assert [event["step"] for event in events if event["event"] == "val"] == [steps]


def test_every_reason_for_not_running_is_still_needed() -> None:
    for pattern in NOT_RUN:
        assert any(re.fullmatch(pattern, command) for command in all_commands()), pattern


def test_every_command_of_the_cluster_pages_is_accounted_for() -> None:
    assert cluster_pages.problems() == []
    blocks = [page for page in PAGES if cluster_pages.bash_lines(page)]
    known = {*RUN_PAGES, *OWN_TESTS, *(page.name for page in cluster_pages.PAGES)}
    assert {page.name for page in blocks} <= known


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_engaging_commands_exist(page: Path) -> None:
    for name in re.findall(r"(?:^|`)engaging ([a-z]+)\b", page.read_text(), re.MULTILINE):
        assert name in COMMANDS, f"{page.name}: engaging {name}"


def test_the_commands_for_gpus_fit_their_presets() -> None:
    """The flags of the lines that need GPUs are known, and the batch divides over as many as the line names."""
    seen = 0
    for command in all_commands():
        if command.startswith("make ddp-train"):
            ranks, rest = int(command.partition("NGPUS=")[2]), ["train_gpt2_epoch"]
        elif "torchrun" in command:
            words = shlex.split(command.removeprefix("cd nanogpt && "))
            numbers = {name: value for name, _, value in (word.partition("=") for word in words)}
            ranks = int(numbers.get("--nnodes", 1)) * int(numbers["--nproc_per_node"])
            script = "nanogpt.train" if "nanogpt.train" in words else "train.py"
            rest = words[words.index(script) + 1 :]
            assert {
                word[2:].split("=")[0] for word in words[: words.index(script)] if word[:2] == "--"
            } <= TORCHRUN_FLAGS
        else:
            continue
        config = parse(Config, rest, prog="docs", description="", presets=PRESETS)
        assert resolve(config, ranks).micro_steps >= 1
        seen += 1
    assert seen >= 5


def test_make_targets_and_scripts_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for page in PAGES:
        for target in re.findall(
            r"`?\bmake ([a-z]+-[a-z]+|quickstart|test|environment|lint|faults|help)\b", page.read_text()
        ):
            assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"{page.name}: make {target}"
    for command in all_commands():
        for script in re.findall(r"\S+\.sh\b", command):
            assert (ROOT / script).is_file(), command


# ---- links, paths, flags ---------------------------------------------------------------------------------------------


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith("https://"):
            continue
        assert "://" not in target, target
        file, _, anchor = target.partition("#")
        linked = (page.parent / file).resolve() if file else page
        assert linked.exists(), target
        if anchor:
            assert anchor in anchors(linked), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_paths_of_the_repository_exist(page: Path) -> None:
    folders = "nanogpt|modded_nanogpt|tools|tests|docs|slurm|benchmarks"
    for path in re.findall(rf"(?<![\w./~-])((?:{folders})/[\w./-]*\w)", page.read_text()):
        assert (ROOT / path).exists() or path in INVENTED, f"{page.name}: {path}"


INVENTED = {"nanogpt/config/mine.py"}  # the reader makes it


def known_flags() -> set[str]:
    """Every flag that a command of this repository takes."""
    classes = (Config, nanogpt.sample.Config, nanogpt.bench.Bench, modded_nanogpt.config.Config)
    flags = {field.name for cls in classes for field in dataclasses.fields(cls)}
    sources = [
        *(ROOT / "tools").rglob("*.py"),
        *(ROOT / "nanogpt" / "data").rglob("prepare.py"),
        *(ROOT / "modded_nanogpt").glob("*.py"),
        *(ROOT / "modded_nanogpt" / "data").glob("*.py"),
        *(ROOT / "slurm" / "lib").glob("*.sh"),
        ROOT / "setup_env.sh",
    ]
    for path in [*sources, *(ROOT / "benchmarks").glob("*.py"), *(ROOT / "tests" / "faults").glob("*.py")]:
        text = path.read_text()
        flags |= set(re.findall(r"--([a-z][a-z0-9_-]+)", text)) | set(
            re.findall(r"^    (\w+): \w+ = knob\(", text, re.MULTILINE)
        )
    return flags | TORCHRUN_FLAGS | SLURM_FLAGS | {"help"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_flags_exist(page: Path) -> None:
    known = known_flags()
    for flag in re.findall(r"(?<![\w-])--([a-z][a-z0-9_-]*)", page.read_text()):
        assert flag in known, f"{page.name}: --{flag}"


def test_a_flag_and_a_path_that_are_invented_would_be_found() -> None:
    assert "batch_sizes" not in known_flags() and "tokens_per_step" in known_flags()
    assert not (ROOT / "nanogpt/trainer.py").exists()


# ---- the tree of the README ------------------------------------------------------------------------------------------


def tree_of_readme() -> list[str]:
    """The paths in the README's map."""
    block = re.search(r"<!-- tests/docs.*?```\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert block
    paths, parent = [], ""
    for line in block[1].splitlines():
        name = line.split()[0]
        if not line.startswith(" "):
            parent = name
        paths.append(name if name == parent else parent + name)
    return paths


def tracked() -> list[str]:
    done = subprocess.run(["git", "-C", str(ROOT), "ls-files"], capture_output=True, text=True)
    if done.returncode:
        pytest.skip("not a git clone: nothing says which files belong to the repository")
    return done.stdout.splitlines()


def test_the_readmes_tree_is_the_real_one() -> None:
    listed = tree_of_readme()
    assert len(listed) == len(set(listed))
    for path in listed:
        assert (ROOT / path).is_dir() if path.endswith("/") else (ROOT / path).is_file(), path
    files = tracked()
    top = {path.split("/")[0] + ("/" if "/" in path else "") for path in files}
    assert top == {path for path in listed if path.count("/") == path.endswith("/")}
    baseline = {path[: path.find("/", 8) + 1] or path for path in files if path.startswith("nanogpt/")}
    assert baseline - {"nanogpt/__init__.py"} == {path for path in listed if path.startswith("nanogpt/")} - {
        "nanogpt/"
    }


# ---- the tables of docs/run-directory.md -------------------------------------------------------------------


def table(page: str, heading: str, number: int = 0, column: int = 0) -> list[str]:
    """The cells of a column of the `number`-th table below a heading."""
    text = "\n" + (ROOT / "docs" / page).read_text()
    section = text.partition(f"\n{heading}\n")[2].partition("\n## ")[0]
    tables = re.findall(r"(?:^\|.*\n)+", section, re.MULTILINE)
    rows = tables[number].splitlines()[2:]
    return [row.strip("|").split("|")[column].strip() for row in rows]


def ticked(cells: list[str]) -> set[str]:
    return {name for cell in cells for name in re.findall(r"`([^`]+)`", cell)}


@pytest.fixture(scope="module")
def run(executed) -> Path:
    """A run that was resumed: the guide's own."""
    return executed[0] / "out" / "nanogpt-shakespeare"


def test_the_files_of_a_run(run: Path) -> None:
    real = {path.name + ("/" if path.is_dir() else "") for path in run.iterdir()}
    assert real - {"loss.png"} == ticked(table("run-directory.md", "# The run directory")) - {
        "stop",
        "note.txt",
    }


def test_the_events_and_their_fields(run: Path) -> None:
    found: dict[str, set[str]] = {}
    for line in (run / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        assert {"event", "step", "attempt"} <= set(record)
        found.setdefault(record["event"], set()).update(set(record) - {"event", "step", "attempt"})
    names = table("run-directory.md", "## metrics.jsonl")
    fields = table("run-directory.md", "## metrics.jsonl", column=1)
    assert {name.strip("`"): ticked([cell]) for name, cell in zip(names, fields, strict=True)} == found
    described = ticked(table("run-directory.md", "## metrics.jsonl", number=1))
    assert described == {"event", "step", "attempt"}.union(*found.values())


def test_the_fields_of_the_json_files(run: Path) -> None:
    config = json.loads((run / "config.json").read_text())
    rows = table("run-directory.md", "## config.json")
    assert set(config) - {"must_resume"} == ticked(rows)
    texts = dict(zip(rows, table("run-directory.md", "## config.json", column=1), strict=True))
    assert set(config["plan"]) == ticked([texts["`plan`"]])
    assert set(config["tokens"]) == ticked([texts["`tokens`"]])
    for attempt in json.loads((run / "environment.json").read_text())["attempts"]:
        assert set(attempt) == ticked(table("run-directory.md", "## environment.json"))
    assert set(json.loads((run / "lease.json").read_text())) == ticked(
        table("run-directory.md", "## The lease")
    )


def test_the_files_of_a_checkpoint(run: Path) -> None:
    newest = sorted((run / "checkpoints").glob("step_*"))[-1]
    assert {path.name for path in newest.iterdir()} == ticked(table("run-directory.md", "## checkpoints/"))
    assert set(json.loads((newest / "manifest.json").read_text())) == {"format", "step", "files"}


def test_the_exit_statuses() -> None:
    real = {value for name, value in vars(errors).items() if name.startswith("EXIT_")}
    assert {int(cell) for cell in table("run-directory.md", "## Exit status")} == real | {0, 130}


# ---- numbers that stand in the code and in a page ----------------------------------------------------------

PINNED = [  # (page, text there, file, text there)
    (
        "guide-1-baseline.md",
        "validation loss of 1.47",
        "nanogpt/config/train_shakespeare_char.py",
        "about 1.47",
    ),
    ("guide-1-baseline.md", "18 GB", "nanogpt/data/openwebtext/prepare.py", "18 GB"),
    (
        "guide-1-baseline.md",
        "about 9 billion tokens",
        "nanogpt/data/openwebtext/prepare.py",
        "about 9 billion",
    ),
    ("guide-1-baseline.md", "stays under\n1 GB", "nanogpt/data/openwebtext/prepare.py", "stays under 1 GB"),
    ("guide-1-baseline.md", "~/conda_envs/nanogpt_env", "setup_env.sh", "$HOME/conda_envs/nanogpt_env"),
    ("guide-1-baseline.md", "`gpt2-xl`", "nanogpt/config/finetune_shakespeare.py", '"gpt2-xl"'),
    ("guide-1-baseline.md", "at most one a second", "nanogpt/setup.py", "SHOW_SECONDS = 1.0"),
    ("run-directory.md", "engaging-nanogpt log 1", "nanogpt/common/source.py", '"engaging-nanogpt log 1"'),
    ("guide-1-baseline.md", "out/quickstart", "nanogpt/config/quickstart.py", '"out/quickstart"'),
    ("guide-1-cluster.md", "1,003,854 training tokens", "docs/data.md", "1,003,854"),
    ("guide-1-cluster.md", "resumed from step_", "nanogpt/setup.py", "resumed from {checkpoint.path.name}"),
    (
        "troubleshooting.md",
        "has no such trainer yet",
        "slurm/modded/train_speedrun.sh",
        "has no such trainer yet",
    ),
    (
        "guide-2-speedrun.md",
        "each with 8 CPUs and 120 GB",
        "slurm/modded/train_speedrun.sh",
        "--cpus-per-gpu=8",
    ),
    ("engaging.md", "`MAX_RESTARTS` times at most (100)", "slurm/lib/requeue.sh", "MAX_RESTARTS:-100"),
    ("engaging.md", "at most every ten seconds", "tools/site/watch.py", "SQUEUE_EVERY_S = 10.0"),
    ("troubleshooting.md", "3 times in a row without a new checkpoint", "slurm/lib/run.sh", "MAX_FAILURES=3"),
    (
        "troubleshooting.md",
        "nothing here can start that",
        "slurm/lib/submit.sh",
        "nothing here can start that",
    ),
    ("troubleshooting.md", "this job has ... on each node", "slurm/lib/common.sh", "on each node"),
    ("troubleshooting.md", "no fineweb10B there", "slurm/lib/data.sh", "no $set there; prepare it first"),
    (
        "troubleshooting.md",
        "stopped by its file 'stop'",
        "slurm/lib/requeue.sh",
        "stopped by its file 'stop'",
    ),
    ("troubleshooting.md", "warns after 60 days", "tools/site/checks_machine.py", "OLD_DAYS = 60"),
    ("troubleshooting.md", "needs root", "tools/practice/packages.py", "needs root"),
    ("guide-1-baseline.md", "within 1e-5 of their size", "tests/test_ddp.py", "CLOSE = 1e-5"),
    ("performance.md", "within 1e-5 of its size", "tests/test_ddp.py", "CLOSE = 1e-5"),
    ("guide-1-baseline.md", "out/nanogpt-gpt2", "nanogpt/config/train_gpt2.py", '"out/nanogpt-gpt2"'),
]


@pytest.mark.parametrize(("page", "said", "file", "there"), PINNED)
def test_numbers_that_are_said_twice_agree(page: str, said: str, file: str, there: str) -> None:
    assert said in (ROOT / "docs" / page).read_text()
    assert there in (ROOT / file).read_text()


def test_performance_has_no_figure_without_its_command() -> None:
    rows: Iterator[str] = (
        line for line in (ROOT / "docs/performance.md").read_text().splitlines() if line[:2] == "| "
    )
    for row in rows:
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        if cells[0] == "command":
            continue
        assert "`" in cells[0], row
        assert all(cell == "-" for cell in cells[1:]) or cells[1] != "-", f"a figure without hardware: {row}"
