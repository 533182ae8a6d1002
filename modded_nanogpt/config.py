"""Every knob of the speedrun trainer, and what follows from them.

argv -> preset -> `Config` (frozen) -> `resolve(world_size)` -> `Plan`, which is printed and logged. Standard library
only. Sizes and stages are data by recipe (`sizes.py`, `stage_table.py`); each technique of the record is one
switch here, true in the record. A technique that another one carries goes with it: without `bigram` there are neither
n-grams nor signs, without `mudd` no groups; without `short_documents` all stages cut documents where the last one does.
"""

from dataclasses import dataclass
from pathlib import Path

from modded_nanogpt import layer_plan, schedule
from nanogpt.common.errors import UserError
from nanogpt.common.flags import knob
from nanogpt.common.machine import check_device, refuse_unknown_home

PRESETS = Path(__file__).resolve().parent / "presets"
WORLD_SIZES = (1, 2, 4, 8)
LANES = 8  # as many as the record has GPUs
LEAST_ROWS, MOST_ROWS, ROW_MULTIPLE = (
    64,
    1 << 30,
    16,
)  # of the n-gram table: two halves, equal shares of 8 ranks
CHANGED_WORDS = {"config", "data", "torch"}

# What a resumed run may change: nothing that decides what is computed (how exactly it is rounded may differ).
FREE = frozenset(
    [
        "out_dir", "data_root", "init_from", "auto_resume", "overwrite", "accept_changed", "new_source",
        "check",
        "eval_interval", "eval_tokens", "eval_slice", "target_loss", "save_interval", "save_minutes",
        "keep_checkpoints", "save_table", "log_interval", "wandb_log", "wandb_project", "wandb_run_name",
        "device", "attention", "compile", "backend", "deterministic", "num_threads", "warmup", "memory_gib",
        "compile_cache", "capture", "runs",
    ]
)  # fmt: skip


@dataclass(frozen=True)
class Config:
    """The command line of `train_gpt.py`. Units and meanings stand in the help texts."""

    # Where things are.
    out_dir: str = knob("out/speedrun", "the run directory")
    data_root: str = knob("", "folder of the data sets; default: $DATA_ROOT, else data/ of the repository")
    dataset: str = knob("fineweb10B", "data set under data_root, or the path of a folder with shards")
    # Start and resume.
    init_from: str = knob("scratch", "start from random weights, or from this run's last checkpoint",
                          choices=("scratch", "resume"))  # fmt: skip
    auto_resume: bool = knob(False, "continue the run in out_dir when it holds one, else start")
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
    # What is trained, and how long.
    recipe: str = knob("record", "model, stages and target: record, record89 and snapshot (to 3.28), medium (to 2.92), "
                      "or tiny ones for CPUs",
                      choices=tuple(layer_plan.SIZES))  # fmt: skip
    steps: int = knob(0, "scheduled steps; 0: the recipe's own number", low=0, high=10**7)
    extension_steps: int = knob(
        -1, "steps after them at the last learning rate; -1: the recipe's", low=-1, high=10**7
    )
    lanes: int = knob(
        0,
        "micro-batches in one step over all GPUs; 0: 8, and on GPUs with little memory 16 or 32",
        low=0,
        high=64,
    )
    vocab_size: int = knob(0, "token ids are below this; 0: GPT-2's 50,257", low=0, high=65_536)
    data_passes: int = knob(1, "how often the training data may be gone through; a record reads it once", low=1,
                            high=10**6)  # fmt: skip
    seed: int = knob(1337, "of the weights", low=0, high=(1 << 31) - 1)
    runs: int = knob(
        1,
        "this many seeds from --seed on, one after the other and compiled once, in out_dir/seed-N",
        low=1,
        high=1000,
    )
    # Optimizers.
    muon_lr: float = knob(0.023, "base learning rate of Muon", low=0.0, high=1e3)
    adam_lr: float = knob(0.008, "base learning rate of Adam", low=0.0, high=1e3)
    muon_wd: float = knob(2.25, "weight decay of Muon, times the learning rate", low=0.0, high=1e3)
    adam_wd: float = knob(0.005, "weight decay of Adam, times the learning rate", low=0.0, high=1e3)
    normuon_beta2: float = knob(0.9, "of NorMuon's second moment", low=0.0, high=0.999999)
    adam_every: int = knob(2, "Adam updates at every so many steps, gradients add up between", low=1, high=16)
    cooldown: float = knob(0.80, "part of the scheduled steps over which the rate falls", low=0.0, high=1.0)
    lr_floor: float = knob(0.30, "where it falls to, as a factor", low=0.0, high=10.0)
    # Techniques of the model; docs/speedrun.md says what each does.
    narrow_heads: bool = knob(
        True, "queries and keys of the short layers, and values of two, have half the width"
    )
    depth_cut: bool = knob(True, "three more layers without attention, one without an MLP")
    second_mlp: bool = knob(True, "one layer has two MLPs side by side")
    paired_heads: bool = knob(True, "heads in pairs share a softmax in some layers")
    key_offset: bool = knob(True, "keys of the long layers carry half of the token before")
    half_rope: bool = knob(True, "rotary positions on half of each head only")
    yarn: bool = knob(True, "rotary frequencies move when the windows widen")
    value_embeds: bool = knob(True, "token embeddings added to attention values")
    bigram: bool = knob(True, "hashed embedding of pairs of tokens, and of triples where there is the table")
    table_rows: str = knob(
        "auto", "rows of the table of hashed n-grams; auto: what the GPUs have room for, the record's 84,602,880 at "
        "most; 0: record 89's bigram table instead",
    )  # fmt: skip
    normalised_grams: bool = knob(
        False, "tokens that differ in case, accents or white space are one in the hashes of n-grams"
    )
    bigram_signs: bool = knob(True, "random signs let pairs share a row of the bigram table")
    copy_input: bool = knob(
        False, "the token that followed the same text earlier in the document is an input too"
    )
    smear: bool = knob(True, "each embedding takes a little of the one before")
    attention_gates: bool = knob(True, "gates on the heads of the long layers")
    cached_attention: bool = knob(True, "the last layers attend from one earlier residual")
    input_gates: bool = knob(True, "gates computed from the token; false: learned numbers")
    mudd: bool = knob(True, "gated sums of earlier residuals at the end of the network")
    grouped_mudd: bool = knob(True, "ten sources at the end instead of five, weighed by groups of channels")
    xsa: bool = knob(True, "learnable removal of the value's own direction")
    dc: bool = knob(False, "dynamically composed heads in the last layer (record 89's)")
    skip: bool = knob(True, "skip connections over the middle")
    asymmetric_softcap: bool = knob(True, "logits 23 sigmoid((z+5)/7.5); false: 30 sigmoid(z/7.5)")
    copy_pointer: bool = knob(
        False, "the next token may be copied from where a pointer points in the document (beyond the record)"
    )
    attention_at_6: bool = knob(False, "layer 6 has attention too (the record has none)")
    embedding: str = knob("tied_then_untied", "input embedding and head: one, two, or one and then two",
                          choices=("tied_then_untied", "tied", "untied"))  # fmt: skip
    # Techniques of the loss, the schedule and the optimizers.
    mtp: bool = knob(True, "predict the next three and two tokens in the first stages")
    prefix: bool = knob(True, "also predict the target's longest prefix token")
    batch_schedule: bool = knob(True, "batches grow from stage to stage")
    window_schedule: bool = knob(True, "attention windows grow from stage to stage")
    short_documents: bool = knob(True, "documents are cut shorter in the first stage")
    attention_cap: bool = knob(
        True, "attention does not look across every 2,560th token of a document in training"
    )
    momentum_schedule: bool = knob(True, "Muon's momentum rises and falls again")
    polar_express: bool = knob(True, "orthogonalization; false: Newton-Schulz")
    normuon: bool = knob(True, "rows of Muon's updates have one size")
    cautious_decay: bool = knob(True, "decay only what the update moves outward")
    mantissa: bool = knob(True, "16 more bits for the bfloat16 weights of Muon")
    qk_pairs: bool = knob(True, "Q and K are orthogonalized by pairs of heads; false: whole")
    averaging: bool = knob(True, "the run ends with averages of its last quarter's weights")
    two_momenta: bool = knob(
        True, "Muon with a fast and a slow momentum and six rounds; takes --muon_wd=2.25"
    )
    sampled_softmax: bool = knob(True, "most steps score a part of the vocabulary only")
    canonical: bool = knob(False, "evaluate with impossible next tokens masked (beyond the record)")
    # Evaluation, log, checkpoints.
    eval_interval: int = knob(250, "steps between validations", low=1, high=10**9)
    eval_tokens: int = knob(10_485_760, "validation tokens, from the first on", low=1, high=1 << 40)
    eval_slice: int = knob(262_144, "tokens that are evaluated as one sequence", low=16, high=1 << 22)
    target_loss: float = knob(0.0, "what the run is to reach; 0: the recipe's target", low=0.0, high=100.0)
    log_interval: int = knob(1, "steps between log lines", low=1, high=10**9)
    save_interval: int = knob(0, "steps between checkpoints; 0: none but by the clock", low=0, high=10**9)
    save_minutes: float = knob(
        15.0, "most minutes of work that a lost machine may cost; 0: no limit", low=0.0, high=1e6
    )
    keep_checkpoints: int = knob(2, "checkpoints kept", low=1, high=1000)
    save_table: bool = knob(
        False, "checkpoints hold the table of n-grams whatever its size; else up to 2,000,000 rows"
    )
    wandb_log: bool = knob(False, "also log to Weights & Biases (WANDB_MODE=offline works)")
    wandb_project: str = knob("engaging-nanogpt", "Weights & Biases project")
    wandb_run_name: str = knob("", "Weights & Biases run name; default: the name of out_dir")
    # Hardware.
    device: str = knob("auto", "auto, cpu, cuda or cuda:N; auto takes the GPU when there is one")
    attention: str = knob("auto", "implementation of attention; auto: the fastest that is there",
                          choices=("auto", "varlen", "fa3", "triton", "reference"))  # fmt: skip
    fp8: str = knob("auto", "8-bit matrix products: auto (where the GPU has them: Ada, Hopper, later), force or off",
                    choices=("auto", "force", "off"))  # fmt: skip
    fp8_head: bool = knob(True, "... in the head")
    fp8_up: bool = knob(True, "... in the MLPs' up-projections")
    fp8_down: bool = knob(True, "... in the MLPs' down-projections")
    fp8_backward: bool = knob(
        True, "... and, with these two, in the four products of the MLPs' backward pass"
    )
    fp8_qkv: bool = knob(
        False, "... in the three products of the projections to Q, K and V (beyond record 89)"
    )
    memory_gib: float = knob(0.0, "GPU memory to do with, as on a smaller GPU; 0: all", low=0.0, high=1e6)
    compile: str = knob("auto", "torch.compile: true, false, or auto (on a GPU only)",
                        choices=("auto", "true", "false"))  # fmt: skip
    capture: str = knob("auto", "lanes as CUDA graphs: true, false, or auto (on a GPU only)",
                        choices=("auto", "true", "false"))  # fmt: skip
    warmup: bool = knob(True, "compile and warm up before the clock starts, then begin with fresh weights")
    compile_cache: str = knob("", "folder that keeps packed compile caches for later jobs; default: compile-caches "
                              "under data_root; none: keep nothing")  # fmt: skip
    backend: str = knob("auto", "of torch.distributed; auto: nccl on GPUs, gloo on CPUs",
                        choices=("auto", "nccl", "gloo"))  # fmt: skip
    deterministic: bool = knob(False, "bit-equal repeats on a GPU too, at some cost in speed")
    num_threads: int = knob(0, "CPU threads of each rank; 0: its share of the cores", low=0, high=4096)

    def __post_init__(self) -> None:
        """Contradictions between knobs: UserError with one line."""
        for flag, on in (
            ("init_from=resume", self.init_from == "resume"),
            ("auto_resume=true", self.auto_resume),
        ):
            if self.overwrite and on:
                raise UserError(
                    f"--overwrite=true with --{flag}: one starts afresh, the other goes on; keep one"
                )
        if {word for word in self.accept_changed.split(",") if word} - CHANGED_WORDS:
            raise UserError(f"--accept_changed={self.accept_changed}: expected any of config,data,torch")
        if not self.out_dir.strip():
            raise UserError("--out_dir=: the run needs a directory, for example --out_dir=out/my-run")
        _check_paths(self)
        _check_device(self)
        layer_plan.check(self)
        _check_table(self)
        _check_techniques(self)
        _check_steps(self)
        _check_lanes(self)


def made_for_gpt2(config: Config) -> list[str]:
    """The flags of `config` that need GPT-2's vocabulary."""
    names = ["prefix", "canonical", "normalised_grams"] + ["copy_input"] * (not config.vocab_size)
    return [name for name in names if getattr(config, name)]


@dataclass(frozen=True)
class Plan:
    """What follows from a Config and the number of ranks."""

    world_size: int
    lanes: int  # micro-batches in one step, over all ranks
    micro_steps: int  # of each rank in one step
    lane_tokens: tuple[int, ...]  # of one micro-batch, by stage
    total_steps: int
    total_tokens: int  # trained on in the whole run
    eval_slices: int  # pieces of one validation, over all ranks
    target_loss: float  # 0: none

    def lane(self, micro_step: int, rank: int) -> int:
        """Which of the step's lanes rank `rank` computes in its micro-step: the same lanes for every world size."""
        return micro_step * self.world_size + rank

    def describe(self, config: Config) -> str:
        """One line for the log."""
        ranks = "1 rank" if self.world_size == 1 else f"{self.world_size} ranks"
        sizes = " / ".join(f"{size:,}" for size in dict.fromkeys(self.lane_tokens))
        return (
            f"{config.recipe}: {self.total_steps:,} steps, {self.total_tokens / 1e6:,.1f} M tokens; a step is {ranks} "
            f"x {self.micro_steps} micro-steps x {sizes} tokens; validation on {config.eval_tokens:,} tokens in "
            f"{self.eval_slices} slices"
        )


def resolve(config: Config, world_size: int) -> Plan:
    """Lay the run out over `world_size` ranks, or refuse and say which numbers work."""
    lanes = lane_count(config)
    if world_size not in WORLD_SIZES:
        raise UserError(f"WORLD_SIZE={world_size}: the speedrun runs on 1, 2, 4 or 8 ranks; start so many")
    if lanes % world_size:
        raise UserError(
            f"--lanes={lanes}: does not divide into {world_size} ranks; --lanes={world_size * -(-lanes // world_size)} "
            "would"
        )
    stages = schedule.stages(config)
    return Plan(
        world_size=world_size,
        lanes=lanes,
        micro_steps=lanes // world_size,
        lane_tokens=lane_tokens(config),
        total_steps=schedule.total_steps(config),
        total_tokens=sum((stage.end - stage.start) * stage.batch_tokens for stage in stages),
        eval_slices=-(-config.eval_tokens // config.eval_slice),
        target_loss=config.target_loss or schedule.STAGES[config.recipe].target_loss,
    )


def lane_count(config: Config) -> int:
    """Micro-batches in one step over all ranks."""
    return config.lanes or LANES


def lane_tokens(config: Config) -> tuple[int, ...]:
    """Tokens of one micro-batch, by stage."""
    return tuple(stage.batch_tokens // lane_count(config) for stage in schedule.stages(config))


def _check_paths(config: Config) -> None:
    for name in ("out_dir", "data_root", "compile_cache"):
        refuse_unknown_home(name, getattr(config, name))


def _check_device(config: Config) -> None:
    check_device(config.device)
    if config.device != "cpu":
        return
    if config.fp8 == "force":
        raise UserError("--fp8=force: needs a GPU, but --device=cpu; use --fp8=auto or --fp8=off")
    if config.capture == "true":
        raise UserError(
            "--capture=true: needs a GPU, but --device=cpu; use --capture=auto or --capture=false"
        )
    if config.attention not in ("auto", "reference"):
        raise UserError(
            f"--attention={config.attention}: needs a GPU, but --device=cpu; use --attention=reference"
        )
    if config.backend == "nccl":
        raise UserError("--backend=nccl: needs GPUs, but --device=cpu; use --backend=gloo")


def _check_techniques(config: Config) -> None:
    if config.capture == "true" and not config.warmup:
        raise UserError("--capture=true: graphs are recorded in the warm-up; leave out --warmup=false")
    if config.fp8 == "force" and not (config.fp8_head or config.fp8_up or config.fp8_down or config.fp8_qkv):
        raise UserError("--fp8=force: nothing is left to compute with it; switch on --fp8_head, _up or _down")
    if config.key_offset and not config.half_rope:
        raise UserError(
            "--half_rope=false: the key offset needs the unrotated half of each head; add --key_offset=false"
        )
    if config.vocab_size == 1:
        raise UserError("--vocab_size=1: nothing is left to predict; 0 means GPT-2's 50,257")
    for name in ("canonical", "normalised_grams"):
        if getattr(config, name) and config.vocab_size:
            raise UserError(
                f"--{name}=true: is made for GPT-2's tokens, not --vocab_size={config.vocab_size}"
            )
    if config.sampled_softmax and config.vocab_size:
        raise UserError(
            f"--sampled_softmax=true: is made for GPT-2's vocabulary, not --vocab_size={config.vocab_size}; add "
            "--sampled_softmax=false"
        )


def _check_steps(config: Config) -> None:
    least = len(schedule.STAGES[config.recipe].stages)
    if schedule.scheduled_steps(config) < least:
        raise UserError(
            f"--steps={config.steps}: fewer than the {least} stages of --recipe={config.recipe}; --steps={least} is "
            "the least"
        )


def _check_lanes(config: Config) -> None:
    """Every stage's batch must divide into lanes of a size that the kernels take."""
    lanes, multiple = lane_count(config), 16 if config.recipe in layer_plan.CPU_RECIPES else 128
    for stage in schedule.stages(config):
        if stage.batch_tokens % (lanes * multiple):
            raise UserError(
                f"--lanes={lanes}: stage {stage.name}'s {stage.batch_tokens:,} tokens do not divide into {lanes} lanes "
                f"of a multiple of {multiple} tokens; --lanes=8, 16 or 32 do"
            )


def _check_table(config: Config) -> None:
    text = config.table_rows
    if text == "auto":
        return
    if not (text.isascii() and text.isdigit() and len(text) < 11):
        raise UserError(f"--table_rows={text}: expected auto or a number of rows")
    rows = int(text)
    if rows and not layer_plan.SIZES[config.recipe].table_rows:
        raise UserError(
            f"--table_rows={text}: --recipe={config.recipe} has no table of n-grams; leave it away, or start from the "
            "preset record"
        )
    if rows and not (LEAST_ROWS <= rows <= MOST_ROWS and rows % ROW_MULTIPLE == 0):
        near = min(MOST_ROWS, max(LEAST_ROWS, round(rows / ROW_MULTIPLE) * ROW_MULTIPLE))
        raise UserError(
            f"--table_rows={text}: expected 0, or a multiple of {ROW_MULTIPLE} from {LEAST_ROWS} to {MOST_ROWS:,}; "
            f"--table_rows={near}"
        )
