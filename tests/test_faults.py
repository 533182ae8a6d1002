"""A seeded sample of the campaign (`make faults` runs all of it), and the report it writes."""

import random
from collections import Counter

import pytest

from nanogpt.common.errors import UserError
from tests.faults import __main__ as command
from tests.faults import campaign, damage, inputs, outcomes


@pytest.fixture(scope="module")
def bench(zygote):
    with campaign.rig(zygote) as found:
        yield found


def check(tally: outcomes.Tally, at_least: int) -> None:
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


@pytest.mark.parametrize(("case", "count"), [
    (damage.flips, 300), (damage.damages, 100), (damage.shards, 120), (damage.archives, 60), (damage.records, 60),
])  # fmt: skip
def test_damaged_files(bench, case, count):
    tally = case(bench, random.Random(14), count)
    check(tally, count)
    assert tally.clean >= count // 7


def test_generated_bad_input(bench):
    check(inputs.generated(bench, random.Random(17), 200), 200)


def test_every_bit_of_the_small_files(bench):
    """Whatever the seed: the digest of the manifest has no bit that does not matter, its last line break included."""
    folder = next((bench.reference(8) / "checkpoints").glob("step_*"))
    path = folder / "manifest.sha256"
    data = path.read_bytes()
    for place in range(len(data)):
        for bit in range(8):
            path.write_bytes(data[:place] + bytes([data[place] ^ 1 << bit]) + data[place + 1 :])
            assert campaign.checkpoints.problem(folder), (place, bit)
    path.write_bytes(data)
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
    outcome = outcomes.Outcome("kills", 3)
    outcome.add(outcomes.Tally("what", "outcome", 3, [], Counter(here=3)), 1.0)
    assert f"| `kills` | what: here 3 | 3 |  | outcome | 0 | 3, {outcome.date}, 1 s |" in command.table(
        {"kills": outcome}
    )
    assert "| `calls` | | | | not run | | |" in command.table({"calls": None})


def test_an_interrupted_campaign_goes_on(tmp_path):
    """What was finished is not repeated, every piece has its own seed, and failures stay."""
    drawn, said = [], []

    def piece(rng: random.Random) -> outcomes.Tally:
        if len(drawn) == 2 and not said[-1].startswith("again"):
            said.append("again")
            raise KeyboardInterrupt
        drawn.append(rng.random())
        return outcomes.Tally("what", "outcome", 5, ["lost"] if len(drawn) == 1 else [], Counter(here=5))

    go_on = lambda again=False, seed=1: outcomes.go_on("kills", seed, 3, again, piece, said.append, tmp_path)  # noqa: E731
    with pytest.raises(KeyboardInterrupt):
        go_on()
    outcome = go_on()
    assert (outcome.pieces, outcome.injected, outcome.where, outcome.failures) == (
        3,
        15,
        {"here": 15},
        ["lost"],
    )
    assert len(set(drawn)) == 3 and outcomes.read("kills", tmp_path) == outcome
    assert go_on() == outcome and len(drawn) == 3 and "done on" in said[-1]
    assert go_on(again=True).pieces == 3 and len(drawn) == 6
    assert go_on(seed=2).seed == 2 and len(set(drawn)) == 6 and len(drawn) == 9


def test_a_section_that_does_not_exist():
    with pytest.raises(UserError, match="--section=kill: no such section; did you mean 'kills'"):
        command.main(["--section=kill", "--report="])
