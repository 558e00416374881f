"""Signals ask for a checkpoint; a second Ctrl-C ends the run at once."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest

from svd_ds.jobs.signals import SIGNALS, StopRequest
from tests.signals import handle_as_in_the_foreground


@pytest.fixture(autouse=True)
def _signals_of_the_foreground() -> Iterator[None]:
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    handle_as_in_the_foreground()
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", SIGNALS)
def test_each_signal_asks_for_a_checkpoint(number: int) -> None:
    sentences: list[str] = []
    stop = StopRequest(sentences.append)
    os.kill(os.getpid(), number)
    by_keyboard = number == signal.SIGINT
    assert (stop.asked, stop.interrupted, stop.by_keyboard) == (True, by_keyboard, by_keyboard)
    assert len(sentences) == by_keyboard


def test_second_ctrl_c_ends_the_run_at_once_and_no_other_signal_does() -> None:
    stop = StopRequest()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        os.kill(os.getpid(), number)
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
    assert stop.asked


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT])
def test_signal_that_was_ignored_stays_ignored(number: int) -> None:
    """nohup ignores SIGHUP; a shell that starts a command in the background ignores SIGINT."""
    signal.signal(number, signal.SIG_IGN)
    stop = StopRequest()
    os.kill(os.getpid(), number)
    assert not stop.asked


def test_ctrl_c_between_two_runs_of_a_process_ends_the_process() -> None:
    with StopRequest():
        pass
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
