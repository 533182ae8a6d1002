"""Which layer has what: the only place with layer numbers in it.

A recipe's map is a table of rows; `layers(config)` returns it with the techniques that the config switches off taken
out. What the model and the optimizer need besides (how many attention layers, which gates in which order, which
residuals are kept for later layers) is derived from that.
"""

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from modded_nanogpt.sizes import SIZES, Size
from nanogpt.common.errors import UserError

if TYPE_CHECKING:
    from modded_nanogpt.config import Config

VOCABULARY_MULTIPLE = 128  # the vocabulary is padded to a multiple of it for the matrix units
# The two gate networks: on the embedding, and on the residual at the start of a middle layer.
PRE, POST = 0, 1


CPU_RECIPES = tuple(name for name in SIZES if name.startswith("tiny"))  # small enough to train without a GPU

# Techniques that a make has no place for; its preset switches them off, and switching one on is refused.
_LATEST = ("narrow_heads", "depth_cut", "second_mlp", "grouped_mudd", "attention_cap", "normalised_grams")
LACKS: dict[str, tuple[str, ...]] = {
    "record": ("dc",),
    "record89": _LATEST,
    "snapshot": (*_LATEST, "bigram_signs", "cached_attention", "input_gates", "mudd", "xsa", "dc", "copy_input",
                 "copy_pointer"),
    "medium": (*_LATEST, "paired_heads", "bigram", "bigram_signs", "cached_attention", "input_gates", "mudd", "xsa",
               "dc", "attention_at_6", "copy_input", "copy_pointer"),
}  # fmt: skip

# Softmax scales at the start of training, by the rotary tables that queries and keys of norm sqrt(D) are turned with:
# those follow the short or the long window (`schedule.yarn_windows`).
SOFTMAX_SCALES: dict[str, dict[str, float]] = {
    "record": {"short": 0.13, "long": 0.085},
    "record89": {"long": 0.1},
    "snapshot": {"long": 0.1},
    "medium": {"long": 0.1},
}


@dataclass(frozen=True)
class Layer:
    """What one layer does."""

    index: int
    attention: bool = True
    bank: int | None = None  # which slot of the attention banks; None without attention
    qk_width: int = 0  # of each head's queries and keys: the first so many rows of those in the bank
    v_width: int = 0  # of each head's values
    window: str = "short"  # or "long": see `schedule`
    rotary: str = "long"  # the tables that turn its queries and keys follow the "short" or the "long" window
    mlps: tuple[int, ...] = ()  # slots of the MLP bank; two MLPs read the same input
    paired: bool = False  # heads in pairs share a softmax
    key_offset: bool = False  # the unrotated half of each key is the previous token's
    value_embed: int | None = None  # the value table added to V
    value_gate: int | None = None  # which of the value gates scales it: each such layer has one
    xsa: bool = False  # learnable removal of the value's own direction
    attention_gate: bool = False  # a gate on each head's output
    cached_input: bool = False  # attends from the residual that `cached_source` kept, not from its own
    skip_from: int | None = None  # the layer whose kept output is added before this one
    inject: tuple[str, ...] = ()  # what is added behind the attention's place: "x0" (the embedding), "bigram"
    keep_output: bool = False  # a later layer or the end of the network reads this layer's output
    mudd: bool = False  # gated sums of earlier residuals feed this layer, and the end of the network
    dc: bool = False  # dynamically composed heads


@dataclass(frozen=True)
class Gate:
    """One entry of a gate network's output: columns `start` to `start + width` belong to `layer`."""

    name: str  # "xsa", "attention_gate", "x0", "bigram", "skip", "dc_w1" or "dc_w2"
    layer: int
    tier: int  # PRE or POST
    start: int
    width: int  # one a head, or 1
    init: float  # its value at the start of training, whatever the input


@dataclass(frozen=True)
class _Map:
    """A recipe's layers as a table."""

    long: tuple[int, ...]
    without_attention: tuple[int, ...] = ()
    cut_attention: tuple[int, ...] = ()  # further ones that have none with `depth_cut`
    cut_mlp: tuple[int, ...] = ()  # without an MLP then
    second_mlp: int | None = None
    narrow: tuple[int, ...] = ()  # queries and keys of half the width, all of which turns
    narrow_values: tuple[int, ...] = ()
    paired: tuple[int, ...] = ()
    x0: tuple[int, ...] = ()  # layers behind whose attention the embedding is added
    bigram: tuple[int, ...] = ()  # the same of the bigram; layer 0 adds it before its attention
    value_embeds: tuple[tuple[int, int], ...] = ()  # (layer, table)
    xsa: tuple[int, ...] = ()
    attention_gates: tuple[int, ...] = ()
    cached: tuple[int, ...] = ()  # layers that attend from the output of `cached_source`
    cached_source: int | None = None
    skips: tuple[tuple[int, int], ...] = ()  # (from, to)
    mudd: int | None = None
    mudd_sources: tuple[int, ...] = ()  # layers whose outputs it reads: an early and a late one
    backout: int | None = None  # the layer whose output is in part subtracted at the end, where MUDD does not
    dc: tuple[int, ...] = ()
    second_tier: int = 4  # the layer at whose start the second gate network is evaluated


_MAPS: dict[str, _Map] = {  # by make
    "record": _Map(
        long=(3, 10),
        without_attention=(6,),
        cut_attention=(4, 7, 9),
        cut_mlp=(7,),
        second_mlp=8,
        narrow=(0, 1, 2, 4, 5, 7, 8, 9),
        narrow_values=(1, 8),
        paired=(0, 2, 5),
        x0=(0, 1, 2, 4, 5, 7),
        bigram=(0, 1, 4, 5, 9),
        value_embeds=((1, 0), (2, 1), (8, 2), (10, 3)),
        xsa=(1, 3),
        attention_gates=(3, 10),
        cached=(8, 9, 10),
        cached_source=7,
        skips=((3, 6),),
        mudd=10,
        mudd_sources=(3, 7),
    ),
    "record89": _Map(
        long=(3, 10),
        without_attention=(6,),
        paired=(0, 2, 5, 9),
        x0=(0, 1, 2, 3, 4, 5, 7, 8, 9),
        bigram=(0, 1, 2, 3, 4, 5, 7, 8, 9),
        value_embeds=((1, 0), (2, 1), (8, 2), (9, 3), (10, 4)),
        xsa=(1, 3, 4, 7),
        attention_gates=(3, 10),
        cached=(8, 9, 10),
        cached_source=7,
        skips=((3, 6),),
        mudd=10,
        mudd_sources=(3, 7),
        dc=(10,),
    ),
    "snapshot": _Map(
        long=(3, 10),
        without_attention=(6,),
        paired=(0, 2, 5, 9),
        value_embeds=((0, 0), (1, 1), (8, 2), (9, 3), (10, 4)),
        attention_gates=(0, 1, 2, 3, 4, 5, 7, 8, 9, 10),
        skips=((3, 6),),
        backout=7,
    ),
    "medium": _Map(
        long=(0, 4, 11, 15),
        value_embeds=tuple((layer, layer % 11) for layer in (0, 1, 2, 3, 4, 11, 12, 13, 14, 15)),
        attention_gates=tuple(range(16)),
        skips=((6, 9), (4, 10), (2, 11)),
        backout=11,
    ),
}


def size(config: "Config") -> Size:
    """The sizes of the config's model: its recipe's, with the vocabulary of `--vocab_size` where that is set."""
    found = SIZES[config.recipe]
    if not config.vocab_size:
        return found
    classes = config.vocab_size + config.copy_pointer  # of which one row behind the vocabulary is the slot
    padded = math.ceil(classes / VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
    return replace(found, vocab=config.vocab_size, padded_vocab=padded)


def table_rows(config: "Config") -> int:
    """Rows of the table of hashed n-grams; 0: there is none. `auto` is the recipe's, until `table_plan` settles it."""
    if not config.bigram:
        return 0
    return SIZES[config.recipe].table_rows if config.table_rows == "auto" else int(config.table_rows)


def bigram_rows(config: "Config") -> int:
    """Rows of the bigram table, a parameter of the model; 0: there is none, or the table of n-grams has its place."""
    return 0 if table_rows(config) or not config.bigram else SIZES[config.recipe].bigram_rows


def layers(config: "Config") -> tuple[Layer, ...]:
    """All layers in order, as the config has them."""
    table, found, count = _map(config), [], SIZES[config.recipe].layers
    banks = mlps = 0
    for index in range(count):
        cut = config.depth_cut and index in table.cut_attention
        attention = not cut and (index not in table.without_attention or config.attention_at_6)
        mlp = () if config.depth_cut and index in table.cut_mlp else (mlps,)
        skip, inject = _skip_into(table, config, index), _injected(table, config, index)
        layer = Layer(index, attention, mlps=mlp, skip_from=skip, inject=inject)
        found.append(_with_attention(layer, table, config, banks) if attention else layer)
        banks, mlps = banks + attention, mlps + len(mlp)
    read = _outputs_read(table, config)
    found = [replace(layer, keep_output=layer.index in read) for layer in found]
    if config.second_mlp and table.second_mlp is not None:  # its slot is the bank's last
        layer = found[table.second_mlp]
        found[layer.index] = replace(layer, mlps=(*layer.mlps, mlps))
    return tuple(found)


def mlp_count(config: "Config") -> int:
    """Slots of the MLP bank."""
    return sum(len(layer.mlps) for layer in layers(config))


def matrix_weights(config: "Config") -> int:
    """How many weights of layers' matrices one token meets: for the count of operations."""
    found = size(config)
    columns = sum(2 * layer.qk_width + 2 * layer.v_width for layer in layers(config)) * found.heads
    return columns * found.width + 2 * mlp_count(config) * found.mlp_width * found.width


def softmax_scales(config: "Config") -> dict[str, float]:
    """{which rotary tables: the softmax scale that training begins with}, for the tables that the layers use."""
    used = {layer.rotary for layer in layers(config) if layer.attention}
    return {name: scale for name, scale in SOFTMAX_SCALES[SIZES[config.recipe].make].items() if name in used}


def cached_source(config: "Config") -> int | None:
    """The layer whose output the late layers attend from; None when each attends from its own residual."""
    return _map(config).cached_source if config.cached_attention else None


def backout(config: "Config") -> int | None:
    """The layer whose output is in part subtracted from the last one; None where MUDD, or nothing, does that."""
    return _map(config).backout


def mudd_sources(config: "Config") -> tuple[int, ...]:
    """The layers, an early and a late one, whose outputs MUDD reads."""
    return _map(config).mudd_sources


def second_tier(config: "Config") -> int:
    """The layer at whose start the second gate network sees the residual."""
    return _map(config).second_tier


def attention_layers(config: "Config") -> tuple[int, ...]:
    """Indices of the layers with attention; the place in this tuple is the slot in the attention banks."""
    return tuple(layer.index for layer in layers(config) if layer.attention)


def check(config: "Config") -> None:
    """UserError for a technique that the recipe has no place for."""
    for name in LACKS[SIZES[config.recipe].make]:
        if getattr(config, name):
            raise UserError(
                f"--{name}=true: --recipe={config.recipe} has no place for it; --{name}=false, or start from the "
                f"preset {SIZES[config.recipe].make}"
            )


def gates(config: "Config") -> tuple[tuple[Gate, ...], tuple[Gate, ...]]:
    """The outputs of the two gate networks in the order of their columns: 23 and 13 in the record.

    Without `input_gates` the same entries are learned numbers, laid out the same way, the first network's first. The
    snapshot's and the medium model have none: their gates are sigmoids of a few channels.
    """
    if SIZES[config.recipe].make in ("snapshot", "medium"):
        return (), ()
    plan, heads = layers(config), size(config).heads
    tiers: tuple[list[Gate], list[Gate]] = ([], [])

    def add(name: str, layer: int, width: int, init: float) -> None:
        tier = PRE if layer < second_tier(config) else POST
        columns = tiers[tier]
        start = columns[-1].start + columns[-1].width if columns else 0
        columns.append(Gate(name, layer, tier, start, width, init))

    for layer in plan:
        if layer.xsa:
            add("xsa", layer.index, heads, 0.0)
    for layer in plan:
        if layer.attention_gate:
            add("attention_gate", layer.index, heads, 0.25)
    for layer in plan:
        for name in layer.inject:
            add(name, layer.index, 1, 0.05 if name == "bigram" else 0.0)
    for layer in plan:
        if layer.skip_from is not None:
            add("skip", layer.index, 1, 0.5)
    for layer in plan:
        if layer.dc:
            add("dc_w1", layer.index, heads, 1.0)
            add("dc_w2", layer.index, heads, 0.0)
    return tuple(tiers[PRE]), tuple(tiers[POST])


def gate_width(config: "Config") -> int:
    """Output rows of each gate network: the larger of the two, since both live in one tensor."""
    return max((gate.start + gate.width for tier in gates(config) for gate in tier), default=0)


ROOT_OF_GROWTH = math.sqrt(1.1)  # the residual's own weight, for attention and for the MLP of each layer

# The outputs of the first MUDD network in order: (name, value at the start). Where each goes stands before the "_",
# what it weighs behind it: c0, c3, c7, c9 are the residuals at the model's input, after layers 3 and 7, and before
# the last layer, x the current one, y the layer's own result.
MUDD_OUTPUTS: tuple[tuple[str, float], ...] = (
    ("v_c0", 0.0), ("v_c7", 0.0), ("v_x", 0.0),
    ("x_c0", 0.0), ("x_c7", 0.0), ("x_x", 0.0),
    ("value_gate_low", 2.0), ("value_gate_high", 2.0),
    ("attention_x", ROOT_OF_GROWTH), ("attention_y", 1.0), ("attention_c0", 0.0), ("attention_bigram", 0.05),
    ("mlp_x", ROOT_OF_GROWTH), ("mlp_y", 1.0),
)  # fmt: skip
# What the second network weighs at the end of the network, in order: residuals, rows of value tables, and what the
# last layer's MLP (u) and attention (late) read. "Backout": the late residual begins at -0.5, all others at 0.
BACKED_OUT, BACKOUT_START = "c7", -0.5
_END_SOURCES = {
    "record": ("c0", "c7", "c9", "value_0", "c3", "value_1", "value_3", "value_2", "u", "late"),
    "record89": ("c0", "c7", "c9", "value_0", "c3"),
}


def end_sources(config: "Config") -> tuple[str, ...]:
    """What the second MUDD network weighs, in the order of its outputs."""
    sources = _END_SOURCES[SIZES[config.recipe].make]
    if not config.grouped_mudd:  # they came together (record 92)
        sources = _END_SOURCES["record89"]
    return tuple(name for name in sources if config.value_embeds or not name.startswith("value_"))


def _map(config: "Config") -> _Map:
    return _MAPS[SIZES[config.recipe].make]


def _with_attention(layer: Layer, table: _Map, config: "Config", bank: int) -> Layer:
    """`layer` with the attention of slot `bank`."""
    index, head_dim = layer.index, SIZES[config.recipe].head_dim
    mudd = config.mudd and index == table.mudd
    value_layers = [one for one, _ in table.value_embeds] if config.value_embeds else []
    # The gate of the layer that MUDD feeds comes from there.
    gated = [one for one in value_layers if not (config.mudd and one == table.mudd)]
    is_long = index in table.long
    narrow = config.narrow_heads and index in table.narrow
    return replace(
        layer,
        bank=bank,
        qk_width=head_dim // 2 if narrow else head_dim,
        v_width=head_dim // 2 if config.narrow_heads and index in table.narrow_values else head_dim,
        window="long" if is_long else "short",
        rotary="short" if narrow else "long",
        paired=config.paired_heads and index in table.paired,
        key_offset=config.key_offset and is_long,
        value_embed=dict(table.value_embeds)[index] if index in value_layers else None,
        value_gate=gated.index(index) if index in gated else None,
        xsa=config.xsa and index in table.xsa,
        attention_gate=config.attention_gates and index in table.attention_gates,
        cached_input=config.cached_attention and index in table.cached,
        mudd=mudd,
        dc=config.dc and index in table.dc,
    )


def _injected(table: _Map, config: "Config", index: int) -> tuple[str, ...]:
    """What joins the residual behind the place of the attention of layer `index`, by gates."""
    if config.mudd and index == table.mudd:
        return ()  # where MUDD mixes the residual it adds these too
    wanted = (("x0", table.x0), ("bigram", table.bigram if config.bigram else ()))
    last = () if table.mudd is None else (table.mudd,)  # without MUDD it takes them as others do
    return tuple(name for name, places in wanted if index in (*places, *(last if places else ())))


def _skip_into(table: _Map, config: "Config", index: int) -> int | None:
    return {to: source for source, to in table.skips}.get(index) if config.skip else None


def _outputs_read(table: _Map, config: "Config") -> set[int]:
    """The layers whose outputs are read later than by the next layer."""
    read = {source for source, _ in table.skips} if config.skip else set()
    if config.cached_attention and table.cached_source is not None:
        read.add(table.cached_source)
    if config.mudd:
        read.update(table.mudd_sources)
    if table.backout is not None:
        read.add(table.backout)
    return read
