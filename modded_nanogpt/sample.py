"""Continue a text with a model of the speedrun: `engaging sample RUN`, or from here

    python -m modded_nanogpt.sample --out_dir=out/speedrun --start="The capital of France"
    python -m modded_nanogpt.sample --out_dir=out/speedrun --num_samples=1 --temperature=0

Every token reads the text before it anew: the model shares keys, residuals and gates between places in ways that a
cache would have to copy, and it was built to be trained. On a GPU that is some thirty tokens a second.
"""

import sys
from pathlib import Path

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import dataclasses
import typing
from dataclasses import dataclass

from modded_nanogpt import layer_plan, schedule
from modded_nanogpt.config import Config as RunConfig
from nanogpt.common import checkpoint_names, rundir
from nanogpt.common.errors import UserError, run_command
from nanogpt.common.flags import knob, parse
from nanogpt.common.machine import check_device
from nanogpt.common.tokenizer import printable

if typing.TYPE_CHECKING:
    from torch import Tensor

    from modded_nanogpt.lanes import State
    from nanogpt.common.checkpoints import Checkpoint
    from nanogpt.common.ranks import Ranks
    from nanogpt.common.tokenizer import Tokenizer

PROG = "python -m modded_nanogpt.sample"
CONTEXT = 1024  # tokens of the text that are read for the next one
PLAIN = {
    "compile": "false",
    "capture": "false",
    "fp8": "off",
    "prefix": False,
    "canonical": False,
    "memory_gib": 0.0,
}
RULE = "---------------"


@dataclass(frozen=True)
class Config:
    """The command line; names as in nanogpt/sample.py."""

    out_dir: str = knob("out/speedrun", "the run directory")
    checkpoint: str = knob("last", "which one: last, best (lowest validation loss), or a step")
    start: str = knob("", "the text to continue; default: a new document or line", any_text=True)
    num_samples: int = knob(3, "how many samples", low=1, high=100_000)
    max_new_tokens: int = knob(100, "tokens of each sample", low=1, high=1_000_000)
    temperature: float = knob(
        0.8, "below 1: more likely tokens; 0: always the most likely one", low=0.0, high=1e6
    )
    top_k: int = knob(200, "choose among the k most likely tokens; 0: among all", low=0)
    seed: int = knob(1337, "of the samples: the same seed, the same text", low=0, high=(1 << 31) - 1)
    device: str = knob("auto", "auto, cpu, cuda or cuda:N; auto takes the GPU when there is one")
    data_root: str = knob("", "folder that keeps GPT-2's vocabulary; default: $DATA_ROOT, else the run's")

    def __post_init__(self) -> None:
        """What can be wrong before torch is imported: UserError."""
        check_device(self.device)
        if self.checkpoint not in ("best", "last") and not self.checkpoint.isdecimal():
            raise UserError(f"--checkpoint={self.checkpoint}: expected last, best or the number of a step")


def main(argv: list[str]) -> int:
    """Load, sample, print."""
    config = parse(Config, argv, prog=PROG, description=__doc__)
    folder = Path(config.out_dir).expanduser().absolute()
    record = read_record(folder)
    import torch

    from modded_nanogpt import setup
    from modded_nanogpt.optim.row_table import RowTable
    from nanogpt.common import checkpoints, shards, tokenizer
    from nanogpt.common.ranks import Ranks, choose_device

    checkpoint = checkpoints.choose(folder / "checkpoints", config.checkpoint, note)
    ranks = Ranks(0, 0, 1, choose_device(config.device, 0))
    known = {field.name for field in dataclasses.fields(RunConfig)}
    kept = {name: value for name, value in record["config"].items() if name in known}
    kept.setdefault("table_rows", "0")  # a run of earlier code
    root = shards.data_root(config.data_root or str(record["config"].get("data_root", "")))
    run_config = RunConfig(
        **{
            **kept,
            **PLAIN,
            "device": config.device,
            "attention": "auto",
            "backend": "auto",
            "data_root": str(root),
        }
    )
    table = read_table(checkpoint, run_config)
    words = tokenizer.make_tokenizer(record["tokens"], str(folder / "config.json"), root)
    prompt = words.encode(config.start or words.default_start)
    state = setup.build(run_config, ranks, compile_with="eager")
    if table:
        state.table = RowTable(run_config, ranks, state.model.head.dtype, learns=False)
        state.table.load(table, str(checkpoint.path))
    try:
        state.model.init_weights(run_config.seed)  # for the random signs, which no checkpoint holds
        state.model.load_state_dict(checkpoint.tensors("model"), strict=True)
    except RuntimeError:
        raise UserError(
            f"{checkpoint.path}: its weights are not of this code's model; use the code that the run kept: "
            f"python {folder}/source/modded_nanogpt/sample.py --out_dir={folder}"
        ) from None
    note(
        f"{folder}: checkpoint of step {checkpoint.step}, validation loss {checkpoint.state['val_loss']:.4f}"
    )
    step = checkpoint.step
    state.model.rotary.follow(list(schedule.yarn_windows(run_config, max(0, step - 1))))
    generator = torch.Generator().manual_seed(config.seed)
    for _ in range(config.num_samples):
        show(config, run_config, state, ranks, words, prompt, step, generator)
    return 0


def note(line: str) -> None:
    """Tell the person; stdout is for the samples alone."""
    print(f"note: {line}", file=sys.stderr, flush=True)


def read_record(folder: Path) -> dict:
    """The run's config.json. UserError unless `folder` is a run of this trainer that has a checkpoint."""
    if not rundir.holds_run(folder):
        raise UserError(
            f"--out_dir={folder}: holds no run; name the directory of a speedrun, such as out/speedrun"
        )
    record = rundir.read_json(folder / "config.json")
    if not isinstance(record.get("config"), dict) or "recipe" not in record["config"]:
        raise UserError(
            f"{folder}: is no run of the speedrun's trainer; engaging sample RUN finds the right one"
        )
    if not isinstance(record.get("tokens"), dict):
        raise UserError(
            f"{folder}/config.json: does not say what its tokens are; runs of earlier code cannot be sampled"
        )
    if not checkpoint_names.steps(folder / "checkpoints"):
        raise UserError(
            f"--out_dir={folder}: the run has no checkpoint; let it come to its end, or --save_interval"
        )
    return record


def read_table(checkpoint: "Checkpoint", run_config: RunConfig) -> "dict[str, Tensor]":
    """The table of n-grams of a checkpoint; empty for a model without one. UserError where it was left out."""
    rows = layer_plan.table_rows(run_config)
    table = checkpoint.tensors("table") if rows else {}
    if rows and not table:
        raise UserError(
            f"{checkpoint.path}: leaves out the table of {rows:,} hashed n-grams, without which the model cannot "
            "speak; a run keeps it with --save_table=true"
        )
    return table


def show(
    config: Config, run_config: RunConfig, state: "State", ranks: "Ranks", words: "Tokenizer", prompt: list[int],
    step: int, generator: object,
) -> None:  # fmt: skip
    """One sample, as its tokens come, and a rule after it."""
    from modded_nanogpt.batches import text_batch
    from modded_nanogpt.lanes import next_logits

    clean = printable if sys.stdout.isatty() else str
    windows, tied = schedule.final_window(run_config), schedule.at(run_config, step).tied
    tokens, decode = list(prompt), words.decoder()
    print(clean(config.start), end="", flush=True)
    for _ in range(config.max_new_tokens):
        seen = tokens[-CONTEXT:]
        batch = text_batch(run_config, seen, ranks.device)
        logits = next_logits(state, batch, len(seen) - 1, tied, windows)[: words.vocab_size]
        tokens.append(choose(logits.cpu(), config, generator))
        print(clean(decode(tokens[-1])), end="", flush=True)
    print(f"\n{RULE}", flush=True)


def choose(logits: "Tensor", config: Config, generator: object) -> int:
    """A token: logits (V,) float32 on the CPU."""
    import torch

    if config.temperature < 1e-5:
        return int(logits.argmax())
    logits = logits / config.temperature
    if 0 < config.top_k < logits.numel():
        logits = logits.masked_fill(logits < logits.topk(config.top_k).values[-1], -torch.inf)
    return int(torch.multinomial(logits.softmax(-1), 1, generator=generator))


if __name__ == "__main__":
    run_command(main)
