"""The stages of each recipe: batches, windows, lengths of documents and loss weights, before a run's length is known.

`schedule` stretches them over a run's steps. Their sources stand there.
"""

from dataclasses import dataclass, replace

Ramp = tuple[float, float]  # a value at the start of a stage and at its end, linear in between

BLOCK = 128  # tokens; windows are multiples of it
MTP_THREE = ((1.0, 1.0), (0.5, 0.5), (0.25, 0.0))
MTP_TWO = ((1.0, 1.0), (0.5, 0.0), (0.0, 0.0))
MTP_ONE = ((1.0, 1.0), (0.0, 0.0), (0.0, 0.0))


@dataclass(frozen=True)
class Stage:
    """Steps `start` to `end` (exclusive) of a run. In `STAGES` both are 0: they follow from the number of steps."""

    name: str
    batch_tokens: int  # in one optimizer step over all ranks
    max_document: int  # tokens; the rest of a longer document is not trained on
    short_window: int  # tokens
    long_window: int  # tokens
    lr_factor: float
    mtp: tuple[Ramp, Ramp, Ramp] = MTP_ONE  # loss weights of the next, second next and third next token
    prefix: Ramp = (0.0, 0.0)  # loss weight of the target's longest prefix token
    prefix_levels: int = (
        0  # in so many equal parts of the stage it stays, each time at the part's beginning; 0: linear
    )
    start: int = 0
    end: int = 0


@dataclass(frozen=True)
class Recipe:
    """The schedule of a recipe before its length is known."""

    steps: int  # scheduled ones
    extension_steps: int
    stages: tuple[Stage, ...]
    extension: Stage
    ends: tuple[int, ...]  # of the stages, in parts of which the last one's end is the whole
    final_window: tuple[int, int]  # short and long of the last validation, in tokens
    untie_after: int  # stages with tied embeddings
    constant_batch: int  # the stage whose batch and learning rate hold without a batch schedule
    yarn_limit: int  # tokens; wider windows do not move the rotary frequencies any more
    target_loss: float  # 0: none
    boundary_up: bool = False  # stage boundaries are rounded up, not to the nearest step
    attention_cap: int = (
        0  # tokens; longer documents are cut into segments for attention alone; 0: they are not
    )


def _blocks(
    name: str, batch: int, document: int, short: int, long: int, factor: float, *more: object
) -> Stage:
    return Stage(name, batch, document, short * BLOCK, long * BLOCK, factor, *more)


def _medium(
    steps: int, extension_steps: int, batch: int, document: int, block: int, target_loss: float
) -> Recipe:
    """Twelve stages: the batch (tokens of the first) grows in three, the long window (in blocks) until the ninth."""
    long = [3, 7, 11, 13, 15, 17, 19, 21, 23, 23, 23, 23]
    size = [batch, 2 * batch, 3 * batch, *[4 * batch] * 9]
    factor = [1.0, 1.52, 1.73, *[2.0] * 9]
    mtp = [MTP_THREE, MTP_TWO, *[MTP_ONE] * 10]
    stages = tuple(
        Stage(
            str(k + 1), size[k], document, min(11, long[k] // 2) * block, long[k] * block, factor[k], mtp[k]
        )
        for k in range(12)
    )
    return Recipe(
        steps=steps,
        extension_steps=extension_steps,
        stages=stages,
        extension=replace(stages[-1], name="extension"),
        ends=tuple(range(1, 13)),
        final_window=(11 * block, 27 * block),
        untie_after=2,
        constant_batch=11,
        yarn_limit=13 * block,
        target_loss=target_loss,
        boundary_up=True,
    )


def _thirds(steps: int, extension_steps: int, first_document: int) -> Recipe:
    """Three stages and an extension; documents of the first stage are cut at `first_document` tokens."""
    return Recipe(
        steps=steps,
        extension_steps=extension_steps,
        stages=(
            _blocks("1", 131_072, first_document, 1, 3, 1.0, MTP_THREE, (0.25, 0.25)),
            _blocks("2", 262_144, 2048, 3, 7, 1.52, MTP_TWO, (0.25, 0.0)),
            _blocks("3", 393_216, 2048, 5, 11, 1.73),
        ),
        extension=_blocks("extension", 393_216, 2048, 6, 13, 1.73),
        ends=(1, 2, 3),
        final_window=(6 * BLOCK, 20 * BLOCK),
        untie_after=2,
        constant_batch=1,
        yarn_limit=13 * BLOCK,
        target_loss=3.28,
    )


_TINY = Recipe(
    steps=48,
    extension_steps=3,
    stages=(
        Stage("1", 2048, 96, 16, 32, 1.0, MTP_THREE, (0.25, 0.25)),
        Stage("2", 4096, 256, 16, 48, 1.52, MTP_TWO, (0.25, 0.0)),
        Stage("3", 6144, 256, 24, 56, 1.73),
    ),
    extension=Stage("extension", 6144, 256, 32, 64, 1.73),
    ends=(1, 2, 3),
    final_window=(32, 96),
    untie_after=2,
    constant_batch=1,
    yarn_limit=64,
    target_loss=0.0,
)

STAGES: dict[str, Recipe] = {
    "record": Recipe(
        steps=1174,
        extension_steps=20,
        stages=(
            _blocks("1", 131_072, 896, 1, 3, 1.0, MTP_THREE, (0.25, 0.25)),
            _blocks("2", 262_144, 2048, 3, 7, 1.52, MTP_TWO, (0.2, 0.0), 4),
            _blocks("3", 393_216, 3072, 5, 11, 1.73),
            _blocks("taper", 327_680, 3072, 5, 11, 1.579),
        ),
        extension=_blocks("extension", 131_072, 3072, 6, 13, 1.0),
        ends=(320, 681, 1107, 1174),
        final_window=(6 * BLOCK, 20 * BLOCK),
        untie_after=4,
        constant_batch=1,
        yarn_limit=13 * BLOCK,
        target_loss=3.28,
        attention_cap=2560,
    ),
    "record89": _thirds(1270, 15, first_document=896),
    "snapshot": _thirds(1515, 40, first_document=2048),
    "medium": _medium(4700, 40, batch=131_072, document=4096, block=BLOCK, target_loss=2.92),
    "tiny": replace(
        _TINY,
        stages=(
            _TINY.stages[0],
            replace(_TINY.stages[1], prefix=(0.2, 0.0), prefix_levels=4),
            _TINY.stages[2],
            replace(_TINY.stages[2], name="taper", batch_tokens=4096, lr_factor=1.52),
        ),
        extension=replace(_TINY.extension, batch_tokens=2048, lr_factor=1.0),
        ends=(13, 28, 44, 48),
        untie_after=4,
        attention_cap=192,
    ),
    "tiny_record89": _TINY,
    "tiny_snapshot": _TINY,
    "tiny_medium": _medium(48, 3, batch=1024, document=256, block=8, target_loss=0.0),
}
