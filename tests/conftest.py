"""What every test may use: the repository's root and a clean environment for commands."""

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def root() -> Path:
    """The repository's root folder."""
    return ROOT


@pytest.fixture
def run_python(tmp_path: Path):
    """Runs `python ARGS...` from the root (or `cwd`) with one thread, and returns the finished process."""

    def run(
        *args: object, cwd: Path = ROOT, env: dict[str, str] | None = None, timeout: float = 600
    ) -> subprocess.CompletedProcess:
        full = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": "",
            "DATA_ROOT": str(tmp_path / "data"),
            **(env or {}),
        }
        return subprocess.run(
            [sys.executable, *map(str, args)],
            cwd=cwd,
            env=full,
            capture_output=True,
            text=True,
            timeout=timeout,
        )

    return run


@pytest.fixture(scope="session")
def zygote():
    """A process that has imported torch and forks one for each command (tests/faults/zygote.py).

    `zygote.shim` says whether system calls can be made to fail (tests/faults/shim.c), which takes a C compiler.
    """
    from tests.faults.shim import compile_shim
    from tests.faults.zygote import Zygote

    with tempfile.TemporaryDirectory() as folder, Zygote(compile_shim(Path(folder))) as process:
        yield process


@pytest.fixture(scope="session")
def mirror(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as DATA_MIRROR expects it: tinyshakespeare.txt and tiktoken_cache/ with the GPT-2 vocabulary.

    It is the session's shared folder where that exists, else $DATA_MIRROR, else what the network gives; without one,
    the tests that need it are skipped.
    """
    for folder in (ROOT.parent / "shared" / "data", Path(os.environ.get("DATA_MIRROR", "/nowhere"))):
        if (folder / "tinyshakespeare.txt").is_file() and (folder / "tiktoken_cache").is_dir():
            return folder
    from nanogpt.common.download import DownloadError
    from nanogpt.common.gpt2_encoding import gpt2_encoding
    from nanogpt.data.small_sets import shakespeare_text

    root = tmp_path_factory.mktemp("mirror")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("TIKTOKEN_CACHE_DIR", raising=False)  # so that it comes into `root`
        try:
            (root / "tinyshakespeare.txt").write_text(shakespeare_text(root), encoding="utf-8")
            gpt2_encoding(root)
        except DownloadError as error:
            pytest.skip(f"no network, and no folder in DATA_MIRROR: {error}")
    return root


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data root with the set `tiny`. Tests that damage it make their own."""
    from tests.faults import tiny

    folder = tmp_path_factory.mktemp("data")
    tiny.make_data(folder)
    return folder


@pytest.fixture
def refuse(tmp_path: Path, tiny_data: Path):
    """`refuse(module, argv, words)`: the command refuses, and nothing in tmp_path or the data has changed."""
    from tests.refusal_kit import assert_refused, call, snapshot

    def run(module: str, argv: list[str], *words: str, code: int = 2, env: dict | None = None) -> None:
        before = snapshot(tmp_path), snapshot(tiny_data)
        environment = {"DATA_ROOT": str(tiny_data), "HOME": str(tmp_path), **(env or {})}
        status, _, stderr = call(module, argv, tmp_path, environment)
        assert_refused(status, stderr, words, code)
        assert (snapshot(tmp_path), snapshot(tiny_data)) == before, "it changed something"

    return run


@pytest.fixture
def trainer(zygote, tiny_data: Path, tmp_path: Path):
    """`trainer(*flags)` runs the tiny model in tmp_path/run to its end; `trainer.start(*flags)` does not wait."""
    from tests.faults.tiny import FLAGS

    def start(*flags: object, **options: object):
        argv = [*FLAGS, f"--data_root={tiny_data}", f"--out_dir={tmp_path}/run", *map(str, flags)]
        child = zygote.start(argv, cwd=tmp_path, **options)
        started.append(child)
        return child

    def run(*flags: object, **options: object):
        child = start(*flags, **options)
        child.wait()
        return child

    started: list = []
    run.start = start
    yield run
    for child in started:
        if child.status is None:
            os.kill(child.pid, signal.SIGKILL)
            child.wait()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes longest comes first, so that the processes of `make test` end together; one mostly waits for SLURM."""
    first = {scope: place for place, scope in enumerate(LONGEST)}
    items.sort(key=lambda item: first.get(_scope(item.nodeid), len(first)))


def pytest_collection_finish(session: pytest.Session) -> None:
    """One thread for torch in the tests' own processes: several of them share the cores, and an operation on a small
    tensor takes a hundred times as long when its threads have to wait for a core."""
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(1)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> object:
    """For `pytest -n`: a file stays in one process, so that its fixtures are made once, and so does the cluster."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return _scope(nodeid)

    return ByFile(config, log)


CLUSTER = "tests/slurm"
LONGEST = (
    CLUSTER,
    "tests/docs/test_docs.py",
    "tests/modded/test_train_gpt.py",
    "tests/tools/test_quickstart.py",
    "tests/docs/test_guide_3.py",
    "tests/tools/experiments/test_stages.py",
    "tests/tools/experiments/test_real_trainer.py",
    "tests/tools/leaderboard/test_honest_runs.py",
    "tests/modded/test_many_runs.py",
    "tests/modded/test_train_gpt_simple.py",
    "tests/modded/kernels/test_interpreted.py",
    "tests/modded/kernels/test_launches.py",
)


def _scope(nodeid: str) -> str:
    """The file of a test, or CLUSTER for those that share the SLURM cluster."""
    file = nodeid.split("::")[0]
    return CLUSTER if file.startswith(f"{CLUSTER}/") and not file.endswith("_branches.py") else file


def pytest_configure(config: pytest.Config) -> None:
    """What is printed at the end; and on a CI machine (CI is set) the SLURM tests must run."""
    if (
        signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    ):  # a shell's `make test &`: every child would ignore Ctrl-C
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if not hasattr(config, "workerinput"):  # not in one of the processes of `pytest -n`
        from tests.suite_cost import SuiteCost

        config.pluginmanager.register(SuiteCost(), "suite-cost")
    if os.environ.get("CI"):
        config.pluginmanager.register(_SlurmGate(), "slurm-gate")


class _SlurmGate:
    """A skipped SLURM test fails the run, and the summary says so."""

    def __init__(self) -> None:
        self.skipped: list[str] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.skipped and "slurm" in report.keywords and not hasattr(report, "wasxfail"):
            self.skipped.append(report.nodeid)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.skipped and "slurm" in report.nodeid:  # a whole file that skips itself has no markers yet
            self.skipped.append(report.nodeid)

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if self.skipped and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if self.skipped:
            names = ", ".join(self.skipped[:3])
            terminalreporter.write_line(
                f"CI: {len(self.skipped)} SLURM tests were skipped, which fails: {names} ..."
            )
