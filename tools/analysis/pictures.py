"""Which pictures an analysis gets, with a sentence on what each shows."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure

from nanogpt.common.storage import atomic_write_bytes, atomic_write_text, make_folder
from tools.analysis import bands, plots, statistics
from tools.analysis.analyze import Analysis
from tools.analysis.bands import Band
from tools.analysis.findings import GroupFinding
from tools.analysis.records import Group, time_obstacle

RECORDS_RANGE = 0.5  # nats around 3.28: runs further away, or with another target, are of another contest
BY = {"step": "step", "tokens": "tokens trained on", "seconds": "training time"}


@dataclass(frozen=True)
class Picture:
    """A figure, its file name without ending, its title, and what it shows."""

    name: str
    title: str
    caption: str
    figure: Figure


def draw(found: Analysis) -> list[Picture]:
    """The pictures; what cannot be drawn is left out."""
    shown, some = _shown(found)
    if not shown:
        return []
    style = plots.looks(
        [group.name for group in found.study.groups], [group.name for group in found.baselines]
    )
    target = shown[0].target if len({one.target for one in shown}) == 1 else None
    timed = not time_obstacle([one.group for one in shown])
    lines = {x: [band for one in shown if (band := bands.band(one.group, x))] for x in BY}
    made = [_losses(lines[x], x, style, target, some) for x in BY if x != "seconds" or timed]
    made.append(_differences(found, lines["step"], style))
    compared = [one for each in shown if (one := found.against(each.group))]
    made.append(
        _picture(
            "gains",
            "Gain in final loss",
            "Final loss saved against the baseline, with 95% intervals; hollow: one seed. " + some,
            plots.gains(compared),
        )
    )
    aim = f"{target:g}" if target else "the target"
    made.append(
        _picture(
            "time_to_target",
            f"{'Time' if timed else 'Steps'} to {aim}",
            f"When each seed first validated at or below {aim}: a dot a seed, the bar is their mean. {some}",
            plots.times(shown, style, "seconds" if timed else "step"),
        )
    )
    aimed = [one.loss["mean"] for one in shown if one.target == statistics.TARGET]
    if any(abs(mean - statistics.TARGET) < RECORDS_RANGE for mean in aimed):
        made.append(
            _picture(
                "record_history",
                "The record, for context",
                "World records of the speedrun's main track (8 H100). The fastest variant here stands beside them "
                "only if its time was taken on 8 H100 and its losses meet track 1's rule.",
                plots.records(bands.history()[0], _comparable_with_records(shown)),
            )
        )
    return [picture for picture in made if picture]


def _picture(name: str, title: str, caption: str, figure: Figure | None) -> Picture | None:
    return Picture(name, title, caption.strip(), figure) if figure is not None else None


def _shown(found: Analysis) -> tuple[list[GroupFinding], str]:
    """The groups that fit into a picture, baselines first, then the best; and a sentence when some are left out."""

    def is_base(group: Group) -> bool:
        return any(group is base for base in found.baselines)

    groups = sorted((one for one in found.groups if one.group.losses), key=lambda one: one.loss["mean"])
    shown = [one for one in groups if is_base(one.group)][: plots.MOST - 1]
    shown += [one for one in groups if not is_base(one.group)][: plots.MOST - len(shown)]
    left_out = len(groups) - len(shown)
    return (
        shown,
        f"{left_out} of {len(groups)} variants, those of the highest loss, are not drawn."
        if left_out
        else "",
    )


def _losses(lines: Sequence[Band], x: str, style: dict, target: float | None, some: str) -> Picture | None:
    many = max((band.runs for band in lines), default=0) > bands.FEW
    span = "10% to 90% of the seeds" if many else "the lowest to the highest seed"
    one = all(band.runs == 1 for band in lines)
    what = (
        "Validation loss of one seed"
        if one
        else "Mean validation loss over the seeds (their number in brackets)"
    )
    width = "" if one else f"; the band goes from {span}"
    caption = f"{what}{width}. The steep beginning lies above the frame. {some}"
    return _picture(f"loss_by_{x}", f"Loss by {BY[x]}", caption, plots.losses(lines, x, style, target))


def _differences(found: Analysis, lines: Sequence[Band], style: dict) -> Picture | None:
    by_name = {band.name: band for band in lines}
    base_of = {
        one.variant.name: by_name[one.baseline.name]
        for one in found.comparisons
        if one.baseline.name in by_name
    }
    caption = "Loss saved against the baseline's mean at the same step; above the line is better."
    figure = plots.differences(lines, base_of, style)
    return _picture("difference_by_step", "Against the baseline", caption, figure)


def _comparable_with_records(shown: Sequence[GroupFinding]) -> list[tuple[str, float]]:
    """The group with the lowest mean time, in minutes, of those that meet track 1's rule on 8 H100; at most one."""
    rows = []
    for one in shown:
        hardware = one.group.hardware()
        right = len(hardware) == 1 and "H100" in hardware[0].gpu and hardware[0].count == 8
        if right and one.target == 3.28 and one.track1 and one.track1.passed and one.time["mean"]:
            rows.append((one.group.name, one.time["mean"] / 60))
    return sorted(rows, key=lambda row: row[1])[:1]


def write(found: Analysis, folder: Path) -> list[Path]:
    """PNG, SVG and PDF of every picture into `folder`; the files."""
    make_folder(folder)
    written = []
    for picture in draw(found):
        atomic_write_bytes(folder / f"{picture.name}.png", plots.png(picture.figure))
        atomic_write_text(folder / f"{picture.name}.svg", plots.svg(picture.figure, picture.name))
        atomic_write_bytes(folder / f"{picture.name}.pdf", plots.pdf(picture.figure))
        written += [folder / f"{picture.name}.{ending}" for ending in ("png", "svg", "pdf")]
    return written
