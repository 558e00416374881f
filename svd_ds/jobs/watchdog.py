"""The end of a run that hangs: without a step for too long, each rank writes its Python stack and dies."""

from __future__ import annotations

import faulthandler
import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import TextIO

from svd_ds.settings import Settings, number

GRACE_S = 5.0
"""Between the word that a rank hangs and its end: each rank has time to notice by itself."""
MARGIN = timedelta(minutes=10)
"""Of a wait for another rank over the watchdog, which tells more about a hang."""


@dataclass(frozen=True)
class WatchdogConfig(Settings, section="watchdog"):
    # At most a week: timers of the system and of gloo and NCCL hold no more than some years.
    minutes: float = number(30.0, ge=0, le=10_080)
    """Without a step, after which a rank writes its stack to its log and ends; 0 never does. An evaluation, a
    checkpoint and previews may lie between two steps."""
    first_minutes: float = number(90.0, ge=0, le=10_080)
    """The same until the first step: files are read, weights loaded, kernels chosen."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.first_minutes < self.minutes:
            raise ValueError(
                f"watchdog.first_minutes is {self.first_minutes}: it must be at least watchdog.minutes, "
                f"{self.minutes}"
            )

    @property
    def patience(self) -> timedelta:
        """How long a rank may wait for another; where nobody watches, so long that it is no slow one."""
        return timedelta(minutes=self.first_minutes) + MARGIN if self.minutes else timedelta(days=1)


class Watchdog:
    """Ends this process, with code 1, when `heartbeat` is not called for too long."""

    def __init__(self, config: WatchdogConfig, tell: Callable[[str], None]) -> None:
        self.config = config
        self.tell = tell
        self._stopped = threading.Event()
        self._minutes = 0.0
        self._deadline = math.inf

    def start(self, log: TextIO) -> None:
        """Watch for the first step; stacks go to `log`."""
        if self.config.minutes == 0:
            return
        self._log = log
        self._arm(self.config.first_minutes)
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def heartbeat(self) -> None:
        """A step is done."""
        if self.config.minutes != 0:
            self._arm(self.config.minutes)

    def stop(self) -> None:
        self._stopped.set()
        faulthandler.cancel_dump_traceback_later()

    def _arm(self, minutes: float) -> None:
        self._minutes = minutes
        self._deadline = time.monotonic() + 60 * minutes
        # A thread of the interpreter's own, without Python: it ends a rank that holds the lock for ever too.
        faulthandler.dump_traceback_later(60 * minutes + GRACE_S, exit=True, file=self._log)

    def _watch(self) -> None:
        while not self._stopped.wait(1.0):
            if time.monotonic() > self._deadline:
                self.tell(f"no step for {self._minutes:g} minutes, so this rank ends")
                return
