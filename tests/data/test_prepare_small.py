"""The small sets, as their commands make them: counts, bytes, repeats, interruptions, and no network.

Most of it in the test's own process; what loads GPT-2's vocabulary, or is killed, has one of its own.
"""

import functools
import http.server
import importlib
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import tiktoken

from nanogpt.common.shards import open_token_set, read_chars, verify
from tests.refusal_kit import call

ROOT = Path(__file__).resolve().parents[2]
NO_NETWORK = "http://127.0.0.1:9/nothing-listens-here"


def script(name: str) -> Path:
    return ROOT / "nanogpt" / "data" / name / "prepare.py"


@pytest.fixture
def prepare(tmp_path: Path):
    """`prepare(name, *flags, VARIABLE=value)`: the command of a set, in this process."""

    def run(name: str, *flags: str, **env: str) -> subprocess.CompletedProcess:
        module, env = f"nanogpt.data.{name}.prepare", {"DATA_ROOT": str(tmp_path / "data"), **env}
        return subprocess.CompletedProcess(name, *call(module, list(flags), tmp_path, env))

    return run


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_shakespeare_char(prepare, tmp_path: Path, mirror: Path) -> None:
    done = prepare("shakespeare_char", DATA_MIRROR=str(mirror))
    assert done.returncode == 0, done.stderr
    assert "1,003,854 training tokens, 111,540 for validation, vocabulary 65" in done.stdout
    found = open_token_set("shakespeare_char", tmp_path / "data")
    verify(found)
    text = (mirror / "tinyshakespeare.txt").read_text()
    chars = sorted(set(text))  # as nanoGPT numbers them
    expected = np.array([chars.index(char) for char in text[:20_000]], dtype=np.uint16)
    assert read_chars(found.folder) == "".join(chars)
    assert np.array_equal(found.shards_train[0].tokens()[:20_000], expected)
    decoded = "".join(chars[token] for token in found.shards_val[0].tokens())
    assert decoded == text[int(len(text) * 0.9) :]
    again = prepare("shakespeare_char", DATA_MIRROR=NO_NETWORK)
    assert again.returncode == 0 and "already prepared and verified" in again.stdout


def test_shakespeare_in_gpt2_tokens(run_python, tmp_path: Path, mirror: Path, monkeypatch) -> None:
    env = {"DATA_MIRROR": str(mirror), "TIKTOKEN_CACHE_DIR": ""}
    done = run_python(script("shakespeare"), env=env)
    assert done.returncode == 0, done.stderr
    assert "301,966 training tokens, 36,059 for validation" in done.stdout
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "data" / "tiktoken_cache"))
    tokens = open_token_set("shakespeare", tmp_path / "data").shards_val[0].tokens()
    text = (mirror / "tinyshakespeare.txt").read_text()
    assert tiktoken.get_encoding("gpt2").decode(tokens.tolist()) == text[int(len(text) * 0.9) :]
    # Everything that came from the network is kept: made again without one.
    (tmp_path / "data" / "shakespeare" / "manifest.json").unlink()
    again = run_python(script("shakespeare"), env={"DATA_MIRROR": NO_NETWORK, "TIKTOKEN_CACHE_DIR": ""})
    assert again.returncode == 0 and "301,966" in again.stdout


def test_python_source_needs_nothing_and_repeats(prepare, tmp_path: Path) -> None:
    for name in ("one", "two"):
        done = prepare("python_source", f"--data_root={tmp_path / name}", DATA_MIRROR=NO_NETWORK)
        assert done.returncode == 0, done.stderr
    one, two = (contents(tmp_path / name / "python_source") for name in ("one", "two"))
    assert one == two
    found = open_token_set("python_source", tmp_path / "one")
    verify(found)
    assert found.vocab_size == 97 and 3_000_000 < found.num_tokens("train") < 4_000_000
    share = found.num_tokens("val") / found.num_tokens("train")
    assert 0.09 < share < 0.12
    chars = read_chars(found.folder)
    assert "import os" in "".join(chars[token] for token in found.shards_train[0].tokens()[:200_000])


def test_python_source_splits_by_whole_files() -> None:
    prepare = importlib.import_module("nanogpt.data.python_source.prepare")
    texts = {f"m{number:02d}.py": f"#{number}\n" * 50 for number in range(40)}
    splits = prepare.split_files(texts)
    for text in texts.values():
        assert (text in splits["train"]) != (text in splits["val"])
    assert prepare.only_known("a\té\r\nλ~") == "a\t??\n?~"


@pytest.mark.parametrize("address", ["http", "folder with input.txt"])
def test_mirrors(prepare, tmp_path: Path, mirror: Path, address: str) -> None:
    folder = tmp_path / "mirror"
    folder.mkdir()
    name = "tinyshakespeare.txt" if address == "http" else "input.txt"
    (folder / name).write_bytes((mirror / "tinyshakespeare.txt").read_bytes())
    handler = functools.partial(_Quiet, directory=str(folder))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    place = f"http://127.0.0.1:{server.server_port}/" if address == "http" else str(folder)
    done = prepare("shakespeare_char", DATA_MIRROR=place)
    server.shutdown()
    server.server_close()
    assert done.returncode == 0, done.stderr


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


def refused(done: subprocess.CompletedProcess, code: int, *said: str) -> None:
    """One line on stderr, this exit code, no traceback."""
    lines = done.stderr.strip().splitlines()
    assert done.returncode == code and len(lines) == 1 and lines[0].startswith("error: "), done.stderr
    for word in said:
        assert word in lines[0]


def test_what_cannot_be_had(prepare, tmp_path: Path, mirror: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    refused(prepare("shakespeare_char", DATA_MIRROR=str(empty)), 2, "DATA_MIRROR", "neither")
    refused(prepare("shakespeare_char", DATA_MIRROR=NO_NETWORK), 69, "DATA_MIRROR", "network")
    (empty / "tinyshakespeare.txt").write_bytes((mirror / "tinyshakespeare.txt").read_bytes()[::-1])
    refused(prepare("shakespeare_char", DATA_MIRROR=str(empty)), 69, "not the expected")
    refused(prepare("shakespeare_char", DATA_MIRROR="ftp://x/y"), 2, "not fetched")
    (tmp_path / "file").write_text("")
    where = f"--data_root={tmp_path / 'file'}"
    refused(prepare("python_source", where), 74, "file")
    assert not (tmp_path / "data" / "shakespeare_char").exists()


def test_vocabulary_that_cannot_be_had(run_python, tmp_path: Path, mirror: Path) -> None:
    env = {"DATA_MIRROR": NO_NETWORK, "TIKTOKEN_CACHE_DIR": ""}
    (tmp_path / "data" / "downloads").mkdir(parents=True)
    text = (mirror / "tinyshakespeare.txt").read_bytes()
    (tmp_path / "data" / "downloads" / "tinyshakespeare.txt").write_bytes(text)
    refused(run_python(script("shakespeare"), env=env), 69, "GPT-2 vocabulary", "tiktoken_cache", "copy")


@pytest.mark.parametrize("name", ["shakespeare_char", "shakespeare", "python_source", "openwebtext"])
def test_help_imports_nothing_heavy_and_flags_are_checked(run_python, prepare, name: str) -> None:
    done = run_python("-X", "importtime", script(name), "--help")
    assert done.returncode == 0 and "--data_root" in done.stdout
    for heavy in ("torch", "datasets", "tiktoken", "numpy"):
        assert f"| {heavy}\n" not in done.stderr and f" {heavy}\n" not in done.stderr
    refused(prepare(name, "--data_rot=x"), 2, "--data_rot", "did you mean '--data_root'")
    refused(prepare(name, "now"), 2, "unexpected argument")


def test_damaged_set_is_made_again(prepare, tmp_path: Path, mirror: Path) -> None:
    prepare("shakespeare_char", DATA_MIRROR=str(mirror))
    folder = tmp_path / "data" / "shakespeare_char"
    sound = contents(folder)
    for name in sound:
        data = bytearray(sound[name])
        data[len(data) // 2] ^= 4
        (folder / name).write_bytes(data)
        done = prepare("shakespeare_char", DATA_MIRROR=str(mirror))
        assert done.returncode == 0 and "prepared" in done.stdout, (name, done.stderr)
        assert contents(folder) == sound, name


def test_killed_at_any_moment_and_many_at_once(tmp_path: Path, mirror: Path) -> None:
    env = {**os.environ, "DATA_ROOT": str(tmp_path), "DATA_MIRROR": str(mirror)}
    command = [sys.executable, str(script("shakespeare_char"))]
    for moment in range(12):
        process = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(0.03 + 0.02 * moment)
        process.send_signal(signal.SIGKILL)
        process.wait()
        folder = tmp_path / "shakespeare_char"
        if (folder / "manifest.json").exists():
            verify(open_token_set("shakespeare_char", tmp_path))
            (folder / "manifest.json").unlink()
    together = [subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL) for _ in range(4)]
    assert [process.wait(600) for process in together] == [0] * 4
    verify(open_token_set("shakespeare_char", tmp_path))
