"""Text into shards by the real command: the same tokens from every kind of source, interrupted or not."""

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from modded_nanogpt.data import fineweb
from nanogpt.common.errors import UserError
from nanogpt.common.gpt2_encoding import gpt2_encoding
from nanogpt.common.shards import open_token_set, verify

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "modded_nanogpt" / "data" / "fineweb.py"
SHARD, VAL = 20_000, 15_000
FLAGS = ("--name=t", f"--shard_tokens={SHARD}", f"--val_tokens={VAL}")


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """300 documents, in JSON lines and in Parquet files, some of them empty or longer than a shard."""
    folder = tmp_path_factory.mktemp("texts")
    rng = random.Random(2)
    words = ["the", "Zürich", "don't", "\n\n", "résumé", "🙂", "0x7f", "quintessentially"]
    documents = [" ".join(rng.choices(words, k=rng.randint(0, 200))) for _ in range(298)]
    documents += ["", "long " * 5000]
    rng.shuffle(documents)
    for number, part in enumerate((documents[:180], documents[180:])):
        lines = "".join(json.dumps({"text": text, "id": k}) + "\n" for k, text in enumerate(part))
        (folder / f"{number}.jsonl").write_text(lines)
        table = pa.table({"id": list(range(len(part))), "text": part})
        pq.write_table(table, folder / f"{number}.parquet", row_group_size=50)
    (folder / "documents.json").write_text(json.dumps(documents))
    return folder


@pytest.fixture(autouse=True)
def vocabulary(mirror: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """GPT-2's, from the disk."""
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(mirror / "tiktoken_cache"))


def run(root: Path, *flags: str) -> None:
    """The command, in this process: importing `datasets` takes longer than all the rest."""
    fineweb.main([*FLAGS, f"--data_root={root}", *flags])


def shards(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.bin")}


def test_shards_are_the_stream_cut_at_round_numbers(texts, tmp_path, capsys):
    """One stream in the order of the documents: validation first, then shards that are full but for the last."""
    run(tmp_path, f"--text_files={texts}/*.jsonl", "--num_workers=2")
    found = open_token_set("t", tmp_path)
    verify(found)
    encoding = gpt2_encoding(tmp_path)
    stream = []
    for text in json.loads((texts / "documents.json").read_text()):
        stream += [50_256, *encoding.encode_ordinary(text)]
    assert [shard.path.name for shard in found.shards_val] == ["t_val_000000.bin"]
    assert found.shards_train[0].path.name == "t_train_000001.bin"
    assert found.num_tokens("val") == VAL and len(found.shards_train) > 3
    assert {shard.num_tokens for shard in found.shards_train[:-1]} == {SHARD}
    pieces = [shard.tokens() for shard in found.shards_val + found.shards_train]
    assert np.concatenate(pieces).tolist() == stream
    run(tmp_path, f"--text_files={texts}/*.jsonl")
    assert "already prepared and verified" in capsys.readouterr().out
    with pytest.raises(UserError, match="val_first was 15000, is 7"):
        run(tmp_path, f"--text_files={texts}/*.jsonl", "--val_tokens=7")


def test_parquet_killed_continued_and_mended(texts, tmp_path, capsys):
    """The same tokens from another kind of file, whatever the number of threads and whatever happens on the way."""
    run(tmp_path / "lines", f"--text_files={texts}/*.jsonl")
    expected, folder, flag = (
        shards(tmp_path / "lines" / "t"),
        tmp_path / "parquet" / "t",
        f"--text_files={texts}/*.parquet",
    )
    command = [sys.executable, str(SCRIPT), *FLAGS, f"--data_root={folder.parent}", flag]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (folder / "t_train_000002.bin").exists() and process.poll() is None:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    run(folder.parent, flag, "--num_workers=1")
    assert shards(folder) == expected
    path = folder / "t_train_000003.bin"
    path.write_bytes(path.read_bytes()[:-2] + b"\1\1")
    run(folder.parent, flag)
    assert "t_train_000003.bin: damaged; going on from there" in capsys.readouterr().out
    assert shards(folder) == expected


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--text_files={here}/bad.parquet",), "bad.parquet"),
        (("--text_files={here}/column.parquet",), "a column of strings called text"),
        (("--text_files={here}/number.parquet",), "text"),
        (("--text_files={here}/bad.jsonl",), "bad.jsonl:1"),
        (("--text_files={here}/none*.parquet",), "no such file"),
        (("--text_files={texts}/*.jsonl", "--val_tokens=1000000"), "nothing is left for training"),
        (("--name=../x",), "expected letters"),
        (("--shard_tokens=5",), "at least 1024"),
        (("--file=x",), "did you mean '--files'?"),
    ],
)
def test_bad_input_is_one_line(texts, tmp_path, flags, words):
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 and nothing else")
    pq.write_table(pa.table({"body": ["x"]}), tmp_path / "column.parquet")
    pq.write_table(pa.table({"text": [1, 2]}), tmp_path / "number.parquet")
    (tmp_path / "bad.jsonl").write_text('{"text": 5}\n')
    with pytest.raises(UserError) as caught:
        run(tmp_path / "root", *(flag.format(here=tmp_path, texts=texts) for flag in flags))
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_help_is_quick_and_the_sample_is_the_default():
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--help"], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0 and "HuggingFaceFW/fineweb" in done.stdout
    code = "import modded_nanogpt.data.fineweb, sys; print([n for n in ('numpy', 'datasets') if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.stdout.strip() == "[]", done.stderr
