"""`engaging launch --seeds N --throttle M`: where M at once end first, not where N at once would."""

from tools.site.limits import Request
from tools.site.plan import Option, best


def test_runs_that_may_not_run_side_by_side_need_no_room_to() -> None:
    """Eight at once fit only where jobs are preempted; one at a time goes as fast where they are not."""
    asked = Request(1, "h200", 60, 1, 8, 64_000)
    lab = Option("mit_normal_gpu", asked, at_once=2)
    owners = Option("mit_preemptable", asked, at_once=8, preemptable=True)
    assert best([lab, owners], 8) is owners
    assert best([lab, owners], 8, throttle=2) is lab
    assert best([lab, owners], 8, throttle=4) is owners
    assert (lab.waves(8, 1), lab.waves(8, 100), lab.waves(8)) == (8, 4, 4)
