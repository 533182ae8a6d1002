"""The real command against a server that speaks the hub's protocol: cut off, killed, at once, without a network."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hub_server import COMMIT, REPOSITORY, HubServer, parquet

from nanogpt.common.shards import open_token_set, verify
from tests.refusal_kit import call

ROOT = Path(__file__).resolve().parents[2]
PREPARE = ROOT / "nanogpt" / "data" / "openwebtext" / "prepare.py"
SHARD = 20_000
FLAGS = ("--name=t", f"--shard_tokens={SHARD}", "--val_every=50")


@pytest.fixture(scope="module")
def documents() -> list[str]:
    """700 documents of words that GPT-2's vocabulary splits in many ways, 4 MB."""
    rng = random.Random(1)
    words = ["the", "Zürich", "quintessentially", "0x7f", "don't", "\n\n", "résumé", "🙂", "of", "and"]
    return [" ".join(rng.choices(words, k=rng.randint(1, 1500))) for _ in range(700)]


LAST = "plain_text/train/0003.parquet"


@pytest.fixture
def hub(documents: list[str]) -> Iterator[HubServer]:
    """Four files; one thread has written shards of the first three before it asks for the last."""
    parts = [documents[:150], documents[150:151], documents[151:680], documents[680:]]
    files = {f"plain_text/train/{number:04d}.parquet": parquet(part) for number, part in enumerate(parts)}
    server = HubServer({**files, "README.md": b"# texts"})
    yield server
    server.close()


@pytest.fixture
def env(mirror: Path, tmp_path: Path) -> Callable[..., dict[str, str]]:
    """The environment of a command that may talk to the loopback server alone."""

    def make(server: HubServer | None, root: str = "data") -> dict[str, str]:
        return {
            **os.environ,
            "HF_ENDPOINT": server.url if server else "http://127.0.0.1:9",
            "HF_HOME": str(tmp_path / "hf"),
            "HF_HUB_OFFLINE": "0",
            "DATA_ROOT": str(tmp_path / root),
            "DATA_MIRROR": str(mirror),
            "TIKTOKEN_CACHE_DIR": "",
        }

    return make


def prepare(env: dict[str, str], *flags: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(PREPARE), f"--repository={REPOSITORY}", *FLAGS, *flags]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=600, check=False)


def called(env: dict[str, str], cwd: Path, *flags: str) -> subprocess.CompletedProcess:
    """The same in this process: what does not come as far as the hub's library, which reads its environment once."""
    argv = [f"--repository={REPOSITORY}", *FLAGS, *flags]
    return subprocess.CompletedProcess(argv, *call("nanogpt.data.openwebtext.prepare", argv, cwd, env))


def prepare_impatiently(env: dict[str, str], *flags: str) -> subprocess.CompletedProcess:
    """The same command, with hundredths of a second between its attempts."""
    code = (
        "import atexit, sys; atexit.register(lambda: print('torch' in sys.modules))\n"
        "from nanogpt.data import sources; sources.FIRST_WAIT = 0.01\n"
        "from nanogpt.common.errors import run_command; from nanogpt.data.openwebtext.prepare import main\n"
        "run_command(main)"
    )
    command = [sys.executable, "-c", code, f"--repository={REPOSITORY}", *FLAGS, *flags]
    return subprocess.run(
        command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False
    )


def shards(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.bin")}


@pytest.fixture(scope="module")
def expected(
    documents: list[str], mirror: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, bytes]:
    """The shards as the local files give them, in one go, on one thread."""
    root = tmp_path_factory.mktemp("expected")
    lines = "".join(json.dumps({"text": text}) + "\n" for text in documents)
    (root / "t.jsonl").write_text(lines)
    env = {**os.environ, "DATA_ROOT": str(root), "DATA_MIRROR": str(mirror), "TIKTOKEN_CACHE_DIR": ""}
    done = prepare(env, f"--text_files={root}/*.jsonl", "--num_workers=1")
    assert done.returncode == 0, done.stderr
    found = open_token_set("t", root)
    verify(found)
    assert len(found.shards_train) > 15 and found.num_tokens("val") > 0
    return shards(root / "t")


def wait_for(path: Path, process: subprocess.Popen) -> None:
    """Until `path` is there, or the process has ended."""
    while not path.exists() and process.poll() is None:
        time.sleep(0.005)


def test_killed_in_the_middle_and_resumed_over_bad_connections(hub, env, expected, tmp_path: Path) -> None:
    hub.cuts, hub.cut_bytes, hub.fail, hub.held = (
        2,
        3000,
        1,
        LAST,
    )  # in the middle for certain: LAST never comes
    command = [sys.executable, str(PREPARE), f"--repository={REPOSITORY}", *FLAGS, "--num_workers=1"]
    process = subprocess.Popen(command, env=env(hub), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for(tmp_path / "data" / "t" / "t_train_000005.bin", process)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    folder = tmp_path / "data" / "t"
    assert (folder / "progress.json").exists() and not (folder / "manifest.json").exists()
    assert json.loads((folder / "progress.json").read_text())["commit"] == COMMIT
    hub.cuts, hub.held = 1, ""
    done = prepare(env(hub), "--num_workers=3")
    assert done.returncode == 0, done.stderr
    assert "shards are there; going on" in done.stdout
    assert shards(folder) == expected
    assert sorted(path.suffix for path in folder.iterdir() if path.suffix != ".bin") == [".json"]
    verify(open_token_set("t", tmp_path / "data"))
    again = called(env(None), tmp_path)  # nothing is asked of the network
    assert again.returncode == 0 and "already prepared and verified" in again.stdout
    other = called(env(None), tmp_path, "--max_documents=5")
    assert other.returncode == 2 and "max_documents was 0, is 5" in other.stderr


def test_ctrl_c(hub, env, tmp_path: Path) -> None:
    hub.held = LAST  # it is in the middle for certain
    command = [sys.executable, str(PREPARE), f"--repository={REPOSITORY}", *FLAGS, "--num_workers=1"]
    process = subprocess.Popen(
        command, env=env(hub), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    wait_for(tmp_path / "data" / "t" / "t_train_000002.bin", process)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=600)
    assert process.returncode == 130 and said.splitlines()[-1].startswith("interrupted; ")
    assert "Traceback" not in said and "Fatal" not in said
    assert (tmp_path / "data" / "t" / "progress.json").exists()


def test_three_at_once(env, documents, expected, tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    command = [sys.executable, str(PREPARE), f"--text_files={tmp_path}/*.jsonl", *FLAGS]
    together = [subprocess.Popen(command, env=env(None), stdout=subprocess.PIPE, text=True) for _ in range(3)]
    assert [process.wait(600) for process in together] == [0] * 3
    assert all("prepared" in process.stdout.read() for process in together)
    assert shards(tmp_path / "data" / "t") == expected


def refused(done: subprocess.CompletedProcess, code: int, *said: str) -> None:
    lines = done.stderr.strip().splitlines()
    assert done.returncode == code and "Traceback" not in done.stderr, done.stderr
    assert len(lines) == 1 and lines[0].startswith("error: "), done.stderr
    for word in said:
        assert word in lines[0]


def test_what_cannot_be_had(hub, env, tmp_path: Path) -> None:
    hub.files = {"README.md": b"no parquet"}
    refused(prepare_impatiently(env(hub)), 69, REPOSITORY, "--revision")
    hub.files = {"a.parquet": parquet(["a"])[:-100]}
    damaged = prepare_impatiently(env(hub))
    refused(damaged, 69, REPOSITORY, "damaged")
    assert damaged.stdout.split()[-1] == "False", "torch was imported: 200 MB for nothing"
    refused(prepare_impatiently(env(None)), 69, REPOSITORY, "failed 6 times", "Connection refused")
    refused(prepare_impatiently(env(hub), "--repository=no/such"), 69, "no/such", "--repository")
    refused(prepare({**env(hub), "HF_HUB_OFFLINE": "1"}), 2, "HF_HUB_OFFLINE", "--text_files")
    assert list((tmp_path / "data" / "t").iterdir()) == []


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--name=../x"], "--name"),
        (["--name="], "--name"),
        (["--text_files=/nowhere/*.jsonl"], "no such file"),
        (["--shard_tokens=5"], "at least 1024"),
        (["--val_every=1"], "at least 2"),
        (["--max_documents=-1"], "at least 0"),
        (["--num_workers=two"], "whole number"),
        (["--shard_token=5000"], "did you mean '--shard_tokens'"),
    ],
)
def test_bad_flags(env, tmp_path: Path, flags: list[str], said: str) -> None:
    refused(called(env(None), tmp_path, *flags), 2, said)
    assert not (tmp_path / "data").exists()
