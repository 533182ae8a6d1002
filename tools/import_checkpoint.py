"""`engaging import CKPT.pt`: nanoGPT's own checkpoint as a run directory, to sample from and to export.

    engaging import ~/nanoGPT/out/ckpt.pt --to out/mine
    engaging import ~/nanoGPT/out-shakespeare-char/ckpt.pt --text input.txt --to out/play

The file is a pickle. It is opened by a process of its own that takes nothing but tensors, numbers and texts. A model of
characters needs the text that it was trained on: nanoGPT keeps the alphabet in another pickle, which is never opened.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from nanogpt.common.errors import UserError
from nanogpt.common.storage import atomic_write_json, make_folder
from tools.args import Parser

ROOT = Path(__file__).resolve().parents[1]
GPT2_ROWS = (50257, 50304)  # nanoGPT pads the vocabulary to a multiple of 64


def parser() -> Parser:
    """The command line."""
    read = Parser("import", __doc__)
    read.add_argument("checkpoint", metavar="CKPT.pt", help="a checkpoint that nanoGPT's train.py wrote")
    read.add_argument(
        "--to", default="", metavar="RUN", help="the new run directory (default out/imported-FOLDER)"
    )
    read.add_argument(
        "--text", default="", metavar="FILE", help="for a model of characters: the text it learned"
    )
    return read


def main(argv: list[str]) -> int:
    """Read, check, write the run."""
    options = parser().read(argv)
    source = Path(options.checkpoint).expanduser()
    if not source.is_file():
        what = "is a folder" if source.is_dir() else "no such file"
        raise UserError(f"{source}: {what}; name nanoGPT's checkpoint, for example out/ckpt.pt")
    target = Path(options.to or f"out/imported-{source.absolute().parent.name}").expanduser()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"--to={target}: is there already; name another folder, or move it away")
    chars = alphabet(Path(options.text).expanduser()) if options.text else None
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder) / "weights.safetensors"
        said = unpickle(source.absolute(), weights)
        from safetensors.torch import load_file

        tensors = load_file(weights)
    shape = shape_of(said["model_args"], source)
    from tools.gpt2_layout import misfit

    if fault := misfit(tensors, shape):
        raise UserError(f"{source}: {fault}; it is not the model that its model_args describe")
    step = write_run(
        target, source, tensors, shape, said, tokens_of(shape["vocab_size"], chars, options.text, source)
    )
    count = sum(tensor.numel() for tensor in tensors.values()) / 1e6
    print(f"{target}: nanoGPT's checkpoint of step {step}, {count:,.2f} M weights")
    print(f"sample it: python -m nanogpt.sample --out_dir={target}")
    return 0


def alphabet(path: Path) -> str:
    """The characters of a text, sorted, as nanoGPT's prepare.py numbers them."""
    try:
        return "".join(sorted(set(path.read_text(encoding="utf-8"))))
    except (OSError, ValueError) as error:
        raise UserError(f"--text={path}: cannot be read as UTF-8 text ({error})") from None


def unpickle(source: Path, weights: Path) -> dict:
    """What import_worker says of the checkpoint, whose tensors it has written to `weights`."""
    command = [sys.executable, "-m", "tools.import_worker", str(source), str(weights)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        if done.returncode == UserError.exit_code and lines:
            raise UserError(lines[-1].removeprefix("error: "))
        raise UserError(
            f"{source}: the process that read it ended with status {done.returncode}; is there memory for it "
            f"({source.stat().st_size / 1e9:.2f} GB)?"
        )
    return json.loads(done.stdout.splitlines()[-1])


def shape_of(model_args: dict, source: Path) -> dict:
    """Our shape from nanoGPT's model_args. UserError when a number is missing or no size."""
    shape = {"bias": model_args.get("bias", True)}  # nanoGPT had no such knob at first: biases everywhere
    for name in ("vocab_size", "block_size", "n_layer", "n_head", "n_embd"):
        value = model_args.get(name)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 1 << 24:
            raise UserError(
                f"{source}: model_args: {name}: {value!r}: expected a size; it is no checkpoint of nanoGPT"
            )
        shape[name] = value
    if not isinstance(shape["bias"], bool) or shape["n_embd"] % shape["n_head"]:
        raise UserError(f"{source}: model_args: {model_args}: describe no GPT-2")
    return shape


def tokens_of(vocabulary: int, chars: str | None, text: str, source: Path) -> dict:
    """What turns the model's tokens into text: config.json's "tokens"."""
    if chars is not None and len(chars) != vocabulary:
        raise UserError(
            f"--text={text}: has {len(chars)} different characters, the model {vocabulary} tokens; name the text that "
            "it was trained on, or leave the flag away for GPT-2's tokens"
        )
    if chars is not None:
        return {"tokenizer": "char", "vocab_size": vocabulary, "eot": None, "chars": chars}
    if vocabulary not in GPT2_ROWS:
        raise UserError(
            f"{source}: has {vocabulary} tokens, so they are characters: name the text that it was trained on, "
            "for example --text=input.txt"
        )
    return {"tokenizer": "gpt2", "vocab_size": 50257, "eot": 50256, "chars": None}


def write_run(target: Path, source: Path, tensors: dict, shape: dict, said: dict, tokens: dict) -> int:
    """The run directory, config.json last; the step of its one checkpoint."""
    from nanogpt.common import checkpoints

    step, loss = int(said["iter_num"] or 0), said["best_val_loss"]
    make_folder(target)
    # nanoGPT saves when the validation loss is best, or always: the loss belongs to this step in the first case only.
    state = {"shape": shape, "val_step": -1, "val_loss": None, "best_val": loss, "best_step": -1, "tokens": 0}
    checkpoints.save(target / "checkpoints", step, {"model": tensors}, state)
    record = {
        "config": {"out_dir": str(target), **said["config"]},
        "tokens": tokens,
        "imported": str(source.absolute()),
    }
    atomic_write_json(target / "config.json", record)
    return step
