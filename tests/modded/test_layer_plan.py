"""The layer map against the record's table, and what is left of it when techniques are switched off."""

from dataclasses import replace

import pytest

from modded_nanogpt import layer_plan
from modded_nanogpt.config import PRESETS, Config
from modded_nanogpt.layer_plan import (
    MUDD_OUTPUTS,
    attention_layers,
    end_sources,
    gate_width,
    gates,
    layers,
    size,
)
from nanogpt.common.errors import UserError
from nanogpt.common.flags import parse

RECORD = Config()


def record89(*flags: str) -> Config:
    return parse(Config, ["record89", *flags], prog="", description="", presets=PRESETS)


RECORD89 = record89()


def having(config: Config, field: str, value: object = True) -> list[int]:
    return [layer.index for layer in layers(config) if getattr(layer, field) == value]


def test_the_records_layers():
    """Section 2.1 of the specification of records 90 to 92."""
    assert attention_layers(RECORD) == (0, 1, 2, 3, 5, 8, 10)
    assert [layer.bank for layer in layers(RECORD)] == [0, 1, 2, 3, None, 4, None, None, 5, None, 6]
    assert [layer.mlps for layer in layers(RECORD)] == [
        (0,), (1,), (2,), (3,), (4,), (5,), (6,), (), (7, 10), (8,), (9,),
    ]  # fmt: skip
    widths = {layer.index: (layer.qk_width, layer.v_width) for layer in layers(RECORD) if layer.attention}
    assert widths == {
        0: (64, 128), 1: (64, 64), 2: (64, 128), 3: (128, 128), 5: (64, 128), 8: (64, 64), 10: (128, 128),
    }  # fmt: skip
    assert having(RECORD, "window", "long") == [3, 10] == having(RECORD, "key_offset")
    assert [layer.index for layer in layers(RECORD) if layer.attention and layer.rotary == "long"] == [3, 10]
    assert having(RECORD, "paired") == [0, 2, 5] and having(RECORD, "xsa") == [1, 3]
    tables = {layer.index: (layer.value_embed, layer.value_gate) for layer in layers(RECORD)}
    assert {k: v for k, v in tables.items() if v != (None, None)} == {
        1: (0, 0),
        2: (1, 1),
        8: (2, 2),
        10: (3, None),
    }
    assert having(RECORD, "attention_gate") == [3, 10] and having(RECORD, "mudd") == [10]
    assert having(RECORD, "cached_input") == [8, 10] and layer_plan.cached_source(RECORD) == 7
    assert having(RECORD, "skip_from", 3) == [6] and having(RECORD, "keep_output") == [3, 7]
    assert [layer.inject for layer in layers(RECORD)] == [
        ("x0", "bigram"), ("x0", "bigram"), ("x0",), (), ("x0", "bigram"), ("x0", "bigram"), (), ("x0",), (),
        ("bigram",), (),
    ]  # fmt: skip


def test_record_89s_layers():
    assert attention_layers(RECORD89) == (0, 1, 2, 3, 4, 5, 7, 8, 9, 10)
    assert [layer.bank for layer in layers(RECORD89)] == [0, 1, 2, 3, 4, 5, None, 6, 7, 8, 9]
    assert having(RECORD89, "window", "long") == [3, 10] == having(RECORD89, "key_offset")
    assert {layer.rotary for layer in layers(RECORD89)} == {"long"}
    assert [layer.mlps for layer in layers(RECORD89)] == [(index,) for index in range(11)]
    assert having(RECORD89, "paired") == [0, 2, 5, 9]
    assert [layer.value_embed for layer in layers(RECORD89)] == [None, 0, 1, *[None] * 5, 2, 3, 4]
    assert having(RECORD89, "xsa") == [1, 3, 4, 7]
    assert having(RECORD89, "attention_gate") == [3, 10]
    assert having(RECORD89, "cached_input") == [8, 9, 10] and layer_plan.cached_source(RECORD89) == 7
    assert having(RECORD89, "skip_from", 3) == [6]
    assert having(RECORD89, "keep_output") == [3, 7]
    assert having(RECORD89, "mudd") == [10] == having(RECORD89, "dc")
    assert having(RECORD89, "inject", ("x0", "bigram")) == [0, 1, 2, 3, 4, 5, 7, 8, 9]


def test_the_records_sizes():
    found = size(RECORD)
    assert (found.layers, found.width, found.heads, found.head_dim, found.mlp_width) == (
        11,
        768,
        6,
        128,
        2816,
    )
    assert (found.vocab, found.padded_vocab, found.sign_rows, found.value_tables) == (50_257, 50_304, 8192, 4)
    assert (size(RECORD89).mlp_width, size(RECORD89).value_tables) == (3072, 5)
    assert found.bigram_rows == size(RECORD89).bigram_rows == 377_280 == 7.5 * found.padded_vocab
    for name, recipe in layer_plan.SIZES.items():
        assert recipe.heads * recipe.head_dim == recipe.width, name
        assert (
            recipe.padded_vocab % 128 == 0 and recipe.padded_vocab - 128 < recipe.vocab <= recipe.padded_vocab
        )
    small = size(Config(recipe="tiny", vocab_size=300, sampled_softmax=False))
    assert (small.vocab, small.padded_vocab) == (300, 384)


def columns(tier: tuple[layer_plan.Gate, ...]) -> list[tuple[str, int, int]]:
    return [(gate.name, gate.layer, gate.width) for gate in tier]


def starts(config: Config) -> dict[str, float]:
    return {gate.name: gate.init for tier in gates(config) for gate in tier}


def test_the_records_gates():
    """23 outputs on the embedding, 13 on the residual at layer 4."""
    pre, post = gates(RECORD)
    assert columns(pre) == [
        ("xsa", 1, 6), ("xsa", 3, 6), ("attention_gate", 3, 6), ("x0", 0, 1), ("bigram", 0, 1), ("x0", 1, 1),
        ("bigram", 1, 1), ("x0", 2, 1),
    ]  # fmt: skip
    assert columns(post) == [
        ("attention_gate", 10, 6), ("x0", 4, 1), ("bigram", 4, 1), ("x0", 5, 1), ("bigram", 5, 1), ("x0", 7, 1),
        ("bigram", 9, 1), ("skip", 6, 1),
    ]  # fmt: skip
    assert [sum(gate.width for gate in tier) for tier in (pre, post)] == [23, 13] and gate_width(RECORD) == 23
    for tier in (pre, post):
        assert [gate.start for gate in tier] == [sum(g.width for g in tier[:k]) for k in range(len(tier))]
    assert starts(RECORD) == {"xsa": 0.0, "attention_gate": 0.25, "x0": 0.0, "bigram": 0.05, "skip": 0.5}


def test_record_89s_gates():
    """26 outputs on the embedding, 41 on the residual at layer 4."""
    pre, post = gates(RECORD89)
    pairs = [("x0", 1), ("bigram", 1)]
    assert columns(pre) == [
        ("xsa", 1, 6), ("xsa", 3, 6), ("attention_gate", 3, 6), *((n, k, w) for k in range(4) for n, w in pairs),
    ]  # fmt: skip
    assert columns(post) == [
        ("xsa", 4, 6), ("xsa", 7, 6), ("attention_gate", 10, 6),
        *((n, k, w) for k in (4, 5, 7, 8, 9) for n, w in pairs),
        ("skip", 6, 1), ("dc_w1", 10, 6), ("dc_w2", 10, 6),
    ]  # fmt: skip
    assert [sum(gate.width for gate in tier) for tier in (pre, post)] == [26, 41] and gate_width(
        RECORD89
    ) == 41
    assert starts(RECORD89) == {**starts(RECORD), "dc_w1": 1.0, "dc_w2": 0.0}


def test_mudd_outputs():
    assert [value for _, value in MUDD_OUTPUTS[:8]] == [0.0] * 6 + [2.0] * 2
    assert [value for _, value in MUDD_OUTPUTS[8:]] == pytest.approx(
        [1.1**0.5, 1.0, 0.0, 0.05, 1.1**0.5, 1.0]
    )
    assert (
        end_sources(RECORD89)
        == ("c0", "c7", "c9", "value_0", "c3")
        == end_sources(Config(grouped_mudd=False))
    )
    assert end_sources(RECORD) == (*end_sources(RECORD89), "value_1", "value_3", "value_2", "u", "late")
    assert end_sources(Config(value_embeds=False)) == ("c0", "c7", "c9", "c3", "u", "late")


@pytest.mark.parametrize(
    ("switch", "field", "left"),
    [
        ("paired_heads", "paired", []), ("key_offset", "key_offset", []), ("xsa", "xsa", []),
        ("attention_gates", "attention_gate", []), ("cached_attention", "cached_input", []), ("mudd", "mudd", []),
    ],
)  # fmt: skip
def test_a_technique_switched_off_leaves_the_others(switch, field, left):
    config = Config(**{switch: False})
    assert having(config, field) == left
    for other in ("paired", "key_offset", "xsa", "attention_gate", "cached_input", "mudd"):
        if other != field:
            assert having(config, other) == having(RECORD, other)
    assert attention_layers(config) == attention_layers(RECORD)


def test_what_hangs_together():
    without_mudd = Config(mudd=False)
    assert layers(without_mudd)[10].inject == ("x0", "bigram") and layers(without_mudd)[10].value_gate == 3
    assert having(without_mudd, "keep_output") == [3, 7]
    assert having(Config(mudd=False, skip=False), "keep_output") == [7]
    assert having(Config(mudd=False, skip=False, cached_attention=False), "keep_output") == []
    assert {layer.value_embed for layer in layers(Config(value_embeds=False))} == {None}
    assert not [gate for tier in gates(Config(bigram=False)) for gate in tier if gate.name == "bigram"]
    assert not [gate for tier in gates(Config(skip=False)) for gate in tier if gate.name == "skip"]
    restored = Config(attention_at_6=True)
    assert attention_layers(restored) == (0, 1, 2, 3, 5, 6, 8, 10) and layers(restored)[6].skip_from == 3
    assert attention_layers(record89("--attention_at_6=true")) == tuple(range(11))


def test_the_records_cuts_can_be_undone():
    deep = Config(depth_cut=False)
    assert attention_layers(deep) == (0, 1, 2, 3, 4, 5, 7, 8, 9, 10) and having(deep, "cached_input") == [
        8,
        9,
        10,
    ]
    assert [len(layer.mlps) for layer in layers(deep)] == [1] * 8 + [2, 1, 1] and layers(deep)[8].mlps == (
        8,
        11,
    )
    assert layer_plan.mlp_count(Config(second_mlp=False)) == 10
    wide = [layer for layer in layers(Config(narrow_heads=False)) if layer.attention]
    assert {(layer.qk_width, layer.v_width, layer.rotary) for layer in wide} == {(128, 128, "long")}


def test_the_medium_track():
    config = parse(Config, ["medium"], prog="", description="", presets=PRESETS)
    assert attention_layers(config) == tuple(range(16))
    assert having(config, "window", "long") == [0, 4, 11, 15] == having(config, "key_offset")
    tables = {layer.index: layer.value_embed for layer in layers(config) if layer.value_embed is not None}
    assert tables == {0: 0, 1: 1, 2: 2, 3: 3, 4: 4, 11: 0, 12: 1, 13: 2, 14: 3, 15: 4}
    assert {layer.index: layer.skip_from for layer in layers(config) if layer.skip_from} == {
        9: 6,
        10: 4,
        11: 2,
    }
    assert [layer.value_gate for layer in layers(config)] == [*range(5), *[None] * 6, *range(5, 10)]
    assert layer_plan.backout(config) == 11 and having(config, "keep_output") == [2, 4, 6, 11]
    assert having(config, "attention_gate") == list(range(16))
    assert gates(config) == ((), ())
    small = parse(Config, ["medium", "--recipe=tiny_medium"], prog="", description="", presets=PRESETS)
    large, little = ([replace(one, qk_width=0, v_width=0) for one in layers(c)] for c in (config, small))
    assert large == little and layer_plan.backout(RECORD) is None
    with pytest.raises(UserError, match=r"--narrow_heads=true: --recipe=medium has no place for it"):
        Config(recipe="medium")
