"""A seeded sample of the campaign (`make faults` runs all of it), and the report it writes."""

import random

import pytest

from tests.faults import __main__ as command
from tests.faults import campaign


@pytest.fixture(scope="module")
def bench(zygote):
    with campaign.rig(zygote) as found:
        yield found


def check(tally: campaign.Tally, at_least: int) -> None:
    """Everything was injected, and nothing was lost."""
    assert tally.failures == []
    assert tally.injected >= at_least


def test_random_kills(bench):
    check(campaign.random_kills(bench, random.Random(11), 6), 6)


def test_kills_at_system_calls(bench):
    if not bench.shim:
        pytest.skip("needs a C compiler")
    tally = campaign.kills_at_calls(bench, random.Random(12), 5)
    check(tally, 5)
    assert tally.where["inside a save"] > 0


def test_refusing_disks(bench):
    if not bench.shim:
        pytest.skip("needs a C compiler")
    check(campaign.refusals(bench, random.Random(13), 6), 6)


def test_flipped_bits(bench):
    check(campaign.flips(bench, random.Random(14), 300), 300)


def test_damaged_files(bench):
    check(campaign.damages(bench, random.Random(15), 100), 90)


def test_every_bit_of_the_small_files(bench):
    """Whatever the seed: the digest of the manifest has no bit that does not matter, its last line break included."""
    folder = next((bench.reference(8) / "checkpoints").glob("step_*"))
    path = folder / "manifest.sha256"
    for place in range(path.stat().st_size):
        for bit in range(8):
            campaign._flip(path, place, 1 << bit)
            assert campaign.checkpoints.problem(folder), (place, bit)
            campaign._flip(path, place, 1 << bit)
    assert campaign.checkpoints.problem(folder) == ""


def test_the_checks_can_fail(bench, tmp_path):
    """A run that differs in one loss is told from the undisturbed one."""
    reference = bench.reference(8)
    out = bench.folder / "other-seed"
    assert bench.zygote.run([*bench.argv(out, 8), "--seed=5"]).status == 0
    assert campaign.differs(out, reference) == "training losses differ"
    assert campaign.differs(reference, reference) == ""


def test_the_report_replaces_its_own_lines_only(tmp_path):
    path = tmp_path / "reliability.md"
    path.write_text(f"# Title\n\nabove\n\n{command.BEGIN}\nold\n{command.END}\n\nbelow\n")
    command.write_report(path, "| new |")
    assert path.read_text() == f"# Title\n\nabove\n\n{command.BEGIN}\n| new |\n{command.END}\n\nbelow\n"
    path.write_text("# Title\n\nno markers\n")
    command.write_report(path, "| new |")
    assert path.read_text().startswith("# Title\n\nno markers\n\n<!-- faults: begin")
    tally = campaign.Tally("what", "outcome", 3, [], campaign.Counter(here=3))
    assert "| what | 3 | outcome | 0 | here 3 |" in command.table(command.Settings(), [tally], 1.0)
