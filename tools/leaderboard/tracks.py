"""Tracks: what a result is measured against. Three are built in; a board's own stand in its board.json."""

from dataclasses import dataclass, field

from nanogpt.common.errors import UserError
from nanogpt.common.flags import nearest

# kjj0/fineweb10B-gpt2 on the Hugging Face hub: the digests that the hub states for these files.
FINEWEB_VAL = "5b95c8e0966f0861685b307b23dc5ae42b228ef74b28cb499784ae021f201640"
FINEWEB_TRAIN_1 = "771fa4a99b9fe0946ffb6e848b4ba5c6a9b0fe87860ebf03bc2c1c7e45f8178e"
SPEEDRUN_VAL_TOKENS = 10_485_760  # the first 10 * 2^20 tokens of the validation shard


@dataclass(frozen=True)
class Track:
    """One contest. `metric` is what counts: "seconds" (of training) or "steps".

    `test` is how the target must be met: "t", one-sided one-sample t-test at `alpha`; "z", the known-sigma rule
    of modded-nanogpt's track 3; "mean", no test: for practice boards, and their pages say so.
    """

    name: str
    title: str
    target: float  # validation loss, nats a token
    metric: str
    test: str
    val_sha256: str  # of the one validation file
    val_tokens: int
    vocab_size: int
    alpha: float = 0.01
    min_runs: int = 2
    entries: tuple[str, ...] = ()  # trainers that may enter; () means any
    recipes: tuple[str, ...] = ()  # of the speedrun's trainer (--recipe); () means any
    loss_floor: float = 0.0  # below it, no model of this size has read honest tokens
    flops_per_token: float = 0.0  # of the reference model, forward and backward; 0: from the run's own shape
    marks: bool = False  # the trainer must have marked the run eligible
    pinned: dict[str, str] = field(default_factory=dict)  # training files whose digest is known
    template: tuple[str, str] = ("", "")  # (source, recipe) digests that everybody starts from


TRACK1 = Track(
    name="track1", title="Speedrun: GPT-2 small to 3.28", target=3.28, metric="seconds", test="t",
    val_sha256=FINEWEB_VAL, val_tokens=SPEEDRUN_VAL_TOKENS, vocab_size=50_304,
    entries=("modded_nanogpt/train_gpt.py",), recipes=("record", "snapshot"), loss_floor=2.7,
    flops_per_token=0.685e9, marks=True,
    pinned={"fineweb_train_000001.bin": FINEWEB_TRAIN_1},
)  # fmt: skip
MEDIUM = Track(
    name="medium", title="Speedrun: GPT-2 medium to 2.92", target=2.92, metric="seconds", test="t",
    val_sha256=FINEWEB_VAL, val_tokens=SPEEDRUN_VAL_TOKENS, vocab_size=50_304,
    entries=("modded_nanogpt/train_gpt_medium.py", "modded_nanogpt/train_gpt.py"), recipes=("medium",), loss_floor=2.4,
    flops_per_token=1.5e9, marks=True, pinned={"fineweb_train_000001.bin": FINEWEB_TRAIN_1},
)  # fmt: skip
STEPS = Track(
    name="steps", title="Fewest steps to 3.28, any GPU", target=3.28, metric="steps", test="z",
    val_sha256=FINEWEB_VAL, val_tokens=SPEEDRUN_VAL_TOKENS, vocab_size=50_304,
    entries=("modded_nanogpt/train_gpt_simple.py",), loss_floor=2.7, flops_per_token=0.7e9,
    pinned={"fineweb_train_000001.bin": FINEWEB_TRAIN_1},
)  # fmt: skip
BUILT_IN = {track.name: track for track in (TRACK1, MEDIUM, STEPS)}


def find(name: str, tracks: dict[str, Track]) -> Track:
    """The track of that name. UserError with the nearest one."""
    if name not in tracks:
        known = ", ".join(tracks)
        raise UserError(
            f"--track={ascii(name)[1:41]}: no such track{nearest(name, list(tracks))} (here: {known})"
        )
    return tracks[name]
