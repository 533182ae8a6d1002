"""The layer map against the record's table, and what is left of it when techniques are switched off."""

import pytest

from modded_nanogpt import layer_plan
from modded_nanogpt.config import PRESETS, Config
from modded_nanogpt.layer_plan import MUDD_OUTPUTS, attention_layers, gate_width, gates, layers, size
from nanogpt.common.errors import UserError
from nanogpt.common.flags import parse

RECORD = Config()


def having(config: Config, field: str, value: object = True) -> list[int]:
    return [layer.index for layer in layers(config) if getattr(layer, field) == value]


def test_the_records_layers():
    assert attention_layers(RECORD) == (0, 1, 2, 3, 4, 5, 7, 8, 9, 10)
    assert [layer.bank for layer in layers(RECORD)] == [0, 1, 2, 3, 4, 5, None, 6, 7, 8, 9]
    assert having(RECORD, "window", "long") == [3, 10] == having(RECORD, "key_offset")
    assert having(RECORD, "paired") == [0, 2, 5, 9]
    assert [layer.value_embed for layer in layers(RECORD)] == [None, 0, 1, *[None] * 5, 2, 3, 4]
    assert all(layer.value_gate == layer.value_embed for layer in layers(RECORD))
    assert having(RECORD, "xsa") == [1, 3, 4, 7]
    assert having(RECORD, "attention_gate") == [3, 10]
    assert having(RECORD, "cached_input") == [8, 9, 10] and layer_plan.cached_source(RECORD) == 7
    assert having(RECORD, "skip_from", 3) == [6]
    assert having(RECORD, "keep_output") == [3, 7]
    assert having(RECORD, "mudd") == [10] == having(RECORD, "dc")
    assert having(RECORD, "inject") == [0, 1, 2, 3, 4, 5, 7, 8, 9]


def test_the_records_sizes():
    found = size(RECORD)
    assert (found.layers, found.width, found.heads, found.head_dim, found.mlp_width) == (
        11,
        768,
        6,
        128,
        3072,
    )
    assert (found.vocab, found.padded_vocab, found.bigram_rows, found.sign_rows) == (
        50_257,
        50_304,
        377_280,
        8192,
    )
    assert found.bigram_rows == 7.5 * found.padded_vocab
    body = 10 * 4 * found.width**2 + 11 * 2 * found.mlp_width * found.width
    assert body == 75_497_472
    for name, recipe in layer_plan.SIZES.items():
        assert recipe.heads * recipe.head_dim == recipe.width, name
        assert (
            recipe.padded_vocab % 128 == 0 and recipe.padded_vocab - 128 < recipe.vocab <= recipe.padded_vocab
        )
    small = size(Config(recipe="tiny", vocab_size=300))
    assert (small.vocab, small.padded_vocab) == (300, 384)


def columns(tier: tuple[layer_plan.Gate, ...]) -> list[tuple[str, int, int]]:
    return [(gate.name, gate.layer, gate.width) for gate in tier]


def test_the_records_gates():
    """26 outputs on the embedding, 41 on the residual at layer 4."""
    pre, post = gates(RECORD)
    pairs = [("x0", 1), ("bigram", 1)]
    assert columns(pre) == [
        ("xsa", 1, 6), ("xsa", 3, 6), ("attention_gate", 3, 6), *((n, k, w) for k in range(4) for n, w in pairs),
    ]  # fmt: skip
    assert columns(post) == [
        ("xsa", 4, 6), ("xsa", 7, 6), ("attention_gate", 10, 6),
        *((n, k, w) for k in (4, 5, 7, 8, 9) for n, w in pairs),
        ("skip", 6, 1), ("dc_w1", 10, 6), ("dc_w2", 10, 6),
    ]  # fmt: skip
    assert sum(gate.width for gate in pre) == 26 and sum(gate.width for gate in post) == 41 == gate_width(
        RECORD
    )
    for tier in (pre, post):
        assert [gate.start for gate in tier] == [sum(g.width for g in tier[:k]) for k in range(len(tier))]
    start = {gate.name: gate.init for tier in (pre, post) for gate in tier}
    assert start == {
        "xsa": 0.0, "attention_gate": 0.25, "x0": 0.0, "bigram": 0.05, "skip": 0.5, "dc_w1": 1.0, "dc_w2": 0.0,
    }  # fmt: skip


def test_mudd_outputs():
    first, second = MUDD_OUTPUTS
    assert (len(first), len(second)) == (14, 5)
    assert [value for _, value in first[:8]] == [0.0] * 6 + [2.0] * 2
    assert [value for _, value in first[8:]] == pytest.approx([1.1**0.5, 1.0, 0.0, 0.05, 1.1**0.5, 1.0])
    assert dict(second) == {"end_c0": 0.0, "end_c7": -0.5, "end_c9": 0.0, "end_value_0": 0.0, "end_c3": 0.0}


@pytest.mark.parametrize(
    ("switch", "field", "left"),
    [
        ("paired_heads", "paired", []), ("key_offset", "key_offset", []), ("xsa", "xsa", []),
        ("attention_gates", "attention_gate", []), ("cached_attention", "cached_input", []), ("mudd", "mudd", []),
        ("dc", "dc", []),
    ],
)  # fmt: skip
def test_a_technique_switched_off_leaves_the_others(switch, field, left):
    config = Config(**{switch: False})
    assert having(config, field) == left
    for other in ("paired", "key_offset", "xsa", "attention_gate", "cached_input", "mudd", "dc"):
        if other != field:
            assert having(config, other) == having(RECORD, other)
    assert attention_layers(config) == attention_layers(RECORD)


def test_what_hangs_together():
    without_mudd = Config(mudd=False)
    assert having(without_mudd, "inject") == [0, 1, 2, 3, 4, 5, 7, 8, 9, 10]
    assert having(without_mudd, "keep_output") == [3, 7]
    assert having(Config(mudd=False, skip=False), "keep_output") == [7]
    assert having(Config(mudd=False, skip=False, cached_attention=False), "keep_output") == []
    assert {layer.value_embed for layer in layers(Config(value_embeds=False))} == {None}
    assert not [gate for tier in gates(Config(bigram=False)) for gate in tier if gate.name == "bigram"]
    assert not [gate for tier in gates(Config(skip=False)) for gate in tier if gate.name == "skip"]
    restored = Config(attention_at_6=True)
    assert attention_layers(restored) == tuple(range(11))
    assert layers(restored)[6].skip_from == 3 and not layers(restored)[6].inject
    assert gate_width(restored) == 41


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
    assert having(config, "attention_gate") == list(range(16)) == having(config, "inject")
    assert gates(config) == ((), ())
    small = parse(Config, ["medium", "--recipe=tiny_medium"], prog="", description="", presets=PRESETS)
    assert layers(small) == layers(config) and layer_plan.backout(RECORD) is None
    with pytest.raises(UserError, match=r"--paired_heads=true: --recipe=medium has no place for it"):
        Config(recipe="medium")
