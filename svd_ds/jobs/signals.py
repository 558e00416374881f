"""Graceful shutdown on signals.

Each signal requests a checkpoint at the end of the step, and then the exit:

SIGTERM, SIGUSR1   sent by Slurm, by a launcher, or by `kill`
SIGHUP             the terminal was closed; it stays ignored if it was ignored before, as by `nohup`
SIGINT             Ctrl-C; a second one ends the run at once, without a checkpoint
"""

from __future__ import annotations

import signal
from collections.abc import Callable
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT)
KEYBOARD = "Ctrl-C: a checkpoint is saved at the end of this step; another Ctrl-C ends the run without one"


class StopRequest:
    """Handler of the signals, which records that this rank was asked to stop. The ranks exchange that in the
    reduction of each step. As a context manager it restores the handler of Ctrl-C at its exit.

    Args:
        notify: called in a signal handler with a sentence for the person who pressed Ctrl-C.
    """

    def __init__(self, notify: Callable[[str], None] = lambda text: None) -> None:
        self.asked = False
        self.interrupted = False
        """True if a person or a sweep asked to stop: the run must not be restarted."""
        self.by_keyboard = False
        self.failing_nodes: dict[str, str] = {}
        """Host -> what it computed wrongly, if the ranks have agreed to stop for that reason."""
        self._notify = notify
        self._keyboard = signal.getsignal(signal.SIGINT)
        for number in SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._handle)

    def __enter__(self) -> StopRequest:
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._keyboard)

    def interrupt(self) -> None:
        """Ask to stop for good. Any thread may call it."""
        self.asked = self.interrupted = True

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            if self.by_keyboard:
                raise KeyboardInterrupt
            self.by_keyboard = self.interrupted = True
            self._notify(KEYBOARD)
        self.asked = True
