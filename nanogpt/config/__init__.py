"""Every knob of the baseline trainer, under the names that nanoGPT's users know, and what follows from them.

argv -> preset -> `Config` (frozen) -> `resolve(world_size)` -> `Plan`, which is printed and logged. Standard library
only: whatever is wrong here is said before torch is imported, let alone a GPU touched.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from nanogpt.common.errors import UserError
from nanogpt.common.flags import knob
from nanogpt.common.machine import check_device, refuse_unknown_home

PRESETS = Path(__file__).resolve().parent
# The code behind our custom operator, which torch's compile caches do not look at by themselves.
OPERATORS = tuple(PRESETS.parent / name for name in ("cross_entropy.py", "cross_entropy_kernel.py", "fp8.py"))
GPT2_SIZES = {  # (layers, heads, width) of the published models
    "gpt2": (12, 12, 768),
    "gpt2-medium": (24, 16, 1024),
    "gpt2-large": (36, 20, 1280),
    "gpt2-xl": (48, 25, 1600),
}


# What a resumed run may change: nothing that the losses depend on (the micro-batch only through dropout's masks).
FREE = frozenset(
    [
        "out_dir",
        "data_root",
        "init_from",
        "auto_resume",
        "overwrite",
        "accept_changed",
        "new_source",
        "check",
        "batch_size",
        "max_iters",
        "eval_interval",
        "eval_iters",
        "eval_tokens",
        "eval_only",
        "log_interval",
        "always_save_checkpoint",
        "save_interval",
        "save_minutes",
        "keep_checkpoints",
        "wandb_log",
        "wandb_project",
        "wandb_run_name",
        "device",
        "compile",
        "backend",
        "deterministic",
        "num_threads",
    ]
)


@dataclass(frozen=True)
class Config:
    """The command line of `train.py`. Units and meanings stand in the help texts."""

    # Where things are.
    out_dir: str = knob("out/nanogpt", "the run directory")
    data_root: str = knob("", "folder of the data sets; default: $DATA_ROOT, else data/ of the repository")
    dataset: str = knob("openwebtext", "data set under data_root, or the path of a folder with shards")
    # Start and resume.
    init_from: str = knob(
        "scratch",
        "start from random weights, from this run's last checkpoint, or from the published GPT-2 weights",
        choices=("scratch", "resume", *GPT2_SIZES),
    )
    auto_resume: bool = knob(
        False, "continue the run in out_dir when it holds one, else start as init_from says"
    )
    overwrite: bool = knob(
        False, "start afresh although out_dir holds a run; the old run is moved to out_dir.N"
    )
    accept_changed: str = knob("", "resume although these changed: any of config,data,torch")
    new_source: bool = knob(
        False,
        "resume from source that was edited since: it takes the place of the run's copy, and the log says so",
    )
    check: bool = knob(False, "check everything that needs no GPU, print the plan and stop")
    smoke: bool = knob(
        False,
        "does my edit run? 10 eager steps on small batches, one validation; in out_dir-smoke, made anew",
    )
    # Model.
    n_layer: int = knob(12, "transformer blocks", low=1, high=1000)
    n_head: int = knob(12, "attention heads", low=1, high=1000)
    n_embd: int = knob(768, "width", low=1, high=65536)
    block_size: int = knob(1024, "context length, in tokens", low=1, high=1 << 20)
    dropout: float = knob(0.0, "dropout probability", low=0.0, high=0.95)
    bias: bool = knob(False, "biases in the linear layers and the norms, as GPT-2 has them")
    # Batch. Say tokens_per_step; the accumulation follows from it and the number of GPUs.
    batch_size: int = knob(12, "sequences in one micro-step on one GPU", low=1, high=1 << 20)
    tokens_per_step: int = knob(
        0, "tokens in one optimizer step over all GPUs; 0: see the next knob", low=0, high=1 << 40
    )
    gradient_accumulation_steps: int = knob(
        0,
        "micro-steps in one optimizer step, over all GPUs together; 0: from tokens_per_step",
        low=0,
        high=1 << 30,
    )
    # Optimizer: AdamW, learning rate with warm-up and cosine.
    max_iters: int = knob(600_000, "optimizer steps", low=0, high=10**9)
    learning_rate: float = knob(6e-4, "largest learning rate", low=0.0, high=1e3)
    min_lr: float = knob(6e-5, "learning rate after lr_decay_iters", low=0.0, high=1e3)
    decay_lr: bool = knob(True, "warm up and decay; false: constant learning_rate")
    warmup_iters: int = knob(2000, "steps of linear warm-up", low=0, high=10**9)
    lr_decay_iters: int = knob(600_000, "step at which the cosine reaches min_lr", low=0, high=10**9)
    weight_decay: float = knob(0.1, "decoupled weight decay of the matrices", low=0.0, high=1e3)
    beta1: float = knob(0.9, "AdamW's beta 1", low=0.0, high=0.999999)
    beta2: float = knob(0.95, "AdamW's beta 2", low=0.0, high=0.999999)
    grad_clip: float = knob(1.0, "largest norm of the gradient; 0: no clipping", low=0.0, high=1e30)
    seed: int = knob(1337, "of the weights, the data order and the dropout", low=0, high=(1 << 31) - 1)
    # Evaluation, log, checkpoints.
    eval_interval: int = knob(2000, "steps between validations", low=1, high=10**9)
    eval_iters: int = knob(
        0, "validate on eval_iters x batch_size x block_size tokens; 0: eval_tokens", low=0, high=10**9
    )
    eval_tokens: int = knob(2_097_152, "tokens of the fixed validation set; 0: all", low=0, high=1 << 60)
    eval_only: bool = knob(False, "validate once and stop")
    log_interval: int = knob(1, "steps between log lines", low=1, high=10**9)
    always_save_checkpoint: bool = knob(True, "save at every validation; false: only when the loss improved")
    save_interval: int = knob(
        0, "steps between further checkpoints; 0: none besides those of validations", low=0, high=10**9
    )
    save_minutes: float = knob(
        15.0, "most minutes of work that a lost machine may cost; 0: no limit", low=0.0, high=1e6
    )
    keep_checkpoints: int = knob(2, "checkpoints kept, besides the best one", low=1, high=1000)
    wandb_log: bool = knob(False, "also log to Weights & Biases (WANDB_MODE=offline works)")
    wandb_project: str = knob("engaging-nanogpt", "Weights & Biases project")
    wandb_run_name: str = knob("", "Weights & Biases run name; default: the name of out_dir")
    # Hardware.
    device: str = knob("auto", "auto, cpu, cuda or cuda:N; auto takes the GPU when there is one")
    dtype: str = knob("auto", "of the activations; auto: bfloat16 on GPUs that have it, float16 on older ones",
                      choices=("auto", "float32", "bfloat16", "float16"))  # fmt: skip
    fp8: bool = knob(
        False, "8-bit operands in the matrix products of training (Ada, Hopper or later): faster"
    )
    compile: str = knob("auto", "torch.compile: true, false, or auto (on a GPU only)",
                        choices=("auto", "true", "false", "True", "False"))  # fmt: skip
    backend: str = knob("auto", "of torch.distributed; auto: nccl on GPUs, gloo on CPUs",
                        choices=("auto", "nccl", "gloo"))  # fmt: skip
    deterministic: bool = knob(False, "bit-equal repeats on a GPU too, at some cost in speed")
    num_threads: int = knob(0, "CPU threads of each rank; 0: its share of the cores", low=0, high=4096)

    def __post_init__(self) -> None:
        """Contradictions between knobs: UserError with one line."""
        if self.init_from in GPT2_SIZES:
            self._check_gpt2()
        elif self.n_embd % self.n_head:
            raise UserError(
                f"--n_embd={self.n_embd}: not divisible by --n_head={self.n_head}; "
                f"{_neighbours(self.n_embd, self.n_head)} are"
            )
        if self.decay_lr and self.min_lr > self.learning_rate:
            raise UserError(
                f"--min_lr={self.min_lr:g}: above --learning_rate={self.learning_rate:g}; lower it, or --decay_lr=false"
            )
        if self.decay_lr and self.warmup_iters > self.lr_decay_iters:
            raise UserError(
                f"--warmup_iters={self.warmup_iters}: longer than --lr_decay_iters={self.lr_decay_iters}; "
                "the cosine would never begin"
            )
        if self.init_from == "resume" and self.overwrite:
            raise UserError(
                "--overwrite=true with --init_from=resume: one starts afresh, the other goes on; keep one"
            )
        if self.auto_resume and self.overwrite:
            raise UserError(
                "--overwrite=true with --auto_resume=true: one starts afresh, the other goes on; keep one"
            )
        unknown = {word for word in self.accept_changed.split(",") if word} - {
            "config",
            "data",
            "torch",
        }
        if unknown:
            raise UserError(f"--accept_changed={self.accept_changed}: expected any of config,data,torch")
        check_device(self.device)
        if not self.out_dir.strip():
            raise UserError("--out_dir=: the run needs a directory, for example --out_dir=out/my-run")
        refuse_unknown_home("out_dir", self.out_dir)
        refuse_unknown_home("data_root", self.data_root)

    def _check_gpt2(self) -> None:
        if self.block_size > 1024:
            raise UserError(
                f"--block_size={self.block_size}: the published GPT-2 weights have 1024 positions; use at most that"
            )
        layers, heads, width = GPT2_SIZES[self.init_from]
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        for name, value in (("n_layer", layers), ("n_head", heads), ("n_embd", width)):
            given = getattr(self, name)
            if given not in (value, defaults[name]):
                raise UserError(
                    f"--{name}={given}: --init_from={self.init_from} has {value}; leave the flag away"
                )
            object.__setattr__(self, name, value)
        object.__setattr__(self, "bias", True)


@dataclass(frozen=True)
class Plan:
    """What follows from a Config and the number of ranks."""

    world_size: int
    tokens_per_step: int  # over all ranks
    sequences_per_step: int  # over all ranks
    micro_steps: int  # on each rank, in one optimizer step
    eval_tokens: int  # upper bound; 0: the whole validation set

    def describe(self, config: Config) -> str:
        """One line for the log."""
        gpus = "1 rank" if self.world_size == 1 else f"{self.world_size} ranks"
        return (
            f"{self.tokens_per_step:,} tokens a step = {gpus} x {self.micro_steps} micro-steps x "
            f"{config.batch_size} sequences x {config.block_size} tokens; {config.max_iters:,} steps = "
            f"{config.max_iters * self.tokens_per_step / 1e6:,.1f} M tokens"
        )


def resolve(config: Config, world_size: int) -> Plan:
    """Derive the accumulation from the tokens per step and the world size, or refuse and name sizes that work."""
    micro_tokens = config.batch_size * config.block_size
    total = config.gradient_accumulation_steps  # over all ranks, as nanoGPT counts it
    if config.tokens_per_step:
        if total and total * micro_tokens != config.tokens_per_step:
            raise UserError(
                f"--tokens_per_step={config.tokens_per_step}: contradicts --gradient_accumulation_steps={total} "
                f"(x batch_size x block_size = {total * micro_tokens}); keep one of them"
            )
        if config.tokens_per_step % (micro_tokens * world_size):
            raise UserError(_does_not_divide(config, world_size))
        total = config.tokens_per_step // micro_tokens
    total = total or world_size
    if total % world_size:
        near = sorted(
            {max(world_size, total // world_size * world_size), -(-total // world_size) * world_size}
        )
        raise UserError(
            f"--gradient_accumulation_steps={total}: not divisible by {world_size} ranks; "
            f"{' or '.join(map(str, near))} would be, as would {_divisors_near(total, world_size)} ranks"
        )
    return Plan(
        world_size=world_size,
        tokens_per_step=total * micro_tokens,
        sequences_per_step=total * config.batch_size,
        micro_steps=total // world_size,
        eval_tokens=config.eval_iters * micro_tokens or config.eval_tokens,
    )


def _does_not_divide(config: Config, world_size: int) -> str:
    sequences, rest = divmod(config.tokens_per_step, config.block_size)
    ranks = f"{world_size} rank{'s' if world_size > 1 else ''}"
    if rest or sequences < world_size or sequences % world_size:
        unit = config.batch_size * config.block_size * world_size
        low = config.tokens_per_step // unit * unit
        near = [size for size in (low, low + unit) if size]
        return (
            f"--tokens_per_step={config.tokens_per_step}: does not divide into {ranks} x "
            f"{config.batch_size} x {config.block_size} tokens; {' or '.join(map(str, near))} would"
        )
    share = sequences // world_size
    return (
        f"--batch_size={config.batch_size}: {ranks} x {config.batch_size} x {config.block_size} tokens do not divide "
        f"--tokens_per_step={config.tokens_per_step}; --batch_size={_divisors_near(share, config.batch_size)} would"
    )


def _divisors_near(total: int, wish: int) -> str:
    """The divisors of `total` on both sides of `wish`: "8 or 16"."""
    below = next(size for size in range(min(wish, total), 0, -1) if total % size == 0)
    above = next((size for size in range(wish, min(total, 4 * wish) + 1) if total % size == 0), below)
    return " or ".join(map(str, sorted({below, above})))


def _neighbours(width: int, heads: int) -> str:
    low = width // heads * heads
    return " and ".join(str(value) for value in (low, low + heads) if value)
