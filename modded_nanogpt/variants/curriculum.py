"""Short sequences first: a quarter, a half, three quarters, the whole length (256, 512, 768, 1,024 of 1,024).

The step's text is cut into more, shorter sequences, so a step keeps its tokens. The next length comes when the loss
stands still: when its running mean has not fallen by `GAIN` below its best in `PATIENCE` steps; and at the latest so
that the three short lengths share `LONGEST` of the run between them. Validation is at the whole length throughout.
(Curricula of lengths: Li et al. 2021, arXiv 2108.06084.)
"""

from typing import Any

from modded_nanogpt.simple_config import Config
from modded_nanogpt.variants import baseline

QUARTERS = (1, 2, 3, 4)
MEMORY = 0.9  # of the running mean of the loss
GAIN = 0.005  # nats that count as progress
PATIENCE = 0.01  # of the run: so many steps without progress are a plateau
LONGEST = 0.3  # of the run that the lengths below the last may take together


class Variant(baseline.Variant):
    """The baseline with another `length`, which looks at the training loss."""

    def __init__(self, config: Config, total_steps: int, warmdown_steps: int) -> None:
        super().__init__(config, total_steps, warmdown_steps)
        self.stage, self.began, self.best_step = 0, 0, 0  # which length, since when, and when it was best
        self.mean: float | None = None
        self.best: float | None = None

    def lengths(self) -> tuple[int, ...]:
        """All four."""
        return tuple(max(1, self.config.sequence_length * part // 4) for part in QUARTERS)

    def length(self, step: int) -> int:
        """The present one: it changes in `observe` alone."""
        return self.lengths()[self.stage]

    def observe(self, step: int, loss: float) -> str:
        """Follow the loss of step `step`; move on when it stands still."""
        if self.stage + 1 == len(QUARTERS):
            return ""
        self.mean = loss if self.mean is None else MEMORY * self.mean + (1 - MEMORY) * loss
        if self.best is None or self.mean < self.best - GAIN:
            self.best, self.best_step = self.mean, step
        plateau = step - self.best_step >= max(3, round(PATIENCE * self.total_steps))
        late = step + 1 - self.began >= LONGEST / (len(QUARTERS) - 1) * self.total_steps
        if not (plateau or late):
            return ""
        self.stage, self.began, self.best_step, self.mean, self.best = (
            self.stage + 1,
            step + 1,
            step + 1,
            None,
            None,
        )
        why = "the loss stands still" if plateau else "its time is up"
        return f"curriculum: {self.length(step)} tokens a sequence from step {step + 1} on, {why}"

    def state(self) -> dict[str, Any]:
        """The place in the curriculum."""
        names = ("stage", "began", "best_step", "mean", "best")
        return {name: getattr(self, name) for name in names}

    def load(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        for name, value in state.items():
            setattr(self, name, value)
