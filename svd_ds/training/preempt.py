"""A polite end: SIGTERM and SIGUSR1 ask for a checkpoint at the next step boundary, and then for the exit."""

from __future__ import annotations

import signal
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopRequest:
    """Remembers that this rank was asked to stop; the ranks agree on it in the step's own reduction."""

    def __init__(self) -> None:
        self.asked = False
        self.interrupted = False
        """Asked by a person, or by a sweep: another life is not wanted."""
        for number in SIGNALS:
            signal.signal(number, self._remember)

    def interrupt(self) -> None:
        """Ask to stop for good; from any thread."""
        self.asked = self.interrupted = True

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
