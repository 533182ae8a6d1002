"""Is the target met? The track's test over all submitted runs, in words."""

from collections.abc import Sequence

from tools.analysis.statistics import TRACK3_MARGIN, mean, track1, track3
from tools.leaderboard.tracks import Track


def judge(losses: Sequence[float], steps: Sequence[int], track: Track) -> tuple[float | None, bool, str]:
    """(p-value or None, whether the target is met, the test in words) of final losses in nats."""
    count, middle = len(losses), mean(losses)
    if track.test == "mean":
        said = f"mean loss {middle:.5f}, target {track.target:g} (this track asks for no test)"
        return None, middle <= track.target, said
    if track.test == "z":
        third = track3(losses, steps, track.target)
        if third.value is None:
            return None, False, third.reason
        said = (
            f"({track.target:g} - {middle:.5f}) * sqrt({count}) = {third.value:.4f}, needed {TRACK3_MARGIN}"
        )
        return third.p, third.passed, said
    first = track1(losses, track.target, track.alpha)
    if first.p is None:
        return None, False, f"{count} run{'s' * (count > 1)} without spread: no test can be made"
    said = f"mean loss {middle:.5f} of {count} runs: p = {first.p:.2g} against a mean of {track.target:g} or more"
    return first.p, first.passed, f"{said}, needed p < {track.alpha:g}"
