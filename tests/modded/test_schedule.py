"""The schedule against the published figures of records 92 and 89, of the medium track's, and of a scaled-down run."""

import dataclasses
import math
from itertools import pairwise

import pytest

from modded_nanogpt import schedule
from modded_nanogpt.config import PRESETS, Config
from modded_nanogpt.schedule import at, final_window, stages, total_steps, untying_step, yarn_windows
from nanogpt.common.flags import parse


def preset(*words: str) -> Config:
    return parse(Config, list(words), prog="", description="", presets=PRESETS)


LATEST, RECORD, MEDIUM = Config(), preset("record89"), preset("medium")
SCALED = preset("record89", "--steps=105", "--extension_steps=6")


def bounds(config: Config) -> list[tuple[int, int]]:
    return [(stage.start, stage.end) for stage in stages(config)]


def test_the_latest_records_stages():
    """Section 6 of the specification of records 90 to 92."""
    assert bounds(LATEST) == [(0, 320), (320, 681), (681, 1107), (1107, 1174), (1174, 1194)]
    assert [stage.batch_tokens for stage in stages(LATEST)] == [131_072, 262_144, 393_216, 327_680, 131_072]
    assert [stage.max_document for stage in stages(LATEST)] == [896, 2048, 3072, 3072, 3072]
    assert sum((s.end - s.start) * s.batch_tokens for s in stages(LATEST)) == 328_663_040
    windows = [(stage.short_window // 128, stage.long_window // 128) for stage in stages(LATEST)]
    assert windows == [(1, 3), (3, 7), (5, 11), (5, 11), (6, 13)] and final_window(LATEST) == (768, 2560)
    assert untying_step(LATEST) == 1175 and schedule.attention_cap(LATEST) == 2560
    assert schedule.attention_cap(RECORD) == 0 == schedule.attention_cap(Config(attention_cap=False))
    short = Config(steps=105, extension_steps=6)
    assert bounds(short) == [(0, 29), (29, 61), (61, 99), (99, 105), (105, 111)]


@pytest.mark.parametrize(
    ("step", "factor"),
    [
        (233, 1.0), (319, 0.937), (320, 1.408), (514, 1.157), (680, 0.941), (681, 1.050), (800, 0.869), (964, 0.620),
        (1106, 0.403), (1107, 0.391), (1173, 0.301), (1174, 0.30), (1193, 0.30),
    ],
)  # fmt: skip
def test_the_latest_records_learning_rates(step, factor):
    assert at(LATEST, step).lr == pytest.approx(factor, abs=6e-4)


def test_the_latest_records_loss_weights():
    levels = [at(LATEST, step).prefix for step in (0, 319, 320, 410, 411, 680, 681)]
    assert levels == pytest.approx([0.25, 0.25, 0.20, 0.20, 0.15, 0.05, 0.0])
    assert at(LATEST, 500).mtp == pytest.approx((1.0, 0.5 * (1 - 180 / 361), 0.0))


def test_record_89s_stages():
    assert bounds(RECORD) == [(0, 423), (423, 847), (847, 1270), (1270, 1285)]
    assert total_steps(RECORD) == 1285
    assert [stage.batch_tokens for stage in stages(RECORD)] == [131_072, 262_144, 393_216, 393_216]
    assert [stage.max_document for stage in stages(RECORD)] == [896, 2048, 2048, 2048]
    assert sum((s.end - s.start) * s.batch_tokens for s in stages(RECORD)) == 338_821_120


def test_the_records_windows():
    found = [(stage.short_window, stage.long_window) for stage in stages(RECORD)]
    assert found == [(128, 384), (384, 896), (640, 1408), (768, 1664)]
    assert final_window(RECORD) == (768, 2560)
    plan = at(RECORD, 1285)  # the final validation: everything but its windows is the extension's
    assert (plan.short_window, plan.long_window, plan.stage) == (768, 1664, 3)


@pytest.mark.parametrize(
    ("step", "factor"),
    [
        (0, 1.0), (422, 1.0), (423, 1.52), (508, 1.52), (600, 1.355), (846, 0.912), (847, 1.027), (1000, 0.710),
        (1150, 0.399), (1269, 0.152), (1270, 0.15), (1284, 0.15),
    ],
)  # fmt: skip
def test_the_records_learning_rates(step, factor):
    assert at(RECORD, step).lr == pytest.approx(factor, abs=6e-4)


def test_learning_rate_by_its_formula():
    for step in range(1285):
        factor = 1.0 if step < 423 else 1.52 if step < 847 else 1.73
        down = min(1.0, max(0.0, (step - 508) / 762))
        assert at(RECORD, step).lr == pytest.approx((1 - down) * factor + 0.15 * down, abs=1e-12)


def test_momentum():
    assert [at(RECORD, step).momentum for step in (0, 150, 300, 1235)] == pytest.approx(
        [0.85, 0.9, 0.95, 0.95]
    )
    assert at(RECORD, 1260).momentum == pytest.approx(0.90)
    assert at(RECORD, 1284).momentum == pytest.approx(0.852)
    # A run shorter than the warm-up goes on warming up.
    assert [at(SCALED, step).momentum for step in (60, 110)] == pytest.approx([0.87, 0.85 + 0.1 * 110 / 300])
    assert {
        at(preset("record89", "--momentum_schedule=false"), step).momentum for step in range(0, 1285, 7)
    } == {0.95}


def test_loss_weights():
    first, middle = at(RECORD, 0), at(RECORD, 423 + 212)
    assert (first.mtp, first.prefix) == ((1.0, 0.5, 0.25), 0.25)
    assert at(RECORD, 211).mtp[2] == pytest.approx(0.25 * (1 - 211 / 423))
    assert (at(RECORD, 422).mtp[1], at(RECORD, 422).prefix) == (0.5, 0.25)
    assert middle.mtp == pytest.approx((1.0, 0.25, 0.0)) and middle.prefix == pytest.approx(0.125)
    for step in (847, 1269, 1284):
        assert (at(RECORD, step).mtp, at(RECORD, step).prefix) == ((1.0, 0.0, 0.0), 0.0)


def test_adam_and_the_embedding():
    assert [step for step in range(6) if at(RECORD, step).adam] == [1, 3, 5]
    assert untying_step(RECORD) == 847
    assert [step for step in range(1285) if at(RECORD, step).untie] == [847]
    assert at(RECORD, 847).tied and not at(RECORD, 848).tied
    tied, every_step = preset("record89", "--embedding=tied"), preset("record89", "--adam_every=1")
    assert not any(at(tied, step).untie for step in range(1285)) and at(tied, 1284).tied
    assert all(at(every_step, step).adam for step in range(5))
    untied = preset("record89", "--embedding=untied")
    assert not at(untied, 0).tied and untying_step(untied) is None
    for every in (1, 2, 3, 4):
        config = preset("record89", f"--adam_every={every}")
        step = untying_step(config)
        assert at(config, step).adam and 847 <= step < 847 + every


def test_exact_fp8_scales_for_sixteen_steps_of_any_run():
    for config in (RECORD, SCALED):
        assert [at(config, step).exact_fp8 for step in (0, 15, 16, 100)] == [True, True, False, False]


def test_the_scaled_run_that_was_measured():
    """105 + 6 steps: stages of 35, cooldown over the last 60 %, untied at step 71."""
    assert bounds(SCALED) == [(0, 35), (35, 70), (70, 105), (105, 111)]
    assert untying_step(SCALED) == 71
    assert at(SCALED, 42).lr == 1.52 and at(SCALED, 43).lr < 1.52
    assert at(SCALED, 105).lr == 0.15
    assert at(SCALED, 104).lr == pytest.approx(1.73 / 63 + 0.15 * 62 / 63)


def test_yarn_follows_the_long_window():
    pairs = ((128, 384), (384, 896), (640, 1408), (768, 1664))
    assert yarn_windows(RECORD, 0) == pairs[:1]
    assert yarn_windows(RECORD, 846) == pairs[:2]
    assert yarn_windows(RECORD, 1285) == pairs == yarn_windows(LATEST, 1194)
    assert at(RECORD, 1284).yarn_window == pairs[3]
    # The softmax scale that these windows give in record 89: 0.1, 0.11695, 0.12752, 0.13178.
    scale, seen = 0.1, []
    for (_, old), (_, new) in pairwise(pairs):
        scale *= 1 + 0.2 * math.log(new / old)
        seen.append(scale)
    assert seen == pytest.approx([0.11695, 0.12752, 0.13178], abs=1e-5)
    assert yarn_windows(Config(yarn=False), 1285) == pairs[:1]
    assert yarn_windows(Config(window_schedule=False), 1285) == pairs[2:3]


def test_the_medium_track():
    found = stages(MEDIUM)
    assert total_steps(MEDIUM) == 4740 and len(found) == 13
    assert [stage.batch_tokens for stage in found[:4]] == [131_072, 262_144, 393_216, 524_288]
    assert {stage.batch_tokens for stage in found[3:]} == {524_288}
    assert [stage.lr_factor for stage in found[:5]] == [1.0, 1.52, 1.73, 2.0, 2.0]
    assert [stage.long_window // 128 for stage in found] == [3, 7, 11, 13, 15, 17, 19, 21, *[23] * 5]
    assert [stage.short_window // 128 for stage in found] == [1, 3, 5, 6, 7, 8, 9, 10, *[11] * 5]
    assert {stage.max_document for stage in found} == {4096}
    assert final_window(MEDIUM) == (11 * 128, 27 * 128)
    assert [long for _, long in yarn_windows(MEDIUM, 4740)] == [128 * blocks for blocks in (3, 7, 11, 13)]
    assert untying_step(MEDIUM) == 785
    weights = [sum(weight > 0 for weight in at(MEDIUM, step).mtp) for step in (0, 391, 392, 783, 784)]
    assert weights == [3, 3, 2, 2, 1]
    assert at(MEDIUM, 1410).lr == 2.0 and at(MEDIUM, 1411).lr < 2.0 and at(MEDIUM, 4700).lr == 0.1
    total = sum((stage.end - stage.start) * stage.batch_tokens for stage in found)
    assert total == pytest.approx(2.177e9, rel=1e-3)
    small = stages(dataclasses.replace(MEDIUM, recipe="tiny_medium", steps=4700, extension_steps=40))
    for one, other in zip(
        found, small, strict=True
    ):  # the same, in a 128th of the tokens and a 16th of the reach
        assert (one.start, one.end, one.lr_factor, one.mtp) == (
            other.start,
            other.end,
            other.lr_factor,
            other.mtp,
        )
        assert one.batch_tokens == 128 * other.batch_tokens and one.long_window == 16 * other.long_window


def test_techniques_switched_off():
    def without(**off: bool) -> Config:
        return dataclasses.replace(RECORD, **off)

    def per_stage(field: str, **off: bool) -> list:
        return [getattr(stage, field) for stage in stages(without(**off))]

    assert per_stage("batch_tokens", batch_schedule=False) == [262_144] * 4
    assert per_stage("lr_factor", batch_schedule=False) == [1.52] * 4
    assert per_stage("long_window", window_schedule=False) == [1408] * 4
    assert per_stage("max_document", short_documents=False) == [2048] * 4
    assert {at(without(mtp=False), step).mtp for step in range(0, 1285, 40)} == {(1.0, 0.0, 0.0)}
    assert {at(without(prefix=False), step).prefix for step in range(0, 1285, 40)} == {0.0}
    flat = without(cooldown=0.0)
    assert [at(flat, step).lr for step in (0, 600, 1284)] == [1.0, 1.52, 1.73]
    assert at(without(cooldown=1.0), 0).lr == 1.0 and at(without(cooldown=1.0), 1).lr < 1.0


@pytest.mark.parametrize("recipe", list(schedule.STAGES))
def test_stages_leave_no_gap_at_any_length(recipe):
    make = next(name for name in ("medium", "snapshot", "record89", "record") if name in f"{recipe} record")
    base = dataclasses.replace(preset(make), recipe=recipe)
    for steps in (12, 13, 47, 107, 1271):
        for extension in (0, 1, 9):
            config = dataclasses.replace(base, steps=steps, extension_steps=extension)
            found = stages(config)
            assert [stage.start for stage in found] == [0, *(stage.end for stage in found[:-1])]
            assert found[-1].end == total_steps(config) == steps + extension
            assert all(stage.start < stage.end for stage in found)  # those without a step are left out
            for step in range(0, steps + extension, 5):
                plan = at(config, step)
                assert found[plan.stage].start <= step < found[plan.stage].end
                assert plan.lr > 0 and 0.85 <= plan.momentum <= 0.95
