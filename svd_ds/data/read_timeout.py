"""A time limit for reads: a file system or a server that hangs ends the run with one sentence."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from functools import cache
from queue import SimpleQueue
from typing import Any, TypeVar

Result = TypeVar("Result")


class ReadTimeoutError(OSError):
    """A read that took too long: no fault of what was read."""


def with_timeout(action: Callable[[], Result], seconds: float, sentence: str) -> Result:
    """Run `action` with a time limit.

    A read that hangs cannot be interrupted: its thread is abandoned.

    Args:
        seconds: the limit.
        sentence: the message where it is exceeded.

    Raises:
        ReadTimeoutError: `action` did not return within `seconds`.
        Exception: whatever `action` raises.
    """
    result: Future[Result] = Future()
    _tasks_of(os.getpid()).put((action, result))
    if not wait([result], seconds).done:
        _tasks_of.cache_clear()
        raise ReadTimeoutError(sentence)
    return result.result()


@cache
def _tasks_of(process: int) -> SimpleQueue[tuple[Callable[[], Any], Future[Any]]]:
    """The queue of the process's reading thread: one for all reads, as starting a thread costs as much as a
    read. A forked process needs a thread of its own."""
    tasks: SimpleQueue[tuple[Callable[[], Any], Future[Any]]] = SimpleQueue()

    def work() -> None:
        while True:
            action, result = tasks.get()
            try:
                result.set_result(action())
            except BaseException as error:
                result.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    return tasks
