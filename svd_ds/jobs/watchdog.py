"""Hang detection.

A rank that completes no step for too long writes its Python stack trace to its log and ends with exit code 1.
"""

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
"""Seconds between the report of a hang and the end of the process: each rank has time to notice by itself."""
MARGIN = timedelta(minutes=10)
"""Time by which the timeout of collectives exceeds the watchdog's, whose report of a hang says more."""


@dataclass(frozen=True)
class WatchdogConfig(Settings, section="watchdog"):
    """Time limits of a step."""

    # At most a week: timers of the system, gloo and NCCL overflow after some years.
    minutes: float = number(30.0, ge=0, le=10_080)
    """Minutes without a completed step after which a rank writes its stack trace to its log and ends; 0
    switches the watchdog off. It must exceed evaluation, checkpoint and previews together."""
    first_minutes: float = number(90.0, ge=0, le=10_080)
    """Limit in minutes until the first step is complete; files are read and weights loaded in this time."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.first_minutes < self.minutes:
            raise ValueError(
                f"watchdog.first_minutes is {self.first_minutes}: it must be at least watchdog.minutes, "
                f"{self.minutes}"
            )

    @property
    def collective_timeout(self) -> timedelta:
        """Timeout of collectives: longer than the watchdog's, or a day if the watchdog is off."""
        return timedelta(minutes=self.first_minutes) + MARGIN if self.minutes else timedelta(days=1)


class Watchdog:
    """Timer that ends this process, with code 1, when `heartbeat` is not called for too long.

    Args:
        report: called with a sentence before the process ends, in a thread of the watchdog.
    """

    def __init__(self, config: WatchdogConfig, report: Callable[[str], None]) -> None:
        self.config = config
        self.report = report
        self.num_steps = 0
        """Steps that this process has completed."""
        self._stopped = threading.Event()
        self._minutes = 0.0
        self._deadline = math.inf

    def start(self, log: TextIO) -> None:
        """Start the timer of the first step; stack traces go to `log`."""
        if self.config.minutes == 0:
            return
        self._log = log
        self._arm(self.config.first_minutes)
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def heartbeat(self) -> None:
        """Restart the timer: a step is complete."""
        self.num_steps += 1
        if self.config.minutes != 0:
            self._arm(self.config.minutes)

    def stop(self) -> None:
        """Stop the timer."""
        self._stopped.set()
        faulthandler.cancel_dump_traceback_later()

    def _arm(self, minutes: float) -> None:
        self._minutes = minutes
        self._deadline = time.monotonic() + 60 * minutes
        # faulthandler's timer is a C thread, which also ends a rank that never releases the GIL.
        faulthandler.dump_traceback_later(60 * minutes + GRACE_S, exit=True, file=self._log)

    def _watch(self) -> None:
        while not self._stopped.wait(1.0):
            if time.monotonic() > self._deadline:
                self.report(f"no step for {self._minutes:g} minutes, so this rank ends")
                return
