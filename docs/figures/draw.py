"""Draws the pictures of docs/ from the code they show, or what was measured: python docs/figures/draw.py [FOLDER]"""

import json
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

from modded_nanogpt import schedule
from modded_nanogpt.config import Config

RECORD_LOSS = 4.0782


def draw_schedule(path: Path) -> None:
    """Learning rate, momentum, batch, windows and loss weights of track 1 by step."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    config = Config()
    steps = range(schedule.total_steps(config))
    plans = [schedule.at(config, step) for step in steps]
    figure, panels = plt.subplots(4, 1, figsize=(8, 8), sharex=True, layout="constrained")
    rows = (
        ("learning rate (factor)\nand Muon's momentum", (("learning rate", lambda p: p.lr),
                                                         ("momentum", lambda p: p.momentum))),
        ("tokens a step (thousands)", (("batch", lambda p: p.batch_tokens / 1e3),)),
        ("attention window (tokens)", (("long", lambda p: p.long_window), ("short", lambda p: p.short_window))),
        ("loss weights", (("second next token", lambda p: p.mtp[1]), ("third next token", lambda p: p.mtp[2]),
                          ("longest prefix", lambda p: p.prefix))),
    )  # fmt: skip
    for axes, (label, lines) in zip(panels, rows, strict=True):
        for name, value in lines:
            axes.plot(steps, [value(plan) for plan in plans], label=name)
        axes.set_ylabel(label, fontsize=9)
        axes.set_ylim(bottom=0)
        axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
        for stage in schedule.stages(config)[1:]:
            axes.axvline(stage.start, color="gray", linewidth=0.6, linestyle=":")
    untie = schedule.untying_step(config)
    panels[1].annotate("embedding leaves the head", (untie, 200), xytext=(untie - 470, 60), fontsize=8,
                       arrowprops={"arrowstyle": "-", "linewidth": 0.6})  # fmt: skip
    panels[-1].set_xlabel("step")
    figure.savefig(path, dpi=110)


def draw_losses(path: Path) -> None:
    """Losses of three seeds of the short speedrun, by step; where the record code ends on the same text."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    measured = json.loads((HERE / "speedrun.json").read_text())
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for seed, losses in measured["seeds"].items():
        (line,) = axes.plot(losses["train"], linewidth=1, label=f"seed {seed}")
        axes.plot(*zip(*losses["val"], strict=True), "o", color=line.get_color(), markersize=5)
    axes.axhline(RECORD_LOSS, color="gray", linestyle="--", linewidth=1)
    said = f"record 89's code: {RECORD_LOSS} after 111 steps, 50.9 s of an H100"
    axes.annotate(said, (0, RECORD_LOSS), xytext=(0, -12), textcoords="offset points", fontsize=9)
    axes.set(xlabel="step", ylabel="loss, nats a token", ylim=(3.5, 11))
    axes.legend(
        title="lines: training (most steps score a part of\nthe vocabulary); dots: validation", fontsize=9
    )
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else HERE
    draw_schedule(folder / "schedule.png")
    draw_losses(folder / "speedrun.png")
