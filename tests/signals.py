"""Signal handlers as a process in the foreground has them, however the tests were started."""

from __future__ import annotations

import signal

from svd_ds.jobs.signals import SIGNALS


def handle_as_in_the_foreground() -> None:
    """Handle signals again that nohup, or a shell that started the tests in the background, has set to be
    ignored: every process of the tests would inherit that. Also for `preexec_fn`."""
    for number in SIGNALS:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
