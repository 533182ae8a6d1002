"""Continue a text with a trained model, and show the tokens as they come.

    python -m nanogpt.sample --out_dir=out/quickstart
    python -m nanogpt.sample --out_dir=out/quickstart --start="ROMEO:" --num_samples=1 --temperature=0
    python -m nanogpt.sample --init_from=gpt2 --start=FILE:prompt.txt --max_new_tokens=1000
    cd nanogpt && python sample.py --out_dir=../out/nanogpt-shakespeare

Flags are nanoGPT's, plus a few. A run is sampled from its directory alone: its data set may have gone. The samples
are computed together; the first one streams.
"""

import sys
from pathlib import Path

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import time
import typing
from dataclasses import dataclass

from nanogpt.common import checkpoint_names, rundir
from nanogpt.common.errors import UserError, run_command
from nanogpt.common.flags import knob, parse
from nanogpt.common.machine import check_device
from nanogpt.common.tokenizer import printable
from nanogpt.config import GPT2_SIZES

if typing.TYPE_CHECKING:
    import torch

    from nanogpt.common.tokenizer import Tokenizer
    from nanogpt.model import GPT

PROG = "python -m nanogpt.sample"
LARGEST_PROMPT = 64 * 2**20  # bytes of a FILE:
TOGETHER = 16  # samples computed at once
# Parameters: one token of a smaller model is too little work for several CPU threads.
ALONE_BELOW = 10_000_000
RULE = "---------------"


@dataclass(frozen=True)
class Config:
    """The command line of `sample.py`."""

    init_from: str = knob(
        "resume", "sample the run in out_dir, or the published GPT-2 weights", choices=("resume", *GPT2_SIZES)
    )
    out_dir: str = knob("out/nanogpt", "the run directory")
    checkpoint: str = knob("best", "which one: best (lowest validation loss), last, or a step")
    start: str = knob(
        "", "the text to continue, or FILE:path; default: a new document or line", any_text=True
    )
    num_samples: int = knob(10, "how many samples", low=1, high=100_000)
    max_new_tokens: int = knob(500, "tokens of each sample", low=1, high=10_000_000)
    temperature: float = knob(
        0.8, "below 1: more likely tokens; 0: always the most likely one", low=0.0, high=1e6
    )
    top_k: int = knob(200, "choose among the k most likely tokens; 0: among all", low=0)
    top_p: float = knob(
        1.0, "choose among the fewest tokens that have this probability; 1: all", low=0.0, high=1.0
    )
    stream: bool = knob(True, "show the first sample token by token")
    seed: int = knob(1337, "of the samples: the same seed, the same text", low=0, high=(1 << 31) - 1)
    device: str = knob("auto", "auto, cpu, cuda or cuda:N; auto takes the GPU when there is one")
    dtype: str = knob("auto", "of weights and activations; auto: bfloat16 on GPUs that have it, float32 on CPUs",
                      choices=("auto", "float32", "bfloat16", "float16"))  # fmt: skip
    compile: str = knob("false", "accepted because nanoGPT has it; a GPU's steps are CUDA graphs, with no wait",
                        choices=("auto", "true", "false", "True", "False"))  # fmt: skip
    data_root: str = knob("", "folder that keeps GPT-2's vocabulary; default: $DATA_ROOT, else the run's")

    def __post_init__(self) -> None:
        """What can be wrong before torch is imported: UserError."""
        check_device(self.device)
        if self.checkpoint not in ("best", "last") and not self.checkpoint.isdecimal():
            raise UserError(f"--checkpoint={self.checkpoint}: expected best, last or the number of a step")
        if self.init_from != "resume" and self.checkpoint != "best":
            raise UserError(
                f"--checkpoint={self.checkpoint}: --init_from={self.init_from} has no checkpoints; leave it away"
            )


def main(argv: list[str]) -> int:
    """Load, sample, print."""
    config = parse(Config, argv, prog=PROG, description=__doc__)
    start = read_start(config.start)
    folder = Path(config.out_dir).expanduser().absolute()
    if config.init_from == "resume":
        check_run(folder, config)
    import torch

    from nanogpt.common import hardware
    from nanogpt.common.ranks import choose_device

    device = choose_device(config.device, 0)
    dtype = hardware.choose_dtype(config.dtype, device)
    if config.compile.lower() == "true":
        note("--compile=true: not needed, the steps are CUDA graphs on a GPU, and plain calls on a CPU")
    if config.init_from == "resume":
        model, tokenizer = load_run(folder, config, dtype)
    else:
        model, tokenizer = load_gpt2(config, dtype)
    model = model.to(device=device, dtype=dtype).eval()
    if device.type == "cpu" and model.num_parameters() < ALONE_BELOW:
        torch.set_num_threads(1)
    prompt = tokenizer.encode(start or tokenizer.default_start)
    show(config, model, tokenizer, prompt, start)
    return 0


def note(line: str) -> None:
    """Tell the person; stdout is for the samples alone."""
    print(f"note: {line}", file=sys.stderr, flush=True)


def read_start(start: str) -> str:
    """`--start`, or what is in the file it names. UserError when that cannot be read."""
    if not start.startswith("FILE:"):
        return start
    path = Path(start.removeprefix("FILE:")).expanduser()
    try:
        with path.open("rb") as file:
            data = file.read(LARGEST_PROMPT + 1)
    except OSError as error:
        raise UserError(f"--start=FILE:{path}: cannot be read: {error.strerror}") from None
    if len(data) > LARGEST_PROMPT:
        raise UserError(
            f"--start=FILE:{path}: larger than {LARGEST_PROMPT // 2**20} MiB; the model sees its end only"
        )
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"--start=FILE:{path}: byte {error.start} is not UTF-8 text") from None
    if not text:
        raise UserError(f"--start=FILE:{path}: the file is empty; leave --start away to start from nothing")
    return text


def check_run(folder: Path, config: Config) -> None:
    """UserError unless `folder` is a run with the checkpoint that is wanted; nothing is verified yet."""
    if not rundir.holds_run(folder):
        raise UserError(
            f"--out_dir={folder}: holds no run; train one (python -m nanogpt.train --out_dir=...), or name its folder"
        )
    steps = checkpoint_names.steps(folder / "checkpoints")
    if not steps:
        raise UserError(
            f"--out_dir={folder}: the run has no checkpoint yet; wait for its first, or train longer"
        )
    if config.checkpoint.isdecimal() and int(config.checkpoint) not in steps:
        raise UserError(
            f"--checkpoint={config.checkpoint}: {folder} has no checkpoint of that step, only of "
            f"{', '.join(map(str, steps))}"
        )


def load_run(folder: Path, config: Config, dtype: "torch.dtype") -> "tuple[GPT, Tokenizer]":
    """Model and tokenizer of a run, on the CPU."""
    from nanogpt.common.checkpoints import choose, val_loss_of
    from nanogpt.common.shards import data_root
    from nanogpt.common.tokenizer import make_tokenizer
    from nanogpt.model import GPT, Shape

    record = rundir.read_json(folder / "config.json")
    path = folder / "config.json"
    if not isinstance(record.get("config"), dict) or not isinstance(record.get("tokens"), dict):
        raise UserError(f"{path}: has no tokenizer; is this the directory of a run of the baseline trainer?")
    root = data_root(config.data_root or str(record["config"].get("data_root", "")))
    tokenizer = make_tokenizer(record["tokens"], str(path), root)
    checkpoint = choose(folder / "checkpoints", config.checkpoint, note)
    try:
        model = GPT(Shape(**checkpoint.state["shape"]), dtype=dtype)
        model.load_state_dict(checkpoint.tensors("model"))
    except (RuntimeError, TypeError, KeyError):
        raise UserError(
            f"{checkpoint.path}: its weights are not of this code's model; use the code that the run kept: "
            f"python {folder}/source/nanogpt/sample.py --out_dir={folder}"
        ) from None
    if model.shape.vocab_size < tokenizer.vocab_size:
        raise UserError(
            f"{checkpoint.path}: the model has {model.shape.vocab_size} tokens, the tokenizer of {path} "
            f"{tokenizer.vocab_size}; they are not of one run"
        )
    loss = val_loss_of(checkpoint.path)
    known = f", validation loss {loss:.4f}" if loss < float("inf") else ""
    note(f"{folder}: checkpoint of step {checkpoint.step}{known}")
    return model, tokenizer


def load_gpt2(config: Config, dtype: "torch.dtype") -> "tuple[GPT, Tokenizer]":
    """The published model and its tokenizer, on the CPU."""
    from nanogpt.common.shards import data_root
    from nanogpt.common.tokenizer import GPT2_TOKENS, make_tokenizer
    from nanogpt.model import GPT, Shape
    from nanogpt.pretrained import load_published

    layers, heads, width = GPT2_SIZES[config.init_from]
    tokenizer = make_tokenizer(GPT2_TOKENS, config.init_from, data_root(config.data_root))
    shape = Shape(vocab_size=50257, block_size=1024, n_layer=layers, n_head=heads, n_embd=width, bias=True)
    model = GPT(shape, dtype=dtype)
    load_published(model, config.init_from, note)
    return model, tokenizer


def show(config: Config, model: "GPT", tokenizer: "Tokenizer", prompt: list[int], start: str) -> None:
    """Generate and print: each sample as start and continuation, a rule after it."""
    from nanogpt.generate import Generator, Sampling, random_draws

    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a terminal without UTF-8 must not end the program
    clean = printable if sys.stdout.isatty() else str
    sampling = Sampling(config.temperature, config.top_k, config.top_p)
    began, count = time.perf_counter(), 0
    generator = None
    for first in range(0, config.num_samples, TOGETHER):
        samples = range(first, min(first + TOGETHER, config.num_samples))
        if generator is None or len(samples) != generator.batch:
            generator = Generator(model, len(samples), config.max_new_tokens, sampling, tokenizer.vocab_size)
        decoders = [tokenizer.decoder() for _ in samples]
        texts = [[clean(start)] for _ in samples]
        streaming = config.stream and first == 0
        if streaming:
            print(clean(start), end="", flush=True)
        for tokens in generator.generate(prompt, random_draws(config.seed, samples, config.max_new_tokens)):
            pieces = [clean(decoder(token)) for decoder, token in zip(decoders, tokens, strict=True)]
            for text, piece in zip(texts, pieces, strict=True):
                text.append(piece)
            count += len(pieces)
            if streaming:
                print(pieces[0], end="", flush=True)
        for number, text in enumerate(texts):
            print("" if streaming and number == 0 else "".join(text), RULE, sep="\n", flush=True)
    seconds = time.perf_counter() - began
    note(f"{count:,} tokens in {seconds:.2f} s: {count / seconds:,.0f} tokens/s")


if __name__ == "__main__":
    run_command(main)
