"""Stopping on request: signals set a flag, and the flag is looked at between steps, by all ranks together."""

import signal
import time
from pathlib import Path
from types import FrameType

LOOK_SECONDS = 0.5  # how often the stop file is looked for; a network file system answers each look
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopRequest:
    """Remembers a SIGTERM or SIGUSR1, and sees the run's `stop` file.

    SLURM sends SIGTERM at preemption and at the time limit, SIGUSR1 where --signal asks for it. Nothing is saved
    inside the handler: it may have interrupted anything, a save included. Further signals change nothing, because
    under srun a rank gets each of them twice: from SLURM, and from torchrun that passes its own on.
    """

    def __init__(self, stop_file: Path | None = None) -> None:
        self.reason = ""
        self.stop_file = stop_file
        self._looked = 0.0
        self._listen()

    def _listen(self) -> None:
        """Take the signals, again where something has taken them since.

        LLVM does, below Python, when Triton compiles its first kernel in this process: SIGUSR1 is then lost, and of
        two SIGTERM in quick succession the second one ends the process before anything is saved.
        """
        for number in SIGNALS:
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.reason = self.reason or signal.Signals(number).name

    def done(self) -> None:
        """Nothing is left to stop: from here on the signals are ignored.

        Python puts back the default of each handler while it shuts down, which takes a while with torch: a signal
        would end the process then, and a run that is saved or finished would look like one that broke.
        """
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)

    def look(self) -> bool:
        """Whether this process has been asked to stop."""
        self._listen()
        if not self.reason and self.stop_file is not None and time.monotonic() - self._looked > LOOK_SECONDS:
            self._looked = time.monotonic()
            if self.stop_file.exists():
                self.reason = "stop file"
        return bool(self.reason)
