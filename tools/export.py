"""`engaging export RUN`: a run's weights as a GPT-2 that `transformers` loads, with the same logits.

    engaging export out/nanogpt-gpt2
    engaging export out/quickstart --checkpoint last --to shakespeare-gpt2

Writes a folder with model.safetensors (float32, GPT-2's published layout), config.json and, where GPT-2's vocabulary
is in its cache, the tokenizer's files. GPT2LMHeadModel.from_pretrained(FOLDER) loads it.
"""

import os
import shutil
import sys
from pathlib import Path

from nanogpt.common import checkpoint_names, rundir
from nanogpt.common.errors import UserError
from nanogpt.common.storage import atomic_write_bytes, atomic_write_json, make_folder, storage_errors
from tools.args import Parser

CONTEXT_IDS = {"bos_token_id": 50256, "eos_token_id": 50256}  # GPT-2's <|endoftext|>


def parser() -> Parser:
    """The command line."""
    read = Parser("export", __doc__)
    read.add_argument("run", metavar="RUN", help="the run directory")
    read.add_argument("--checkpoint", default="best", help="best (lowest validation loss), last, or a step")
    read.add_argument(
        "--to", default="", metavar="FOLDER", help="the new folder (default RUN-hf, beside the run)"
    )
    return read


def main(argv: list[str]) -> int:
    """Choose the checkpoint, turn its weights over, write the folder."""
    options = parser().read(argv)
    run = Path(options.run).expanduser()
    target = (
        Path(options.to).expanduser() if options.to else run.absolute().with_name(f"{run.absolute().name}-hf")
    )
    refuse(run, options.checkpoint, target)
    from safetensors.numpy import load_file, save

    from nanogpt.common import checkpoints
    from tools.gpt2_layout import misfit, published

    checkpoint = checkpoints.choose(run / "checkpoints", options.checkpoint, note)
    shape, tokens = checkpoint.state.get("shape"), rundir.read_json(run / "config.json").get("tokens")
    if not isinstance(shape, dict) or not isinstance(tokens, dict):
        raise UserError(f"{run}: is no run of the baseline trainer, and only a GPT-2 can be exported as one")
    tensors = load_file(checkpoint.path / "model.safetensors")
    if fault := misfit(tensors, shape):
        raise UserError(f"{checkpoint.path}: {fault}; only the baseline trainer's model can be exported")
    vocabulary = tokens.get("vocab_size") or shape["vocab_size"]
    weights = save(published(tensors, shape, vocabulary), metadata={"format": "pt"})
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        make_folder(temporary)
        atomic_write_bytes(temporary / "model.safetensors", weights)
        atomic_write_json(temporary / "config.json", configuration(shape, tokens, vocabulary))
        has_tokenizer = write_tokenizer(temporary, run, tokens, shape["block_size"])
        with storage_errors(target):
            temporary.rename(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    print(
        f"{target}: step {checkpoint.step}, {len(weights) / 1e6:,.1f} MB, {tokenizer_words(tokens, has_tokenizer)}"
    )
    print(f'load it: transformers.GPT2LMHeadModel.from_pretrained("{target}")')
    return 0


def note(line: str) -> None:
    """Tell the person."""
    print(f"note: {line}", file=sys.stderr, flush=True)


def refuse(run: Path, checkpoint: str, target: Path) -> None:
    """UserError for what cannot be exported, or not to there; before torch is imported."""
    if not rundir.holds_run(run):
        raise UserError(f"{run}: holds no run; name the run directory (what --out_dir was)")
    steps = checkpoint_names.steps(run / "checkpoints")
    if not steps:
        raise UserError(f"{run}: the run has no checkpoint yet; wait for its first, or train longer")
    if checkpoint not in ("best", "last") and not (checkpoint.isdecimal() and int(checkpoint) in steps):
        raise UserError(
            f"--checkpoint={checkpoint}: expected best, last or one of {', '.join(map(str, steps))}"
        )
    if target.exists() or target.is_symlink():
        raise UserError(f"--to={target}: is there already; name another folder, or move it away")


def configuration(shape: dict, tokens: dict, vocabulary: int) -> dict:
    """config.json as transformers reads it. What is not written here is GPT-2's default there."""
    ids = CONTEXT_IDS if tokens.get("tokenizer") == "gpt2" else dict.fromkeys(CONTEXT_IDS)
    return {
        "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "dtype": "float32", "vocab_size": vocabulary,
        "n_positions": shape["block_size"], "n_embd": shape["n_embd"], "n_layer": shape["n_layer"],
        "n_head": shape["n_head"], "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5,
        "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "tie_word_embeddings": True, **ids,
    }  # fmt: skip


def write_tokenizer(folder: Path, run: Path, tokens: dict, block_size: int) -> bool:
    """GPT-2's two files under the names transformers knows, when they are in the cache; the characters of a character
    set as meta.json. Whether anything was written."""
    if tokens.get("tokenizer") == "char":
        atomic_write_json(folder / "meta.json", {"chars": tokens.get("chars")})
        return True
    from nanogpt.common.gpt2_encoding import cached_files
    from nanogpt.common.shards import data_root

    root = rundir.read_json(run / "config.json").get("config", {}).get("data_root")
    found = cached_files(data_root(root if isinstance(root, str) else ""))
    if tokens.get("tokenizer") != "gpt2" or not all(path.is_file() for path in found.values()):
        return False
    with storage_errors(folder):
        shutil.copyfile(found["encoder.json"], folder / "vocab.json")
        shutil.copyfile(found["vocab.bpe"], folder / "merges.txt")
    atomic_write_json(
        folder / "tokenizer_config.json",
        {"tokenizer_class": "GPT2Tokenizer", "model_max_length": block_size, "add_prefix_space": False},
    )
    return True


def tokenizer_words(tokens: dict, written: bool) -> str:
    """What the person should know about the tokenizer."""
    if tokens.get("tokenizer") == "char":
        return "a token a character (meta.json has them)"
    return "with its tokenizer" if written else 'without a tokenizer: take "openai-community/gpt2"'
