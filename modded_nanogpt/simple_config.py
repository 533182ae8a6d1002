"""Every knob of the small trainer (train_gpt_simple.py), and what follows from them. Standard library only.

argv and STAGE_* variables -> preset -> `Config` (frozen) -> `resolve(world_size)` -> `Plan`. A flag wins over a
variable, a variable over a preset. `--plan=FILE` names several runs; `read_plan` makes a command line of each.
"""

import dataclasses
import json
import os
from dataclasses import dataclass
from pathlib import Path

from nanogpt.common.errors import UserError
from nanogpt.common.flags import convert, knob, nearest, parse_values
from nanogpt.common.launch import SMOKE_STEPS
from nanogpt.common.machine import check_device, refuse_unknown_home

PROG = "python -m modded_nanogpt.train_gpt_simple"
PRESETS = Path(__file__).resolve().parent / "simple_presets"
WARMDOWN_SHARE = 0.7  # of the iterations, where nothing else is said
LARGEST_PLAN, MOST_RUNS = 1 << 20, 1000  # bytes and runs of a plan
PLAN_KEYS = ("out_dir", "seed", "variant", "optimizer", "flags")
# Of --smoke, at most. Muon's updates of GPT-2's matrices alone take a CPU a quarter of a minute a step.
SMOKE_BATCH = {"device_batch_size": 4, "sequence_length": 64}
SMOKE_LAYERS_ON_CPU, SMOKE_MODEL_ON_CPU = 4, {"model_dim": 64, "num_heads": 2}
STAGE_KNOBS = ("num_iterations", "warmdown_iters", "batch_size", "device_batch_size", "val_loss_every")

# What a resumed run may change: nothing that the losses depend on.
FREE = frozenset(
    [
        "out_dir", "data_root", "init_from", "auto_resume", "overwrite", "accept_changed", "new_source",
        "check", "plan",
        "val_loss_every", "val_steps", "target_val_loss", "log_interval", "save_interval", "save_minutes",
        "keep_checkpoints", "wandb_log", "wandb_project", "wandb_run_name",
        "device", "compile", "backend", "deterministic", "num_threads",
    ]
)  # fmt: skip


@dataclass(frozen=True)
class Config:
    """The command line of `train_gpt_simple.py`; the defaults are the preset `simple`."""

    # Where things are.
    out_dir: str = knob("out/simple", "the run directory")
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
    plan: str = knob(
        "", "a JSON list of {out_dir, seed, variant, optimizer, flags}: trained in turn, in one process"
    )
    # What is studied.
    variant: str = knob(
        "baseline", "baseline, palm_parallel, curriculum, depth_warm, or the path of a copy that you changed"
    )
    optimizer: str = knob(
        "muon", "of the matrices; embedding and head have Adam either way", choices=("muon", "adam")
    )
    seed: int = knob(1337, "of the weights; the order of the data is fixed", low=0, high=(1 << 31) - 1)
    # How long, and in which pieces.
    num_iterations: int = knob(3250, "optimizer steps", low=1, high=10**7)
    warmdown_iters: int = knob(
        -1, "last steps, in which the learning rates fall to 0; -1: 7 of 10", low=-1, high=10**7
    )
    stop_step: int = knob(
        0, "end here, on the schedule of --num_iterations; 0: at its end", low=0, high=10**7
    )
    batch_size: int = knob(512, "sequences in one step, over all GPUs", low=1, high=1 << 20)
    device_batch_size: int = knob(64, "sequences in one micro-step of one GPU", low=1, high=1 << 20)
    sequence_length: int = knob(1024, "tokens in a sequence", low=4, high=1 << 20)
    repeat_data: bool = knob(False, "begin at the first shard again when the training data is used up")
    # The model.
    num_layers: int = knob(12, "transformer layers", low=1, high=1000)
    num_heads: int = knob(6, "attention heads", low=1, high=1000)
    model_dim: int = knob(768, "width", low=8, high=65536)
    # Optimizers. Rates are the largest ones; all fall together in the warm-down.
    muon_lr: float = knob(0.025, "Muon's learning rate", low=0.0, high=1e3)
    muon_wd: float = knob(0.01, "Muon's decoupled weight decay", low=0.0, high=1e3)
    adam_lr: float = knob(
        0.0015, "Adam's learning rate of the matrices, for --optimizer=adam", low=0.0, high=1e3
    )
    adam_wd: float = knob(0.125, "... its decoupled weight decay", low=0.0, high=1e3)
    adam_warmup: int = knob(250, "... its steps of linear warm-up", low=0, high=10**7)
    embed_lr: float = knob(0.3, "Adam's learning rate of the embedding", low=0.0, high=1e3)
    head_lr: float = knob(1 / 320, "Adam's learning rate of the head", low=0.0, high=1e3)
    # Validation, log, checkpoints.
    val_loss_every: int = knob(125, "steps between validations; 0: at the end only", low=0, high=10**9)
    val_steps: str = knob("", "validate after these steps too: 2745,2750,2755")
    val_tokens: int = knob(
        10_485_760, "tokens of the fixed validation text; 0: all there are", low=0, high=1 << 50
    )
    target_val_loss: float = knob(3.28, "the loss to reach, for the log; 0: none", low=0.0, high=1e3)
    log_interval: int = knob(1, "steps between log lines", low=1, high=10**9)
    save_interval: int = knob(0, "steps between checkpoints; 0: by the clock alone", low=0, high=10**9)
    save_minutes: float = knob(
        15.0, "most minutes of work that a lost machine may cost; 0: no limit", low=0.0, high=1e6
    )
    keep_checkpoints: int = knob(2, "checkpoints kept", low=1, high=1000)
    wandb_log: bool = knob(False, "also log to Weights & Biases (WANDB_MODE=offline works)")
    wandb_project: str = knob("engaging-nanogpt", "Weights & Biases project")
    wandb_run_name: str = knob("", "Weights & Biases run name; default: the name of out_dir")
    # Hardware.
    device: str = knob("auto", "auto, cpu, cuda or cuda:N; auto takes the GPU when there is one")
    compile: str = knob("auto", "torch.compile: true, false, or auto (on a GPU only)",
                        choices=("auto", "true", "false"))  # fmt: skip
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
        if {word for word in self.accept_changed.split(",") if word} - {"config", "data", "torch"}:
            raise UserError(f"--accept_changed={self.accept_changed}: expected any of config,data,torch")
        if not self.out_dir.strip():
            raise UserError("--out_dir=: the run needs a directory, for example --out_dir=out/my-run")
        _check_shape(self)
        _check_paths_and_device(self)


@dataclass(frozen=True)
class Plan:
    """What follows from a Config and the number of ranks."""

    world_size: int
    total_steps: int  # of the schedule
    end_step: int  # where the run ends
    warmdown_steps: int
    tokens_per_step: int  # over all ranks
    micro_steps: int  # of each rank in one step

    def describe(self, config: Config) -> str:
        """One line for the log."""
        ranks = "1 rank" if self.world_size == 1 else f"{self.world_size} ranks"
        ends = "" if self.end_step == self.total_steps else f", stopped after {self.end_step:,}"
        return (
            f"{config.variant}, {config.optimizer}: {self.total_steps:,} steps, the last "
            f"{self.warmdown_steps:,} of them warm-down{ends}; {self.tokens_per_step:,} tokens a step = {ranks} x "
            f"{self.micro_steps} micro-steps x "
            f"{config.device_batch_size} sequences x {config.sequence_length} tokens; "
            f"{self.end_step * self.tokens_per_step / 1e6:,.1f} M tokens"
        )


def resolve(config: Config, world_size: int) -> Plan:
    """Lay the run out over `world_size` ranks, or refuse and say which numbers work."""
    unit = config.device_batch_size * world_size
    if config.batch_size % unit:
        share, rest = divmod(config.batch_size, world_size)
        sizes = [size for size in range(min(config.device_batch_size, share), 0, -1) if share % size == 0]
        remedy = f"--device_batch_size={sizes[0]} would" if sizes and not rest else (
            f"--batch_size={-(-config.batch_size // unit) * unit} would"
        )  # fmt: skip
        raise UserError(
            f"--batch_size={config.batch_size}: does not divide into {world_size} "
            f"rank{'s' * (world_size > 1)} x {config.device_batch_size} sequences; {remedy}"
        )
    warmdown = config.warmdown_iters
    if warmdown < 0:
        warmdown = round(WARMDOWN_SHARE * config.num_iterations)
    return Plan(
        world_size=world_size,
        total_steps=config.num_iterations,
        end_step=end_step(config),
        warmdown_steps=warmdown,
        tokens_per_step=config.batch_size * config.sequence_length,
        micro_steps=config.batch_size // unit,
    )


def end_step(config: Config) -> int:
    """The step after which the run ends."""
    return config.stop_step or config.num_iterations


def steps_named(text: str) -> tuple[int, ...]:
    """The numbers of --val_steps. UserError for anything else."""
    words = [word.strip() for word in text.split(",") if word.strip()]
    bad = next((word for word in words if not word.isdecimal() or int(word) > 10**7), None)
    if bad is not None:
        raise UserError(f"--val_steps={text[:60]}: {bad[:20]!r} is no step; write them as 2745,2750,2755")
    return tuple(map(int, words))


def lr_factor(plan: Plan, step: int) -> float:
    """Of all learning rates: 1, then linearly to 0 over the last `warmdown_steps` steps."""
    return min(1.0, (plan.total_steps - step) / max(1, plan.warmdown_steps))


def smoke_sizes(values: dict[str, object], on_gpu: bool, world_size: int) -> dict[str, object]:
    """What --smoke puts in place of the knobs `values`."""
    small = {"num_iterations": SMOKE_STEPS, "warmdown_iters": -1, "val_loss_every": 0, "target_val_loss": 0.0,
             "log_interval": 1, "repeat_data": True, "compile": "false", "wandb_log": False}  # fmt: skip
    for name, most in SMOKE_BATCH.items():
        small[name] = min(int(values.get(name, getattr(Config, name))), most)
    if not on_gpu:
        small["num_layers"] = min(int(values.get("num_layers", Config.num_layers)), SMOKE_LAYERS_ON_CPU)
        wide = int(values.get("model_dim", Config.model_dim)) > SMOKE_MODEL_ON_CPU["model_dim"]
        small |= SMOKE_MODEL_ON_CPU if wide else {}
    small["batch_size"] = small["device_batch_size"] * world_size
    return {**small, "val_tokens": 4 * small["device_batch_size"] * small["sequence_length"]}


def values_of(argv: list[str], description: str) -> dict[str, object]:
    """The knobs that presets, STAGE_* variables and flags set. UserError for whatever they may not be."""
    fields = {field.name: field for field in dataclasses.fields(Config)}
    staged = []
    for name in STAGE_KNOBS:
        text = os.environ.get(variable := f"STAGE_{name.upper()}", "")
        if text:
            staged.append(f"--{name}={convert(fields[name], text, variable)}")
    return parse_values(Config, [*staged, *argv], prog=PROG, description=description, presets=PRESETS)


def read_plan(path: Path, common: dict[str, object]) -> list[dict[str, object]]:
    """The knobs of every run of a plan, on top of `common`. UserError names the file, the entry and the field."""
    fields = {field.name: field for field in dataclasses.fields(Config)}
    entries, runs, seen = _plan_entries(path), [], {}
    for number, entry in enumerate(entries):
        where = f"{path}: [{number}]"
        if not isinstance(entry, dict):
            raise UserError(f"{where}: expected an object with {', '.join(PLAN_KEYS)}")
        flags = entry.get("flags", {})
        if not isinstance(flags, dict):
            raise UserError(f"{where}.flags: expected an object of flags and their values")
        named = [(key, f"{where}.{key}", entry[key]) for key in entry if key != "flags"]
        named += [(key, f"{where}.flags.{key}", flags[key]) for key in flags]
        values = dict(common)
        for key, spelled, value in named:
            known = PLAN_KEYS if spelled == f"{where}.{key}" else list(fields)
            if key not in known:
                raise UserError(f"{spelled}: there is no such {'key' if known is PLAN_KEYS else 'flag'}"
                                f"{nearest(key, known)}")  # fmt: skip
            if key in ("plan", "check", "init_from", "overwrite") or (key in entry and key in flags):
                raise UserError(f"{spelled}: cannot be said here; say it once, or on the command line")
            values[key] = convert(fields[key], value, spelled)
        folder = Path(str(values["out_dir"])).expanduser().absolute() if "out_dir" in entry else None
        if folder is None or folder in seen:
            why = "missing" if folder is None else f"the same as that of [{seen[folder]}]"
            raise UserError(f"{where}.out_dir: {why}; every run needs a directory of its own")
        seen[folder] = number
        runs.append({**values, "out_dir": str(folder), "auto_resume": True, "plan": ""})
    return runs


def _plan_entries(path: Path) -> list:
    def no_repeats(pairs: list[tuple[str, object]]) -> dict[str, object]:
        names = [name for name, _ in pairs]
        if len(set(names)) < len(names):
            raise ValueError(f"{max(names, key=names.count)!r} stands there twice")
        return dict(pairs)

    try:
        if path.stat().st_size > LARGEST_PLAN:
            raise UserError(f"--plan={path}: larger than {LARGEST_PLAN:,} bytes; make several plans of it")
        found = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=no_repeats)
    except OSError as error:
        raise UserError(f"--plan={path}: cannot be read: {error.strerror}; name a JSON file") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"--plan={path}: not JSON: {error}") from None
    if not isinstance(found, list) or not 0 < len(found) <= MOST_RUNS:
        raise UserError(f"--plan={path}: expected a list of 1 to {MOST_RUNS} runs")
    return found


def _check_shape(config: Config) -> None:
    head_dim, rest = divmod(config.model_dim, config.num_heads)
    if rest or head_dim % 4:
        raise UserError(
            f"--model_dim={config.model_dim}: heads need a multiple of 4 numbers each, {config.num_heads} heads do not "
            f"get that; --model_dim={max(4, head_dim // 4 * 4) * config.num_heads} would do"
        )
    if config.warmdown_iters > config.num_iterations:
        near = round(WARMDOWN_SHARE * config.num_iterations)
        raise UserError(
            f"--warmdown_iters={config.warmdown_iters}: more than --num_iterations={config.num_iterations}; "
            f"--warmdown_iters={near} is 7 of 10"
        )
    end = end_step(config)
    if end > config.num_iterations:
        raise UserError(
            f"--stop_step={config.stop_step}: more than --num_iterations={config.num_iterations}; leave it away"
        )
    if late := [step for step in steps_named(config.val_steps) if step > end]:
        raise UserError(f"--val_steps={config.val_steps}: the run ends after step {end}, before {late[0]}")
    if config.val_tokens and config.val_tokens < config.sequence_length:
        raise UserError(
            f"--val_tokens={config.val_tokens}: less than one sequence of {config.sequence_length} tokens; "
            f"--val_tokens={config.sequence_length} is the least"
        )


def _check_paths_and_device(config: Config) -> None:
    for name in ("out_dir", "data_root"):
        refuse_unknown_home(name, getattr(config, name))
    check_device(config.device)
    if config.device == "cpu" and config.backend == "nccl":
        raise UserError("--backend=nccl: needs GPUs, but --device=cpu; use --backend=gloo")
