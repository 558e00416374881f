"""A graceful stop: signals ask for a checkpoint at the end of the step, and then for the exit.

SIGTERM, SIGUSR1   by Slurm, by a launcher, by `kill`
SIGHUP             the terminal was closed; ignored where it was ignored before, as by `nohup`
SIGINT             Ctrl-C; a second one ends the run at once, without a checkpoint
"""

from __future__ import annotations

import signal
from collections.abc import Callable
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT)
KEYBOARD = "Ctrl-C: a checkpoint is saved at the end of this step; another Ctrl-C ends the run without one"


class StopRequest:
    """Remembers that this rank was asked to stop; the ranks agree on it in the step's own reduction. A
    context: after it Ctrl-C does what it did before."""

    def __init__(self, say: Callable[[str], None] = lambda text: None) -> None:
        """say: called in a signal handler with a sentence for the person who pressed Ctrl-C."""
        self.asked = False
        self.interrupted = False
        """Asked by a person, or by a sweep: another start is not wanted."""
        self.by_keyboard = False
        self.failing_nodes: dict[str, str] = {}
        """Why the ranks have agreed to stop without being asked: hosts that compute wrongly, and what."""
        self._say = say
        self._keyboard = signal.getsignal(signal.SIGINT)
        for number in SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._remember)

    def __enter__(self) -> StopRequest:
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._keyboard)

    def interrupt(self) -> None:
        """Ask to stop for good; from any thread."""
        self.asked = self.interrupted = True

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            if self.by_keyboard:
                raise KeyboardInterrupt
            self.by_keyboard = self.interrupted = True
            self._say(KEYBOARD)
        self.asked = True
