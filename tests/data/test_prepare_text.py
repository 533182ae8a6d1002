"""One's own text: which documents validate, both tokenizers, going on after an interruption, and what is refused."""

import importlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from nanogpt.common.errors import UserError
from nanogpt.common.gpt2_encoding import gpt2_encoding
from nanogpt.common.shards import open_token_set, read_chars, verify
from nanogpt.data import token_stream
from nanogpt.data.files import TextFiles, cut_90_10, one_in_ten

prepare = importlib.import_module("nanogpt.data.text.prepare")
SCRIPT = Path(prepare.__file__)
PLAY = "Füür und\nWasser 火\n" * 40


@pytest.fixture(autouse=True)
def place(tmp_path: Path, mirror: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The data root is tmp_path/data, the vocabulary is there, and the texts are named as a person would."""
    monkeypatch.setenv("DATA_ROOT", str(tmp_path / "data"))
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(mirror / "tiktoken_cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def made(*argv: str) -> tuple[str, str]:
    """The set's training and validation text, decoded from its shards, after every check."""
    prepare.main(list(argv))
    name = next((word[7:] for word in argv if word.startswith("--name=")), "mine")
    found = open_token_set(name, Path("data"))
    verify(found)
    ids = [
        np.concatenate([shard.tokens() for shard in shards])
        for shards in (found.shards_train, found.shards_val)
    ]
    if found.tokenizer == "char":
        chars = read_chars(found.folder)
        return tuple("".join(chars[token] for token in part) for part in ids)
    return tuple(gpt2_encoding(Path("data")).decode(part.tolist()) for part in ids)


def test_one_file_gives_its_last_tenth_to_validation(capsys) -> None:
    Path("play.txt").write_bytes(b"\xef\xbb\xbf" + PLAY.encode())
    train, val = made("play.txt", "--tokenizer=char", "--name=c")
    assert train + val == PLAY and train.endswith("\n") and 0.08 < len(val) / len(PLAY) < 0.21
    said = capsys.readouterr().out
    assert f"c: prepared: {len(train):,} training tokens" in said and "the last tenth of the document" in said
    assert "python -m nanogpt.train train_shakespeare_char --dataset=c --out_dir=out/c" in said
    train, val = made("play.txt", "--name=g")
    assert (train + val).replace("<|endoftext|>", "") == PLAY
    assert train.startswith("<|endoftext|>") and val.startswith("<|endoftext|>")
    prepare.main(["play.txt", "--name=g"])
    assert "already prepared and verified" in capsys.readouterr().out


def test_of_many_documents_whole_ones_validate(capsys) -> None:
    folder = Path("letters/1900")
    folder.mkdir(parents=True)
    texts = [f"letter {number} " * (20 + number % 7) for number in range(30)]
    for number, text in enumerate(texts[:15]):
        (folder / f"{number:02}.txt").write_text(text)
    lines = [json.dumps({"text": text}) for text in texts[15:]]
    (folder / "rest.jsonl").write_text("\n\n".join([*lines, json.dumps({"text": " "})]))
    (folder / "empty.md").write_text(" \n")
    (folder / "picture.png").write_bytes(b"\x89PNG\r\n")
    train, val = (part.split("<|endoftext|>")[1:] for part in made("letters", "--name=l"))
    assert sorted(train + val) == sorted(texts) and 2 <= len(val) <= 3
    assert f"{len(val)} of 30 documents" in capsys.readouterr().out
    assert sum(map(len, val)) <= sum(map(len, texts)) / 10


def test_the_split_is_one_in_ten_all_along() -> None:
    assert np.flatnonzero(one_in_ten([5] * 40)).tolist() == [9, 19, 29, 39]
    assert np.flatnonzero(one_in_ten([1000] + [20] * 12)).tolist() == [1, 2, 3, 4, 5, 10]
    assert one_in_ten([3, *range(10, 2000, 190)]).sum() >= 1
    assert cut_90_10("abcdefghij") == ("abcdefghi", "j") and cut_90_10("x") == ("x", "")
    assert cut_90_10("12345678\n0") == ("12345678\n", "0")


@pytest.mark.parametrize("tokenizer", ["gpt2", "char"])
@pytest.mark.parametrize("documents", [4, 40])
def test_interrupted_it_goes_on_to_the_same_bytes(monkeypatch, tokenizer: str, documents: int) -> None:
    monkeypatch.setattr(token_stream, "BATCH_CHARS", 900)
    lines = (json.dumps({"text": PLAY[number:] * 4 + "\ud83d" * (number % 2)}) for number in range(documents))
    Path("a.jsonl").write_text("\n".join(lines))
    Path("b.txt").write_text(PLAY)
    flags = ["a.jsonl", "b.txt", f"--tokenizer={tokenizer}", "--shard_tokens=1024", "--num_workers=2"]
    expected = made(*flags)
    sound = {path.name: path.read_bytes() for path in Path("data/mine").iterdir()}
    assert len(sound) > 5
    shutil.rmtree("data/mine")
    write, left = token_stream.write_shard, 0

    def failing(*args: object) -> object:
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt
        return write(*args)

    monkeypatch.setattr(token_stream, "write_shard", failing)
    for _ in range(len(sound)):
        left = 2
        try:
            prepare.main(flags)
        except KeyboardInterrupt:
            continue
        break
    monkeypatch.setattr(token_stream, "write_shard", write)
    assert made(*flags) == expected
    assert {path.name: path.read_bytes() for path in Path("data/mine").iterdir()} == sound


def test_nanogpts_files_beside_the_shards(monkeypatch) -> None:
    Path("a.txt").write_text(PLAY * 9)
    prepare.main(["a.txt", "--shard_tokens=1024", "--format=bin"])
    found = open_token_set("mine", Path("data"))
    assert len(found.shards_train) > 2
    for split, shards in (("train", found.shards_train), ("val", found.shards_val)):
        raw = np.fromfile(f"data/mine/{split}.bin", np.uint16)
        assert np.array_equal(raw, np.concatenate([shard.tokens() for shard in shards]))
    before = Path("data/mine/train.bin").stat().st_ino
    Path("data/mine/val.bin").write_bytes(b"ab")
    prepare.main(["a.txt", "--shard_tokens=1024", "--format=bin"])
    assert Path("data/mine/train.bin").stat().st_ino == before
    assert Path("data/mine/val.bin").stat().st_size == 2 * found.num_tokens("val")
    Path("raw").mkdir()
    for split in ("train", "val"):
        Path(f"data/mine/{split}.bin").rename(f"raw/{split}.bin")
    assert open_token_set("./raw", Path("data")).num_tokens("train") == found.num_tokens("train")


def test_a_text_that_was_edited_is_not_mixed_with_what_it_was() -> None:
    Path("a.txt").write_text(PLAY)
    prepare.main(["a.txt"])
    Path("a.txt").write_text(PLAY.replace("Wasser", "Wassr!"))
    with pytest.raises(UserError, match=r"text_sha256 was .*choose another --name"):
        prepare.main(["a.txt"])


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ([], "FILE: name the text files"),
        (["none.txt"], "none.txt: no such file"),
        (["folder"], "holds no .txt or .md or .jsonl files"),
        (["good.txt", "./good.txt"], "given twice"),
        (["good.txt", "."], "given twice"),
        (["empty.txt"], "holds no text"),
        (["latin1.txt"], "latin1.txt: byte 1 (0xe9) is not UTF-8 text"),
        (["packed.gz"], "unpack it if it is compressed"),
        (["nul.txt"], "byte 1 (0x00)"),
        (["bad.jsonl"], "bad.jsonl:2:"),
        (["good.txt", "--name=../x"], "--name='../x'"),
        (["good.txt", "--tokenizer=gpt3"], "--tokenizer=gpt3: expected one of gpt2, char"),
        (["good.txt", "--tokeniser=char"], "did you mean '--tokenizer'"),
        (["good.txt", "--shard_tokens=1"], "--shard_tokens=1: must be at least 1024"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_is_refused(argv: list[str], said: str) -> None:
    Path("folder").mkdir()
    Path("good.txt").write_text(PLAY)
    Path("empty.txt").write_text("")
    Path("latin1.txt").write_bytes(b"h\xe9las")
    Path("packed.gz").write_bytes(b"\x1f\x8b\x08\x00")
    Path("nul.txt").write_bytes(b"a\0b")
    Path("bad.jsonl").write_text('{"text": "a"}\n{"txt": "b"}\n')
    with pytest.raises(UserError) as refusal:
        prepare.main(argv)
    assert said in str(refusal.value)
    assert not Path("data/mine").exists()


def test_too_many_characters(monkeypatch) -> None:
    monkeypatch.setattr(prepare, "LARGEST_ALPHABET", 5)
    Path("a.txt").write_text(PLAY)
    with pytest.raises(UserError, match=r"13 different characters, at most 5.*--tokenizer=gpt2"):
        prepare.main(["a.txt", "--tokenizer=char"])
    assert TextFiles(["a.txt"]).chars == "".join(sorted(set(PLAY)))


def test_without_a_network(run_python, mirror: Path, tmp_path: Path) -> None:
    """Under `unshare -n`: with a filled TIKTOKEN_CACHE_DIR not one connection; with an empty one, one line."""
    Path("a.txt").write_text(PLAY)
    code = (
        "import ctypes, runpy, sys\n"
        "if ctypes.CDLL(None).unshare(0x40000000): sys.exit(77)\n"
        f"sys.argv = ['prepare.py', 'a.txt']; runpy.run_path({str(SCRIPT)!r}, run_name='__main__')"
    )
    (tmp_path / "empty").mkdir()
    env = {"DATA_MIRROR": "", "TIKTOKEN_CACHE_DIR": str(tmp_path / "empty")}
    empty = run_python("-c", code, cwd=tmp_path, env=env)
    if empty.returncode == 77:
        pytest.skip("this machine lets nobody cut off the network: unshare(CLONE_NEWNET)")
    assert empty.returncode == 69 and "on a cluster: the login node" in empty.stderr
    assert empty.stderr.count("\n") == 1 and str(tmp_path / "empty") in empty.stderr
    filled = run_python(
        "-c", code, cwd=tmp_path, env={**env, "TIKTOKEN_CACHE_DIR": str(mirror / "tiktoken_cache")}
    )
    assert filled.returncode == 0 and "mine: prepared" in filled.stdout, filled.stderr
